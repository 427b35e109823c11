"""bias-correct: remove the mean error that quantization adds to each output channel.

`b -= E[y_cur - y_ref]` for each linear node in order, each seeing the activations that the corrected layers before it produce
(DFQ, arXiv 1906.04721, section 4.2, with measured instead of modelled means; METHODS.md 4-3).
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.sweep import Batches


@pass_options
class BiasCorrect(Pass):
    """Corrects the biases of quantized layers with the mean output error that calibration data shows.

    Attributes:
        samples: Calibration samples to use, 0 for all.
    """

    name: ClassVar[str] = "bias-correct"

    samples: Annotated[int, Field(ge=0)] = 32

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        nodes = []
        for node in model.graph:
            if node.domain != "" or node.op_type not in linear.LINEAR_OPS or not _is_quantized(node):
                continue
            if _bias_slot(node) is None:
                ctx.skip(node, "it has no constant bias of its own to correct")
            else:
                nodes.append(node)
        for step in ctx.sweep(nodes, self.samples or None):
            axis = linear.channel_axis(step.node)
            shift = channel_mean(step.y_cur(), axis) - channel_mean(step.y_ref, axis)
            _shift_bias(ctx, step.node, -shift)
            ctx.measure(step.node.name or "", mean_shift=float(np.abs(shift).max(initial=0.0)))


def channel_mean(batches: Batches, axis: int) -> np.ndarray:
    """Mean over all but the channel axis, float64 of shape (channels,)."""
    total = sum(np.moveaxis(batch, axis, -1).reshape(-1, batch.shape[axis]).sum(0, dtype=np.float64) for batch in batches)
    count = sum(batch.size // batch.shape[axis] for batch in batches if batch.size)
    return np.asarray(total / max(count, 1), np.float64)


def _is_quantized(node: ir.Node) -> bool:
    weight = ir.producer(linear.weight_of(node))
    return weight is not None and weight.op_type == "DequantizeLinear"


def _bias_slot(node: ir.Node) -> tuple[ir.Node, int] | None:
    """The node and input that hold the bias: a constant, the INT32 codes of one, or those of an Add right behind."""
    bias = linear.bias_of(node)
    if bias is not None:
        maker = bias.producer()
        if ir.constant(bias) is not None:
            index = linear.LINEAR_OPS[node.op_type].bias
            assert index is not None
            return node, index
        return (maker, 0) if maker is not None and maker.op_type == "DequantizeLinear" else None
    uses = node.outputs[0].uses()
    if len(uses) == 1 and uses[0].node.op_type == "Add":
        add = uses[0].node
        other = add.inputs[1 - uses[0].idx]
        array = ir.constant(other) if other is not None and other.is_initializer() else None
        if array is not None and array.ndim and array.size == array.shape[-1] and linear.channel_axis(node) == -1:
            return add, 1 - uses[0].idx
    return None


def _shift_bias(ctx: PassContext, node: ir.Node, shift: np.ndarray) -> None:
    slot = _bias_slot(node)
    assert slot is not None
    holder, index = slot
    old = ir.constant(holder.inputs[index])
    assert old is not None
    if holder.op_type == "DequantizeLinear":
        scale = ir.constant(holder.inputs[1])
        assert scale is not None
        codes = old.astype(np.float64) + shift.reshape(old.shape) / scale
        ctx.edit.set_weight(holder, index, np.clip(np.rint(codes), -(2**31), 2**31 - 1).astype(np.int32))
    else:
        ctx.edit.set_weight(holder, index, (old.astype(np.float64) + np.broadcast_to(shift.reshape((-1,)), old.shape)).astype(np.float32))
