"""The branch that SpRe trains beside a sparse convolution, as a leaf of `_learned_torch`. Needs torch.

Letters: O outputs, I inputs of a group, K kernel positions.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from graphq.passes._learned import Floats
from graphq.passes._learned_torch import Leaf
from graphq.passes._parallel_math import Kernel, Taps, merged


class BranchLeaf(Leaf):
    """Two branches of one convolution, each normalized by a gain for every output channel: `g1 W1 + g2 W2`.

    W1 has the zeros of the weight as it is, W2 those and, besides, the kernel positions that `spatial` leaves out. They start as equal
    parts of the weight, where both may be, so that nothing is changed. Statistics of normalizations are those of the start, which the
    gains contain: what data is too little for cannot move.
    """

    def __init__(self, one: Floats, spatial: np.ndarray, rate: float, device: torch.device) -> None:
        self.one, self.unit, self.rate = one, one.unit, rate
        weight = torch.tensor(one.start, device=device)
        self.masks = [weight != 0, (weight != 0) & torch.tensor(spatial, device=device)]
        half = 0.5 * weight * self.masks[1]
        self.bases = [weight - half, half]
        self.tensors = [torch.zeros_like(weight), torch.zeros_like(weight), *(weight.new_zeros(len(weight)) for _ in range(2))]

    def branches(self) -> list[tuple[Tensor, Tensor]]:
        """The weight [O, I, *K] and the gain [O] of each."""
        weights = [base + self.unit * mask * moved for base, mask, moved in zip(self.bases, self.masks, self.tensors[:2], strict=True)]
        return list(zip(weights, [1 + gain for gain in self.tensors[2:]], strict=True))

    def values(self, *, hard: bool) -> list[Tensor]:
        return [sum((gain.reshape(-1, *(1,) * (weight.ndim - 1)) * weight for weight, gain in self.branches()), torch.zeros(()))]

    def merged(self) -> np.ndarray:
        """The weight of the one convolution that does what both branches do, as `merge-parallel-conv-bn` finds it."""
        with torch.no_grad():
            parts = [(weight.double().cpu().numpy(), gain.double().cpu().numpy()) for weight, gain in self.branches()]
        none, sizes = np.zeros(len(parts[0][0])), parts[0][0].shape[2:]
        taps = tuple(Taps.of(size, 1, 0, 0) for size in sizes)  # of both: where they lie does not matter
        kernels = [Kernel(weight, none, taps, (1,) * len(taps)).scaled(gain, none) for weight, gain in parts]
        return merged(kernels).weight.astype(np.float32)
