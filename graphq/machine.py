"""The machine that a measurement belongs to: what decides how fast a model runs, beside the model and its runtime."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Facts in which two machines must agree before their times are compared.

    Attributes:
        cpu: Model name as the system gives it.
        cores: Logical ones that this process may use.
        gpu: NVIDIA GPUs by name, in the driver's order; empty without any.
        driver: Version of NVIDIA's driver.
        os: Kernel, its release, and the architecture.
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
    system = f"{platform.system()} {platform.release()} {platform.machine()}"
    return Machine(_cpu(), cores, " + ".join(name for name, _ in gpus), gpus[0][1] if gpus else "", system)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return (named or [platform.processor() or platform.machine()])[0]


def _gpus() -> list[tuple[str, str]]:
    """(name, driver version) of each NVIDIA GPU; none where the driver's own tool is missing or finds none."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [line.rpartition(",") for line in done.stdout.splitlines() if "," in line]
    return [(name.strip(), driver.strip()) for name, _, driver in rows]
