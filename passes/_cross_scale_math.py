"""Activation steps that depend on row and column: `D_ij = t_i^a c_j^(1-a) / levels` (CrossQuant, arXiv 2410.07505).

X: [N, D] rows of activations, one a token; W: [D, O]; t: [N], largest magnitude of each row, found at run time; c: [D], that
of each column, from calibration; k = c^(1-a). Dividing X by k and multiplying W by it leaves a step `t_i^a / levels` for each row,
with t of the rows as they were before the division.

Since `|x_ij| <= c_j^(1-a) t_i^a`, the largest magnitude of a row after the division is at most `t_i^a`: one step a token for
X / k is never coarser. And it holds what calibration has not seen, which the paper's step clips.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphq.noise import decibel
from graphq.passes import _dynamic_math
from graphq.quantizers import MIN_SCALE, Uniform
from graphq.spec import PerAxis, QuantSpec

Weight = tuple[np.ndarray, int | None]
"""W, and the bits that it will be rounded to; None if it stays float."""

TINY = 1e-30
"""Least power of a row, and least error: neither is divided by zero."""

FLOOR = 1e-3
"""No column counts as smaller than this share of the mean: one that hardly moved in calibration may move later."""


def factors(c: np.ndarray, alpha: float) -> np.ndarray:
    """`k = c^(1 - alpha)` with a floor on c; positive, shape and type of `c`."""
    floor = FLOOR * c.mean()
    return np.maximum(c, floor if floor > 0 else 1.0) ** (1 - alpha)


def fake_quantize(x: np.ndarray, k: np.ndarray, alpha: float, bits: int) -> np.ndarray:
    """`x`: [..., D], divided by k already, with the paper's step `t^alpha / levels` for each row; same shape and type."""
    top = _dynamic_math.levels(bits)
    scale = np.maximum(np.abs(x * k).max(-1, keepdims=True) ** alpha / top, MIN_SCALE)
    return np.clip(np.rint(x / scale), -top, top) * scale


def noise(x: np.ndarray, rounded: np.ndarray, weights: Sequence[Weight], k: np.ndarray) -> float:
    """Error of `rounded Q(diag(k) W)` against `X W`, summed over the weights; `rounded`: quantized X / k.

    Relative to each row's own output and then averaged, since every token counts: the squared error alone would be that of the
    few tokens with massive activations.
    """
    total = 0.0
    for weight, bits in weights:
        moved = weight * k[:, None]
        if bits is not None:
            quantizer = Uniform(QuantSpec(bits, granularity=PerAxis(1)))
            moved = quantizer.fake_quantize(moved, quantizer.fit_weight(moved))
        wanted = (x @ weight).astype(np.float64)
        error = np.sum((rounded @ moved - wanted) ** 2, axis=1)
        total += float(np.mean(error / np.maximum(np.sum(wanted**2, axis=1), TINY)))
    return total


def search(
    x: np.ndarray, weights: Sequence[Weight], c: np.ndarray, alphas: Sequence[float], bits: int, *, scaled: bool
) -> tuple[float, float]:
    """The alpha with the least noise on the rows `x`, and what it gains over one step a token, in dB (negative: none helps).

    Args:
        scaled: Whether rows are quantized per token after the division, instead of with the paper's step.
    """
    plain = noise(x, _dynamic_math.fake_quantize(x, bits), weights, np.ones(c.shape))
    found = {}
    for alpha in alphas:
        k = factors(c, alpha)
        rounded = _dynamic_math.fake_quantize(x / k, bits) if scaled else fake_quantize(x / k, k, alpha, bits)
        found[alpha] = noise(x, rounded, weights, k)
    best = min(found, key=found.__getitem__)
    return best, decibel(plain, found[best])
