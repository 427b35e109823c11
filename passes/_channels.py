"""Channels in another order, or fewer of them: all that makes them, passes them on or reads them is changed alike.

A region grows from one value over every node that reads or makes it, until linear layers end it on all sides. What mixes channels,
or does not tell which is which (a Reshape, a Concat along them), makes it impossible.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.passes._normalize_batch_norm import BATCH_NORM

_ELEMENTWISE = frozenset({
    "Abs", "Add", "Cast", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu", "Max", "Min",
    "Mish", "Mul", "Neg", "PRelu", "Pow", "Relu", "Sigmoid", "Softplus", "Sqrt", "Sub", "Swish", "Tanh",
})  # fmt: skip
NORMALIZATIONS = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
"""Over the last axis, with a gain (and a bias) for each channel."""
_POOLS = frozenset({"AveragePool", "BatchNormalization", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"})
"""Each channel of axis 1 by itself."""


class _Mixed(Exception):
    """Why channels cannot be told apart."""


@dataclass
class Region:
    """What has to be reordered together.

    Attributes:
        width: How many channels there are.
        makers, readers: Linear layers whose outputs, or inputs, are these channels.
        values: The axis of the channels, by value.
        constants: The axis of the channels of a constant, by node and input index.
    """

    width: int
    makers: list[ir.Node] = field(default_factory=list)
    readers: list[ir.Node] = field(default_factory=list)
    values: dict[ir.Value, int] = field(default_factory=dict)
    constants: dict[tuple[ir.Node, int], int] = field(default_factory=dict)

    def reorder(self, edit: Editor, order: np.ndarray) -> None:
        """Let channel `order[i]` come i-th everywhere; those that are not in `order`, int, are gone."""
        slots = dict(self.constants)
        for node in self.makers:
            op, bias = linear.LINEAR_OPS[node.op_type], ir.constant(linear.bias_of(node))
            slots[node, op.weight] = linear.out_axis(node)
            if op.bias is not None and bias is not None and bias.ndim and bias.shape[-1] == self.width:
                slots[node, op.bias] = bias.ndim - 1
        for node in dict.fromkeys(node for node, _ in slots if BATCH_NORM in node.meta):  # makers, and depthwise convolutions
            node.meta[BATCH_NORM] = {name: part[order] if np.ndim(part) else part for name, part in node.meta[BATCH_NORM].items()}
        for (node, index), axis in slots.items():
            _take(edit, node, index, axis, order)
        for node in self.readers:
            _take(edit, node, linear.LINEAR_OPS[node.op_type].weight, linear.in_axis(node), order)
        for node in {node for node, _ in self.constants if node.op_type == "Conv" and len(order) < self.width}:
            edit.set_attribute(node, "group", len(order))
        for value, axis in self.values.items():
            edit.now_makes(value, "reordered" if len(order) == self.width else "kept")
            value.shape = ir.Shape([*_shape(value)[:axis], len(order), *_shape(value)[axis + 1 :]])


def region(layer: ir.Node) -> Region | str:
    """All that shares the input channels of `layer`, which `linear.is_linear` takes; or why they cannot be reordered."""
    value = linear.data_of(layer)
    found = Region(ir.constant_shape(linear.weight_of(layer))[linear.in_axis(layer)])
    try:
        queue = [(value, linear.channel_axis(layer) % _rank(value))]
        while queue:
            value, axis = queue.pop()
            if value in found.values:
                if found.values[value] != axis:
                    raise _Mixed(f"two of its axes would be reordered at {value.name!r}")
                continue
            if value.is_graph_input() or value.is_graph_output() or value.producer() is None:
                raise _Mixed(f"{value.name!r} is an input or output of the model")
            found.values[value] = axis
            queue += _from_maker(found, value, axis)
            for use in value.uses():
                queue += _from_reader(found, use.node, use.idx, value, axis)
    except _Mixed as error:
        return str(error)
    return found


def _from_maker(found: Region, value: ir.Value, axis: int) -> list[tuple[ir.Value, int]]:
    node = value.producer()
    assert node is not None
    if node.op_type not in linear.LINEAR_OPS or _is_depthwise(node):
        return _along(found, node, value, axis)
    bias = linear.bias_of(node)
    if (reason := linear.linear_refusal(node)) is not None:
        raise _Mixed(f"{ir.describe(node)} makes them, and {reason}")
    if ir.attribute(node, "group", 1) != 1 or linear.channel_axis(node) % _rank(value) != axis:
        raise _Mixed(f"{ir.describe(node)} makes them in groups, or along another axis")
    if bias is not None and ir.constant(bias) is None:
        raise _Mixed(f"the bias of {ir.describe(node)} is not a constant")
    found.makers.append(node)
    return []


def _from_reader(found: Region, node: ir.Node, index: int, value: ir.Value, axis: int) -> list[tuple[ir.Value, int]]:
    if node.op_type not in linear.LINEAR_OPS or _is_depthwise(node):
        return _along(found, node, value, axis)
    is_data = index == linear.data_index(node) and linear.linear_refusal(node) is None and not ir.attribute(node, "transA", 0)
    if not is_data or ir.attribute(node, "group", 1) != 1 or linear.channel_axis(node) % _rank(value) != axis:
        raise _Mixed(f"{ir.describe(node)} does not sum over them with one constant weight")
    if node not in found.readers:
        found.readers.append(node)
    return []


def _along(found: Region, node: ir.Node, value: ir.Value, axis: int) -> list[tuple[ir.Value, int]]:
    """What else has the same channels because `node`, that reads or makes `value`, keeps them apart."""
    out, images = node.outputs[0], axis == 1
    if node.domain or any(other.uses() or other.is_graph_output() for other in node.outputs[1:]):
        raise _Mixed(f"{ir.describe(node)} reads or makes them")
    if node.op_type == "Transpose":
        order = ir.attribute(node, "perm", tuple(range(_rank(out)))[::-1])
        start = order[axis] if value is out else axis
        return [(_input(node), start), (out, list(order).index(start))]
    behind = _rank(out) - axis
    if node.op_type in _ELEMENTWISE:
        rows = [row for index in range(len(node.inputs)) for row in _operand(found, node, index, behind)]
        return [*rows, (out, axis)]
    is_last = ir.attribute(node, "axis", -1) % _rank(out) == _rank(out) - 1 and behind == 1
    if (node.op_type in NORMALIZATIONS and is_last) or (images and (node.op_type in _POOLS or _is_depthwise(node))):
        for index, entry in enumerate(node.inputs[1:], start=1):
            array = ir.constant(entry)
            if entry is not None and (array is None or not array.ndim or array.shape[0] != found.width):
                raise _Mixed(f"{ir.describe(node)} has parameters that are not one constant a channel")
            if entry is not None:
                found.constants[node, index] = 0
        return [(_input(node), axis), (out, axis)]
    if images and _pools(node):
        return [(_input(node), axis), (out, axis)]
    raise _Mixed(f"{ir.describe(node)} does not keep them apart")


def _pools(node: ir.Node) -> bool:
    """Whether it takes away the axes behind axis 1, which hold one number a channel, or their mean."""
    if node.op_type == "Flatten":
        return bool(ir.attribute(node, "axis", 1) == 1 and all(size == 1 for size in _shape(_input(node))[2:]))
    axes = ir.constant(node.inputs[1]) if node.op_type == "ReduceMean" and len(node.inputs) > 1 else None
    return axes is not None and all(int(axis) % _rank(_input(node)) >= 2 for axis in axes)


def _operand(found: Region, node: ir.Node, index: int, behind: int) -> list[tuple[ir.Value, int]]:
    """Input `index` of an element-wise `node` if it has the channels, `behind` from its end; a constant goes to the region."""
    entry = node.inputs[index]
    if entry is None or len(shape := _shape(entry)) < behind or shape[-behind] == 1:
        return []
    if shape[-behind] != found.width:
        raise _Mixed(f"{ir.describe(node)} reads {shape[-behind]} channels")
    if ir.constant(entry) is None:
        return [(entry, len(shape) - behind)]
    found.constants[node, index] = len(shape) - behind
    return []


def _is_depthwise(node: ir.Node) -> bool:
    """Whether each channel of a convolution is its own group, and stays one channel."""
    shape = ir.constant_shape(linear.weight_of(node)) if node.op_type == "Conv" and linear.is_linear(node) else (0, 0)
    return shape[1] == 1 < shape[0] == ir.attribute(node, "group", 1)


def _shape(value: ir.Value) -> tuple[int | str | None, ...]:
    array = ir.constant(value)
    shape = array.shape if array is not None else ir.shape_of(value)
    if shape is None:
        raise _Mixed(f"the shape of {value.name!r} is not known")
    return shape


def _rank(value: ir.Value) -> int:
    return len(_shape(value))


def _input(node: ir.Node) -> ir.Value:
    value = node.inputs[0]
    assert value is not None
    return value


def _take(edit: Editor, node: ir.Node, index: int, axis: int, order: np.ndarray) -> None:
    array = ir.constant(node.inputs[index])
    assert array is not None
    edit.set_weight(node, index, np.ascontiguousarray(np.take(array, order, axis)))
