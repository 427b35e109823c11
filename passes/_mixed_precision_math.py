"""Which widths each layer gets: one choice a layer, with the least total loss within a budget (HAWQ-V3, arXiv 2011.10680, section 3.4).

`min sum_l loss[l, k_l]` subject to `sum_l cost[l, k_l] <= budget`: a multiple-choice knapsack, solved exactly. Combinations of
choices are extended layer by layer; those that another one beats in both cost and loss are dropped (dynamic programming), and
those that cannot end better than a solution that is known: with a price p of cost, whatever follows a combination has
`loss >= combination's + sum over the rest of min_k(loss + p cost) - p (budget - combination's cost)` (Lagrange).
`scipy.optimize.milp` finds the same, but the HiGHS in scipy 1.17 prints to stdout, which belongs to `--json`.

loss, cost: float64 [L, K], for L layers and the same K choices of each.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDING = 1e-9
"""What rounding may add to a sum, as a part of it."""

LARGEST = 1 << 16
"""Combinations that are kept at a time. More arise only where losses are all but proportional to costs: many are equally good then."""


def losses(effect: Array, relative: Array) -> Array:
    """Effect of each layer on the model's output at each of W widths, float64 [L, W].

    Args:
        effect: Measured at the first width, [L].
        relative: Error of the layer's own output at every width, [L, W], to which the effect is proportional.
    """
    first = relative[:, :1]
    return np.asarray(effect[:, None] * np.divide(relative, first, out=np.zeros_like(relative), where=first != 0))


def connected(keys: Sequence[Iterable[Hashable]]) -> list[list[int]]:
    """The indices of `keys` in groups: those that have a key in common, directly or through others, are in one."""
    groups: list[tuple[set[Hashable], list[int]]] = []
    for index, own in enumerate(keys):
        touched = [group for group in groups if not group[0].isdisjoint(own)]
        groups = [group for group in groups if group[0].isdisjoint(own)]
        groups.append(
            (set(own).union(*(names for names, _ in touched)), sorted([index, *(one for _, members in touched for one in members)]))
        )
    return sorted(members for _, members in groups)


def allocate(loss: Array, cost: Array, budget: float, labels: Sequence[int], groups: Sequence[Sequence[int]]) -> Array | None:
    """The choice of each layer, int64 [L], with the least total loss at a total cost of at most `budget`; None if there is none.

    Args:
        labels: One for each of the K choices.
        groups: All L layers, in groups whose layers must take choices of one label.
    """
    fronts, limit = _fronts(loss, cost, labels, groups), budget * (1 + ROUNDING)
    if _cheapest(fronts) > limit:
        return None
    price = _price(fronts, limit)
    known = _joined(front.at(price) for front in fronts)
    cheapest = _sums_after([float(front.cost[0]) for front in fronts])
    bounds = _sums_after([float(np.min(front.loss + price * front.cost)) for front in fronts])
    found = _EMPTY
    for front, least, bound in zip(fronts, cheapest, bounds, strict=True):
        cost_so_far, loss_so_far = (np.add.outer(*pair).ravel() for pair in ((found.cost, front.cost), (found.loss, front.loss)))
        at_best = loss_so_far + bound - price * (limit - cost_so_far)
        useful = (cost_so_far + least <= limit) & (at_best <= float(known.loss[0]) * (1 + ROUNDING))
        found = found.extended(front, np.flatnonzero(useful)).thinned()
    best = found if len(found.cost) and found.loss[-1] < known.loss[0] else known
    choice = np.empty(len(loss), np.int64)
    choice[[layer for group in groups for layer in group]] = best.choices[-1]
    return choice


def least_cost(cost: Array, labels: Sequence[int], groups: Sequence[Sequence[int]]) -> float:
    """The smallest total cost that there is."""
    return _cheapest(_fronts(np.zeros_like(cost), cost, labels, groups))


def total(values: Array, choice: Array) -> float:
    """Sum of `values` [L, K] over the choices [L]."""
    return float(values[np.arange(len(values)), choice].sum())


@dataclass(frozen=True)
class _Front:
    """Combinations of choices that no other one beats, cheapest first, so that each has less loss than those before it.

    Attributes:
        cost, loss: Float64 [N].
        choices: Int8 [N, layers].
    """

    cost: Array
    loss: Array
    choices: Array

    @classmethod
    def of(cls, cost: Array, loss: Array, choices: Array) -> _Front:
        order = np.lexsort((loss, cost))
        least_before = np.minimum.accumulate(np.append(np.inf, loss[order]))[:-1]
        kept = order[loss[order] < least_before]
        return cls(cost[kept], loss[kept], choices[kept])

    def extended(self, other: _Front, pairs: Array | None = None) -> _Front:
        """Combinations of `self` with those of `other`, which is about other layers: all, or `pairs` of the flattened table."""
        pairs = np.arange(len(self.cost) * len(other.cost)) if pairs is None else pairs
        first, second = np.divmod(pairs, max(len(other.cost), 1))
        choices = np.concatenate([self.choices[first], other.choices[second]], axis=1)
        return _Front.of(self.cost[first] + other.cost[second], self.loss[first] + other.loss[second], choices)

    def thinned(self) -> _Front:
        """`LARGEST` of the combinations, evenly spread, if there are more."""
        kept = np.linspace(0, len(self.cost) - 1, min(len(self.cost), LARGEST)).astype(np.intp)
        return _Front(self.cost[kept], self.loss[kept], self.choices[kept])

    def at(self, price: float) -> _Front:
        """The one combination that is best at a price of cost."""
        index = int(np.argmin(self.loss + price * self.cost))
        return _Front(self.cost[[index]], self.loss[[index]], self.choices[[index]])


_EMPTY = _Front(np.zeros(1), np.zeros(1), np.zeros((1, 0), np.int8))


def _joined(fronts: Iterable[_Front]) -> _Front:
    """All combinations of all `fronts`."""
    found = _EMPTY
    for front in fronts:
        found = found.extended(front)
    return found


def _fronts(loss: Array, cost: Array, labels: Sequence[int], groups: Sequence[Sequence[int]]) -> list[_Front]:
    """The combinations within each group: for every label, those of the choices that have it."""

    def of_group(group: Sequence[int]) -> _Front:
        parts = []
        for label in sorted(set(labels)):
            allowed = np.flatnonzero(np.equal(labels, label))
            parts.append(
                _joined(_Front.of(cost[layer, allowed], loss[layer, allowed], allowed[:, None].astype(np.int8)) for layer in group)
            )
        return _Front.of(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("cost", "loss", "choices")))

    return [of_group(group) for group in groups]


def _sums_after(values: Sequence[float]) -> Array:
    """For each of `values`, the sum of all behind it."""
    return np.cumsum([0.0, *values[:0:-1]])[::-1]


def _cheapest(fronts: Sequence[_Front]) -> float:
    return float(sum(front.cost[0] for front in fronts))


def _price(fronts: Sequence[_Front], limit: float) -> float:
    """A price of cost at which the best of each front fit into `limit` together, as low as it gets."""

    def fits(price: float) -> bool:
        return float(sum(front.at(price).cost[0] for front in fronts)) <= limit

    if fits(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while not fits(high):
        high *= 16
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
