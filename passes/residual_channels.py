"""residual-channels: round the channels of an activation that reach furthest a second time, within the same product.

What the first rounding leaves of them is quantized too and appended along the axis that is summed over, where the weight has its rows
for them twice: `[Q(X) | Q(R)] [W; W_o]`. One product of one format does it all, with S more inputs. It comes behind the passes that
quantize activations, and before those that round weights. Main graph only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import block_floats, ir, linear, precision, qdq
from graphq.errors import TargetError
from graphq.exclude import require_matches
from graphq.observers import ChannelRange, Stat
from graphq.passes import _layer_rows, _residual_math
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.precision import Bits
from graphq.quantizers import Uniform
from graphq.targets import Target

HEADROOM = 8.0
"""How far beyond calibration an activation may go before the block scales of NVFP4 saturate, as in `block-float`."""

TOKENS = ("DynamicQuantize", "DynamicQuantizeAsymmetric")
"""Operators of graphq that quantize with one scale a token."""


@pass_options
class ResidualChannels(Pass):
    """Appends the quantized residuals of outlier channels to what MatMul and Gemm layers read (ARCQuant, arXiv 2601.07475).

    The residual is quantized as the activation is: with one scale a token behind `dynamic-activations`, per tensor behind `insert-qdq`.

    Attributes:
        channels: Channels to append at most, a multiple of 16. Fewer are where fewer lie above an eighth of the largest.
        bits: Width of residuals per tensor; those with one scale a token have the activation's.
        format: `nvfp4` quantizes float activations and their residuals in blocks; `block-float` without activations comes behind it.
        exclude: Patterns of node names (or operator types) that are left alone.
    """

    name: ClassVar[str] = "residual-channels"
    needs_data: ClassVar[bool] = True

    channels: Annotated[int, Field(ge=16, multiple_of=16)] = 64
    bits: Annotated[int, Field(ge=3, le=8)] = 4
    format: Literal["nvfp4"] | None = None
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        if self.format is not None and ("float4e2m1" not in target.storage or target.opset < block_floats.OPSETS[self.format]):
            raise TargetError(
                f"{target.name} does not take float4e2m1.", where=f"pass {self.name}, format: {self.format}",
                expected="--target tensorrt, tensorrt-rtx or generic",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        reasons = {node: self._refusal(model, node) for node in _layer_rows.candidates(model)}
        for node, reason in reasons.items():
            if reason is not None:
                ctx.skip(node, reason)
        chosen = {node.outputs[0].name for node, reason in reasons.items() if reason is None}
        if self.format is not None and chosen:
            ctx.edit.raise_opset(block_floats.OPSETS[self.format])  # may replace nodes
        layers = _layer_rows.by_input((node for node in model.graph if node.outputs[0].name in chosen), lambda node: None)
        observers = {value: ChannelRange(_source(value).name or "", -1) for value in layers}
        stats = ctx.observe(observers.values())
        for value, nodes in layers.items():
            self._append(value, nodes, stats[observers[value]], ctx)
        ctx.edit.prune()

    def _refusal(self, model: ir.Model, node: ir.Node) -> str | None:
        if reason := _layer_rows.refusal(model, node, self.exclude):
            return reason
        if node.op_type not in ("Gemm", "MatMul") or ir.attribute(node, "transA", 0):
            return "channels are appended along the last axis of what a matrix product reads"
        if precision.asked(node, Bits(self.bits, self.bits)).activation is None:
            return "it asks for float activations"
        data = linear.data_of(node)
        maker, inputs = data.producer(), ir.constant_shape(linear.weight_of(node))[linear.in_axis(node)]
        if inputs < _residual_math.BLOCK:
            return f"its {inputs} inputs are fewer than a block"
        if self.format is not None:
            dims = ir.shape_of(data)
            if qdq.is_quantized(data):
                return "its input is quantized already"
            is_whole = inputs % block_floats.BLOCKS[self.format] == 0 and dims is not None and dims[-1] == inputs
            return None if is_whole else "its inputs are not whole blocks of a known size"
        if not qdq.is_quantized(data) or maker is None or maker.op_type == "Concat":
            return "its input is not quantized"
        if _source(data) is data:
            return "what it read before that was quantized is not at hand"
        scale = ir.constant(maker.inputs[1]) if maker.op_type == "DequantizeLinear" else None
        is_tensor = scale is not None and scale.size == 1
        return None if is_tensor or maker.op_type in TOKENS else "its input has neither one scale nor one a token"

    def _append(self, value: ir.Value, nodes: Sequence[ir.Node], stat: Stat, ctx: PassContext) -> None:
        reach = np.maximum(-stat["low"], stat["high"])
        chosen = _residual_math.far_channels(np.asarray(reach, np.float64), self.channels)
        if not len(chosen):
            for node in nodes:
                ctx.skip(node, "calibration saw nothing but zeros in its input")
            return
        edit, source, name = ctx.edit, _source(value), value.name
        rounded = value
        if self.format is not None:
            rounded = self._in_blocks(source, HEADROOM * float(reach.max()), name or "", ctx)
        index = edit.initializer(f"{name}_far", chosen.astype(np.int64))

        def add(op_type: str, operands: Sequence[ir.Value | None], what: str, width: int, **attributes: int) -> ir.Value:
            made = edit.insert(nodes[0], op_type, operands, output=f"{name}_{what}", attributes=attributes)
            dims = ir.shape_of(value)
            made.type, made.shape = ir.tensor_type("float32"), None if dims is None else ir.Shape([*dims[:-1], width])
            return made

        far = add("Gather", [source, index], "far", len(chosen), axis=-1)
        near = add("Gather", [rounded, index], "far_rounded", len(chosen), axis=-1)
        residual = add("Sub", [far, near], "residual", len(chosen))
        second = self._quantized(value, residual, float(reach.max()), ctx)
        whole = add("Concat", [rounded, second], "with_residual", len(reach) + len(chosen), axis=-1)
        for node in nodes:
            weight, axis = ir.constant(linear.weight_of(node)), linear.in_axis(node)
            assert weight is not None
            edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, np.concatenate([weight, weight.take(chosen, axis)], axis))
            edit.rewire(node, linear.data_index(node), whole)
            ctx.measure(node.name or "", channels=len(chosen))

    def _quantized(self, value: ir.Value, residual: ir.Value, reach: float, ctx: PassContext) -> ir.Value:
        """`residual`, quantized as `value` is."""
        maker, name = value.producer(), residual.name
        if self.format is not None:  # steps of E2M1 are a third of the largest code at most, and errors half of a step
            return self._in_blocks(residual, HEADROOM * reach / 6, name or "", ctx)
        assert maker is not None
        if maker.domain == ir.DOMAIN:
            operands = [residual, *maker.inputs[1:]]
            return ctx.edit.insert(residual.producer(), maker.op_type, operands, domain=ir.DOMAIN, output=f"{name}_dynamic", like=residual,
                                   after=True)  # fmt: skip
        scale, spec = ir.constant(maker.inputs[1]), replace(ctx.target.activation, bits=self.bits)
        assert scale is not None
        half, narrow = float(scale.reshape(())) / 2, spec.storage in ctx.target.activation_storage
        return qdq.insert_pair(ctx.edit, residual, Uniform(spec).fit(-half, half), spec, [], narrow=narrow)

    def _in_blocks(self, value: ir.Value, largest: float, name: str, ctx: PassContext) -> ir.Value:
        """`value` rounded in blocks."""
        assert self.format is not None
        return block_floats.insert_activation(ctx.edit, value, self.format, largest, [])


def _source(value: ir.Value) -> ir.Value:
    found = qdq.before_quantizer(value)
    assert found is not None
    return found
