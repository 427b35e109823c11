"""The machine that a measurement belongs to: what decides how fast a model runs, beside the model and its runtime."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Facts in which two machines must agree before their times are compared.

    Attributes:
        cpu: Model name as the system gives it; see `cpu_name` where it gives none.
        cores: Logical ones that this process may use.
        gpu: NVIDIA GPUs by name, in the driver's order; empty without any.
        driver: Version of NVIDIA's driver.
        os: Kernel, the first two numbers of its release (what follows are patches), and the architecture.
    """

    cpu: str
    cores: int
    gpu: str
    driver: str
    os: str

    def __str__(self) -> str:
        gpu = f"{self.gpu} with driver {self.driver}" if self.gpu else "no NVIDIA GPU"
        return f"{self.cpu}, {self.cores} cores, {gpu}, {self.os}"

    def differences(self, other: Machine) -> list[str]:
        """Names of the facts in which `other` is not the same."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(other, entry.name)]


def this_machine() -> Machine:
    """The machine that this process runs on. Asks nvidia-smi for GPUs; clocks and settings are not touched."""
    gpus = _gpus()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    release = re.match(r"\d+(\.\d+)?", platform.release())
    system = f"{platform.system()} {release[0] if release else platform.release()} {platform.machine()}"
    board = _read("/proc/device-tree/model") or _read("/sys/class/dmi/id/product_name")
    cpu = cpu_name(_read("/proc/cpuinfo"), board, platform.processor() or platform.machine(), _read("/etc/machine-id") + platform.node())
    return Machine(cpu, cores, " + ".join(name for name, _ in gpus), gpus[0][1] if gpus else "", system)


def cpu_name(cpuinfo: str, board: str, processor: str, host: str) -> str:
    """What tells this CPU from others.

    Args:
        cpuinfo: Text of /proc/cpuinfo, empty where there is none. A model name in it is enough, except on ARM: the kernel gives none of
            64 bits, and of 32 bits only the architecture. There implementer, part, variant and revision of its kinds of core count.
        board: Name of the board, which the device tree or the firmware has.
        processor: What Python's `platform` says; on ARM and outside Linux it may be just the architecture.
        host: What only this host has; its hash is added where nothing else tells more than the architecture.
    """
    found: dict[str, list[str]] = {}
    for key, _, value in (line.partition(":") for line in cpuinfo.splitlines()):
        found.setdefault(key.strip(), []).append(value.strip())
    ids = [found.get(f"CPU {name}", []) for name in ("implementer", "part", "variant", "revision")]
    cores = " + ".join(dict.fromkeys("/".join(core) for core in zip(*ids, strict=False)))
    if "model name" in found and not cores:
        return found["model name"][0]
    told = ", ".join(part for part in (board.strip("\0 \n"), cores) if part)
    if told or " " in processor:  # Windows: Intel64 Family 6 Model 151 Stepping 2, GenuineIntel
        return f"{processor} ({told})" if told else processor
    return f"{processor} (host {hashlib.sha256(host.encode()).hexdigest()[:8]})"


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _gpus() -> list[tuple[str, str]]:
    """(name, driver version) of each NVIDIA GPU; none where the driver's own tool is missing or finds none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return [(name.strip(), driver.strip()) for name, _, driver in rows]
