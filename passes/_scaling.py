"""Moving the scale of channels over an edge: `X W = (X / k) (diag(k) W)` (SmoothQuant, arXiv 2211.10438).

`1 / k` disappears into the normalization that makes X if nobody else reads it; elsewhere it costs one element-wise Mul.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor


def matrix(node: ir.Node) -> np.ndarray:
    """The constant weight of a MatMul or Gemm as [D, O]."""
    weight = ir.constant(linear.weight_of(node))
    assert weight is not None, "only constant weights take a factor"
    return weight.T if linear.in_axis(node) else weight


def can_fold(value: ir.Value, nodes: Sequence[ir.Node]) -> bool:
    """Whether `value` leaves a LayerNormalization for `nodes` alone, so that its gain and shift can take the factor."""
    maker = value.producer()
    if maker is None or maker.domain or maker.op_type != "LayerNormalization" or value.is_graph_output() or len(maker.inputs) < 2:
        return False
    channels = (len(matrix(nodes[0])),)
    arrays = [ir.constant(entry) for entry in maker.inputs[1:] if entry is not None]
    return {use.node for use in ir.uses(value)} == set(nodes) and all(array is not None and array.shape == channels for array in arrays)


def divide(edit: Editor, value: ir.Value, nodes: Sequence[ir.Node], k: np.ndarray) -> ir.Value:
    """Let `nodes`, all of which read `value`, read `value / k` instead, which is returned; k: positive, float32 of shape (D,)."""
    maker = value.producer()
    if not can_fold(value, nodes):
        factor = edit.initializer(f"{value.name}_factor", (1 / k).astype(np.float32))
        moved = edit.insert(maker, "Mul", [value, factor], output=f"{value.name}_scaled", like=value, after=maker is not None)
        for node in nodes:
            edit.rewire(node, linear.data_index(node), moved)
        return moved
    assert maker is not None
    for index in range(1, len(maker.inputs)):
        array = ir.constant(maker.inputs[index])
        if array is not None:
            edit.set_weight(maker, index, array / k)
    return value


def multiply(edit: Editor, node: ir.Node, k: np.ndarray) -> None:
    """Let the weight of a MatMul or Gemm be `diag(k) W`; k: float32 of shape (D,)."""
    scaled = matrix(node) * k[:, None]
    edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, scaled.T if linear.in_axis(node) else scaled)
