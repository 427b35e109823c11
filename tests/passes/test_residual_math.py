"""Residuals: errors fall by the promised factor an order (T9), sparse weights keep their zeros, and which channels reach far."""

from __future__ import annotations

import numpy as np
import pytest

from graphq.passes import _residual_math as math
from graphq.spec import PerAxis, PerGroup, QuantSpec

SEEDS = pytest.mark.parametrize("seed", range(3))


def weight(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_t(4, (40, 96)) * np.exp(0.5 * rng.standard_normal((40, 1)))).astype(np.float32)


@SEEDS
@pytest.mark.parametrize("granularity", [PerAxis(0), PerGroup(1, 32)])
@pytest.mark.parametrize("bits", [3, 4, 5, 8])
def test_each_order_divides_the_error(bits: int, granularity: PerAxis | PerGroup, seed: int) -> None:
    """Largest error an output neuron: by `2^b - 2` (5 % are left for where it falls within a step); amplitude at 4 bits: by 10 and more."""
    lefts = [math.expand(weight(seed), QuantSpec(bits, granularity=granularity), orders, 1.0)[1] for orders in (1, 2, 3)]
    largest, size = [np.abs(left).max(1) for left in lefts], [float(np.sqrt(np.mean(left**2))) for left in lefts]
    if bits < 8:  # beyond, float32 is what is left
        assert all((less <= 1.05 * more / (2**bits - 2)).all() for more, less in zip(largest, largest[1:], strict=False))
    if bits == 4:
        assert all(10 * less < more for more, less in zip(size, size[1:], strict=False))


@SEEDS
def test_gamma_is_a_share_of_the_neurons(seed: int) -> None:
    """None is one order; errors fall with every one that is added, those first of which most is left."""
    spec, lefts = QuantSpec(4, granularity=PerAxis(0)), []
    for gamma in (0.0, 0.25, 0.5, 1.0):
        found, left = math.expand(weight(seed), spec, 2, gamma)
        assert [len(order.rows) for order in found] == ([40] if not gamma else [40, round(40 * gamma)])
        lefts.append(np.square(left).sum(1))
    assert all(less.sum() < more.sum() for more, less in zip(lefts, lefts[1:], strict=False))
    refined = lefts[1] < lefts[0]
    assert refined.sum() == 10 and lefts[0][refined].min() >= lefts[0][~refined].max()


def test_zeros_stay_zero() -> None:
    sparse = weight(0) * (np.random.default_rng(1).random((40, 96)) < 0.5)
    for order in math.expand(sparse, QuantSpec(4, granularity=PerGroup(1, 16)), 3, 0.5)[0]:
        assert not order.codes[sparse[order.rows] == 0].any() and not order.qparams.zero_point.any()


def test_a_weight_of_zeros_has_one_order() -> None:
    found, left = math.expand(np.zeros((4, 6), np.float32), QuantSpec(4, granularity=PerAxis(0)), 3, 1.0)
    assert len(found) == 1 and not left.any()


@pytest.mark.parametrize(("above", "limit", "count"), [(1, 64, 16), (16, 64, 16), (17, 64, 32), (60, 32, 32), (60, 128, 64), (90, 128, 80)])
def test_far_channels(above: int, limit: int, count: int) -> None:
    """Whole blocks of them, the farthest first, of 90 in all."""
    rng = np.random.default_rng(0)
    reach = rng.permutation(np.concatenate([[8.0], 1 + rng.random(above - 1), rng.random(90 - above) / 2]))
    found = math.far_channels(reach, limit)
    assert len(found) == count and (np.diff(found) > 0).all()
    rest = np.delete(reach, found)
    assert rest.max() <= reach[found].min()
