"""Do arrays fit the inputs of a model? Everything that shapes and types tell, before anything is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphq.arrays import Column, is_float
from graphq.errors import DataError
from graphq.names import did_you_mean
from graphq.preprocess import PRESETS, Preprocess, format_shape, image_shape
from graphq.spec import ModelInput


def check(found: Mapping[str, Column], inputs: Sequence[ModelInput], pre: Preprocess | None, where: str, images: bool = False) -> int:
    """The number of samples, if there is exactly one fitting array per input."""
    names = [i.name for i in inputs]
    missing, extra = [n for n in names if n not in found], [n for n in found if n not in names]
    if missing or extra:
        rows = [f"no array for input '{name}'" for name in missing] + [f"array '{name}' is no input of the model" for name in extra]
        guess = did_you_mean(missing[0], extra) if missing else did_you_mean(extra[0], names)
        expected = f"arrays {', '.join(f'{i.name} {i.dtype} {format_shape(_of_samples(i.shape))}' for i in inputs)}"
        raise DataError("; ".join(rows), where=where, expected=expected, hint=guess or "rename, add or remove arrays")
    for model_input in inputs:
        _check_column(model_input, found[model_input.name], pre, where, images)
    counts = {name: found[name].shape[0] for name in names}
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise DataError("the inputs have different numbers of samples", where=f"{where}: {text}", expected="the same on axis 0")
    if not counts or 0 in counts.values():
        raise DataError("there are no samples", where=where, expected="at least one sample", hint="give data for the model's inputs")
    fixed = sorted({(i.shape[0], i.name) for i in inputs if i.shape and isinstance(i.shape[0], int)})
    if len({size for size, _ in fixed}) > 1:
        text = ", ".join(f"{name}: {size}" for size, name in fixed)
        hint = "export the model with a dynamic batch dimension"
        raise DataError("the model's inputs have different fixed batches", where=text, expected="one size on axis 0", hint=hint)
    return next(iter(counts.values()))


def _check_column(model_input: ModelInput, column: Column, pre: Preprocess | None, where: str, images: bool) -> None:
    dims, dtype, have = model_input.shape, model_input.dtype, f"{column.dtype} {list(column.shape)}"
    pixels = pre is not None and (images or is_pixels(model_input, column))
    if pre is not None and pixels:
        _, height, width, channels = image_shape(model_input, pre)
        dims = (None, height, width, channels)
    fits = dims is None or len(dims) == len(column.shape)
    fits = fits and all(not isinstance(d, int) or d == n for d, n in list(zip(dims or (), column.shape, strict=False))[1:])
    if dims == () or not column.shape or not fits:
        hint = _shape_hint(dims, column)
        expected = f"shape {format_shape(_of_samples(dims))}"
        if dims == ():
            hint, expected = ("make it a constant of the model, or give it a batch dimension", "an input with a first axis of samples")
        expected += " of uint8 pixels" if pixels else ""
        raise DataError(f"the array for input '{model_input.name}' is {have}", where=where, expected=expected, hint=hint)
    floats = is_float(dtype) and is_float(column.dtype)
    integers = column.dtype.kind in "biu" and dtype.kind in "biu" and np.can_cast(column.dtype, dtype, "safe")
    if not (pixels or floats or integers):
        hint = f"for images give --preprocess: {', '.join(PRESETS)}, or a YAML file" if column.dtype == np.uint8 else ""
        hint = hint or f"array.astype('{dtype}'), if no value is lost"
        raise DataError(f"the array for input '{model_input.name}' is {have}", where=where, expected=f"{dtype}", hint=hint)


def _of_samples(dims: tuple[int | str | None, ...] | None) -> tuple[int | str | None, ...] | None:
    """The shape of an array of samples for an input of `dims`."""
    return ("samples", *dims[1:]) if dims else dims


def _shape_hint(dims: tuple[int | str | None, ...] | None, column: Column) -> str:
    """What to do about an array that does not fit an input of `dims`."""
    if dims is not None and len(column.shape) == len(dims) - 1:
        return "the first axis must be the samples: array[None] is a batch of one"
    if dims is not None and len(dims) == len(column.shape) == 4 and dims[1] in (1, 3) and column.shape[3] == dims[1]:
        if column.dtype == np.uint8:
            return f"for images give --preprocess: {', '.join(PRESETS)}, or a YAML file"
        return "the channels are the last axis: array.transpose(0, 3, 1, 2) brings them to the front"
    return "resize what the array holds, or give other samples"


def is_pixels(model_input: ModelInput, column: Column) -> bool:
    """Whether `column` holds uint8 images for a float input."""
    return column.dtype == np.uint8 and len(column.shape) == 4 and is_float(model_input.dtype)
