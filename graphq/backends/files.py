"""Files that appear only when they are complete."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from graphq.errors import UsageError


def aside(path: Path) -> Path:
    """Where a result goes that was refused."""
    return path.with_name(f"{path.name}.failed.onnx")


def data_of(path: Path) -> Path:
    """Where the weights of a model at `path` go that do not fit into it."""
    return path.with_name(f"{path.name}.data")


def remove_aside(path: Path) -> None:
    """Remove what an earlier run refused to write to `path`."""
    if _has_data(aside(path)):
        data_of(aside(path)).unlink()
    aside(path).unlink(missing_ok=True)


def _has_data(model: Path) -> bool:
    """Whether the file beside `model` that may hold its weights does, which is so if `model` names it."""
    data = data_of(model)
    if not (data.is_file() and model.is_file() and model.stat().st_size):
        return False
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(data.name.encode()) >= 0


def check_output(path: Path, inputs: Iterable[Path]) -> None:
    """Refuse an output path that cannot be used, before any work is done.

    Args:
        path: Where the result goes.
        inputs: Files and folders that the conversion reads; those that are not there do not matter.

    Raises:
        UsageError: it is one of `inputs` or lies in one, is no regular file, has another model's data beside it, or its folder is missing
            or cannot be written.
    """
    written = [file.resolve() for model in (path, aside(path)) for file in (model, data_of(model))]
    for source in inputs:
        for file in written:
            if file == source.resolve() or (source.is_dir() and file.is_relative_to(source.resolve()) and file.exists()):
                raise UsageError("The output would overwrite an input.", where=f"{path}: {source} is read", hint="choose another --out")
    for data in (data_of(model) for model in (path, aside(path)) if data_of(model).exists() and not _has_data(model)):
        raise UsageError("Another file lies where the weights of a large result go.", where=str(data),
                         hint="move it away, or choose another --out")  # fmt: skip
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


def exit_when_terminated() -> None:
    """Let SIGTERM raise SystemExit, so that temporary files go: the signal would end the process at once. For the main thread."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@contextmanager
def pending(path: Path) -> Iterator[Path]:
    """A path of the same name in a fresh folder beside `path`; what lies there at the end is moved into place, `path` last.

    Nothing is if the block raises. The data of an earlier result there goes with it: no model is ever found with the data of another.
    """
    folder = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield folder / path.name
        written = sorted(folder.iterdir(), key=lambda file: file.name == path.name)
        is_stale = _has_data(path) and len(written) == 1
        for file in written:
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        if len(written) > 1:
            path.unlink(missing_ok=True)
        for file in written:
            os.replace(file, path.parent / file.name)
        if is_stale:
            data_of(path).unlink()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def written_bytes(file: Path) -> int:
    """Bytes of the pending `file` and of the data beside it."""
    return sum(part.stat().st_size for part in file.parent.iterdir())
