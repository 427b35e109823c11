"""digit-planes: weights of 8 bits in planes of 2, so that one file is a model of 8, 6, 4 and 2 bits. No data needed.

`graphq.planes` has the format, the operator that reads it and the switch. A nested width is about as good as rounding to nearest
to that width: its levels lie in the middle of the codes they replace. SQNR of a product's outputs, nested and direct (256 x 384
weights, min-max, one range an output channel), at 8, 6, 4 and 2 bits: 43.4/43.4, 31.3/31.3, 19.3/18.8, 7.2/4.8 dB for Gaussian
weights, 38.8/38.8, 26.8/26.6, 14.6/14.2, 2.5/2.9 dB for Student's t with 4 degrees of freedom. What a low width alone could have
besides, ranges and rounding fitted to it (`round`), one file of all widths cannot.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear, planes, precision
from graphq.exclude import is_excluded, nothing_to_quantize, require_matches
from graphq.noise import decibel
from graphq.passes import _weight_formats
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.precision import Bits
from graphq.quantizers import QParams, Uniform
from graphq.spec import PerAxis, PerGroup, QuantSpec
from graphq.targets import Target

WIDTHS = (8, 6, 4, 2)
"""Reported for each layer."""


@pass_options
class DigitPlanes(Pass):
    """Stores the weights of linear layers as four planes of 2-bit digits, of which any number of leading bits can be read.

    Attributes:
        group_size: One scale for so many consecutive weights along the reduction axis; 0 means one an output channel, as weights
            get that are not a multiple of it.
        op_types: Operator types to take.
        exclude: Patterns of node names (or operator types) that stay float.
    """

    name: ClassVar[str] = "digit-planes"

    group_size: Annotated[int, Field(ge=0, le=1024)] = 0
    op_types: tuple[str, ...] = tuple(linear.LINEAR_OPS)
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        _weight_formats.require_stored(self.name, "uint2", target, "2 bits a plane")
        reasons = [self._refusal(node) for node in self._nodes(model)]
        if not self.allow_no_effect and None not in reasons:
            raise nothing_to_quantize(map(str, reasons), f"at least one {', '.join(self.op_types)} with a constant float32 weight")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        if any(self._refusal(node) is None for node in self._nodes(model)):
            ctx.edit.raise_opset(planes.OPSET)  # may replace nodes
        for node in ir.all_nodes(model):
            if node.graph is not model.graph and not node.domain and node.op_type in self.op_types:
                ctx.skip(node, "it lies in a subgraph")
        decoded: dict[tuple[ir.Value, int], ir.Value] = {}
        for node in self._nodes(model):
            if reason := self._refusal(node):
                ctx.skip(node, reason)
                continue
            index = linear.LINEAR_OPS[node.op_type].weight
            value, key = node.inputs[index], (node.inputs[index], linear.out_axis(node))
            assert value is not None
            if key not in decoded:
                decoded[key] = self._store(node, value, ctx)  # type: ignore[index]
            ctx.edit.rewire(node, index, decoded[key])  # type: ignore[index]
        ctx.edit.prune()

    def _nodes(self, model: ir.Model) -> list[ir.Node]:
        return [node for node in model.graph if not node.domain and node.op_type in self.op_types and node.op_type in linear.LINEAR_OPS]

    def _refusal(self, node: ir.Node) -> str | None:
        if is_excluded(node, self.exclude):
            return "excluded by the recipe"
        if reason := linear.linear_refusal(node):
            return reason
        return "a float weight was asked for it" if precision.asked(node, Bits(8, None)).weight is None else None

    def _store(self, node: ir.Node, value: ir.Value, ctx: PassContext) -> ir.Value:
        """The float value that stands for the weight `value` of `node` from now on."""
        weight = ir.constant(value)
        assert weight is not None
        axis = linear.in_axis(node)
        if self.group_size and _weight_formats.not_grouped(node, self.group_size, whole=True) is None:
            spec = QuantSpec(8, signed=False, symmetric=False, granularity=PerGroup(axis, self.group_size))
            grouped = (*weight.shape[:axis], -1, self.group_size, *weight.shape[axis + 1 :])
        else:
            spec, grouped = QuantSpec(8, signed=False, symmetric=False, granularity=PerAxis(linear.out_axis(node))), weight.shape
        qparams = Uniform(spec).fit_weight(weight)
        codes = Uniform(spec).quantize(weight, qparams).reshape(grouped)
        scale, zero_point = _broadcast(qparams, spec, len(grouped))
        numbers, power = {}, float(np.sum(weight**2, dtype=np.float64))
        for bits in WIDTHS:
            error = weight - ((planes.nested(codes, bits) - zero_point) * scale).reshape(weight.shape)
            numbers[f"weight_sqnr_{bits}_bits_db"] = decibel(power, float(np.sum(error**2, dtype=np.float64)))
        ctx.measure(node.name or "", **numbers)
        return planes.insert(ctx.edit, node, value.name or "weight", codes, scale, zero_point.astype(np.uint8), value)


def _broadcast(qparams: QParams, spec: QuantSpec, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point with axes of length 1, so that they broadcast to codes of `rank` axes."""
    if isinstance(spec.granularity, PerGroup):
        axis = spec.granularity.axis + 1
        return np.expand_dims(qparams.scale, axis), np.expand_dims(qparams.zero_point, axis)
    assert isinstance(spec.granularity, PerAxis)
    shape = [-1 if index == spec.granularity.axis else 1 for index in range(rank)]
    return qparams.scale.reshape(shape), qparams.zero_point.reshape(shape)
