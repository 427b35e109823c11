"""migrate: move the scale of outlier channels from activations into weights, before both are quantized.

Per layer the exponent is searched on measured error, and nothing moves where that gains too little. The factor disappears
into the normalization before the layer if nobody else reads its output; elsewhere it costs one element-wise Mul.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.observers import ChannelRange, Range, Rows
from graphq.passes import _migrate_math as math
from graphq.passes import _placement
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class Migrate(Pass):
    """Evens out the channels of activations that MatMul and Gemm layers read (SmoothQuant, arXiv 2211.10438).

    Attributes:
        min_gain_db: What a layer's output error must gain for a factor that folds into the normalization before it.
        min_gain_mul_db: The same for a factor that costs a Mul of its own.
        rows: Rows of activations on which the gain is measured, at most.
        exclude: Patterns of node names that are left alone.
    """

    name: ClassVar[str] = "migrate"
    needs_data: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    min_gain_db: Annotated[float, Field(ge=0)] = 0.5
    min_gain_mul_db: Annotated[float, Field(ge=0)] = 3.0
    rows: Annotated[int, Field(ge=16)] = 256
    exclude: tuple[str, ...] = ()

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        layers = self._layers(model, ctx.target)
        if not layers:
            return
        observers = {value: (ChannelRange(value.name or "", -1), Rows(value.name or "")) for value in layers}
        stats = ctx.observe(one for pair in observers.values() for one in pair)
        ranges = {}
        for value, nodes in layers.items():
            seen, rows = (stats[observer] for observer in observers[value])
            low, high = (np.asarray(seen[end], np.float64) for end in ("low", "high"))
            ranges[value.name or ""] = (float(low.min()), float(high.max()))
            weights = [_matrix(node) for node in nodes]
            k, gain = math.search(rows["rows"][: self.rows], weights, low, high, replace(ctx.target.activation, symmetric=False))
            folds = _folds(value, nodes)
            if gain < (self.min_gain_db if folds else self.min_gain_mul_db):
                continue
            moved = _fold(ctx, value, k) if folds else _multiply(ctx, value, nodes, k)
            for node, weight in zip(nodes, weights, strict=True):
                scaled = weight * k[:, None]
                ctx.edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, scaled.T if linear.in_axis(node) else scaled)
            ranges[moved.name or ""] = math.scaled_range(low, high, k)
            ctx.measure(value.name or "", gain_db=gain, folded=folds)
        for name, (least, most) in ranges.items():
            ctx.assume(Range(name), {"low": np.array(least), "high": np.array(most), "count": np.array(1), "nonfinite": np.array(0)})

    def _layers(self, model: ir.Model, target: Target) -> dict[ir.Value, list[ir.Node]]:
        """MatMul and Gemm layers by the activation they share, if they do most of the model's work."""
        anchors = _placement.place(model, target, exclude=self.exclude).anchors
        matrices = [node for node in anchors if node.op_type in ("MatMul", "Gemm")]
        if sum(map(linear.multiply_adds, matrices)) < sum(map(linear.multiply_adds, anchors)) / 2:
            return {}
        layers: dict[ir.Value, list[ir.Node]] = {}
        for node in matrices:
            if not ir.attribute(node, "transA", 0):
                layers.setdefault(linear.data_of(node), []).append(node)
        return layers


def _matrix(node: ir.Node) -> np.ndarray:
    """The weight of `node` as [D, O]."""
    weight = ir.constant(linear.weight_of(node))
    assert weight is not None
    return weight.T if linear.in_axis(node) else weight


def _folds(value: ir.Value, nodes: list[ir.Node]) -> bool:
    """Whether `value` leaves a normalization for `nodes` alone, so that its gain and shift can take the factor."""
    maker = value.producer()
    if maker is None or maker.domain or maker.op_type != "LayerNormalization" or value.is_graph_output() or len(maker.inputs) < 2:
        return False
    channels = (len(_matrix(nodes[0])),)
    arrays = [ir.constant(entry) for entry in maker.inputs[1:] if entry is not None]
    return {use.node for use in ir.uses(value)} == set(nodes) and all(array is not None and array.shape == channels for array in arrays)


def _fold(ctx: PassContext, value: ir.Value, k: np.ndarray) -> ir.Value:
    maker = value.producer()
    assert maker is not None
    for index in range(1, len(maker.inputs)):
        array = ir.constant(maker.inputs[index])
        if array is not None:
            ctx.edit.set_weight(maker, index, array / k)
    return value


def _multiply(ctx: PassContext, value: ir.Value, nodes: list[ir.Node], k: np.ndarray) -> ir.Value:
    factor = ctx.edit.initializer(f"{value.name}_factor", (1 / k).astype(np.float32))
    maker = value.producer()
    moved = ctx.edit.insert(maker, "Mul", [value, factor], output=f"{value.name}_migrated", like=value, after=maker is not None)
    for node in nodes:
        ctx.edit.rewire(node, linear.data_index(node), moved)
    return moved
