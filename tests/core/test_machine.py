"""Which machine a result is from: the same every time, told apart from others, and its GPUs as the driver names them."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from graphq.machine import cpu_name, this_machine


def test_the_machine_is_the_same_every_time() -> None:
    found = this_machine()
    assert found == this_machine() and found.cpu and found.cores >= 1 and found.os.count(" ") >= 2
    assert found.differences(found) == [] and found.differences(replace(found, cpu="x", driver="y")) == ["cpu", "driver"]


def test_the_operating_system_goes_without_its_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.release", lambda: "6.18.44-fc-v669")
    monkeypatch.setattr("platform.system", lambda: "Linux")
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    assert this_machine().os == "Linux 6.18 x86_64"


ARM = "processor\t: {}\nBogoMIPS\t: 243.75\nCPU implementer\t: 0x41\nCPU variant\t: 0x{}\nCPU part\t: {}\nCPU revision\t: 1\n\n"


@pytest.mark.parametrize(
    ("cpuinfo", "board", "processor", "name"),
    [
        ("processor\t: 0\nmodel name\t: A CPU\n\nprocessor\t: 1\nmodel name\t: A CPU\n", "Board", "x86_64", "A CPU"),
        (ARM.format(0, 3, "0xd0c") + ARM.format(1, 3, "0xd0c"), "", "aarch64", "aarch64 (0x41/0xd0c/0x3/1)"),
        (ARM.format(0, 1, "0xd40"), "", "aarch64", "aarch64 (0x41/0xd40/0x1/1)"),
        (ARM.format(0, 0, "0xd05") + ARM.format(1, 4, "0xd0b"), "", "aarch64", "aarch64 (0x41/0xd05/0x0/1 + 0x41/0xd0b/0x4/1)"),
        ("model name\t: ARMv7 (v7l)\n" + ARM.format(0, 0, "0xd08"), "Pi 4\0", "armv7l", "armv7l (Pi 4, 0x41/0xd08/0x0/1)"),
        ("", "Pi 5\0", "aarch64", "aarch64 (Pi 5)"),
        ("", "", "Intel64 Family 6 Model 151", "Intel64 Family 6 Model 151"),
    ],
)  # fmt: skip
def test_a_cpu_without_a_model_name_is_told_by_its_cores_and_board(cpuinfo: str, board: str, processor: str, name: str) -> None:
    assert cpu_name(cpuinfo, board, processor, "a host") == name == cpu_name(cpuinfo, board, processor, "another host")


def test_hosts_of_which_only_the_architecture_is_known_are_different_machines() -> None:
    first, other = (cpu_name("", "", "arm", host) for host in ("a host", "another"))
    assert first != other and first == cpu_name("", "", "arm", "a host") and first.startswith("arm (host ") and "a host" not in first


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in is a shell script")
def test_gpus_are_those_that_the_driver_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "no NVIDIA GPU" in str(this_machine())
    tool.write_text("#!/bin/sh\necho 'NVIDIA H200, 570.1'\necho 'NVIDIA L4, 570.1'\n")
    tool.chmod(0o755)
    found = this_machine()
    assert (found.gpu, found.driver) == ("NVIDIA H200 + NVIDIA L4", "570.1") and "driver 570.1" in str(found)
    tool.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed, make sure'\nexit 9\n")
    assert this_machine().gpu == ""
