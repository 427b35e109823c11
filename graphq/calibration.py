"""Calibration data as one type: batches of model inputs, read from where they lie, whatever the source.

Memory does not grow with the number of samples: arrays in .npy and uncompressed .npz files are mapped, compressed ones
decompressed and images decoded batch by batch. Only Python iterables are materialised.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from graphq.arrays import Bounds, Column, is_float, open_npy, open_npz
from graphq.columns import check, is_pixels
from graphq.errors import DataError
from graphq.names import did_you_mean
from graphq.preprocess import Preprocess, describe, format_shape, image_shape, open_images, resolve_preprocess
from graphq.random_inputs import random_columns
from graphq.spec import ModelInput

if TYPE_CHECKING:
    from graphq.synthesis import SynthesisFacts

RANDOM_COUNT = 32
"""Samples of `open_calibration("random", ...)`."""

_HASH_ROWS = 8
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class CalibrationSet:
    """Samples for a model, in order; a view if it was split off another set.

    Attributes:
        inputs: The model's inputs.
        kind: `npz`, `npy`, `folder`, `iterable`, `random` or `synthesized`.
        source: Where the samples come from, for messages.
        columns: One per model input, all with the same number of samples.
        files: The files behind the columns, empty if they are in memory.
        preprocess: Applied to uint8 images `[N, H, W, C]` of a float input.
        start, stop: The rows of the columns that belong to this set.
        synthesis: How the samples were made, if they were made from the model.
    """

    inputs: tuple[ModelInput, ...]
    kind: str
    source: str
    columns: tuple[Column, ...]
    start: int
    stop: int
    files: tuple[Path, ...] = ()
    preprocess: Preprocess | None = None
    note: str = ""
    synthesis: SynthesisFacts | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def description(self) -> str:
        """What and how many, in one line."""
        total = self.columns[0].shape[0]
        count = f"{len(self)} samples" if len(self) == total else f"samples {self.start} to {self.stop - 1} of {total}"
        declared = f", preprocessing {describe(self.preprocess)}" if self.preprocess else ""
        return f"{count} from {self.source}{declared}{self.note}"

    @property
    def fixed_batch(self) -> int | None:
        """The number of samples that the model takes at once, if it takes no other."""
        return fixed_batch(self.inputs)

    def batches(self, size: int, starts: Sequence[int] | None = None) -> Iterator[dict[str, np.ndarray]]:
        """For each input an array `[size, ...]` of its dtype; the last may be shorter.

        If the model's batch is fixed, that is the size of each, and an incomplete last one is left out.

        Args:
            size: Samples in a batch.
            starts: Where batches begin, ascending and at least `size` apart; by default one behind the other.
        """
        fixed, count = self.fixed_batch, len(self)
        if size < 1 or min(starts or [0]) < 0:
            raise ValueError(f"size must be at least 1 and starts at least 0, not {size} and {starts}")
        if fixed and count < fixed:
            raise DataError(
                f"the model takes {fixed} samples at once, there are {count}",
                where=self.description,
                expected=f"at least {fixed} samples",
                hint="give more samples, or export the model with a dynamic batch dimension",
            )
        size = fixed or size
        end = count - count % fixed if fixed else count
        bounds = [(start, min(start + size, end)) for start in (range(0, end, size) if starts is None else starts)]
        return self._read([(self.start + first, self.start + last) for first, last in bounds if first < last])

    def _read(self, bounds: list[tuple[int, int]]) -> Iterator[dict[str, np.ndarray]]:
        streams = [column.stream(bounds) for column in self.columns]
        for first, _ in bounds:
            triples = zip(self.inputs, self.columns, streams, strict=True)
            yield {i.name: self._finish(i, column, next(stream), first) for i, column, stream in triples}

    def _finish(self, model_input: ModelInput, column: Column, part: np.ndarray, first: int) -> np.ndarray:
        """Preprocessed, cast, copied and checked: what the model gets."""
        if self.preprocess and (self.kind == "folder" or is_pixels(model_input, column)):
            layout = image_shape(model_input, self.preprocess).layout
            part = replace(self.preprocess, layout=layout).apply(part)
        with np.errstate(over="ignore", invalid="ignore"):
            result = np.array(part, dtype=model_input.dtype, order="C")
        if is_float(result.dtype) and result.size and not (finite := np.isfinite(result)).all():
            bad = int(np.argmin(finite.reshape(len(result), -1).all(axis=1)))
            raise DataError(
                f"NaN or Inf in the data for input '{model_input.name}', first in sample {first + bad}",
                where=self.source,
                expected=f"finite numbers within the range of {result.dtype}",
                hint="correct or remove that sample",
            )
        limit = model_input.limit
        if limit is not None and result.dtype.kind in "iu" and result.size and not -limit <= result.min() <= result.max() < limit:
            what = f"an index in the data for input '{model_input.name}' is out of range: {result.min()} to {result.max()}"
            hint = "was it made with the tokenizer of this model?"
            raise DataError(what, where=self.source, expected=f"0 to {limit - 1}, the rows of the table it looks up", hint=hint)
        return result

    def split(self, held_out: int) -> tuple[CalibrationSet, CalibrationSet]:
        """The first samples to calibrate on, and the last `held_out` to verify with: two views, no copy.

        Each part keeps at least one sample (whole batches, if the model's batch is fixed); where there are too few for
        two parts, both are this set.
        """
        unit = self.fixed_batch or 1
        whole = len(self) // unit
        if whole < 2:
            same = replace(self, note=f"{self.note} (too few to hold any back: calibrated and verified on the same)")
            return same, same
        held = min(max(math.ceil(held_out / unit), 1), whole - 1) * unit
        stop = self.start + whole * unit
        return replace(self, stop=stop - held), replace(self, start=stop - held, stop=stop)

    def take(self, count: int) -> CalibrationSet:
        """A view of the first `count` samples (rounded up to the model's fixed batch), or of all if there are fewer."""
        if count < 1:
            raise ValueError(f"count must be at least 1, not {count}")
        unit = self.fixed_batch or 1
        return replace(self, stop=min(self.stop, self.start + math.ceil(count / unit) * unit))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over names, dtypes, shapes, rows, preprocessing and content (the bytes of files, if in files)."""
        declared = self.preprocess.to_json() if self.preprocess else ""
        head = [(i.name, str(i.dtype), i.shape, str(c.dtype), c.shape) for i, c in zip(self.inputs, self.columns, strict=True)]
        total = hashlib.sha256(repr((head, self.start, self.stop, declared)).encode())
        for path in self.files:
            total.update(path.name.encode() + b"\0")
            with path.open("rb") as file:
                while block := file.read(_BLOCK_BYTES):
                    total.update(block)
        for column in () if self.files else self.columns:
            firsts = range(self.start, self.stop, _HASH_ROWS)
            for part in column.stream([(first, min(first + _HASH_ROWS, self.stop)) for first in firsts]):
                total.update(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
        return total.hexdigest()


@dataclass(frozen=True, eq=False)
class _Memory:
    """An array that is there already."""

    array: np.ndarray

    @property
    def dtype(self) -> np.dtype:
        return self.array.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def stream(self, bounds: Bounds) -> Iterator[np.ndarray]:
        return (self.array[first:last] for first, last in bounds)


def open_calibration(
    source: Any, inputs: Sequence[ModelInput], *, preprocess: str | Path | Preprocess | None = None, seed: int = 0
) -> CalibrationSet:
    """Calibration data for a model with these inputs; everything that can be checked before reading is.

    Args:
        source: Path of an .npz with an array `[samples, ...]` per model input under the input's name, `labels` beside them
            do not matter; path of a .npy,
            for a model with one input; path of a folder of images, for a model with one image input; a dict of arrays;
            an iterable of batches (a dict, or a tuple in the order of the inputs, or an array for one input;
            axis 0 is the samples), which is materialised; or the word `random`, for `RANDOM_COUNT` random samples.
        inputs: The model's inputs, in order.
        preprocess: Preset or YAML file for uint8 images `[samples, height, width, channels]`; a folder needs it.
        seed: Of random samples.
    """
    chosen = None if preprocess is None else resolve_preprocess(preprocess)
    if not isinstance(source, str | Path):
        return from_columns(_materialise(source, inputs, chosen), inputs, "iterable", "memory", chosen)
    if source == "random":
        return random_calibration(inputs, RANDOM_COUNT, seed)
    path = Path(source)
    if not path.exists():
        siblings = list(path.parent.iterdir()) if path.parent.is_dir() else []
        known = [other.name for other in siblings if other.is_dir() or other.suffix.lower() in (".npz", ".npy")]
        hint = did_you_mean(path.name, [*known, "synth", "random"]) or "check the path"
        raise DataError("the calibration data does not exist", where=str(path), expected="a .npz, .npy or folder, or synth", hint=hint)
    kind = "folder" if path.is_dir() else path.suffix.lower().removeprefix(".")
    if kind not in ("folder", "npz", "npy"):
        hint = "np.savez(path, **{input_name: array}) writes one that fits"
        raise DataError("unknown kind of calibration data", where=str(path), expected="a .npz, .npy or folder of images", hint=hint)
    if kind != "npz" and len(inputs) != 1:
        names = ", ".join(i.name for i in inputs)
        hint = f"give an .npz with the arrays {names}"
        raise DataError(f"a {kind} feeds one input, the model has {len(inputs)}", where=str(path), expected="a .npz", hint=hint)
    if kind == "folder":
        images = open_images(path, inputs[0], chosen)
        return from_columns({inputs[0].name: images}, inputs, kind, str(path), chosen, images.paths)
    if chosen is not None and not any(i.shape is None or len(i.shape) == 4 for i in inputs):
        shapes = "; ".join(f"input '{i.name}' {format_shape(i.shape)}" for i in inputs)
        hint = "leave --preprocess out"
        raise DataError("the model has no images to preprocess", where=shapes, expected="an input of rank 4", hint=hint)
    found = open_npz(path) if kind == "npz" else {inputs[0].name: open_npy(path)}
    if "labels" not in {one.name for one in inputs}:
        found.pop("labels", None)  # of evaluation data
    return from_columns(found, inputs, kind, str(path), chosen, (path,))


def random_calibration(inputs: Sequence[ModelInput], count: int, seed: int = 0) -> CalibrationSet:
    """`count` random samples (rounded up to the model's fixed batch), see `graphq.random_inputs`."""
    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    columns = random_columns(inputs, count, fixed_batch(inputs) or 1, seed)
    return from_columns(columns, inputs, "random", f"random numbers, seed {seed}")


def from_columns(
    columns: Mapping[str, Column], inputs: Sequence[ModelInput], kind: str, source: str, preprocess: Preprocess | None = None,
    files: tuple[Path, ...] = (),
) -> CalibrationSet:  # fmt: skip
    """A set of exactly one column for each input, after checking that they fit. Raises DataError that calls them `source`."""
    count = check(columns, inputs, preprocess, source, images=kind == "folder")
    return CalibrationSet(tuple(inputs), kind, source, tuple(columns[i.name] for i in inputs), 0, count, files, preprocess)


def _materialise(source: Any, inputs: Sequence[ModelInput], preprocess: Preprocess | None) -> Mapping[str, Column]:
    """Columns in memory of a dict of arrays, of an array, or of an iterable of batches."""
    if isinstance(source, Mapping | np.ndarray):
        return _named(source, inputs, "memory")
    if not isinstance(source, Iterable):
        expected = "a path, a dict of arrays, or an iterable of batches"
        raise DataError(f"{type(source).__name__} is no calibration data", expected=expected)
    parts: dict[str, list[np.ndarray]] = {i.name: [] for i in inputs}
    for index, element in enumerate(source):
        batch = _named(element, inputs, f"batch {index}")
        check(batch, inputs, preprocess, f"batch {index}")
        for name, arrays in parts.items():
            arrays.append(batch[name].array)
    if not any(parts.values()):
        raise DataError("there are no samples", where="memory", expected="at least one batch", hint="is the iterator used up?")
    columns: dict[str, Column] = {}
    for name in list(parts):
        try:
            columns[name] = _Memory(np.concatenate(parts.pop(name)))
        except ValueError as error:
            hint = "pad the batches to one shape"
            raise DataError(f"the batches for input '{name}' differ in shape", where=str(error), hint=hint) from error
    return columns


def _named(batch: Any, inputs: Sequence[ModelInput], where: str) -> dict[str, _Memory]:
    if not isinstance(batch, Mapping):
        values = batch if isinstance(batch, tuple | list) else (batch,)
        if len(values) != len(inputs):
            expected = f"a dict, or a tuple of {len(inputs)}: {', '.join(i.name for i in inputs)}"
            raise DataError(f"{len(values)} array(s) for {len(inputs)} inputs", where=where, expected=expected)
        batch = dict(zip((i.name for i in inputs), values, strict=True))
    try:
        return {str(name): _Memory(np.asarray(value)) for name, value in batch.items()}
    except (ValueError, TypeError, RuntimeError) as error:
        raise DataError("not an array", where=where, expected="numpy arrays", hint=str(error)) from error


def fixed_batch(inputs: Iterable[ModelInput]) -> int | None:
    """The number of samples that a model with these inputs takes at once, if it takes no other."""
    return next((i.shape[0] for i in inputs if i.shape and isinstance(i.shape[0], int)), None)
