"""Runs of synthesis that can be stopped and go on later, to the same bytes: batches that are done and the state of the one that is not."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from graphq import ir
from graphq.errors import UsageError
from graphq.synthesis.strategy import Arrays, Batch

EVERY = 60.0
"""Seconds between two states on disk; the last one is written when a run is interrupted."""

_KEY, _FACTS, _SUFFIX = "synthesis.json", "facts", ".npz"


def fingerprint(model: ir.Model, **asked: Any) -> str:
    """What a run depends on, as JSON: the model's content by its hash, and whatever else was `asked`."""
    digest = hashlib.sha256()
    for node in ir.all_nodes(model):
        names = [value.name if value is not None else None for value in node.inputs]
        attributes = sorted((name, _content(entry.value)) for name, entry in node.attributes.items())
        digest.update(repr((node.op_type, node.domain, names, [out.name for out in node.outputs], attributes)).encode())
    for name, value in sorted(model.graph.initializers.items()):
        digest.update(name.encode() + (value.const_value.tobytes() if value.const_value is not None else b""))
    return json.dumps({"model": digest.hexdigest(), **asked}, sort_keys=True, default=_told)


def _content(attribute: object) -> str:
    """Of subgraphs nothing: their nodes count for themselves."""
    if isinstance(attribute, ir.Graph):
        return "graph"
    return hashlib.sha256(attribute.tobytes()).hexdigest() if hasattr(attribute, "tobytes") else str(attribute)


def _told(asked: object) -> str:
    """Files by what is in them."""
    return hashlib.sha256(asked.read_bytes()).hexdigest() if isinstance(asked, Path) and asked.is_file() else str(asked)


class Keeper:
    """What is kept of a run in `folder`; nothing if that is None.

    Leaving it by an exception writes the state of the batch at work. Raises UsageError: the folder holds something else.
    """

    def __init__(self, folder: str | Path | None, key: str) -> None:
        self.folder, self.key = None if folder is None else Path(folder), key
        self._at_work: tuple[int, Batch] | None = None
        self._saved = time.monotonic()

    def __enter__(self) -> Keeper:
        if self.folder is None:
            return self
        try:
            self.folder.mkdir(exist_ok=True)
            found = self.folder / _KEY
            if not found.exists() and any(self.folder.iterdir()):
                raise UsageError("The folder for an interrupted run holds other files.", where=str(self.folder), hint="move it away")
            if found.exists() and found.read_text(encoding="utf-8") != self.key:
                raise UsageError("The interrupted run there was another one.", where=str(self.folder),
                                 expected=found.read_text(encoding="utf-8")[:500],
                                 hint="ask for the same as before, or remove the folder to start anew")  # fmt: skip
            found.write_text(self.key, encoding="utf-8")
        except OSError as error:
            raise UsageError("The folder for an interrupted run cannot be used.", where=f"{self.folder}: {error.strerror}",
                             hint="give another folder") from error  # fmt: skip
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._save_state()
            if self.folder is not None and not any(self.folder.glob(f"*{_SUFFIX}")):
                clear(self.folder)  # nothing was done yet

    def finished(self, index: int) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        """Arrays of a batch that is done and what is known of it, or None."""
        return self._read(f"batch{index}")

    def finish(self, index: int, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        """Keep a batch that is done."""
        self._at_work = None
        self._write(f"batch{index}", arrays, facts)
        if self.folder is not None:
            (self.folder / f"state{index}{_SUFFIX}").unlink(missing_ok=True)

    def restore(self, index: int, batch: Batch) -> None:
        """Let `batch` go on where an interrupted run left it."""
        found = self._read(f"state{index}")
        if found is not None:
            arrays, facts = found
            batch.state = lambda: arrays
            batch.step, batch.first, batch.losses, batch.seconds = (facts[key] for key in ("step", "first", "losses", "seconds"))

    def watch(self, index: int, batch: Batch) -> None:
        """Know of a step; its state is on disk after `EVERY` seconds."""
        self._at_work = index, batch
        if time.monotonic() - self._saved > EVERY:
            self._save_state()

    def _save_state(self) -> None:
        self._saved = time.monotonic()
        if self._at_work is not None and self._at_work[1].state is not None:
            index, batch = self._at_work
            facts = {"step": batch.step, "first": batch.first, "losses": batch.losses, "seconds": batch.seconds}
            self._write(f"state{index}", batch.state(), facts)  # type: ignore[misc]

    def _read(self, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
        file = None if self.folder is None else self.folder / f"{name}{_SUFFIX}"
        if file is None or not file.exists():
            return None
        with np.load(file, allow_pickle=False) as pack:
            arrays = {key.removeprefix("array:"): pack[key] for key in pack.files if key != _FACTS}
            return arrays, json.loads(str(pack[_FACTS]))

    def _write(self, name: str, arrays: Arrays, facts: Mapping[str, Any]) -> None:
        if self.folder is None:
            return
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.folder)
        with os.fdopen(handle, "wb") as file:
            write_npz(file, {f"array:{key}": array for key, array in arrays.items()} | {_FACTS: np.array(json.dumps(facts))})
        os.replace(temporary, self.folder / f"{name}{_SUFFIX}")


def write_npz(file: IO[bytes], arrays: Arrays) -> None:
    """What `np.savez` writes, whatever the arrays are called: it has parameters of its own."""
    with zipfile.ZipFile(file, "w") as pack:
        for name, array in arrays.items():
            with pack.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.asarray(array), allow_pickle=False)  # type: ignore[no-untyped-call, unused-ignore]


def clear(folder: str | Path) -> None:
    """Remove what a `Keeper` left in `folder`, and the folder if nothing else lies in it."""
    folder = Path(folder)
    if (folder / _KEY).exists():
        for file in [folder / _KEY, *folder.glob(f"*{_SUFFIX}"), *folder.glob(".*.*")]:
            file.unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()
