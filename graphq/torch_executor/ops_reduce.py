"""Reductions, softmax, sorting and accumulation along axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphq.torch_executor.table import Call, axes_of, numbers_of, operator


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keepdim=keep)
    return x.to(x.dtype)


_REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keep, dtype=x.dtype),
    "ReduceL2": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype).sqrt(),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keep).log(),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
    "ReduceMax": lambda x, axes, keep: torch.amax(x, axes, keep),
    "ReduceMin": lambda x, axes, keep: torch.amin(x, axes, keep),
    "ReduceMean": lambda x, axes, keep: torch.mean(x, axes, keep),
    "ReduceProd": _product,
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keep, dtype=x.dtype),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keep, dtype=x.dtype),
}


def _reduction(name: str, reduce: Callable[[Tensor, list[int], bool], Tensor]) -> None:
    @operator(name, numbers=(1,))
    def run(call: Call, x: Tensor, axes: Tensor | None = None) -> Tensor:
        chosen = axes_of(call, axes)
        if not chosen:
            if call.get("noop_with_empty_axes", 0):
                chosen = []
                return _elementwise(name, x)
            chosen = list(range(x.ndim))
        chosen = [axis % max(x.ndim, 1) for axis in chosen]
        if not chosen:
            return _elementwise(name, x)
        if name in _EMPTY and any(x.shape[axis] == 0 for axis in chosen):
            return _of_nothing(x, chosen, bool(call.get("keepdims", 1)), _EMPTY[name])
        return reduce(x, chosen, bool(call.get("keepdims", 1)))


_EMPTY = {"ReduceMax": -1, "ReduceMin": 1}
"""Reductions that torch refuses for no elements: the sign of the infinity, or of the end of the integers, that they then are."""


def _of_nothing(x: Tensor, axes: list[int], keep: bool, sign: int) -> Tensor:
    shape = [1 if index in axes else size for index, size in enumerate(x.shape) if keep or index not in axes]
    if x.is_floating_point():
        return torch.full(shape, sign * float("inf"), dtype=x.dtype, device=x.device)
    if x.dtype == torch.bool:
        return torch.full(shape, sign > 0, device=x.device)
    info = torch.iinfo(x.dtype)
    return torch.full(shape, info.max if sign > 0 else info.min, dtype=x.dtype, device=x.device)


def _elementwise(name: str, x: Tensor) -> Tensor:
    """A reduction along no axis."""
    if name in ("ReduceL1", "ReduceL2"):
        return x.abs()
    if name == "ReduceLogSum":
        return x.log()
    return x.square() if name == "ReduceSumSquare" else x


for _name, _reduce in _REDUCTIONS.items():
    _reduction(_name, _reduce)


def _softmax_like(call: Call, x: Tensor, function: Callable[..., Tensor]) -> Tensor:
    if call.opset >= 13:
        return function(x, call.get("axis", -1))
    axis = call.get("axis", 1) % max(x.ndim, 1)
    return function(x.flatten(axis) if x.ndim else x, -1).reshape(x.shape)


@operator("Softmax")
def softmax(call: Call, x: Tensor) -> Tensor:
    return _softmax_like(call, x, torch.softmax)


@operator("LogSoftmax")
def log_softmax(call: Call, x: Tensor) -> Tensor:
    return _softmax_like(call, x, torch.log_softmax)


@operator("Hardmax", gradient="none")
def hardmax(call: Call, x: Tensor) -> Tensor:
    def one(x: Tensor, axis: int) -> Tensor:
        return torch.zeros_like(x).scatter(axis, _first(x, axis, True), 1)

    return _softmax_like(call, x, one)


def _first(x: Tensor, axis: int, largest: bool) -> Tensor:
    """Index of the first extremum along `axis`, kept: torch does not say which of several equal ones it returns."""
    extremum = torch.amax(x, axis, True) if largest else torch.amin(x, axis, True)
    return (x == extremum).to(torch.uint8).argmax(axis, keepdim=True)


def _arg(call: Call, x: Tensor, largest: bool) -> Tensor:
    axis = call.get("axis", 0)
    if call.get("select_last_index", 0):
        found = x.shape[axis] - 1 - _first(x.flip(axis), axis, largest)
    else:
        found = _first(x, axis, largest)
    return found if call.get("keepdims", 1) else found.squeeze(axis)


@operator("ArgMax", gradient="none")
def arg_max(call: Call, x: Tensor) -> Tensor:
    return _arg(call, x, True)


@operator("ArgMin", gradient="none")
def arg_min(call: Call, x: Tensor) -> Tensor:
    return _arg(call, x, False)


@operator("TopK", numbers=(1,), since=10)
def top_k(call: Call, x: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """In order, whether sorted or not; of equal elements those of lower index first."""
    axis = call.get("axis", -1)
    indices = torch.argsort(x, dim=axis, descending=bool(call.get("largest", 1)), stable=True).narrow(axis, 0, numbers_of(k)[0])
    return torch.gather(x, axis, indices), indices


def _accumulated(call: Call, x: Tensor, axis: Tensor, function: Callable[..., Tensor], first: int) -> Tensor:
    dim = numbers_of(axis)[0]
    x = x.flip(dim) if call.get("reverse", 0) else x
    if call.get("exclusive", 0):
        x = torch.cat([torch.full_like(x.narrow(dim, 0, 1), first), x.narrow(dim, 0, x.shape[dim] - 1)], dim)
    y = function(x, dim).to(x.dtype)
    return y.flip(dim) if call.get("reverse", 0) else y


@operator("CumSum", numbers=(1,))
def cum_sum(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _accumulated(call, x, axis, torch.cumsum, 0)


@operator("CumProd", numbers=(1,))
def cum_prod(call: Call, x: Tensor, axis: Tensor) -> Tensor:
    return _accumulated(call, x, axis, torch.cumprod, 1)


@operator("LpNormalization")
def lp_normalization(call: Call, x: Tensor) -> Tensor:
    size: Any = torch.linalg.vector_norm(x, call.get("p", 2), call.get("axis", -1), keepdim=True)
    return torch.where(size == 0, torch.zeros_like(x), x / torch.where(size == 0, torch.ones_like(size), size))
