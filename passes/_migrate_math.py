"""Moving scale from activations to weights: `X W = (X / k) (diag(k) W)` (SmoothQuant, arXiv 2211.10438; METHODS.md 4-4).

X: [N, D] rows of activations; W: [D, O]; k: [D], positive.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec

ALPHAS = (0.6, 0.75)
LIMIT = 100.0
"""No channel is scaled by more than this, either way: a channel that hardly moved in calibration may move later."""


def factors(low: np.ndarray, high: np.ndarray, weights: Sequence[np.ndarray], alpha: float) -> np.ndarray:
    """`k = max|X|^alpha / max|W|^(1 - alpha)` per channel, float32 of shape (D,), scaled to geometric mean 1."""
    reach = np.maximum(np.maximum(-low, high), 1e-6)
    weight = np.maximum(np.max([np.abs(one).max(1) for one in weights], 0), 1e-6)
    k = reach**alpha / weight ** (1 - alpha)
    return np.clip(k / np.exp(np.log(k).mean()), 1 / LIMIT, LIMIT).astype(np.float32)


def scaled_range(low: np.ndarray, high: np.ndarray, k: np.ndarray) -> tuple[float, float]:
    """Range of `X / k` over all channels."""
    return float(np.min(low / k)), float(np.max(high / k))


def noise(x: np.ndarray, weight: np.ndarray, exact: np.ndarray, k: np.ndarray, low: np.ndarray, high: np.ndarray,
          activation: QuantSpec) -> float:  # fmt: skip
    """Mean squared error of `Q(X / k) Q(diag(k) W)` against `exact = X W`, on the rows `x`."""
    quantizer, per_output = Uniform(activation), Uniform(QuantSpec(8, granularity=PerAxis(1)))
    rounded = quantizer.fake_quantize(x / k, quantizer.fit(*scaled_range(low, high, k)))
    moved = weight * k[:, None]
    error = rounded @ per_output.fake_quantize(moved, per_output.fit_weight(moved)) - exact
    return float(np.mean(np.square(error), dtype=np.float64))


def search(
    x: np.ndarray, weights: Sequence[np.ndarray], low: np.ndarray, high: np.ndarray, activation: QuantSpec
) -> tuple[np.ndarray, float]:
    """The `k` with the least noise among `ALPHAS`, and what it gains over no migration, in dB (negative: none helps)."""
    weight = np.concatenate(weights, axis=1)
    candidates = [np.ones(low.shape, np.float32), *(factors(low, high, weights, alpha) for alpha in ALPHAS)]
    exact = x @ weight
    plain, *found = (noise(x, weight, exact, k, low, high, activation) for k in candidates)
    best = int(np.argmin(found))
    return candidates[1 + best], 10 * float(np.log10(max(plain, 1e-30) / max(found[best], 1e-30)))
