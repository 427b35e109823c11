"""The bias of a linear node, wherever it stands: as an input, as INT32 codes, or in an Add right behind a MatMul."""

from __future__ import annotations

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.executor import decode

Slot = tuple[ir.Node, int]
"""The node and input index that hold the bias."""


def find(node: ir.Node) -> Slot | None:
    """Where the constant bias of `node` stands; None if it has none of its own."""
    bias = linear.bias_of(node)
    if bias is not None:
        maker = bias.producer()
        if ir.constant(bias) is not None:
            return node, linear.bias_index(node)
        is_codes = maker is not None and maker.op_type == "DequantizeLinear" and ir.constant(maker.inputs[0]) is not None
        return (maker, 0) if is_codes and len(bias.uses()) == 1 and not bias.is_graph_output() else None  # type: ignore[return-value]
    uses = ir.uses(node.outputs[0])
    if (
        linear.channel_axis(node) == -1
        and len(uses) == 1
        and not node.outputs[0].is_graph_output()
        and uses[0].node.op_type == "Add"
        and uses[0].node.domain == ""
        and uses[0].node.graph is node.graph
    ):
        index = 1 - uses[0].idx
        array = ir.constant(uses[0].node.inputs[index])
        weight = linear.weight_of(node)
        channels = tuple(weight.shape)[linear.out_axis(node)] if weight is not None and weight.shape is not None else None
        if array is not None and array.ndim and array.size == array.shape[-1] == channels:
            return uses[0].node, index
    return None


def behind(node: ir.Node) -> np.ndarray:
    """What an Add right behind `node` adds to each output channel: float64 of shape (channels,), or 0 of shape ()."""
    slot = find(node)
    array = ir.constant(slot[0].inputs[slot[1]]) if slot is not None and slot[0].op_type == "Add" else None
    return np.zeros(()) if array is None else array.reshape(-1).astype(np.float64)


def added(model: ir.Model, node: ir.Node) -> np.ndarray:
    """What the bias of `node`, which `is_one_a_channel`, adds to each output channel: float64 of shape (channels,), (1,) or ()."""
    slot = find(node)
    if slot is None:
        return np.zeros(())
    holder, index = slot
    value = holder.outputs[0] if holder.op_type == "DequantizeLinear" else holder.inputs[index]
    assert value is not None
    return decode(model, value).reshape(-1).astype(np.float64) * (1.0 if holder.op_type == "Add" else _factor(node))


def is_one_a_channel(node: ir.Node) -> bool:
    """Whether the constant bias of `node`, if it has one, is the same for every row: that of a Gemm may not be."""
    slot = find(node)
    shape = () if slot is None else ir.constant_shape(slot[0].inputs[slot[1]])
    return all(size == 1 for size in shape[:-1])


def can_shift(node: ir.Node) -> bool:
    """Whether `shift` works on `node`: it has a bias of its own, or an input to put one."""
    slot = find(node)
    if slot is not None:
        return slot[0].op_type == "Add" or _factor(node) != 0
    return _factor(node) != 0 and node.op_type in ("Conv", "ConvTranspose", "Gemm") and linear.bias_of(node) is None


def takes_data_shift(node: ir.Node) -> bool:
    """Whether a constant added to the data of `node` comes out as `constant @ weight`, which its bias can take."""
    plain = ir.attribute(node, "alpha", 1.0) == 1.0 and ir.attribute(node, "beta", 1.0) == 1.0 and not ir.attribute(node, "transA", 0)
    return node.op_type in ("MatMul", "Gemm") and plain and can_shift(node)


def shift(edit: Editor, node: ir.Node, amount: np.ndarray) -> None:
    """Add `amount`, float of shape (output channels,), to the output of `node` through its bias; one is made if there is none."""
    slot = find(node)
    if slot is None or slot[0].op_type != "Add":
        amount = amount / _factor(node)
    if slot is None:
        edit.rewire(node, linear.bias_index(node), edit.initializer(f"{node.name}_bias", amount.astype(np.float32)))
        return
    holder, index = slot
    old = ir.constant(holder.inputs[index])
    assert old is not None
    if holder.op_type == "DequantizeLinear":
        scale = ir.constant(holder.inputs[1])
        assert scale is not None
        codes = old.astype(np.float64) + amount.reshape(old.shape) / scale
        edit.set_weight(holder, index, np.clip(np.rint(codes), -(2**31), 2**31 - 1).astype(np.int32))
        return
    moved = old.astype(np.float64) + amount.reshape(-1)
    if moved.size == old.size:
        moved = moved.reshape(old.shape)
    edit.set_weight(holder, index, moved.astype(np.float32))


def add(edit: Editor, node: ir.Node, amount: np.ndarray) -> None:
    """As `shift`; a node that has no bias and no input for one, a MatMul, gets an Add behind it."""
    if can_shift(node):
        shift(edit, node, amount)
        return
    value = node.outputs[0]
    readers = ir.uses(value)
    constant = edit.initializer(f"{node.name}_bias", np.asarray(amount, np.float32))
    result = edit.insert(node, "Add", [value, constant], output=f"{value.name}_biased", like=value, after=True)
    for use in readers:
        edit.rewire(use.node, use.idx, result)
    if value.is_graph_output():
        edit.replace_output(value, result)


def _factor(node: ir.Node) -> float:
    """What a bias input is multiplied by: `beta` of a Gemm."""
    return float(ir.attribute(node, "beta", 1.0)) if node.op_type == "Gemm" else 1.0
