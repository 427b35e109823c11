"""Quantizers, and products of integers.

Codes that a quantizer makes are floats, so that gradients pass: rounding has gradient 1, clipping none outside of its range. With
v = x / scale, a QuantizeLinear and its DequantizeLinear then give what LSQ (arXiv 1902.08153) defines:

    d y / d x      1 inside, 0 outside
    d y / d scale  round(v) - v inside, qmin or qmax (less the zero point) outside
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphq.ir import DataType
from graphq.torch_executor.ops_conv import conv
from graphq.torch_executor.table import Call, operator
from graphq.torch_executor.tensors import FLOAT_GRIDS, INTEGERS, round_through, round_to


def _spread(call: Call, operand: Tensor, x: Tensor) -> Tensor:
    """A scale or zero point in a shape that fits `x`: of the tensor, along an axis, or in blocks."""
    block, axis = call.get("block_size", 0), call.get("axis", 1)
    if block:
        return operand.repeat_interleave(block, axis).narrow(axis, 0, x.shape[axis])
    if operand.numel() == 1 and (operand.ndim == 0 or x.ndim == 0 or x.shape[axis if -x.ndim <= axis < x.ndim else 0] != 1):
        return operand.reshape(())
    shape = [1] * x.ndim
    shape[axis] = -1
    return operand.reshape(shape)


class _Codes(torch.autograd.Function):
    """`x / scale`, rounded and clipped. One function, so that a byte an element is kept for the gradient, and not three copies."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Any, high: Any) -> Tensor:
        ratio = x / scale
        inside = (ratio >= low) & (ratio <= high)
        if ctx.needs_input_grad[1]:
            ctx.save_for_backward(inside, scale, ratio)
            return torch.round(ratio).clamp_(low, high)
        ctx.save_for_backward(inside, scale)
        return ratio.round_().clamp_(low, high)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inside, scale, *ratio = ctx.saved_tensors
        moved = (gradient * inside).div_(scale)
        by_scale = (moved * ratio[0]).neg_().sum_to_size(scale.shape) if ratio else None
        return moved if ctx.needs_input_grad[0] else None, by_scale, None, None


def _shift(call: Call, zero: Tensor | None, x: Tensor) -> Tensor | int:
    """A zero point as a number, which is fastest, or in a shape that fits `x`."""
    if zero is None:
        return 0
    if zero.numel() == 1 and zero.device.type == "cpu" and not zero.requires_grad:
        return int(zero)
    return _spread(call, zero, x).to(device=x.device, dtype=call.dtype)


def _code_type(zero: Tensor | None) -> DataType:
    """Of codes, where the graph does not say it: as the zero point."""
    known = {torch.int8: DataType.INT8, torch.int16: DataType.INT16, torch.int32: DataType.UINT16}
    return DataType.UINT8 if zero is None else known.get(zero.dtype, DataType.UINT8)


@operator("QuantizeLinear", numbers=(2,), gradient="through", since=10)
def quantize_linear(call: Call, x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    x, scale, kind = x.to(call.dtype), _spread(call, scale, x), call.made or _code_type(zero)
    if kind in FLOAT_GRIDS:
        return round_to(x / scale, kind, saturate=bool(call.get("saturate", 1)))
    (low, high), shift = INTEGERS[kind], _shift(call, zero, x)
    if isinstance(shift, Tensor) and shift.requires_grad:
        shift = round_through(shift)
        codes = round_through(torch.clamp(x / scale, low - shift, high - shift))
    else:
        codes = _Codes.apply(x, scale, low - shift, high - shift)
    return codes if isinstance(shift, int) and shift == 0 else codes + shift


@operator("DequantizeLinear", numbers=(2,), since=10)
def dequantize_linear(call: Call, codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
    steps, shift = codes.to(call.dtype), _shift(call, zero, codes)
    steps = steps if isinstance(shift, int) and shift == 0 else steps - shift
    return steps * _spread(call, scale, codes)


@operator("DynamicQuantizeLinear", gradient="through")
def dynamic_quantize_linear(call: Call, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    scale = (high - low) / 255
    safe = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = round_through(torch.clamp(-low / safe, 0, 255))
    return round_through(torch.clamp(x / safe, -zero, 255 - zero)) + zero, scale, zero


def _centered(codes: Tensor, zero: Tensor | None, exact: torch.dtype, by_row: bool = False) -> Tensor:
    """Codes less their zero point, which may be one number a row, or a column."""
    wide = codes if codes.is_floating_point() else codes.to(exact)
    if zero is None:
        return wide
    shift = zero.to(wide.dtype)
    return wide - (shift.unsqueeze(-1) if by_row and shift.ndim else shift)


def _exact(call: Call, *codes: Tensor) -> torch.dtype:
    """What integers are multiplied in: torch has no integer products on a GPU, and float64 holds their sums."""
    return call.dtype if any(one.is_floating_point() for one in codes) else torch.float64


@operator("MatMulInteger")
def matmul_integer(call: Call, a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    exact = _exact(call, a, b)
    sums = torch.matmul(_centered(a, a_zero, exact, by_row=True), _centered(b, b_zero, exact))
    return sums.to(torch.int32) if exact == torch.float64 and not (a.is_floating_point() or b.is_floating_point()) else sums


@operator("ConvInteger")
def conv_integer(call: Call, x: Tensor, weight: Tensor, x_zero: Tensor | None = None, w_zero: Tensor | None = None) -> Tensor:
    exact = _exact(call, x, weight)
    shift = None if w_zero is None else w_zero.reshape(-1, *[1] * (weight.ndim - 1)) if w_zero.ndim else w_zero
    sums = conv(call, _centered(x, x_zero, exact), _centered(weight, shift, exact))
    return sums.to(torch.int32) if not (x.is_floating_point() or weight.is_floating_point()) else sums


def _requantized(call: Call, y: Tensor, scale: Tensor, zero: Tensor, kind: DataType | None) -> Tensor:
    low, high = INTEGERS[kind or DataType.UINT8]
    shift = zero.to(y.dtype)
    return round_through(torch.clamp(y / scale, low - shift, high - shift)) + shift


@operator("QLinearMatMul", gradient="through")
def q_linear_matmul(call: Call, a: Tensor, a_scale: Tensor, a_zero: Tensor, b: Tensor, b_scale: Tensor, b_zero: Tensor, y_scale: Tensor,
                    y_zero: Tensor) -> Tensor:  # fmt: skip
    exact = _exact(call, a, b)
    sums = torch.matmul(_centered(a, a_zero, exact, by_row=True), _centered(b, b_zero, exact)).to(call.dtype)
    scale = (a_scale.unsqueeze(-1) if a_scale.ndim else a_scale) * b_scale
    return _requantized(call, sums * scale, y_scale, y_zero, call.type(7))


@operator("QLinearConv", gradient="through")
def q_linear_conv(call: Call, x: Tensor, x_scale: Tensor, x_zero: Tensor, weight: Tensor, w_scale: Tensor, w_zero: Tensor, y_scale: Tensor,
                  y_zero: Tensor, bias: Tensor | None = None) -> Tensor:  # fmt: skip
    exact = _exact(call, x, weight)
    by_channel: Any = [-1, *[1] * (weight.ndim - 1)]
    shift = w_zero.reshape(by_channel) if w_zero.ndim else w_zero
    sums = conv(call, _centered(x, x_zero, exact), _centered(weight, shift, exact))
    if bias is not None:
        sums = sums + bias.to(sums.dtype).reshape(by_channel[:-1])
    scale = x_scale * (w_scale.reshape(by_channel[:-1]) if w_scale.ndim else w_scale)
    return _requantized(call, sums.to(call.dtype) * scale, y_scale, y_zero, call.type(7))
