"""One model in, one verified smaller model out: load -> normalize -> [pass, verify]* -> legalize -> verify -> emit -> report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

import graphq
from graphq import accuracy, functions, gates, half, ir, kernels_used, notes, report, targets, verify
from graphq.backends import files
from graphq.calibration import CalibrationSet
from graphq.data import Source, open_data
from graphq.engines import ENGINE_SUFFIXES, EngineFacts, EngineOptions, options_of
from graphq.errors import ModelError, RecipeError, UsageError, VerifyError
from graphq.executor import BATCH, Executor
from graphq.gates import GateResult, Gates
from graphq.pipeline import PassContext, PassRecord, Progress, no_progress, run_passes
from graphq.preprocess import METADATA_KEY, Preprocess
from graphq.qdq import quantized_nodes, quantized_weight_bytes
from graphq.recipe import Recipe, load_recipe
from graphq.report import Accuracy, CalibrationFacts, Latency, OutputComparison, Report
from graphq.segments import Segments
from graphq.targets import Target

HELD_OUT = 8
"""Samples kept back for verification; of fewer than 32 a quarter, but at least one (or one batch of the model's fixed size)."""

TINY = 1 << 20
"""Parameters of models that run for less than a millisecond, where waking up threads shows."""

Emit = Literal["onnx", "engine"]


def convert(model: str | Path, out: str | Path, *, recipe: str | Path | Recipe = "int8", calib: Source | None = None,
            preprocess: str | Path | Preprocess | None = None, target: str = "onnxruntime", emit: Emit = "onnx",
            limits: Mapping[str, float | None] | None = None, evaluate: str | Path | None = None,
            engine: EngineOptions | Mapping[str, Any] | None = None, report_dir: str | Path | None = None,
            seed: int = 0, memory_budget: int = 2 << 30,
            command: str | None = None, progress: Progress = no_progress) -> Report:  # fmt: skip
    """Compress `model` by `recipe` and write the result to `out` once it is verified.

    Args:
        model: The ONNX file; it is never changed.
        out: Where the result goes; it appears complete or not at all.
        recipe: A built-in name, a YAML file or a `Recipe`.
        calib: Calibration data: an .npz, .npy or image folder, arrays by input name, or an iterable of batches. Without
            it, random inputs of the declared types are used, which the report says.
        preprocess: Preset or YAML file for images.
        target: The runtime to write for, one of `graphq.targets.TARGETS`.
        emit: `onnx`, or `engine` for a TensorRT engine (targets tensorrt and tensorrt-rtx).
        limits: Gates by name that take the place of the recipe's; None takes one away.
        evaluate: An .npz with arrays by input name and `labels`, for accuracy before and after; labels of tokens give perplexity.
        engine: How an engine is built, with `emit="engine"`: `graphq.EngineOptions`, or a mapping of its fields.
        report_dir: Folder for report.json.
        seed: Of everything random.
        memory_budget: Bytes that a sweep may hold in memory. A model with more bytes of weights than that is worked on layer by layer:
            its new weights lie in a file beside `out` until they are written, it runs piece by piece, and its speed is not measured.
        command: The command line, for the report.
        progress: Called with what is done, steps done and steps in all.

    Raises:
        GraphqError: with a class for each kind of fault, see `graphq.errors`. Nothing is written then, except that a
            result that failed verification is kept as `<out>.failed.onnx`; if it misses a gate, with its report in it, in
            `report_dir` and in `VerifyError.report`.
    """
    path, out_path, clock = Path(model), Path(out), _Clock()
    goal = targets.get_target(target)
    plan = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    plan = plan.with_gates(limits) if limits else plan
    settings = options_of(engine) if isinstance(engine, Mapping) else engine
    _check_request(plan, goal, emit, out_path, settings, limits or {}, evaluate)
    with clock("load"):
        original = ir.load(path)
        files.check_output(out_path, _inputs(path, original, recipe, calib, preprocess, evaluate))
        targets.require_legal(original, goal)
        if report_dir is not None:
            report.check_folder(report_dir)
        data = open_data(calib, original, preprocess, seed)
        labelled = accuracy.open_labelled(evaluate, ir.inputs(original), preprocess) if evaluate is not None else None
        _require_labels(plan, labelled)
        calibration, held_out = data.split(max(1, min(HELD_OUT, len(data) // 4)))
    is_large = ir.weight_bytes(original) > memory_budget
    with ir.spilling(out_path, is_large) as keep:
        ctx = PassContext(model=ir.clone(original), reference=original, calib=calibration, held_out=held_out, target=goal, seed=seed,
                          memory_budget=memory_budget, progress=progress, keep=keep)  # fmt: skip
        with clock("passes"):
            records = run_passes(plan.passes, ctx, verify.verify_graph, partial(_require_parsed, target=goal))
        if goal.builds_engines:
            functions.inline_quantizers(ctx.model)
        with clock("verify"):
            targets.require_legal(ctx.model, goal)
            if emit == "onnx":
                _require_parsed(ctx.model, goal)
            verify.require_same_interface(original, ctx.model)
            measured = _measure(original, ctx, plan, labelled, out_path, is_large)
        with clock("emit"):
            result = _report(path, original, ctx, plan, data, seed, command, records, measured, notes.of_request(data, plan, goal))
            report.embed(ctx.model, result)
            if data.preprocess is not None:
                ctx.model.metadata_props[METADATA_KEY] = data.preprocess.to_json()
            if is_large:  # of this machine, and so not in the model
                result = replace(result, notes=(*result.notes, *notes.of_pieces(plan, goal)))
            try:
                gates.require_passed(result.gates)
                with files.pending(out_path) as file:
                    built = _write(ctx, file, emit, settings, measured)
                    size = files.written_bytes(file)
                    ratio = size / result.model.bytes if emit == "onnx" or _limits_size(plan, limits) else None
                    said = (*result.notes, *notes.of_engine(built))
                    result = replace(result, engine=built, notes=said, gates=measured.gates(plan, ratio))
                    gates.require_passed(result.gates)
            except VerifyError as error:
                raise _refused(error, ctx.model, out_path, result, report_dir) from error
            files.aside(out_path).unlink(missing_ok=True)  # of an earlier run
    result = replace(result, output=report.file_facts(out_path, ctx.model, size), seconds=clock.seconds)
    if report_dir is not None:
        report.write(result, report_dir)
    return result


def _inputs(path: Path, model: ir.Model, *others: object) -> list[Path]:
    """Whatever a conversion may read: the model, its data files, and those of `others` that are paths."""
    return [path, *report.external_files(path, model), *(Path(other) for other in others if isinstance(other, str | Path))]


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


@dataclass(frozen=True)
class Measured:
    """What verification found out."""

    comparison: tuple[OutputComparison, ...]
    latency: Latency | None
    accuracy: Accuracy | None
    integer_kernels: Mapping[str, int]

    def gates(self, plan: Recipe, size_ratio: float | None = None) -> tuple[GateResult, ...]:
        return gates.check(plan.gates, self.comparison, self.latency, self.accuracy, size_ratio)


def _limits_size(plan: Recipe, limits: Mapping[str, float | None] | None) -> bool:
    """Whether somebody asks for a size: code makes an engine larger than its weights, so that the limit of all models is not for it."""
    return "max_size_ratio" in (limits or {}) or plan.gates.max_size_ratio != Gates().max_size_ratio


def _require_parsed(model: ir.Model, target: Target) -> None:
    """Raises TargetError if the parser of `target`, where it is installed, refuses `model`."""
    if not target.builds_engines:
        return
    from graphq.backends import tensorrt

    tensorrt.require_parsed(model, target)


def _check_request(plan: Recipe, target: Target, emit: str, out: Path, engine: EngineOptions | None, limits: Mapping[str, float | None],
                   evaluate: object) -> None:  # fmt: skip
    """Refuse what cannot be done before anything is read."""
    if limits.get("min_speedup") is not None and not target.measures_speed:
        raise UsageError(
            f"The speed of {target.name} cannot be measured here.", where="--gate min_speedup", expected="--target onnxruntime",
            hint="leave the gate out, and run `graphq bench` where the result is to run",
        )  # fmt: skip
    if emit == "engine" and not target.builds_engines:
        engines = " or ".join(name for name, entry in targets.TARGETS.items() if entry.builds_engines)
        raise UsageError(
            f"Target {target.name} has no engines.", where="--emit engine", expected=f"--target {engines}", hint="or --emit onnx"
        )
    if emit == "engine":
        from graphq.backends import tensorrt

        tensorrt.load_package(target)
    is_engine_name = out.suffix.lower() in ENGINE_SUFFIXES
    if is_engine_name and emit != "engine" or out.suffix.lower() == ".onnx" and emit == "engine":
        raise UsageError(
            f"The name of the result is that of {'an engine' if is_engine_name else 'an ONNX model'}, and it is to be the other.",
            where=str(out), expected=f"--emit engine with {', '.join(ENGINE_SUFFIXES)}, --emit onnx with .onnx",
        )  # fmt: skip
    if engine is not None and emit != "engine":
        raise UsageError(
            "There is no engine to build.", where="--engine or --shape", expected="--emit engine", hint="or leave the options out"
        )
    lacks = [f"{name}: {why}" for name, why in target.engine_lacks.items() if engine is not None and getattr(engine, name)]
    if lacks:
        raise UsageError(f"{target.name} does not have this engine option.", where="; ".join(lacks))
    _require_labels(plan, evaluate)
    if not plan.passes or plan.passes[0].name != "normalize":
        raise RecipeError(
            "The first pass of the recipe is not normalize.", where=f"recipe {plan.name}",
            expected="- normalize before all others, which rely on the form it gives to a model",
        )  # fmt: skip


def _require_labels(plan: Recipe, evaluation: object) -> None:
    """Refuse a limit on what `evaluation`, a file or what was read from it, cannot measure."""
    of_samples = isinstance(evaluation, accuracy.Labelled) and evaluation.labels.ndim == 1
    for name, lacks in (("max_accuracy_drop", evaluation is None), ("max_perplexity_ratio", evaluation is None or of_samples)):
        if lacks and getattr(plan.gates, name) is not None:
            what, labels = ("perplexity", "labels [samples, tokens]") if "perplexity" in name else ("accuracy", "labels")
            raise UsageError(
                f"The recipe limits the loss of {what}, but there is nothing to measure it on.", where=f"gate {name}",
                expected=f"--eval FILE.npz with inputs and {labels}", hint="give --eval, or take the gate out of the recipe",
            )  # fmt: skip


def _measure(original: ir.Model, ctx: PassContext, plan: Recipe, labelled: accuracy.Labelled | None, out: Path,
             is_large: bool) -> Measured:  # fmt: skip
    """Run the original and the result as the user will run them, on samples that no statistic has seen; large ones piece by piece."""
    deployed = ctx.target.measures_speed
    ctx.progress("verify", 0, 3)
    try:
        ran = _run_in_pieces(original, ctx) if is_large else _run(original, ctx)
    except ModelError as error:
        alone: Executor | Segments = (Segments if is_large else Executor)(original, deployed=deployed)
        list(alone.stream(ctx.held_out.batches(1)))  # raises if the fault is the original's
        raise _refused(
            VerifyError("The result does not run.", where=str(error), hint="this is a fault of graphq; please report it"), ctx.model, out
        ) from error
    except VerifyError as error:
        raise _refused(error, ctx.model, out) from error
    ctx.progress("verify", 1, 3)
    latency = None
    if deployed and isinstance(ran.reference, Executor) and isinstance(ran.result, Executor):
        feeds = next(iter(ctx.held_out.batches(1)))
        latency = verify.measure_latency(ran.reference, ran.result, feeds, enough=plan.gates.min_speedup or 0.0)
    ctx.progress("verify", 2, 3)
    found = accuracy.compare(ran.reference, ran.result, labelled) if labelled is not None else None
    return Measured(ran.comparison, latency, found, ran.kernels)


@dataclass(frozen=True)
class _Ran:
    """Both models after a comparison of their outputs, and the integer kernels of the result."""

    reference: verify.Runnable
    result: verify.Runnable
    comparison: tuple[OutputComparison, ...]
    kernels: Mapping[str, int]


def _run(original: ir.Model, ctx: PassContext) -> _Ran:
    deployed, spin = ctx.target.measures_speed, report.parameters(original) < TINY
    with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        result = Executor(ctx.model, deployed=deployed, spin=spin, optimized_path=str(optimized) if deployed else None)
        kernels = kernels_used.read_optimized(optimized, ctx.model).counts if deployed else {}
    reference = Executor(original, deployed=deployed, spin=spin)
    exact = Executor(ctx.model) if deployed and half.has_half(ctx.model) else result  # deployed, float16 would never overflow
    return _Ran(reference, result, verify.compare(reference, exact, ctx.held_out, _outputs(original)), kernels)


def _run_in_pieces(original: ir.Model, ctx: PassContext) -> _Ran:
    deployed = ctx.target.measures_speed and not half.has_half(ctx.model)
    reference, result = (
        Segments(model, deployed=deployed, counts=model is ctx.model, memory_budget=ctx.memory_budget) for model in (original, ctx.model)
    )
    batches = list(ctx.held_out.batches(BATCH))
    outputs = zip(reference.stream(batches), result.stream(batches), strict=True)
    return _Ran(reference, result, verify.compare_outputs(outputs, _outputs(original)), result.kernels)


def _outputs(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.outputs]


def _refused(error: VerifyError, model: ir.Model, out: Path, result: Report | None = None,
             report_dir: str | Path | None = None) -> VerifyError:  # fmt: skip
    """`error`, once the refused result is kept under a name that says so, with the report about it."""
    file, hint = files.aside(out), error.hint and f"{error.hint}; "
    try:
        with files.pending(file) as part:
            ir.save(model, part)
            size = files.written_bytes(part)
    except OSError:
        return error
    earlier = f" ({out} is that of an earlier run)" if out.exists() else ""
    refused = VerifyError(error.what, where=error.where, expected=error.expected, hint=f"{hint}the refused result is {file}{earlier}")
    if result is not None:
        refused.report = replace(result, output=report.file_facts(file, model, size))
        if report_dir is not None:
            report.write(refused.report, report_dir)
    return refused


def _write(ctx: PassContext, file: Path, emit: Emit, engine: EngineOptions | None, measured: Measured) -> EngineFacts | None:
    if emit == "onnx":
        ir.save(ctx.model, file)
        return None
    from graphq.backends import engine_check, tensorrt

    built = tensorrt.emit_engine(ctx.model, file, ctx.target, ctx.held_out, engine or tensorrt.DEFAULT, ctx.progress)
    closest = min((output.sqnr_db for output in measured.comparison), default=float("inf"))
    return engine_check.run(file, built, ctx.model, ctx.target, ctx.held_out, closest)


def _report(path: Path, original: ir.Model, ctx: PassContext, plan: Recipe, data: CalibrationSet, seed: int, command: str | None,
            records: list[PassRecord], measured: Measured, notes: tuple[str, ...]) -> Report:  # fmt: skip
    before, after = quantized_weight_bytes(ctx.model)
    facts = report.file_facts(path, original)
    return Report(
        graphq=graphq.__version__, created=datetime.now(UTC).isoformat(timespec="seconds"), seed=seed, command=command,
        model=facts, output=replace(facts, path="", sha256="", bytes=0, opset=ir.opset(ctx.model), parameters=report.parameters(ctx.model)),
        recipe=plan.to_yaml(), recipe_name=plan.name, target=ctx.target.name,
        calibration=CalibrationFacts(data.kind, data.description, len(data), data.digest, any(one.needs_data for one in plan.passes)),
        passes=tuple(records), held_out=len(ctx.held_out), comparison=measured.comparison, latency=measured.latency,
        accuracy=measured.accuracy,
        quantized=quantized_nodes(ctx.model, ctx.target), weight_bytes_before=before, weight_bytes_after=after,
        integer_kernels=measured.integer_kernels, gates=measured.gates(plan), versions=report.tool_versions(), notes=notes,
    )  # fmt: skip
