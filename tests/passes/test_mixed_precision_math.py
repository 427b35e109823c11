"""The integer program of mixed-precision: the best choice there is, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphq.passes import _mixed_precision_math as allocation


def instance(seed: int, layers: int = 8, choices: int = 3) -> tuple[np.ndarray, np.ndarray, list[int], list[list[int]]]:
    """Losses over seven decades, costs, labels and groups (two of the layers are tied)."""
    rng = np.random.default_rng(seed)
    loss, cost = 10 ** rng.uniform(-7, 0, (layers, choices)), rng.uniform(0.1, 1, (layers, choices))
    return loss, cost, [0, *(int(label) for label in rng.integers(0, 2, choices - 1))], [[2, 0], *([one] for one in (1, *range(3, layers)))]


def brute_force(loss: np.ndarray, cost: np.ndarray, budget: float, labels: list[int], groups: list[list[int]]) -> float:
    """The least total loss within the budget."""
    best = np.inf
    for picks in itertools.product(range(loss.shape[1]), repeat=len(loss)):
        tied = all(len({labels[picks[layer]] for layer in group}) == 1 for group in groups)
        if tied and allocation.total(cost, np.array(picks)) <= budget:
            best = min(best, allocation.total(loss, np.array(picks)))
    return best


@pytest.mark.parametrize("tightness", [1.0, 1.1, 1.5])
@pytest.mark.parametrize("seed", range(5))
def test_the_choice_is_that_of_brute_force(seed: int, tightness: float) -> None:
    """METHODS.md T12, on 8 layers with 3 choices each."""
    loss, cost, labels, groups = instance(seed)
    budget = allocation.least_cost(cost, labels, groups) * tightness * (1 + 1e-12)
    choice = allocation.allocate(loss, cost, budget, labels, groups)
    assert choice is not None and allocation.total(cost, choice) <= budget * (1 + 1e-8)
    assert labels[choice[0]] == labels[choice[2]]
    assert allocation.total(loss, choice) == pytest.approx(brute_force(loss, cost, budget, labels, groups), rel=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_a_tighter_budget_never_lowers_the_loss(seed: int) -> None:
    loss, cost, labels, groups = instance(seed, layers=40, choices=4)
    least = allocation.least_cost(cost, labels, groups)
    choices = [allocation.allocate(loss, cost, least * factor, labels, groups) for factor in np.linspace(1, 3, 15)]
    losses = [allocation.total(loss, choice) for choice in choices if choice is not None]
    assert len(losses) == 15 and all(tight >= loose for tight, loose in itertools.pairwise(losses)) and losses[0] > losses[-1]


@pytest.mark.parametrize("seed", range(3))
def test_below_the_least_cost_there_is_no_choice(seed: int) -> None:
    loss, cost, labels, groups = instance(seed)
    least = allocation.least_cost(cost, labels, groups)
    assert allocation.allocate(loss, cost, least, labels, groups) is not None
    assert allocation.allocate(loss, cost, least * 0.999, labels, groups) is None


def test_losses_that_are_proportional_to_costs_end_as_well() -> None:
    """No bound rules a combination out there; with thinning the result is within 1e-4 of the bound that no choice can beat."""
    elements = np.random.default_rng(0).uniform(1, 2, 60)
    cost, loss = elements[:, None] * np.array([1.0, 2.0]), elements[:, None] * np.array([2.0, 1.0])
    budget = cost.sum() / 2
    choice = allocation.allocate(loss, cost, budget, [0, 0], [[layer] for layer in range(60)])
    assert choice is not None and allocation.total(cost, choice) <= budget * (1 + 1e-8)
    assert allocation.total(loss, choice) <= (3 * elements.sum() - budget) * (1 + 1e-4)


def test_groups_grow_together_through_common_keys() -> None:
    assert allocation.connected(["ab", "c", "d", "bc", "e"]) == [[0, 1, 3], [2], [4]]


def test_losses_follow_the_error_of_the_layers_output() -> None:
    found = allocation.losses(np.array([0.1, 0.2]), np.array([[0.4, 0.1], [0.0, 0.0]]))
    np.testing.assert_allclose(found, [[0.1, 0.025], [0, 0]])
