"""`split-projection` of `tune`: one matrix product for queries, keys and values, cut up behind it, becomes one product for each.

The weight is cut instead of the activation, which saves a copy of everything at run time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor


@dataclass(frozen=True)
class _Projection:
    """`cut(Transpose(Reshape(x W + b)))`, all of it read by cuts only.

    Attributes:
        layer: The MatMul or Gemm.
        add: The Add of its bias, if that is a node of its own.
        reshape, transpose: What brings the parts apart; the second may be missing.
        columns: Output channels of each part, int64 [parts, channels].
        dim: The axis of the parts behind the Reshape.
        axis: The same where they are cut.
        cuts: (value, part, whether it has lost the axis) of everything that is cut out.
    """

    layer: ir.Node
    add: ir.Node | None
    reshape: ir.Node
    transpose: ir.Node | None
    columns: np.ndarray
    dim: int
    axis: int
    cuts: tuple[tuple[ir.Value, int, bool], ...]


def split_projection(edit: Editor, node: ir.Node) -> None:
    """Rewrite `node` and what cuts up its output, if it is such a product. The nodes behind are left for pruning."""
    found = _find(node)
    if found is None:
        return
    made = {part: _part(edit, found, part) for part in sorted({part for _, part, _ in found.cuts})}
    for value, part, is_squeezed in found.cuts:
        new = made[part]
        if is_squeezed:
            axes = edit.shared((found.axis,), f"{node.name}_part_axis", lambda: np.array([found.axis], np.int64), "int64")
            new = edit.insert(_anchor(found), "Squeeze", [new, axes], output=f"{value.name}_part", like=value, after=True)
        edit.replace(value, new)


def _part(edit: Editor, found: _Projection, part: int) -> ir.Value:
    """One part, where it was cut out, with the axis of the parts (now of size 1)."""
    layer, columns, anchor = found.layer, found.columns[part], _anchor(found)
    name = f"{layer.name}_part_{part}"

    def follow(old: ir.Node, operands: Sequence[ir.Value | None], axis: int, size: int) -> ir.Value:
        """A node like `old`, on `operands`, whose output has `size` along `axis`."""
        attributes = {key: entry.value for key, entry in old.attributes.items()}
        suffix = name if old is layer else f"{name}_{old.op_type.lower()}"
        out = edit.insert(anchor, old.op_type, operands, output=suffix, attributes=attributes)
        shape = list(old.outputs[0].shape) if old.outputs[0].shape is not None else None
        if shape is not None:
            shape[axis] = size
        out.shape, out.type = None if shape is None else ir.Shape(shape), old.outputs[0].type
        return out

    def constant(value: ir.Value | None, axis: int, what: str) -> ir.Value:
        array = ir.constant(value)
        assert array is not None, "see _find"
        return edit.initializer(f"{name}_{what}", np.take(array, columns, axis), str(array.dtype))

    operands = list(layer.inputs)
    index = linear.LINEAR_OPS[layer.op_type].weight
    operands[index] = constant(linear.weight_of(layer), linear.out_axis(layer), "weight")
    bias = linear.bias_of(layer)
    if bias is not None:
        operands[linear.bias_index(layer)] = constant(bias, -1, "bias")
    value = follow(layer, operands, -1, len(columns))
    if found.add is not None:
        value = follow(found.add, [value, constant(_constant_operand(found.add), -1, "bias")], -1, len(columns))
    target = ir.constant(found.reshape.inputs[1])
    assert target is not None, "see _find"
    sizes = target.copy()
    sizes[found.dim] = 1
    shape = edit.shared(("part", *sizes.tolist()), f"{name}_shape", lambda: sizes, "int64")
    value = follow(found.reshape, [value, shape], found.dim, 1)
    return value if found.transpose is None else follow(found.transpose, [value], found.axis, 1)


def _anchor(found: _Projection) -> ir.Node:
    """The last node before the cuts."""
    return found.transpose or found.reshape


def _find(node: ir.Node) -> _Projection | None:
    if node.op_type not in ("MatMul", "Gemm") or not linear.is_linear(node):
        return None
    channels = ir.constant_shape(linear.weight_of(node))[linear.out_axis(node)]
    bias = linear.bias_of(node)
    reader, add = _only_reader(node.outputs[0]), None
    if reader is not None and reader.op_type == "Add" and _is_row(_constant_operand(reader), channels):
        add, reader = reader, _only_reader(reader.outputs[0])
    target = ir.constant(reader.inputs[1]) if reader is not None and reader.op_type == "Reshape" else None
    if reader is None or target is None or (bias is not None and not _is_row(bias, channels)):
        return None
    reshape, transpose, last = reader, None, reader
    after = _only_reader(reshape.outputs[0])
    if after is not None and after.op_type == "Transpose":
        transpose = last = after
    tail = _tail(target.tolist(), channels)
    perm = range(len(target)) if transpose is None else ir.attribute(transpose, "perm", range(len(target))[::-1])
    cuts = tuple(_cuts(last.outputs[0], len(target)))
    axes = {axis for axis, *_ in cuts}
    if tail is None or len(axes) != 1 or last.outputs[0].is_graph_output():
        return None
    (axis,) = axes
    dim = perm[axis]
    place = dim - (len(target) - len(tail))
    if place < 0 or tail[place] < 2:
        return None
    columns = np.moveaxis(np.arange(channels).reshape(tail), place, 0).reshape(tail[place], -1)
    return _Projection(node, add, reshape, transpose, columns, dim, axis, tuple((value, part, gone) for _, value, part, gone in cuts))


def _only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, once and in the same graph."""
    uses = ir.uses(value)
    if len(uses) != 1 or value.is_graph_output() or uses[0].node.domain or uses[0].node.graph is not value.graph:
        return None
    node = uses[0].node
    return node if uses[0].idx == 0 or node.op_type == "Add" else None


def _constant_operand(add: ir.Node) -> ir.Value | None:
    return next((value for value in add.inputs if value is not None and ir.constant(value) is not None), None)


def _is_row(value: ir.Value | None, channels: int) -> bool:
    array = ir.constant(value)
    return array is not None and array.shape == (channels,)


def _tail(sizes: list[int], channels: int) -> list[int] | None:
    """The last of `sizes` that together are the output channels."""
    for count in range(1, len(sizes)):
        tail = sizes[-count:]
        if min(tail) < 1 or math.prod(tail) > channels:
            return None
        if math.prod(tail) == channels:
            return tail
    return None


def _cuts(value: ir.Value, rank: int) -> Iterator[tuple[int, ir.Value, int, bool]]:
    """(axis, result, part, whether the axis is gone) of everything that reads `value`; an axis of -1 is that of no cut."""
    for use in ir.uses(value):
        node, nothing = use.node, (-1, value, 0, False)
        constants = [ir.constant(entry) for entry in node.inputs[1:]]
        if node.domain or use.idx != 0 or node.graph is not value.graph:
            yield nothing
        elif node.op_type == "Split":
            axis = ir.attribute(node, "axis", 0) % rank
            sizes = [shape[axis] if (shape := ir.shape_of(out)) is not None else None for out in node.outputs]
            yield from ((axis if set(sizes) == {1} else -1, out, part, False) for part, out in enumerate(node.outputs))
        elif node.op_type == "Gather" and constants[0] is not None and constants[0].ndim == 0 and constants[0] >= 0:
            yield ir.attribute(node, "axis", 0) % rank, node.outputs[0], int(constants[0]), True
        elif node.op_type == "Slice" and len(constants) >= 3 and all(entry is not None and entry.size == 1 for entry in constants):
            first, end, axis = (int(entry.reshape(-1)[0]) for entry in constants[:3] if entry is not None)
            yield (axis % rank, node.outputs[0], first, False) if 0 <= first == end - 1 else nothing
        else:
            yield nothing
