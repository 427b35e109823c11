"""Moving the scale of channels over an edge: `X W = (X / k) (diag(k) W)` (SmoothQuant, arXiv 2211.10438).

`1 / k`, and a shift, disappear into the normalization that makes X if nobody else reads it; `1 / k` also into the layer behind the
attention that makes X; elsewhere they cost an element-wise Mul (and a Sub).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.exclude import is_excluded
from graphq.passes import _value_layer

NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")
"""Operators whose second input is a gain for each channel; LayerNormalization may have a bias as its third."""


def matrix(node: ir.Node) -> np.ndarray:
    """The constant weight of a MatMul or Gemm as [D, O]."""
    weight = ir.constant(linear.weight_of(node))
    assert weight is not None, "only constant weights take a factor"
    return weight.T if linear.in_axis(node) else weight


def can_fold(value: ir.Value, nodes: Sequence[ir.Node], *, shift: bool = False, exclude: Sequence[str] = ()) -> bool:
    """Whether what makes `value`, for `nodes` alone, can take the change: a factor, and a `shift` with it.

    Args:
        exclude: Patterns of layers that stay as they are.
    """
    if value.is_graph_output() or {use.node for use in ir.uses(value)} != set(nodes):
        return False
    return _takes(value.producer(), len(matrix(nodes[0])), shift) or (not shift and _layer_behind(value, exclude) is not None)


def _layer_behind(value: ir.Value, exclude: Sequence[str]) -> _value_layer.Source | None:
    found = _value_layer.source(value)
    return None if found is None or is_excluded(found.layer, exclude) else found


def _takes(norm: ir.Node | None, channels: int, shift: bool) -> bool:
    """Whether gain and bias of a normalization are there, one for each channel."""
    if norm is None or norm.domain or norm.op_type not in NORMALIZATIONS or len(norm.inputs) < 2:
        return False
    if shift and (norm.op_type != "LayerNormalization" or len(norm.inputs) < 3 or norm.inputs[2] is None):
        return False
    arrays = [ir.constant(entry) for entry in norm.inputs[1:] if entry is not None]
    return all(array is not None and array.shape == (channels,) for array in arrays)


def divide(edit: Editor, value: ir.Value, nodes: Sequence[ir.Node], k: np.ndarray, c: np.ndarray | None = None, *,
           exclude: Sequence[str] = ()) -> ir.Value:  # fmt: skip
    """Let `nodes`, all of which read `value`, read `(value - c) / k` instead, which is returned.

    Args:
        k: Positive, float32 of shape (D,).
        c: Float of shape (D,); None or zeros for no shift.
        exclude: Patterns of layers that stay as they are.
    """
    maker, shifts = value.producer(), c is not None and bool(c.any())
    if can_fold(value, nodes, shift=shifts, exclude=exclude):
        layer = _layer_behind(value, exclude)
        if layer is not None:
            layer.divide(edit, k)
            return value
        assert maker is not None
        for index in range(1, len(maker.inputs)):
            array = ir.constant(maker.inputs[index])
            if array is not None:
                edit.set_weight(maker, index, ((array - c if shifts and index == 2 else array) / k).astype(array.dtype))
        edit.now_makes(value, "scaled")
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
