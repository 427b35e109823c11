"""Observers: the order and grouping of batches must not show, and the results equal numpy's on all data at once."""

import functools

import numpy as np
import pytest

from graphq.errors import DataError
from graphq.histogram import Histogram, bin_edges
from graphq.observers import ChannelRange, Gram, Moments, Range, Rows, Tap, mean, variance


def batches(seed, scale_spread=3.0):
    """Heavy-tailed batches of different sizes and scales, one of them all zero, one empty."""
    rng = np.random.default_rng(seed)
    result = [(rng.standard_t(2, (rng.integers(1, 9), 5, 4)) * 10 ** rng.normal(0, scale_spread)).astype(np.float32) for _ in range(12)]
    return [*result, np.zeros((2, 5, 4), np.float32), np.zeros((0, 5, 4), np.float32)]


def arrays(observer, x):
    """What an executor would hand over."""
    extrema = np.array([x.min(initial=np.inf), x.max(initial=-np.inf)])
    views = {"whole": x, "sample": x.reshape(-1)[::3], "extrema": extrema, "rows": x.reshape(-1, x.shape[-1])[::3]}
    return [views[tap.view] for tap in observer.taps]


def fold(observer, data):
    return functools.reduce(lambda stat, x: observer.update(stat, *arrays(observer, x)), data, observer.init())


def assert_same(a, b, rtol=0.0):
    assert a.keys() == b.keys()
    for key in a:
        if rtol:
            atol = rtol * np.abs(b[key]).max(initial=0)
            np.testing.assert_allclose(a[key], b[key], rtol=rtol, atol=atol, err_msg=key)
        else:
            np.testing.assert_array_equal(a[key], b[key], err_msg=key)
            assert a[key].dtype == b[key].dtype


EXACT = [Range("v"), ChannelRange("v", -1), ChannelRange("v", 1), Histogram("v"), Histogram("v", bins=37)]
SUMS = [Moments("v", -1), Moments("v", 1), Gram("v"), Gram("v", 1)]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("observer", EXACT + SUMS, ids=str)
def test_order_and_grouping_do_not_show(observer, seed):
    data, rtol = batches(seed), 0.0 if observer in EXACT else 1e-12
    whole = fold(observer, data)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        order = rng.permutation(len(data))
        assert_same(fold(observer, [data[i] for i in order]), whole, rtol)
        cut, end = sorted(rng.integers(0, len(data) + 1, 2))
        a, b, c = (fold(observer, part) for part in (data[:cut], data[cut:end], data[end:]))
        assert_same(observer.merge(observer.merge(a, b), c), whole, rtol)
        assert_same(observer.merge(a, observer.merge(b, c)), whole, rtol)
        assert_same(observer.merge(c, observer.merge(a, b)), whole, rtol)
    assert_same(observer.merge(observer.init(), whole), whole)


@pytest.mark.parametrize("observer", EXACT + SUMS, ids=str)
def test_statistics_are_values(observer):
    data = batches(9)
    stat = fold(observer, data[:3])
    before = {key: value.copy() for key, value in stat.items()}
    observer.update(stat, *arrays(observer, data[3]))
    observer.merge(stat, stat)
    assert_same(stat, before)
    twin = type(observer)(**vars(observer))
    assert observer == twin and hash(observer) == hash(twin)


def test_observers_of_the_same_fields_differ_by_kind():
    assert Moments("v", 1) != Gram("v", 1)
    assert Range("v", "reference").taps == (Tap("v", "reference", "extrema"),)
    assert [tap.view for tap in Histogram("v").taps] == ["sample", "extrema"]


def test_range_ignores_and_counts_what_is_not_finite():
    observer = Range("v")
    stat = observer.init()
    for low, high in ((-1, 2), (np.nan, np.nan), (-np.inf, 5), (np.inf, -np.inf)):
        stat = observer.update(stat, np.array([low, high], np.float32))
    stat = observer.update(stat, np.zeros(0, np.float32))
    assert (stat["low"], stat["high"], stat["count"], stat["nonfinite"]) == (-1, 5, 5, 3)


def test_channel_range_ignores_and_counts_what_is_not_finite():
    x = np.array([[1, np.nan, -3], [np.inf, np.nan, 4]], np.float32)
    stat = ChannelRange("v", 1).update(ChannelRange("v", 1).init(), x)
    np.testing.assert_array_equal(stat["low"], [1, np.inf, -3])
    np.testing.assert_array_equal(stat["high"], [1, -np.inf, 4])
    assert stat["nonfinite"] == 3


@pytest.mark.parametrize("bins", [2, 37, 2048])
@pytest.mark.parametrize("scale", [1e-44, 1e-38, 1e-20, 1.0, 4096.0, 1e30])
@pytest.mark.parametrize("shift", [0.0, 3.0, -50.0])
def test_histogram_counts_like_numpy_with_the_narrowest_bins(scale, shift, bins):
    x = ((np.random.default_rng(5).standard_t(3, 20_000) + shift) * scale).astype(np.float32)
    x[::7] = 0
    stat = fold_parts(Histogram("v", bins=bins), np.array_split(x, 7))
    edges = bin_edges(stat)
    counts = np.bincount(np.searchsorted(edges, x.astype(np.float64), side="right") - 1, minlength=bins)
    np.testing.assert_array_equal(stat["counts"], counts)
    assert stat["zeros"] == np.count_nonzero(x == 0) and 0.0 in edges
    finer = int(stat["exponent"]) - 1
    if finer >= -126:
        low, high = np.floor(np.ldexp([x.min(initial=0), x.max(initial=0)], -finer))
        assert high - low + 1 > bins


def fold_parts(observer, parts):
    stat = observer.init()
    for part in parts:
        stat = observer.update(stat, part, np.array([part.min(), part.max()]))
    return stat


def test_histogram_is_the_same_across_magnitudes():
    tiny, huge = np.array([-1e-45, 1e-45, -1e-39], np.float32), np.array([3e38, -3e38], np.float32)
    observer = Histogram("v")
    stat = fold_parts(observer, [tiny, huge])
    assert_same(stat, fold_parts(observer, [huge, tiny]))
    assert_same(stat, fold_parts(observer, [np.concatenate([tiny, huge])]) | {"count": np.asarray(2)})


def test_histogram_keeps_an_outlier_that_was_not_sampled_and_drops_what_is_not_finite():
    observer = Histogram("v")
    sample = np.array([1, np.nan, -np.inf, 2], np.float32)
    stat = observer.update(observer.init(), sample, np.array([np.nan, 77.0]))
    stat = observer.update(stat, np.array([np.nan], np.float32), np.array([-5.0, 3.0]))
    assert (stat["low"], stat["high"], stat["nonfinite"], stat["counts"].sum()) == (-5, 77, 4, 2)
    assert len(stat["counts"]) == 2048


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_sums_equal_numpy(axis):
    x = (np.random.default_rng(6).normal(3, 1, (6, 50, 7))).astype(np.float32)
    rows = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(np.float64)
    moments, gram = (fold(observer, [x]) for observer in (Moments("v", axis), Gram("v", axis)))
    assert moments["count"] == gram["count"] == len(rows)
    np.testing.assert_allclose(gram["gram"], rows.T @ rows, rtol=1e-12)
    for stat in (moments, gram):
        np.testing.assert_allclose(mean(stat), rows.mean(0), rtol=1e-12)
        np.testing.assert_allclose(variance(stat), rows.var(0), rtol=1e-12)


def test_large_blocks_are_cut():
    x = np.random.default_rng(7).normal(size=(1 << 18, 9)).astype(np.float32)
    np.testing.assert_allclose(fold(Gram("v"), [x])["gram"], x.T.astype(np.float64) @ x, rtol=1e-12, atol=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("observer", SUMS, ids=str)
def test_sums_refuse_what_is_not_finite(observer):
    x = np.zeros((2, 5, 4), np.float32)
    x[1, 2, 3] = np.inf
    with pytest.raises(DataError, match="`v` contains NaN or infinity"):
        observer.update(observer.init(), x)


@pytest.mark.parametrize("observer", [ChannelRange("v", 1), Moments("v", 1), Gram("v", 1)], ids=str)
def test_an_axis_that_changes_its_size_is_refused(observer):
    stat = observer.update(observer.init(), np.ones((2, 1), np.float32))
    with pytest.raises(DataError, match="1 and 3"):
        observer.update(stat, np.ones((2, 3), np.float32))


def test_rows_are_kept_in_the_order_of_the_batches():
    data = batches(0)
    stat = fold(Rows("v"), data)
    np.testing.assert_array_equal(stat["rows"], np.concatenate([x.reshape(-1, 4)[::3] for x in data]))
    assert fold(Rows("v"), [])["rows"].size == 0
