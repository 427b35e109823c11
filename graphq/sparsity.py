"""Where the zeros of weights lie: how many there are, in which N:M pattern, and at which positions of convolution kernels.

N:M: at most N of every M consecutive input channels are not zero, for each output and kernel position; sparse tensor cores
multiply 2:4 at twice the speed. The pattern leaves equally many weights at each position of a kernel, where pruning without one
keeps more at the centre; how far a layer is from that is SpRe's spatial sparsity (arXiv 2306.05612).
Letters: O output channels, I input channels of a group, K the kernel's axes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphq import ir, linear, stored
from graphq.executor import decode

GROUPS = (4, 8, 16, 32)
"""Values of M that are looked for."""

MARK = "graphq.nm"
"""Key in the `meta` of nodes whose weights were pruned: (N, M)."""

_FILLED = 0.75
"""Share of N that a pattern with M above 4, which no hardware asks for, has to use: wide groups of any sparse weight keep one."""

_PLACES = ("centre", "edge", "corner")


# ---- arrays ---------------------------------------------------------------------------------------------------------


def fullest(weight: np.ndarray, m: int) -> int:
    """How many weights of [O, I, *K] are not zero in the fullest group of `m` input channels; channels left over are not looked at."""
    count = weight.shape[1] // m
    groups = weight[:, : count * m].reshape(len(weight), count, m, *weight.shape[2:])
    return int(np.count_nonzero(groups, axis=2).max(initial=0))


def pattern(weight: np.ndarray) -> tuple[int, int] | None:
    """The sparsest (N, M) that the weight [O, I, *K] keeps, of equal ones the one with the smallest M; None if it keeps none.

    Channels that are left when I is no multiple of M are not looked at: they stay dense.
    """
    found, used = None, np.count_nonzero(weight) / max(weight.size, 1)
    for m in GROUPS:
        if m > weight.shape[1] or not weight.size:
            break
        n = fullest(weight, m)
        is_meant = m == GROUPS[0] or used >= _FILLED * n / m
        if n < m and is_meant and (found is None or n * found[1] < found[0] * m):
            found = n, m
    return found


def position_sparsity(weight: np.ndarray, rate: float) -> np.ndarray:
    """Share of the weights [O, I, *K] at each position that go if the share `rate` with the least |w| of all goes: float64 [*K].

    Weights that are as large as the last that goes go in equal parts.
    """
    size = np.abs(weight).reshape(-1, *weight.shape[2:])
    count = rate * size.size
    if not 0 < count < size.size:
        return np.full(size.shape[1:], min(max(rate, 0.0), 1.0))
    last = np.partition(size, int(count), axis=None)[int(count)]
    below, equal = size < last, size == last
    return (below.sum(0) + equal.sum(0) * (count - below.sum()) / equal.sum()) / len(size)


def position_numbers(weight: np.ndarray, n: int, m: int) -> dict[str, float]:
    """For the report: the sparsity at the centre of a kernel, at its edges and its corners (as there are), at rate 1 - N/M.

    None of a matrix or a kernel of one position. Call it with the weight before it is pruned: an N:M weight is even.
    """
    places = _places(weight.shape[2:])
    if places.size < 2:
        return {}
    shares = position_sparsity(weight, 1 - n / m)
    return {f"sparsity_{name}": float(shares[places == index].mean()) for index, name in enumerate(_PLACES) if (places == index).any()}


def _places(kernel: tuple[int, ...]) -> np.ndarray:
    """Along how many axes each position is off the centre, 2 at most: int [*K]."""
    off = np.zeros(kernel, int)
    for axis, size in enumerate(kernel):
        distance = np.abs(2 * np.arange(size) - (size - 1)) > 1
        off += distance.reshape(-1, *(1,) * (len(kernel) - axis - 1))
    return np.minimum(off, 2)


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerZeros:
    """Attributes:
    shape: [O, I, *K] (of a matrix, [O, I]).
    zeros: Share of the weights that are zero, 0 to 1.
    pattern: (N, M), None if there is none.
    positions: Sparsity at each position of the kernel, in row-major order, if half of the weights went (see `position_sparsity`).
    spatial_mask: Where that is less than a half; both are empty for kernels of one position.
    """

    name: str
    op_type: str
    shape: tuple[int, ...]
    zeros: float
    pattern: tuple[int, int] | None
    positions: tuple[float, ...]
    spatial_mask: tuple[bool, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Zeros:
    """The layers of a model whose weights are constants, floats or codes, as passes see them."""

    layers: tuple[LayerZeros, ...]

    @property
    def weights(self) -> int:
        return sum(layer.size for layer in self.layers)

    @property
    def share(self) -> float:
        """Of all weights, how many are zero, 0 to 1."""
        return sum(layer.zeros * layer.size for layer in self.layers) / max(self.weights, 1)


def find_zeros(path: str | Path) -> Zeros:
    """Look for zeros in the weights of the model file `path`, one layer in memory at a time."""
    from graphq.inspect import normalized
    from graphq.targets import get_target

    return Zeros(tuple(_layers(normalized(ir.load(path), get_target("generic")))))


def _layers(model: ir.Model) -> Iterator[LayerZeros]:
    for node in model.graph.all_nodes():
        if node.domain or node.op_type not in linear.LINEAR_OPS:
            continue
        value = linear.weight_of(node)
        if value is None or not stored.is_fixed(value):
            continue
        array = decode(model, value)
        if array.ndim >= 2 and array.size and array.dtype.kind == "f" and (node.op_type != "MatMul" or array.ndim == 2):
            yield _layer(node, np.moveaxis(array, linear.out_axis(node), 0))


def _layer(node: ir.Node, weight: np.ndarray) -> LayerZeros:
    is_even = node.op_type != "ConvTranspose" or ir.attribute(node, "group", 1) == 1  # else several groups lie along axis I
    is_kernel = math.prod(weight.shape[2:]) > 1
    shares = position_sparsity(weight, 0.5).reshape(-1) if is_kernel else np.zeros(0)
    return LayerZeros(
        node.name or "", node.op_type, weight.shape, 1 - np.count_nonzero(weight) / weight.size, pattern(weight) if is_even else None,
        tuple(shares.tolist()), tuple((shares < 0.5 - 1e-9).tolist()),  # an even sparsity is the rate itself, but for rounding
    )  # fmt: skip
