"""Convolutions and pooling, over any number of spatial axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.table import Call, operator

_CONV = {1: functional.conv1d, 2: functional.conv2d, 3: functional.conv3d}
_CONV_TRANSPOSE = {1: functional.conv_transpose1d, 2: functional.conv_transpose2d, 3: functional.conv_transpose3d}
_MAX_POOL = {1: functional.max_pool1d, 2: functional.max_pool2d, 3: functional.max_pool3d}
_AVG_POOL = {1: functional.avg_pool1d, 2: functional.avg_pool2d, 3: functional.avg_pool3d}

# ---- geometry -------------------------------------------------------------------------------------------------------


def geometry(call: Call, sizes: Sequence[int], kernel: Sequence[int]) -> tuple[list[int], list[int], list[int], list[int]]:
    """Strides, dilations, and padding before and after, of windows of `kernel` over spatial axes of `sizes`."""
    rank = len(kernel)
    strides, dilations = list(call.get("strides") or [1] * rank), list(call.get("dilations") or [1] * rank)
    pads, auto = list(call.get("pads") or [0] * (2 * rank)), call.get("auto_pad", "NOTSET")
    before, after = pads[:rank], pads[rank:]
    if auto == "VALID":
        before, after = [0] * rank, [0] * rank
    elif auto in ("SAME_UPPER", "SAME_LOWER"):
        spans = [(one - 1) * step + 1 for one, step in zip(kernel, dilations, strict=True)]
        total = [max((-(-size // step) - 1) * step + span - size, 0) for size, step, span in zip(sizes, strides, spans, strict=True)]
        small, large = [one // 2 for one in total], [one - one // 2 for one in total]
        before, after = (small, large) if auto == "SAME_UPPER" else (large, small)
    return strides, dilations, before, after


def flat_pads(before: Sequence[int], after: Sequence[int]) -> list[int]:
    """Padding in the order of `torch.nn.functional.pad`."""
    return [one for pair in zip(reversed(before), reversed(after), strict=True) for one in pair]


def _windows(x: Tensor, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], counts: Sequence[int],
             before: Sequence[int], fill: float) -> Tensor:  # fmt: skip
    """The elements of each window in the last axis: [N, C, *counts, product of kernel]; `fill` outside of `x`."""
    rank = len(kernel)
    reach = [(count - 1) * step + (one - 1) * gap + 1 for count, step, one, gap in zip(counts, strides, kernel, dilations, strict=True)]
    after = [far - size - low for far, size, low in zip(reach, x.shape[2:], before, strict=True)]
    x = functional.pad(x, flat_pads(before, after), value=fill)
    for axis in range(rank):
        index = torch.arange(counts[axis]).reshape(-1, 1) * strides[axis] + torch.arange(kernel[axis]) * dilations[axis]
        shape = (*x.shape[: 2 + axis], counts[axis], kernel[axis], *x.shape[3 + axis :])
        x = x.index_select(2 + axis, index.reshape(-1).to(x.device)).reshape(shape).movedim(3 + axis, -1)
    return x.flatten(-rank)


def _counts(call: Call, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int],
            before: Sequence[int], after: Sequence[int]) -> list[int]:  # fmt: skip
    """Windows along each axis; with `ceil_mode` a last one that is partly outside, if it starts inside."""
    found = []
    for size, one, step, gap, low, high in zip(sizes, kernel, strides, dilations, before, after, strict=True):
        room = size + low + high - (one - 1) * gap - 1
        count = (-(-room // step) if call.get("ceil_mode", 0) else room // step) + 1
        found.append(count - 1 if call.get("ceil_mode", 0) and (count - 1) * step >= size + low else count)
    return found


# ---- convolutions ---------------------------------------------------------------------------------------------------


@operator("Conv")
def conv(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    strides, dilations, before, after = geometry(call, x.shape[2:], weight.shape[2:])
    if before != after:
        x, before = functional.pad(x, flat_pads(before, after)), [0] * len(before)
    return _CONV[weight.ndim - 2](x, weight, bias, strides, before, dilations, call.get("group", 1))


@operator("ConvTranspose")
def conv_transpose(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank, sizes, kernel = weight.ndim - 2, x.shape[2:], weight.shape[2:]
    strides, dilations = list(call.get("strides") or [1] * rank), list(call.get("dilations") or [1] * rank)
    extra, pads = list(call.get("output_padding") or [0] * rank), list(call.get("pads") or [0] * (2 * rank))
    auto, wanted = call.get("auto_pad", "NOTSET"), call.get("output_shape")
    if auto in ("SAME_UPPER", "SAME_LOWER") and not wanted:
        wanted = [size * step for size, step in zip(sizes, strides, strict=True)]
    if wanted:
        full = [(s - 1) * step + (k - 1) * gap + 1 for s, step, k, gap in zip(sizes, strides, kernel, dilations, strict=True)]
        total = [one + more - size for one, more, size in zip(full, extra, wanted[-rank:], strict=True)]
        small, large = [one // 2 for one in total], [one - one // 2 for one in total]
        pads = small + large if auto == "SAME_UPPER" else large + small
    elif auto == "VALID":
        pads = [0] * (2 * rank)
    y = _CONV_TRANSPOSE[rank](x, weight, None, strides, 0, 0, call.get("group", 1), dilations)
    if any(pads) or any(extra):
        y = functional.pad(y, flat_pads([-one for one in pads[:rank]], [more - one for more, one in zip(extra, pads[rank:], strict=True)]))
    return y if bias is None else y + bias.reshape(-1, *[1] * rank)


# ---- pooling --------------------------------------------------------------------------------------------------------


@operator("MaxPool")
def max_pool(call: Call, x: Tensor) -> Any:
    kernel = call.get("kernel_shape")
    strides, dilations, before, after = geometry(call, x.shape[2:], kernel)
    with_indices = len(call.wanted) > 1 and call.wanted[1]
    small = all(2 * pad <= one for pad, one in zip(before, kernel, strict=True))
    if before == after and small and x.is_floating_point() and not with_indices and len(kernel) in _MAX_POOL:
        return _MAX_POOL[len(kernel)](x, kernel, strides, before, dilations, bool(call.get("ceil_mode", 0)))
    counts = _counts(call, x.shape[2:], kernel, strides, dilations, before, after)
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    found = _windows(x, kernel, strides, dilations, counts, before, least)
    if not with_indices:
        return found.amax(-1)
    places = torch.arange(math.prod(x.shape[2:]), device=x.device)
    if call.get("storage_order", 0):
        places = places.reshape(x.shape[:1:-1]).permute(*reversed(range(x.ndim - 2)))
    places = places.reshape(1, 1, *x.shape[2:])
    best = found.argmax(-1, keepdim=True)
    shown = _windows(places, kernel, strides, dilations, counts, before, -1).expand(found.shape).gather(-1, best).squeeze(-1)
    rows = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape(x.shape[0], x.shape[1], *[1] * (x.ndim - 2))
    return found.gather(-1, best).squeeze(-1), shown + rows * math.prod(x.shape[2:])


@operator("AveragePool")
def average_pool(call: Call, x: Tensor) -> Tensor:
    kernel = call.get("kernel_shape")
    strides, dilations, before, after = geometry(call, x.shape[2:], kernel)
    small = all(2 * pad <= one for pad, one in zip(before, kernel, strict=True))
    whole, padded = bool(call.get("ceil_mode", 0)), bool(call.get("count_include_pad", 0))
    if before == after and small and set(dilations) == {1} and len(kernel) in _AVG_POOL:
        return _AVG_POOL[len(kernel)](x, kernel, strides, before, whole, padded)
    counts = _counts(call, x.shape[2:], kernel, strides, dilations, before, after)
    total = _windows(x, kernel, strides, dilations, counts, before, 0).sum(-1)
    ones = torch.ones(1, 1, *x.shape[2:], dtype=x.dtype, device=x.device)
    if padded:
        ones, before = functional.pad(ones, flat_pads(before, after), value=1), [0] * len(before)
    return total / _windows(ones, kernel, strides, dilations, counts, before, 0).sum(-1)


@operator("LpPool")
def lp_pool(call: Call, x: Tensor) -> Tensor:
    kernel, p = call.get("kernel_shape"), call.get("p", 2)
    strides, dilations, before, after = geometry(call, x.shape[2:], kernel)
    counts = _counts(call, x.shape[2:], kernel, strides, dilations, before, after)
    return _windows(x.abs() ** p, kernel, strides, dilations, counts, before, 0).sum(-1) ** (1 / p)


_GLOBAL: dict[str, Callable[[Tensor, list[int]], Tensor]] = {
    "GlobalAveragePool": lambda x, axes: x.mean(axes, keepdim=True),
    "GlobalMaxPool": lambda x, axes: x.amax(axes, keepdim=True),
}


def _global(pool: Callable[[Tensor, list[int]], Tensor]) -> Callable[[Call, Tensor], Tensor]:
    return lambda call, x: pool(x, list(range(2, x.ndim)))


for _name, _pool in _GLOBAL.items():
    operator(_name)(_global(_pool))


@operator("GlobalLpPool")
def global_lp_pool(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, call.get("p", 2), list(range(2, x.ndim)), keepdim=True)


@operator("MaxUnpool", numbers=(2,))
def max_unpool(call: Call, x: Tensor, indices: Tensor, sizes: Tensor | None = None) -> Tensor:
    kernel = call.get("kernel_shape")
    strides, _, before, after = geometry(call, x.shape[2:], kernel)
    plain = [(one - 1) * step - low - high + k for one, step, low, high, k in zip(x.shape[2:], strides, before, after, kernel, strict=True)]
    shape = [*x.shape[:2], *plain]
    wanted = shape if sizes is None else [int(one) for one in sizes.tolist()]
    y = x.new_zeros(math.prod(shape)).scatter(0, indices.reshape(-1), x.reshape(-1)).reshape(shape)
    return functional.pad(y, [one for size, old in zip(wanted[:1:-1], shape[:1:-1], strict=True) for one in (0, size - old)])
