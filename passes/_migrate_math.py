"""Moving scale, and a shift, from activations to weights: `X W = ((X - c) / k) (diag(k) W) + c W`.

X: [N, D] rows of activations; W: [D, O]; k: [D], positive; c: [D]. Rules for k: SmoothQuant (arXiv 2211.10438), and GPS, which
balances the measured errors of both sides (PTQ4ARVG). The shift is that of SQ-b (MPTQ-ViT, arXiv 2401.14895).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec

ALPHAS = (0.6, 0.75)
LIMIT = 100.0
"""No channel is scaled by more than this, either way: a channel that hardly moved in calibration may move later."""


@dataclass(frozen=True)
class Layer:
    """What some layers read together, and their weights side by side.

    Attributes:
        x: Rows of the activation, float32 [N, D].
        weight: float32 [D, O].
        low, high: Range of each channel over all calibration data, float64 [D].
        activation: Format of the activation, per tensor.
        bits: Width of the weight, which has one symmetric scale an output.
    """

    x: np.ndarray
    weight: np.ndarray
    low: np.ndarray
    high: np.ndarray
    activation: QuantSpec
    bits: int = 8

    def shifted(self, c: np.ndarray) -> Layer:
        """The same with `c` [D] taken out of the activation."""
        return Layer((self.x - c).astype(np.float32), self.weight, self.low - c, self.high - c, self.activation, self.bits)

    @cached_property
    def exact(self) -> np.ndarray:
        """X W, float32 [N, O]."""
        return np.asarray(self.x @ self.weight)

    def noise(self, k: np.ndarray) -> float:
        """Mean squared error of `Q(X / k) Q(diag(k) W)` against `X W`."""
        moved = self.weight * k[:, None]
        error = self._rounded(k) @ _round_weight(moved, self.bits) - self.exact
        return float(np.mean(np.square(error), dtype=np.float64))

    def smoothquant(self, alpha: float) -> np.ndarray:
        """`k = max|X|^alpha / max|W|^(1 - alpha)`, float32 [D], of geometric mean 1."""
        reach, weight = np.maximum(-self.low, self.high), np.abs(self.weight).max(1)
        return _tamed(np.maximum(reach, 1e-6) ** alpha / np.maximum(weight, 1e-6) ** (1 - alpha))

    def gps(self) -> np.ndarray:
        """`k^4 = (sum x^2 * sum e_W^2) / (sum e_x^2 * sum W^2)` of each channel, float32 [D], of geometric mean 1.

        The `e` are the rounding errors without migration. A channel whose activation is rounded badly compared to its weight
        gets a small k, and so more levels.
        """
        one = np.ones(len(self.low), np.float32)
        x_error, w_error = self._rounded(one) - self.x, _round_weight(self.weight, self.bits) - self.weight
        squares = [np.maximum(np.square(part).sum(axis, dtype=np.float64), 1e-30)
                   for part, axis in ((self.x, 0), (w_error, 1), (x_error, 0), (self.weight, 1))]  # fmt: skip
        return _tamed((squares[0] * squares[1] / (squares[2] * squares[3])) ** 0.25)

    def _rounded(self, k: np.ndarray) -> np.ndarray:
        quantizer = Uniform(self.activation)
        return quantizer.fake_quantize(self.x / k, quantizer.fit(*scaled_range(self.low, self.high, k)))


def scaled_range(low: np.ndarray, high: np.ndarray, k: np.ndarray) -> tuple[float, float]:
    """Range of `X / k` over all channels."""
    return float(np.min(low / k)), float(np.max(high / k))


def best(layer: Layer, rule: str, alphas: Sequence[float]) -> tuple[np.ndarray, float]:
    """The `k` with the least noise that `rule` offers, and that noise."""
    candidates = [layer.gps()] if rule == "gps" else [layer.smoothquant(alpha) for alpha in alphas]
    noises = [layer.noise(k) for k in candidates]
    least = int(np.argmin(noises))
    return candidates[least], noises[least]


def _tamed(k: np.ndarray) -> np.ndarray:
    return np.clip(k / np.exp(np.log(k).mean()), 1 / LIMIT, LIMIT).astype(np.float32)


def _round_weight(weight: np.ndarray, bits: int) -> np.ndarray:
    quantizer = Uniform(QuantSpec(bits, granularity=PerAxis(1)))
    return quantizer.fake_quantize(weight, quantizer.fit_weight(weight))
