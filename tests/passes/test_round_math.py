"""Rounding algorithms against textbook loops, and in the order that theory gives."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graphq.passes import _round_math as math
from graphq.passes._round_math import Grid
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, PerGroup, QuantSpec

ALGORITHMS = ("rtn", "gptq", "wqer", "greedy", "adaround")


def rows(seed: int, count: int, inputs: int) -> np.ndarray:
    """Correlated channels of different size, with means and heavy tails."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) / np.sqrt(inputs) + np.eye(inputs)
    size, mean = np.exp(0.5 * rng.standard_normal(inputs)), rng.standard_normal(inputs)
    return np.asarray(rng.standard_t(5, (count, inputs)) @ mix * size + mean)


def problem(seed: int, groups: int = 1, outputs: int = 20, inputs: int = 40, count: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """X, W and the damped C."""
    x = np.stack([rows(seed + group, count, inputs) for group in range(groups)])
    weight = np.random.default_rng(seed).standard_t(5, (groups, outputs, inputs)).astype(np.float32)
    return x, weight, math.damped(x.swapaxes(1, 2) @ x, x.shape[1])


def grid_of(weight: np.ndarray, bits: int = 4, symmetric: bool = False, size: int | None = None) -> Grid:
    spec = QuantSpec(bits, signed=symmetric, symmetric=symmetric, granularity=PerGroup(1, size) if size else PerAxis(0))
    return Grid.of(math.fit(weight, spec), spec, weight)


def proxy(codes: np.ndarray, weight: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """P of every row, [G, O]."""
    delta = grid.floats(codes) - weight
    return np.asarray(np.einsum("goi,gij,goj->go", delta, gram, delta))


# ---- grids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 8, 12, 40])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_nearest_codes_are_those_of_the_quantizer(bits: int, symmetric: bool, size: int | None) -> None:
    """Also where the last group is shorter."""
    _, weight, _ = problem(0, groups=2)
    spec = QuantSpec(bits, signed=symmetric, symmetric=symmetric, granularity=PerGroup(1, size) if size else PerAxis(0))
    flat, quantizer = weight.reshape(40, 40), Uniform(spec)
    qparams = math.fit(weight, spec)
    grid = Grid.of(qparams, spec, weight)
    np.testing.assert_array_equal(qparams.scale, quantizer.fit_weight(flat).scale)
    np.testing.assert_array_equal(grid.nearest(weight).reshape(40, 40), quantizer.quantize(flat, qparams))
    made = grid.floats(grid.nearest(weight)).reshape(40, 40)
    np.testing.assert_allclose(made, quantizer.fake_quantize(flat, qparams), rtol=1e-6)


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_for_scales_lowers_the_weighted_error(bits: int, size: int | None) -> None:
    """For every scale, and at equal importance it is the plain squared error; min-max is among the candidates."""
    _, weight, _ = problem(1)
    spec = QuantSpec(bits, signed=False, symmetric=False, granularity=PerGroup(1, size) if size else PerAxis(0))
    for importance in (np.ones((1, 40)), np.exp(np.random.default_rng(0).standard_normal((1, 40)))):
        errors = []
        for chosen in (None, importance):
            grid = Grid.of(math.fit(weight, spec, chosen), spec, weight)
            lost = importance[:, None] * (grid.floats(grid.nearest(weight)) - weight) ** 2
            errors.append(np.add.reduceat(lost, np.arange(0, 40, size or 40), axis=2))
        assert (errors[1] <= errors[0] * (1 + 1e-6)).all() and errors[1].sum() < 0.99 * errors[0].sum()


def test_inputs_without_importance_leave_the_range_whole() -> None:
    _, weight, _ = problem(1)
    spec = QuantSpec(4, granularity=PerAxis(0))
    np.testing.assert_array_equal(math.fit(weight, spec, np.zeros((1, 40))).scale, math.fit(weight, spec).scale)


# ---- algorithms -----------------------------------------------------------------------------------------------------


def textbook_gptq(weight: np.ndarray, gram: np.ndarray, grid: Grid) -> np.ndarray:
    """One group, one row and one column at a time, by the inverse of what is left of C (OBQ, arXiv 2208.11580)."""
    order, left, codes = np.argsort(-np.diag(gram), kind="stable"), weight.astype(np.float64), np.zeros(weight.shape)
    for done in range(len(order)):
        rest = order[done:]
        inverse, j = np.linalg.inv(gram[np.ix_(rest, rest)]), rest[0]
        for row in range(len(weight)):
            one = grid[0, row, j]
            codes[row, j] = one.nearest(left[row, j])
            error = (left[row, j] - one.floats(codes[row, j])) / inverse[0, 0]
            left[row, rest] -= error * inverse[0]
    return codes


@pytest.mark.parametrize("inputs", [5, 40, 150])
@pytest.mark.parametrize("size", [None, 16])
def test_gptq_is_the_textbook_loop(inputs: int, size: int | None) -> None:
    """Across the blocks of 128 columns; almost equal, as ties of 1e-12 may fall either way."""
    _, weight, gram = problem(2, outputs=6, inputs=inputs)
    grid = grid_of(weight, 4, size=size)
    found, expected = math.gptq(weight.astype(np.float64), gram, grid)[0], textbook_gptq(weight[0], gram[0], grid)
    assert np.mean(found != expected) < 0.002


def textbook_greedy(weight: np.ndarray, gram: np.ndarray, grid: Grid, codes: np.ndarray) -> np.ndarray:
    """One row: the step of 1 that lowers P most, by computing P anew for each; P must fall each time."""
    codes = codes.copy()
    while True:
        before = proxy(codes[None, None], weight[None, None], gram[None], grid)[0, 0]
        trials = []
        for j, step in ((j, step) for j in range(len(codes)) for step in (-1, 1)):
            trial = codes.copy()
            trial[j] += step
            if grid.low <= trial[j] <= grid.high:
                trials.append((proxy(trial[None, None], weight[None, None], gram[None], grid)[0, 0], j, step))
        best, j, step = min(trials)
        if best > before * (1 - 1e-9):
            return codes
        codes[j] += step


@pytest.mark.parametrize("bits", [2, 4])
def test_greedy_is_the_textbook_loop(bits: int) -> None:
    _, weight, gram = problem(3, outputs=5, inputs=12)
    grid = grid_of(weight, bits)
    start = grid.nearest(weight)
    found = math.greedy(weight.astype(np.float64), gram, grid, start)
    assert not np.array_equal(found, start)
    for row in range(5):
        np.testing.assert_array_equal(found[0, row], textbook_greedy(weight[0, row], gram[0], grid[:, row : row + 1], start[0, row]))


@pytest.mark.parametrize("seed", range(3))
def test_greedy_never_raises_the_error_and_ends_where_no_step_helps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """P is `Σ (x δ)²` over the rows that C was made of, to 1e-10; it falls with every step that is allowed."""
    x, weight, _ = problem(seed)
    gram, grid, last = x.swapaxes(1, 2) @ x, grid_of(weight, 3), np.full((1, 20), np.inf)
    for start in (grid.nearest(weight), math.gptq(weight.astype(np.float64), math.damped(gram, 400), grid)):
        for limit in (0, 1, 4):
            monkeypatch.setattr(math, "_STEPS", limit)
            codes = math.greedy(weight.astype(np.float64), gram, grid, start)
            now = proxy(codes, weight, gram, grid)
            direct = np.sum((x @ (grid.floats(codes) - weight).swapaxes(1, 2)) ** 2, axis=1)
            np.testing.assert_allclose(now, direct, rtol=1e-10)
            assert limit == 0 or (now <= last * (1 + 1e-12)).all()
            last = now
        slope, cost = (grid.floats(codes) - weight) @ gram, grid.scale * np.diagonal(gram[0])
        assert ((2 * slope <= cost * (1 + 1e-6)) | (codes == grid.low)).all()
        assert ((-2 * slope <= cost * (1 + 1e-6)) | (codes == grid.high)).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("bits", [2, 3, 5, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [None, 12])
def test_codes_are_whole_and_within_range(algorithm: str, bits: int, symmetric: bool, size: int | None) -> None:
    _, weight, gram = problem(4)
    grid = grid_of(weight, bits, symmetric, size)
    codes = math.round_weight(algorithm, weight, gram, grid)
    assert np.array_equal(codes, np.rint(codes)) and codes.min() >= grid.low and codes.max() <= grid.high
    spec = QuantSpec(bits, signed=symmetric)
    assert (grid.low, grid.high) == (spec.qmin, spec.qmax)


@pytest.mark.parametrize("size", [None, 16])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("seed", range(3))
def test_errors_fall_in_this_order(seed: int, bits: int, size: int | None) -> None:
    """Worse than round to nearest for the weights, better for what the layer computes, on rows that C has not seen."""
    _, weight, gram = problem(seed, outputs=48, inputs=64, count=2000)
    fresh = rows(seed, 5000, 64)[None, 2000:]
    grid = grid_of(weight, bits, size=size)
    found = {name: math.round_weight(name, weight, gram, grid) for name in ALGORITHMS}
    unseen = fresh.swapaxes(1, 2) @ fresh
    errors = {name: proxy(codes, weight, unseen, grid).sum() for name, codes in found.items()}
    own = {name: np.sum((grid.floats(codes) - weight) ** 2) for name, codes in found.items()}
    assert errors["greedy"] < errors["gptq"] < 0.9 * errors["rtn"] and errors["wqer"] < 0.9 * errors["rtn"]
    assert errors["adaround"] < 0.9 * errors["rtn"]
    assert own["rtn"] < min(own["gptq"], own["wqer"], own["greedy"], own["adaround"])


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_adaround_leaves_no_row_worse_and_does_most_of_the_work(seed: int, bits: int) -> None:
    """Against round to nearest: each row on C, to float64's last digits; without its greedy steps, on rows that C has not seen.

    Its codes are within 1 of the weight, which GPTQ's are not: with inputs as correlated as these, that one ends lower.
    """
    _, weight, gram = problem(seed, outputs=48, inputs=96, count=2000)
    fresh, grid = rows(seed, 5000, 96)[None, 2000:], grid_of(weight, bits)
    alone, nearest = math.adaround(weight.astype(np.float64), gram, grid), grid.nearest(weight)
    found = math.round_weight("adaround", weight, gram, grid)
    assert (proxy(found, weight, gram, grid) <= (1 + 1e-9) * proxy(nearest, weight, gram, grid)).all()
    assert np.abs(alone - weight / grid.scale - grid.zero).max() <= 1 + 1e-9
    errors = [proxy(codes, weight, fresh.swapaxes(1, 2) @ fresh, grid).sum() for codes in (nearest, alone, found)]
    assert errors[1] < 0.75 * errors[0] and errors[2] < errors[1]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_groups_are_rounded_as_if_alone(algorithm: str) -> None:
    """Each group of a convolution has a Gram matrix of its own."""
    _, weight, gram = problem(5, groups=3)
    grid = grid_of(weight)
    codes = math.round_weight(algorithm, weight, gram, grid)
    for group in range(3):
        one = slice(group, group + 1)
        np.testing.assert_array_equal(codes[one], math.round_weight(algorithm, weight[one], gram[one], grid[one]))


@pytest.mark.parametrize("damp", [lambda gram: math.damped(gram, 400), lambda gram: gram + 1e-3 * np.eye(40)])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_inputs_that_were_never_seen_are_rounded_to_nearest(algorithm: str, damp: Callable[[np.ndarray], np.ndarray]) -> None:
    x, weight, _ = problem(6)
    x[..., ::4] = 0
    grid = grid_of(weight)
    for rows_seen in (x, 0 * x):
        codes = math.round_weight(algorithm, weight, damp(rows_seen.swapaxes(1, 2) @ rows_seen), grid)
        dead = slice(None, None, 4 if rows_seen.any() else 1)
        np.testing.assert_array_equal(codes[..., dead], grid.nearest(weight)[..., dead])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_uncorrelated_inputs_are_rounded_to_nearest(algorithm: str) -> None:
    _, weight, _ = problem(7)
    grid = grid_of(weight)
    np.testing.assert_array_equal(math.round_weight(algorithm, weight, 3 * np.eye(40)[None], grid), grid.nearest(weight))


@pytest.mark.parametrize("seed", range(3))
def test_ridge_of_the_columns_that_are_left_helps(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wqer without its flips, against round to nearest: METHODS.md M1, (iii)."""
    _, weight, gram = problem(seed)
    grid = grid_of(weight, 3)
    monkeypatch.setattr(math, "greedy", lambda weight, gram, grid, codes: codes)
    ridge, nearest = (proxy(math.round_weight(name, weight, gram, grid), weight, gram, grid).sum() for name in ("wqer", "rtn"))
    assert ridge < 0.95 * nearest
