"""Constant folding: what depends on constants only is computed once, by onnx's reference implementation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx

from graphq import ir, stored
from graphq.editor import Editor
from graphq.passes._normalize_graph import become_constant, graph_nodes

_LAYOUT = frozenset({"Transpose", "Cast", "Reshape", "Squeeze", "Unsqueeze", "Flatten"})
"""Folded whatever their size: exporters store weights behind them, and a weight has to be a constant to be compressed."""

_KEPT = frozenset({
    "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear",  # they say how a constant is stored
    "Conv", "ConvTranspose", "ConvInteger", "QLinearConv", "QLinearMatMul", "DeformConv", "LSTM", "GRU", "RNN", "Resize", "Upsample",
    "GridSample", "MaxPool", "AveragePool", "LpPool", "RoiAlign", "MaxRoiPool", "NonMaxSuppression",  # slow or inexact in the reference
}) | stored.RANDOM  # fmt: skip

_HALF = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
"""Only moved, never computed with: runtimes accumulate these types in float32, the reference does not."""


def fold_constants(edit: Editor, limit: int) -> None:
    """Compute, in topological order, every node all of whose inputs are constants.

    A result larger than `limit` bytes, and larger than the constants that it replaces, is left to be computed at run time. The
    size is known before anything is computed, since a small model can describe a huge constant.
    """
    version = ir.opset(edit.model)
    for node in graph_nodes(edit.model):
        if not _is_candidate(node) or not _is_small(node, limit):
            continue
        arrays = _evaluate(node, version)
        if arrays is None or not all(_fits(array, out) for array, out in zip(arrays, node.outputs, strict=True)):
            continue
        if len(arrays) == 1:
            become_constant(edit, node.outputs[0], arrays[0])
            continue
        for array, out in zip(arrays, node.outputs, strict=True):
            edit.replace(out, edit.initializer(out.name or node.op_type, array, graph=node.graph))  # type: ignore[arg-type]
        edit.remove(node)


def _is_candidate(node: ir.Node) -> bool:
    if node.domain or node.op_type in _KEPT or not node.inputs or any(ir.subgraphs(node)):
        return False
    if any(out.is_graph_output() for out in node.outputs):
        return False
    present = [value for value in node.inputs if value is not None]
    if not present or not all(_is_numeric(value) for value in present):
        return False
    return node.op_type in _LAYOUT or not any(value.dtype in _HALF for value in (*present, *node.outputs))


def _is_numeric(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input() and value.const_value is not None and value.dtype != ir.DataType.STRING


def _is_small(node: ir.Node, limit: int) -> bool:
    if node.op_type in _LAYOUT:
        return True
    own = {value for value in node.inputs if value is not None and all(reader is node for reader, _ in value.uses())}
    replaced = sum(value.const_value.nbytes for value in own if value.const_value is not None)
    sizes = [_bytes(out) for out in node.outputs]
    return all(size is not None for size in sizes) and sum(size or 0 for size in sizes) <= max(limit, replaced)


def _bytes(value: ir.Value) -> int | None:
    """Size as inferred, None if that is not known."""
    shape = ir.shape_of(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    dims = [dim for dim in shape if isinstance(dim, int)]
    return math.ceil(math.prod(dims) * value.dtype.bitwidth / 8) if len(dims) == len(shape) else None


def _evaluate(node: ir.Node, version: int) -> list[np.ndarray] | None:
    """The outputs of a node of constants; None if the reference cannot compute them."""
    from onnx.reference.ops import load_op

    try:
        operator = load_op("", node.op_type, version)
        options = {key: _option(entry.value) for key, entry in node.attributes.items()}
        found = operator.eval(*(ir.constant(value) for value in node.inputs), n_outputs=len(node.outputs), **options)
    except Exception:  # an operator without reference, or a fault in it: the node stays as it is
        return None
    arrays = list(found) if isinstance(found, (tuple, list)) else [found]
    return [np.asarray(array) for array in arrays] if len(arrays) == len(node.outputs) else None


def _option(value: Any) -> Any:
    """An attribute as the reference takes it."""
    if hasattr(value, "numpy") and hasattr(value, "nbytes"):
        return onnx.numpy_helper.from_array(value.numpy())
    return int(value) if isinstance(value, ir.DataType) else value


def _fits(array: np.ndarray, out: ir.Value) -> bool:
    """Whether a result is what shape inference promised; the reference is not free of faults."""
    if array.dtype.kind in "OUS" or (out.dtype is not None and out.dtype.numpy() != array.dtype):
        return False
    shape = ir.shape_of(out)
    if shape is None:
        return True
    return len(shape) == array.ndim and all(not isinstance(a, int) or a == b for a, b in zip(shape, array.shape, strict=True))
