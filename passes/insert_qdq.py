"""insert-qdq: make a model's linear layers integer, with ranges from calibration.

Where quantizers go is the target's matter (`_placement`), which values they take that of a range estimator (`graphq.ranges`).
What each layer loses is measured before anything is inserted (`graphq.twins`): the worst layers stay float, within a budget,
and are named in the report; the mean error of the others is taken out of their biases.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graphq import ir, linear, qdq, ranges, twins
from graphq.errors import TargetError
from graphq.exclude import nothing_to_quantize, require_matches
from graphq.passes import _bias, _center, _formats, _placement, _tables
from graphq.passes._placement import Placement
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.precision import Bits
from graphq.quantizers import Format, Uniform
from graphq.ranges import Estimator
from graphq.spec import PerTensor, QuantSpec
from graphq.targets import Target
from graphq.twins import LayerError, Twin

ENOUGH_ROWS = 128
"""A mean over fewer positions is noise rather than a bias."""


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
        error_samples: Calibration samples for measuring layer errors; 0 measures nothing.
        correct_bias: Whether to take a layer's measured mean error out of its bias (DFQ, arXiv 1906.04721), as far as samples agree on it.
        format: What codes are: integers, or 8-bit floats (E4M3) for GPUs that multiply them (compute capability 8.9 and later).
        activation_bits: Width of activations, where no pass before asked for another (`mixed-precision`).
        weight_bits: The same for weights.
        weights: Whether to quantize weights too; without it a later `round` does.
        attention: Whether to quantize what MatMuls of two activations read as well.
        tables: Whether to quantize embedding tables of 1024 rows or more.
        center: Whether to shift one-sided activations to the middle of a symmetric range, for targets without zero points.
    """

    name: ClassVar[str] = "insert-qdq"
    needs_data: ClassVar[bool] = True

    ranges: Literal["min-max", "percentile", "mse", "entropy"] = "min-max"
    percentile: Annotated[float, Field(gt=50, le=100)] = 99.99
    per_channel: bool = True
    exclude: tuple[str, ...] = ()
    min_sqnr_db: Annotated[float, Field(ge=0, le=60)] = 28.0
    float_budget: Annotated[float, Field(ge=0, le=1)] = 0.1
    error_samples: Annotated[int, Field(ge=0)] = 4
    correct_bias: bool = True
    format: Literal["integer", "fp8"] = "integer"
    activation_bits: Annotated[int, Field(ge=3, le=8)] = 8
    weight_bits: Annotated[int, Field(ge=3, le=8)] = 8
    weights: bool = True
    attention: bool = False
    tables: bool = True
    center: bool = True

    def __post_init__(self) -> None:
        if self.format == "fp8" and (self.activation_bits, self.weight_bits) != (8, 8):
            raise ValueError("format fp8 has 8 bits; activation_bits and weight_bits are for integers")
        if self.format == "fp8" and self.ranges in ("mse", "entropy"):
            raise ValueError(f"ranges: {self.ranges} is for equal steps, which fp8 does not have; take min-max or percentile")

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        if self.allow_no_effect:
            return
        target = self._formatted(target)
        if target.activation.storage not in target.activation_storage:
            raise TargetError(
                f"{target.name} does not take {target.activation.storage} activations.", where=f"pass {self.name}, format: {self.format}",
                expected=f"codes stored as {' or '.join(sorted(target.activation_storage))}", hint="take another format, or another target",
            )  # fmt: skip
        plan = self._place(model, target)
        if not plan.readers:
            reasons = (reason for _, reason in plan.skipped)
            raise nothing_to_quantize(reasons, "at least one Conv, Gemm or MatMul with a constant float32 weight")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        target = self._formatted(ctx.target)
        plan = self._place(model, target)
        formats = _formats.formats(plan, self._estimator(), target, ctx, center=self.center and self.format == "integer")
        errors = self._errors(plan, formats, target, ctx)
        plan = self._place(model, target, self._worst(plan, errors, ctx))
        for node, reason in plan.skipped:
            ctx.skip(node, reason)
        if self.correct_bias:
            _correct(plan, errors, ctx)
        self._insert(plan, formats, target, ctx)
        if self.tables:
            _tables.quantize_all(model, ctx, ctx.target.weight, self.exclude)
        ctx.edit.prune()

    def _place(self, model: ir.Model, target: Target, keep_float: Mapping[ir.Node, str] | None = None) -> Placement:
        default = Bits(self.weight_bits, self.activation_bits)
        return _placement.place(model, target, exclude=self.exclude, keep_float=keep_float, default=default, attention=self.attention)

    def _formatted(self, target: Target) -> Target:
        return target.in_floats() if self.format == "fp8" else target

    def _estimator(self) -> Estimator:
        return ranges.Percentile(self.percentile) if self.ranges == "percentile" else ranges.ESTIMATORS[self.ranges]()

    def _errors(self, plan: Placement, formats: Mapping[ir.Value, Format], target: Target, ctx: PassContext) -> dict[ir.Node, LayerError]:
        """What quantizing each layer alone, as it is about to be, does to its own output."""
        if not self.error_samples:
            return {}
        copies = [Twin(node.name or "", self._weight_spec(node, plan, target), formats[linear.data_of(node)]) for node in plan.anchors]
        errors = twins.measure(ctx.model, copies, ctx.calib.take(self.error_samples))
        return dict(zip(plan.anchors, errors, strict=True))

    def _worst(self, plan: Placement, errors: Mapping[ir.Node, LayerError], ctx: PassContext) -> dict[ir.Node, str]:
        """The layers to keep float: those below `min_sqnr_db`, worst first, until the budget is used up."""
        total = sum(map(linear.multiply_adds, errors)) or 1.0
        kept, left = {}, self.float_budget
        for node, error in sorted(errors.items(), key=lambda entry: entry[1].sqnr_db):
            db, work = error.sqnr_db, linear.multiply_adds(node) / total
            ctx.measure(node.name or "", sqnr_db=db, work=work)
            if db < self.min_sqnr_db and work <= left + 1e-9:
                left -= work
                kept[node] = f"kept float: its own error of {db:.1f} dB is worse than {self.min_sqnr_db:g} dB"
        return kept

    def _weight_spec(self, node: ir.Node, plan: Placement, target: Target) -> QuantSpec | None:
        """The format that the weight of `node` gets here; None if it stays as it is."""
        bits = plan.bits[node].weight
        if bits is None or not self.weights:
            return None
        spec = target.weight if self.per_channel else replace(target.weight, granularity=PerTensor())
        return qdq.spec_for_weight(node, replace(spec, bits=bits))

    def _insert(self, plan: Placement, formats: Mapping[ir.Value, Format], target: Target, ctx: PassContext) -> None:
        for node in [*plan.anchors, *plan.weights_only]:
            format_ = formats[linear.data_of(node)] if node in plan.anchors else None
            self._insert_weight(node, self._weight_spec(node, plan, target), format_, target, ctx)
        for value, readers in plan.readers.items():
            spec, qparams = formats[value]
            source, through = value, plan.carriers.get(value, [])
            if spec.symmetric != target.activation.symmetric:
                source, qparams = _center.insert(ctx.edit, value, qparams)
                spec, through = replace(spec, symmetric=True), []
            narrow = spec.storage in target.activation_storage
            result = qdq.insert_pair(ctx.edit, source, qparams, spec, readers, through if spec.bits == 8 else [], narrow=narrow)
            if value.is_graph_output() and value in plan.whole:
                ctx.edit.replace_output(value, result)

    def _insert_weight(self, node: ir.Node, spec: QuantSpec | None, activation: Format | None, target: Target, ctx: PassContext) -> None:
        """Store the weight as `spec` says (None: float), and the bias with it where the target's kernel wants that."""
        weight = ir.constant(linear.weight_of(node))
        assert weight is not None
        params = bias = None
        if spec is not None:
            params = Uniform(spec).fit_weight(weight)
            if activation is not None and spec.bits == activation[0].bits == 8 and target.bias_int32 and _takes_int32_bias(node):
                bias = ir.constant(linear.bias_of(node))
                params = qdq.widen_for_bias(params, activation[1], bias)
        if activation is not None and activation[0].symmetric != target.activation.symmetric:
            rounded = weight if spec is None or params is None else Uniform(spec).fake_quantize(weight, params)
            _center.compensate(ctx.edit, node, activation[1], rounded)
        if spec is not None and params is not None:
            qdq.insert_weight(ctx.edit, node, spec, params, narrow=node.op_type in target.narrow_weights)
            if bias is not None and activation is not None:
                qdq.insert_bias(ctx.edit, node, activation[1], params)


def _correct(plan: Placement, errors: Mapping[ir.Node, LayerError], ctx: PassContext) -> None:
    for node in plan.anchors:
        error = errors.get(node)
        if error is not None and error.shift is not None and error.rows >= ENOUGH_ROWS and _bias.can_shift(node):
            _bias.shift(ctx.edit, node, -error.trust * error.shift)


def _takes_int32_bias(node: ir.Node) -> bool:
    """Whether the bias is one number an output channel that is added unscaled."""
    bias, weight = ir.constant(linear.bias_of(node)), ir.constant(linear.weight_of(node))
    if bias is None or weight is None or ir.attribute(node, "beta", 1.0) != 1.0 or ir.attribute(node, "alpha", 1.0) != 1.0:
        return False
    return bias.shape == (weight.shape[linear.out_axis(node)],)
