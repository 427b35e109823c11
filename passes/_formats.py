"""Spec and qparams of every activation that is quantized: from the placement, the target's format and what calibration saw."""

from __future__ import annotations

from dataclasses import replace

from graphq import ir, ranges
from graphq.passes import _bias, _center, _placement
from graphq.passes._placement import Placement
from graphq.pipeline import PassContext
from graphq.quantizers import Format, Uniform
from graphq.targets import Target


def formats(plan: Placement, estimator: ranges.Estimator, target: Target, ctx: PassContext, *, center: bool) -> dict[ir.Value, Format]:
    """The format of each value that `plan` quantizes; values that share a scale share all of it.

    Args:
        target: With the formats to use.
        center: Whether one-sided activations may get a zero point that the target does not have (see `_center`); such a
            format is told by its asymmetric spec.
    """
    observers = {value: estimator.observer(value.name or "", "current") for value in plan.readers if value not in plan.derived}
    stats = ctx.observe(observers.values())
    found: dict[ir.Value, Format] = {}
    for value, group in _placement.tied(plan):
        members = [member for member in group if member in plan.readers]
        spec = replace(target.activation, bits=max(map(plan.activation_bits, members)))
        if members[0] in found:
            found[value] = found[members[0]]
            continue
        if center and spec.symmetric and value not in plan.whole and all(_bias.takes_data_shift(node) for node, _ in plan.readers[value]):
            shifted = replace(spec, symmetric=False)
            low, high = estimator.estimate(stats[observers[value]], shifted)
            if _center.is_worthwhile(low, high):
                found[value] = (shifted, Uniform(shifted).fit(low, high))
                continue
        lows, highs = zip(*(estimator.estimate(stats[observers[member]], spec) for member in members if member in observers), strict=True)
        found[value] = (spec, Uniform(spec).fit(min(lows), max(highs)))
    return found
