"""bias-correct: remove the mean error that quantization adds to each output channel.

`b -= E[y_cur - y_ref]` for each linear node in order, each seeing the activations that the corrected layers before it produce
(DFQ, arXiv 1906.04721, section 4.2, with measured instead of modelled means).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear, stored
from graphq.passes import _bias, _twins
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.sweep import Batches


@pass_options
class BiasCorrect(Pass):
    """Corrects the biases of quantized layers with the mean output error that calibration data shows.

    Attributes:
        samples: Calibration samples to use, 0 for all.
    """

    name: ClassVar[str] = "bias-correct"
    needs_data: ClassVar[bool] = True

    samples: Annotated[int, Field(ge=0)] = 32

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        nodes, namesakes = [], {node.name: node for node in ctx.reference.graph}
        for node in model.graph:
            if node.domain != "" or node.op_type not in linear.LINEAR_OPS or not _is_quantized(node):
                continue
            if not _bias.can_shift(node):
                ctx.skip(node, "it has no constant bias of its own to correct")
            elif not _is_alike(node, namesakes.get(node.name)):
                ctx.skip(node, "no layer of the original model makes the same channels")
            else:
                nodes.append(node)
        for step in ctx.sweep(nodes, self.samples or None):
            axis = linear.channel_axis(step.node)
            shift = channel_mean(step.y_cur(), axis) - channel_mean(step.y_ref, axis)
            shift += _bias.behind(step.node) - _bias.behind(namesakes[step.node.name])
            _bias.shift(ctx.edit, step.node, -shift)
            ctx.measure(step.node.name or "", mean_shift=float(np.abs(shift).max(initial=0.0)))


def channel_mean(batches: Batches, axis: int) -> np.ndarray:
    """Mean over all but the channel axis, float64 of shape (channels,)."""
    total = sum(np.moveaxis(batch, axis, -1).reshape(-1, batch.shape[axis]).sum(0, dtype=np.float64) for batch in batches)
    count = sum(batch.size // batch.shape[axis] for batch in batches if batch.size)
    return np.asarray(total / max(count, 1), np.float64)


def _is_alike(node: ir.Node, twin: ir.Node | None) -> bool:
    """Whether `twin` of the reference makes the same, and as many channels, as far as that is known."""
    if twin is None or not _twins.makes_the_same(node, twin):
        return False
    shapes = [ir.shape_of(one.outputs[0]) for one in (node, twin)]
    sizes = {shape[linear.channel_axis(node)] for shape in shapes if shape}
    return len(sizes) < 2


def _is_quantized(node: ir.Node) -> bool:
    return stored.is_stored(linear.weight_of(node))
