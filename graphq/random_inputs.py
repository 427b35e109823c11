"""Random model inputs: no substitute for data, enough to run a model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphq.arrays import Bounds, Column, is_float
from graphq.errors import DataError
from graphq.preprocess import format_shape
from graphq.spec import ModelInput


@dataclass(frozen=True)
class _Random:
    """Made when read, sample by sample, so that a sample does not depend on the batch it is read in."""

    dtype: np.dtype
    shape: tuple[int, ...]
    seed: tuple[int, ...]
    fill: int | None
    limit: int

    def stream(self, bounds: Bounds) -> Iterator[np.ndarray]:
        return (np.stack([self._sample(index) for index in range(first, last)]) for first, last in bounds)

    def _sample(self, index: int) -> np.ndarray:
        shape, generator = self.shape[1:], np.random.default_rng((*self.seed, index))
        if self.fill is not None:
            return np.full(shape, self.fill, self.dtype)
        if is_float(self.dtype):
            return generator.standard_normal(shape, np.float32).astype(self.dtype)
        return generator.integers(0, self.limit, shape).astype(self.dtype)


def random_columns(inputs: Sequence[ModelInput], count: int, unit: int, seed: int) -> dict[str, Column]:
    """Random arrays `[count, ...]` by input name, `count` rounded up to a multiple of `unit`.

    Floats are standard normal; integers lie in [0, 100), or below the rows of the table they look up, but are ones if the name
    says mask and zeros if it says token type or segment; booleans are true. An open dimension is 224 if it is the height or
    width of an image (rank 4, the channel axis 1 or 3, or all open: then 3 channels first), else 16; one symbol has one size.
    """
    sizes, columns = dict[str, int](), dict[str, Column]()
    for position, model_input in enumerate(inputs):
        dtype, dims = model_input.dtype, model_input.shape
        if dims is None or not (is_float(dtype) or dtype.kind in "biu"):
            raise DataError(f"cannot make random data for input '{model_input.name}'", where=f"{dtype} {format_shape(dims)}",
                            expected="numbers of known rank", hint="give calibration data")  # fmt: skip
        shape = (math.ceil(count / unit) * unit, *_random_dims(dims, sizes))
        columns[model_input.name] = _Random(dtype, shape, (seed, position), _fill(model_input), model_input.limit or 100)
    return columns


def _fill(model_input: ModelInput) -> int | None:
    """The one value that an input gets whose values have a meaning that its name tells; None for random ones."""
    name, dtype = model_input.name.lower(), model_input.dtype
    if is_float(dtype):
        return None
    if dtype.kind in "iu" and any(word in name for word in ("token_type", "segment")):
        return 0
    return 1 if "mask" in name or dtype == np.bool_ else None


def _random_dims(shape: tuple[int | str | None, ...], sizes: dict[str, int]) -> list[int]:
    """Sizes of all dimensions but the first."""
    opened = [not isinstance(dim, int) for dim in shape]
    image: dict[int, int] = {}
    if len(shape) == 4 and (shape[1] in (1, 3) or (opened[1] and opened[2] and opened[3])):
        image = {1: 3, 2: 224, 3: 224}
    elif len(shape) == 4 and shape[3] in (1, 3):
        image = {1: 224, 2: 224}
    dims = []
    for axis, dim in list(enumerate(shape))[1:]:
        size = dim if isinstance(dim, int) else image.get(axis, 16)
        dims.append(sizes.setdefault(dim, size) if isinstance(dim, str) else size)
    return dims
