"""Normalizations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.table import Call, operator


@operator("BatchNormalization", since=9)
def batch_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, var: Tensor) -> Any:
    epsilon = call.get("epsilon", 1e-5)
    if not call.get("training_mode", 0):
        if mean.requires_grad or var.requires_grad:  # torch takes them for constants
            mean, var, scale, bias = (one.reshape(-1, *[1] * (x.ndim - 2)) for one in (mean, var, scale, bias))
            return (x - mean) * (scale * torch.rsqrt(var + epsilon)) + bias
        return functional.batch_norm(x, mean, var, scale, bias, False, 0.0, epsilon)
    axes, momentum = [axis for axis in range(x.ndim) if axis != 1], call.get("momentum", 0.9)
    now_var, now_mean = torch.var_mean(x, axes, correction=0)
    y = functional.batch_norm(x, None, None, scale, bias, True, 0.0, epsilon)
    if len(call.wanted) == 1:
        return y
    return (y, momentum * mean + (1 - momentum) * now_mean, momentum * var + (1 - momentum) * now_var)[: len(call.wanted)]


@operator("LayerNormalization")
def layer_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Any:
    axis, epsilon = call.get("axis", -1) % x.ndim, call.get("epsilon", 1e-5)
    shape = x.shape[axis:]
    if not any(call.wanted[1:]):
        if scale.shape == shape and (bias is None or bias.shape == shape):
            return functional.layer_norm(x, shape, scale, bias, epsilon)
        y = functional.layer_norm(x, shape, None, None, epsilon) * scale
        return y if bias is None else y + bias
    var, mean = torch.var_mean(x, list(range(axis, x.ndim)), correction=0, keepdim=True)
    inverse = torch.rsqrt(var + epsilon)
    y = (x - mean) * inverse * scale
    return (y if bias is None else y + bias), mean, inverse


@operator("RMSNormalization")
def rms_normalization(call: Call, x: Tensor, scale: Tensor) -> Tensor:
    axis = call.get("axis", -1) % x.ndim
    square = x.square().mean(list(range(axis, x.ndim)), keepdim=True)
    return x * torch.rsqrt(square + call.get("epsilon", 1e-5)) * scale


@operator("GroupNormalization")
def group_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Before operator set 21, scale and bias are one number a group instead of one a channel."""
    groups, epsilon = call.get("num_groups"), call.get("epsilon", 1e-5)
    if scale.shape[0] != x.shape[1]:
        scale, bias = (one.repeat_interleave(x.shape[1] // groups) for one in (scale, bias))
    return _group_norm(x, groups, scale, bias, epsilon)


def _group_norm(x: Tensor, groups: int, scale: Tensor, bias: Tensor, epsilon: float) -> Tensor:
    """Torch refuses groups of one element, which are 0 once their mean is taken out."""
    if x[0].numel() > groups:
        return functional.group_norm(x, groups, scale, bias, epsilon)
    shape = (-1, *[1] * (x.ndim - 2))
    return (x - x) * scale.reshape(shape) + bias.reshape(shape)


@operator("InstanceNormalization")
def instance_normalization(call: Call, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return _group_norm(x, x.shape[1], scale, bias, call.get("epsilon", 1e-5))


@operator("LRN")
def lrn(call: Call, x: Tensor) -> Tensor:
    size = call.get("size")
    spread = functional.pad(x.square().movedim(1, -1), [(size - 1) // 2, size // 2]).unfold(-1, size, 1).sum(-1).movedim(-1, 1)
    return x / (call.get("bias", 1.0) + call.get("alpha", 1e-4) / size * spread) ** call.get("beta", 0.75)


@operator("MeanVarianceNormalization")
def mean_variance_normalization(call: Call, x: Tensor) -> Tensor:
    var, mean = torch.var_mean(x, call.get("axes") or [0, 2, 3], correction=0, keepdim=True)
    return (x - mean) / (torch.sqrt(var) + 1e-9)
