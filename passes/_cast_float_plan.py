"""Which nodes become half precision: what ranges, measured errors and the operators' definitions allow, then what is cheapest."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from graphq import ir, linear
from graphq.calibration import CalibrationSet
from graphq.exclude import is_excluded
from graphq.executor import sample_size
from graphq.half import Half
from graphq.observers import Range, Stat
from graphq.passes import _cast_float_errors as errors
from graphq.passes._cast_float_math import BORDER, Wire, constant_loss, float32_nodes
from graphq.passes._cast_float_slots import Slots, slots
from graphq.pipeline import PassContext

WIDE = ir.DataType.FLOAT

SUMS: Mapping[str, int] = {
    "ReduceSum": 1, "ReduceMean": 1, "ReduceL1": 1, "ReduceL2": 2, "ReduceSumSquare": 2, "ReduceLogSum": 1, "CumSum": 1,
    "GlobalAveragePool": 1, "AveragePool": 1, "GlobalLpPool": 2, "LpPool": 2, "InstanceNormalization": 2,
}  # fmt: skip
"""Operators that add up elements, or powers of them, in the type that they read: a partial sum may overflow though the result
does not. Left out: LayerNormalization, RMSNormalization and GroupNormalization, whose `stash_type` is float32, and MatMul, Conv and
Gemm, which matrix units accumulate in float32."""

BOUNDS = {"Clip": (1, 2)}
"""Constant inputs that are bounds: what is beyond half precision may become its limit, because what they bound is not."""

SCALES = {"QuantizeLinear": (1,), "DequantizeLinear": (1,)}
"""Constant inputs of which each element counts, unless what they scale is constant itself; none of them becomes 0."""

PRODUCTS = ("W4A16Gemm", "SULQAttentionValue")
"""Operators of graphq that are products of floats."""

USUAL_DB = {"float16": 62.0, "bfloat16": 44.0}
"""What a node keeps at its own output, at least, unless half precision does not suit it: most keep 68 or 50 dB (ViT-Tiny, MiniLM,
MobileNetV2, IMDN). Own errors tell little of the outputs: 41 dB cost ViT-Tiny's 58 in a Softmax, and MobileNetV2's 18 in a Conv."""

SUSPECTS = 64
"""Nodes below that whose effect on the outputs is measured, the worst first: each takes a run of the model."""

CAST_BYTES, LAUNCH_BYTES, SAVED_BYTES = 6, 1 << 16, 2
"""What a Cast moves an element and, about, what starting it costs; what half precision saves an element."""


@dataclass
class Plan:
    """What becomes of each node of the main graph that reads or makes float32.

    Attributes:
        half: The nodes that become half, and which of their values.
        kept: The others, with the reason.
        measured: What nodes alone leave of the outputs in dB, if it was measured; of their own output, if the model has no float output.
    """

    half: dict[ir.Node, Slots] = field(default_factory=dict)
    kept: dict[ir.Node, str] = field(default_factory=dict)
    measured: dict[ir.Node, float] = field(default_factory=dict)


def is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None and not value.is_graph_input()


def follows(node: ir.Node) -> bool:
    """Whether `node` takes float32 and half alike, and makes neither: no Cast goes before it."""
    return not node.domain and (node.op_type in ("Shape", "Size") or (node.op_type == "Cast" and node.outputs[0].dtype != WIDE))


def make_plan(ctx: PassContext, half: Half, *, exclude: Sequence[str], margin: float, min_sqnr_db: float, samples: int) -> Plan:
    """Decide for every node; see the options of the pass."""
    model, plan = ctx.model, Plan()
    opset = ir.opset(model)
    for node in model.graph:
        values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
        if follows(node):
            continue
        if any(value.dtype == WIDE for value in values) or any(ir.subgraphs(node)):
            found = _definition(node, opset, half, exclude)
            if isinstance(found, str):
                plan.kept[node] = found
            else:
                plan.half[node] = found
    _drop(plan, lambda node: _constants(node, plan.half[node], half, min_sqnr_db))
    stats = ctx.observe(Range(value.name or "") for value in _values(plan))
    ranges = {observer.value: _largest(stat) for observer, stat in stats.items() if isinstance(observer, Range)}
    _drop(plan, lambda node: _range(node, ranges, half, margin))
    counting = _counting(plan, model.graph)
    _drop(plan, lambda node: "whole numbers are made of what it computes" if node in counting else None)
    if samples:
        before, data = dict(plan.half), ctx.calib.take(samples)
        _measure(plan, ctx, half, data)
        _drop(plan, lambda node: _error(plan.measured.get(node, math.inf), min_sqnr_db, half))
        if any(value.dtype == WIDE for value in model.graph.outputs):
            _spread(plan, {node: found for node, found in before.items() if node not in plan.half}, ctx, half, min_sqnr_db, data)
    _settle(plan, ctx)
    return plan


def _drop(plan: Plan, reason_of: Callable[[ir.Node], str | None]) -> None:
    for node in list(plan.half):
        reason = reason_of(node)
        if reason is not None:
            del plan.half[node]
            plan.kept[node] = reason


def _definition(node: ir.Node, opset: int, half: Half, exclude: Sequence[str]) -> Slots | str:
    """What the definition of its operator says of the node."""
    if is_excluded(node, exclude):
        return "excluded by the recipe"
    if any(ir.subgraphs(node)):
        return "it has subgraphs, which stay float32"
    if any(value is not None and value.name and value.dtype is None for value in (*node.inputs, *node.outputs)):
        return "the element type of what it reads or makes is not known"
    return slots(node, opset, half)


def _constants(node: ir.Node, found: Slots, half: Half, min_sqnr_db: float) -> str | None:
    for index in found.inputs:
        array = ir.constant(node.inputs[index])
        if array is not None:
            bound = index in BOUNDS.get(node.op_type, ())
            scale = index in SCALES.get(node.op_type, ()) and ir.constant(node.inputs[0]) is None
            if reason := constant_loss(array, half, bound=bound, scale=scale, min_sqnr_db=min_sqnr_db):
                return reason
    return None


def _values(plan: Plan) -> Iterator[ir.Value]:
    """The values, not constants, that would be half."""
    for node, found in plan.half.items():
        for value in (*(node.inputs[index] for index in found.inputs), *(node.outputs[index] for index in found.outputs)):
            if value is not None and not is_constant(value):
                yield value


def _largest(stat: Stat) -> float:
    return max(-float(stat["low"]), float(stat["high"]), 0.0)


def _range(node: ir.Node, ranges: Mapping[str, float], half: Half, margin: float) -> str | None:
    """Whether what was seen fits, with the margin."""
    for value in (*node.inputs, *node.outputs):
        largest = ranges.get(value.name or "", 0.0) if value is not None else 0.0
        if largest * margin > half.limit:
            return f"{value.name} reaches {largest:.3g}, too near to the limit of {half.storage}"  # type: ignore[union-attr]
        if 0 < largest < half.tiny:
            return f"{value.name} is {largest:.3g} at most, too small for {half.storage}"  # type: ignore[union-attr]
    source = node.inputs[0] if node.inputs else None
    if node.op_type == "Cast" and _is_whole(source):
        largest = ranges.get(node.outputs[0].name or "", 0.0)
        return f"whole numbers up to {largest:.0f} are not exact in {half.storage}" if largest > 2**half.digits else None
    if node.op_type in SUMS and source is not None:
        power, count = SUMS[node.op_type], _summed(node)
        largest = count * ranges.get(source.name or "", 0.0) ** power
        if largest > half.limit:
            return f"a sum over {count} elements may reach {largest:.3g}, beyond {half.storage}"
    return None


def _summed(node: ir.Node) -> int:
    """How many elements go into one of the node's output, as far as sizes are known."""
    if node.op_type in ("AveragePool", "LpPool"):
        return math.prod(ir.attribute(node, "kernel_shape", ()))
    source = ir.shape_of(node.inputs[0]) or ()
    if node.op_type.startswith("Reduce"):
        return max(1, round(sample_size((1, *source)) / sample_size((1, *(ir.shape_of(node.outputs[0]) or ())))))
    if node.op_type == "CumSum":
        return max((dim for dim in source if isinstance(dim, int)), default=1)
    return sample_size((1, *source[2:]))


def _counting(plan: Plan, graph: ir.Graph) -> set[ir.Node]:
    """Nodes from which integers are computed (sizes, positions), back to the next operator with weights."""
    found: set[ir.Node] = set()
    waiting = [ir.producer(node.inputs[0]) for node in graph if node.op_type == "Cast" and follows(node) and _is_whole(node.outputs[0])]
    while waiting:
        node = waiting.pop()
        if node is not None and node not in found and node in plan.half and node.op_type not in linear.LINEAR_OPS:
            found.add(node)
            waiting += [ir.producer(node.inputs[index]) for index in plan.half[node].inputs]
    return found


def _is_whole(value: ir.Value | None) -> bool:
    return value is not None and value.dtype is not None and value.dtype.is_integer()


def _measure(plan: Plan, ctx: PassContext, half: Half, data: CalibrationSet) -> None:
    """What each node alone would do to the model's outputs; only those whose own error stands out are tried there."""
    wanted = {node: found for node, found in plan.half.items() if not found.moves and found.outputs[:1] == (0,)}
    own = errors.measure(ctx.model, wanted, half, data) if wanted else {}
    worst = sorted((node for node, sqnr_db in own.items() if sqnr_db < USUAL_DB[half.storage]), key=own.__getitem__)[:SUSPECTS]
    finite = {node: wanted[node] for node in worst if math.isfinite(own[node])}
    seen = any(value.dtype == WIDE for value in ctx.model.graph.outputs)
    plan.measured = {**{node: own[node] for node in worst}, **(errors.effects(ctx.model, finite, half, data) if finite and seen else {})}


def _spread(plan: Plan, waiting: Mapping[ir.Node, Slots], ctx: PassContext, half: Half, least: float, data: CalibrationSet) -> None:
    """Keep in float32 what makes the inputs of nodes that are too coarse even if only their inputs are rounded, and so on upwards."""
    while waiting:
        found = errors.effects(ctx.model, waiting, half, data, inputs_only=True)
        above = {ir.producer(node.inputs[index]) for node in waiting for index in waiting[node].inputs if found[node] < least}
        waiting = {node: plan.half[node] for node in above if node is not None and node in plan.half and plan.half[node].outputs == (0,)}
        _drop(plan, dict.fromkeys(waiting, f"what reads it needs more digits than {half.storage} has").get)


def _error(sqnr_db: float, least: float, half: Half) -> str | None:
    if sqnr_db >= least:
        return None
    if not math.isfinite(sqnr_db):
        return f"it gives NaN or infinity in {half.storage}"
    return f"it alone would leave {sqnr_db:.1f} dB of the outputs in {half.storage}, less than {least:g}"


def _settle(plan: Plan, ctx: PassContext) -> None:
    """Leave in float32 what would cost more Casts than it saves."""
    nodes = [node for node in ctx.model.graph if node in plan.half or node in plan.kept]
    if not plan.half:
        return
    numbers = {node: index for index, node in enumerate(nodes)}
    wires: dict[ir.Value, Wire] = {}
    for node in nodes:
        for value in {*ir.reads(node), *node.outputs}:
            if value.dtype == WIDE and value.name and not is_constant(value) and value not in wires:
                readers = [numbers.get(use.node, BORDER) for use in ir.uses(value) if not follows(use.node)]
                readers += [BORDER] * value.is_graph_output()
                producer = ir.producer(value)
                cost = CAST_BYTES * _elements(value) + LAUNCH_BYTES
                wires[value] = Wire(numbers.get(producer, BORDER) if producer else BORDER, tuple(readers), cost)
    linear_nodes = [numbers[node] for node in plan.half if node.op_type in (*linear.LINEAR_OPS, *PRODUCTS)]
    work = [SAVED_BYTES * sum(map(_elements, _touched(node))) for node in nodes]
    chosen = float32_nodes(linear_nodes, [numbers[node] for node in plan.kept], work, wires.values())
    _drop(plan, lambda node: "Casts around it would cost more than it saves" if numbers[node] in chosen else None)


def _touched(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype == WIDE]


def _elements(value: ir.Value) -> float:
    """About how many; of one sample, if the batch is open."""
    shape = ir.shape_of(value)
    if is_constant(value):
        return float(np.prod(ir.constant_shape(value), dtype=np.float64))
    return float(sample_size((1, *(shape or ()))) if shape and isinstance(shape[0], int) else sample_size(shape))
