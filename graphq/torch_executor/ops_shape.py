"""Shapes: what makes tensors of numbers alone, and what rearranges tensors without computing."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphq.ir import DataType
from graphq.torch_executor.table import Call, axes_of, numbers_of, operator
from graphq.torch_executor.tensors import holder

# ---- tensors from numbers -------------------------------------------------------------------------------------------


@operator("Shape", gradient="none")
def shape(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(list(x.shape)[call.get("start", 0) : call.get("end")], dtype=torch.int64)


@operator("Size", gradient="none")
def size(call: Call, x: Tensor) -> Tensor:
    return torch.tensor(x.numel())


@operator("ConstantOfShape", numbers=(0,), gradient="none")
def constant_of_shape(call: Call, sizes: Tensor) -> Tensor:
    value = call.get("value")
    if value is None:
        return torch.zeros(numbers_of(sizes), dtype=call.dtype, device=call.device)
    return torch.full(numbers_of(sizes), value.item(), dtype=value.dtype, device=call.device)


@operator("Range", numbers=(0, 1, 2), gradient="none")
def range_(call: Call, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    begin, end, step = start.item(), limit.item(), delta.item()
    count = max(math.ceil((end - begin) / step), 0)
    if not start.is_floating_point():
        return torch.arange(count, dtype=torch.int64, device=call.device).mul_(step).add_(begin).to(start.dtype)
    return torch.arange(count, device=call.device).to(call.dtype) * step + begin


@operator("EyeLike", gradient="none")
def eye_like(call: Call, x: Tensor) -> Tensor:
    kind = call.get("dtype")
    made = holder(DataType(kind), call.dtype) if kind else x.dtype
    ones = torch.ones(x.shape, dtype=torch.uint8, device=x.device)
    return (torch.tril(ones, call.get("k", 0)) & torch.triu(ones, call.get("k", 0))).to(made)


@operator("OneHot", numbers=(1,))
def one_hot(call: Call, indices: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count, axis = numbers_of(depth)[0], call.get("axis", -1)
    axis = axis % (indices.ndim + 1)
    places = torch.arange(count, device=indices.device).reshape([count] + [1] * (indices.ndim - axis))
    index = indices.to(torch.int64).unsqueeze(axis)
    index = torch.where((index >= -count) & (index < count), index % count, -1)
    return torch.where(index == places, values[1], values[0])


# ---- rearranging ----------------------------------------------------------------------------------------------------


@operator("Reshape", numbers=(1,))
def reshape(call: Call, x: Tensor, sizes: Tensor) -> Tensor:
    wanted = numbers_of(sizes)
    if not call.get("allowzero", 0) and 0 in wanted:
        wanted = [x.shape[index] if one == 0 else one for index, one in enumerate(wanted)]
    return x.reshape(wanted)


@operator("Flatten")
def flatten(call: Call, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@operator("Transpose")
def transpose(call: Call, x: Tensor) -> Tensor:
    return x.permute(call.get("perm") or list(range(x.ndim))[::-1])


@operator("Squeeze", numbers=(1,))
def squeeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = axes_of(call, axes)
    return torch.squeeze(x) if chosen is None else torch.squeeze(x, chosen)


@operator("Unsqueeze", numbers=(1,))
def unsqueeze(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
    chosen = axes_of(call, axes) or []
    rank = x.ndim + len(chosen)
    for axis in sorted(axis % rank for axis in chosen):
        x = x.unsqueeze(axis)
    return x


@operator("Concat")
def concat(call: Call, *operands: Tensor) -> Tensor:
    return torch.cat(operands, call.get("axis", 1))


@operator("Split", numbers=(1,))
def split(call: Call, x: Tensor, sizes: Tensor | None = None) -> Any:
    axis = call.get("axis", 0)
    parts = numbers_of(sizes) or call.get("split")
    if not parts:
        total, count = x.shape[axis], call.get("num_outputs") or len(call.wanted)
        most = -(-total // count)
        parts = [max(min(most, total - index * most), 0) for index in range(count)]
    found = torch.split(x, parts, axis)
    return found[0] if len(call.wanted) == 1 else found


@operator("Slice", numbers=(1, 2, 3, 4))
def slice_(call: Call, x: Tensor, starts: Tensor | None = None, ends: Tensor | None = None, axes: Tensor | None = None,
           steps: Tensor | None = None) -> Tensor:  # fmt: skip
    begin = numbers_of(starts) if starts is not None else call.get("starts")
    end = numbers_of(ends) if ends is not None else call.get("ends")
    chosen = axes_of(call, axes) or list(range(len(begin)))
    index: list[Any] = [slice(None)] * x.ndim
    turned = []
    for first, last, axis, step in zip(begin, end, chosen, numbers_of(steps) or [1] * len(begin), strict=True):
        axis %= x.ndim
        taken = range(x.shape[axis])[_slice(first, last, step, x.shape[axis])]
        if step > 0:
            index[axis] = slice(taken.start, max(taken.stop, taken.start), step)
        else:
            turned.append(axis)
            index[axis] = slice(taken[-1], taken[0] + 1, -step) if len(taken) else slice(0, 0)
    y = x[tuple(index)]
    return y.flip(turned) if turned else y


def _slice(first: int, last: int, step: int, size: int) -> slice:
    """ONNX's bounds as Python's: a backward slice starts at the first element at the least, and takes it if it ends below."""
    if step < 0:
        return slice(max(first, -size), None if last < -size else last, step)
    return slice(first, last, step)


@operator("Expand", numbers=(1,))
def expand(call: Call, x: Tensor, sizes: Tensor) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, numbers_of(sizes)))


@operator("Tile", numbers=(1,))
def tile(call: Call, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(numbers_of(repeats))


@operator("Pad", numbers=(1, 3))
def pad(call: Call, x: Tensor, pads: Tensor | None = None, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    sizes = numbers_of(pads) if pads is not None else call.get("pads")
    chosen = [axis % x.ndim for axis in numbers_of(axes)] or list(range(x.ndim))
    before = dict(zip(chosen, sizes[: len(chosen)], strict=True))
    after = dict(zip(chosen, sizes[len(chosen) :], strict=True))
    mode = call.get("mode", "constant")
    if mode == "constant":
        flat = [one for axis in reversed(range(x.ndim)) for one in (before.get(axis, 0), after.get(axis, 0))]
        fill = call.get("value", 0.0) if value is None else value
        if isinstance(fill, Tensor) and fill.requires_grad:
            inside = functional.pad(torch.ones_like(x, dtype=torch.bool), flat, value=False)
            return torch.where(inside, functional.pad(x, flat), fill.reshape(()))
        return functional.pad(x, flat, value=fill.item() if isinstance(fill, Tensor) else fill)
    for axis in chosen:
        low, high, size = before[axis], after[axis], x.shape[axis]
        if low or high:
            x = x.index_select(axis, _source(torch.arange(-low, size + high, device=x.device), size, mode))
    return x


def _source(index: Tensor, size: int, mode: str) -> Tensor:
    """Which of `size` elements stands at `index`, which may lie outside."""
    if mode == "edge":
        return index.clamp(0, size - 1)
    if mode == "wrap":
        return index % size
    period = max(2 * (size - 1), 1)
    index = index % period
    return torch.where(index < size, index, period - index)


@operator("DepthToSpace")
def depth_to_space(call: Call, x: Tensor) -> Tensor:
    block = call.get("blocksize")
    n, c, h, w = x.shape
    if call.get("mode", "DCR") == "CRD":
        return functional.pixel_shuffle(x, block)
    return x.reshape(n, block, block, -1, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, -1, h * block, w * block)


@operator("SpaceToDepth")
def space_to_depth(call: Call, x: Tensor) -> Tensor:
    block = call.get("blocksize")
    n, c, h, w = x.shape
    if call.get("mode", "DCR") == "CRD":
        return functional.pixel_unshuffle(x, block)
    return x.reshape(n, c, h // block, block, w // block, block).permute(0, 3, 5, 1, 2, 4).reshape(n, -1, h // block, w // block)


@operator("Trilu", numbers=(1,))
def trilu(call: Call, x: Tensor, k: Tensor | None = None) -> Tensor:
    diagonal = numbers_of(k)[0] if k is not None else 0
    return torch.triu(x, diagonal) if call.get("upper", 1) else torch.tril(x, diagonal)


