"""One model in, one verified smaller model out: load -> normalize -> [pass, verify]* -> legalize -> verify -> emit -> report."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import graphq
from graphq import accuracy, disk, functions, gates, ir, notes, report, targets, verify
from graphq.backends import files
from graphq.calibration import CalibrationSet
from graphq.data import SYNTH, Source, open_data
from graphq.engines import EngineFacts, EngineOptions, options_of
from graphq.errors import VerifyError
from graphq.measured import Measured, measure
from graphq.pipeline import PassContext, PassRecord, Progress, no_progress, run_passes
from graphq.preprocess import METADATA_KEY, Preprocess
from graphq.qdq import quantized_nodes, quantized_weight_bytes
from graphq.recipe import Recipe, load_recipe
from graphq.report import CalibrationFacts, Report
from graphq.request import Emit, Request
from graphq.synthesis import sheet
from graphq.targets import Target

HELD_OUT = 8
"""Samples kept back for verification; of fewer than 32 a quarter, but at least one (or one batch of the model's fixed size)."""


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
        calib: Calibration data: an .npz, .npy or image folder, arrays by input name, or an iterable of batches; `synth` makes it from
            the model (see `graphq.synthesis`). Without it, random inputs of the declared types are used, which the report says.
        preprocess: Preset or YAML file for images.
        target: The runtime to write for, one of `graphq.targets.TARGETS`.
        emit: `onnx`, or `engine` for a TensorRT engine (targets tensorrt and tensorrt-rtx).
        limits: Gates by name that take the place of the recipe's; None takes one away.
        evaluate: An .npz with arrays by input name and `labels`, for accuracy before and after; labels of tokens give perplexity.
        engine: How an engine is built, with `emit="engine"`: `graphq.EngineOptions`, or a mapping of its fields.
        report_dir: Folder for report.json, and for a contact sheet of synthesized images.
        seed: Of everything random.
        memory_budget: Bytes that a sweep may hold in memory. A model with more bytes of weights than that is worked on layer by layer:
            its new weights lie in a file beside `out` until they are written (which grows by each pass that makes new ones), it is
            verified segment by segment, and its speed is not measured. Passes that calibrate activations (insert-qdq, bias-correct,
            mixed-precision...) still open the whole model, and a model whose weights lie inside the .onnx file is read as a whole.
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
    request = Request(plan, goal, emit, out_path, settings, limits or {})
    request.check(evaluate)
    with clock("load"):
        original = ir.load(path)
        files.check_output(out_path, _inputs(path, original, recipe, calib, preprocess, evaluate))
        targets.require_legal(original, goal)
        if report_dir is not None:
            report.check_folder(report_dir)
        labelled = accuracy.open_labelled(evaluate, ir.inputs(original), preprocess) if evaluate is not None else None
        request.require_labels(labelled)
        is_idle = calib is None and not any(one.needs_data for one in plan.passes)  # then real inputs verify better than random ones
        data = labelled.data if is_idle and labelled is not None else open_data(calib, original, preprocess, seed, progress)
        calibration, held_out = data.split(max(1, min(HELD_OUT, len(data) // 4)))
    is_large = ir.weight_bytes(original) > memory_budget
    with disk.room(out_path.parent, (1 + is_large) * ir.weight_bytes(original)), ir.spilling(out_path, is_large) as keep:
        ctx = PassContext(model=ir.clone(original), reference=original, calib=calibration, held_out=held_out, target=goal, seed=seed,
                          memory_budget=memory_budget, progress=progress, keep=keep)  # fmt: skip
        with clock("passes"):
            records = run_passes(plan.passes, ctx, verify.verify_graph, partial(_require_parsed, target=goal))
        if goal.builds_engines:
            functions.inline_quantizers(ctx.model)
        with clock("verify"):
            measured = _verify(original, ctx, request, labelled, is_large)
        with clock("emit"):
            said = notes.of_request(data, plan, goal, labelled is not None)
            if report_dir is not None:
                data = sheet.put_beside(data, report_dir)
            result = _report(path, original, ctx, plan, data, seed, command, records, measured, said)
            report.embed(ctx.model, result)
            if data.preprocess is not None:
                ctx.model.metadata_props[METADATA_KEY] = data.preprocess.to_json()
            if is_large:  # of this machine, and so not in the model
                result = replace(result, notes=(*result.notes, *notes.of_segments(plan, goal)))
            result, size = _emit(ctx, request, measured, result, report_dir)
    result = replace(result, output=report.file_facts(out_path, ctx.model, size), seconds=clock.seconds)
    if report_dir is not None:
        report.write(result, report_dir)
    return result


def _inputs(path: Path, model: ir.Model, *others: object) -> list[Path]:
    """Whatever a conversion may read: the model, its data files, and those of `others` that are paths."""
    return [path, *ir.data_files(model), *(Path(other) for other in others if isinstance(other, str | Path) and str(other) != SYNTH)]


@dataclass
class _Clock:
    """Seconds by stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Any:
        started = time.perf_counter()
        yield
        self.seconds[stage] = time.perf_counter() - started


def _verify(original: ir.Model, ctx: PassContext, request: Request, labelled: accuracy.Labelled | None, is_large: bool) -> Measured:
    """What is measured of a result that is legal; one that is not right is kept aside."""
    targets.require_legal(ctx.model, request.target)
    if request.emit == "onnx":
        _require_parsed(ctx.model, request.target)
    verify.require_same_interface(original, ctx.model)
    try:
        return measure(original, ctx, request.plan, labelled, is_large)
    except VerifyError as error:
        raise _refused(error, ctx.model, request.out) from error


def _emit(ctx: PassContext, request: Request, measured: Measured, result: Report, report_dir: str | Path | None) -> tuple[Report, int]:
    """Write what passes all gates, and keep aside what does not: the report with what is known since, and the bytes written."""
    try:
        gates.require_passed(result.gates, request.limits)
        with files.pending(request.out) as file:
            built = _write(ctx, file, request, measured)
            size = files.written_bytes(file)
            model_bytes = size - (report.embedded_bytes(ctx.model) if request.emit == "onnx" else 0)
            ratio = round(model_bytes / result.model.bytes, 3) if request.limits_size else None  # names and shapes take some bytes
            said = (*result.notes, *notes.of_engine(built))
            result = replace(result, engine=built, notes=said, gates=measured.gates(request.plan, ratio))
            gates.require_passed(result.gates, request.limits)
    except VerifyError as error:
        raise _refused(error, ctx.model, request.out, result, report_dir) from error
    files.remove_aside(request.out)  # of an earlier run
    return result, size


def _require_parsed(model: ir.Model, target: Target) -> None:
    """Raises TargetError if the parser of `target`, where it is installed, refuses `model`."""
    if not target.builds_engines:
        return
    from graphq.backends import tensorrt

    tensorrt.require_parsed(model, target)


def _write(ctx: PassContext, file: Path, request: Request, measured: Measured) -> EngineFacts | None:
    if request.emit == "onnx":
        ir.save(ctx.model, file)
        return None
    from graphq.backends import engine_check, tensorrt

    built = tensorrt.emit_engine(ctx.model, file, ctx.target, ctx.held_out, request.engine or tensorrt.DEFAULT, ctx.progress)
    closest = min((output.sqnr_db for output in measured.comparison), default=float("inf"))
    return engine_check.run(file, built, ctx.model, ctx.target, ctx.held_out, closest)


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


def _report(path: Path, original: ir.Model, ctx: PassContext, plan: Recipe, data: CalibrationSet, seed: int, command: str | None,
            records: list[PassRecord], measured: Measured, notes: tuple[str, ...]) -> Report:  # fmt: skip
    before, after = quantized_weight_bytes(ctx.model)
    facts = report.file_facts(path, original)
    return Report(
        graphq=graphq.__version__, created=datetime.now(UTC).isoformat(timespec="seconds"), seed=seed, command=command,
        model=facts, output=replace(facts, path="", sha256="", bytes=0, opset=ir.opset(ctx.model), parameters=report.parameters(ctx.model)),
        recipe=plan.to_yaml(), recipe_name=plan.name, target=ctx.target.name,
        calibration=CalibrationFacts(data.kind, data.description, len(data), data.digest, any(one.needs_data for one in plan.passes),
                                     data.synthesis),
        passes=tuple(records), held_out=len(ctx.held_out), comparison=measured.comparison, latency=measured.latency,
        accuracy=measured.accuracy,
        quantized=quantized_nodes(ctx.model, ctx.target), weight_bytes_before=before, weight_bytes_after=after,
        integer_kernels=measured.integer_kernels, gates=measured.gates(plan), versions=report.tool_versions(), notes=notes,
    )  # fmt: skip
