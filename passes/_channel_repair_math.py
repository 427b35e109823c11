"""Which hidden channels a layer can do without, and what the others do in their place: float64, numpy only.

The layer makes `Y = X Wᵀ` of C channels, K numbers each (the positions of a kernel): W: [O, C * K], Gram matrix G of X:
[C * K, C * K], damped. UDFC (arXiv 2308.07209) takes a channel that goes for a combination `Σ s_k h_k` of those that stay, S, which
the next layer absorbs: `W_S += W_j s`. With data, `s = G_jS G_SS⁻¹` loses the least of Y.
"""

from __future__ import annotations

import numpy as np


def choose(weight: np.ndarray, gram: np.ndarray, channels: int, count: int, repair: bool = True) -> np.ndarray:
    """The `count` channels that go, one after the other, each the one without which the output then loses the least.

    With `H = G⁻¹` over what is left, the loss of channel j is `tr(W_j H_jj⁻¹ W_jᵀ)` if the others make up for it (the surgeon's
    formula for groups, as in ZipLM, arXiv 2302.04089), and `tr(W_j G_jj W_jᵀ)` if they do not.
    """
    size = len(gram) // channels
    each = np.arange(channels)
    if not repair:
        blocks = gram.reshape(channels, size, channels, size)[each, :, each]
        return np.argsort(_power(weight, blocks, channels), kind="stable")[:count]
    left, inverse, gone = weight.astype(np.float64), np.linalg.inv(gram), np.zeros(channels, bool)
    order = []
    for _ in range(count):
        blocks = inverse.reshape(channels, size, channels, size)[each, :, each]
        blocks[gone] = np.eye(size)
        losses = np.where(gone, np.inf, _power(left, np.linalg.inv(blocks), channels))
        worst = int(np.argmin(losses))
        own = slice(worst * size, (worst + 1) * size)
        share = np.linalg.solve(inverse[own, own], inverse[own])
        left -= left[:, own] @ share
        inverse -= inverse[:, own] @ share
        gone[worst] = True
        order.append(worst)
    return np.array(order, int)


def _power(weight: np.ndarray, blocks: np.ndarray, channels: int) -> np.ndarray:
    """`tr(W_j B_j W_jᵀ)` of each channel, float64 [C], for blocks B [C, K, K]."""
    parts = weight.astype(np.float64).reshape(len(weight), channels, -1).swapaxes(0, 1)
    return np.asarray(np.einsum("cok,cok->c", parts @ blocks, parts))


def repaired(weight: np.ndarray, gram: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """W, float64, with zeros for the inputs that do not `stay` (bool [C * K]) and the least squared error of Y with the rest."""
    found = np.zeros(weight.shape)
    found[:, stay] = np.linalg.solve(gram[np.ix_(stay, stay)], gram[stay] @ weight.T.astype(np.float64)).T
    return found
