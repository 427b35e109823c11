"""Resize and GridSample: values between the elements of a tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.table import Call, numbers_of, operator


@operator("Resize", numbers=(1, 2, 3), since=11)
def resize(call: Call, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None) -> Tensor:
    """Along one axis after the other: each element of the result is a weighted sum of a few of the axis."""
    axes = [axis % x.ndim for axis in call.get("axes") or range(x.ndim)]
    factors, targets = _targets(call, x, axes, scales, sizes)
    crop = [] if roi is None or not roi.numel() else [float(one) for one in roi.tolist()]
    outside = []
    for place, axis in enumerate(axes):
        size, target, factor = x.shape[axis], targets[place], factors[place]
        span = (crop[place], crop[place + len(axes)]) if crop else (0.0, 1.0)
        is_cropping = call.get("coordinate_transformation_mode") == "tf_crop_and_resize"
        if size == target and factor == 1 and not is_cropping:
            continue
        where = _coordinates(call, size, target, factor, span)
        index, weight = _taps(call, where, size, factor)
        x = _gathered(x, axis, index, weight)
        if is_cropping:
            outside.append((axis, (where < 0) | (where > size - 1)))
    for axis, beyond in outside:
        shape = [1] * x.ndim
        shape[axis] = -1
        x = x.masked_fill(torch.from_numpy(beyond).to(x.device).reshape(shape), call.get("extrapolation_value", 0.0))
    return x


@operator("Upsample", numbers=(1,), since=9)
def upsample(call: Call, x: Tensor, scales: Tensor) -> Tensor:
    for axis, factor in enumerate(scales.tolist()):
        target = math.floor(x.shape[axis] * factor)
        if target != x.shape[axis]:
            where = np.arange(target) / factor
            x = _gathered(x, axis, *_taps(call, where, x.shape[axis], factor, rounding="floor"))
    return x


def _targets(call: Call, x: Tensor, axes: list[int], scales: Tensor | None, sizes: Tensor | None) -> tuple[list[float], list[int]]:
    """Factor and size of each axis."""
    old = [x.shape[axis] for axis in axes]
    if sizes is None or not sizes.numel():
        assert scales is not None
        factors = [float(one) for one in scales.tolist()]
        return factors, [math.floor(size * factor) for size, factor in zip(old, factors, strict=True)]
    targets, policy = numbers_of(sizes), call.get("keep_aspect_ratio_policy", "stretch")
    factors = [target / size for target, size in zip(targets, old, strict=True)]
    if policy != "stretch":
        factor = min(factors) if policy == "not_larger" else max(factors)
        factors = [factor] * len(old)
        targets = [math.floor(factor * size + 0.5) for size in old]
    return factors, targets


def _coordinates(call: Call, size: int, target: int, factor: float, span: tuple[float, float]) -> np.ndarray:
    """Where in the axis of `size` each of `target` elements lies: float64 [target]."""
    places, mode = np.arange(target, dtype=np.float64), call.get("coordinate_transformation_mode", "half_pixel")
    if mode == "asymmetric":
        return places / factor
    if mode == "align_corners":
        return places * (size - 1) / (factor * size - 1) if target > 1 else places * 0
    if mode == "tf_crop_and_resize":
        start, end = span
        if target > 1:
            return start * (size - 1) + places * (end - start) * (size - 1) / (target - 1)
        return np.full(1, 0.5 * (start + end) * (size - 1))
    where = (places + 0.5) / factor - 0.5
    if mode == "pytorch_half_pixel" and target == 1:
        return where * 0
    if mode == "half_pixel_symmetric":
        where += size / 2 * (1 - target / (factor * size))
    return where


def _taps(call: Call, where: np.ndarray, size: int, factor: float, rounding: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Indices and weights [target, taps] of the elements that each one is made of."""
    mode = call.get("mode", "nearest")
    if mode == "nearest":
        rounding = rounding or call.get("nearest_mode", "round_prefer_floor")
        index = {"round_prefer_floor": lambda: np.ceil(where - 0.5), "round_prefer_ceil": lambda: np.floor(where + 0.5),
                 "floor": lambda: np.floor(where), "ceil": lambda: np.ceil(where)}[rounding]()  # fmt: skip
        return np.clip(index, 0, size - 1).astype(np.int64)[:, None], np.ones((len(where), 1))
    shrink = min(factor, 1.0) if call.get("antialias", 0) else 1.0
    reach = (2 if mode == "cubic" else 1) / shrink
    first = np.floor(where) - math.ceil(reach) + 1
    index = first[:, None] + np.arange(2 * math.ceil(reach))
    distance = np.abs(index - where[:, None]) * shrink
    weight = _cubic(distance, call.get("cubic_coeff_a", -0.75)) if mode == "cubic" else np.clip(1 - distance, 0, None)
    if call.get("exclude_outside", 0):
        weight = weight * ((index >= 0) & (index < size))
    if call.get("exclude_outside", 0) or shrink != 1:
        weight = weight / weight.sum(1, keepdims=True)
    return np.clip(index, 0, size - 1).astype(np.int64), weight


def _cubic(distance: np.ndarray, a: float) -> np.ndarray:
    """Keys' kernel."""
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * a - 4 * a
    return np.where(distance <= 1, near, np.where(distance < 2, far, 0))


def _gathered(x: Tensor, axis: int, index: np.ndarray, weight: np.ndarray) -> Tensor:
    """Sum over taps of the elements at `index` along `axis`, weighted."""
    parts: Tensor | None = None
    shape: Sequence[int] = [-1 if one == axis else 1 for one in range(x.ndim)]
    for tap in range(index.shape[1]):
        part = x.index_select(axis, torch.from_numpy(index[:, tap].copy()).to(x.device))
        if index.shape[1] > 1:
            part = part * torch.from_numpy(weight[:, tap].copy()).to(device=x.device, dtype=x.dtype).reshape(shape)
        parts = part if parts is None else parts + part
    assert parts is not None
    return parts


@operator("GridSample")
def grid_sample(call: Call, x: Tensor, grid: Tensor) -> Tensor:
    mode = {"linear": "bilinear", "bilinear": "bilinear", "nearest": "nearest", "cubic": "bicubic", "bicubic": "bicubic"}
    return functional.grid_sample(
        x, grid, mode=mode[call.get("mode", "linear")], padding_mode=call.get("padding_mode", "zeros"),
        align_corners=bool(call.get("align_corners", 0)),
    )  # fmt: skip
