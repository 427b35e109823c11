"""Ridge regression of a layer's weight on what quantized activations cost it (Aqer, arXiv 2407.06794; METHODS.md M1).

`Δ = argmin ||R - A Δᵀ||² + λ ||Δ||²` with `A = [X | 1]`, so `Δ = RᵀA (AᵀA + λI)⁻¹`; letters and sums as in `_layer_rows`.
λ is `alpha` times the mean diagonal of `AᵀA`, so that `alpha` means the same for every layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphq.passes._layer_rows import Sums

ALPHAS = (0.001, 0.01, 0.1, 1.0)

WORTHWHILE = 1e-9
"""Share of the output's power that the error must fall by: less is rounding of float32 (90 dB)."""


@dataclass(frozen=True)
class Refit:
    """A change of the weight, `delta` [G, O, D], and of the bias, `shift` [G, O], with the held-out error before and after."""

    delta: np.ndarray
    shift: np.ndarray
    alpha: float
    before: float
    after: float


def ridge(sums: Sums, alpha: float, *, with_bias: bool) -> tuple[np.ndarray, np.ndarray]:
    """Δ for the weight, [G, O, D], and for the bias, [G, O] (zeros without)."""
    gram, cross = sums.gram, sums.cross
    if with_bias:
        count = np.full((len(gram), 1, 1), float(sums.count))
        gram = np.block([[gram, sums.total[..., None]], [sums.total[:, None], count]])
        cross = np.concatenate([cross, sums.lack[..., None]], -1)
    damping = alpha * np.trace(gram, axis1=1, axis2=2).sum() / (gram.shape[0] * gram.shape[1])
    if not damping > 0:
        return np.zeros(sums.cross.shape), np.zeros(sums.lack.shape)
    found = np.linalg.solve(gram + damping * np.eye(gram.shape[1]), cross.swapaxes(1, 2)).swapaxes(1, 2)
    return (found[..., :-1], found[..., -1]) if with_bias else (found, np.zeros(sums.lack.shape))


def refit(train: Sums, held: Sums, alphas: Sequence[float], *, with_bias: bool) -> Refit | None:
    """The ridge with the alpha that serves the held-out rows best, fitted to all rows; None if it does not help there."""
    errors = {alpha: held.moved(*ridge(train, alpha, with_bias=with_bias)).error for alpha in alphas}
    best = min(errors, key=errors.__getitem__)
    if not errors[best] < held.error - WORTHWHILE:
        return None
    return Refit(*ridge(train + held, best, with_bias=with_bias), best, held.error, errors[best])
