"""Least squares for a weight with zeros that stay: each output has inputs of its own that it may read."""

from __future__ import annotations

import numpy as np

_ROUNDS, _ENOUGH = 100, 1e-6  # Of conjugate gradients, and the share of the squared residual that ends them: 5e-6 of what they minimize.


def fit(start: np.ndarray, mask: np.ndarray, gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The weights V where `mask` is true that have the least `tr(V C Vᵀ - 2 target Vᵀ)`, float64 [O, D]; elsewhere zeros.

    With `target = W C`, that is the least P. Conjugate gradients from `start`, all outputs at once, with the diagonal as
    preconditioner: there is no system of its own to factorize for each output's mask.
    """
    found = np.where(mask, start, 0.0).astype(np.float64)
    left = (target - found @ gram) * mask
    squares = np.diagonal(gram)
    scale = _share(np.ones_like(squares), squares)  # an input that is always 0 has no say
    step, power = left * scale, _dot(left, left * scale)
    enough = _ENOUGH * power.max(initial=0.0)
    for _ in range(_ROUNDS):
        if (power <= enough).all():
            break
        moved = (step @ gram) * mask
        length = _share(power, _dot(step, moved))
        found += length * step
        left -= length * moved
        before, power = power, _dot(left, left * scale)
        step = left * scale + _share(power, before) * step
    return found


def _dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of each row, float64 [O, 1]."""
    return np.asarray(np.einsum("od,od->o", a, b)[:, None])


def _share(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a / b, and 0 where b is 0: a row that is there already."""
    return np.asarray(np.divide(a, b, out=np.zeros_like(a), where=b > 0))
