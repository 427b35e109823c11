"""Low rank: the best factors in either norm, and the orderings of SVDQuant and LoRC on rows that no fit has seen (T7)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from graphq.passes import _dynamic_math
from graphq.passes import _low_rank_math as math
from graphq.passes._low_rank_math import Seen
from graphq.passes._sums import Sums
from graphq.quantizers import Uniform
from graphq.spec import PerGroup, QuantSpec

Heavy = Callable[..., np.ndarray]
SEEDS = pytest.mark.parametrize("seed", range(3))


def quantize(weight: np.ndarray) -> np.ndarray:
    quantizer, floats = Uniform(QuantSpec(4, granularity=PerGroup(0, 32))), weight.astype(np.float32)
    return quantizer.fake_quantize(floats, quantizer.fit_weight(floats))


def case(heavy: Heavy, seed: int, outputs: int = 80) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """W [96, outputs] with outliers in some rows, rows to fit to, and others."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(5, (96, outputs)) * np.exp(0.7 * rng.standard_normal((96, 1)))
    x = heavy(seed, 4000, 96)
    return weight, x[:2000], x[2000:]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_factors_are_those_of_the_singular_value_decomposition(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).standard_normal(shape)
    u, s, vt = np.linalg.svd(matrix)
    left, right = math.factors(matrix, 5)
    assert left.shape == (shape[0], 5) and right.shape == (5, shape[1])
    np.testing.assert_allclose(left @ right, u[:, :5] * s[:5] @ vt[:5], atol=1e-10)


@SEEDS
def test_each_norm_has_its_own_best(heavy: Heavy, seed: int) -> None:
    weight, x, _ = case(heavy, seed)
    gram = x.T.astype(np.float64) @ x
    plain, weighted = (left @ right for left, right in (math.factors(weight, 8), math.factors(weight, 8, gram)))

    def error(found: np.ndarray, rows: np.ndarray) -> float:
        return float(np.sum(np.square(rows @ (weight - found))))

    assert error(weighted, x) < 0.95 * error(plain, x)
    assert error(plain, np.eye(96)) < 0.95 * error(weighted, np.eye(96))


@SEEDS
def test_sums_measure_what_rows_do(heavy: Heavy, seed: int) -> None:
    weight, x, _ = case(heavy, seed)
    rounded = _dynamic_math.fake_quantize(x, 4)
    seen = Seen.of(x[:900], rounded[:900]) + Seen.of(x[900:], rounded[900:])
    rest, stored = 0.9 * weight, quantize(weight)
    expected = float(np.sum(np.square(x.astype(np.float64) @ rest - rounded.astype(np.float64) @ stored)))
    assert seen.error(rest, stored) == pytest.approx(expected, rel=1e-9)
    assert seen.power(weight) == pytest.approx(float(np.sum(np.square(x.astype(np.float64) @ weight))), rel=1e-9)


@SEEDS
def test_svdquant_gains_with_rank_and_with_iterations(heavy: Heavy, seed: int) -> None:
    """W4A4: the held-out error falls with every doubling of the rank by 5 %, and by 2 % more if the branch is fitted again."""
    weight, *rows = case(heavy, seed)
    fit, held = (Seen.of(x, _dynamic_math.fake_quantize(x, 4)) for x in rows)

    def error(rank: int, iterations: int) -> float:
        (left, right), _ = math.split(weight, rank, iterations, quantize, fit)
        rest = weight - left @ right
        return held.error(rest, quantize(rest))

    plain = held.error(weight, quantize(weight))
    once, often = ([error(rank, iterations) for rank in (8, 16, 32)] for iterations in (0, 8))
    assert all(after < 0.95 * before for errors in (once, often) for before, after in zip([plain, *errors], errors, strict=False))
    assert all(after < 0.98 * before for before, after in zip(once, often, strict=True))


def lacks(weight: np.ndarray, x: np.ndarray, data: np.ndarray) -> Sums:
    wanted = x @ weight.astype(np.float32)
    return Sums.of(x[None], (wanted - data @ quantize(weight))[None], wanted[None])


@SEEDS
def test_weighted_lorc_beats_the_plain_one(heavy: Heavy, seed: int) -> None:
    """W4A16, held-out error; both gain with the rank."""
    weight, x, fresh = case(heavy, seed)
    train, held, error = lacks(weight, x, x), lacks(weight, fresh, fresh), (weight - quantize(weight)).T

    def left(found: math.Factors) -> float:
        return held.moved((found[0] @ found[1]).T[None]).error

    plain = [left(math.factors(error.T, rank)) for rank in (8, 16, 32)]
    weighted = [left(math.compensation(error, train, rank, takes_mean=False, with_data=False)) for rank in (8, 16, 32)]
    assert held.error > plain[0] > plain[1] > plain[2]
    assert all(mine < 0.97 * other for mine, other in zip(weighted, plain, strict=True))


@SEEDS
def test_lorc_with_data_makes_good_errors_of_activations_too(heavy: Heavy, seed: int) -> None:
    """An activation that clips: what it costs depends on the activation linearly."""
    weight, x, fresh = case(heavy, seed)
    limit = np.float32(np.quantile(np.abs(x), 0.9))
    train, held = (lacks(weight, rows, np.clip(rows, -limit, limit)) for rows in (x, fresh))
    error = (weight - quantize(weight)).T
    found = {with_data: math.compensation(error, train, 16, takes_mean=True, with_data=with_data) for with_data in (False, True)}
    errors = {key: held.moved((left @ right).T[None]).error for key, (left, right) in found.items()}
    assert errors[True] < 0.8 * errors[False]


def test_nothing_seen_is_no_failure() -> None:
    sums = Sums.none(1, 6, 8)
    left, right = math.compensation(np.ones((6, 8)), sums, 1, takes_mean=True, with_data=True)
    np.testing.assert_allclose(left @ right, np.ones((8, 6)), atol=1e-12)
