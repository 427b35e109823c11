"""N:M sparsity: an output keeps N weights of every M consecutive inputs, the others become zero.

What its layer's output loses is `P = tr((Ŵ - W) C (Ŵ - W)ᵀ)`. W: [O, D], C: [D, D], the damped Gram matrix of what the layer
reads (or any multiple of it), both float64; a mask: bool [O, D], true where a weight is kept.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

Algorithm = Literal["magnitude", "wanda", "sparsegpt"]

_BLOCK = 128  # Columns whose effect on the rest is applied at once, about.
_ROUNDS, _ENOUGH = 100, 1e-6  # Of conjugate gradients, and the share of the squared residual that ends them: 5e-6 of P.


def prune(weight: np.ndarray, gram: np.ndarray, n: int, m: int, algorithm: Algorithm) -> tuple[np.ndarray, np.ndarray]:
    """The weight with zeros in it, float64, and its mask.

    `magnitude` keeps the largest |w|, `wanda` the largest `|w_j| sqrt(C_jj)` (arXiv 2306.11695), both as they are; `sparsegpt`
    also changes what is left (arXiv 2301.00774).
    """
    if algorithm == "sparsegpt":
        return _sparsegpt(weight, gram, n, m)
    mask = largest(np.abs(weight) * (np.sqrt(np.diagonal(gram)) if algorithm == "wanda" else 1.0), n, m)
    return np.where(mask, weight, 0.0).astype(np.float64), mask


def largest(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """The mask of the `n` largest `scores` [O, D] of every `m` along D; of equal ones, the first."""
    groups = scores.reshape(len(scores), -1, m)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(-groups, axis=-1, kind="stable")[..., :n], True, axis=-1)
    return mask.reshape(scores.shape)


def _sparsegpt(weight: np.ndarray, gram: np.ndarray, n: int, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Column by column, what a weight that goes has contributed is made up for by the columns that are left.

    With `C⁻¹ = Uᵀ U`, U upper triangular, the weights of the largest `(w_j / U_jj)²` of a group stay, judged when its turn comes.
    """
    upper = np.linalg.inv(np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1])
    left, mask = weight.astype(np.float64).T.copy(), np.empty(weight.T.shape, bool)  # [D, O]: a column lies together
    size = m * max(1, _BLOCK // m)
    for start in range(0, len(left), size):
        stop = min(start + size, len(left))
        errors = np.zeros((stop - start, left.shape[1]))
        for k in range(start, stop):
            if (k - start) % m == 0:
                scores = (left[k : k + m] / np.diagonal(upper)[k : k + m, None]) ** 2
                mask[k : k + m] = largest(scores.T, n, m).T
            errors[k - start] = np.where(mask[k], 0.0, left[k] / upper[k, k])
            left[k:stop] -= upper[k, k:stop, None] * errors[k - start]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return np.where(mask, left, 0.0).T, mask.T


def refit(start: np.ndarray, mask: np.ndarray, gram: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The weights where `mask` is true that have the least P, float64 [O, D]; elsewhere zeros.

    Conjugate gradients from `start`, all outputs at once, with the diagonal as preconditioner: every round lowers P, and there is
    no system of its own to factorize for each output's mask.
    """
    found = np.where(mask, start, 0.0).astype(np.float64)
    left = ((weight - found) @ gram) * mask
    scale = 1 / np.diagonal(gram)
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
