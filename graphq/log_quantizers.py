"""Logarithmic quantization of arrays that are not negative, such as attention weights: small values get finer levels.

One family, `x ≈ exp(center + scale * q) - shift`, has three members. `sulq` (I&S-ViT, arXiv 2311.10126) searches
`shift`, so that levels are spaced evenly near 0 and by ratio above; `log2` (FQ-ViT, arXiv 2111.13824) halves from level to level;
`log-sqrt2` (RepQ-ViT, arXiv 2212.08254) divides by the root of 2 and keeps its lowest code for 0.

Codes are signed and the offset is a float, so that every runtime takes them: there is no zero point. Where I&S-ViT rounds the
offset to a zero point, both ends of the range are levels here, which is worth 1 dB on the attention weights of a ViT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphq.quantizers import MIN_SCALE, QParams, Uniform
from graphq.spec import QuantSpec

Array = np.ndarray[Any, np.dtype[Any]]

SHIFTS = (0.001, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.1, 0.2, 0.5, 1.0)
"""Candidates for the shift of `sulq`, those of I&S-ViT. A finer grid gains less than 0.1 dB."""

OCTAVE = np.float32(np.log(2))


@dataclass(frozen=True)
class LogParams:
    """What turns codes into floats: `x ≈ exp(center + scale * q) - shift`. All are float32; `shift` and `scale` are positive."""

    shift: np.float32
    center: np.float32
    scale: np.float32

    def __post_init__(self) -> None:
        if not all(isinstance(number, np.float32) for number in (self.shift, self.center, self.scale)):
            raise ValueError("shift, center and scale must be float32")
        if not (self.shift > 0 and self.scale > 0 and np.isfinite([self.shift, self.center, self.scale]).all()):
            raise ValueError(f"shift and scale must be positive, not {self.shift} and {self.scale}, and all must be finite")


@dataclass(frozen=True)
class LogUniform:
    """`q = clip(round((log(x + shift) - center) / scale), qmin, qmax)`: uniform codes of a logarithm, `2^bits` of them.

    Attributes:
        bits: Width of a code, 2 to 8. Codes lie in `[-2^(bits-1), 2^(bits-1) - 1]`.
        whole_exponents: Levels are powers of two less `shift`, as hardware that can only shift has them.
        lowest_is_zero: The lowest code stands for 0.
    """

    bits: int
    whole_exponents: bool = False
    lowest_is_zero: bool = False

    @property
    def spec(self) -> QuantSpec:
        """The codes."""
        return QuantSpec(self.bits)

    @property
    def storage(self) -> str:
        """Name of the ONNX type that holds a code: `int4` or `int8`."""
        return "int4" if self.bits <= 4 else "int8"

    def fit(self, x: Array, largest: float | None = None) -> LogParams:
        """The params of `sulq` with the least squared error on `x` (float32, not negative, any shape) among `SHIFTS`.

        For each shift, the levels reach from the smallest of `x` to `largest`, by default that of `x`.
        """
        ends = float(x.min()), float(x.max()) if largest is None else largest
        candidates = [self._spread(*ends, shift) for shift in SHIFTS]
        errors = [self.error(x, params) for params in candidates]
        return candidates[int(np.argmin(errors))]

    def _spread(self, smallest: float, largest: float, shift: float) -> LogParams:
        low, high = np.log(smallest + shift), np.log(largest + shift)
        scale = (high - low) / ((1 << self.bits) - 1) or 1.0
        return LogParams(np.float32(shift), np.float32(low - self.spec.qmin * scale), np.float32(scale))

    def fit_octaves(self, largest: float, steps: int) -> LogParams:
        """The params of `log2` and `log-sqrt2`: `steps` levels an octave, downwards from `largest`."""
        scale = OCTAVE / np.float32(steps)
        return LogParams(MIN_SCALE, np.float32(np.log(max(largest, float(MIN_SCALE))) - self.spec.qmax * float(scale)), scale)

    def error(self, x: Array, params: LogParams) -> float:
        """Mean squared error on `x`."""
        return float(np.mean((self.fake_quantize(x, params) - x).astype(np.float64) ** 2))

    def quantize(self, x: Array, params: LogParams) -> Array:
        """Codes of `x` (float32, not negative): int8, same shape."""
        return Uniform(self.spec).quantize(np.log(x + params.shift) - params.center, _steps(params))

    def dequantize(self, q: Array, params: LogParams) -> Array:
        """The level of each code: float32, same shape."""
        log = Uniform(self.spec).dequantize(q, _steps(params)) + params.center
        if self.whole_exponents:
            log = np.rint(log / OCTAVE) * OCTAVE
        level = np.exp(log) - params.shift
        return np.where(q == self.spec.qmin, np.float32(0), level) if self.lowest_is_zero else level

    def fake_quantize(self, x: Array, params: LogParams) -> Array:
        """`dequantize(quantize(x))`."""
        return self.dequantize(self.quantize(x, params), params)


def _steps(params: LogParams) -> QParams:
    return QParams(np.asarray(params.scale), np.asarray(0, np.int32))
