"""migrate: move the scale of outlier channels from activations into weights, before both are quantized.

Per layer the exponent is searched on measured error, and nothing moves where that gains too little. The factor disappears into
the normalization before the layer, or into the layer behind the attention that it reads, if nobody else reads that; elsewhere it
costs one element-wise Mul (and a shift a Sub).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.exclude import require_matches
from graphq.executor import run_ahead
from graphq.noise import decibel
from graphq.observers import ChannelRange, Range, Rows, Stat, range_stat
from graphq.passes import _bias, _layer_rows, _placement, _scaling
from graphq.passes import _migrate_math as math
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@dataclass(frozen=True)
class _Found:
    """What a search found for one activation: its range by channel, the factor, the shift and what they gain."""

    low: np.ndarray
    high: np.ndarray
    k: np.ndarray
    c: np.ndarray
    gain_db: float


@pass_options
class Migrate(Pass):
    """Evens out the channels of activations that MatMul and Gemm layers read (SmoothQuant, arXiv 2211.10438).

    Attributes:
        rule: How the factors are found: `smoothquant`, from the largest activations and weights, or `gps`, from rounding errors.
        alphas: Exponents that `smoothquant` chooses from, for each layer.
        shift: Whether to try taking the middle of each channel's range out of it too, where the layers have biases to put it into.
        activation_bits: Width that activations will be quantized to.
        weight_bits: The same for weights.
        min_gain_db: What a layer's output error must gain for a factor that folds into what is before it.
        min_gain_mul_db: The same for a factor that costs a Mul of its own.
        rows: Rows of activations on which the gain is measured, at most.
        exclude: Patterns of node names (or operator types) that are left alone.
    """

    name: ClassVar[str] = "migrate"
    needs_data: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    rule: Literal["smoothquant", "gps"] = "smoothquant"
    alphas: Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(min_length=1)] = math.ALPHAS
    shift: bool = False
    activation_bits: Annotated[int, Field(ge=3, le=8)] = 8
    weight_bits: Annotated[int, Field(ge=2, le=8)] = 8
    min_gain_db: Annotated[float, Field(ge=0)] = 0.5
    min_gain_mul_db: Annotated[float, Field(ge=0)] = 3.0
    rows: Annotated[int, Field(ge=16)] = 128
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        layers = self._layers(model, ctx.target)
        if not layers:
            return
        observers = {value: (ChannelRange(value.name or "", -1), Rows(value.name or "")) for value in layers}
        stats = ctx.observe(one for pair in observers.values() for one in pair)
        ranges = dict[ir.Value, tuple[float, float]]()
        seen = {value: [stats[observer] for observer in pair] for value, pair in observers.items()}
        jobs = (partial(self._search, nodes, seen[value][0], seen[value][1], ctx.target) for value, nodes in layers.items())
        for (value, nodes), found in zip(layers.items(), run_ahead(jobs), strict=True):
            k, c, name = found.k, found.c, value.name or ""
            ranges[value] = math.scaled_range(found.low, found.high, np.ones(len(k)))
            folds = _scaling.can_fold(value, nodes, shift=bool(c.any()), exclude=self.exclude)
            if found.gain_db < (self.min_gain_db if folds else self.min_gain_mul_db):
                continue
            for node in nodes if c.any() else ():
                _bias.shift(ctx.edit, node, c @ _scaling.matrix(node).astype(np.float64))
            for node in nodes:
                _scaling.multiply(ctx.edit, node, k)
            moved = _scaling.divide(ctx.edit, value, nodes, k, c, exclude=self.exclude)
            ranges[moved] = math.scaled_range(found.low - c, found.high - c, k)
            ctx.measure(name, gain_db=found.gain_db, folded=folds, shifted=bool(c.any()))
        for value, (least, most) in ranges.items():
            ctx.assume(Range(value.name or ""), range_stat(least, most, 1, 0))

    def _search(self, nodes: list[ir.Node], seen: Stat, rows: Stat, target: Target) -> _Found:
        """The best factor for what `nodes` read; changes nothing, so that several searches run at a time."""
        low, high = (np.asarray(seen[end], np.float64) for end in ("low", "high"))
        weight = np.concatenate([_scaling.matrix(node) for node in nodes], axis=1)
        activation = replace(target.activation, symmetric=False, bits=self.activation_bits)
        layer = math.Layer(rows["rows"][: self.rows], weight, low, high, activation, self.weight_bits)
        plain = layer.noise(np.ones(len(low), np.float32))
        k, noise = math.best(layer, self.rule, self.alphas)
        c = np.zeros(len(low))
        if self.shift and all(map(_bias.takes_data_shift, nodes)):
            middle = (low + high) / 2
            shifted_k, shifted_noise = math.best(layer.shifted(middle), self.rule, self.alphas)
            if shifted_noise < noise:
                k, noise, c = shifted_k, shifted_noise, middle
        return _Found(low, high, k, c, decibel(plain, noise))

    def _layers(self, model: ir.Model, target: Target) -> dict[ir.Value, list[ir.Node]]:
        """MatMul and Gemm layers by the activation they share, if they do most of the model's work."""
        anchors = _placement.place(model, target, exclude=self.exclude).anchors
        matrices = [node for node in anchors if node.op_type in ("MatMul", "Gemm")]
        if sum(map(linear.multiply_adds, matrices)) < sum(map(linear.multiply_adds, anchors)) / 2:
            return {}
        return _layer_rows.by_input(matrices, lambda node: "its data is transposed" if ir.attribute(node, "transA", 0) else None)
