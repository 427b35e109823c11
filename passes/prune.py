"""prune: N:M sparse weights, such as 2:4, which sparse tensor cores multiply at twice the speed.

Layer by layer, each seeing what the pruned layers before it produce, and refitted to what it computed from that itself (fitting
the reference's output instead makes up for the layers before, but with errors of this size it shrinks everything: ViT-Tiny fell
from 42 to 24 % top-1). Groups lie along the input channels, for each position of a kernel. Weights are stored dense, with zeros:
TensorRT finds the pattern itself. Round to nearest (`quantize-weights`) keeps zeros, `round` with other algorithms does not.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.exclude import require_matches
from graphq.noise import decibel
from graphq.passes import _bias, _layer_rows
from graphq.passes import _prune_math as math
from graphq.passes._layer_rows import Layer
from graphq.passes._round_math import damped
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.sweep import SweepStep
from graphq.targets import Target


@pass_options
class Prune(Pass):
    """Makes weights of MatMul, Gemm and Conv layers zero, all but `n` of every `m` along the input channels.

    Attributes:
        n: Weights that are kept of each group.
        m: Weights in a group.
        algorithm: What is kept: the largest weights, the largest contributions (Wanda, arXiv 2306.11695), or what SparseGPT
            (arXiv 2301.00774) chooses while it makes up for what goes.
        refit: Whether to refit the weights that are kept, and the bias, to the layer's output.
        exclude: Patterns of node names (or operator types) that stay dense.
        samples: Calibration samples to use, 0 for all.
    """

    name: ClassVar[str] = "prune"
    needs_data: ClassVar[bool] = True

    n: Annotated[int, Field(ge=1, le=31)] = 2
    m: Annotated[int, Field(ge=2, le=32)] = 4
    algorithm: math.Algorithm = "sparsegpt"
    refit: bool = True
    exclude: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.n >= self.m:
            raise ValueError(f"n must be less than m, not {self.n} of {self.m}")

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        nodes = []
        for node in _layer_rows.candidates(model):
            reason = _layer_rows.refusal(model, node, self.exclude) or self._refusal(node)
            if reason is None:
                nodes.append(node)
            else:
                ctx.skip(node, reason)
        for step in ctx.sweep(nodes, self.samples or None):
            self._prune(step, ctx)

    def _refusal(self, node: ir.Node) -> str | None:
        if ir.attribute(node, "group", 1) != 1:
            return "sparse kernels take no grouped convolution"
        channels = _channels(node)
        return f"its {channels} input channels are not a multiple of {self.m}" if channels % self.m else None

    def _prune(self, step: SweepStep, ctx: PassContext) -> None:
        node, layer = step.node, Layer(step.node)
        train, held = _layer_rows.collect(step, ctx.seed)
        sums, weight = train + held, layer.weight()[0].astype(np.float64)
        shifts = self.refit and _bias.can_shift(node)
        order = np.arange(weight.shape[1]).reshape(_channels(node), -1).T.reshape(-1)  # channels of one kernel position together
        gram = damped(sums.centred_gram if shifts else sums.gram, sums.count)[0][np.ix_(order, order)]
        found, mask = math.prune(weight[:, order], gram, self.n, self.m, self.algorithm)
        if self.refit:
            found = math.refit(found, mask, gram, weight[:, order])
        kept = np.empty(weight.shape, np.float32)
        kept[:, order] = found
        ctx.edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, layer.stored(kept[None]))
        sums = sums.moved((kept - weight)[None])
        if shifts:
            _bias.shift(ctx.edit, node, sums.mean_lack.reshape(-1))
            sums = sums.moved(np.zeros((1, *weight.shape)), sums.mean_lack)
        ctx.measure(node.name or "", sqnr_db=decibel(sums.power, sums.square))


def _channels(node: ir.Node) -> int:
    return ir.constant_shape(linear.weight_of(node))[linear.in_axis(node)]
