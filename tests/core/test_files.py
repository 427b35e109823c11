"""files: results replace what they are of, with their data, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest

from graphq.backends import files
from graphq.errors import UsageError


def write(path: Path, *, large: bool) -> None:
    with files.pending(path) as part:
        part.write_bytes(b"names out.onnx.data" if large else b"small")
        if large:
            files.data_of(part).write_bytes(b"weights")


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


def test_a_small_result_takes_the_data_of_a_large_one_with_it(tmp_path: Path) -> None:
    write(tmp_path / "out.onnx", large=True)
    assert names(tmp_path) == {"out.onnx", "out.onnx.data"}
    write(tmp_path / "out.onnx", large=False)
    assert names(tmp_path) == {"out.onnx"}


def test_a_crash_between_two_files_leaves_no_model_with_the_data_of_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "out.onnx", large=True)
    replace, done = files.os.replace, list[str]()

    def crash(source: Path, target: Path) -> None:
        if done:
            raise KeyboardInterrupt
        done.append(target.name)
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out.onnx", large=True)
    assert names(tmp_path) == {"out.onnx.data"}


def test_what_was_refused_goes_with_its_data(tmp_path: Path) -> None:
    (tmp_path / "out.onnx.failed.onnx").write_bytes(b"names out.onnx.failed.onnx.data")
    (tmp_path / "out.onnx.failed.onnx.data").touch()
    files.remove_aside(tmp_path / "out.onnx")
    assert not names(tmp_path)


@pytest.mark.parametrize("data", ["out.onnx.data", "out.onnx.failed.onnx.data"])
def test_data_that_the_result_would_replace_is_guarded(tmp_path: Path, data: str) -> None:
    """As an input, and whatever it is unless the model that is replaced names it."""
    (tmp_path / data).touch()
    with pytest.raises(UsageError, match="overwrite an input"):
        files.check_output(tmp_path / "out.onnx", [tmp_path / data])
    with pytest.raises(UsageError, match="Another file lies where"):
        files.check_output(tmp_path / "out.onnx", [])
    (tmp_path / data).with_suffix("").write_bytes(f"names {data}".encode())
    files.check_output(tmp_path / "out.onnx", [])
