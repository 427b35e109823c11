"""mixed-precision: choose the widths of each layer so that the model's outputs change least within a budget.

What a layer costs the model is measured at the model's outputs, with that layer alone quantized (`graphq.twins`): once with its
weight and once with its activation, each at the lowest width. At other widths it follows the error of the layer's own output,
and the two sides add up. The choice is exact then (`_mixed_precision_math`). It is written on the nodes, for passes that
quantize (`insert-qdq`, `round`); what the model computes stays as it is. After HAWQ-V3 (arXiv 2011.10680), AdaQuant (arXiv
2006.10518) and MixDQ (arXiv 2405.17873), which measure otherwise: errors of layers' own outputs alone were found to rank layers
wrongly.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear, precision, qdq, twins
from graphq.errors import RecipeError, TargetError
from graphq.exclude import require_matches
from graphq.executor import Executor, Fetch
from graphq.noise import decibel
from graphq.passes import _formats, _layer_latency, _placement
from graphq.passes import _mixed_precision_math as allocation
from graphq.passes._layer_latency import FLOAT
from graphq.passes._placement import EIGHT, Placement
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.precision import Bits
from graphq.quantizers import Format
from graphq.ranges import ESTIMATORS
from graphq.targets import Target
from graphq.twins import Twin

WeightWidth = Annotated[int, Field(ge=3, le=8)]
ActivationWidth = Annotated[int, Field(ge=4, le=8)]  # ONNX Runtime 1.31 does not load a Clip before 4-bit codes, as 3 bits take
Budget = Annotated[float, Field(gt=0, le=1)] | None

BUDGETS = ("size", "bops", "latency")

Formats = Mapping[int, Mapping[ir.Value, Format]]
"""By the width that is asked for."""

Table = dict[ir.Node, np.ndarray]
"""A number for each choice, float64 of shape (choices,), by layer."""


@pass_options
class MixedPrecision(Pass):
    """Asks for widths layer by layer, so that the model's outputs change least within one budget: size, bops or latency.

    Attributes:
        weight_bits: Widths that weights may get; an empty list leaves them float.
        activation_bits: Widths that activations may get; an empty list leaves them float.
        size: Bytes of the weights as stored (3 bits take 4, and 5 to 7 take 8), as a part of what they take as float32.
        bops: Multiply-adds times the bits of both operands, as a part of the same with 32 bits.
        latency: Time of the layers, measured one by one on this machine, as a part of their time as float; layers may stay float.
        ranges: How an activation's range is found; the same as in `insert-qdq`.
        error_samples: Calibration samples for measuring; the model runs once or twice a layer on them.
        exclude: Patterns of node names (or operator types) for which nothing is asked.
    """

    name: ClassVar[str] = "mixed-precision"
    needs_data: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    weight_bits: tuple[WeightWidth, ...] = (4, 8)
    activation_bits: tuple[ActivationWidth, ...] = (8,)
    size: Budget = None
    bops: Budget = None
    latency: Budget = None
    ranges: Literal["min-max", "percentile", "mse", "entropy"] = "min-max"
    error_samples: Annotated[int, Field(ge=1)] = 4
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        if len(given) != 1:
            raise RecipeError(
                f"Pass {self.name} takes one budget, not {len(given)}.", where=", ".join(given), expected=f"one of {', '.join(BUDGETS)}",
                hint="such as size: 0.2",
            )  # fmt: skip
        if self.latency is not None and not target.measures_speed:
            raise TargetError(
                f"{target.name} does not run here, so that no latency can be measured.", where="latency", expected="target onnxruntime",
                hint="give size or bops as the budget",
            )  # fmt: skip
        for side, widths, spec, known in (
            ("weight", self.weight_bits, target.weight, target.storage),
            ("activation", self.activation_bits, target.activation, target.activation_storage),
        ):
            stored = {width: replace(spec, bits=width).storage for width in widths}
            if wrong := [width for width in widths if stored[width] not in known]:
                raise TargetError(
                    f"{target.name} does not take {stored[wrong[0]]} {side}s.", where=f"{side}_bits: {wrong[0]}",
                    expected=f"bits stored as {' or '.join(sorted(known))}",
                )  # fmt: skip
        require_matches(model, self.exclude)
        if not self.allow_no_effect and not self._place(model, target).anchors:
            raise TargetError(
                "There is no layer to choose widths for.", expected="at least one Conv, Gemm or MatMul with a constant float32 weight",
                hint="`graphq inspect --layers` lists the nodes with the reason why each stays float",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        plan, choices = self._place(model, ctx.target), self._choices()
        for node, reason in plan.skipped:
            ctx.skip(node, reason)
        formats = {width: self._formats(model, width, ctx) for width in sorted(set(self.activation_bits))}
        loss = self._losses(model, _undecided(plan, ctx), choices, formats, ctx)
        for node in [node for node, row in loss.items() if not np.isfinite(row).all()]:
            ctx.skip(node, "its output is not finite on the calibration data")
            del loss[node]
        if not loss:
            return
        cost = self._costs(model, list(loss), choices, formats, ctx)
        chosen = self._allocate(plan, loss, cost, choices)
        for node, index in chosen.items():
            bits = choices[index]
            precision.ask(ctx.edit, node, bits)
            db = decibel(1.0, float(loss[node][index]))
            ctx.measure(node.name or "", weight_bits=bits.weight or 32, activation_bits=bits.activation or 32, output_sqnr_db=db)
        lost, spent = (sum(float(table[node][index]) for node, index in chosen.items()) for table in (loss, cost))
        ctx.measure("all layers", output_sqnr_db=decibel(1.0, lost), **{self._budget[0]: spent})

    @property
    def _budget(self) -> tuple[str, float]:
        """Name and value of the one that is given."""
        return next((name, value) for name in BUDGETS if (value := getattr(self, name)) is not None)

    def _place(self, model: ir.Model, target: Target, default: Bits = EIGHT) -> Placement:
        return _placement.place(model, target, exclude=self.exclude, default=default)

    def _choices(self) -> list[Bits]:
        """What a layer may get; float as well if it is time that counts, since integers are not always faster."""
        sides: list[list[int | None]] = [[*sorted(set(widths))] or [None] for widths in (self.weight_bits, self.activation_bits)]
        found = [Bits(weight, activation) for weight, activation in product(*sides)]
        return [*found, FLOAT] if self.latency is not None and FLOAT not in found else found

    def _formats(self, model: ir.Model, width: int, ctx: PassContext) -> dict[ir.Value, Format]:
        """What `insert-qdq` would make of every activation at this width."""
        plan = self._place(model, ctx.target, Bits(8, width))
        return _formats.formats(plan, ESTIMATORS[self.ranges](), ctx.target, ctx, center=True)

    def _losses(self, model: ir.Model, nodes: Sequence[ir.Node], choices: Sequence[Bits], formats: Formats, ctx: PassContext) -> Table:
        """Effect of every choice on the model's outputs, noise over power, without what all choices have in common."""
        total = np.zeros((len(nodes), len(choices)))
        for side in ("weight", "activation"):
            widths = [getattr(bits, side) for bits in choices]
            known = sorted({width for width in widths if width is not None})
            if nodes and len(set(widths)) > 1:
                found = self._effects(model, [[_twin(node, side, width, formats, ctx.target) for width in known] for node in nodes], ctx)
                for index, width in enumerate(widths):
                    total[:, index] += 0.0 if width is None else found[:, known.index(width)]
        return dict(zip(nodes, total, strict=True))

    def _effects(self, model: ir.Model, twins_by_width: list[list[Twin]], ctx: PassContext) -> np.ndarray:
        """Effect of each layer's twins on the model's outputs, float64 of shape (layers, widths)."""
        data = ctx.calib.take(self.error_samples)
        errors = twins.measure(model, [twin for row in twins_by_width for twin in row], data, ctx.progress)
        relative = np.array([error.relative for error in errors]).reshape(len(twins_by_width), -1)
        return allocation.losses(twins.effects(model, [row[0] for row in twins_by_width], data, ctx.progress), relative)

    def _costs(self, model: ir.Model, nodes: Sequence[ir.Node], choices: Sequence[Bits], formats: Formats, ctx: PassContext) -> Table:
        """Cost of every choice, as a part of what all `nodes` cost as float."""
        if self.latency is not None:
            return _latencies(model, nodes, choices, formats, ctx)
        readers = Counter(linear.weight_of(node) for node in nodes)
        if self.size is not None:  # a weight that several nodes read is stored once
            float_cost = [math.prod(ir.constant_shape(linear.weight_of(node))) / readers[linear.weight_of(node)] for node in nodes]
            stored = [32 if bits.weight is None else replace(ctx.target.weight, bits=bits.weight).storage_bits for bits in choices]
            part = [width / 32 for width in stored]
        else:
            float_cost = [linear.multiply_adds(node) for node in nodes]
            part = [(bits.weight or 32) * (bits.activation or 32) / 32**2 for bits in choices]
        return dict(zip(nodes, np.outer(float_cost, part) / sum(float_cost), strict=True))

    def _allocate(self, plan: Placement, loss: Table, cost: Table, choices: Sequence[Bits]) -> dict[ir.Node, int]:
        """Index of the choice of each node. Nodes that share a weight make one choice; what read one value read it in one width."""
        units: dict[ir.Value | None, list[ir.Node]] = {}
        for node in loss:
            units.setdefault(linear.weight_of(node), []).append(node)
        together = list(units.values())
        losses, costs = (np.array([sum(table[node] for node in unit) for unit in together]) for table in (loss, cost))
        group = {value: values[0] for value, values in _placement.tied(plan)}
        groups = allocation.connected([[group[linear.data_of(node)] for node in unit] for unit in together])
        labels = [bits.activation or 32 for bits in choices]
        name, budget = self._budget
        found = allocation.allocate(losses, costs, budget, labels, groups)
        if found is None:
            least = allocation.least_cost(costs, labels, groups)
            raise RecipeError(
                f"No choice of widths reaches the budget of pass {self.name}.", where=f"{name}: {budget:g}",
                expected=f"{math.ceil(least * 1e4) / 1e4:g} or more with these widths", hint="allow fewer bits, or raise the budget",
            )  # fmt: skip
        return {node: int(index) for unit, index in zip(together, found, strict=True) for node in unit}


def _twin(node: ir.Node, side: str, width: int, formats: Formats, target: Target) -> Twin:
    """`node` with its weight or its activation in `width` bits."""
    if side == "weight":
        return Twin(node.name or "", weight=qdq.spec_for_weight(node, replace(target.weight, bits=width)))
    return Twin(node.name or "", activation=formats[width][linear.data_of(node)])


def _undecided(plan: Placement, ctx: PassContext) -> list[ir.Node]:
    """The layers for which no pass before has asked for widths."""
    found = []
    for node in plan.anchors:
        if precision.KEY in node.metadata_props:
            ctx.skip(node, "a pass before has asked for its widths")
        else:
            found.append(node)
    return found


def _latencies(model: ir.Model, nodes: Sequence[ir.Node], choices: Sequence[Bits], formats: Formats, ctx: PassContext) -> Table:
    """Time of every choice, as a part of the time of all `nodes` as float, on one calibration sample."""
    names = list(dict.fromkeys(linear.data_of(node).name or "" for node in nodes))
    inputs = dict(zip(names, Executor(model, [Fetch(name) for name in names]).run(next(ctx.calib.batches(1))), strict=True))
    found = []
    for index, node in enumerate(nodes):
        ctx.progress("measure latencies", index, len(nodes))
        data = linear.data_of(node)
        activations = {bits: None if bits.activation is None else formats[bits.activation][data] for bits in choices if bits != FLOAT}
        measured = _layer_latency.milliseconds(model, node.name or "", inputs[data.name or ""], activations, ctx.target)
        found.append([measured[bits] for bits in choices])
    table = np.array(found)
    return dict(zip(nodes, table / table[:, choices.index(FLOAT)].sum(), strict=True))
