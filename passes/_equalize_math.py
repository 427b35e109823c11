"""Cross-layer equalization (DFQ, arXiv 1906.04721, section 4.1): float64, numpy only.

A weight is held in *blocks*: [G, O, I, K] with G groups, O output and I input channels of a group, K kernel positions. Its G * O
output and G * I input channels are numbered group by group, as they lie in the tensors between two layers. If the function between
two layers is positively homogeneous, `f(s y) = s f(y)` for `s > 0`, then dividing output channel i of the first by `s_i` and
multiplying input channel i of the second by `s_i` changes nothing. `s_i = sqrt(r1_i / r2_i)` makes their largest weights equal,
`r1_i` and `r2_i` being the largest |weight| of output channel i of the first and of input channel i of the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEAD = 1e-6
"""A channel whose largest weight is below this share of its layer's largest is left alone: it carries nothing to balance."""


@dataclass(frozen=True)
class Layout:
    """How a stored weight maps to blocks.

    Attributes:
        out_first: The output channels lie on axis 0 (Conv, Gemm with transB), else on axis 1.
        groups: Groups of a convolution; they lie on axis 0 in both cases.
    """

    out_first: bool
    groups: int = 1

    def to_blocks(self, weight: np.ndarray) -> np.ndarray:
        """[G, O, I, K] in float64, from the stored shape."""
        first, second, *kernel = weight.shape
        size = int(np.prod(kernel, dtype=np.int64))
        blocks = weight.astype(np.float64).reshape(self.groups, first // self.groups, second, size)
        return blocks if self.out_first else blocks.transpose(0, 2, 1, 3)

    def from_blocks(self, blocks: np.ndarray, shape: Sequence[int]) -> np.ndarray:
        """The stored `shape`, from [G, O, I, K]."""
        return (blocks if self.out_first else blocks.transpose(0, 2, 1, 3)).reshape(shape)


def out_range(blocks: np.ndarray) -> np.ndarray:
    """Largest |weight| of each output channel, (G * O,)."""
    return np.abs(blocks).max(axis=(2, 3), initial=0.0).reshape(-1)


def in_range(blocks: np.ndarray) -> np.ndarray:
    """Largest |weight| of each input channel, (G * I,)."""
    return np.abs(blocks).max(axis=(1, 3), initial=0.0).reshape(-1)


def scale(blocks: np.ndarray, outputs: np.ndarray | None = None, inputs: np.ndarray | None = None) -> np.ndarray:
    """Blocks with output channels divided by `outputs` (G * O,) and input channels multiplied by `inputs` (G * I,)."""
    groups, count_out, count_in, _ = blocks.shape
    if outputs is not None:
        blocks = blocks / outputs.reshape(groups, count_out, 1, 1)
    return blocks if inputs is None else blocks * inputs.reshape(groups, 1, count_in, 1)


def balance(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """`s` of shape (channels,) from the ranges of both sides, each (channels,); 1 for dead channels."""
    alive = (first > DEAD * first.max(initial=0.0)) & (second > DEAD * second.max(initial=0.0))
    return np.sqrt(np.divide(first, second, out=np.ones_like(first), where=alive))


def equalize_chain(weights: Sequence[np.ndarray], iterations: int, tolerance: float = 1e-3) -> list[np.ndarray]:
    """`s` between each two successive layers of a chain, each (channels,).

    One pair's balance disturbs the next pair's, so the chain is walked until no factor moves by more than `tolerance`.

    Args:
        weights: Blocks of the layers in order; output channels of one are input channels of the next.
        iterations: Walks over the chain, at most.
        tolerance: On `|log s|` of one walk.
    """
    current = list(weights)
    total = [np.ones(len(out_range(blocks))) for blocks in current[:-1]]
    for _ in range(iterations):
        moved = 0.0
        for index in range(len(total)):
            step = balance(out_range(current[index]), in_range(current[index + 1]))
            current[index], current[index + 1] = scale(current[index], outputs=step), scale(current[index + 1], inputs=step)
            total[index] = total[index] * step
            moved = max(moved, float(np.abs(np.log(step)).max(initial=0.0)))
        if moved <= tolerance:
            break
    return total


def spread(ranges: np.ndarray) -> float:
    """Largest over smallest range of the channels that are not dead: 1 is perfectly even."""
    alive = ranges[ranges > DEAD * ranges.max(initial=0.0)]
    return float(alive.max() / alive.min()) if alive.size else 1.0
