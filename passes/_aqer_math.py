"""Ridge regression of a layer's weight on what quantized activations cost it (Aqer, arXiv 2407.06794).

`Δ = argmin ||R - A Δᵀ||² + λ ||Δ||²` with `A = [X | 1]`, so `Δ = RᵀA (AᵀA + λI)⁻¹`; sums as in `_sums`.
λ is `alpha` times the mean diagonal of `AᵀA`, so that `alpha` means the same for every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphq.passes import _masked
from graphq.passes._sums import Sums

ALPHAS = (0.001, 0.01, 0.1, 1.0)

WORTHWHILE = 1e-9
"""Share of the output's power that the error must fall by: less is rounding of float32 (90 dB)."""


@dataclass(frozen=True)
class Refit:
    """A change of the weight, `delta` [G, O, D], and of the bias, `shift` [G, O], with the held-out error without and with it."""

    delta: np.ndarray
    shift: np.ndarray
    alpha: float
    before: float
    after: float


def ridge(sums: Sums, alpha: float, *, with_bias: bool, kept: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Δ for the weight, [G, O, D], and for the bias, [G, O] (zeros without).

    Args:
        kept: Bool [G, O, D], where the weight may change, all by default: zeros of a pruned weight stay.
    """
    gram, cross = sums.gram, sums.cross
    if with_bias:
        count = np.full((len(gram), 1, 1), float(sums.count))
        gram = np.block([[gram, sums.total[..., None]], [sums.total[:, None], count]])
        cross = np.concatenate([cross, sums.lack[..., None]], -1)
    damping = alpha * np.trace(gram, axis1=1, axis2=2).sum() / (gram.shape[0] * gram.shape[1])
    if not damping > 0:
        return np.zeros(sums.cross.shape), np.zeros(sums.lack.shape)
    gram = gram + damping * np.eye(gram.shape[1])
    if kept is None or kept.all():
        found = np.linalg.solve(gram, cross.swapaxes(1, 2)).swapaxes(1, 2)
    else:
        kept = np.concatenate([kept, np.ones((*kept.shape[:2], 1), bool)], -1) if with_bias else kept
        found = np.stack([_masked.fit(np.zeros(one.shape), *parts) for one, *parts in zip(cross, kept, gram, cross, strict=True)])
    return (found[..., :-1], found[..., -1]) if with_bias else (found, np.zeros(sums.lack.shape))


def refit(
    weight: np.ndarray, train: Sums, held: Sums, alphas: Sequence[float], *, with_bias: bool, takes_mean: bool = False,
    store: Callable[[np.ndarray], np.ndarray] = lambda weight: weight,
) -> Refit | None:  # fmt: skip
    """The ridge with the alpha that serves the held-out rows best, fitted to all rows; None if it does not help there.

    Args:
        weight: W, [G, O, D]; its zeros stay.
        with_bias: Whether the bias is fitted too.
        takes_mean: Whether it also gets what the output lacks in the mean, once the weight is stored.
        store: What becomes of a weight [G, any number of outputs, D] that is stored. A refit makes weights larger, and with
            them the steps that they are rounded to.
    """
    kept = weight != 0
    fits = [(np.zeros(weight.shape), np.zeros(train.lack.shape))]
    fits += [ridge(train, alpha, with_bias=with_bias, kept=kept) for alpha in alphas]
    stored = np.split(store(np.concatenate([weight + delta for delta, _ in fits], axis=1)), len(fits), axis=1)
    errors = []
    for made, (_, shift) in zip(stored, fits, strict=True):
        mean = train.moved(made - weight, shift).mean_lack if takes_mean else 0.0
        errors.append(held.moved(made - weight, shift + mean).error)
    best = int(np.argmin(errors))
    if not errors[best] < errors[0] - WORTHWHILE:
        return None
    alpha = alphas[best - 1]
    return Refit(*ridge(train + held, alpha, with_bias=with_bias, kept=kept), alpha, errors[0], errors[best])
