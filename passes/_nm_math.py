"""N:M sparsity: an output keeps N weights of every M consecutive inputs, the others become zero.

What its layer's output loses is `P = tr((Ŵ - W) C (Ŵ - W)ᵀ)`. W: [O, D], C: [D, D], the damped Gram matrix of what the layer
reads (or any multiple of it), both float64; a mask: bool [O, D], true where a weight is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Score = Literal["magnitude", "wanda", "sparsegpt", "alps"]

_BLOCK = 128  # Columns whose effect on the rest is applied at once, about.
_SPLITS = 300  # Steps of ADMM, at most.
_START = 0.1  # Its penalty at first, in units of the diagonal of C.
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))  # What the penalty grows by where more than this share of the mask changed.
_PATIENCE = 3  # Steps between two looks at that.

_SAMPLED, _TURNS, _WORTHWHILE = 512, 20, 1e-3  # Of the search for an order: rows, about; turns at most; share that a turn has to gain.


@dataclass(frozen=True)
class Pattern:
    """`n` of every `m` among the first `width` inputs, a multiple of `m`; the inputs behind them are no group and stay dense."""

    n: int
    m: int
    width: int

    def largest(self, scores: np.ndarray) -> np.ndarray:
        """The mask of the largest `scores` [O, D] of every group; of equal ones, the first."""
        mask = np.ones(scores.shape, bool)
        mask[:, : self.width] = largest(scores[:, : self.width], self.n, self.m)
        return mask


def largest(scores: np.ndarray, n: int, m: int) -> np.ndarray:
    """The mask of the `n` largest `scores` [O, D] of every `m` along D; of equal ones, the first."""
    groups = scores.reshape(len(scores), -1, m)
    mask = np.zeros(groups.shape, bool)
    np.put_along_axis(mask, np.argsort(-groups, axis=-1, kind="stable")[..., :n], True, axis=-1)
    return mask.reshape(scores.shape)


def prune(weight: np.ndarray, gram: np.ndarray, pattern: Pattern, score: Score) -> tuple[np.ndarray, np.ndarray]:
    """The weight with zeros in it, float64, and its mask.

    `magnitude` keeps the largest |w|, `wanda` the largest `|w_j| sqrt(C_jj)` (arXiv 2306.11695), both as they are; `sparsegpt`
    (arXiv 2301.00774) and `alps` (arXiv 2406.07831) also change what is left.
    """
    if score == "sparsegpt":
        return _sparsegpt(weight, gram, pattern)
    if score == "alps":
        return _alps(weight, gram, pattern)
    mask = pattern.largest(np.abs(weight) * (np.sqrt(np.diagonal(gram)) if score == "wanda" else 1.0))
    return np.where(mask, weight, 0.0).astype(np.float64), mask


def _sparsegpt(weight: np.ndarray, gram: np.ndarray, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """Column by column, what a weight that goes has contributed is made up for by the columns that are left.

    With `C⁻¹ = Uᵀ U`, U upper triangular, the weights of the largest `(w_j / U_jj)²` of a group stay, judged when its turn comes.
    """
    upper = np.linalg.inv(np.linalg.cholesky(gram[::-1, ::-1])[::-1, ::-1])
    left, mask, m = weight.astype(np.float64).T.copy(), np.ones(weight.T.shape, bool), pattern.m  # [D, O]: a column lies together
    size = m * max(1, _BLOCK // m)
    for start in range(0, pattern.width, size):
        stop = min(start + size, pattern.width)
        errors = np.zeros((stop - start, left.shape[1]))
        for k in range(start, stop):
            if (k - start) % m == 0:
                scores = (left[k : k + m] / np.diagonal(upper)[k : k + m, None]) ** 2
                mask[k : k + m] = largest(scores.T, pattern.n, m).T
            errors[k - start] = np.where(mask[k], 0.0, left[k] / upper[k, k])
            left[k:stop] -= upper[k, k:stop, None] * errors[k - start]
        left[stop:] -= upper[start:stop, stop:].T @ errors
    return np.where(mask, left, 0.0).T, mask.T


def _alps(weight: np.ndarray, gram: np.ndarray, pattern: Pattern) -> tuple[np.ndarray, np.ndarray]:
    """ADMM: a dense copy that fits the output and a sparse one are pulled together, harder and harder, until the mask stays.

    Inputs are scaled so that C has a diagonal of ones, hence the sparse copy keeps what Wanda would of its dense twin.
    """
    unit = np.sqrt(np.diagonal(gram))
    scaled = gram / np.outer(unit, unit)
    wanted = weight * unit
    values, vectors = np.linalg.eigh(scaled)
    target = wanted @ scaled
    mask = pattern.largest(np.abs(wanted))
    sparse, pull, penalty = np.where(mask, wanted, 0.0), np.zeros(weight.shape), _START
    before = mask
    for step in range(1, _SPLITS + 1):
        dense = ((target - pull + penalty * sparse) @ vectors / (values + penalty)) @ vectors.T
        moved = dense + pull / penalty
        mask = pattern.largest(np.abs(moved))
        sparse = np.where(mask, moved, 0.0)
        pull += penalty * (dense - sparse)
        if step % _PATIENCE == 0:
            changed = float(np.mean(mask != before))
            if changed == 0:
                break
            penalty *= next(growth for share, growth in _GROWTH if changed > share)
            before = mask
    return sparse / unit, mask


def permutation(energy: np.ndarray, n: int, m: int) -> tuple[float, np.ndarray, float]:
    """An order of the columns of `energy` [R, D] in which groups of `m` keep more of it in their `n` largest of each row.

    Each round takes one column out of every group and assigns all of them anew for the largest sum, exactly (a linear assignment),
    so that nothing is ever lost; columns that fill no group stay where they are. Deterministic.

    Returns:
        The energy that is kept as it is, the order, int64 [D], and the energy that is kept in it.
    """
    from scipy.optimize import linear_sum_assignment

    count = energy.shape[1] // m
    rows = energy[:: max(1, len(energy) // _SAMPLED)].T.astype(np.float32)  # [D, R]
    groups = np.arange(count * m).reshape(count, m)
    held = _held(rows, groups, n).sum()
    for _ in range(_TURNS):
        before = held
        for place in range(m):
            rest, moving = np.delete(groups, place, axis=1), groups[:, place]
            least = np.sort(rows[rest], axis=1)[:, m - 1 - n]  # [groups, R]: what a column has to beat
            gain = np.stack([np.maximum(rows[moving] - bar, 0).sum(axis=1) for bar in least])
            groups[:, place] = moving[linear_sum_assignment(gain, maximize=True)[1]]
        held = _held(rows, groups, n).sum()
        if held < before * (1 + _WORTHWHILE):
            break
    order = np.concatenate([groups.reshape(-1), np.arange(count * m, energy.shape[1])])
    kept = [float(_held(energy.T, part, n).sum()) for part in (np.arange(count * m).reshape(count, m), groups)]
    return (kept[0], order, kept[1]) if kept[1] > kept[0] * (1 + _WORTHWHILE) else (kept[0], np.arange(energy.shape[1]), kept[0])


def _held(rows: np.ndarray, groups: np.ndarray, n: int) -> np.ndarray:
    """What each group (rows of column numbers) keeps of `rows` [D, R], [groups, R]."""
    return np.asarray(np.sort(rows[groups], axis=1)[:, -n:].sum(axis=1))
