"""Rounding a layer's weight so that its output, not each weight, is close: GPTQ, Wqer, AdaRound, and greedy steps of one code.

All minimize `P(δ) = δᵀ C δ` for each output, where δ is what rounding changes in its weights and C the (damped) Gram matrix of
what the layer reads. Letters as in `_layer_rows`: W: [G, O, D], C: [G, D, D]; codes are whole numbers, float64 [G, O, D].

GPTQ: arXiv 2210.17323. Wqer: ERQ, arXiv 2407.06794, with exact gains. AdaRound: arXiv 2004.10568, without a single forward pass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphq.quantizers import QParams, Uniform, qparams_shape
from graphq.spec import PerGroup, QuantSpec

DAMPING = 0.01
"""Added to the diagonal of C at least, in units of its mean."""

CLIPS = np.geomspace(1.0, 0.25, 30)
"""Shares of the min-max range that the search for a scale tries."""

_BLOCK = 128  # Columns of GPTQ whose effect on the rest is applied at once.
_TILE = 1 << 17  # Elements of the greedy search at once: they stay in the cache between its steps.
_STEPS = 4  # Steps of one code for each of D inputs, at most.
_MARGIN = 1 + 1e-9  # A step has to gain more than float64 loses.

_ROUNDS, _RATE, _BETAS, _WARM_UP = 500, 0.1, (0.9, 0.999), 0.2  # Of AdaRound: Adam's steps, and the share of them without a penalty.


@dataclass(frozen=True)
class Grid:
    """The values a weight may have: `(q - zero) * scale` with whole q from `low` to `high`; arrays broadcast to [G, O, D].

    Where `pinned` is true, there is but one, 0: weights that were pruned stay so.
    """

    scale: np.ndarray
    zero: np.ndarray
    low: int
    high: int
    pinned: np.ndarray

    @classmethod
    def of(cls, qparams: QParams, spec: QuantSpec, weight: np.ndarray) -> Grid:
        """For a `weight` [G, O, D], whose zeros are pinned, with the qparams of `fit`."""
        shape = weight.shape
        size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else shape[2]
        scale, zero = (
            np.repeat(part.astype(np.float64).reshape(*shape[:2], -1), size, axis=2)[..., : shape[2]]
            for part in (qparams.scale, qparams.zero_point)
        )
        return cls(scale, zero, spec.qmin, spec.qmax, weight == 0)

    def __getitem__(self, index: Any) -> Grid:
        return Grid(self.scale[index], self.zero[index], self.low, self.high, self.pinned[index])

    def nearest(self, weight: np.ndarray) -> np.ndarray:
        """Codes of round to nearest."""
        return np.where(self.pinned, self.zero, np.clip(np.rint(weight / self.scale) + self.zero, self.low, self.high))

    def floats(self, codes: np.ndarray) -> np.ndarray:
        return np.asarray((codes - self.zero) * self.scale)


def fit(weight: np.ndarray, spec: QuantSpec, importance: np.ndarray | None = None, clips: np.ndarray = CLIPS) -> QParams:
    """Qparams of `weight` [G, O, D], flattened to rows [G * O, D], which is what the granularity of `spec` speaks of.

    Min-max, or with the `importance` [G, D] of each input the share of that range, among `clips`, with the least `Σ importance (ŵ - w)²`.
    """
    rows, quantizer = weight.reshape(-1, weight.shape[2]).astype(np.float32), Uniform(spec)
    if importance is None:
        return quantizer.fit_weight(rows)
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else rows.shape[1]
    starts, shape = np.arange(0, rows.shape[1], size), qparams_shape(rows.shape, spec.granularity)
    ends = [reduce.reduceat(rows, starts, axis=1).reshape(shape) for reduce in (np.minimum, np.maximum)]
    ends = [np.minimum(ends[0], 0.0), np.maximum(ends[1], 0.0)]
    weights = np.repeat(importance, weight.shape[1], axis=0)
    least, share = np.full(shape, np.inf), np.ones(shape)
    for clip in clips:
        lost = quantizer.fake_quantize(rows, quantizer.fit(*(end * clip for end in ends))) - rows
        error = np.add.reduceat(weights * lost**2, starts, axis=1).reshape(shape)
        share, least = np.where(error < least, clip, share), np.minimum(error, least)
    return quantizer.fit(*(end * share for end in ends))


def damped(gram: np.ndarray, count: int) -> np.ndarray:
    """C of `count` rows with a share of its mean diagonal on the diagonal; the identity if nothing was seen.

    The share is what so few rows get wrong, D / N: without it, codes fit their noise.
    """
    mean, share = float(np.einsum("gdd->gd", gram).mean()), max(DAMPING, gram.shape[1] / max(count, 1))
    return np.asarray(gram + (share * mean if mean > 0 else 1.0) * np.eye(gram.shape[1]))


def gptq(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes column by column, those of the largest inputs first, each error made up for by the columns that are left.

    An input that was never seen is decoupled from the others by the damping: its weights are rounded to nearest.
    """
    order = np.argsort(-np.einsum("gdd->gd", gram), axis=1, kind="stable")
    groups, outputs = np.arange(len(gram))[:, None, None], np.arange(weight.shape[1])
    sorted_gram = gram[groups, order[:, :, None], order[:, None]]
    upper = np.linalg.cholesky(np.linalg.inv(sorted_gram)).swapaxes(1, 2)
    place = (groups, outputs, order[:, :, None])  # of column k of [G, D, O], the layout that keeps a column together
    left, columns, codes = weight[place], grid[place], np.empty((len(gram), order.shape[1], len(outputs)))
    for start in range(0, order.shape[1], _BLOCK):
        stop = min(start + _BLOCK, order.shape[1])
        for k in range(start, stop):
            codes[:, k] = columns[:, k].nearest(left[:, k])
            left[:, k] -= columns[:, k].floats(codes[:, k])
            left[:, k] /= upper[:, k, k, None]
            left[:, k + 1 : stop] -= upper[:, k, k + 1 : stop, None] * left[:, None, k]
        left[:, stop:] -= upper[:, start:stop, stop:].swapaxes(1, 2) @ left[:, start:stop]
    found = np.empty(weight.shape)
    found[place] = codes
    return found


def greedy(weight: np.ndarray, gram: np.ndarray, grid: Grid, codes: np.ndarray) -> np.ndarray:
    """Codes that no single step of 1 improves, found from `codes` by taking, in every row, the step of the largest gain.

    A step by ±s in input j changes P by `±2 s (Cδ)_j + s² C_jj`.
    """
    outputs, inputs = weight.shape[1:]
    rows = max(1, _TILE // inputs)
    found = codes.reshape(-1, inputs).copy()
    delta = (grid.floats(codes) - weight).reshape(-1, inputs)
    scale, zero, pinned = (part.reshape(-1, inputs) for part in (grid.scale, grid.zero, grid.pinned))
    own = Grid(scale, zero, grid.low, grid.high, pinned)
    for start in range(0, len(found), rows):
        part = slice(start, start + rows)
        group = np.arange(start, min(start + rows, len(found))) // outputs
        found[part] = _descend(found[part], delta[part], own[part], gram, group)
    return found.reshape(weight.shape)


def _descend(codes: np.ndarray, delta: np.ndarray, grid: Grid, gram: np.ndarray, group: np.ndarray) -> np.ndarray:
    """`greedy` for rows [R, D], of which `group` [R] says the C."""
    scale, ends = grid.scale, (grid.low, grid.high)
    slope = np.empty(delta.shape)
    for one in np.unique(group):
        slope[group == one] = delta[group == one] @ gram[one]
    cost = np.where(grid.pinned, np.inf, _MARGIN * scale * np.einsum("gdd->gd", gram)[group])
    up, down = (np.where(codes == end, np.inf, cost) for end in ends[::-1])
    alive = np.arange(len(codes))
    for _ in range(_STEPS * codes.shape[1]):
        gain = np.maximum(2 * slope - down, -2 * slope - up) * scale
        best = gain.argmax(axis=1)
        moving = np.flatnonzero(gain[np.arange(len(best)), best] > 0)
        if not len(moving):
            break
        if len(moving) < 0.75 * len(alive):
            alive, best = alive[moving], best[moving]
            slope, scale, cost, up, down = (part[moving] for part in (slope, scale, cost, up, down))
            moving = np.arange(len(alive))
        row, j = alive[moving], best[moving]
        step = -np.sign(slope[moving, j])
        codes[row, j] += step
        slope[moving] += (step * scale[moving, j])[:, None] * gram[group[row], j]
        up[moving, j], down[moving, j] = (np.where(codes[row, j] == end, np.inf, cost[moving, j]) for end in ends[::-1])
    return codes


def wqer(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes for half of the columns that are left, greedily; ridge regression of the other half on their errors; and so on."""
    left, codes, start, inputs = weight.copy(), np.empty(weight.shape), 0, weight.shape[2]
    while start < inputs:
        stop = start + max(1, (inputs - start) // 2)
        half, rest = slice(start, stop), slice(stop, inputs)
        own = grid[..., half]
        codes[..., half] = greedy(left[..., half], gram[:, half, half], own, own.nearest(left[..., half]))
        delta = own.floats(codes[..., half]) - left[..., half]
        left[..., rest] -= np.linalg.solve(gram[:, rest, rest], gram[:, rest, half] @ delta.swapaxes(1, 2)).swapaxes(1, 2)
        start = stop
    return codes


def adaround(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes `floor(w / s) + h` with h from 0 to 1 that Adam finds for the least P, while a penalty drives each h to one end.

    `h = clip(1.2 sigmoid(a) - 0.1, 0, 1)`, which starts at the fraction of w / s. The slope of P, `2 s (Cδ)_j`, needs C alone, so that
    a step is one product with C. P is counted in units of each weight's own share of it, `s² C_jj`, which makes the penalty
    `1 - |2h - 1|^β`, β from 20 to 2, as strong for all: at its end it bends P by -8, against the 2 with which P holds an h in between.
    """
    place = weight / grid.scale + grid.zero
    base = np.clip(np.floor(place), grid.low, grid.high - 1)
    start = np.clip(place - base, 0.0, 1.0)
    alpha = -np.log(1.2 / (start + 0.1) - 1).astype(np.float32)
    offset, scale, gram32 = (grid.floats(base) - weight).astype(np.float32), grid.scale.astype(np.float32), gram.astype(np.float32)
    unit = 2 / (scale * np.einsum("gdd->gd", gram32)[:, None])
    mean, square, h = np.zeros_like(alpha), np.zeros_like(alpha), start
    for step in range(_ROUNDS):
        share = 1 / (1 + np.exp(-alpha))
        h = np.clip(1.2 * share - 0.1, 0, 1)
        slope = np.where(grid.pinned, 0, offset + scale * h) @ gram32 * unit
        progress = (step / _ROUNDS - _WARM_UP) / (1 - _WARM_UP)
        if progress >= 0:
            beta, side = 20 - 18 * progress, 2 * h - 1
            slope -= 2 * beta * np.sign(side) * np.abs(side) ** (beta - 1)
        slope *= np.where((h > 0) & (h < 1), 1.2 * share * (1 - share), 0)
        mean += (1 - _BETAS[0]) * (slope - mean)
        square += (1 - _BETAS[1]) * (slope**2 - square)
        rate = _RATE * np.sqrt(1 - _BETAS[1] ** (step + 1)) / (1 - _BETAS[0] ** (step + 1))
        alpha -= np.float32(rate) * mean / (np.sqrt(square) + 1e-12)
    return np.where(grid.pinned, grid.zero, base + (h >= 0.5))


def _proxy(codes: np.ndarray, weight: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """P of each row, [G, O, 1]."""
    delta = grid.floats(codes) - weight
    return np.asarray(np.sum(delta @ gram * delta, axis=2, keepdims=True))


def round_weight(algorithm: str, weight: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """Codes by the algorithm of that name; `greedy` starts from what GPTQ found, and ends what `adaround` found.

    No row of `adaround` is worse than round to nearest on C: its greedy steps start from that where it is better.
    """
    weight = weight.astype(np.float64)
    if algorithm == "rtn":
        return grid.nearest(weight)
    if algorithm == "wqer":
        return wqer(weight, gram, grid)
    if algorithm == "adaround":
        found, near = adaround(weight, gram, grid), grid.nearest(weight)
        is_worse = _proxy(found, weight, gram, grid) > _proxy(near, weight, gram, grid)
        return greedy(weight, gram, grid, np.where(is_worse, near, found))
    codes = gptq(weight, gram, grid)
    return greedy(weight, gram, grid, codes) if algorithm == "greedy" else codes


@dataclass(frozen=True)
class Rounded:
    """A weight as it is stored: `codes` [G, O, D], the qparams of its rows, and the values that they stand for."""

    codes: np.ndarray
    qparams: QParams
    weight: np.ndarray


def rounded(weight: np.ndarray, gram: np.ndarray, spec: QuantSpec, algorithm: str, *, is_clipped: bool) -> Rounded:
    """`weight` [G, O, D] in the format `spec` of its rows, for what C says of its inputs.

    `is_clipped` searches for scales that clip; otherwise they cover the whole range.
    """
    qparams = fit(weight, spec, np.einsum("gdd->gd", gram) if is_clipped else None)
    grid = Grid.of(qparams, spec, weight)
    codes = round_weight(algorithm, weight.astype(np.float32), gram, grid)
    return Rounded(codes, qparams, grid.floats(codes))
