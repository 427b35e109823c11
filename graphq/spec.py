"""What to quantize to, and how a model's inputs look: plain values without a graph or an array library behind them.

`x ≈ (q - zero_point) * scale`, with `q` an integer of `QuantSpec.bits` bits. How a range is found is not said here (see
`graphq.ranges`); where quantizers are placed neither (see the passes).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

INTEGER_OPSETS = {8: 13, 4: 21, 2: 25}
"""Widths that ONNX stores natively in QuantizeLinear, with the first opset whose QuantizeLinear has per-axis scales and that width."""


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor: `[A, B]` has a scale of shape `[]`."""


@dataclass(frozen=True)
class PerAxis:
    """One scale per index of `axis`: `[A, B]` with axis 0 has scales of shape `[A]`."""

    axis: int


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` consecutive elements along `axis`: `[A, B]`, axis 0 has scales `[ceil(A / size), B]`."""

    axis: int
    size: int


Granularity = PerTensor | PerAxis | PerGroup


Grid = Literal["integer", "e4m3", "e2m1"]
"""What the codes are: integers, or small floats (8 bits: arXiv 2209.05433; 4 bits: arXiv 2310.10537)."""

_FLOAT_GRIDS = {"e4m3": (8, 448, "float8e4m3fn", 19), "e2m1": (4, 6, "float4e2m1", 23)}
"""Width, largest magnitude, ONNX type, and the first opset that has it."""


@dataclass(frozen=True)
class QuantSpec:
    """A format of codes, integers or small floats.

    Attributes:
        bits: Width of a code, 2 to 8; 8 for `e4m3` and 4 for `e2m1`.
        signed: Codes lie in `[-2^(bits-1), 2^(bits-1) - 1]` if true, in `[0, 2^bits - 1]` otherwise.
        symmetric: The zero point is fixed: 0 if signed, `2^(bits-1)` otherwise.
        granularity: Where scales are shared.
        grid: What the codes are. Small floats are signed and symmetric.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = PerTensor()
    grid: Grid = "integer"

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")
        if self.is_float and (self.bits != _FLOAT_GRIDS[self.grid][0] or not (self.signed and self.symmetric)):
            raise ValueError(f"{self.grid} has {_FLOAT_GRIDS[self.grid][0]} bits, a sign and no zero point")

    @property
    def is_float(self) -> bool:
        """Whether the codes are floats: finer near 0, and without a zero point."""
        return self.grid in _FLOAT_GRIDS

    @property
    def qmin(self) -> int:
        if self.is_float:
            return -self.qmax
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        if self.is_float:
            return _FLOAT_GRIDS[self.grid][1]
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def storage_bits(self) -> int:
        """Width of the ONNX type that holds a code: the next of 2, 4, 8."""
        return min(width for width in INTEGER_OPSETS if width >= self.bits)

    @property
    def storage(self) -> str:
        """Name of the ONNX type that holds a code, such as `int8`, `uint4` or `float8e4m3fn`."""
        if self.is_float:
            return _FLOAT_GRIDS[self.grid][2]
        return f"{'' if self.signed else 'u'}int{self.storage_bits}"

    @property
    def opset(self) -> int:
        """The lowest default-domain opset whose QuantizeLinear and DequantizeLinear know this format."""
        first = _FLOAT_GRIDS[self.grid][3] if self.is_float else INTEGER_OPSETS[self.storage_bits]
        return max(first, 21 if isinstance(self.granularity, PerGroup) else 13)


@dataclass(frozen=True)
class ModelInput:
    """Name, element type and shape of one model input. A dimension is an int, a symbol (str), or None if unknown.

    `limit` bounds integers that the model looks up in a table: they lie in `[0, limit)`; None if no bound is known.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None
    limit: int | None = None
