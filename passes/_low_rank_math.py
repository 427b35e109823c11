"""Matrices of low rank beside a quantized one: `X W ≈ X̄ Q(R) + X L`, L of rank r (SVDQuant, arXiv 2411.05007; LoRC, arXiv 2303.08302).

X: [N, D] rows of what a layer reads, X̄ the same quantized; W, R, L: [D, O], `W = R + L`; factors `L = left right`, left: [D, r],
right: [r, O]. What counts is the output, so that errors are measured with `C = XᵀX`: the best L of rank r for a matrix T is
`T V Vᵀ`, V the leading r eigenvectors of `Tᵀ C T`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.linalg import eigh

from graphq.passes._sums import Sums

DAMPING = 1e-6
"""Added to the diagonal of C, in units of its mean."""

RIDGE = 0.01
"""The same where C is of few rows; the share is at least D / N."""

Factors = tuple[np.ndarray, np.ndarray]
"""left [D, r] and right [r, O]."""


def factors(matrix: np.ndarray, rank: int, gram: np.ndarray | None = None) -> Factors:
    """The L of `rank` with the least `||X (matrix - L)||²`, float64; without C, [D, D] and positive definite, `||matrix - L||²`."""
    seen = np.asarray(matrix if gram is None else np.linalg.cholesky(gram).T @ matrix, np.float64)
    inputs, outputs = seen.shape
    if outputs <= inputs:
        vectors = _leading(seen.T @ seen, rank)
    else:
        vectors = np.linalg.qr(seen.T @ _leading(seen @ seen.T, rank))[0]
    return matrix @ vectors, vectors.T


def _leading(matrix: np.ndarray, count: int) -> np.ndarray:
    """Eigenvectors [n, count] of the largest eigenvalues of a symmetric matrix, largest first."""
    return np.asarray(eigh(matrix, subset_by_index=(len(matrix) - count, len(matrix) - 1))[1][:, ::-1])


@dataclass(frozen=True)
class Seen:
    """Sums over rows of X and X̄: `raw = XᵀX`, `cross = X̄ᵀX`, `rounded = X̄ᵀX̄`, float64 [D, D]."""

    raw: np.ndarray
    cross: np.ndarray
    rounded: np.ndarray

    @classmethod
    def of(cls, x: np.ndarray, x_rounded: np.ndarray) -> Seen:
        """Of rows [N, D]."""
        x, x_rounded = x.astype(np.float64), x_rounded.astype(np.float64)
        return cls(x.T @ x, x_rounded.T @ x, x_rounded.T @ x_rounded)

    def __add__(self, other: Seen) -> Seen:
        return Seen(self.raw + other.raw, self.cross + other.cross, self.rounded + other.rounded)

    def error(self, rest: np.ndarray, stored: np.ndarray) -> float:
        """`||X rest - X̄ stored||²`."""
        return float(np.sum(rest * (self.raw @ rest)) - 2 * np.sum(stored * (self.cross @ rest)) + np.sum(stored * (self.rounded @ stored)))

    def power(self, weight: np.ndarray) -> float:
        """`||X W||²`."""
        return float(np.sum(weight * (self.raw @ weight)))


def split(weight: np.ndarray, rank: int, iterations: int, quantize: Callable[[np.ndarray], np.ndarray], seen: Seen,
          store: Callable[[Factors], Factors] = lambda found: found) -> tuple[Factors, float]:  # fmt: skip
    """L whose rest, quantized, makes the least error, and that error.

    It starts from the L that leaves the least to be rounded, whatever is read, and goes on with what serves the output best beside Q(R).

    Args:
        quantize: What R [D, O] becomes.
        store: What the factors become.
    """
    found, best, least = factors(weight, rank), None, np.inf
    damping = DAMPING * np.trace(seen.raw) / len(weight)
    gram = seen.raw + (damping if damping > 0 else 1.0) * np.eye(len(weight))
    for step in range(1 + iterations):
        left, right = store(found)
        rest = weight - left @ right
        rounded = quantize(rest)
        error = seen.error(rest, rounded)
        if error < least:
            best, least = (left, right), error
        if step < iterations:
            found = factors(weight - rounded, rank, gram)
    assert best is not None
    return best, least


def compensation(error: np.ndarray, sums: Sums, rank: int, *, takes_mean: bool, with_data: bool) -> Factors:
    """The L that makes good what a quantized layer lacks: `error = W - Ŵ` [O, D] seen through C.

    Args:
        sums: Of X, and of what the output lacks.
        takes_mean: Whether the bias gets what is lacking in the mean.
        with_data: Whether L is to make good the error of the activation too, as far as it depends on X linearly: W - Ŵ is then moved by
            the ridge regression of what it leaves of the lack.
    """
    gram = (sums.centred_gram if takes_mean else sums.gram)[0]
    share, mean = max(RIDGE, len(gram) / max(sums.count, 1)), float(np.trace(gram)) / len(gram)
    gram = gram + (share * mean if mean > 0 else 1.0) * np.eye(len(gram))
    if with_data:
        rest = sums.moved(error[None])
        cross = rest.cross - rest.mean_lack[..., None] * rest.total[:, None] if takes_mean else rest.cross
        error = error + np.linalg.solve(gram, cross[0].T).T
    return factors(error.T, rank, gram)
