"""Quantization whose scale is found at run time, one for each token (ZeroQuant, arXiv 2206.01861; METHODS.md 3.2).

X: [N, D] rows of activations, one a token.
"""

from __future__ import annotations

import numpy as np

from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec


def levels(bits: int) -> np.ndarray:
    """Steps on each side of zero, float32 of shape (): codes are -levels to levels, so nothing is ever clipped."""
    return np.asarray((1 << (bits - 1)) - 1, np.float32)


def fake_quantize(x: np.ndarray, bits: int) -> np.ndarray:
    """`round(x / s) s` with `s = max|row| / levels` for each row along the last axis; float32, same shape."""
    rows = x.reshape(-1, x.shape[-1])
    quantizer = Uniform(QuantSpec(bits, granularity=PerAxis(0)))
    return quantizer.fake_quantize(rows, quantizer.fit_weight(rows)).reshape(x.shape)
