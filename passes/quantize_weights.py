"""quantize-weights: smaller weights, float arithmetic. No data needed."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear, qdq
from graphq.errors import TargetError
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec
from graphq.targets import Target


@pass_options
class QuantizeWeights(Pass):
    """Stores the weights of linear layers as integers with one DequantizeLinear each.

    Attributes:
        bits: Width of a weight.
        group_size: One scale for so many consecutive weights along the reduction axis; 0 means one an output channel.
        op_types: Operator types to take.
        exclude: Patterns of node names that stay float.
    """

    name: ClassVar[str] = "quantize-weights"

    bits: Literal[2, 4, 8] = 8
    group_size: Annotated[int, Field(ge=0, le=1024)] = 0
    op_types: tuple[str, ...] = tuple(linear.LINEAR_OPS)
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        spec = QuantSpec(self.bits, signed=True, symmetric=True, granularity=PerAxis(0))
        if spec.storage not in target.storage:
            raise TargetError(f"{target.name} does not take {spec.storage} weights.", where=f"pass {self.name}, bits: {self.bits}",
                              expected=f"one of {', '.join(sorted(target.storage))}")  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        spec = QuantSpec(self.bits, signed=True, symmetric=True, granularity=PerAxis(0))
        ctx.edit.raise_opset(replace(spec, granularity=PerAxis(0)).opset if not self.group_size else max(spec.opset, 21))
        for node in list(ir.all_nodes(model)):
            if node.domain != "" or node.op_type not in self.op_types or node.graph is not model.graph:
                continue
            reason = self._refusal(node)
            if reason:
                ctx.skip(node, reason)
                continue
            weight = ir.constant(linear.weight_of(node))
            assert weight is not None
            node_spec = qdq.spec_for_weight(node, spec, self.group_size or None)
            qparams = qdq.insert_weight(ctx.edit, node, node_spec)
            error = weight - Uniform(node_spec).fake_quantize(weight, qparams)
            power = float(np.sum(weight.astype(np.float64) ** 2))
            ctx.measure(node.name or "", weight_sqnr_db=10 * np.log10(max(power, 1e-30) / max(float(np.sum(error.astype(np.float64) ** 2)), 1e-30)))
        ctx.edit.prune()

    def _refusal(self, node: ir.Node) -> str | None:
        if any(fnmatchcase(node.name or "", pattern) for pattern in self.exclude):
            return "excluded by the recipe"
        reason = linear.linear_refusal(node)
        if reason or not self.group_size:
            return reason
        weight = ir.constant(linear.weight_of(node))
        assert weight is not None
        if weight.ndim != 2:
            return "groups along the reduction axis need a matrix, this weight has kernel positions"
        if weight.shape[linear.in_axis(node)] % self.group_size:
            return f"its {weight.shape[linear.in_axis(node)]} inputs are not a multiple of the group size {self.group_size}"
        return None
