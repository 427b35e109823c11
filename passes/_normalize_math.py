"""BatchNormalization folded into the linear operator before it: float64, numpy only.

Inference computes `y' = (y - mean) / sqrt(var + epsilon) * gamma + beta` per output channel, which is `y' = y * factor + offset`
(arXiv 1502.03167 for the operator, arXiv 1712.05877 section 3.2 for folding it). Letters: O output channels, I input channels of
a group, G groups, K kernel positions.
"""

from __future__ import annotations

import numpy as np


def affine(gamma: np.ndarray, beta: np.ndarray, mean: np.ndarray, var: np.ndarray, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
    """`(factor, offset)`, each of shape (O,), of a BatchNormalization whose parameters have shape (O,)."""
    factor = gamma.astype(np.float64) / np.sqrt(var.astype(np.float64) + epsilon)
    return factor, beta.astype(np.float64) - mean.astype(np.float64) * factor


def scale_outputs(weight: np.ndarray, factor: np.ndarray, axis: int, groups: int = 1) -> np.ndarray:
    """Weight whose output channels are `factor` (O,) times as large, in float64.

    `axis` is the axis of the output channels. With `groups` above 1 and axis 1 (ConvTranspose) the weight is
    [G * I, O / G, ...K]: the groups lie on axis 0.
    """
    wide = weight.astype(np.float64)
    if axis == 1 and groups > 1:
        inputs = wide.shape[0] // groups
        per_row = np.repeat(factor.reshape(groups, 1, -1), inputs, axis=1).reshape(wide.shape[:2])
        return wide * per_row.reshape(*per_row.shape, *[1] * (wide.ndim - 2))
    shape = [1] * wide.ndim
    shape[axis] = -1
    return wide * factor.reshape(shape)


def fold_bias(bias: np.ndarray | None, factor: np.ndarray, offset: np.ndarray, beta: float = 1.0) -> np.ndarray:
    """`C'` with `beta * C' = factor * beta * C + offset`, in float64; channels lie on the last axis of `C`."""
    shift = offset / beta
    return shift if bias is None else bias.astype(np.float64) * factor + shift
