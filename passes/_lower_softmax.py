"""The part of `lower` for attention weights: a softmax with the quantizer behind it, and the product with the values, on packed codes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphq import functions, ir, ops, ops_softmax
from graphq.exclude import is_excluded
from graphq.log_quantizers import LogParams, LogUniform
from graphq.operands import Operand
from graphq.pipeline import PassContext

_SAME_LEVELS = frozenset({"SULQ", "QuantizeLog2"})
"""Quantizers of `sulq-softmax` whose levels are `exp(center + scale * code) - shift`."""

PACKED_BITS = 4


@dataclass(frozen=True)
class Attention:
    """A softmax with the quantizer behind it.

    Attributes:
        params: Of the quantizer, as the operators take them.
        products: What takes codes; nothing if its weights stay numbers.
        reason: Why they do.
    """

    softmax: ir.Node
    quantizer: ir.Node
    params: np.ndarray
    products: Sequence[ir.Node] = ()
    reason: str = ""

    @property
    def fitted(self) -> tuple[LogUniform, LogParams]:
        shift, center, scale, low, high = self.params
        return LogUniform(round(np.log2((high - low) / scale + 1))), LogParams(shift, center, scale)


def plan(node: ir.Node, operators: Sequence[str], exclude: Sequence[str]) -> Attention | str:
    """What the quantizer `node` of attention weights becomes, with the nodes around it, or why they stay."""
    softmax, params = ir.producer(node.inputs[0]), _params(node)
    if node.op_type not in _SAME_LEVELS or params is None:
        return "no kernel has its levels"
    if softmax is None or len(ir.uses(softmax.outputs[0])) != 1 or not _is_last_axis(softmax):
        return "it does not stand alone behind a softmax over the last axis"
    if softmax.outputs[0].is_graph_output():
        return "the model returns what it reads"
    if is_excluded(node, exclude) or is_excluded(softmax, exclude):
        return "excluded by the recipe"
    if why := ops.refusal("SULQSoftmax", {"x": _operand(softmax.inputs[0]), "params": Operand((5,), "float32")}):
        return why
    found = Attention(softmax, node, params, [use.node for use in ir.uses(node.outputs[0])])
    reason = _no_codes(found, operators, exclude)
    if reason is None:
        return found
    if "SULQSoftmax" not in operators:
        return f"SULQSoftmax is not among the operators of the recipe; {reason}"
    return Attention(softmax, node, params, reason=reason)


def write(found: Attention, ctx: PassContext) -> None:
    """Put the operators in the place of the nodes."""
    node, (quantizer, fitted) = found.quantizer, found.fitted
    result = _softmax("SULQSoftmaxCodes" if found.products else "SULQSoftmax", found, ctx)
    if found.products:
        result.type, result.shape = ir.tensor_type("int8"), None
        levels = ctx.edit.initializer(f"{node.outputs[0].name}_levels", ops_softmax.code_levels(quantizer, fitted))
        body = ops.OPERATORS["SULQAttentionValue"].body
        for product in found.products:
            out = product.outputs[0]
            values = [result, levels, product.inputs[1]]
            ctx.edit.replace(out, functions.call(ctx.edit, body, product, values, output=f"{out.name}_lowered", like=out))
            ctx.edit.remove(product)
    else:
        ctx.edit.replace(node.outputs[0], result)
    ctx.edit.remove(node)
    ctx.edit.remove(found.softmax)
    ctx.measure(node.name or "", bits=float(quantizer.bits))


def _softmax(name: str, found: Attention, ctx: PassContext) -> ir.Value:
    like = found.quantizer.outputs[0]
    operands = [found.softmax.inputs[0], ctx.edit.initializer(f"{like.name}_params", found.params)]
    return functions.call(ctx.edit, ops.OPERATORS[name].body, found.softmax, operands, output=f"{like.name}_lowered", like=like)


def _params(node: ir.Node) -> np.ndarray | None:
    """The input `params` of the operators, from those of the quantizer `node`: x, shift, center, scale, low, high..."""
    found = [ir.constant(value) for value in node.inputs[1:6]]
    arrays = [array for array in found if array is not None and array.size == 1]
    return np.array([array.item() for array in arrays], np.float32) if len(arrays) == 5 else None


def _is_last_axis(softmax: ir.Node) -> bool:
    rank = len(ir.shape_of(softmax.outputs[0]) or ())
    return ir.attribute(softmax, "axis", -1) in (-1, rank - 1)


def _no_codes(found: Attention, operators: Sequence[str], exclude: Sequence[str]) -> str | None:
    """Why what reads the weights does not get them as codes."""
    weights = found.quantizer.outputs[0]
    if "SULQAttentionValue" not in operators:
        return "SULQAttentionValue is not among the operators of the recipe"
    if found.fitted[0].bits > PACKED_BITS:
        return f"its codes have more than {PACKED_BITS} bits"
    if weights.is_graph_output() or not found.products:
        return "its levels are what the model returns"
    reasons = [_no_product(node, weights, exclude) for node in found.products]
    return next(filter(None, reasons), None)


def _no_product(node: ir.Node, weights: ir.Value, exclude: Sequence[str]) -> str | None:
    """Why `node` is no product of `weights` with values that have the same leading axes, as the kernel takes them."""
    if node.domain or node.op_type != "MatMul" or node.inputs[0] is not weights or node.inputs[1] is weights:
        return "not all that reads its levels are products with values"
    if is_excluded(node, exclude):
        return "its product is excluded by the recipe"
    ours, theirs = ir.shape_of(weights), ir.shape_of(node.inputs[1])
    if ours is None or theirs is None or None in ours or len(ours) < 2 or ours[:-2] != theirs[:-2] or not isinstance(theirs[-1], int):
        return "its leading axes, or the width of the values, are not known to be as the kernel takes them"
    values = _operand(node.inputs[1])
    packed = Operand((*values.shape[:-2], 1, (values.shape[-2] + 1) // 2), "int8")
    return ops.refusal("SULQAttentionValue", {"packed": packed, "levels": Operand((16,), "float32"), "v": values})


def _operand(value: ir.Value | None) -> Operand:
    """With every open axis 1, and as a row if nothing is known of it."""
    shape = tuple(size if isinstance(size, int) else 1 for size in ir.shape_of(value) or (1,))
    dtype = None if value is None or value.dtype is None else value.dtype.numpy()
    return Operand(shape, "float32" if dtype is None else str(np.dtype(dtype)))
