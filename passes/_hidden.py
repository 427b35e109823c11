"""The hidden channels between linear layers: who makes them, what happens to each by itself on the way, and how to remove some.

`W₂ f(W₁ x)` with f channel by channel keeps its meaning for the channels that are left when others are cut out of W₁, f and W₂.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.passes import _layer_rows
from graphq.passes._normalize_batch_norm import BATCH_NORM

_ELEMENTWISE = frozenset({
    "Abs", "Cast", "Ceil", "Celu", "Clip", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish",
    "Neg", "Reciprocal", "Relu", "Round", "Selu", "Sigmoid", "Sign", "Softplus", "Softsign", "Sqrt", "Swish", "Tanh", "ThresholdedRelu",
})  # fmt: skip
_WITH_OPERANDS = frozenset({"Add", "Div", "Max", "Min", "Mul", "PRelu", "Pow", "Sub", "Sum"})
_POOLS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool", "MaxPool"})

Slice = tuple[ir.Node, int, int]
"""A node, the index of a constant input, and the axis of it that the channels lie on."""


@dataclass(frozen=True)
class Hidden:
    """What `reader` reads: `count` channels that `makers` make, changed one by one by the nodes `between`.

    Attributes:
        axis: Of the channels, in every activation on the way: 1, or -1.
        slices: The constants to cut; those of `reader` are among them.
    """

    reader: ir.Node
    makers: tuple[ir.Node, ...]
    between: tuple[ir.Node, ...]
    count: int
    axis: int
    slices: tuple[Slice, ...]


def find(model: ir.Model, reader: ir.Node, exclude: Sequence[str] = ()) -> Hidden | str:
    """The hidden channels that `reader` reads and nobody else, or why there are none."""
    reason = _reader_refusal(model, reader, exclude)
    if reason is not None:
        return reason
    data = linear.data_of(reader)
    count = ir.constant_shape(linear.weight_of(reader))[linear.in_axis(reader)]
    axis = 1 if reader.op_type != "MatMul" or len(ir.shape_of(data) or ()) == 2 else -1
    makers, between, seen, stack = list[ir.Node](), list[ir.Node](), set[ir.Node](), [data]
    slices: list[Slice] = [(reader, linear.LINEAR_OPS[reader.op_type].weight, linear.in_axis(reader))]
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None or node.graph is not model.graph:
            return f"what it reads depends on {value.name!r}, which no layer makes"
        if node in seen:
            continue
        seen.add(node)
        found = _step(model, node, count, axis, exclude)
        if isinstance(found, str):
            return f"{node.op_type} {node.name!r} before it {found}"
        sources, cuts = found
        (between if sources else makers).append(node)
        stack += sources
        slices += cuts
    if not makers:
        return "no layer makes what it reads"
    for node in [*makers, *between]:
        for out in node.outputs:
            others = [use.node for use in out.uses() if use.node not in between and (use.node is not reader or out is not data)]
            if others or out.is_graph_output() or (out is not node.outputs[0] and out.uses()):
                return f"what {node.op_type} {node.name!r} before it makes is read elsewhere too"
    return Hidden(reader, tuple(makers), tuple(between), count, axis, tuple(slices))


def cut(edit: Editor, hidden: Hidden, kept: np.ndarray) -> None:
    """Keep the channels `kept` (indices, ascending) alone."""
    for node, index, axis in hidden.slices:
        array = ir.constant(node.inputs[index])
        assert array is not None
        edit.set_weight(node, index, np.take(array, kept, axis))
    for node in [*hidden.makers, *hidden.between]:
        if node.op_type == "Conv" and node in hidden.between:
            edit.set_attribute(node, "group", len(kept))
        if memory := node.meta.get(BATCH_NORM):
            node.meta[BATCH_NORM] = {key: np.take(one, kept) if np.ndim(one) else one for key, one in memory.items()}
        out = node.outputs[0]
        edit.now_makes(out, "kept")
        shape = ir.shape_of(out)
        if shape is not None:
            sizes = list(shape)
            sizes[hidden.axis] = len(kept)
            out.shape = ir.Shape(sizes)


def _reader_refusal(model: ir.Model, node: ir.Node, exclude: Sequence[str]) -> str | None:
    reason = _layer_rows.refusal(model, node, exclude)
    if reason is None and ir.attribute(node, "group", 1) != 1:
        return "its channels lie in groups"
    return reason or ("it transposes its input" if ir.attribute(node, "transA", 0) else None)


def _step(model: ir.Model, node: ir.Node, count: int, axis: int, exclude: Sequence[str]) -> tuple[list[ir.Value], list[Slice]] | str:
    """What a node on the way reads channel by channel (nothing, if it makes them) and the constants to cut; or why it cannot be cut."""
    if node.domain:
        return "is no operator of ONNX"
    if node.op_type in linear.LINEAR_OPS:
        return _linear_step(model, node, count, axis, exclude)
    if node.op_type in _ELEMENTWISE:
        return [value for value in node.inputs[:1] if value is not None], []
    if node.op_type in _WITH_OPERANDS:
        return _operands(node, count, axis)
    if axis == 1 and node.op_type == "BatchNormalization" and not ir.attribute(node, "training_mode", 0):
        if any(ir.constant(value) is None for value in node.inputs[1:5]):
            return "has parameters that are not constants"
        return [value for value in node.inputs[:1] if value is not None], [(node, index, 0) for index in range(1, 5)]
    if axis == 1 and (node.op_type in _POOLS or _keeps_channels(node)):
        return [value for value in node.inputs[:1] if value is not None], []
    return "mixes channels"


def _keeps_channels(node: ir.Node) -> bool:
    """Whether it takes away spatial axes of a feature map."""
    shape = ir.shape_of(node.inputs[0]) if node.inputs else None
    if shape is None or len(shape) < 3:
        return False
    if node.op_type == "Flatten":
        return bool(ir.attribute(node, "axis", 1) == 1 and all(dim == 1 for dim in shape[2:]))
    axes = ir.constant(node.inputs[1]) if node.op_type == "ReduceMean" and len(node.inputs) > 1 else None
    return axes is not None and all(int(one) % len(shape) >= 2 for one in axes)


def _linear_step(model: ir.Model, node: ir.Node, count: int, axis: int, exclude: Sequence[str]) -> tuple[list[ir.Value], list[Slice]] | str:
    reason = _layer_rows.refusal(model, node, exclude)
    if reason is not None:
        return f"cannot be cut: {reason}"
    shape, bias = ir.constant_shape(linear.weight_of(node)), linear.bias_of(node)
    rank = len(ir.shape_of(linear.data_of(node)) or ()) if node.op_type == "MatMul" else len(shape)
    if shape[linear.out_axis(node)] != count or (linear.channel_axis(node) != axis and rank != 2):
        return f"makes other channels than the {count} that are read"
    cuts = [(node, linear.LINEAR_OPS[node.op_type].weight, linear.out_axis(node))]
    if bias is not None:
        given = ir.constant(bias)
        if given is None:
            return "has a bias that is not constant"
        if given.ndim and given.shape[-1] == count:
            cuts.append((node, linear.bias_index(node), given.ndim - 1))
    if ir.attribute(node, "group", 1) == 1:
        return [], cuts
    return ([linear.data_of(node)], cuts) if shape[1] == 1 and ir.attribute(node, "group", 1) == count else "has its channels in groups"


def _operands(node: ir.Node, count: int, axis: int) -> tuple[list[ir.Value], list[Slice]] | str:
    rank = len(ir.shape_of(node.outputs[0]) or ())
    sources, cuts = list[ir.Value](), list[Slice]()
    for index, value in enumerate(node.inputs):
        array = ir.constant(value)
        if array is None:
            sources += [value] if value is not None else []
            continue
        if array.size == 1:
            continue
        if not rank:
            return "has an unknown rank"
        own = array.ndim - (rank - axis % rank)  # the axis that meets the channels
        if own >= 0 and array.shape[own] != 1:
            cuts.append((node, index, own))
    return (sources, cuts) if sources else "is a constant"
