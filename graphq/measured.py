"""What a conversion measures of its result: both models run as the user will run them, on samples that no statistic has seen."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from graphq import accuracy, gates, half, ir, kernels_used, report, verify
from graphq.errors import ModelError, VerifyError
from graphq.executor import BATCH, Executor
from graphq.gates import GateResult
from graphq.pipeline import PassContext
from graphq.recipe import Recipe
from graphq.report import Accuracy, Latency, OutputComparison
from graphq.segments import Segments

TINY = 1 << 20
"""Parameters of models that run for less than a millisecond, where waking up threads shows."""


@dataclass(frozen=True)
class Measured:
    """What verification found out."""

    comparison: tuple[OutputComparison, ...]
    latency: Latency | None
    accuracy: Accuracy | None
    integer_kernels: Mapping[str, int]

    def gates(self, plan: Recipe, size_ratio: float | None = None) -> tuple[GateResult, ...]:
        return gates.check(plan.gates, self.comparison, self.latency, self.accuracy, size_ratio)


def measure(original: ir.Model, ctx: PassContext, plan: Recipe, labelled: accuracy.Labelled | None, is_large: bool) -> Measured:
    """Run both models, large ones segment by segment and without a clock.

    Raises:
        ModelError: the original does not run.
        VerifyError: the result does not, or what it returns is of another shape or not finite.
    """
    ctx.progress("verify", 0, 3)
    try:
        ran = (_run_segments if is_large else _run_whole)(original, ctx, plan)
    except ModelError as error:
        alone = (Segments if is_large else Executor)(original, deployed=ctx.target.measures_speed)
        list(alone.stream(ctx.held_out.batches(1)))  # raises if the fault is the original's
        raise VerifyError("The result does not run.", where=str(error), hint="this is a fault of graphq; please report it") from error
    ctx.progress("verify", 2, 3)
    found = accuracy.compare(ran.reference, ran.result, labelled) if labelled is not None else None
    return Measured(ran.comparison, ran.latency, found, ran.kernels)


@dataclass(frozen=True)
class _Ran:
    """Both models after a comparison of their outputs and speed, and the integer kernels of the result."""

    reference: verify.Streaming
    result: verify.Streaming
    comparison: tuple[OutputComparison, ...]
    latency: Latency | None
    kernels: Mapping[str, int]


def _run_whole(original: ir.Model, ctx: PassContext, plan: Recipe) -> _Ran:
    deployed, spin = ctx.target.measures_speed, report.parameters(original) < TINY
    with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        result = Executor(ctx.model, deployed=deployed, spin=spin, optimized_path=str(optimized) if deployed else None)
        kernels = kernels_used.read_optimized(optimized, ctx.model).counts if deployed else {}
    reference = Executor(original, deployed=deployed, spin=spin)
    exact = Executor(ctx.model) if deployed and half.has_half(ctx.model) else result  # deployed, float16 would never overflow
    comparison, latency = verify.compare(reference, exact, ctx.held_out, _outputs(original)), None
    ctx.progress("verify", 1, 3)
    if deployed:
        feeds = next(iter(ctx.held_out.batches(1)))
        latency = verify.measure_latency(reference, result, feeds, enough=plan.gates.min_speedup or 0.0)
    return _Ran(reference, result, comparison, latency, kernels)


def _run_segments(original: ir.Model, ctx: PassContext, plan: Recipe) -> _Ran:
    deployed = ctx.target.measures_speed and not half.has_half(ctx.model)
    reference, result = (
        Segments(model, deployed=deployed, counts=model is ctx.model, memory_budget=ctx.memory_budget // 2)
        for model in (original, ctx.model)
    )
    batches = list(ctx.held_out.batches(BATCH))
    outputs = zip(reference.stream(batches), result.stream(batches), strict=True)
    return _Ran(reference, result, verify.compare_outputs(outputs, _outputs(original)), None, result.kernels)


def _outputs(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.outputs]
