"""Observers: folds over calibration batches, mergeable, whose memory does not grow with the number of batches.

An observer names the values it watches (`taps`); the executor runs the model and hands over an array for each tap and
batch. A `Stat` is an immutable value: `update` and `merge` return a new one. `Range`, `ChannelRange` and `Histogram`
depend on the set of batches only, bit by bit, not on their order, grouping or distribution over machines.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from graphq.errors import DataError

Array = np.ndarray[Any, np.dtype[Any]]
Stat = Mapping[str, Array]
Source = Literal["current", "reference"]
View = Literal["whole", "extrema", "channels", "sample"]

_CHUNK = 1 << 16  # Elements binned at once, so that the intermediate arrays stay in the cache.
_BLOCK = 1 << 20  # Elements converted to float64 at once, or a square block if that is more.
_MIN_EXPONENT = -126  # Of the smallest normal float32; 2^126 is still finite.


@dataclass(frozen=True)
class Tap:
    """One value to watch in one of the two models, and what of it.

    Views: `whole`, the tensor; `extrema`, a float array `[2]` with its minimum and maximum, both extended to 0 by
    the executor (every range contains 0), reduced inside the graph;
    `channels`, `[2, C]` with the minima and maxima along the last axis; `sample`, `[n]`, some thousand elements of each sample.
    """

    value: str
    source: Source = "current"
    view: View = "whole"


class Observer(Protocol):
    """A frozen dataclass: equal observers are one, and its statistic is cached under the observer itself."""

    @property
    def taps(self) -> tuple[Tap, ...]: ...

    def init(self) -> Stat:
        """The statistic of no batches, neutral in `merge`."""
        ...

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        """`stat` with one more batch; one array for each tap, in their order."""
        ...

    def merge(self, a: Stat, b: Stat) -> Stat:
        """The statistic of the batches of both."""
        ...


@dataclass(frozen=True)
class Range:
    """Smallest and largest finite value.

    Stat: `low`, `high` float64 `[]` (infinity and -infinity if there was none), `count` int64 `[]` of batches,
    `nonfinite` int64 `[]` of extrema that were NaN or infinite and left out. The extrema of nothing are (inf, -inf).
    """

    value: str
    source: Source = "current"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.value, self.source, "extrema"),)

    def init(self) -> Stat:
        return _no_range()

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        return self.merge(stat, _finite_range(arrays[0]))

    def merge(self, a: Stat, b: Stat) -> Stat:
        return _merge_ranges(a, b)


@dataclass(frozen=True)
class ChannelRange:
    """Smallest and largest finite value for each index of `axis`.

    Stat: `low`, `high` float64 `[n]`, infinite as in `Range` (`[]` before the first batch); `count` int64 `[]` of
    batches; `nonfinite` int64 `[]` of elements left out.
    """

    value: str
    axis: int
    source: Source = "current"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.value, self.source, "channels" if self.axis == -1 else "whole"),)

    def init(self) -> Stat:
        return _no_range()

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        x = arrays[0]
        others = _other_axes(x, self.axis)
        low, high = x.min(others, initial=np.inf), x.max(others, initial=-np.inf)
        nonfinite = 0
        if x.size and not (np.isfinite(low) & np.isfinite(high)).all():
            finite = np.isfinite(x)
            low = x.min(others, initial=np.inf, where=finite)
            high = x.max(others, initial=-np.inf, where=finite)
            nonfinite = x.size - int(np.count_nonzero(finite))
        return self.merge(stat, _range_stat(low, high, 1, nonfinite))

    def merge(self, a: Stat, b: Stat) -> Stat:
        _check_width(self, a["low"], b["low"])
        return _merge_ranges(a, b)


@dataclass(frozen=True)
class Histogram:
    """Counts over bins `[k * 2^exponent, (k + 1) * 2^exponent)`, of a sample; and the exact extrema.

    The bins are aligned at zero, include it, and are the narrowest power of two for which the sample needs at most
    `bins` of them; so about half of them or more are in use. A wider range merges pairs of bins, which is exact (peers
    resample, and depend on the order of batches). Subnormal values share one bin on each side of zero.

    Stat: `counts` int64 `[bins]`, `first` int64 `[]` the k of the first bin (at most 0), `exponent` int64 `[]`, `zeros`
    int64 `[]` of samples equal to zero (also in `counts`), and those of `Range`, where `nonfinite` counts samples too.
    """

    value: str
    source: Source = "current"
    bins: int = 2048

    def __post_init__(self) -> None:
        if self.bins < 2:
            raise ValueError(f"a histogram needs at least 2 bins, not {self.bins}")

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.value, self.source, "sample"), Tap(self.value, self.source, "extrema"))

    def init(self) -> Stat:
        return _no_range() | _bins(np.zeros(self.bins, np.int64), _MIN_EXPONENT, 0, 0)

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        sample, extrema = np.asarray(arrays[0], np.float32).reshape(-1), arrays[1]
        ranges = _merge_ranges(stat, _finite_range(extrema))
        dropped = sample.size
        if not math.isfinite(float(sample.max(initial=0.0)) - float(sample.min(initial=0.0))):
            sample = sample[np.isfinite(sample)]
        dropped -= sample.size
        low, high = float(sample.min(initial=np.inf)), float(sample.max(initial=-np.inf))
        ranges = _merge_ranges(ranges, _range_stat(low, high, 0, dropped))
        if not sample.size:
            return {**stat, **ranges}
        exponent, first = _join(_occupied(stat), _window(low, high, self.bins), self.bins)
        counts = _rebin(stat, exponent, first) + _count(sample, exponent, first, self.bins)
        zeros = int(stat["zeros"]) + sample.size - int(np.count_nonzero(sample))
        return ranges | _bins(counts, exponent, first, zeros)

    def merge(self, a: Stat, b: Stat) -> Stat:
        exponent, first = _join(_occupied(a), _occupied(b), self.bins)
        counts = _rebin(a, exponent, first) + _rebin(b, exponent, first)
        return _merge_ranges(a, b) | _bins(counts, exponent, first, int(a["zeros"]) + int(b["zeros"]))


def bin_edges(stat: Stat) -> Array:
    """Edges of the bins of a `Histogram` statistic: float64 `[bins + 1]`, exact."""
    first, bins = int(stat["first"]), len(stat["counts"])
    return np.ldexp(np.arange(first, first + bins + 1, dtype=np.float64), int(stat["exponent"]))


@dataclass(frozen=True)
class _Sums:
    """Sums over the rows `X: [N, D]` along `axis`, all other axes flattened into N; accumulated in float64."""

    value: str
    axis: int = -1
    source: Source = "current"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.value, self.source),)

    def merge(self, a: Stat, b: Stat) -> Stat:
        _check_width(self, a["sum"], b["sum"])
        if not (np.isfinite(a["sum"]).all() and np.isfinite(b["sum"]).all()):
            what, where = f"`{self.value}` contains NaN or infinity", f"{self.source} model, on calibration data"
            raise DataError(what, where=where, hint="check the calibration data; a float16 model may overflow")
        return {name: a[name] + b[name] for name in a}


class Moments(_Sums):
    """Sum and sum of squares for each index of `axis`.

    Stat: `count` int64 `[]`, the number of rows N; `sum`, `square` float64 `[D]` (`[]` before the first batch).
    """

    def init(self) -> Stat:
        return {"count": np.asarray(0), "sum": np.asarray(0.0), "square": np.asarray(0.0)}

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        for rows in _rows(arrays[0], self.axis):
            square = np.einsum("nd,nd->d", rows, rows)
            stat = self.merge(stat, {"count": np.asarray(len(rows)), "sum": rows.sum(0), "square": square})
        return stat


class Gram(_Sums):
    """Gram matrix `XᵀX` of the rows; not divided by N: `C = gram / count`.

    Stat: `count` int64 `[]`, the number of rows N; `sum` float64 `[D]`; `gram` float64 `[D, D]` (`[]` if no batch).
    """

    def init(self) -> Stat:
        return {"count": np.asarray(0), "sum": np.asarray(0.0), "gram": np.asarray(0.0)}

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        for rows in _rows(arrays[0], self.axis):
            total = {"count": np.asarray(len(rows)), "sum": rows.sum(0)}
            with np.errstate(invalid="ignore"):  # Refused in `merge`.
                stat = self.merge(stat, {**total, "gram": rows.T @ rows})
        return stat


def mean(stat: Stat) -> Array:
    """Mean for each index, float64 `[n]`, from `Moments` or `Gram`; 0 where nothing was seen."""
    return np.asarray(stat["sum"] / np.maximum(stat["count"], 1))


def variance(stat: Stat) -> Array:
    """Population variance for each index, float64 `[n]`, from `Moments` or `Gram`; 0 where nothing was seen."""
    square = stat["square"] if "square" in stat else np.diagonal(stat["gram"])
    return np.asarray(np.maximum(square / np.maximum(stat["count"], 1) - mean(stat) ** 2, 0.0))


def _range_stat(low: Any, high: Any, count: int, nonfinite: int) -> dict[str, Array]:
    return {
        "low": np.asarray(low, np.float64),
        "high": np.asarray(high, np.float64),
        "count": np.asarray(count, np.int64),
        "nonfinite": np.asarray(nonfinite, np.int64),
    }


def _no_range() -> dict[str, Array]:
    return _range_stat(np.inf, -np.inf, 0, 0)


def _finite_range(extrema: Array) -> dict[str, Array]:
    """The statistic of one batch from its minimum and maximum `[2]`."""
    low, high = (float(extrema[0]), float(extrema[1])) if extrema.size else (np.inf, -np.inf)
    if low == np.inf and high == -np.inf:
        return _range_stat(low, high, 1, 0)
    finite_low, finite_high = math.isfinite(low), math.isfinite(high)
    dropped = 2 - finite_low - finite_high
    return _range_stat(low if finite_low else np.inf, high if finite_high else -np.inf, 1, dropped)


def _merge_ranges(a: Stat, b: Stat) -> dict[str, Array]:
    counts = int(a["count"] + b["count"]), int(a["nonfinite"] + b["nonfinite"])
    return _range_stat(np.minimum(a["low"], b["low"]), np.maximum(a["high"], b["high"]), *counts)


_Window = tuple[int, int, int]  # exponent, first k <= 0, last k >= 0


def _bins(counts: Array, exponent: int, first: int, zeros: int) -> dict[str, Array]:
    numbers = {"exponent": exponent, "first": first, "zeros": zeros}
    return {"counts": counts} | {key: np.asarray(number, np.int64) for key, number in numbers.items()}


def _occupied(stat: Stat) -> _Window:
    """From the first to the last bin in use, and zero."""
    used = np.flatnonzero(stat["counts"])
    first, exponent = int(stat["first"]), int(stat["exponent"])
    return (exponent, min(first + int(used[0]), 0), max(first + int(used[-1]), 0)) if used.size else (exponent, 0, 0)


def _window(low: float, high: float, bins: int) -> _Window:
    """The narrowest bins for `[low, high]` and zero."""
    if (low := min(low, 0.0)) == (high := max(high, 0.0)):
        return _MIN_EXPONENT, 0, 0
    # With one less, (high - low) / 2^exponent would exceed 2 * bins.
    exponent = max(_MIN_EXPONENT, math.frexp(high - low)[1] - 1 - (bins - 1).bit_length())
    first, last = math.floor(math.ldexp(low, -exponent)), math.floor(math.ldexp(high, -exponent))
    return _shrink((exponent, first, last), bins)


def _shrink(window: _Window, bins: int) -> _Window:
    exponent, first, last = window
    while last - first >= bins:
        exponent, first, last = exponent + 1, first >> 1, last >> 1
    return exponent, first, last


def _join(a: _Window, b: _Window, bins: int) -> tuple[int, int]:
    """Exponent and first bin of the narrowest bins for two windows."""
    (fine, low, high), (exponent, first, last) = sorted((a, b))
    shift = exponent - fine
    return _shrink((exponent, min(first, low >> shift), max(last, high >> shift)), bins)[:2]


def _rebin(stat: Stat, exponent: int, first: int) -> Array:
    """Counts of `stat` in the wider bins of `exponent` that begin at `first`: int64 `[bins]`."""
    counts = np.zeros_like(stat["counts"])
    used = np.flatnonzero(stat["counts"])
    shift = min(exponent - int(stat["exponent"]), 62)
    np.add.at(counts, ((int(stat["first"]) + used) >> shift) - first, stat["counts"][used])
    return counts


def _count(sample: Array, exponent: int, first: int, bins: int) -> Array:
    """Counts of a finite float32 `sample: [n]`: int64 `[bins]`."""
    # Scaling by a power of two is exact, except that scaling down may underflow to zero, which float64 never does here.
    dtype = np.float32 if exponent <= 0 else np.float64
    factor, counts = dtype(math.ldexp(1.0, -exponent)), np.zeros(bins, np.int64)
    for start in range(0, sample.size, _CHUNK):
        scaled = np.multiply(sample[start : start + _CHUNK], factor, dtype=dtype)
        np.floor(scaled, out=scaled)
        np.subtract(scaled, dtype(first), out=scaled)
        counts += np.bincount(scaled.astype(np.intp), minlength=bins)
    return counts


def _other_axes(x: Array, axis: int) -> tuple[int, ...]:
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} does not exist in a tensor of shape {x.shape}")
    return tuple(i for i in range(x.ndim) if i != axis % x.ndim)


def _rows(x: Array, axis: int) -> Iterator[Array]:
    """Blocks of the rows `[N, D]` along `axis`, as float64."""
    _other_axes(x, axis)
    flat = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]) if x.size else np.zeros((0, x.shape[axis]))
    step = max(1, flat.shape[1], _BLOCK // max(1, flat.shape[1]))
    for start in range(0, len(flat), step):
        yield flat[start : start + step].astype(np.float64)


def _check_width(observer: ChannelRange | _Sums, a: Array, b: Array) -> None:
    if a.ndim and b.ndim and a.shape != b.shape:
        what = f"axis {observer.axis} of `{observer.value}` differs between batches: {len(a)} and {len(b)}"
        hint = "calibrate with inputs of one size, or choose an axis that does not depend on the input"
        raise DataError(what, expected="one size of that axis in all calibration batches", hint=hint)
