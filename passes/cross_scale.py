"""cross-scale: quantize what layers read with steps that depend on the token and on the channel.

The channel's share of the step is a factor that goes into the weights, and out of the normalization before (or of a Mul); the
token's share is found at run time. Where that does not lower a layer's error on held-out rows, its input gets one step a token,
as from `dynamic-activations`. Weights are still float then: `quantize-weights` or `round` come after it. Main graph only.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear, precision
from graphq.exclude import require_matches
from graphq.observers import ChannelRange
from graphq.passes import _cross_scale_math as math
from graphq.passes import _dynamic_quantize, _scaling, _token_layers
from graphq.passes._token_layers import TokenLayers
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.precision import Bits
from graphq.targets import Target

CROSS_QUANTIZE = """
CrossQuantize (x, k, alpha, levels) => (y) {
  axis = Constant <value = int64[1] {-1}> ()
  least = Constant <value = float {1.1754943508222875e-38}> ()
  whole = Mul (x, k)
  magnitude = Abs (whole)
  largest = ReduceMax (magnitude, axis)
  share = Pow (largest, alpha)
  step = Div (share, levels)
  scale = Max (step, least)
  ratio = Div (x, scale)
  code = Round (ratio)
  low = Neg (levels)
  kept = Clip (code, low, levels)
  y = Mul (kept, scale)
}"""
"""x has been divided by k: see `_cross_scale_math.fake_quantize`."""


@pass_options
class CrossScale(Pass):
    """Quantizes the activations that MatMul and Gemm layers read with one step for each token and channel (arXiv 2410.07505).

    Attributes:
        bits: Width of an activation, for layers that do not ask for another.
        weight_bits: The same for weights, which are rounded later: few bits do not take factors well.
        alphas: Candidates for the token's share of a step, `t^alpha c^(1 - alpha)`, of which each layer gets the best; 1 would be one
            step a token.
        rows: What a token's share is found from: its row as `scaled` by the channels, which cannot clip and gives finer steps, or
            `unscaled`, as in the paper.
        min_gain_db: What a layer's output error must gain over one step a token.
        exclude: Patterns of node names (or operator types) whose input stays float.
    """

    name: ClassVar[str] = "cross-scale"
    needs_data: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    weight_bits: Annotated[int, Field(ge=2, le=8)] = 8
    alphas: Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], ...], Field(min_length=1)] = (0.15, 0.35, 0.5, 0.75)
    rows: Literal["scaled", "unscaled"] = "scaled"
    min_gain_db: Annotated[float, Field(ge=0)] = 0.5
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        layers = self._layers(model, ctx)
        values = list(dict.fromkeys(value for value, _ in layers))
        if not values:
            return
        observers = {value: ChannelRange(value.name or "", -1) for value in values}
        stats = ctx.observe(observers.values())
        rows = _token_layers.rows(model, values, ctx.calib.split(max(1, len(ctx.calib) // 4))[1])
        for (value, bits), nodes in layers.items():
            low, high = (stats[observers[value]][end] for end in ("low", "high"))
            c = np.maximum(-low, high)
            weights = [(_scaling.matrix(node), precision.asked(node, Bits(self.weight_bits, bits)).weight) for node in nodes]
            alpha, gain = math.search(rows[value], weights, c, self.alphas, bits, scaled=self.rows == "scaled")
            ctx.measure(value.name or "", gain_db=gain, alpha=alpha if gain >= self.min_gain_db else 1.0)
            if gain < self.min_gain_db:
                _dynamic_quantize.quantize(ctx, value, nodes, bits)
            else:
                self._cross(ctx, value, nodes, math.factors(c, alpha), alpha, bits)

    def _layers(self, model: ir.Model, ctx: PassContext) -> TokenLayers:
        layers = _token_layers.find(model, ctx, self.exclude, self.bits)
        for nodes in layers.values():
            for node in [node for node in nodes if not linear.is_linear(node)]:
                ctx.skip(node, "its weight is not a float32 matrix that takes factors: put this pass before those that quantize weights")
                nodes.remove(node)
        return {key: nodes for key, nodes in layers.items() if nodes}

    def _cross(self, ctx: PassContext, value: ir.Value, nodes: list[ir.Node], k: np.ndarray, alpha: float, bits: int) -> None:
        moved = _scaling.divide(ctx.edit, value, nodes, k, exclude=self.exclude)
        for node in nodes:
            _scaling.multiply(ctx.edit, node, k)
        if self.rows == "scaled":
            return _dynamic_quantize.quantize(ctx, moved, nodes, bits)
        share = ctx.edit.shared(("alpha", alpha), "alpha", lambda: np.asarray(alpha, np.float32), "float32")
        operands = [ctx.edit.initializer(f"{value.name}_channels", k.astype(np.float32)), share, _dynamic_quantize.step_count(ctx, bits)]
        _dynamic_quantize.replace(ctx, moved, nodes, CROSS_QUANTIZE, operands)
