"""Moving the scale of channels over an edge: `X W = (X / k) (diag(k) W)` (SmoothQuant, arXiv 2211.10438).

`1 / k`, and a shift, disappear into the normalization that makes X if nobody else reads it; elsewhere they cost an element-wise Mul
(and a Sub).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Operators whose second input is a gain for each channel; LayerNormalization may have a bias as its third."""


def matrix(node: ir.Node) -> np.ndarray:
    """The constant weight of a MatMul or Gemm as [D, O]."""
    weight = ir.constant(linear.weight_of(node))
    assert weight is not None, "only constant weights take a factor"
    return weight.T if linear.in_axis(node) else weight


def can_fold(value: ir.Value, nodes: Sequence[ir.Node], *, shift: bool = False) -> bool:
    """Whether `value` leaves a normalization for `nodes` alone, so that its gain (and its bias, for a `shift`) can take the change."""
    maker = value.producer()
    if maker is None or maker.domain or maker.op_type not in NORMALIZATIONS or value.is_graph_output() or len(maker.inputs) < 2:
        return False
    if shift and (maker.op_type != "LayerNormalization" or len(maker.inputs) < 3 or maker.inputs[2] is None):
        return False
    channels = (len(matrix(nodes[0])),)
    arrays = [ir.constant(entry) for entry in maker.inputs[1:] if entry is not None]
    return {use.node for use in ir.uses(value)} == set(nodes) and all(array is not None and array.shape == channels for array in arrays)


def divide(edit: Editor, value: ir.Value, nodes: Sequence[ir.Node], k: np.ndarray, c: np.ndarray | None = None) -> ir.Value:
    """Let `nodes`, all of which read `value`, read `(value - c) / k` instead, which is returned.

    Args:
        k: Positive, float32 of shape (D,).
        c: Float of shape (D,); None or zeros for no shift.
    """
    maker, shifts = value.producer(), c is not None and bool(c.any())
    if can_fold(value, nodes, shift=shifts):
        assert maker is not None
        for index in range(1, len(maker.inputs)):
            array = ir.constant(maker.inputs[index])
            if array is not None:
                edit.set_weight(maker, index, ((array - c if shifts and index == 2 else array) / k).astype(array.dtype))
        return value
    moved = value
    for operator, operand, what, part in (("Sub", c, "middle", "centered"), ("Mul", 1 / k, "factor", "scaled")):
        if operator == "Mul" or shifts:
            constant = edit.initializer(f"{value.name}_{what}", np.asarray(operand, np.float32))
            maker = moved.producer()
            moved = edit.insert(maker, operator, [moved, constant], output=f"{value.name}_{part}", like=value, after=maker is not None)
    for node in nodes:
        edit.rewire(node, linear.data_index(node), moved)
    return moved


def multiply(edit: Editor, node: ir.Node, k: np.ndarray) -> None:
    """Let the weight of a MatMul or Gemm be `diag(k) W`; k: float32 of shape (D,)."""
    scaled = matrix(node) * k[:, None]
    edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, scaled.T if linear.in_axis(node) else scaled)
