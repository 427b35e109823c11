"""What passes that store weights need to know of them besides their numbers."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from graphq import ir, linear, qdq
from graphq.editor import Editor


def not_grouped(node: ir.Node, group_size: int) -> str | None:
    """Why the weight of `node` cannot have a scale for each `group_size` of its inputs; None if it can, or for no groups (0)."""
    shape = ir.constant_shape(linear.weight_of(node))
    if not group_size:
        return None
    if len(shape) != 2:
        return "groups along the reduction axis need a matrix, this weight has kernel positions"
    size = shape[linear.in_axis(node)]
    return f"its {size} inputs are not a multiple of the group size {group_size}" if size % group_size else None


def turn(edit: Editor, nodes: Iterable[ir.Node]) -> None:
    """Store the weights of Gemms that transpose them the other way round, where they read floats and share the weight with nobody.

    ONNX Runtime 1.31 multiplies blocked codes (MatMulNBits) behind a MatMul or a Gemm with `transB = 0`; before one with `transB = 1` it
    makes floats of them at every run.
    """
    for node in nodes:
        weight, maker = linear.weight_of(node), ir.producer(linear.data_of(node))
        array = ir.constant(weight)
        if node.op_type != "Gemm" or not ir.attribute(node, "transB", 0) or (maker is not None and qdq.is_quantizer(maker)):
            continue
        if weight is not None and array is not None and len(ir.uses(weight)) == 1:
            edit.set_weight(node, linear.LINEAR_OPS["Gemm"].weight, np.ascontiguousarray(array.T))
            edit.set_attribute(node, "transB", 0)
