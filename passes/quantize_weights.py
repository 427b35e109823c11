"""quantize-weights: smaller weights, float arithmetic. No data needed."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import codebooks, ir, linear, qdq
from graphq.exclude import is_excluded, nothing_to_quantize, require_matches
from graphq.noise import decibel
from graphq.passes import _tables, _weight_formats
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec
from graphq.targets import Target

OPSET = 13
"""From here on DequantizeLinear takes a scale for each output channel."""

TABLE_BITS = 4


@pass_options
class QuantizeWeights(Pass):
    """Stores the weights of linear layers as integers with one DequantizeLinear each.

    Attributes:
        bits: Width of an integer weight, unless its layer asks for another; 3 bits are stored in 4.
        group_size: One scale for so many consecutive weights along the reduction axis, the last of which may be fewer; 0 means one an
            output channel.
        format: Integers, or codes of a table of 16 numbers: NormalFloat (QLoRA, arXiv 2305.14314) or the 4-bit float E2M1. Those are
            decoded when a session loads, which multiplies floats then. A layer that asks for other than 4 bits gets integers.
        fallback_bits: Width, with one scale an output channel, for weights that cannot be grouped: kernels, and for codes of a table
            those with inputs that are not a multiple of the group; 0 leaves them float.
        tables: Whether to store embedding tables of 1024 rows or more with 8 bits.
        op_types: Operator types to take.
        exclude: Patterns of node names (or operator types) that stay float.
    """

    name: ClassVar[str] = "quantize-weights"

    bits: Literal[2, 3, 4, 8] = 8
    group_size: Annotated[int, Field(ge=0, le=1024)] = 0
    format: Literal["integer", "nf4", "fp4"] = "integer"
    fallback_bits: Literal[0, 8] = 0
    tables: bool = True
    op_types: tuple[str, ...] = tuple(linear.LINEAR_OPS)
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        reasons = [self._format(node, target) for node in self._nodes(model)]
        if self.tables and _tables.any_large(model, self.exclude):
            return
        if not self.allow_no_effect and all(isinstance(reason, str) for reason in reasons):
            raise nothing_to_quantize(map(str, reasons), f"at least one {', '.join(self.op_types)} with a constant float32 weight")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        formats = [self._format(node, ctx.target) for node in self._nodes(model)]
        ctx.edit.raise_opset(max([OPSET, *(spec.opset for spec in formats if isinstance(spec, QuantSpec))]))  # may replace nodes
        for node in [node for node in ir.all_nodes(model) if not node.domain]:
            if node.op_type in linear.NEVER_QUANTIZED:
                ctx.skip(node, f"{node.op_type} is not quantized by any pass")
            elif node.op_type in self.op_types and node.graph is not model.graph:
                ctx.skip(node, "it lies in a subgraph")
        if self.format == "integer" and "upright-gemm" in ctx.target.forms:
            _weight_formats.turn(ctx.edit, [node for node in self._nodes(model) if isinstance(self._format(node, ctx.target), QuantSpec)])
        for node in self._nodes(model):
            spec = self._format(node, ctx.target)
            if isinstance(spec, str):
                ctx.skip(node, spec)
                continue
            if self.format != "integer" and spec.bits == TABLE_BITS:
                ctx.measure(node.name or "", weight_sqnr_db=self._store_codes(ctx, node), bits=spec.bits)
                continue
            weight = ir.constant(linear.weight_of(node))
            assert weight is not None
            qparams = qdq.insert_weight(ctx.edit, node, spec, narrow=node.op_type in ctx.target.narrow_weights)
            ctx.measure(node.name or "", weight_sqnr_db=decibel(*Uniform(spec).sums(weight, qparams)), bits=spec.bits)
        if self.tables:
            _tables.quantize_all(model, ctx, _spec(8), self.exclude)
        ctx.edit.prune()

    def _store_codes(self, ctx: PassContext, node: ir.Node) -> float:
        """Store the weight of `node` as codes of the table that the format says; returns its SQNR in dB."""
        weight = ir.constant(linear.weight_of(node))
        assert weight is not None
        rows = np.moveaxis(weight, linear.out_axis(node), 0).reshape(weight.shape[linear.out_axis(node)], -1)
        book = codebooks.nf4() if self.format == "nf4" else codebooks.fp4()
        coded = codebooks.encode(rows, book, codebooks.widest(rows, book, self.group_size or rows.shape[1]))
        codebooks.insert(ctx.edit, node, coded)
        power, noise = (float(np.sum(np.square(part), dtype=np.float64)) for part in (rows, rows - coded.decode()))
        return decibel(power, noise)

    def _nodes(self, model: ir.Model) -> list[ir.Node]:
        return [node for node in model.graph if not node.domain and node.op_type in self.op_types and node.op_type in linear.LINEAR_OPS]

    def _format(self, node: ir.Node, target: Target) -> QuantSpec | str:
        """What the weight of `node` becomes, or why it stays float."""
        if is_excluded(node, self.exclude):
            return "excluded by the recipe"
        if reason := linear.linear_refusal(node):
            return reason
        is_integer = self.format == "integer"
        spec = _weight_formats.storable(self.name, node, self.bits if is_integer else TABLE_BITS, target)
        if isinstance(spec, str):
            return spec
        obstacle = _weight_formats.not_grouped(node, self.group_size, whole=not is_integer and spec.bits == TABLE_BITS)
        if obstacle is None:
            return _weight_formats.in_groups(node, spec, self.group_size)
        return qdq.spec_for_weight(node, _spec(self.fallback_bits)) if self.fallback_bits else obstacle


def _spec(bits: int) -> QuantSpec:
    return QuantSpec(bits, signed=True, symmetric=True, granularity=PerAxis(0))
