"""equalize: even out the channels between two linear operators without changing the function (DFQ, arXiv 1906.04721, section 4.1).

Each output channel of the first is divided by a factor that the second multiplies back. Activations quantized with one scale for
the whole tensor, and weights quantized so, then lose less to the channel with the largest range. Run it before quantizers are placed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.passes._equalize_math import Layout, equalize_chain, out_range, scale, spread
from graphq.passes._normalize_batch_norm import BATCH_NORM
from graphq.pipeline import Pass, PassContext, pass_options

_HOMOGENEOUS = frozenset({"Relu", "LeakyRelu", "PRelu"})
"""f(s x) = s f(x) for every s > 0, element by element."""
_POOLS = frozenset({"MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool"})
"""Homogeneous too, and each channel by itself if the channels lie on axis 1."""


@dataclass(frozen=True)
class _Pair:
    """Two linear nodes whose channels in between may be scaled; `bias` is a constant Add behind the first, with its input."""

    first: ir.Node
    second: ir.Node
    bias: tuple[ir.Node, int] | None


@pass_options
class Equalize(Pass):
    """Balances the weight ranges of successive layers, channel by channel; the float function stays the same.

    Attributes:
        iterations: Walks over a chain of layers, at most; fewer if the factors have settled.
    """

    name: ClassVar[str] = "equalize"
    keeps_function: ClassVar[bool] = True

    iterations: Annotated[int, Field(ge=1, le=1000)] = 20

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        pairs = {}
        for node in model.graph.all_nodes():
            if linear.is_linear(node):
                found = _pair(node)
                if isinstance(found, _Pair):
                    pairs[node] = found
                else:
                    ctx.skip(node, found)
        for chain in _chains(pairs):
            _equalize(ctx, chain, self.iterations)


def _pair(first: ir.Node) -> _Pair | str:
    """The pair that `first` begins, or why it begins none."""
    reason = _fixed(first)
    if reason is not None:
        return reason
    images = linear.channel_axis(first) == 1
    bias: tuple[ir.Node, int] | None = None
    value = first.outputs[0]
    while True:
        if value.is_graph_output():
            return "its output is an output of the graph"
        uses = list(value.uses())
        if len(uses) != 1:
            return f"its output is read by {len(uses)} nodes"
        node, index = uses[0]
        if node.graph is not first.graph:
            return f"its output is read in a subgraph, by {node.op_type}"
        if node.op_type in linear.LINEAR_OPS and node.domain == "":
            return _second(first, node, index, bias)
        if node.op_type == "Add" and node.domain == "" and not images and bias is None and value is first.outputs[0]:
            other = node.inputs[1 - index]
            if not _is_own_constant(other):
                return "what is added to its output is not a constant of its own"
            bias = (node, 1 - index)
        elif node.domain or index != 0 or node.op_type not in (_HOMOGENEOUS | _POOLS if images else _HOMOGENEOUS):
            return f"{node.op_type} is not positively homogeneous channel by channel"
        value = node.outputs[0]
        if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
            return f"a second output of {node.op_type} is read"


def _second(first: ir.Node, second: ir.Node, index: int, bias: tuple[ir.Node, int] | None) -> _Pair | str:
    if index != linear.LINEAR_OPS[second.op_type].data:
        return f"its output is the weight or bias of {second.op_type} {second.name!r}"
    reason = linear.linear_refusal(second) or _fixed(second, as_second=True)
    if reason is not None:
        return f"{second.op_type} {second.name!r} behind it: {reason}"
    if linear.channel_axis(first) != linear.channel_axis(second):
        return f"{second.op_type} {second.name!r} behind it sums over another axis"
    if _channels(first)[0] != _channels(second)[1]:
        return f"{second.op_type} {second.name!r} behind it reads {_channels(second)[1]} channels, not {_channels(first)[0]}"
    return _Pair(first, second, bias)


def _fixed(node: ir.Node, as_second: bool = False) -> str | None:
    """Why the weight (and the bias, of the first of a pair) cannot be scaled."""
    weight, bias = linear.weight_of(node), linear.bias_of(node)
    if not _is_own_constant(weight):
        return "its weight is shared with another node"
    if as_second and ir.attribute(node, "transA", 0):
        return "it transposes its input"
    if not as_second and bias is not None and ir.constant(bias) is None:
        return "its bias is not a constant"
    return None


def _is_own_constant(value: ir.Value | None) -> bool:
    if value is None or not value.is_initializer() or ir.constant(value) is None:
        return False
    return len(value.uses()) == 1 and not value.is_graph_output()


def _layout(node: ir.Node) -> Layout:
    return Layout(linear.out_axis(node) == 0, int(ir.attribute(node, "group", 1)) if linear.channel_axis(node) == 1 else 1)


def _weight(node: ir.Node) -> np.ndarray:
    array = ir.constant(linear.weight_of(node))
    assert array is not None
    return array


def _channels(node: ir.Node) -> tuple[int, int]:
    """Output and input channels, over all groups."""
    shape = _weight(node).shape
    groups = _layout(node).groups
    return (shape[0], shape[1] * groups) if linear.out_axis(node) == 0 else (shape[1] * groups, shape[0])


def _chains(pairs: dict[ir.Node, _Pair]) -> Iterator[list[_Pair]]:
    """Pairs that share a node, in order. A node begins and ends one pair at most, so chains do not branch."""
    continued = {pair.second for pair in pairs.values()}
    for node in pairs:
        if node in continued:
            continue
        chain = [pairs[node]]
        while chain[-1].second in pairs:
            chain.append(pairs[chain[-1].second])
        yield chain


def _equalize(ctx: PassContext, chain: list[_Pair], iterations: int) -> None:
    nodes = [chain[0].first, *(pair.second for pair in chain)]
    blocks = [_layout(node).to_blocks(_weight(node)) for node in nodes]
    factors = equalize_chain(blocks, iterations)
    for index, node in enumerate(nodes):
        after = factors[index] if index < len(factors) else None
        before = factors[index - 1] if index else None
        if all(factor is None or np.all(factor == 1) for factor in (before, after)):
            continue
        scaled = scale(blocks[index], outputs=after, inputs=before)
        if after is not None:
            old_spread, new_spread = spread(out_range(blocks[index])), spread(out_range(scaled))
            ctx.measure(node.name or "", channel_spread_before=old_spread, channel_spread_after=new_spread)
        old = _weight(node)
        new = _layout(node).from_blocks(scaled, old.shape).astype(old.dtype)
        ctx.edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, new)
        if after is not None:
            _scale_outputs(ctx, chain[index], after)


def _scale_outputs(ctx: PassContext, pair: _Pair, factor: np.ndarray) -> None:
    """Divide what is added to the first of a pair, and what is remembered of its BatchNormalization; rename what is scaled."""
    value = pair.first.outputs[0]
    while True:
        ctx.edit.now_makes(value, "equalized")
        reader = ir.uses(value)[0].node
        if reader is pair.second:
            break
        value = reader.outputs[0]
    if linear.bias_of(pair.first) is not None:
        _divide(ctx, pair.first, linear.LINEAR_OPS[pair.first.op_type].bias or 0, factor)
    if pair.bias is not None:
        _divide(ctx, *pair.bias, factor)
    memory = pair.first.meta.get(BATCH_NORM)
    if memory is not None:
        scaled = {key: (memory[key] / factor).astype(np.float32) for key in ("gamma", "beta")}
        pair.first.meta[BATCH_NORM] = {**memory, **scaled}


def _divide(ctx: PassContext, node: ir.Node, index: int, factor: np.ndarray) -> None:
    """Channels lie on the last axis of a bias; one that is the same for all channels becomes one per channel."""
    old = ir.constant(node.inputs[index])
    assert old is not None
    ctx.edit.set_weight(node, index, (old.astype(np.float64) / factor).astype(old.dtype))
