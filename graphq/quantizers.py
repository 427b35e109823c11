"""Quantization of arrays by scale and zero point: range -> qparams -> codes -> floats, with the numbers of ONNX QuantizeLinear.

The only place where these formulas are written; calibration, simulation, weight packing, emission all call it. `x` is a
float tensor, `q` its codes; scale and zero point are shaped by the granularity (see `qparams_shape`).

Formulas: Jacob et al., arXiv 1712.05877; rounding and saturation: ONNX operator QuantizeLinear, opsets 13 to 25.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from graphq.spec import Granularity, PerAxis, PerGroup, PerTensor, QuantSpec

Array = np.ndarray[Any, np.dtype[Any]]

MIN_SCALE = np.finfo(np.float32).tiny
"""No scale is smaller: runtimes flush subnormal float32 to zero, and a zero scale makes every code undefined."""

_FLOATS = {"e4m3": ml_dtypes.float8_e4m3fn, "e2m1": ml_dtypes.float4_e2m1fn}

_TILE = 1 << 18  # Elements handled at once: 1 MiB of float32 stays in the cache between the steps of the formula.


@dataclass(frozen=True, eq=False)
class QParams:
    """What turns codes into floats.

    Invariants, enforced on construction:
        x ≈ (q - zero_point) * scale
        scale.dtype == float32,  MIN_SCALE <= scale < inf
        zero_point.dtype == int32
        scale.shape == zero_point.shape == qparams_shape(x.shape, granularity)

    The zero point lies within the codes of the spec it was fitted for, so 0.0 is always a code.
    """

    scale: Array
    zero_point: Array

    def __post_init__(self) -> None:
        scale, zero = self.scale, self.zero_point
        if scale.dtype != np.float32 or zero.dtype != np.int32:
            raise ValueError(f"scale must be float32 and zero point int32, not {scale.dtype} and {zero.dtype}")
        if scale.shape != zero.shape:
            raise ValueError(f"scale and zero point must have one shape, not {scale.shape} and {zero.shape}")
        if not (np.isfinite(scale) & (scale >= MIN_SCALE)).all():
            raise ValueError(f"scales must be finite and at least {MIN_SCALE:g}")


Format = tuple[QuantSpec, QParams]
"""How a value is quantized."""


def qparams_shape(shape: tuple[int, ...], granularity: Granularity) -> tuple[int, ...]:
    """Shape of scale and zero point for a tensor of `shape`, as QuantizeLinear wants it.

    Returns:
        `()` per tensor; `(n,)` per axis; per group `shape` with `ceil(n / size)` for `n`, where `n = shape[axis]`.
    """
    if isinstance(granularity, PerTensor):
        return ()
    axis = _axis(granularity, len(shape))
    if isinstance(granularity, PerAxis):
        return (shape[axis],)
    return (*shape[:axis], -(-shape[axis] // granularity.size), *shape[axis + 1 :])


@dataclass(frozen=True)
class Uniform:
    """One scale for all levels: `q = clip(round(x / scale) + zero_point, qmin, qmax)`, `x ≈ (q - zero_point) * scale`.

    `round` is half to even and the division is done in float32, so codes equal those of ONNX QuantizeLinear bit by bit. It goes to the
    nearest integer, or to the nearest float of the spec's grid; then zero points are 0. A width that ONNX does not store (3, 5,
    6, 7 bits) clips to its own `[qmin, qmax]` inside the next wider type.
    """

    spec: QuantSpec

    def fit(self, low: Any, high: Any) -> QParams:
        """Qparams whose levels cover `[low, high]`, after extending it to contain 0.

        Symmetric: `scale = max(|low|, |high|) / (2^(bits-1) - 1)`, for small floats over their largest.
        Asymmetric: `scale = (high - low) / (2^bits - 1)`, `zero_point = qmin + round(-low / scale)`.
        A range of 0 to 0 gets the scale 1, a subnormal one `MIN_SCALE`.

        Args:
            low, high: Finite, of one shape, which becomes that of the qparams.

        Raises:
            ValueError: An end is not finite, or `low > high`.
        """
        low, high = np.asarray(low, np.float64), np.asarray(high, np.float64)
        if not (np.isfinite(low) & np.isfinite(high) & (low <= high)).all():
            raise ValueError("a range must be finite with low <= high")
        spec, low, high = self.spec, np.minimum(low, 0.0), np.maximum(high, 0.0)
        if spec.symmetric:
            extent, steps = np.maximum(-low, high), spec.qmax if spec.is_float else (1 << (spec.bits - 1)) - 1
        else:
            extent, steps = high - low, (1 << spec.bits) - 1
        limits = float(MIN_SCALE), float(np.finfo(np.float32).max)
        scale = np.where(extent > 0, np.clip(extent / steps, *limits), 1.0).astype(np.float32)
        if spec.symmetric:
            zero = np.full(scale.shape, 0 if spec.signed else 1 << (spec.bits - 1))
        else:
            zero = np.clip(spec.qmin + np.rint(-low / scale), spec.qmin, spec.qmax)
        return QParams(scale, np.asarray(zero, np.int32))

    def fit_weight(self, weight: Array) -> QParams:
        """Min-max qparams of `weight`, one range for each scale that the granularity asks for."""
        return self.fit(*_extrema(weight, self.spec.granularity))

    def quantize(self, x: Array, qparams: QParams) -> Array:
        """Codes of `x`: same shape, within `[qmin, qmax]`; int8 if signed, else uint8, or the ml_dtypes type of a float grid.

        `x` may be of any real type and is read as float32; infinities saturate.

        Raises:
            ValueError: `x` contains NaN, or the qparams have the wrong shape.
        """
        out = np.empty(np.shape(x), _FLOATS.get(self.spec.grid, np.int8 if self.spec.signed else np.uint8))
        for source, target, scale, zero in self._tiles(x, out, qparams):
            steps = self._steps(source, scale, zero)
            np.add(steps, zero, out=steps)
            target[...] = steps
        return out

    def dequantize(self, q: Array, qparams: QParams) -> Array:
        """`(q - zero_point) * scale` as float32, same shape as `q`."""
        out = np.empty(np.shape(q), np.float32)
        for source, target, scale, zero in self._tiles(q, out, qparams):
            np.subtract(source, zero, out=target, dtype=np.float32)
            np.multiply(target, scale, out=target)
        return out

    def fake_quantize(self, x: Array, qparams: QParams) -> Array:
        """`dequantize(quantize(x))` without the integers in between, bit for bit the same float32 array."""
        out = np.empty(np.shape(x), np.float32)
        for source, target, scale, zero in self._tiles(x, out, qparams):
            steps = self._steps(source, scale, zero, out=target)
            np.add(steps, np.float32(0), out=steps)  # An integer has no -0.
            np.multiply(steps, scale, out=steps)
        return out

    def sums(self, x: Array, qparams: QParams) -> tuple[float, float]:
        """Sum of squares of `x`, and of `fake_quantize(x) - x`, of which no more than a piece is ever there."""
        power = noise = 0.0
        for source, _, scale, zero in self._tiles(x, np.asarray(x), qparams):
            error = self._steps(source, scale, zero)
            np.multiply(error, scale, out=error)
            np.subtract(error, source, out=error)
            power, noise = (total + float(np.vdot(part, part)) for total, part in ((power, source), (noise, error)))
        return power, noise

    def _steps(self, x: Array, scale: Array, zero: Array, out: Array | None = None) -> Array:
        """`clip(round(x / scale), qmin - zero, qmax - zero)` as float32, exact: adding `zero` gives the code."""
        with np.errstate(over="ignore", under="ignore"):
            steps = np.divide(x, scale, out=out, dtype=np.float32, casting="same_kind")
        if np.isnan(np.min(steps, initial=0.0)):
            raise ValueError("the tensor to quantize contains NaN")
        low, high = np.float32(self.spec.qmin) - zero, np.float32(self.spec.qmax) - zero
        if self.spec.is_float:
            steps[...] = np.clip(steps, low, high, out=steps).astype(_FLOATS[self.spec.grid])
            return steps
        np.rint(steps, out=steps)
        return np.clip(steps, low, high, out=steps)

    def _tiles(self, x: Array, out: Array, qparams: QParams) -> Iterator[tuple[Array, Array, Array, Array]]:
        """Pieces of `x`, the views of `out` to write, and float32 scales and zero points that broadcast to them."""
        granularity, x = self.spec.granularity, np.asarray(x)
        expected = qparams_shape(x.shape, granularity)
        if qparams.scale.shape != expected:
            where = f"{granularity} of a {x.shape} tensor"
            raise ValueError(f"{where} takes scales of shape {expected}, not {qparams.scale.shape}")
        zero, scale = qparams.zero_point.astype(np.float32), qparams.scale
        if zero.size and (zero == zero.flat[0]).all():
            zero = np.asarray(zero.flat[0])  # Always so if symmetric; spares its expansion.
        if isinstance(granularity, PerTensor):
            x, out = x.reshape(-1), out.reshape(-1)
        for rows, indices in _row_blocks(x.shape, granularity):
            piece = x[rows]
            local_scale = _expand(scale, indices, piece.shape, granularity)
            yield piece, out[rows], local_scale, _expand(zero, indices, piece.shape, granularity)


def _axis(granularity: PerAxis | PerGroup, ndim: int) -> int:
    if not -ndim <= granularity.axis < ndim:
        raise ValueError(f"{granularity} does not fit a tensor of rank {ndim}")
    return granularity.axis % ndim


def _row_blocks(shape: tuple[int, ...], granularity: Granularity) -> Iterator[tuple[slice, slice]]:
    """Slices of axis 0 of about `_TILE` elements, each with the slice of the qparams' axis 0 that goes with it."""
    rows = shape[0]
    step = max(1, _TILE // max(1, int(np.prod(shape[1:], dtype=np.int64))))
    along_rows = not isinstance(granularity, PerTensor) and _axis(granularity, len(shape)) == 0
    group = granularity.size if isinstance(granularity, PerGroup) and along_rows else 1
    shared = isinstance(granularity, PerAxis) and not along_rows
    step = -(-step // group) * group
    for start in range(0, rows, step):
        yield slice(start, start + step), slice(None) if shared else slice(start // group, (start + step) // group)


def _expand(param: Array, indices: slice, shape: tuple[int, ...], granularity: Granularity) -> Array:
    """`param[indices]` so that it broadcasts against a piece of `shape`."""
    if isinstance(granularity, PerTensor) or not param.ndim:
        return param
    param, axis = param[indices], _axis(granularity, len(shape))
    if isinstance(granularity, PerAxis):
        return param.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    if granularity.size >= shape[axis]:
        return param
    return np.repeat(param, granularity.size, axis)[(slice(None),) * axis + (slice(shape[axis]),)]


def _extrema(weight: Array, granularity: Granularity) -> tuple[Array, Array]:
    """Smallest and largest element for each scale, extended to contain 0."""
    if isinstance(granularity, PerTensor):
        return weight.min(initial=0.0), weight.max(initial=0.0)
    axis = _axis(granularity, weight.ndim)
    if isinstance(granularity, PerAxis):
        others = tuple(i for i in range(weight.ndim) if i != axis)
        return weight.min(others, initial=0.0), weight.max(others, initial=0.0)
    size = granularity.size
    return _group_reduce(np.minimum, weight, axis, size), _group_reduce(np.maximum, weight, axis, size)


def _group_reduce(reduce: np.ufunc, weight: Array, axis: int, size: int) -> Array:
    """`reduce` over groups of `size` along `axis`; the last group may be shorter. Much faster than `reduceat`."""
    before, n, after = weight.shape[:axis], weight.shape[axis], weight.shape[axis + 1 :]
    full, cut = n // size, (slice(None),) * axis
    groups = weight[(*cut, slice(full * size))].reshape(*before, full, size, *after)
    parts = [reduce.reduce(groups, axis=axis + 1, initial=0.0)]
    if n % size:
        parts.append(reduce.reduce(weight[(*cut, slice(full * size, n))], axis=axis, initial=0.0, keepdims=True))
    return np.concatenate(parts, axis)
