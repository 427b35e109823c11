"""Fixed noise before a quantizer: `y = Q(X + n) W - n W`, the last term in the bias (NoisyQuant, arXiv 2211.16056).

X: [N, D] rows of activations; W: [D, O], of all layers that read the quantizer side by side; n: [D], drawn once.
Where many elements lie at one place between two codes, all of them are rounded the same way; noise spreads them out.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphq.noise import decibel
from graphq.quantizers import QParams, Uniform

AMPLITUDES = (0.5, 1.0, 1.5, 2.0)
"""Candidates for the largest magnitude of n, in steps of the quantizer."""


def draw(size: int, seeds: Sequence[int]) -> np.ndarray:
    """Noise of U(-1, 1) around a mean of exactly 0, so that a centred range stays centred; float64 of shape (size,)."""
    n = np.random.default_rng(seeds).uniform(-1, 1, size)
    return np.asarray(n - n.mean())


def error(x: np.ndarray, n: np.ndarray, weight: np.ndarray, quantizer: Uniform, qparams: QParams) -> float:
    """Mean squared error of `(Q(X + n) - n) W` against `X W`."""
    left = quantizer.fake_quantize(x + n, qparams) - n - x
    return float(np.mean(((left @ weight).astype(np.float64)) ** 2))


def search(x: np.ndarray, units: Sequence[np.ndarray], weight: np.ndarray, quantizer: Uniform, qparams: QParams) -> np.ndarray:
    """The multiple of one of `units` (see `draw`) with the least error on the rows `x`; float32 of shape (D,)."""
    step = float(qparams.scale)
    candidates = [(amplitude * step * unit).astype(np.float32) for unit in units for amplitude in AMPLITUDES]
    errors = [error(x, n, weight, quantizer, qparams) for n in candidates]
    return candidates[int(np.argmin(errors))]


def gain_db(x: np.ndarray, n: np.ndarray, weight: np.ndarray, quantizer: Uniform, qparams: QParams) -> float:
    """How much smaller n makes the error on the rows `x`, in dB (negative: larger)."""
    plain, noisy = (error(x, one, weight, quantizer, qparams) for one in (np.zeros_like(n), n))
    return decibel(plain, noisy)
