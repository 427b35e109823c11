"""noisy-bias: add a fixed noise to what is quantized, and take what it adds to the output out of the bias.

It comes after `insert-qdq`. A quantizer that several layers read gets one noise, which all of them take back. The noise that
serves calibration rows best is kept only if it lowers the error on held-out rows too; on most layers none does. Layers whose
weights are rounded later are best followed by `bias-correct`. Main graph only.
"""

from __future__ import annotations

import zlib
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear, stored
from graphq.exclude import is_excluded, require_matches
from graphq.passes import _bias, _layer_rows, _pairs, _token_layers
from graphq.passes import _noisy_bias_math as math
from graphq.passes._pairs import Pair
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class NoisyBias(Pass):
    """Adds a fixed noise before the quantizers of MatMul and Gemm inputs where that helps (NoisyQuant, arXiv 2211.16056).

    Attributes:
        min_gain_db: What the output error of the layers behind a quantizer must gain on held-out rows.
        draws: Noises that are tried for each quantizer, at four amplitudes each.
        exclude: Patterns of node names (or operator types) whose input gets no noise.
    """

    name: ClassVar[str] = "noisy-bias"
    idle_is_fine: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    min_gain_db: Annotated[float, Field(ge=0)] = 0.3
    draws: Annotated[int, Field(ge=1, le=100)] = 3
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        pairs = self._pairs(model, ctx)
        sources = [pair.source for pair in pairs.values()]
        if not sources:
            return
        parts = ctx.calib.split(max(1, len(ctx.calib) // 4))
        calib, held_out = (_token_layers.rows(model, sources, data) for data in parts)
        for value, pair in pairs.items():
            nodes = [use.node for use in ir.uses(value)]
            weights = [_token_layers.matrix(model, node) for node in nodes]
            side_by_side, seeds = np.concatenate(weights, 1), (ctx.seed, zlib.crc32((nodes[0].name or "").encode()))
            units = [math.draw(len(side_by_side), (*seeds, number)) for number in range(self.draws)]
            n = math.search(calib[pair.source], units, side_by_side, pair.quantizer, pair.qparams)
            gain = math.gain_db(held_out[pair.source], n, side_by_side, pair.quantizer, pair.qparams)
            ctx.measure(value.name or "", gain_db=gain, kept=gain >= self.min_gain_db)
            if gain < self.min_gain_db:
                for node in nodes:
                    ctx.skip(node, f"no noise lowers its error on held-out samples by {self.min_gain_db:g} dB")
                continue
            _add(ctx, pair, n)
            for node, weight in zip(nodes, weights, strict=True):
                _bias.shift(ctx.edit, node, -(n.astype(np.float64) @ weight))

    def _pairs(self, model: ir.Model, ctx: PassContext) -> dict[ir.Value, Pair]:
        """The quantizers that can get noise, by the value that layers read."""
        readers = _layer_rows.by_input((node for node in _layer_rows.candidates(model) if node.graph is model.graph), _float_data, ctx.skip)
        pairs = {}
        for value, nodes in readers.items():
            pair = _pairs.read(value)
            reason = self._refusal(value, nodes, pair, ctx.target)
            for node in nodes if reason else ():
                ctx.skip(node, reason or "")
            if reason is None and pair is not None:
                pairs[value] = pair
        return pairs

    def _refusal(self, value: ir.Value, nodes: list[ir.Node], pair: Pair | None, target: Target) -> str | None:
        """Why what `pair` makes and `nodes` read cannot get noise."""
        if any(is_excluded(node, self.exclude) for node in nodes):
            return "excluded by the recipe"
        if any(node.op_type not in ("MatMul", "Gemm") for node in nodes):
            return "where a convolution pads there is no noise, so that its bias could not take it back"
        if len(nodes) < len(ir.uses(value)) or value.is_graph_output():
            return "others than layers read its quantized input, and cannot take the noise back"
        if not all(_bias.takes_data_shift(node) and _has_matrix(node) for node in nodes):
            return "it has no constant bias, or no constant matrix as weight, to take the noise back with"
        if pair is None:
            return "its quantizer is not a QuantizeLinear and a DequantizeLinear with one constant scale"
        return "an addition would split the integer kernel before it" if _leaves_kernel(pair.source, target) else None


def _float_data(node: ir.Node) -> str | None:
    maker = linear.data_of(node).producer()
    return "its data input is not quantized" if maker is None or maker.op_type != "DequantizeLinear" else None


def _has_matrix(node: ir.Node) -> bool:
    weight = linear.weight_of(node)
    return stored.is_fixed(weight) and len(ir.shape_of(weight) or ()) == 2


def _leaves_kernel(value: ir.Value, target: Target) -> bool:
    """Whether an integer kernel of `target` makes the codes of `value`."""
    maker = value.producer()
    if maker is not None and not maker.domain and maker.op_type in target.fused_activations:
        maker = ir.producer(maker.inputs[0])
    rule = target.ops.get(maker.op_type) if maker is not None and not maker.domain else None
    if maker is None or rule is None or not rule.quantized_output:
        return False
    makers = [ir.producer(entry) for entry in maker.inputs]
    return any(one is not None and one.op_type == "DequantizeLinear" for one in makers)


def _add(ctx: PassContext, pair: Pair, n: np.ndarray) -> None:
    """Let the quantizer read its source plus `n`."""
    name, maker = pair.source.name, pair.source.producer()
    noise = ctx.edit.initializer(f"{name}_noise", n)
    noisy = ctx.edit.insert(maker, "Add", [pair.source, noise], output=f"{name}_noisy", like=pair.source, after=maker is not None)
    ctx.edit.rewire(pair.head, 0, noisy)
