"""Files that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from graphq.errors import UsageError


def aside(path: Path) -> Path:
    """Where a result goes that was refused."""
    return path.with_name(f"{path.name}.failed.onnx")


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output path that cannot be used, before any work is done.

    Args:
        path: Where the result goes.
        inputs: Files and folders that the conversion reads; those that are not there do not matter.

    Raises:
        UsageError: it is one of `inputs` or lies in one, is no regular file, or its folder is missing or cannot be written.
    """
    written = [file.resolve() for file in (path, aside(path), path.with_name(f"{path.name}.data"))]
    for source in inputs:
        for file in written:
            if file == source.resolve() or (source.is_dir() and file.is_relative_to(source.resolve()) and file.exists()):
                raise UsageError(
                    "The output would overwrite an input.", where=f"{path}: {source} is read", hint="choose another --out"
                )
    if path.is_dir():
        raise UsageError("The output path is a folder.", where=str(path), expected="a file name, such as model.int8.onnx")
    if path.exists() and not path.is_file():
        raise UsageError("The output path is no regular file.", where=str(path), expected="a file name, such as model.int8.onnx")
    if not path.parent.is_dir():
        raise UsageError("The output folder does not exist.", where=str(path.parent), hint="create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UsageError(
            "The output folder cannot be written.", where=f"{path.parent}: {error.strerror}", hint="choose another --out"
        ) from error


@contextmanager
def pending(path: Path) -> Iterator[Path]:
    """A path of the same name in a fresh folder beside `path`; what lies there at the end is moved into place, `path` last.

    Nothing is if the block raises.
    """
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder / path.name
        written = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
        for file in written:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        for file in written:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def written_bytes(file: Path) -> int:
    """Bytes of the pending `file` and of the data beside it."""
    return sum(part.stat().st_size for part in file.parent.iterdir())
