"""Kernels that are added: where taps meet, and what is no single kernel."""

from __future__ import annotations

import numpy as np
import pytest

from graphq.passes import _parallel_math as math
from graphq.passes._parallel_math import Kernel, Taps


def convolved(kernel: Kernel, x: np.ndarray) -> np.ndarray:
    """A textbook convolution along one axis: x [C, positions] to [O, outputs]."""
    (taps,), (stride,) = kernel.taps, kernel.strides
    before, after = taps.pads
    padded = np.pad(x, ((0, 0), (before, after)))
    step, size = taps.dilation or 1, kernel.weight.shape[2]
    starts = range(0, padded.shape[1] - (size - 1) * step, stride)
    inputs, outputs = len(x) // kernel.groups, len(kernel.weight) // kernel.groups
    found = np.zeros((len(kernel.weight), len(starts)))
    for o, row in enumerate(kernel.weight):
        read = padded[inputs * (o // outputs) :][:inputs]
        found[o] = [kernel.bias[o] + sum(row[:, k] @ read[:, start + k * step] for k in range(size)) for start in starts]
    return found


def kernel(size: int, dilation: int = 1, pads: tuple[int, int] = (0, 0), stride: int = 1, groups: int = 1, seed: int = 0) -> Kernel:
    rng = np.random.default_rng(seed + size)
    return Kernel(rng.normal(size=(4, 4 // groups, size)), rng.normal(size=4), (Taps.of(size, dilation, *pads),), (stride,), groups)


TOGETHER = {
    "a point inside three": [kernel(3, pads=(1, 1)), kernel(1)],
    "three inside five": [kernel(5, pads=(2, 2)), kernel(3, pads=(1, 1))],
    "with a stride": [kernel(3, pads=(1, 1), stride=2), kernel(1, stride=2)],
    "dilated": [kernel(3, 2, (2, 2)), kernel(1)],
    "dilated by the same, of two sizes": [kernel(5, 2, (4, 4)), kernel(3, 2, (2, 2), seed=1)],
    "to one side": [kernel(2, pads=(1, 0)), kernel(2, pads=(0, 1), seed=1)],
    "in groups, and what is read": [kernel(3, pads=(1, 1), groups=2), math.identity(4, 2, 1)],
    "channel by channel": [kernel(3, pads=(1, 1), groups=4), math.identity(4, 4, 1), kernel(1, groups=4)],
    "points apart": [kernel(1, pads=(4, 0)), kernel(1, pads=(0, 4), seed=1)],
    "the same twice": [kernel(3, pads=(1, 1)), kernel(3, pads=(1, 1), seed=1)],
}


@pytest.mark.parametrize("case", TOGETHER)
def test_the_sum_of_kernels_is_the_kernel_of_the_sum(case: str) -> None:
    kernels, x = TOGETHER[case], np.random.default_rng(0).normal(size=(4, 12))
    assert math.conflict(kernels) is None
    np.testing.assert_allclose(convolved(math.merged(kernels), x), sum(convolved(one, x) for one in kernels), rtol=1e-12, atol=1e-12)


APART = {
    "strides": [kernel(3, pads=(1, 1), stride=2), kernel(1)],
    "groups": [kernel(3, pads=(1, 1)), kernel(1, groups=2)],
    "other positions": [kernel(3, 2, (2, 2)), kernel(3, 1, (1, 1))],
    "positions, slack": [kernel(3, pads=(1, 1)), kernel(3, pads=(1, 0))],
    "positions, grid": [kernel(3, 2, (3, 1)), kernel(3, 2, (2, 2))],
    "more positions": [kernel(2, pads=(5, 0)), kernel(2, pads=(0, 5))],
}


@pytest.mark.parametrize("case", APART)
def test_what_is_no_single_kernel(case: str) -> None:
    assert case.split(",")[0] in (math.conflict(APART[case]) or "")


def test_what_is_left_of_a_kernel_is_where_it_was() -> None:
    """SpRe: an N:M pattern that the branches share is that of their sum, to the last zero."""
    mask = np.arange(4)[:, None] % 2 == 0
    branches = [Kernel(one.weight * mask, one.bias, one.taps, one.strides) for one in TOGETHER["the same twice"]]
    np.testing.assert_array_equal(math.merged(branches).weight == 0, np.broadcast_to(~mask, (4, 4, 3)))


@pytest.mark.parametrize(("shape", "found"), [
    ((), True), ((1,), True), ((4, 1, 1), True), ((1, 4, 1, 1), True), ((1, 1, 1, 1), True),
    ((4,), False), ((2, 4, 1, 1), False), ((1, 4, 5, 1), False), ((1, 1, 4, 1, 1), False), ((3, 1, 1), False),
])  # fmt: skip
def test_numbers_of_channels(shape: tuple[int, ...], found: bool) -> None:
    array = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
    numbers = math.per_channel(array, 4, 1, 4)
    assert (numbers is not None) == found
    if numbers is not None:
        np.testing.assert_array_equal(np.broadcast_to(array, (1, 4, 1, 1)).reshape(-1), numbers)
