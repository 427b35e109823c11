"""`attention-bias` of `tune`: no Add for the biases of keys and values.

With scores `S = Q (K + 1 b)ᵀ = Q Kᵀ + (Q b) 1ᵀ`, the bias of the keys adds one number to a whole row, which softmax takes away again.
The rows of `A = softmax(S)` sum to 1, so `A (V + 1 b) = A V + 1 b`: the bias of the values may as well be part of that of the layer behind.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.passes import _bias, _scaling, _value_layer

_PASSED_ON = frozenset({"Add", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""What may lie between the layer and the product with its output: the Add is that of the bias."""

DEPTH = 4
"""Nodes between the scores' product and their softmax, at most."""


def attention_bias(edit: Editor, node: ir.Node) -> None:
    """Drop the bias of the keys if `node` is a softmax; move that of the values if it is the layer behind attention."""
    if node.op_type == "Softmax":
        _drop_key_bias(edit, node)
    elif node.op_type in ("MatMul", "Gemm") and linear.is_linear(node):
        _move_value_bias(edit, node)


def _drop_key_bias(edit: Editor, softmax: ir.Node) -> None:
    product = _product(softmax.inputs[0], DEPTH) if _is_over_last_axis(softmax) else None
    keys = product.inputs[1] if product is not None else None
    found = _value_layer.trace(keys) if keys is not None and _is_private(keys) else None
    if found is None:
        return
    layer, path = found
    labels, add = _value_layer.channel_labels(layer, path), _bias_add(layer)
    is_plain = all(node.op_type in _PASSED_ON | {"Mul", "Div"} for node in path)
    if add is not None and is_plain and labels is not None and labels.ndim > 1 and (labels == labels[..., :1]).all():
        _remove(edit, add, [*path, *_between(product, softmax)])


def _move_value_bias(edit: Editor, layer: ir.Node) -> None:
    source = _value_layer.source(linear.data_of(layer)) if _bias.takes_data_shift(layer) and _is_private(linear.data_of(layer)) else None
    if source is None:
        return
    add, products = _bias_add(source.layer), [node for node in source.path if node.op_type == "MatMul"]
    is_plain = all(node.op_type in _PASSED_ON for node in source.path if node not in products)
    if add is None or not is_plain or len(products) != 1 or not _is_over_last_axis(ir.producer(products[0].inputs[0])):
        return
    bias = _bias.behind(source.layer)[source.channels]
    _bias.shift(edit, layer, bias @ _scaling.matrix(layer).astype(np.float64))
    _remove(edit, add, source.path)


def _product(value: ir.Value | None, depth: int) -> ir.Node | None:
    """The MatMul of two activations that scores come from: scaled, and with a mask or anything else added to them."""
    node = ir.producer(value)
    if node is None or node.domain or value is None or not _is_private(value):
        return None
    if node.op_type == "MatMul":
        return node if not any(ir.constant(entry) is not None for entry in node.inputs) else None
    operands = {"Add": list(node.inputs), "Mul": _scaled(node), "Div": _scaled(node)[:1]}.get(node.op_type, [])
    found = [_product(entry, depth - 1) for entry in operands] if depth else []
    return next((one for one in found if one is not None), None)


def _between(product: ir.Node | None, softmax: ir.Node) -> Iterator[ir.Node]:
    """The nodes from the scores' product to what the softmax reads."""
    while product is not None and product is not softmax:
        yield product
        product = ir.uses(product.outputs[0])[0].node


def _scaled(node: ir.Node) -> list[ir.Value | None]:
    """The operand that a Mul or Div multiplies by one number; nothing if it does anything else."""
    numbers = [index for index, entry in enumerate(node.inputs) if (array := ir.constant(entry)) is not None and array.size == 1]
    return [node.inputs[1 - numbers[0]]] if len(numbers) == 1 and (node.op_type == "Mul" or numbers[0] == 1) else []


def _is_private(value: ir.Value) -> bool:
    """Whether one node alone sees `value`."""
    return len(ir.uses(value)) == 1 and not value.is_graph_output()


def _bias_add(layer: ir.Node) -> ir.Node | None:
    """The Add right behind `layer` of its constant bias, if that is all the bias it has."""
    slot = _bias.find(layer)
    return slot[0] if slot is not None and slot[0].op_type == "Add" else None


def _remove(edit: Editor, add: ir.Node, path: Sequence[ir.Node]) -> None:
    """Take `add` away; what comes behind it on `path` lacks the bias from now on."""
    for node in path:
        if node is not add:
            edit.now_makes(node.outputs[0], "unbiased")
    (kept,) = (value for value in add.inputs if value is not None and ir.constant(value) is None)
    edit.replace(add.outputs[0], kept)
    edit.remove(add)


def _is_over_last_axis(node: ir.Node | None) -> bool:
    if node is None or node.op_type != "Softmax" or node.domain:
        return False
    shape = ir.shape_of(node.inputs[0])
    return ir.attribute(node, "axis", -1) in (-1, len(shape or ()) - 1)
