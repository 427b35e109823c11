"""Masks for a Softmax: constants near the end of float32 (-3.4e38) that stand for minus infinity, written as numbers that half
precision holds. Otherwise the sum with the scores and the Softmax would stay float32, and with them the fused attention is lost.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from graphq import ir
from graphq.editor import Editor
from graphq.half import Half
from graphq.observers import Range
from graphq.passes import _cast_float_errors as errors
from graphq.passes._cast_float_slots import slots
from graphq.pipeline import PassContext

ENOUGH = 8
"""A mask is so many times larger than any score seen, at least."""

ZERO = 200.0
"""A mask is at least so large: the exponential of minus that is 0 in float32, and so is that of any score below it."""


SOFTMAXES = ("Softmax", "SULQSoftmax", "SULQSoftmaxCodes")


@dataclass
class _Paths:
    """Where a constant goes: the values made from it, what is multiplied with these, and what is added or put beside them."""

    values: set[ir.Value] = field(default_factory=set)
    factors: set[ir.Value] = field(default_factory=set)
    others: set[ir.Value] = field(default_factory=set)


def saturate(ctx: PassContext, half: Half, *, margin: float, min_sqnr_db: float, samples: int) -> None:
    """Shorten the constants all of whose ways end in a Softmax, if the data shows that they still mask.

    A row that is masked everywhere is an average in float32, which loses the scores beside so large a number, and a softmax of the
    scores afterwards. Such constants stay, and so does a mask that changes the outputs of `samples` by more than `min_sqnr_db` allows.
    """
    limit = -half.limit / (2 * margin)  # two masks may be added
    found = {value: paths for value in _candidates(ctx.model, 2 * limit) if (paths := _follow(value, half, ir.opset(ctx.model)))}
    if not found or -limit < ZERO:
        return
    masks = set().union(*(paths.values for paths in found.values()))
    wanted = {value for paths in found.values() for value in (*paths.factors, *paths.others) if ir.constant(value) is None} - masks
    stats = ctx.observe(Range(value.name or "") for value in wanted)

    def span(value: ir.Value) -> tuple[float, float]:
        array = ir.constant(value)
        if array is not None:
            return float(array.min(initial=0)), float(array.max(initial=0))
        stat = stats[Range(value.name or "")]
        return float(stat["low"]), float(stat["high"])

    for value, paths in found.items():
        fits = all(0 <= span(factor)[0] and span(factor)[1] <= 1 for factor in paths.factors)
        scores = max((abs(end) for other in paths.others - masks for end in span(other)), default=0.0)
        array = ir.constant(value)
        if not fits or ENOUGH * scores > -limit or array is None:
            continue
        reason, reader = _loss(ctx, value, array, limit, min_sqnr_db, samples), ir.uses(value)[0].node
        if reason is not None:
            ctx.skip(reader, reason)
            continue
        _shorten(ctx.edit, value, array, limit)
        ctx.measure(value.name or "", mask_before=float(array.min()), mask_after=limit)


def _shorten(edit: Editor, value: ir.Value, array: np.ndarray, limit: float) -> None:
    edit.replace(value, edit.initializer(f"{value.name}_mask", np.maximum(array, np.float32(limit))))


def _loss(ctx: PassContext, value: ir.Value, array: np.ndarray, limit: float, min_sqnr_db: float, samples: int) -> str | None:
    """Why the mask `value` must stay."""
    is_added = any(use.node.op_type == "Add" for use in ir.uses(value))  # a Where puts it in the place of the scores
    if is_added and array.shape[-1:] > (1,) and (array.max(axis=-1) <= limit).any():
        return f"a row of {value.name} masks everything, which only float32 makes an average"
    if not samples:
        return None
    copy = ir.clone(ctx.model)
    _shorten(Editor(copy), copy.graph.initializers[value.name or ""], array, limit)
    sqnr_db = errors.change(ctx.model, copy, ctx.calib.take(samples))
    return None if sqnr_db >= min_sqnr_db else f"as {limit:.3g}, {value.name} alone would leave {sqnr_db:.1f} dB of the outputs"


def _candidates(model: ir.Model, limit: float) -> Iterator[ir.Value]:
    """Constants with elements below `limit`, but none above minus that."""
    for value in list(model.graph.initializers.values()):
        array = ir.constant(value) if value.dtype == ir.DataType.FLOAT and not value.is_graph_output() else None
        if array is not None and array.size and np.isfinite(array.min()) and array.min() < limit and array.max() <= -limit:
            yield value


def _follow(value: ir.Value, half: Half, opset: int) -> _Paths | None:
    """The ways of `value`, if all of them end in a Softmax."""
    paths, waiting = _Paths(), [value]
    while waiting:
        current = waiting.pop()
        paths.values.add(current)
        if current.is_graph_output() or not ir.uses(current):
            return None
        for use in ir.uses(current):
            node = use.node
            beside = {entry for entry in node.inputs if entry is not None and entry.dtype == ir.DataType.FLOAT} - {current}
            definition = slots(node, opset, half)
            if node.op_type == "Mul" and not node.domain:
                paths.factors |= beside
            elif isinstance(definition, str) or not (definition.moves or node.op_type in ("Add", *SOFTMAXES)):
                return None
            elif node.op_type not in SOFTMAXES:
                paths.others |= beside
            if node.op_type not in SOFTMAXES and node.outputs[0] not in paths.values:
                waiting.append(node.outputs[0])
    return paths
