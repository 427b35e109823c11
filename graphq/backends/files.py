"""Files that appear only when they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from graphq import ir
from graphq.errors import UsageError


def aside(path: Path) -> Path:
    """Where a result goes that was refused."""
    return path.with_name(f"{path.name}.failed.onnx")


def check_output(path: Path, *inputs: Path) -> None:
    """Refuse an output path that cannot be used, before any work is done.

    Raises:
        UsageError: it is one of `inputs`, a folder, or lies in a folder that is missing or cannot be written.
    """
    written = {file.resolve() for file in (path, aside(path), path.with_name(f"{path.name}.data"))}
    for source in inputs:
        if source.resolve() in written:
            raise UsageError(
                "The output would overwrite the input.", where=str(path), hint="graphq never touches the input; choose another --out"
            )
    if path.is_dir():
        raise UsageError("The output path is a folder.", where=str(path), expected="a file name, such as model.int8.onnx")
    if not path.parent.is_dir():
        raise UsageError("The output folder does not exist.", where=str(path.parent), hint="create it first")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise UsageError(
            "The output folder cannot be written.", where=f"{path.parent}: {error.strerror}", hint="choose another --out"
        ) from error


def write_atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file in a fresh folder beside `path`, then move all that it wrote into place, `path` last."""
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        write(folder / path.name)
        written = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
        for file in written:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        for file in written:
            os.replace(file, path.parent / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def emit_onnx(model: ir.Model, path: Path) -> None:
    """Write `model` to `path` (and `<name>.data` beside it if it is larger than a protobuf file can be)."""
    write_atomically(path, lambda file: ir.save(model, file))
