"""Weights as integers, rounded with calibration data, layer by layer: what `round` does, and `sos` between its stages."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphq import ir, linear, qdq
from graphq.errors import TargetError
from graphq.exclude import require_matches
from graphq.noise import decibel
from graphq.passes import _aqer_math as aqer
from graphq.passes import _bias, _layer_rows, _twins, _weight_formats
from graphq.passes import _round_math as math
from graphq.passes._layer_rows import Layer
from graphq.passes._round_math import Rounded
from graphq.passes._sums import Sums
from graphq.pipeline import PassContext
from graphq.quantizers import QParams
from graphq.spec import PerGroup, QuantSpec
from graphq.sweep import SweepStep
from graphq.targets import Target

Algorithm = Literal["rtn", "gptq", "wqer", "greedy", "adaround"]
Scales = Literal["min-max", "mse"]
Layers = Literal["quantized", "all"]
Repair = bool | Literal["reference"]


@dataclass(frozen=True)
class Rounding:
    """How weights are stored; `passes.round.Round` says what the options mean, `name` is that of the pass."""

    name: str
    bits: int
    algorithm: Algorithm
    group_size: int | None
    symmetric: bool | None
    scales: Scales
    layers: Layers
    exclude: tuple[str, ...]
    samples: int
    repair: Repair
    correct_bias: bool

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        if self.symmetric is False and target.symmetric_only:
            raise TargetError(
                f"{target.name} refuses zero points other than 0.", where=f"pass {self.name}, symmetric: false",
                expected="symmetric: true, or none given",
            )  # fmt: skip
        for node in _layer_rows.candidates(model):
            if _layer_rows.refusal(model, node, self.exclude) is None:
                self._stored(node, target)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        if "upright-gemm" in ctx.target.forms:
            nodes = _layer_rows.candidates(model)
            _weight_formats.turn(ctx.edit, [node for node in nodes if isinstance(self._format(model, node, ctx.target), QuantSpec)])
        formats = [self._format(model, node, ctx.target) for node in _layer_rows.candidates(model)]
        opsets = [spec.opset for spec in formats if isinstance(spec, QuantSpec)]
        if opsets:
            ctx.edit.raise_opset(max(opsets))  # may replace nodes
        specs = dict[ir.Node, QuantSpec]()
        for node in _layer_rows.candidates(model):
            spec = self._format(model, node, ctx.target)
            if isinstance(spec, str):
                ctx.skip(node, spec)
            else:
                specs[node] = spec
        for step in ctx.sweep(list(specs), self.samples or None):
            self._round(step, specs[step.node], ctx)
        ctx.edit.prune()

    def _stored(self, node: ir.Node, target: Target) -> QuantSpec | str:
        symmetric = target.symmetric_only if self.symmetric is None else self.symmetric
        return _weight_formats.storable(self.name, node, self.bits, target, symmetric=symmetric)

    def _format(self, model: ir.Model, node: ir.Node, target: Target) -> QuantSpec | str:
        """What the weight of `node` becomes, or why it stays float."""
        if reason := _layer_rows.refusal(model, node, self.exclude):
            return reason
        if self.layers == "quantized" and not qdq.is_quantized(linear.data_of(node)):
            return "its input is float (layers: all takes it)"
        spec = self._stored(node, target)
        return spec if isinstance(spec, str) else _weight_formats.in_groups(node, spec, self.group_size)

    def _round(self, step: SweepStep, spec: QuantSpec, ctx: PassContext) -> None:
        node, layer = step.node, Layer(step.node)
        has_bias = _bias.can_shift(node)
        fits_reference = self.repair == "reference" and _twins.makes_the_same(node, step.twin)
        train, held = _layer_rows.collect(step, ctx.seed, reference=fits_reference)
        weight, shift, numbers = layer.weight(), np.zeros(held.lack.shape), {"bits": float(spec.bits)}
        takes_mean, sums = self.correct_bias and has_bias, train + held
        how = _weight_formats.of_rows(spec)
        if self.repair:
            found = aqer.refit(weight, train, held, aqer.ALPHAS, with_bias=has_bias, takes_mean=takes_mean,
                               store=lambda weight: self._rounded(weight, train, how, takes_mean).weight)  # fmt: skip
            if found is not None:
                sums, shift, numbers["alpha"] = sums.moved(found.delta, found.shift), found.shift, found.alpha
                weight = (weight + found.delta).astype(np.float32)
        rounded = self._rounded(weight, sums, how, takes_mean)
        sums = sums.moved(rounded.weight - weight)
        if takes_mean:
            sums, shift = sums.moved(np.zeros(weight.shape), sums.mean_lack), shift + sums.mean_lack
        _store(ctx, layer, spec, rounded)
        if shift.any():
            _bias.shift(ctx.edit, node, shift.reshape(-1))
        ctx.measure(node.name or "", sqnr_db=decibel(sums.power, sums.square), **numbers)

    def _rounded(self, weight: np.ndarray, sums: Sums, spec: QuantSpec, takes_mean: bool) -> Rounded:
        """`weight` [G, any number of outputs, D] for the rows that `sums` are of; `spec` speaks of its rows."""
        gram = math.damped(sums.centred_gram if takes_mean else sums.gram, sums.count)
        return math.rounded(weight, gram, spec, self.algorithm, is_clipped=self.scales == "mse")


def _store(ctx: PassContext, layer: Layer, spec: QuantSpec, rounded: Rounded) -> None:
    """Put codes [G, O, D] in the place of the layer's weight, with the qparams of its rows."""
    qparams = rounded.qparams
    if isinstance(spec.granularity, PerGroup):
        qparams = QParams(layer.stored(qparams.scale[None]), layer.stored(qparams.zero_point[None]))
    codes = layer.stored(rounded.codes).astype(np.int8 if spec.signed else np.uint8)
    qdq.insert_weight(ctx.edit, layer.node, spec, qparams, codes, narrow=layer.node.op_type in ctx.target.narrow_weights)
