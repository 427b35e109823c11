"""Reading and writing by index."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from graphq.torch_executor.table import Call, operator


def _wrapped(indices: Tensor, size: int) -> Tensor:
    """Indices from the front, of ones that may count from the back."""
    indices = indices.to(torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@operator("Gather")
def gather(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    index = _wrapped(indices, x.shape[axis])
    if index.ndim == 0:
        return x.index_select(axis, index.reshape(1)).squeeze(axis)
    return x.index_select(axis, index.reshape(-1)).reshape(*x.shape[:axis], *index.shape, *x.shape[axis + 1 :])


@operator("GatherElements")
def gather_elements(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


def _cells(indices: Tensor, sizes: torch.Size) -> tuple[Tensor, ...]:
    """The last axis of `indices` as one index for each of the first axes of a tensor of `sizes`."""
    return tuple(_wrapped(one, sizes[place]) for place, one in enumerate(indices.unbind(-1)))


@operator("GatherND")
def gather_nd(call: Call, x: Tensor, indices: Tensor) -> Tensor:
    shared = call.get("batch_dims", 0)
    if not shared:
        return x[_cells(indices, x.shape)]
    lead = x.shape[:shared]
    rows = torch.arange(math.prod(lead), device=x.device).reshape(lead + (1,) * (indices.ndim - 1 - shared))
    return x.flatten(0, shared - 1)[(rows, *_cells(indices, x.shape[shared:]))]


_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


@operator("ScatterElements", "Scatter")
def scatter_elements(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    axis = call.get("axis", 0)
    index, how = _wrapped(indices, x.shape[axis]), call.get("reduction", "none")
    if how == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, _REDUCE[how])


@operator("ScatterND")
def scatter_nd(call: Call, x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    cells, how = _cells(indices, x.shape), call.get("reduction", "none")
    if how in ("none", "add"):
        return x.index_put(cells, updates, accumulate=how == "add")
    count, rest = len(cells), x.shape[len(cells) :]
    strides = [math.prod(x.shape[place + 1 : count]) for place in range(count)]
    row = sum(cell * stride for cell, stride in zip(cells, strides, strict=True))
    flat = x.reshape(-1, *rest)
    index = row.reshape(-1, *[1] * len(rest)).expand(-1, *rest)  # type: ignore[union-attr]
    return flat.scatter_reduce(0, index, updates.reshape(-1, *rest), _REDUCE[how]).reshape(x.shape)


@operator("TensorScatter")
def tensor_scatter(call: Call, past: Tensor, update: Tensor, places: Tensor | None = None) -> Tensor:
    axis = call.get("axis", -2) % past.ndim
    steps = torch.arange(update.shape[axis], device=past.device)
    index = (0 if places is None else places.to(torch.int64).reshape(-1, 1)) + steps.reshape(1, -1)
    index = index.expand(past.shape[0], -1)
    index = index % past.shape[axis] if call.get("mode", "linear") == "circular" else index
    shape = [past.shape[0], *[1] * (past.ndim - 1)]
    shape[axis] = update.shape[axis]
    return past.scatter(axis, index.reshape(shape).expand(update.shape), update)


@operator("NonZero", smooth=False)
def non_zero(call: Call, x: Tensor) -> Tensor:
    return torch.nonzero(x).T.contiguous()


@operator("Compress")
def compress(call: Call, x: Tensor, condition: Tensor) -> Tensor:
    axis = call.get("axis")
    if axis is None:
        x, axis = x.reshape(-1), 0
    return x.index_select(axis, torch.nonzero(condition.reshape(-1)).reshape(-1))


@operator("ReverseSequence")
def reverse_sequence(call: Call, x: Tensor, lengths: Tensor) -> Tensor:
    batch, time = call.get("batch_axis", 1), call.get("time_axis", 0)
    steps = torch.arange(x.shape[time], device=x.device)
    ends = lengths.to(device=x.device, dtype=torch.int64).reshape(-1, 1)
    index = torch.where(steps < ends, ends - 1 - steps, steps)
    shape = [1] * x.ndim
    shape[batch], shape[time] = x.shape[batch], x.shape[time]
    return torch.gather(x, time, (index if batch < time else index.T).reshape(shape).expand(x.shape))
