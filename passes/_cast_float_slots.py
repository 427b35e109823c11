"""Which values of a node may be half: what ONNX's definition of its operator says, or the contract of graphq's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from onnx import defs

from graphq import ir, ops
from graphq.half import Half

GENERIC: Mapping[str, frozenset[str]] = MappingProxyType({
    "W4A16Gemm": frozenset({"x", "w_scale", "bias"}), "W8A8Gemm": frozenset({"bias"}), "W4A8Gemm": frozenset({"bias"}),
    "SULQSoftmax": frozenset({"x"}), "SULQSoftmaxCodes": frozenset({"x"}), "SULQAttentionValue": frozenset({"v"}),
})  # fmt: skip
"""Inputs of the operators of `graphq.ops` that are of the type T of their contracts; so is a float output. Their bodies take any T. Other
inputs, and those of all other functions, are float32."""


@dataclass(frozen=True)
class Slots:
    """Which float32 values of a node become half if the node does.

    Attributes:
        inputs: Indices of inputs; float32 inputs that are not named have no other type (the scales of a Resize).
        outputs: Indices of outputs.
        moves: Whether the operator only moves elements: it takes text as well as numbers.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    moves: bool


def slots(node: ir.Node, opset: int, half: Half) -> Slots | str:
    """What becomes half in `node` by its definition in `opset`, or why it has to stay float32."""
    wide = ir.DataType.FLOAT
    if node.domain == ir.DOMAIN:
        return _function(node)
    try:
        schema = defs.get_schema(node.op_type, opset, node.domain)
    except defs.SchemaError:
        return f"{node.domain or 'ai.onnx'}.{node.op_type} is not an operator of ONNX"
    named = f"tensor({half.storage})"
    given = [(index, _formal(schema.inputs, index)) for index, value in enumerate(node.inputs) if value is not None and value.dtype == wide]
    made = [(index, _formal(schema.outputs, index)) for index, value in enumerate(node.outputs) if value.dtype == wide]
    inputs = [(index, formal) for index, formal in given if named in formal.types]
    tied = {formal.type_str for _, formal in inputs}
    if node.op_type == "DequantizeLinear" and not ir.attribute(node, "output_dtype", 0):  # from opset 23 on its definition does not say so
        tied |= {schema.outputs[0].type_str} if 1 in dict(inputs) else set()
    unnamed = f"it has no {half.storage} form in opset {opset}"
    for index, formal in made:
        if named not in formal.types:
            return unnamed
        if formal.type_str not in tied and node.op_type != "Cast" and (node.outputs[index].uses() or node.outputs[index].is_graph_output()):
            return f"its output {formal.name} is float32 whatever it reads"
    if not inputs and not made:
        return unnamed
    moves = all("tensor(string)" in formal.types for _, formal in [*inputs, *made])
    return Slots(tuple(index for index, _ in inputs), tuple(index for index, _ in made if node.outputs[index].name), moves)


def _formal(parameters: Sequence[defs.OpSchema.FormalParameter], index: int) -> defs.OpSchema.FormalParameter:
    """The definition of input or output `index`: the last one stands for all that follow."""
    return parameters[min(index, len(parameters) - 1)]


def _function(node: ir.Node) -> Slots | str:
    """What becomes half in a call of a function of graphq."""
    if node.op_type not in GENERIC:
        return "functions of graphq compute in float32"
    names = ops.OPERATORS[node.op_type].inputs
    given = [index for index, value in enumerate(node.inputs) if value is not None and value.dtype == ir.DataType.FLOAT]
    made = [index for index, value in enumerate(node.outputs) if value.dtype == ir.DataType.FLOAT]
    return Slots(tuple(index for index in given if names[index] in GENERIC[node.op_type]), tuple(made), False)
