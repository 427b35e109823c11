"""TensorRT engines: a verified, legal model in, one serialized engine out.

Uses what the packages `tensorrt` (10 and later) and `tensorrt_rtx` have in common; either is imported on first use. The network is
strongly typed: precision is what the graph says, and no builder flag changes it.

Which GPU an engine is for: TensorRT-RTX is left at its default, one engine for compute capability 8.0, 8.6, 8.9, 12.0 and later,
whether or not a GPU is present. It finishes compiling where the engine is loaded, so binding the engine to the GPU of this machine
(`ComputeCapability.CURRENT`) would cost portability; Turing (7.5) is left out by that default. TensorRT builds for the GPU it finds,
and does not build without one. Building runs nothing: that the engine works on a GPU is not shown here.
"""

from __future__ import annotations

import importlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from graphq import ir
from graphq.backends import engine_layers, files
from graphq.backends.engine_shapes import LEAST, Input, Profile, Shape, profile
from graphq.backends.plugins import with_plugins
from graphq.backends.tensorrt_log import log_of, make_monitor, words
from graphq.calibration import CalibrationSet
from graphq.editor import made_by
from graphq.engines import EngineFacts, EngineOptions
from graphq.errors import TargetError, UsageError
from graphq.pipeline import Progress, no_progress
from graphq.targets import Target

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module by target."""

DISTRIBUTIONS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
"""What brings it."""

SHOWN = 3
"""Refusals of the parser that an error quotes."""

DEFAULT = EngineOptions()


def emit_engine(model: ir.Model, out: Path, target: Target, data: CalibrationSet, options: EngineOptions = DEFAULT,
                progress: Progress = no_progress) -> EngineFacts:  # fmt: skip
    """Build an engine of `model`, write it to `out`, and say what the builder made of the model.

    Open axes that `options` does not name get ranges by `graphq.backends.engine_shapes`.

    Raises:
        TargetError: the package is missing, its parser refuses a node, or its builder fails.
        UsageError: a range does not fit the model's inputs.
    """
    load_package(target)
    shapes = {name: array.shape for name, array in next(data.batches(1)).items()}
    with _saved(with_plugins(model) if options.plugins else model) as file:
        built = build(file, shapes, target, options, progress, model)
    with files.pending(out) as part:
        _write(part, built.engine)
    found = engine_layers.facts(model, engine_layers.read_plan(built.plan))
    return replace(found, options=options, shapes=built.profile.shapes, capped=built.profile.capped)


def require_parsed(model: ir.Model, target: Target) -> None:
    """Raises TargetError if the parser of `target` refuses `model`; says nothing where its package is not installed, or has no GPU."""
    try:
        refusals = parse(model, target)
    except TargetError:
        return
    if refusals:
        raise _refused(target, refusals)


def parse(model: ir.Model, target: Target) -> list[str]:
    """What the parser of `target` refuses in `model`, one line each; nothing if it takes the model. Builds no engine.

    The parser stops at the first node that it cannot import, so a second fault may show only when the first is gone.
    """
    with _saved(model) as file, Network(file, target) as network:
        return network.refusals(model)


@dataclass(frozen=True)
class Built:
    """An engine as an object that can be read as bytes, the builder's lines about its layers, and the sizes that it was built for."""

    engine: Any
    plan: list[str]
    profile: Profile


def build(file: Path, shapes: Mapping[str, Shape], target: Target, options: EngineOptions = DEFAULT, progress: Progress = no_progress,
          model: ir.Model | None = None) -> Built:  # fmt: skip
    """An engine of the model in `file`.

    Args:
        file: An ONNX file; external data lies beside it.
        shapes: Shape of one sample or batch by input name; axis 0 of each is the batch.
        target: `tensorrt` or `tensorrt-rtx`.
        progress: Called with each step of the builder.
        model: The same model in memory, to describe nodes in errors.
    """
    with Network(file, target) as network:
        refusals = network.refusals(model)
        engine = None
        if not refusals:
            sizes = profile(network.inputs, shapes, options.shapes, LEAST)
            engine = network.build(sizes, options, progress)
            if sizes.capped and not network.log.stopped_by and (engine is None or network.log.has_bad_minimum):
                network.log.clear()
                sizes = profile(network.inputs, shapes, options.shapes, None)
                engine = network.build(sizes, options, progress)
        plan = network.log.plan
    if refusals:
        raise _refused(target, refusals)
    if network.log.stopped_by is not None:
        raise network.log.stopped_by
    if engine is None:
        reason = network.log.last_error
        needs_gpu = f"{target.name} needs a GPU for what was asked and found none; " if "CUDA_SUCCESS" in reason else ""
        raise TargetError(
            f"The builder of {target.name} failed.", where=reason,
            hint=f"{needs_gpu}if the message does not tell what to change, report it with the model that "
                 f"`--emit onnx --target {target.name}` writes",
        )  # fmt: skip
    return Built(engine, plan, sizes)


def _refused(target: Target, refusals: list[str]) -> TargetError:
    more = f" (and {len(refusals) - SHOWN} more)" if len(refusals) > SHOWN else ""
    return TargetError(
        f"The parser of {target.name} refuses this model.", where="; ".join(refusals[:SHOWN]) + more,
        expected=f"operators that {target.name} implements, quantized symmetrically to a type that it takes",
        hint="export the model without this operator or with another opset, or choose another target, such as --target onnxruntime",
    )  # fmt: skip


class Network:
    """One model file in the hands of the parser and the builder, which live together until the `with` block ends.

    They must not wait for the garbage collector: it can run inside a callback of the next builder, which holds a lock
    that destroying this one takes as well, and the process hangs. A traceback that keeps frames is enough for that.
    """

    def __init__(self, file: Path, target: Target) -> None:
        self.trt = trt = load_package(target)
        self.log = log_of(trt)
        try:
            self.builder: Any = trt.Builder(self.log)
        except (TypeError, RuntimeError) as error:  # the bindings' word for "no object was made"
            raise TargetError(
                f"{target.name} cannot start on this machine.", where=self.log.last_error or str(error),
                expected="an NVIDIA GPU with a driver that is new enough" if target.name == "tensorrt" else "",
                hint="run graphq on the machine where the engine shall run, or use --emit onnx here",
            ) from error  # fmt: skip
        self.definition: Any = self.builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        self.parser: Any = trt.OnnxParser(self.definition, self.log)
        with self.log.deferring_interrupts():
            self.parsed = self.parser.parse_from_file(str(file))
        tensors = [self.definition.get_input(index) for index in range(self.definition.num_inputs)]
        self.inputs = [_input(tensor) for tensor in tensors]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.inputs = []
        self.parser = self.definition = self.builder = None

    def refusals(self, model: ir.Model | None) -> list[str]:
        """The parser's errors, each with its node, described as in the rest of graphq if `model` knows it."""
        if self.parsed:
            return []
        errors = [self.parser.get_error(index) for index in range(self.parser.num_errors)]
        return [_refusal(error, model) for error in errors] or [self.log.last_error]

    def build(self, sizes: Profile, options: EngineOptions, progress: Progress) -> Any:
        """The engine, or None with the reason in the log."""
        config = self.builder.create_builder_config()
        monitor = make_monitor(self.trt, progress, self.log)  # the config does not keep it alive
        config.progress_monitor = monitor
        config.profiling_verbosity = self.trt.ProfilingVerbosity.DETAILED
        self._configure(config, options)
        if sizes.shapes:
            entry = self.builder.create_optimization_profile()
            for name, axes in sizes.shapes.items():
                entry.set_shape(name, *zip(*axes, strict=True))
            config.add_optimization_profile(entry)
        with self.log.deferring_interrupts():
            engine = self.builder.build_serialized_network(self.definition, config)
        if options.timing_cache is not None and engine is not None:
            with files.pending(options.timing_cache) as part:
                _write(part, config.get_timing_cache().serialize())
        return engine

    def _configure(self, config: Any, options: EngineOptions) -> None:
        flags = {"SPARSE_WEIGHTS": options.sparse, "STRIP_PLAN": options.strip, "WEIGHT_STREAMING": options.weight_streaming}
        for flag in (name for name, wanted in flags.items() if wanted):
            config.set_flag(getattr(self.trt.BuilderFlag, flag))
        if options.level is not None:
            config.builder_optimization_level = options.level
        if options.compute_capability:
            known = self.trt.ComputeCapability.__members__
            config.num_compute_capabilities = len(options.compute_capability)
            for index, text in enumerate(options.compute_capability):
                if (name := f"SM{text.replace('.', '')}") not in known:
                    raise UsageError(
                        f"This package does not build for compute capability {text}.", where="engine option compute_capability",
                        expected=f"one of {', '.join(f'{key[2:-1]}.{key[-1]}' for key in known if key.startswith('SM'))}",
                    )  # fmt: skip
                config.set_compute_capability(known[name], index)
        if options.timing_cache is not None:
            known_times = options.timing_cache.read_bytes() if options.timing_cache.is_file() else b""
            config.set_timing_cache(config.create_timing_cache(known_times), False)


def _input(tensor: Any) -> Input:
    shape = tuple(tensor.shape)
    return Input(tensor.name, shape, tuple(tensor.get_dimension_name(axis) or None for axis in range(len(shape))))


def load_package(target: Target) -> Any:
    """The Python package of `target`."""
    try:
        return importlib.import_module(PACKAGES[target.name])
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it loads is not
        raise TargetError(
            f"The Python package of {target.name} cannot be imported.", where=str(error), expected=f"an importable {PACKAGES[target.name]}",
            hint=f"pip install {DISTRIBUTIONS[target.name]}, or use --emit onnx",
        ) from error  # fmt: skip


def _refusal(error: Any, model: ir.Model | None) -> str:
    """One error of the parser as `node: its words`."""
    reason = words(error.desc())
    if reason in ("", "false"):  # the parser's assertion without words
        reason = error.code().name.lower().replace("_", " ")
    calls = " in ".join(reversed(error.local_function_stack()))
    node = _find(error, model) if model is not None else None
    if node is None:
        name = f"{error.node_operator()} {error.node_name()!r}" if error.node_operator() else "model"
    else:
        author = made_by(node)
        name = f"{ir.describe(node)}{f', made by pass {author}' if author else ''}"
    return f"{name}{f' in {calls}' if calls else ''}: {reason}"


def _find(error: Any, model: ir.Model) -> ir.Node | None:
    """The node of `model` that the parser speaks of: by name, else by its place in the main graph."""
    candidates: Sequence[ir.Node] = [node for node in ir.all_nodes(model) if node.op_type == error.node_operator()]
    named = [node for node in candidates if error.node_name() and node.name == error.node_name()]
    if named:
        return named[0]
    graph = list(model.graph)
    place = error.node()
    is_here = not error.local_function_stack() and 0 <= place < len(graph) and graph[place] in candidates
    return graph[place] if is_here else None


@contextmanager
def _saved(model: ir.Model) -> Iterator[Path]:
    """`model` in a temporary file, with external data if it is too large for protobuf: so the parser takes any size."""
    with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
        file = Path(folder) / "model.onnx"
        ir.save(model, file)
        yield file


def _write(file: Path, engine: Any) -> None:
    with file.open("wb") as handle:
        handle.write(engine)
