"""channel-repair: remove hidden channels between two linear layers, and let those that stay do their work.

A pair is `W₂ f(W₁ x)` with an f that treats each channel by itself: activations, factors, depthwise convolutions, pools, the product
with a gate (whose W₁ is cut too). Layer by layer, each seeing what the layers before it leave; W₂ is refitted, by ridge regression,
to what it made of all channels (UDFC, arXiv 2308.07209, with data in place of its assumptions). Every tensor on the way gets smaller, so
that any runtime is faster.
Top-1 without and with the repair, few images: ViT-Tiny (79 %, 100 images, 16 for calibration) with a tenth of its hidden channels
removed 74 and 80, with a fifth 65 and 74, with three tenths 45 and 63; MobileNetV2 (79 %) 58 and 74, then 9 and 62; ResNet-20
(87.8 %, 500 images) 83.8 and 85.2, 75.2 and 82.0, 40.0 and 78.6. Without training afterwards, a tenth is about what a model bears.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.exclude import require_matches
from graphq.noise import decibel
from graphq.passes import _bias, _channels, _layer_rows
from graphq.passes import _channel_repair_math as math
from graphq.passes._channels import NORMALIZATIONS, Region
from graphq.passes._layer_rows import Layer
from graphq.passes._round_math import damped
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.sweep import SweepStep
from graphq.targets import Target


@pass_options
class ChannelRepair(Pass):
    """Removes a share of the hidden channels between linear layers, and refits the layers that read them.

    Attributes:
        share: Of the channels of each pair of layers, how many go.
        multiple: What stays is the nearest multiple of this, for the sake of kernels that are fast with it.
        repair: Whether the channels that stay are refitted to what the layer made of all of them.
        exclude: Patterns of node names (or operator types) whose weights stay as they are.
        samples: Calibration samples to use, 0 for all.
    """

    name: ClassVar[str] = "channel-repair"
    needs_data: ClassVar[bool] = True

    share: Annotated[float, Field(gt=0, lt=1)] = 0.1
    multiple: Annotated[int, Field(ge=1)] = 8
    repair: bool = True
    exclude: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=0)] = 0

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        pairs = dict[ir.Node, Region]()
        for node in _layer_rows.candidates(model):
            found = self._region(model, node)
            if isinstance(found, str):
                ctx.skip(node, found)
            elif self._kept(found.width) >= found.width:
                ctx.skip(node, f"{self.share:g} of its {found.width} channels is too few to leave a smaller multiple of {self.multiple}")
            else:
                pairs[node] = found
        kept = {step.node: self._repair(step, pairs[step.node], ctx) for step in ctx.sweep(list(pairs), self.samples or None)}
        for node, hidden in pairs.items():  # afterwards: the sweep holds activations of all channels
            hidden.reorder(ctx.edit, kept[node])
        ctx.edit.prune()

    def _region(self, model: ir.Model, node: ir.Node) -> Region | str:
        """The channels that `node` reads, and nobody else; or why they are not hidden between layers that may be changed."""
        reason = _layer_rows.refusal(model, node, self.exclude)
        if reason is not None:
            return reason
        if ir.attribute(node, "group", 1) != 1 or ir.attribute(node, "transA", 0):
            return "its channels lie in groups, or along another axis"
        found = _channels.region(node)
        if isinstance(found, str):
            return found
        for maker in found.makers:
            if reason := _layer_rows.refusal(model, maker, self.exclude):
                return f"{ir.describe(maker)} makes what it reads: {reason}"
        others = [other for other in found.readers if other is not node]
        others += [other for other, _ in found.constants if other.op_type in NORMALIZATIONS]
        return f"{ir.describe(others[0])} reads the same channels" if others else found

    def _kept(self, count: int) -> int:
        """How many of `count` channels stay."""
        return max(1, round((1 - self.share) * count / self.multiple)) * self.multiple

    def _repair(self, step: SweepStep, hidden: Region, ctx: PassContext) -> np.ndarray:
        """Give the channels that go the weight 0; returns those that stay."""
        node, layer, count = step.node, Layer(step.node), hidden.width
        train, held = _layer_rows.collect(step, ctx.seed)
        sums, weight = train + held, layer.weight()[0].astype(np.float64)
        shifts = self.repair and _bias.can_shift(node)
        gram = damped(sums.centred_gram if shifts else sums.gram, sums.count)[0]
        stays = np.ones(count, bool)
        stays[math.choose(weight, gram, count, count - self._kept(count), self.repair)] = False
        inputs = np.repeat(stays, len(gram) // count)
        found = (math.repaired(weight, gram, inputs) if self.repair else weight * inputs).astype(np.float32)
        ctx.edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, layer.stored(found[None]))
        sums = sums.moved((found - weight)[None])
        if shifts:
            _bias.shift(ctx.edit, node, sums.mean_lack.reshape(-1))
            sums = sums.moved(np.zeros((1, *weight.shape)), sums.mean_lack)
        ctx.measure(node.name or "", channels_before=count, channels_after=int(stays.sum()), sqnr_db=decibel(sums.power, sums.square))
        return np.flatnonzero(stays)
