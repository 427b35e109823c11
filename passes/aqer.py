"""aqer: refit the weights of layers to what quantized activations leave of their inputs.

Layer by layer, each seeing what the refitted layers before it produce: ridge regression of what the layer makes of its input
before that is quantized, on the quantized input. How strongly it is held back is chosen for each layer on rows that the fit has
not seen, and a layer whose error there does not fall keeps its weight (ERQ, arXiv 2407.06794).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.exclude import require_matches
from graphq.passes import _aqer_math as math
from graphq.passes import _bias, _layer_rows
from graphq.passes._layer_rows import Layer
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class Aqer(Pass):
    """Makes float weights (and biases) make good what the quantization of activations costs. Comes before the weights are rounded.

    Attributes:
        alphas: Strengths of the ridge to choose from, in units of the mean square of an input.
        samples: Calibration samples to use, 0 for all.
        exclude: Patterns of node names (or operator types) that keep their weights.
    """

    name: ClassVar[str] = "aqer"
    needs_data: ClassVar[bool] = True

    alphas: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)] = math.ALPHAS
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        nodes = []
        for node in _layer_rows.candidates(model):
            reason = _layer_rows.refusal(model, node, self.exclude)
            if reason is None:
                nodes.append(node)
            else:
                ctx.skip(node, reason)
        for step in ctx.sweep(nodes, self.samples or None):
            node, layer = step.node, Layer(step.node)
            train, held = _layer_rows.collect(step, ctx.seed)
            found = math.refit(layer.weight(), train, held, self.alphas, with_bias=_bias.can_shift(node))
            if found is None:
                ctx.skip(node, "no refit lowers its error on rows that were held out")
                continue
            weight = (layer.weight() + found.delta).astype(np.float32)
            ctx.edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, layer.stored(weight))
            if found.shift.any():
                _bias.shift(ctx.edit, node, found.shift.reshape(-1))
            ctx.measure(node.name or "", error_before=found.before, error_after=found.after, alpha=found.alpha)
