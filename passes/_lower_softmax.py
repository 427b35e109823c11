"""The part of `lower` for attention weights: a softmax with the quantizer behind it, and the product with the values, on packed codes."""

from __future__ import annotations

import numpy as np

from graphq import functions, ir, ops, ops_softmax
from graphq.log_quantizers import LogParams, LogUniform
from graphq.pipeline import PassContext

_SAME_LEVELS = frozenset({"SULQ", "QuantizeLog2"})
"""Quantizers of `sulq-softmax` whose levels are `exp(center + scale * code) - shift`."""

PACKED_BITS = 4


def lower(node: ir.Node, ctx: PassContext, operators: tuple[str, ...]) -> str | None:
    """Replace the quantizer `node` and the softmax before it, and the MatMul after it if that takes codes; else the reason why not."""
    softmax = ir.producer(node.inputs[0])
    params = _params(node)
    if node.op_type not in _SAME_LEVELS or params is None:
        return "no kernel has its levels"
    if softmax is None or softmax.op_type != "Softmax" or len(ir.uses(softmax.outputs[0])) != 1 or not _is_last_axis(softmax):
        return "it does not stand alone behind a softmax over the last axis"
    fitted = LogParams(*params[:3])
    quantizer = LogUniform(round(np.log2((params[4] - params[3]) / params[2] + 1)))
    products = [use.node for use in ir.uses(node.outputs[0])]
    if "SULQAttentionValue" in operators and quantizer.bits <= PACKED_BITS and all(_takes_codes(one, node.outputs[0]) for one in products):
        packed = _call(ctx, "SULQSoftmaxCodes", softmax, [softmax.inputs[0]], params, node.outputs[0])
        packed.type, packed.shape = ir.tensor_type("int8"), None
        levels = ctx.edit.initializer(f"{node.name}_levels", ops_softmax.code_levels(quantizer, fitted))
        for product in products:
            out = product.outputs[0]
            body = ops.OPERATORS["SULQAttentionValue"].body
            values = [packed, levels, product.inputs[1]]
            ctx.edit.replace(out, functions.call(ctx.edit, body, product, values, output=f"{out.name}_lowered", like=out))
            ctx.edit.remove(product)
    elif "SULQSoftmax" in operators:
        ctx.edit.replace(node.outputs[0], _call(ctx, "SULQSoftmax", softmax, [softmax.inputs[0]], params, node.outputs[0]))
    else:
        return "SULQSoftmax is not among the operators of the recipe"
    ctx.edit.remove(node)
    ctx.edit.remove(softmax)
    ctx.measure(node.name or "", bits=float(quantizer.bits))
    return None


def _call(ctx: PassContext, name: str, anchor: ir.Node, values: list[ir.Value | None], params: np.ndarray, like: ir.Value) -> ir.Value:
    operand = ctx.edit.initializer(f"{like.name}_params", params)
    return functions.call(ctx.edit, ops.OPERATORS[name].body, anchor, [*values, operand], output=f"{like.name}_lowered", like=like)


def _params(node: ir.Node) -> np.ndarray | None:
    """The input `params` of the operators, from those of the quantizer `node`: x, shift, center, scale, low, high..."""
    found = [ir.constant(value) for value in node.inputs[1:6]]
    arrays = [array for array in found if array is not None and array.size == 1]
    return np.array([array.item() for array in arrays], np.float32) if len(arrays) == 5 else None


def _is_last_axis(softmax: ir.Node) -> bool:
    rank = len(ir.shape_of(softmax.outputs[0]) or ())
    return ir.attribute(softmax, "axis", -1) in (-1, rank - 1)


def _takes_codes(node: ir.Node, weights: ir.Value) -> bool:
    """Whether `node` multiplies `weights` with values that have the same leading axes."""
    if node.domain or node.op_type != "MatMul" or node.inputs[0] is not weights or node.inputs[1] is weights:
        return False
    ours, theirs = ir.shape_of(weights), ir.shape_of(node.inputs[1])
    return ours is not None and theirs is not None and None not in ours and ours[:-2] == theirs[:-2] and len(ours) >= 2
