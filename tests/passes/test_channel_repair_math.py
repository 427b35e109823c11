"""Which channels go, and the refit of the rest: against solutions by brute force, and on rows that were not seen."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from graphq.passes import _channel_repair_math as math
from graphq.passes._round_math import damped


def layer(seed: int, channels: int = 48, size: int = 1, outputs: int = 24) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight [O, C * K], the damped Gram matrix of heavy-tailed, correlated inputs, and rows that it has not seen."""
    rng = np.random.default_rng(seed)
    inputs = channels * size
    x = rng.standard_t(5, (6000, inputs)) * 10 ** rng.uniform(-0.7, 0.7, inputs)
    x = np.maximum(x @ np.linalg.qr(rng.standard_normal((inputs, inputs)))[0] + rng.normal(size=inputs), 0)
    return rng.standard_t(6, (outputs, inputs)), damped((x[:3000].T @ x[:3000])[None], 3000)[0], x[3000:]


def lost(found: np.ndarray, weight: np.ndarray, x: np.ndarray) -> float:
    return float(np.sum((x @ (found - weight).T) ** 2) / np.sum((x @ weight.T) ** 2))


def stays(gone: np.ndarray, channels: int, size: int) -> np.ndarray:
    return np.repeat(~np.isin(np.arange(channels), gone), size)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [1, 4])
def test_repaired_beats_unrepaired(size: int, seed: int) -> None:
    """On held-out rows, and the choice that counts on the repair beats the one that does not, both repaired."""
    weight, gram, x = layer(seed, size=size)
    alone, together = (stays(math.choose(weight, gram, 48, 12, repair), 48, size) for repair in (False, True))
    plain, refitted = lost(weight * alone, weight, x), lost(math.repaired(weight, gram, alone), weight, x)
    assert lost(math.repaired(weight, gram, together), weight, x) < refitted < 0.6 * plain


def power(delta: np.ndarray, gram: np.ndarray) -> float:
    return float(np.einsum("od,de,oe->", delta, gram, delta))


@pytest.mark.parametrize("size", [1, 3])
def test_the_first_that_goes_is_the_best_and_the_last_ones_are_near_it(size: int) -> None:
    weight, gram, _ = layer(1, channels=8, size=size, outputs=5)

    def loss(gone: tuple[int, ...]) -> float:
        return power(math.repaired(weight, gram, stays(np.array(gone), 8, size)) - weight, gram)

    for count, factor in ((1, 1 + 1e-9), (3, 1.3)):
        best = min(map(loss, combinations(range(8), count)))
        assert loss(tuple(math.choose(weight, gram, 8, count).tolist())) <= factor * best


def test_one_after_the_other() -> None:
    weight, gram, _ = layer(2, size=2)
    order = math.choose(weight, gram, 48, 20)
    assert len(set(order.tolist())) == 20
    np.testing.assert_array_equal(math.choose(weight, gram, 48, 7), order[:7])


def test_repaired_is_the_least_squares_solution() -> None:
    weight, gram, _ = layer(3)
    keep = stays(np.array([3, 5, 8]), 48, 1)
    found = math.repaired(weight, gram, keep)
    assert not found[:, ~keep].any()
    np.testing.assert_allclose(((found - weight) @ gram)[:, keep], 0, atol=1e-9 * np.abs(weight @ gram).max())


def test_a_channel_that_others_make_up_for_costs_nothing() -> None:
    """A copy, and a sum of two others: the function stays the same."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(200, 6))
    x[:, 4], x[:, 5] = 2 * x[:, 0], x[:, 1] - x[:, 2]
    weight, gram = rng.normal(size=(3, 6)), x.T @ x + 1e-9 * np.eye(6)
    gone = math.choose(weight, gram, 6, 2)
    found = math.repaired(weight, gram, stays(gone, 6, 1))
    np.testing.assert_allclose(x @ found.T, x @ weight.T, atol=1e-6)
