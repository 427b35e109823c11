"""Transforms of the axis that matrix layers sum over: they read `x T`, and their weights become `T⁻¹ W`.

T disappears into the layer that makes x, through attention too, if nobody else reads x and no block of T holds channels that attention
mixes by different weights. Elsewhere it runs with the model, as a product with its small matrices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from graphq import ir, linear, precision, stored
from graphq.editor import Editor
from graphq.exclude import is_excluded
from graphq.passes import _bias, _layer_rows, _scaling, _value_layer
from graphq.passes._block_transform_math import Transform
from graphq.passes._layer_rows import Edges
from graphq.precision import Bits


def edges(model: ir.Model, skip: Callable[[ir.Node, str], None] = lambda node, reason: None, exclude: Sequence[str] = ()) -> Edges:
    """What MatMul and Gemm layers of the main graph with float weights read, and nobody asked a float layer of.

    Args:
        skip: Called with every other MatMul or Gemm that has a constant weight, and the reason.
        exclude: Patterns of layers that are left alone.
    """
    products = [node for node in _layer_rows.candidates(model) if node.op_type in ("MatMul", "Gemm")]
    layers = [node for node in products if stored.is_fixed(linear.weight_of(node))]
    return _layer_rows.by_input(layers, lambda node: refusal(model, node, exclude), skip)


def refusal(model: ir.Model, node: ir.Node, exclude: Sequence[str] = ()) -> str | None:
    """Why what `node` sums over cannot be transformed; None if it can."""
    if is_excluded(node, exclude):
        return "excluded by the recipe"
    if node.graph is not model.graph:
        return "it lies in a subgraph"
    if node.op_type not in ("MatMul", "Gemm") or node.domain:
        return "not a matrix product"
    if reason := linear.linear_refusal(node):
        return reason
    if len(ir.constant_shape(linear.weight_of(node))) != 2:
        return "its weight is not a matrix"
    if ir.attribute(node, "transA", 0):
        return "its data is transposed, so that rows are channels"
    if precision.asked(node, Bits(8, 8)) == Bits(None, None):
        return "a float layer was asked for"
    data = linear.data_of(node)
    shape = ir.shape_of(data)
    if shape is None:
        return "the rank of its data is not known"
    if len(shape) < 2:
        return "its data is a vector"
    return None if ir.is_float(data) and ir.constant(data) is None else "its data input is not a float32 activation"


def folds(value: ir.Value, nodes: Sequence[ir.Node], transform: Transform, exclude: Sequence[str] = ()) -> bool:
    """Whether `transform` of `value`, for `nodes` alone, disappears into the layer that its channels come from."""
    return _source(value, nodes, transform, exclude) is not None


def apply(edit: Editor, value: ir.Value, nodes: Sequence[ir.Node], transform: Transform, exclude: Sequence[str] = ()) -> ir.Value:
    """Let `nodes`, all of which read `value`, read `value T` instead, which is returned.

    Args:
        exclude: Patterns of layers that stay as they are.
    """
    source = _source(value, nodes, transform, exclude)
    for node in nodes:
        undone = transform.undo(_scaling.matrix(node).astype(np.float64)).astype(np.float32)
        edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, undone.T if linear.in_axis(node) else undone)
    if source is not None:
        _fold(edit, source, transform)
        return value
    moved = insert(edit, value, transform)
    for node in nodes:
        edit.rewire(node, linear.data_index(node), moved)
    return moved


def insert(edit: Editor, value: ir.Value, transform: Transform) -> ir.Value:
    """`value T`, computed where the model runs, in standard operators."""
    rank, name = len(ir.shape_of(value) or ()), value.name
    if transform.count == 1:
        return _product(edit, value, transform.right[0], name)
    split = _reshape(edit, value, [0] * (rank - 1) + [transform.count, transform.block], f"{name}_blocks")
    if len(transform.right) == 1:
        mixed = _product(edit, split, transform.right[0], name)
        if transform.left is not None:
            mixed = _product(edit, mixed, transform.left.T, name, is_left=True)
    else:  # one product a block: blocks come first, and the rows of a block together
        there, back = [rank - 1, *range(rank - 1), rank], [*range(1, rank), 0, rank]
        turned = _insert(edit, split, "Transpose", [split], f"{name}_by_block", attributes={"perm": there})
        matrices = transform.right.reshape(transform.count, *(1,) * (rank - 2), transform.block, transform.block)
        mixed = _insert(edit, turned, "Transpose", [_product(edit, turned, matrices, name)], f"{name}_mixed", attributes={"perm": back})
    result = _reshape(edit, mixed, [0] * (rank - 1) + [transform.size], f"{name}_transformed")
    result.shape, result.type = value.shape, value.type
    return result


def _product(edit: Editor, value: ir.Value, matrix: np.ndarray, name: str | None, *, is_left: bool = False) -> ir.Value:
    """A product with a constant, which no later pass quantizes."""
    array = np.asarray(matrix, np.float32)
    constant = edit.shared((array.shape, array.tobytes()), f"{name}_transform", lambda: array, "float32")
    made = _insert(edit, value, "MatMul", [constant, value] if is_left else [value, constant], f"{name}_product", like=value)
    maker = made.producer()
    assert maker is not None
    precision.ask(edit, maker, Bits(None, None))
    return made


def _reshape(edit: Editor, value: ir.Value, sizes: list[int], name: str) -> ir.Value:
    """`value` in another shape; a size of 0 is that of the same axis."""
    shape = edit.shared(("shape", *sizes), "block_shape", lambda: np.array(sizes, np.int64), "int64")
    return _insert(edit, value, "Reshape", [value, shape], name)


def _insert(edit: Editor, value: ir.Value, op_type: str, operands: list[ir.Value], name: str, *, like: ir.Value | None = None,
            attributes: dict[str, list[int]] | None = None) -> ir.Value:  # fmt: skip
    maker = next((entry.producer() for entry in operands if entry.producer() is not None), None)
    made = edit.insert(maker, op_type, operands, output=name, attributes=attributes, like=like, after=maker is not None)
    if like is None:
        made.type = value.type
    return made


# ---- into the layer before ------------------------------------------------------------------------------------------


def _source(value: ir.Value, nodes: Sequence[ir.Node], transform: Transform, exclude: Sequence[str]) -> _value_layer.Source | None:
    """The layer that takes `transform`; None where it has to run with the model."""
    if value.is_graph_output() or {use.node for use in ir.uses(value)} != set(nodes):
        return None
    found = _value_layer.source(value)
    if found is None or is_excluded(found.layer, exclude) or any(node.op_type == "Relu" for node in found.path):
        return None
    mixed = _value_layer.mixed_alike(found)
    if mixed is None:
        return None
    heads = mixed[found.channels]
    blocks = heads[None] if transform.left is not None else heads.reshape(transform.count, transform.block)
    return found if (blocks == blocks[:, :1]).all() else None


def _fold(edit: Editor, source: _value_layer.Source, transform: Transform) -> None:
    """Let the layer make the value times T."""
    layer, order, slot = source.layer, source.channels, _bias.find(source.layer)

    def moved(rows: np.ndarray) -> np.ndarray:
        out = np.empty(rows.shape)
        out[..., order] = transform.rows(rows[..., order].astype(np.float64))
        return out.astype(np.float32)

    weight = moved(_scaling.matrix(layer))
    edit.set_weight(layer, linear.LINEAR_OPS[layer.op_type].weight, weight.T if linear.in_axis(layer) else weight)
    if slot is not None:
        holder, index = slot
        bias = ir.constant(holder.inputs[index])
        assert bias is not None
        edit.set_weight(holder, index, moved(np.broadcast_to(bias, (*bias.shape[:-1], len(order)))))
    for node in (layer, *source.path):
        edit.now_makes(node.outputs[0], "transformed")
