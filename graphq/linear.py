"""Facts about the operators with weights: which input is the weight, which axis its outputs lie on, where a bias goes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from graphq import ir, stored


@dataclass(frozen=True)
class LinearOp:
    """Where an operator keeps its data, weight and bias inputs; `bias` is None if it has no such input."""

    weight: int = 1
    data: int = 0
    bias: int | None = 2


LINEAR_OPS = {"Conv": LinearOp(), "ConvTranspose": LinearOp(), "Gemm": LinearOp(), "MatMul": LinearOp(bias=None)}

_FINITE = "graphq.finite"
"""Where a tensor remembers whether it is."""

NEVER_QUANTIZED = frozenset({"Einsum", "GRU", "LSTM", "RNN"})
"""Operators with weights that no pass quantizes; reports name them."""


def is_linear(node: ir.Node) -> bool:
    """Whether `node` is a linear operator of the default domain with a constant float weight of rank 2 or more."""
    return linear_refusal(node) is None


def linear_refusal(node: ir.Node) -> str | None:
    """Why `node` is not a linear operator with a constant weight; None if it is one."""
    op = LINEAR_OPS.get(node.op_type) if node.domain == "" else None
    if op is None:
        return "not an operator with weights"
    weight = weight_of(node)
    if stored.is_stored(weight):
        return "it is quantized already"
    if weight is None or weight.const_value is None or not weight.is_initializer() or weight.is_graph_input():
        return "its weight is not a constant of the graph"
    if weight.dtype != ir.DataType.FLOAT:
        return f"its weight is {weight.dtype}, not float32"
    if len(weight.const_value.shape) < 2:
        return "its weight is a vector"
    if node.op_type == "MatMul" and len(weight.const_value.shape) > 2:
        return "its weight is a stack of matrices"
    if not np.prod(ir.constant_shape(weight)):
        return "its weight is empty"
    return None if _is_finite(weight) else "its weight holds NaN or infinity"


def _is_finite(weight: ir.Value) -> bool:
    """Whether all elements are finite; found out once, since many ask."""
    tensor = weight.const_value
    if tensor is None:
        return True
    if _FINITE not in tensor.meta:
        array = tensor.numpy()
        with np.errstate(invalid="ignore", over="ignore"):  # the first sum is the fast one
            tensor.meta[_FINITE] = bool(np.isfinite(array.sum()) or np.isfinite(array.sum(dtype=np.float64)))
    return bool(tensor.meta[_FINITE])


def weight_of(node: ir.Node) -> ir.Value | None:
    index = LINEAR_OPS[node.op_type].weight
    return node.inputs[index] if index < len(node.inputs) else None


def out_axis(node: ir.Node) -> int:
    """Axis of the weight along which the output channels lie."""
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1
    return 0 if node.op_type == "Gemm" and ir.attribute(node, "transB", 0) else 1


def in_axis(node: ir.Node) -> int:
    """Axis of the weight that is summed over (input channels of a group, for convolutions)."""
    return 1 - out_axis(node)


def in_channels(node: ir.Node) -> int:
    """Channels that a linear `node` sums over, of one group."""
    return ir.constant_shape(weight_of(node))[in_axis(node)]


def channel_axis(node: ir.Node) -> int:
    """Axis of the node's output that holds the output channels: 1 for convolutions, the last otherwise."""
    return 1 if node.op_type in ("Conv", "ConvTranspose") else -1


def bias_of(node: ir.Node) -> ir.Value | None:
    index = LINEAR_OPS[node.op_type].bias
    return None if index is None or index >= len(node.inputs) else node.inputs[index]


def bias_index(node: ir.Node) -> int:
    """Input index of the bias of a Conv, ConvTranspose or Gemm."""
    index = LINEAR_OPS[node.op_type].bias
    if index is None:
        raise ValueError(f"{node.op_type} has no bias input")
    return index


def data_index(node: ir.Node) -> int:
    return LINEAR_OPS[node.op_type].data


def data_of(node: ir.Node) -> ir.Value:
    value = node.inputs[data_index(node)]
    if value is None:
        raise ValueError(f"{ir.describe(node)} has no data input")
    return value


def multiply_adds(node: ir.Node) -> float:
    """Multiply-adds, with unknown dimensions (most often the batch) counted as 1: weight size times output positions."""
    weight = weight_of(node)
    shape = list(ir.shape_of(node.outputs[0]) or ())
    if shape:
        del shape[channel_axis(node)]
    size = np.prod(ir.constant_shape(weight), dtype=np.float64) if weight is not None and weight.const_value is not None else 0.0
    return float(size * np.prod(list(map(_known, shape)), dtype=np.float64))


def _known(dim: int | str | None) -> int:
    """What is known of a dimension: 64 of `64*batch`."""
    factors = str(dim or "").split("*")
    return dim if isinstance(dim, int) else math.prod(int(factor) for factor in factors if factor.strip().isdigit())
