"""Patches and boxes."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.ops_conv import geometry
from graphq.torch_executor.table import Call, numbers_of, operator


@operator("Col2Im", numbers=(1, 2))
def col2im(call: Call, x: Tensor, image: Tensor, block: Tensor) -> Tensor:
    """Sums patches [N, C * patch, positions] at their places, over any number of axes."""
    sizes, kernel = numbers_of(image), numbers_of(block)
    rank = len(sizes)
    strides, gaps = call.get("strides") or [1] * rank, call.get("dilations") or [1] * rank
    pads = call.get("pads") or [0] * (2 * rank)
    places = torch.zeros(1, dtype=torch.int64)
    inside = torch.ones(1, dtype=torch.bool)
    counts = [(sizes[a] + pads[a] + pads[rank + a] - gaps[a] * (kernel[a] - 1) - 1) // strides[a] + 1 for a in range(rank)]
    for axis in range(rank):
        shape = [1] * (2 * rank)
        shape[axis], shape[rank + axis] = kernel[axis], counts[axis]
        where = torch.arange(kernel[axis]).reshape(-1, 1) * gaps[axis] + torch.arange(counts[axis]) * strides[axis] - pads[axis]
        places = places * sizes[axis] + where.reshape(shape)
        inside = inside & ((where >= 0) & (where < sizes[axis])).reshape(shape)
    total, channels = math.prod(sizes), x.shape[1] // math.prod(kernel)
    index = torch.where(inside, places, total).reshape(-1).to(x.device)
    flat = x.reshape(x.shape[0], channels, -1)
    summed = x.new_zeros(x.shape[0], channels, total + 1).index_add(2, index, flat)
    return summed[..., :total].reshape(x.shape[0], channels, *sizes)


@operator("NonMaxSuppression", numbers=(2, 3, 4), gradient="none")
def non_max_suppression(call: Call, boxes: Tensor, scores: Tensor, most: Tensor | None = None, overlap: Tensor | None = None,
                        least: Tensor | None = None) -> Tensor:  # fmt: skip
    """Rows (batch, class, box), the best box of each class first."""
    count = numbers_of(most)[0] if most is not None else 0
    limit = float(overlap) if overlap is not None else 0.0
    if call.get("center_point_box", 0):
        center, half = boxes[..., :2], boxes[..., 2:] / 2
        low, high = center - half, center + half
    else:
        low, high = torch.minimum(boxes[..., :2], boxes[..., 2:]), torch.maximum(boxes[..., :2], boxes[..., 2:])
    area = (high - low).prod(-1)
    rows = []
    for batch in range(scores.shape[0]):
        for kind in range(scores.shape[1]):
            values = scores[batch, kind]
            order = torch.argsort(values, descending=True, stable=True).tolist()
            kept: list[int] = []
            for one in order:
                if len(kept) >= count or (least is not None and values[one] <= least.reshape(())):
                    break
                if kept:
                    both = torch.minimum(high[batch, one], high[batch, kept]) - torch.maximum(low[batch, one], low[batch, kept])
                    shared = both.clamp(min=0).prod(-1)
                    if bool((shared / (area[batch, one] + area[batch, kept] - shared) > limit).any()):
                        continue
                kept.append(one)
            rows += [[batch, kind, one] for one in kept]
    return torch.tensor(rows, dtype=torch.int64, device=boxes.device).reshape(-1, 3)


def _between(image: Tensor, y: Tensor, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The four neighbours of the points (y, x) of image [C, H, W], and their weights; none where a point lies outside."""
    height, width = image.shape[1:]
    inside = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(min=0), x.clamp(min=0)
    top, left = y.floor().long().clamp(max=height - 1), x.floor().long().clamp(max=width - 1)
    down, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    ly = torch.where(top >= height - 1, torch.zeros_like(y), y - top)
    lx = torch.where(left >= width - 1, torch.zeros_like(x), x - left)
    corners = [image[:, top, left], image[:, top, right], image[:, down, left], image[:, down, right]]
    weights = [(1 - ly) * (1 - lx), (1 - ly) * lx, ly * (1 - lx), ly * lx]
    return corners, [weight * inside for weight in weights]


@operator("RoiAlign")
def roi_align(call: Call, x: Tensor, rois: Tensor, batches: Tensor) -> Tensor:
    rows, columns, ratio = call.get("output_height", 1), call.get("output_width", 1), call.get("sampling_ratio", 0)
    mode = call.get("coordinate_transformation_mode", "half_pixel" if call.opset >= 16 else "output_half_pixel")
    shift, least = (0.5, None) if mode == "half_pixel" else (0.0, 1.0)
    found = []
    for roi, batch in zip(rois * call.get("spatial_scale", 1.0) - shift, batches.tolist(), strict=True):
        left, top, right, bottom = roi.unbind()
        height, width = bottom - top, right - left
        if least is not None:
            height, width = height.clamp(min=least), width.clamp(min=least)
        taps_y = ratio or max(math.ceil(float(height) / rows), 1)
        taps_x = ratio or max(math.ceil(float(width) / columns), 1)
        steps_y = (torch.arange(rows * taps_y, device=x.device, dtype=x.dtype) + 0.5) / taps_y
        steps_x = (torch.arange(columns * taps_x, device=x.device, dtype=x.dtype) + 0.5) / taps_x
        y = (top + steps_y * height / rows).reshape(-1, 1).expand(-1, columns * taps_x)
        at = (left + steps_x * width / columns).reshape(1, -1).expand(rows * taps_y, -1)
        corners, weights = _between(x[batch], y, at)
        parts = [corner * weight for corner, weight in zip(corners, weights, strict=True)]
        if call.get("mode", "avg") == "max":
            best = torch.stack(parts).amax(0)
            found.append(best.reshape(-1, rows, taps_y, columns, taps_x).amax((2, 4)))
        else:
            found.append(torch.stack(parts).sum(0).reshape(-1, rows, taps_y, columns, taps_x).mean((2, 4)))
    return torch.stack(found) if found else x.new_zeros(0, x.shape[1], rows, columns)


@operator("Unique", gradient="none")
def unique(call: Call, x: Tensor) -> tuple[Tensor, ...]:
    axis = call.get("axis")
    x, axis = (x.reshape(-1), 0) if axis is None else (x, axis)
    values, inverse, counts = torch.unique(x, sorted=True, return_inverse=True, return_counts=True, dim=axis)
    places = torch.arange(x.shape[axis], device=x.device)
    first = torch.full_like(counts, x.shape[axis]).scatter_reduce(0, inverse, places, "amin")
    if not call.get("sorted", 1):
        order = torch.argsort(first)
        values, first, counts = values.index_select(axis, order), first[order], counts[order]
        inverse = torch.argsort(order)[inverse]
    return (values, first, inverse, counts)[: len(call.wanted)] if len(call.wanted) > 1 else values


@operator("DeformConv")
def deform_conv(call: Call, x: Tensor, weight: Tensor, offset: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """Over two axes: each tap of the kernel reads between the elements, `offset` away from its place; outside is 0."""
    (batch, channels, height, width), (taps_y, taps_x) = x.shape, weight.shape[2:]
    strides, gaps, before, _ = geometry(call, x.shape[2:], weight.shape[2:])
    parts, groups, (rows, columns) = call.get("offset_group", 1), call.get("group", 1), offset.shape[2:]
    moved = offset.reshape(batch * parts, taps_y * taps_x, 2, rows, columns)
    tap = torch.arange(taps_y * taps_x, device=x.device).reshape(-1, 1, 1)
    y = tap // taps_x * gaps[0] + torch.arange(rows, device=x.device).reshape(-1, 1) * strides[0] - before[0] + moved[:, :, 0]
    at = tap % taps_x * gaps[1] + torch.arange(columns, device=x.device) * strides[1] - before[1] + moved[:, :, 1]
    grid = torch.stack([(2 * at + 1) / width - 1, (2 * y + 1) / height - 1], -1).flatten(1, 2)
    read = functional.grid_sample(x.reshape(batch * parts, -1, height, width), grid, align_corners=False)
    read = read.reshape(batch, parts, channels // parts, taps_y * taps_x, rows, columns)
    if mask is not None:
        read = read * mask.reshape(batch, parts, 1, taps_y * taps_x, rows, columns)
    found = torch.matmul(weight.reshape(groups, weight.shape[0] // groups, -1), read.reshape(batch, groups, -1, rows * columns))
    found = found.reshape(batch, -1, rows, columns)
    return found if bias is None else found + bias.reshape(-1, 1, 1)
