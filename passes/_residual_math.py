"""Quantized residuals, of weights and of activations.

REx (arXiv 2203.14645): `W ≈ Σ Q_k(R_k)`, `R_1 = W`, `R_{k+1} = R_k - Q_k(R_k)`.

W: [O, D], a row for each output neuron. With b bits, `|R_{k+1}| <= s_k / 2` and `s_{k+1} = max|R_{k+1}| / (2^(b-1) - 1)`: what is left
falls by a factor of at least `2^b - 2` with every order that all rows take part in. A weight of 0 has the code 0 in all of them.

ARCQuant (arXiv 2601.07475): `X W ≈ [Q(X) | Q(R)] [W; W_o]`, `R = X_o - Q(X)_o` for the columns o of X that reach furthest: they set the
scales that round all others, and are rounded a second time with finer ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphq.quantizers import QParams, Uniform
from graphq.spec import QuantSpec

BLOCK = 16
"""Channels are added in multiples of so many: the blocks of NVFP4."""

REACH = 8
"""Channels whose largest magnitude is above this part of the largest of all are worth a second rounding."""


@dataclass(frozen=True)
class Order:
    """One of the sum: the output neurons that it is for, ascending [S], and their codes [S, D] with qparams."""

    rows: np.ndarray
    codes: np.ndarray
    qparams: QParams


def expand(weight: np.ndarray, spec: QuantSpec, orders: int, gamma: float) -> tuple[list[Order], np.ndarray]:
    """Orders of `weight` [O, D], and what they leave of it, float64 [O, D].

    Args:
        spec: Symmetric, of rows: PerAxis(0) or PerGroup(1, size).
        gamma: Share of the output neurons in orders from the second on: those of which most is left.
    """
    rest, quantizer, found = weight.astype(np.float64), Uniform(spec), list[Order]()
    for order in range(orders):
        count = len(rest) if order == 0 else int(np.ceil(gamma * len(rest)))
        rows = np.sort(np.argsort(-np.square(rest).sum(1), kind="stable")[:count])
        part = rest[rows].astype(np.float32)
        if order and not part.any():
            break
        qparams = quantizer.fit_weight(part)
        codes = quantizer.quantize(part, qparams)
        rest[rows] -= quantizer.dequantize(codes, qparams)
        found.append(Order(rows, codes, qparams))
    return found, rest


def far_channels(reach: np.ndarray, limit: int) -> np.ndarray:
    """The channels to round twice, ascending: at most `limit`, in whole blocks, of which the farthest-reaching first.

    Args:
        reach: Largest magnitude of each channel, [D].
    """
    above = int(np.sum(reach > reach.max() / REACH))
    count = min(limit, -(-above // BLOCK) * BLOCK, len(reach)) // BLOCK * BLOCK
    return np.sort(np.argsort(-reach, kind="stable")[:count])
