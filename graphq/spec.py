"""What to quantize to, and how a model's inputs look: plain values without a graph or an array library behind them.

`x ≈ (q - zero_point) * scale`, with `q` an integer of `QuantSpec.bits` bits. How a range is found is not said here (see
`graphq.ranges`); where quantizers are placed neither (see the passes).
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass(frozen=True)
class QuantSpec:
    """A uniform integer format.

    Attributes:
        bits: Width of the integer, 2 to 8.
        signed: Codes lie in `[-2^(bits-1), 2^(bits-1) - 1]` if true, in `[0, 2^bits - 1]` otherwise.
        symmetric: The zero point is fixed: 0 if signed, `2^(bits-1)` otherwise.
        granularity: Where scales are shared.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    granularity: Granularity = PerTensor()

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"bits must be 2 to 8, not {self.bits}")

    @property
    def qmin(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def storage_bits(self) -> int:
        """Width of the ONNX type that holds a code: the next of 2, 4, 8."""
        return min(width for width in INTEGER_OPSETS if width >= self.bits)

    @property
    def storage(self) -> str:
        """Name of the ONNX type that holds a code, such as `int8` or `uint4`."""
        return f"{'' if self.signed else 'u'}int{self.storage_bits}"

    @property
    def opset(self) -> int:
        """The lowest default-domain opset whose QuantizeLinear and DequantizeLinear know this format."""
        return max(INTEGER_OPSETS[self.storage_bits], 21 if isinstance(self.granularity, PerGroup) else 13)


@dataclass(frozen=True)
class ModelInput:
    """Name, element type and shape of one model input. A dimension is an int, a symbol (str), or None if unknown.

    `limit` bounds integers that the model looks up in a table: they lie in `[0, limit)`; None if no bound is known.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int | str | None, ...] | None
    limit: int | None = None
