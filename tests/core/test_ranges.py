"""Range estimators against brute force and against each other, on histograms of heavy-tailed and of plain data."""

import itertools

import numpy as np
import pytest

from graphq.histogram import Histogram, bin_edges
from graphq.observers import Range
from graphq.quantizers import Uniform
from graphq.ranges import ESTIMATORS, Entropy, MinMax, Mse, Percentile, _divergence, expected_error
from graphq.spec import QuantSpec

SPECS = [QuantSpec(*options) for options in itertools.product([2, 3, 4, 8], [True, False], [True, False])]
HISTOGRAMS = [Percentile(), Mse(), Entropy()]


def observe(x, estimator=None):
    x = np.asarray(x, np.float32)
    observer = estimator.observer("v") if estimator else Histogram("v")
    extrema = np.array([x.min(initial=np.inf), x.max(initial=-np.inf)])
    return observer.update(observer.init(), *([x, extrema] if len(observer.taps) == 2 else [extrema]))


def estimate(estimator, x, spec):
    return estimator.estimate(observe(x, estimator), spec)


def data(kind, seed=0, n=100_000):
    rng = np.random.default_rng(seed)
    draws = {
        "student": lambda: rng.standard_t(3, n),
        "outlier": lambda: np.append(rng.normal(size=n), 100.0),
        "relu": lambda: np.maximum(rng.standard_t(4, n), 0),
        "skewed": lambda: rng.exponential(1, n) * np.where(rng.random(n) < 0.2, -0.1, 1),
        "negative": lambda: -rng.exponential(1, n),
        "uniform": lambda: rng.uniform(-1, 1, n),
        "constant": lambda: np.full(n, 3.0),
    }
    return draws[kind]().astype(np.float32)


def true_error(x, spec, low, high):
    uniform = Uniform(spec)
    return np.mean((uniform.fake_quantize(x, uniform.fit(low, high)).astype(np.float64) - x) ** 2)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["student", "outlier", "relu", "skewed", "negative", "uniform", "constant"])
@pytest.mark.parametrize("estimator", [MinMax(), *HISTOGRAMS], ids=str)
def test_a_range_is_finite_contains_zero_and_lies_within_the_extrema(estimator, kind, spec):
    x = data(kind, n=5000)
    low, high = estimate(estimator, x, spec)
    assert min(x.min(), 0) <= low <= 0 <= high <= max(x.max(), 0)
    assert low < high


@pytest.mark.parametrize("estimator", [MinMax(), *HISTOGRAMS], ids=str)
@pytest.mark.parametrize("x", [[], [0.0], [np.nan, np.inf]], ids=str)
def test_nothing_to_see_gives_an_empty_range_that_fit_accepts(estimator, x):
    low, high = estimate(estimator, x, QuantSpec())
    assert (low, high) == (0.0, 0.0)
    assert Uniform(QuantSpec()).fit(low, high).scale == 1
    assert estimator.estimate(estimator.observer("v").init(), QuantSpec()) == (0.0, 0.0)


@pytest.mark.parametrize("estimator", HISTOGRAMS, ids=str)
def test_extrema_without_a_sample_are_the_range(estimator):
    observer = estimator.observer("v")
    stat = observer.update(observer.init(), np.zeros(0, np.float32), np.array([-2.0, 3.0]))
    for spec in SPECS:
        assert estimator.estimate(stat, spec) == (-2.0, 3.0)


def test_the_catalog_and_the_observers():
    assert list(ESTIMATORS) == ["min-max", "percentile", "mse", "entropy"]
    assert isinstance(MinMax().observer("v", "reference"), Range)
    assert all(isinstance(e.observer("v"), Histogram) for e in HISTOGRAMS)


@pytest.mark.parametrize("percent", [90.0, 99.0, 99.9])
@pytest.mark.parametrize("kind", ["student", "skewed", "relu"])
def test_percentile_equals_numpy_within_a_bin(kind, percent):
    x = data(kind)
    edges = bin_edges(observe(x))
    width, cut = edges[1] - edges[0], (100 - percent) / 2

    def is_close(limit, values, percent):  # within a bin of the neighbours in rank
        lower, upper = np.percentile(values, [max(0, percent - 2e-3), percent + 2e-3])
        return min(0, lower) - width <= limit <= max(0, upper) + width and (limit == 0 or limit >= lower - width)

    low, high = estimate(Percentile(percent), x, QuantSpec(8, False, False))
    assert is_close(low, x, cut) and is_close(high, x, 100 - cut)
    low, high = estimate(Percentile(percent), x, QuantSpec(8))
    assert is_close(max(-low, high), np.abs(x), percent)


def test_percentile_limits():
    x = data("outlier")
    for spec in (QuantSpec(), QuantSpec(8, False, False)):
        assert estimate(Percentile(100), x, spec) == (x.min(), 100.0)
    for percent in (49.9, 100.1, np.nan):
        with pytest.raises(ValueError, match="percent"):
            Percentile(percent)


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["student", "relu", "skewed", "uniform"])
def test_expected_error_predicts_the_error(kind, spec):
    x = data(kind)
    low, high = min(x.min(), 0.0), max(x.max(), 0.0)
    ratios = np.array([1.0, 0.5, 0.2])
    predicted = expected_error(observe(x), spec, low * ratios, high * ratios)
    actual = [true_error(x, spec, low * ratio, high * ratio) for ratio in ratios]
    np.testing.assert_allclose(predicted, actual, rtol=0.03)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["student", "outlier", "relu", "skewed"])
def test_mse_beats_min_max_and_percentile_on_its_own_objective(kind, spec, seed):
    stat = observe(data(kind, seed))
    ranges = [e.estimate(stat, spec) for e in (Mse(), MinMax(), Percentile(), Percentile(99.9))]
    errors = expected_error(stat, spec, *np.array(ranges).T)
    assert errors[0] <= errors[1]
    assert errors[0] <= errors[2:].min() * 1.01


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["student", "skewed", "uniform"])
def test_mse_is_close_to_brute_force(kind, spec):
    stat = observe(data(kind, 7))
    low, high = float(stat["low"]), float(stat["high"])
    ratios = np.geomspace(1e-2, 1, 150)
    if spec.symmetric:
        lows, highs = -max(-low, high) * ratios, max(-low, high) * ratios
    else:
        lows, highs = (grid.ravel() for grid in np.meshgrid(low * ratios, high * ratios))
    best = np.min([expected_error(stat, spec, *part).min() for part in zip_parts(lows, highs)])
    mine = Mse().estimate(stat, spec)
    assert expected_error(stat, spec, *np.array([mine]).T)[0] <= best * 1.05


def zip_parts(lows, highs):
    return zip(np.array_split(lows, 40), np.array_split(highs, 40), strict=True)


def brute_divergence(counts, edges, spec, low, high):
    """The definition with loops over bins."""
    qparams, width = Uniform(spec).fit(low, high), edges[1] - edges[0]
    border = (np.arange(spec.qmin, spec.qmax + 2) - 0.5 - float(qparams.zero_point)) * float(qparams.scale)
    bins = np.clip(np.rint((border - edges[0]) / width), 0, len(counts)).astype(int)
    first, last = bins[0], bins[-1] - 1
    p, q = np.zeros(len(counts)), np.zeros(len(counts))
    p[first : last + 1] = counts[first : last + 1]
    p[first] += counts[:first].sum()
    p[last] += counts[last + 1 :].sum()
    for start, stop in itertools.pairwise(bins):
        filled = np.flatnonzero(p[start:stop]) + start
        if len(filled):
            q[filled] = counts[start:stop].sum() / len(filled)
    p, q = p / p.sum(), q / q.sum()
    used = p > 0
    return np.inf if (q[used] == 0).any() else float(np.sum(p[used] * np.log(p[used] / q[used])))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("kind", ["student", "skewed", "uniform"])
def test_divergence_equals_its_definition(kind, spec):
    stat = observe(data(kind, 3, n=3000))
    counts, edges = stat["counts"], bin_edges(stat)
    low, high = min(float(stat["low"]), 0.0), float(stat["high"])
    ratios = np.linspace(0.3, 1, 25)
    mine = _divergence(counts, edges, spec, low * ratios, high * ratios)
    brute = [brute_divergence(counts, edges, spec, low * ratio, high * ratio) for ratio in ratios]
    np.testing.assert_allclose(mine, brute, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("spec", [s for s in SPECS if s.bits >= 4], ids=str)
def test_entropy_clips_heavy_tails_and_leaves_uniform_data_alone(spec, seed):
    x = data("student", seed)
    low, high = estimate(Entropy(), x, spec)
    assert max(-low, high) < 0.8 * np.abs(x).max()
    x = data("uniform", seed)
    low, high = estimate(Entropy(), x, spec)
    assert max(-low, high) > 0.93 * np.abs(x).max()


def test_entropy_does_not_mistake_exact_zeros_for_a_peak():
    x = data("student", 5)
    spec = QuantSpec()
    assert estimate(Entropy(), np.concatenate([x, np.zeros(500_000)]), spec) == estimate(Entropy(), x, spec)
