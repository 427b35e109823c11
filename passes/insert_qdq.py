"""insert-qdq: make a model's linear layers integer, with ranges from calibration.

Where quantizers go is the target's matter (`_placement`), which values they take that of a range estimator (`graphq.ranges`).
Layers whose measured error is worst stay float, within a budget, and are named in the report.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear, qdq, ranges
from graphq.errors import TargetError
from graphq.observers import Observer, Stat
from graphq.passes import _layer_error, _placement
from graphq.passes._placement import Placement
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.quantizers import QParams, Uniform
from graphq.spec import PerTensor, QuantSpec
from graphq.targets import Target

Range = tuple[float, float]


@pass_options
class InsertQdq(Pass):
    """Quantizes activations and weights of Conv, Gemm and MatMul, and what lies between them where the target fuses it.

    Attributes:
        ranges: How an activation's range is found from its statistics.
        percentile: What `ranges: percentile` keeps, in percent.
        per_channel: One weight scale an output channel, rather than one a tensor.
        exclude: Patterns of node names (or operator types) that stay float.
        min_sqnr_db: A layer whose own output error is worse than this stays float.
        float_budget: Share of the multiply-adds that may stay float for that reason; the worst layers go first.
        error_samples: Calibration samples for measuring layer errors; 0 measures nothing and keeps nothing float.
    """

    name: ClassVar[str] = "insert-qdq"

    ranges: Literal["min-max", "percentile", "mse", "entropy"] = "min-max"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    min_sqnr_db: Annotated[float, Field(ge=0, le=60)] = 15.0
    float_budget: Annotated[float, Field(ge=0, le=1)] = 0.1
    error_samples: Annotated[int, Field(ge=0)] = 8

    def precheck(self, model: ir.Model, target: Target) -> None:
        if not _placement.place(model, target, exclude=self.exclude).anchors:
            raise TargetError(
                "There is nothing to quantize.", expected="at least one Conv, Gemm or MatMul with a constant float32 weight",
                hint="`graphq inspect` lists the nodes with the reason why each stays float",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        plan = _placement.place(model, ctx.target, exclude=self.exclude)
        found = self._ranges(plan, ctx)
        qparams = _fit(plan, found, ctx.target.activation)
        if self.error_samples and plan.anchors:
            worst = self._worst(model, plan, qparams, ctx)
            if worst:
                plan = _placement.place(model, ctx.target, exclude=self.exclude, keep_float=worst)
                qparams = _fit(plan, found, ctx.target.activation)
        for node, reason in plan.skipped:
            ctx.skip(node, reason)
        self._insert(plan, qparams, ctx)
        ctx.edit.prune()

    def _ranges(self, plan: Placement, ctx: PassContext) -> dict[ir.Value, Range]:
        estimator = ranges.ESTIMATORS[self.ranges]()
        if isinstance(estimator, ranges.Percentile):
            estimator = replace(estimator, percent=self.percentile)
        observers: dict[ir.Value, Observer] = {value: estimator.observer(value.name or "", "current") for value in plan.readers}
        stats: Mapping[Observer, Stat] = ctx.observe(observers.values())
        return {value: estimator.estimate(stats[observer], ctx.target.activation) for value, observer in observers.items()}

    def _worst(self, model: ir.Model, plan: Placement, qparams: Mapping[ir.Value, QParams], ctx: PassContext) -> dict[ir.Node, str]:
        """The layers to keep float: those below `min_sqnr_db`, worst first, until the budget is used up."""
        by_name = {value.name or "": entry for value, entry in qparams.items()}
        errors = _layer_error.measure(model, plan.anchors, by_name, ctx.target, ctx.calib.take(self.error_samples))
        kept, left = {}, self.float_budget
        for node in sorted(plan.anchors, key=lambda node: errors[node.name or ""].sqnr_db):
            error = errors[node.name or ""]
            ctx.measure(node.name or "", sqnr_db=error.sqnr_db, work=error.work)
            if error.sqnr_db < self.min_sqnr_db and error.work <= left:
                left -= error.work
                kept[node] = f"kept float: its own error of {error.sqnr_db:.1f} dB is worse than {self.min_sqnr_db:g} dB"
        return kept

    def _insert(self, plan: Placement, qparams: Mapping[ir.Value, QParams], ctx: PassContext) -> None:
        weight_spec = ctx.target.weight if self.per_channel else replace(ctx.target.weight, granularity=PerTensor())
        weight_params = {}
        for node in plan.anchors:
            data = node.inputs[linear.LINEAR_OPS[node.op_type].data]
            assert data is not None
            spec = qdq.spec_for_weight(node, weight_spec)
            bias = ir.constant(linear.bias_of(node)) if ctx.target.bias_int32 and _takes_int32_bias(node) else None
            weight = ir.constant(linear.weight_of(node))
            assert weight is not None
            params = qdq.widen_for_bias(Uniform(spec).fit_weight(weight), qparams[data], bias)
            qdq.insert_weight(ctx.edit, node, spec, params)
            weight_params[node] = params
            if bias is not None:
                qdq.insert_bias(ctx.edit, node, qparams[data], params)
        for value, readers in plan.readers.items():
            if value.is_graph_output():
                result = qdq.insert_pair(ctx.edit, value, qparams[value], ctx.target.activation, [])
                ctx.edit.replace_output(value, result)
                readers = [(use.node, use.idx) for use in value.uses() if use.node.op_type != "QuantizeLinear"]
                for node, index in readers:
                    ctx.edit.rewire(node, index, result)
            else:
                qdq.insert_pair(ctx.edit, value, qparams[value], ctx.target.activation, readers)


def _takes_int32_bias(node: ir.Node) -> bool:
    """Whether the bias is one number an output channel that is added unscaled."""
    bias, weight = ir.constant(linear.bias_of(node)), linear.weight_of(node)
    if bias is None or weight is None or weight.const_value is None or ir.attribute(node, "beta", 1.0) != 1.0 or ir.attribute(node, "alpha", 1.0) != 1.0:
        return False
    return bias.shape == (tuple(weight.const_value.shape)[linear.out_axis(node)],)


def _fit(plan: Placement, found: Mapping[ir.Value, Range], spec: QuantSpec) -> dict[ir.Value, QParams]:
    """Qparams of every value, one range for values that share a scale."""
    qparams = {}
    for value, group in _placement.tied(plan):
        lows, highs = zip(*(found[member] for member in group if member in found), strict=True)
        qparams[value] = Uniform(spec).fit(float(np.min(lows)), float(np.max(highs)))
    return qparams
