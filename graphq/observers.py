"""Observers: folds over calibration batches, mergeable, whose memory does not grow with the number of batches.

An observer names the values it watches (`taps`); the executor runs the model and hands over an array for each tap and
batch. A `Stat` is an immutable value: `update` and `merge` return a new one. `Range`, `ChannelRange` and `Histogram`
(`graphq.histogram`) depend on the set of batches only, bit by bit, not on their order, grouping or distribution over machines.
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
View = Literal["whole", "extrema", "rows", "sample"]

_BLOCK = 1 << 20  # Elements converted to float64 at once, or a square block if that is more.


@dataclass(frozen=True)
class Tap:
    """One value to watch in one of the two models, and what of it.

    Views: `whole`, the tensor; `extrema`, a float array `[2]` with its minimum and maximum, both extended to 0 by
    the executor (every range contains 0), reduced inside the graph;
    `rows`, `[n, D]`, some rows along the last axis; `sample`, `[n]`, some thousand elements of each sample.
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
        return no_range()

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        return self.merge(stat, finite_range(arrays[0]))

    def merge(self, a: Stat, b: Stat) -> Stat:
        return merge_ranges(a, b)


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
        return (Tap(self.value, self.source),)

    def init(self) -> Stat:
        return no_range()

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
        return self.merge(stat, range_stat(low, high, 1, nonfinite))

    def merge(self, a: Stat, b: Stat) -> Stat:
        _check_width(self, a["low"], b["low"])
        return merge_ranges(a, b)


@dataclass(frozen=True)
class Rows:
    """Some rows along the last axis from every batch, to try things out on.

    Stat: `rows` float32 `[n, D]`, in the order of the batches.
    """

    value: str
    source: Source = "current"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.value, self.source, "rows"),)

    def init(self) -> Stat:
        return {"rows": np.zeros((0, 0), np.float32)}

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        return self.merge(stat, {"rows": arrays[0].astype(np.float32)})

    def merge(self, a: Stat, b: Stat) -> Stat:
        parts = [stat["rows"] for stat in (a, b) if stat["rows"].size]
        return {"rows": np.concatenate(parts) if parts else a["rows"]}


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
        _require_finite(self.value, self.source, a["sum"], b["sum"])
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


@dataclass(frozen=True)
class BlockGram:
    """Gram matrices of blocks of `block` neighbours along the last axis, a number of them that divides its size.

    Stat: `count` int64 `[]`, the number of rows N; `gram` float64 `[D / block, block, block]` (`[]` if no batch).
    """

    value: str
    block: int
    source: Source = "current"

    @property
    def taps(self) -> tuple[Tap, ...]:
        return (Tap(self.value, self.source),)

    def init(self) -> Stat:
        return {"count": np.asarray(0), "gram": np.asarray(0.0)}

    def update(self, stat: Stat, *arrays: Array) -> Stat:
        for rows in _rows(arrays[0], -1):
            parts = rows.reshape(len(rows), -1, self.block).swapaxes(0, 1)
            with np.errstate(invalid="ignore"):  # Refused in `merge`.
                stat = self.merge(stat, {"count": np.asarray(len(rows)), "gram": parts.swapaxes(1, 2) @ parts})
        return stat

    def merge(self, a: Stat, b: Stat) -> Stat:
        _require_finite(self.value, self.source, a["gram"], b["gram"])
        return {name: a[name] + b[name] for name in a}


def mean(stat: Stat) -> Array:
    """Mean for each index, float64 `[n]`, from `Moments` or `Gram`; 0 where nothing was seen."""
    return np.asarray(stat["sum"] / np.maximum(stat["count"], 1))


def variance(stat: Stat) -> Array:
    """Population variance for each index, float64 `[n]`, from `Moments` or `Gram`; 0 where nothing was seen."""
    square = stat["square"] if "square" in stat else np.diagonal(stat["gram"])
    return np.asarray(np.maximum(square / np.maximum(stat["count"], 1) - mean(stat) ** 2, 0.0))


def range_stat(low: Any, high: Any, count: int, nonfinite: int) -> dict[str, Array]:
    return {
        "low": np.asarray(low, np.float64),
        "high": np.asarray(high, np.float64),
        "count": np.asarray(count, np.int64),
        "nonfinite": np.asarray(nonfinite, np.int64),
    }


def no_range() -> dict[str, Array]:
    return range_stat(np.inf, -np.inf, 0, 0)


def finite_range(extrema: Array) -> dict[str, Array]:
    """The statistic of one batch from its minimum and maximum `[2]`."""
    low, high = (float(extrema[0]), float(extrema[1])) if extrema.size else (np.inf, -np.inf)
    if low == np.inf and high == -np.inf:
        return range_stat(low, high, 1, 0)
    finite_low, finite_high = math.isfinite(low), math.isfinite(high)
    dropped = 2 - finite_low - finite_high
    return range_stat(low if finite_low else np.inf, high if finite_high else -np.inf, 1, dropped)


def merge_ranges(a: Stat, b: Stat) -> dict[str, Array]:
    counts = int(a["count"] + b["count"]), int(a["nonfinite"] + b["nonfinite"])
    return range_stat(np.minimum(a["low"], b["low"]), np.maximum(a["high"], b["high"]), *counts)


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


def _require_finite(value: str, source: Source, *sums: Array) -> None:
    if not all(np.isfinite(one).all() for one in sums):
        what, where = f"`{value}` contains NaN or infinity", f"{source} model, on calibration data"
        raise DataError(what, where=where, hint="check the calibration data; a float16 model may overflow")


def _check_width(observer: ChannelRange | _Sums, a: Array, b: Array) -> None:
    if a.ndim and b.ndim and a.shape != b.shape:
        what = f"axis {observer.axis} of `{observer.value}` differs between batches: {len(a)} and {len(b)}"
        hint = "calibrate with inputs of one size, or choose an axis that does not depend on the input"
        raise DataError(what, expected="one size of that axis in all calibration batches", hint=hint)
