"""Fold BatchNormalization into the linear operator before it, and keep its parameters for data-free methods."""

from __future__ import annotations

import numpy as np

from graphq import ir, linear
from graphq.passes._normalize_graph import graph_nodes
from graphq.passes._normalize_math import affine, fold_bias, scale_outputs
from graphq.pipeline import PassContext

BATCH_NORM = "graphq.batch_norm"
"""Key in `node.meta` of an operator that a BatchNormalization was folded into. The value is a dict of float32 arrays (channels,)
`gamma`, `beta`, `mean`, `var` and the float `epsilon`: over the training data, the operator's output has mean `beta` and standard
deviation `|gamma|` now; before folding it had mean `mean` and variance `var`."""

_HOSTS = frozenset({"Conv", "ConvTranspose", "Gemm"})
_PARAMETERS = ("gamma", "beta", "mean", "var")


def fold_batch_norms(ctx: PassContext) -> None:
    """Fold what is exact; every other BatchNormalization is a skip with its reason."""
    for node in graph_nodes(ctx.model):
        if node.op_type != "BatchNormalization" or node.domain:
            continue
        reason = _refusal(node)
        if reason is None:
            _fold(ctx, node)
        else:
            ctx.skip(node, f"not folded: {reason}")


def _refusal(node: ir.Node) -> str | None:
    if ir.attribute(node, "training_mode", 0) or any(out.name and (out.uses() or out.is_graph_output()) for out in node.outputs[1:]):
        return "it is in training mode"
    if any(ir.constant(value) is None for value in node.inputs[1:5]):
        return "its parameters are not constants"
    source = node.inputs[0]
    host = ir.producer(source)
    if source is None or host is None or host.domain or host.op_type not in _HOSTS:
        return f"it follows {host.op_type if host is not None else 'an input'}, not a linear operator"
    if host.graph is not node.graph:
        return f"{host.op_type} {host.name!r} before it lies in another graph"
    readers = len(source.uses()) + source.is_graph_output()
    if readers > 1:
        return f"the output of {host.op_type} {host.name!r} is read in {readers} places"
    reason = linear.linear_refusal(host)
    if reason is not None:
        return f"{host.op_type} {host.name!r}: {reason}"
    return _bias_refusal(host)


def _bias_refusal(host: ir.Node) -> str | None:
    bias = linear.bias_of(host)
    if bias is not None and ir.constant(bias) is None:
        return f"the bias of {host.op_type} {host.name!r} is not a constant"
    if host.op_type == "Gemm" and ir.attribute(host, "beta", 1.0) == 0:
        return f"Gemm {host.name!r} has beta 0"
    return None


def _fold(ctx: PassContext, node: ir.Node) -> None:
    host = ir.producer(node.inputs[0])
    assert host is not None
    arrays = {name: ir.constant(value) for name, value in zip(_PARAMETERS, node.inputs[1:5], strict=True)}
    parameters = {name: np.array(array, np.float32) for name, array in arrays.items()}
    epsilon = float(ir.attribute(node, "epsilon", 1e-5))
    factor, offset = affine(*(parameters[name] for name in _PARAMETERS), epsilon)
    weight, bias = ir.constant(linear.weight_of(host)), ir.constant(linear.bias_of(host))
    assert weight is not None
    groups = int(ir.attribute(host, "group", 1))
    _set(ctx, host, linear.LINEAR_OPS[host.op_type].weight, scale_outputs(weight, factor, linear.out_axis(host), groups))
    beta = float(ir.attribute(host, "beta", 1.0)) if host.op_type == "Gemm" else 1.0
    _set(ctx, host, 2, fold_bias(bias, factor, offset, beta))
    host.meta[BATCH_NORM] = {**parameters, "epsilon": epsilon}
    ctx.edit.replace(node.outputs[0], host.outputs[0])
    ctx.edit.remove(node)


def _set(ctx: PassContext, host: ir.Node, index: int, array: np.ndarray) -> None:
    """Write a weight or bias as float32; a host without a bias gets one."""
    if index < len(host.inputs) and host.inputs[index] is not None:
        ctx.edit.set_weight(host, index, array.astype(np.float32))
    else:
        value = ctx.edit.initializer(f"{host.name}_bias", array.astype(np.float32), graph=host.graph)  # type: ignore[arg-type]
        ctx.edit.rewire(host, index, value)
