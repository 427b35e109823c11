"""A histogram as an observer: bins that are powers of two wide, so that merging is exact and order does not matter."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graphq.observers import Array, Source, Stat, Tap, finite_range, merge_ranges, no_range, range_stat

_CHUNK = 1 << 16  # Elements binned at once, so that the intermediate arrays stay in the cache.
_MIN_EXPONENT = -126  # Of the smallest normal float32; 2^126 is still finite.


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
        return no_range() | _bins(np.zeros(self.bins, np.int64), _MIN_EXPONENT, 0, 0)

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        sample, extrema = np.asarray(arrays[0], np.float32).reshape(-1), arrays[1]
        ranges = merge_ranges(stat, finite_range(extrema))
        dropped = sample.size
        if not math.isfinite(float(sample.max(initial=0.0)) - float(sample.min(initial=0.0))):
            sample = sample[np.isfinite(sample)]
        dropped -= sample.size
        low, high = float(sample.min(initial=np.inf)), float(sample.max(initial=-np.inf))
        ranges = merge_ranges(ranges, range_stat(low, high, 0, dropped))
        if not sample.size:
            return {**stat, **ranges}
        exponent, first = _join(_occupied(stat), _window(low, high, self.bins), self.bins)
        counts = _rebin(stat, exponent, first) + _count(sample, exponent, first, self.bins)
        zeros = int(stat["zeros"]) + sample.size - int(np.count_nonzero(sample))
        return ranges | _bins(counts, exponent, first, zeros)

    def merge(self, a: Stat, b: Stat) -> Stat:
        ranges, zeros = merge_ranges(a, b), int(a["zeros"]) + int(b["zeros"])
        for nothing, other in ((a, b), (b, a)):
            if not nothing["counts"].any():
                return ranges | _bins(other["counts"], int(other["exponent"]), int(other["first"]), zeros)
        exponent, first = _join(_occupied(a), _occupied(b), self.bins)
        return ranges | _bins(_rebin(a, exponent, first) + _rebin(b, exponent, first), exponent, first, zeros)


def bin_edges(stat: Stat) -> Array:
    """Edges of the bins of a `Histogram` statistic: float64 `[bins + 1]`, exact."""
    first, bins = int(stat["first"]), len(stat["counts"])
    return np.ldexp(np.arange(first, first + bins + 1, dtype=np.float64), int(stat["exponent"]))


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
    if (exponent, first) == (int(stat["exponent"]), int(stat["first"])):
        return np.asarray(stat["counts"])
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
