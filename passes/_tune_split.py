"""`split-projection` of `tune`: one matrix product for queries, keys and values, cut up behind it, becomes one product for each.

The weight is cut instead of the activation, which saves a copy of everything at run time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.exclude import PART_OF, given_name


@dataclass(frozen=True)
class _Cut:
    """A value that is one part along `axis`, which it has kept (with size 1) or lost."""

    value: ir.Value
    axis: int
    part: int
    is_squeezed: bool


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
        cuts: Everything that is cut out.
    """

    layer: ir.Node
    add: ir.Node | None
    reshape: ir.Node
    transpose: ir.Node | None
    columns: np.ndarray
    dim: int
    axis: int
    cuts: tuple[_Cut, ...]


def split_projection(edit: Editor, node: ir.Node) -> None:
    """Rewrite `node` and what cuts up its output, if it is such a product. The nodes behind are left for pruning."""
    found = _find(node)
    if found is None:
        return
    made = {part: _part(edit, found, part) for part in sorted({cut.part for cut in found.cuts})}
    for cut in found.cuts:
        new = made[cut.part]
        if cut.is_squeezed:
            axes = edit.shared(("split-projection axis", found.axis), f"{node.name}_part_axis", lambda: np.array([found.axis]), "int64")
            new = edit.insert(_anchor(found), "Squeeze", [new, axes], output=f"{cut.value.name}_part", like=cut.value, after=True)
        edit.replace(cut.value, new)


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
        if old is layer:
            for key, text in {**layer.metadata_props, PART_OF: given_name(layer)}.items():
                edit.annotate(out.producer(), key, text)  # type: ignore[arg-type]
        return out

    def constant(value: ir.Value | None, axis: int, what: str) -> ir.Value:
        array = ir.constant(value)
        assert array is not None, "see _find"
        key = ("split-projection", value, axis, columns.tobytes())
        return edit.shared(key, f"{name}_{what}", lambda: np.take(array, columns, axis), str(array.dtype))

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
    shape = edit.shared(("split-projection shape", *sizes.tolist()), f"{name}_shape", lambda: sizes, "int64")
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
    cuts = [_cut(use.node, use.idx, len(target)) for use in ir.uses(last.outputs[0])]
    if tail is None or last.outputs[0].is_graph_output() or not all(cuts):
        return None
    found = [cut for entry in cuts for cut in entry]
    axis = found[0].axis
    dim = axis if transpose is None else ir.attribute(transpose, "perm", range(len(target))[::-1])[axis]
    place = dim - (len(target) - len(tail))
    if place < 0 or tail[place] < 2 or any(cut.axis != axis or cut.part >= tail[place] for cut in found):
        return None
    if len({cut.part for cut in found}) < len(found) and any(cut.value.is_graph_output() for cut in found):
        return None  # one value cannot be two outputs
    columns = np.moveaxis(np.arange(channels).reshape(tail), place, 0).reshape(tail[place], -1)
    return _Projection(node, add, reshape, transpose, columns, dim, axis, tuple(found))


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


def _cut(node: ir.Node, index: int, rank: int) -> list[_Cut]:
    """What `node` cuts out of the value of `rank` that is its input `index`; nothing if it does anything else."""
    constants = [ir.constant(entry) for entry in node.inputs[1:]]
    if node.domain or index != 0 or any(array is None for array in constants):
        return []
    given = [array.reshape(-1) for array in constants if array is not None]
    if node.op_type == "Split":
        axis = ir.attribute(node, "axis", 0) % rank
        sizes = [shape[axis] if (shape := ir.shape_of(out)) is not None else None for out in node.outputs]
        return [_Cut(out, axis, part, False) for part, out in enumerate(node.outputs)] if set(sizes) == {1} else []
    if node.op_type == "Gather" and constants[0] is not None and constants[0].ndim == 0 and given[0][0] >= 0:
        return [_Cut(node.outputs[0], ir.attribute(node, "axis", 0) % rank, int(given[0][0]), True)]
    if node.op_type == "Slice" and len(given) >= 3 and all(array.size == 1 for array in given):
        first, end, axis, step = (int(array[0]) for array in (*given, np.ones(1))[:4])
        return [_Cut(node.outputs[0], axis % rank, first, False)] if 0 <= first == end - 1 and step == 1 else []
    return []
