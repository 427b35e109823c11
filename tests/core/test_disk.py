"""A full disk is named as one, whoever writes: Python's files say it by number, numpy's only in words."""

from __future__ import annotations

import errno
from pathlib import Path

import numpy as np
import pytest

from graphq import convert, disk, ir_files
from graphq.errors import UsageError
from graphq.models import onnx_path


@pytest.mark.parametrize("error", [OSError("884736 requested and 1024 written"), OSError(errno.ENOSPC, "No space left on device")])
def test_a_full_disk_is_named_with_what_is_needed_and_what_is_free(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no space left") as raised, disk.room(tmp_path, 5_000_000):
        raise error
    assert f"{tmp_path}: " in raised.value.where and "MB free" in raised.value.where and raised.value.expected == "up to 5.0 MB"


@pytest.mark.parametrize("error", [
    OSError("read past the end"), OSError(errno.EACCES, "Permission denied"),
    OSError(errno.ENOSPC, "No space left on device", "/elsewhere/file"),
])  # fmt: skip
def test_other_errors_pass(error: OSError, tmp_path: Path) -> None:
    with pytest.raises(OSError) as raised, disk.room(tmp_path, 1):
        raise error
    assert raised.value is error


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_numpy_says_it_in_these_words() -> None:
    with pytest.raises(OSError) as raised, open("/dev/full", "wb", buffering=0) as file:
        np.zeros(1 << 20).tofile(file)
    assert raised.value.errno == errno.ENOSPC or disk._NUMPY.search(str(raised.value))


@pytest.mark.parametrize("budget", [2 << 30, 1 << 12])
def test_a_conversion_says_it_and_leaves_nothing(budget: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, file: object) -> None:
        raise OSError("884736 requested and 1024 written")

    monkeypatch.setattr(ir_files.onnx_ir.Tensor, "tofile", full)
    with pytest.raises(UsageError, match="no space left"):
        convert(onnx_path("digits_cnn"), tmp_path / "out.onnx", recipe="int8-weight-only", memory_budget=budget)
    assert not list(tmp_path.iterdir())
