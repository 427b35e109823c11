"""Which layers suffer from quantization: the answer of `graphq sensitivity`, and the recipe that keeps the worst of them float.

Layers are looked at where `insert-qdq` finds them in the recipe `int8`: after the passes before it. What they lose is measured by
`graphq.twins`, on samples that gave no range as far as there are enough.
"""

from __future__ import annotations

import glob
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

from graphq import ir, linear, qdq, ranges, targets, twins
from graphq.data import open_data
from graphq.errors import ModelError
from graphq.exclude import given_name
from graphq.noise import decibel
from graphq.pipeline import Pass, PassContext, Progress, no_progress, run_passes
from graphq.quantizers import Uniform
from graphq.recipe import Recipe, load_recipe
from graphq.targets import Target
from graphq.twins import Twin
from graphq.verify import verify_graph

RANGE_SAMPLES = 64
"""Calibration samples that ranges are taken from, at most."""

EFFECT_SAMPLES = 4
"""Samples on which the effect on the model's outputs is measured: the model runs on them once for each layer."""

BASE, QUANTIZER = "int8", "insert-qdq"


@dataclass(frozen=True)
class LayerSensitivity:
    """What quantizing one layer costs, as SQNR in dB; infinite where nothing changes.

    Attributes:
        given_name: Of the node in the model as it came, which may have become several.
        output_db: Of the model's outputs, with this layer alone quantized to the first width.
        both_db: Of the layer's own output, weight and activation quantized, by width; nothing else is quantized.
        weight_db, activation_db: The same with one side quantized.
        inherited_db: Of its own output with all layers quantized to the first width but this one.
        total_db: The same with this one quantized too.
        work: Share of the multiply-adds of all layers listed, 0 to 1.
        size: Share of the weights of all layers listed, 0 to 1; a weight that several read counts once in all.
    """

    name: str
    given_name: str
    op_type: str
    output_db: float
    both_db: Mapping[int, float]
    weight_db: Mapping[int, float]
    activation_db: Mapping[int, float]
    inherited_db: float
    total_db: float
    work: float
    size: float


@dataclass(frozen=True)
class Sensitivity:
    """The layers of a model, the one whose quantization hurts the outputs most first.

    Attributes:
        data: The samples on which errors were measured, in a line.
        random: Whether they are random numbers.
    """

    model: str
    target: str
    bits: tuple[int, ...]
    data: str
    random: bool
    layers: tuple[LayerSensitivity, ...]


def sensitivity(model: str | Path, *, calib: str | Path | None = None, preprocess: str | Path | None = None, target: str = "onnxruntime",
                bits: Sequence[int] = (8, 6, 4), samples: int = 16, estimator: str = "min-max", seed: int = 0,
                progress: Progress = no_progress) -> Sensitivity:  # fmt: skip
    """Measure what quantizing costs each layer of the model file.

    Args:
        model: The ONNX file.
        calib: Calibration data, as for `convert`; random inputs without it.
        preprocess: Preset or YAML file for images.
        target: The runtime whose integer formats are taken, at `bits`.
        bits: Widths, 4 to 8; the first is that of `output_db`, `inherited_db` and `total_db`.
        samples: Samples to measure on.
        estimator: Name of the range estimator, of `ranges.ESTIMATORS`.
        seed: Of random inputs.

    Raises:
        ModelError: no layer can be quantized; or the file is no model, as for `convert`.
    """
    goal = targets.get_target(target)
    original = ir.load(model)
    data = open_data(calib, original, preprocess, seed, progress)
    calibration, held_out = data.take(RANGE_SAMPLES + samples).split(max(1, min(samples, len(data) // 2)))
    ctx = PassContext(model=ir.clone(original), reference=original, calib=calibration, held_out=held_out, target=goal, seed=seed,
                      progress=progress)  # fmt: skip
    run_passes(_passes_before_quantizer(), ctx, verify_graph)
    nodes = _layers(ctx.model, goal)
    made = {width: _twins(nodes, width, estimator, ctx) for width in dict.fromkeys(bits)}
    whole = [three[0] for three in made[bits[0]]]
    outputs = twins.effects(ctx.model, whole, held_out.take(EFFECT_SAMPLES), progress)
    alone = iter(twins.measure(ctx.model, [twin for row in made.values() for three in row for twin in three], held_out, progress))
    errors = {width: [[next(alone).sqnr_db for _ in three] for three in row] for width, row in made.items()}
    together = twins.measure_together(ctx.model, whole, held_out, progress)
    work, size = _shares(map(linear.multiply_adds, nodes)), _shares(_own_weights(nodes))
    rows = []
    for index, node in enumerate(nodes):
        both, weight, activation = ({width: row[index][side] for width, row in errors.items()} for side in range(3))
        inherited, total = together[index]
        rows.append(LayerSensitivity(
            name=node.name or "", given_name=given_name(node), op_type=node.op_type, output_db=decibel(1.0, float(outputs[index])),
            both_db=both, weight_db=weight, activation_db=activation, inherited_db=inherited.sqnr_db, total_db=total.sqnr_db,
            work=work[index], size=size[index],
        ))  # fmt: skip
    found = tuple(sorted(rows, key=lambda row: row.output_db))
    return Sensitivity(str(model), target, tuple(made), held_out.description, data.kind == "random", found)


def _passes_before_quantizer() -> list[Pass]:
    return list(takewhile(lambda one: one.name != QUANTIZER, load_recipe(BASE).passes))


def _layers(model: ir.Model, target: Target) -> list[ir.Node]:
    """The nodes that `target` has an integer kernel for. Raises ModelError if there are none."""
    reasons = {node: _refusal(node, target) for node in model.graph if not node.domain and node.op_type in linear.LINEAR_OPS}
    found = [node for node, reason in reasons.items() if reason is None]
    if not found:
        counts = Counter(f"{node.op_type}: {reason}" for node, reason in reasons.items())
        raise ModelError(
            "There is no layer to quantize.", where="; ".join(f"{count} {reason}" for reason, count in counts.most_common(3)),
            expected="at least one Conv, Gemm or MatMul with a constant float32 weight", hint="`graphq inspect` shows what is in a model",
        )  # fmt: skip
    return found


def _refusal(node: ir.Node, target: Target) -> str | None:
    rule = target.ops.get(node.op_type)
    if rule is None or not rule.anchor:
        return f"{target.name} has no integer kernel for it"
    if linear.data_of(node).is_initializer() or not ir.is_float(linear.data_of(node)):
        return "its data input is not a float32 activation"
    return linear.linear_refusal(node)


def _twins(nodes: Sequence[ir.Node], width: int, estimator: str, ctx: PassContext) -> list[tuple[Twin, Twin, Twin]]:
    """For each node a twin with both sides, the weight and the activation quantized to `width`."""
    spec, chosen = replace(ctx.target.activation, bits=width), ranges.ESTIMATORS[estimator]()
    observers = {linear.data_of(node): chosen.observer(linear.data_of(node).name or "", "current") for node in nodes}
    stats = ctx.observe(observers.values())
    formats = {value: (spec, Uniform(spec).fit(*chosen.estimate(stats[observer], spec))) for value, observer in observers.items()}
    found = []
    for node in nodes:
        name, activation = node.name or "", formats[linear.data_of(node)]
        weight = qdq.spec_for_weight(node, replace(ctx.target.weight, bits=width))
        found.append((Twin(name, weight, activation), Twin(name, weight=weight), Twin(name, activation=activation)))
    return found


def _own_weights(nodes: Sequence[ir.Node]) -> list[float]:
    """Elements of each node's weight, divided among the nodes that share it."""
    readers = Counter(linear.weight_of(node) for node in nodes)
    return [math.prod(ir.constant_shape(linear.weight_of(node))) / readers[linear.weight_of(node)] for node in nodes]


def _shares(amounts: Iterable[float]) -> list[float]:
    amounts = list(amounts)
    return [amount / (sum(amounts) or 1.0) for amount in amounts]


def keeping_float(layers: Sequence[str], target: str) -> Recipe:
    """The recipe `int8` with these layers, by name, left float."""
    base = load_recipe(BASE)
    patterns = tuple(_pattern(name, targets.get_target(target)) for name in layers)
    passes = tuple(replace(one, exclude=patterns) if one.name == QUANTIZER else one for one in base.passes)  # type: ignore[call-arg]
    return replace(base, description=f"{base.description}; the {len(layers)} most sensitive layers stay float", passes=passes)


def _pattern(name: str, target: Target) -> str:
    """A pattern of `exclude` that `name` alone matches: nothing in it is a wildcard, and it is no operator type."""
    pattern = glob.escape(name)
    return f"[{name[0]}]{name[1:]}" if pattern in {*linear.LINEAR_OPS, *target.ops} else pattern
