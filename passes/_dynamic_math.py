"""Quantization whose scale is found at run time, one for each token (ZeroQuant, arXiv 2206.01861).

X: [N, D] rows of activations, one a token.
"""

from __future__ import annotations

import numpy as np

from graphq.quantizers import MIN_SCALE, Uniform
from graphq.spec import PerAxis, QuantSpec


def levels(bits: int, *, symmetric: bool = True) -> np.ndarray:
    """Steps from zero to the end of a range, float32 of shape (): codes are -levels to levels, or 0 to levels."""
    return np.asarray((1 << (bits - 1)) - 1 if symmetric else (1 << bits) - 1, np.float32)


def fake_quantize(x: np.ndarray, bits: int, *, symmetric: bool = True) -> np.ndarray:
    """`round(x / s) s` for each row along the last axis, float32, same shape.

    With `s = max|row| / levels`; or, where there are zero points, from the smallest to the largest of a row and of 0.
    """
    if not symmetric:
        low, high = np.minimum(x.min(-1, keepdims=True), 0), np.maximum(x.max(-1, keepdims=True), 0)
        scale = np.maximum((high - low) / levels(bits, symmetric=False), MIN_SCALE)
        zero = np.rint(low / scale)
        return np.asarray((np.clip(np.rint(x / scale) - zero, 0, levels(bits, symmetric=False)) + zero) * scale)
    rows = x.reshape(-1, x.shape[-1])
    quantizer = Uniform(QuantSpec(bits, granularity=PerAxis(0)))
    return quantizer.fake_quantize(rows, quantizer.fit_weight(rows)).reshape(x.shape)
