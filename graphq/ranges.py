"""Range estimators: which range of a value's statistic to quantize.

Each names the observer it needs and turns its statistic into `(low, high)`, finite, with `low <= 0 <= high`, within the
exact extrema. A statistic without a finite element gives (0.0, 0.0), from which `Uniform.fit` makes scale 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphq.histogram import Histogram, bin_edges
from graphq.observers import Observer, Range, Source, Stat
from graphq.quantizers import Uniform
from graphq.spec import QuantSpec

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class MinMax:
    """The exact extrema: nothing is clipped."""

    def observer(self, value: str, source: Source = "current") -> Observer:
        return Range(value, source)

    def estimate(self, stat: Stat, spec: QuantSpec) -> tuple[float, float]:
        return _extrema(stat)


@dataclass(frozen=True)
class Percentile:
    """The central `percent` of the sample: half of the rest is cut at each end; of |x| if symmetric.

    Linear within a bin of the histogram. 100 is min-max.
    """

    percent: float = 99.99

    def __post_init__(self) -> None:
        if not 50 <= self.percent <= 100:
            raise ValueError(f"percent must be 50 to 100, not {self.percent}")

    def observer(self, value: str, source: Source = "current") -> Observer:
        return Histogram(value, source)

    def estimate(self, stat: Stat, spec: QuantSpec) -> tuple[float, float]:
        low, high = _extrema(stat)
        counts, edges = stat["counts"], bin_edges(stat)
        if self.percent == 100 or not counts.any():
            return low, high
        cut = 1 - self.percent / 100
        if spec.symmetric:
            first = -int(stat["first"])  # The bin that begins at zero.
            folded = np.zeros(max(first, len(counts) - first), np.int64)
            folded[: len(counts) - first] += counts[first:]
            folded[:first] += counts[:first][::-1]
            limit = _quantile(folded, np.arange(len(folded) + 1) * (edges[1] - edges[0]), 1 - cut)
            return max(low, -limit), min(high, limit)
        low = max(low, min(0.0, _quantile(counts, edges, cut / 2)))
        return low, min(high, max(0.0, _quantile(counts, edges, 1 - cut / 2)))


@dataclass(frozen=True)
class Mse:
    """The range with the smallest expected squared error of quantization, clipping included (`expected_error`).

    Symmetric: 66 thresholds on |x|, geometric from 2^-10 of the largest, then 33 around the best. Asymmetric: 33
    such and a grid over both ends independently, in octaves to 2^-8 and 0, then three finer ones around the best. Never
    worse than min-max on its own objective. Idea: ACIQ, arXiv 1810.05723, with the histogram in place of a fitted
    distribution.
    """

    def observer(self, value: str, source: Source = "current") -> Observer:
        return Histogram(value, source)

    def estimate(self, stat: Stat, spec: QuantSpec) -> tuple[float, float]:
        low, high = _extrema(stat)
        if low == high:
            return low, high
        if spec.symmetric:
            widest, factors = max(-low, high), np.geomspace(2.0**-10, 1, 66)
            for more in (factors, _around_one(factors[1] / factors[0], 33)):
                thresholds = widest * more
                best = _best(stat, spec, np.maximum(low, -thresholds), np.minimum(high, thresholds))
                widest = max(-best[0], best[1])
            return best
        thresholds, octaves = (
            max(-low, high) * np.geomspace(2.0**-8, 1, 33),
            np.append(0.0, np.exp2(np.arange(-8.0, 1.0))),
        )
        lows, highs = _pairs(low * octaves, high * octaves)
        lows = np.concatenate([np.maximum(low, -thresholds), lows])
        highs = np.concatenate([np.minimum(high, thresholds), highs])
        best = _best(stat, spec, lows, highs)
        for spread, steps in ((1.5, 7), (1.15, 5), (1.07, 5)):
            near = _around_one(spread, steps)
            best = _best(stat, spec, *_pairs(np.maximum(low, best[0] * near), np.minimum(high, best[1] * near)))
        return best


@dataclass(frozen=True)
class Entropy:
    """The range that loses the least information: KL divergence of the sample from its quantized self.

    As in NVIDIA's "8-bit inference with TensorRT" (S. Migacz, GTC 2017): what lies beyond the range is counted in its
    last bin; the quantized distribution spreads each level's count evenly over the non-empty bins that round to it.
    Unlike there, the levels are those of `Uniform`, signs are kept apart, and exact zeros, always a level, are left
    out. The candidates are thresholds on |x| applied to both ends jointly (so the end that is nearer to zero is clipped
    last), geometric from where a level is as wide as a bin, up to min-max.
    """

    candidates: int = 96

    def observer(self, value: str, source: Source = "current") -> Observer:
        return Histogram(value, source, bins=8192)  # At least 2048 for |x|, as in the talk.

    def estimate(self, stat: Stat, spec: QuantSpec) -> tuple[float, float]:
        low, high = _extrema(stat)
        counts, edges = _without_zeros(stat), bin_edges(stat)
        if not counts.any():
            return low, high
        widest = max(-low, high)
        narrowest = (edges[1] - edges[0]) * (1 << (spec.bits - 1))
        thresholds = widest * np.geomspace(min(1.0, narrowest / widest), 1, self.candidates)
        lows, highs = np.maximum(low, -thresholds), np.minimum(high, thresholds)
        divergence = _divergence(counts, edges, spec, lows, highs)
        return _at_least(divergence, lows, highs)


Estimator = MinMax | Percentile | Mse | Entropy

ESTIMATORS: dict[str, type[Estimator]] = {
    "min-max": MinMax,
    "percentile": Percentile,
    "mse": Mse,
    "entropy": Entropy,
}


def expected_error(stat: Stat, spec: QuantSpec, low: Array, high: Array) -> Array:
    """Mean of `(x - fake_quantize(x))²` over the sample of a `Histogram`, for ranges `low, high: [C]`; float64 `[C]`.

    Exact for a density that is constant within each bin, with the exact zeros (error 0) apart. The error integrates in
    closed form: with `t = x / scale` and its level `r`, an antiderivative of `(t - r)²`, continuous at the borders of
    levels, is `G(t) = (t - r)³ / 3 + r / 12`.
    """
    counts, edges = _without_zeros(stat), bin_edges(stat)
    # Sum over bins of count * (G(right) - G(left)) = sum over edges of G * (count on the left - count on the right).
    weight = np.diff(counts, prepend=0, append=0)
    used = np.flatnonzero(weight)
    scale, zero = _levels(spec, low, high)
    t = edges[used] / scale[:, None]
    r = np.clip(np.rint(t), spec.qmin - zero[:, None], spec.qmax - zero[:, None])
    t -= r
    integral = (t * t * t / 3 + r / 12) @ -weight[used].astype(np.float64)
    error = integral * scale**3 / ((edges[1] - edges[0]) * max(1, int(stat["counts"].sum())))
    return np.asarray(np.maximum(error, 0.0))


def _divergence(counts: Array, edges: Array, spec: QuantSpec, low: Array, high: Array) -> Array:
    """KL divergence for ranges `low, high: [C]`; float64 `[C]`, infinite where a level gained mass from outside only.

    Sums over the bins of a level are differences of cumulative sums, so the cost is that of levels, not of bins: `KL =
    sum of p log p over bins - sum of P_l log q_l over levels`, with one `q_l` for the non-empty bins of level l.
    """
    width, bins = edges[1] - edges[0], len(counts)
    scale, zero = _levels(spec, low, high)
    levels = np.arange(spec.qmin, spec.qmax + 2) - 0.5
    borders = np.rint(((levels - zero[:, None]) * scale[:, None] - edges[0]) / width)
    borders = np.clip(borders, 0, bins).astype(np.intp)  # [C, levels + 1], indices of bins
    first, last = borders[:, 0], borders[:, -1] - 1
    below = np.concatenate(([0], np.cumsum(counts)))
    log = np.concatenate(([0.0], np.cumsum(_xlogx(counts))))
    filled = np.concatenate(([0], np.cumsum(counts > 0)))
    inside = np.diff(below[borders]).astype(np.float64)
    used = np.diff(filled[borders]).astype(np.float64)
    total, kept, mass = float(below[-1]), inside.sum(1), inside.copy()
    entropy = log[borders[:, -1]] - log[first]
    rows = np.arange(len(low))
    for bin_index, outside in ((first, below[first]), (last, below[-1] - below[last + 1])):
        level = (borders[:, 1:] <= bin_index[:, None]).sum(1)
        mass[rows, level] += outside
        used[rows, level] += (counts[bin_index] == 0) & (outside > 0)
        entropy += _xlogx(counts[bin_index] + outside) - _xlogx(counts[bin_index])
    with np.errstate(divide="ignore", invalid="ignore"):
        cross = np.where(mass > 0, mass * np.log(inside / used), 0.0).sum(1)
        return np.where(kept > 0, (entropy - cross) / total + np.log(kept / total), np.inf)


def _best(stat: Stat, spec: QuantSpec, low: Array, high: Array) -> tuple[float, float]:
    return _at_least(expected_error(stat, spec, low, high), low, high)


def _at_least(loss: Array, low: Array, high: Array) -> tuple[float, float]:
    """The range of least loss; the last, widest one of equals."""
    best = len(loss) - 1 - int(np.argmin(loss[::-1]))
    return float(low[best]), float(high[best])


def _pairs(lows: Array, highs: Array) -> tuple[Array, Array]:
    """All ranges of these ends except the empty one; the last of `lows` and `highs` last."""
    low, high = (grid.ravel() for grid in np.meshgrid(np.unique(lows)[::-1], np.unique(highs), indexing="ij"))
    return low[low < high], high[low < high]


def _around_one(spread: float, steps: int) -> Array:
    """Geometric steps from `1 / spread` to `spread`, 1 itself among them."""
    factors = np.geomspace(1 / spread, spread, steps | 1)
    factors[len(factors) // 2] = 1.0
    return factors


def _extrema(stat: Stat) -> tuple[float, float]:
    """The exact extrema and zero; (0.0, 0.0) if there are none."""
    return min(float(stat["low"]), 0.0), max(float(stat["high"]), 0.0)


def _without_zeros(stat: Stat) -> Array:
    counts = stat["counts"].copy()
    counts[-int(stat["first"])] -= int(stat["zeros"])
    return counts


def _levels(spec: QuantSpec, low: Array, high: Array) -> tuple[Array, Array]:
    """Scale and zero point of each range, as float64 `[C]`."""
    qparams = Uniform(spec).fit(low, high)
    return qparams.scale.astype(np.float64), qparams.zero_point.astype(np.float64)


def _quantile(counts: Array, edges: Array, part: float) -> float:
    """Where the cumulative count reaches `part` (above 0) of the total, linear within a bin."""
    cumulative = np.cumsum(counts)
    target = part * float(cumulative[-1])
    index = int(np.searchsorted(cumulative, target))
    excess = (float(cumulative[index]) - target) / float(counts[index])
    return float(edges[index + 1] - excess * (edges[index + 1] - edges[index]))


def _xlogx(counts: Array) -> Array:
    """`x log x`, 0 at 0; float64."""
    return np.asarray(counts * np.log(np.maximum(counts, 1)))
