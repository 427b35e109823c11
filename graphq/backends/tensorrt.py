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
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from graphq import ir
from graphq.backends import files
from graphq.calibration import CalibrationSet
from graphq.errors import TargetError
from graphq.pipeline import Progress, no_progress
from graphq.targets import Target

PROFILE_BATCH = (1, 8, 32)
"""Samples at once that an engine is built for, where the batch is open: fewest, best, most."""

PROFILE_LEAST = 1
"""Smallest size of any other open axis; its best and its largest are the size of the data. Where the builder finds that the model
cannot run at this size (an image smaller than a kernel), the smallest is the size of the data too."""

PACKAGES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""Python module by target."""

DISTRIBUTIONS = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt-rtx-cu13"}
"""What brings it."""

SHOWN = 3
"""Refusals of the parser that an error quotes."""

Shape = tuple[int, ...]

_NOISE = re.compile(r"Invalid Node - |\[checkMacros\.cpp|\s*$")  # lines around the parser's and builder's own words
_SOURCE_POSITION = re.compile(r"\.? In \S+ at \S+:\d+")


def emit_engine(model: ir.Model, out: Path, target: Target, data: CalibrationSet, progress: Progress = no_progress) -> None:
    """Build an engine of `model` and write it to `out`; open axes get the ranges at the top of this module.

    Raises:
        TargetError: the package is missing, its parser refuses a node, or its builder fails.
    """
    shapes = {name: array.shape for name, array in next(data.batches(1)).items()}
    with _saved(model) as file:
        engine = build(file, shapes, target, progress, model)
    with files.pending(out) as part:
        _write(part, engine)


def parse(model: ir.Model, target: Target) -> list[str]:
    """What the parser of `target` refuses in `model`, one line each; nothing if it takes the model. Builds no engine.

    The parser stops at the first node that it cannot import, so a second fault may show only when the first is gone.
    """
    with _saved(model) as file, Network(file, target) as network:
        return network.refusals(model)


def build(file: Path, shapes: Mapping[str, Shape], target: Target, progress: Progress = no_progress, model: ir.Model | None = None) -> Any:
    """A serialized engine of the model in `file`, as an object that can be read as bytes.

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
            engine = network.build(shapes, progress, PROFILE_LEAST)
            if network.has_open_sizes and not network.log.stopped_by and (engine is None or network.log.has_bad_minimum):
                network.log.errors.clear()
                engine = network.build(shapes, progress, None)
    if refusals:
        more = f" (and {len(refusals) - SHOWN} more)" if len(refusals) > SHOWN else ""
        raise TargetError(
            f"The parser of {target.name} refuses this model.", where="; ".join(refusals[:SHOWN]) + more,
            expected=f"operators that {target.name} implements, quantized symmetrically to INT8 or INT4",
            hint="export the model without this operator or with another opset, or choose another target, such as --target onnxruntime",
        )  # fmt: skip
    if network.log.stopped_by is not None:
        raise network.log.stopped_by
    if engine is None:
        raise TargetError(
            f"The builder of {target.name} failed.", where=network.log.last_error,
            hint=f"`--emit onnx --target {target.name}` writes the model that was to be built; report that file with the message above",
        )  # fmt: skip
    return engine


class Network:
    """One model file in the hands of the parser and the builder, which live together until the `with` block ends.

    They must not wait for the garbage collector: it can run inside a callback of the next builder, which holds a lock
    that destroying this one takes as well, and the process hangs. A traceback that keeps frames is enough for that.
    """

    def __init__(self, file: Path, target: Target) -> None:
        self.trt = trt = _load(target)
        self.log = _make_log(trt)
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
        self.parsed = self.parser.parse_from_file(str(file))
        self.inputs = [self.definition.get_input(index) for index in range(self.definition.num_inputs)]

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

    @property
    def has_open_sizes(self) -> bool:
        """Whether an axis other than the batch is open."""
        return any(size == -1 and not self._is_batch(tensor, axis) for tensor in self.inputs for axis, size in enumerate(tensor.shape))

    def build(self, shapes: Mapping[str, Shape], progress: Progress, least: int | None) -> Any:
        """The engine, or None with the reason in the log; `least` as `PROFILE_LEAST`, None for the size of the data."""
        config = self.builder.create_builder_config()
        monitor = _make_monitor(self.trt, progress, self.log)  # the config does not keep it alive
        config.progress_monitor = monitor
        ranges = self.ranges(shapes, least)
        if ranges:
            profile = self.builder.create_optimization_profile()
            for name, axes in ranges.items():
                profile.set_shape(name, *zip(*axes, strict=True))
            config.add_optimization_profile(profile)
        return self.builder.build_serialized_network(self.definition, config)

    def ranges(self, shapes: Mapping[str, Shape], least: int | None) -> dict[str, list[tuple[int, int, int]]]:
        """(smallest, best, largest) size of each axis of the inputs with open axes."""

        def axis_range(tensor: Any, axis: int, size: int) -> tuple[int, int, int]:
            if size != -1:
                return size, size, size
            if self._is_batch(tensor, axis):
                return PROFILE_BATCH
            seen = shapes[tensor.name][axis]
            return (seen if least is None else min(least, seen)), seen, seen

        return {
            tensor.name: [axis_range(tensor, axis, size) for axis, size in enumerate(tensor.shape)]
            for tensor in self.inputs
            if -1 in tuple(tensor.shape)
        }

    def _is_batch(self, tensor: Any, axis: int) -> bool:
        """Whether an axis is the first, or has the symbol of an input's open first axis."""
        firsts = {entry.get_dimension_name(0) for entry in self.inputs if tuple(entry.shape)[:1] == (-1,)} - {None, ""}
        return axis == 0 or tensor.get_dimension_name(axis) in firsts


def _load(target: Target) -> Any:
    """The Python package of `target`."""
    try:
        return importlib.import_module(PACKAGES[target.name])
    except (ImportError, OSError) as error:  # OSError: the package is there, a library that it loads is not
        raise TargetError(
            f"The Python package of {target.name} cannot be imported.", where=str(error), expected=f"an importable {PACKAGES[target.name]}",
            hint=f"pip install {DISTRIBUTIONS[target.name]}, or use --emit onnx",
        ) from error  # fmt: skip


def _make_log(trt: Any) -> Any:
    """A logger that keeps errors and warnings and prints nothing.

    An exception must not leave a callback: the bindings would print and drop it. The first is kept in `stopped_by`.
    """

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.stopped_by: BaseException | None = None

        def log(self, severity: Any, message: str) -> None:
            try:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    self.errors.append(message)
                elif severity == trt.ILogger.WARNING:
                    self.warnings.append(message)
            except BaseException as error:  # Ctrl-C arrives in whatever Python code runs next
                self.stopped_by = self.stopped_by or error

        @property
        def last_error(self) -> str:
            told = [words for words in map(_words, self.errors) if words] or self.errors
            return told[-1] if told else "it gave no reason"

        @property
        def has_bad_minimum(self) -> bool:
            return any("kMIN values are not self-consistent" in message for message in [*self.errors, *self.warnings])

    return Log()


def _make_monitor(trt: Any, progress: Progress, log: Any) -> Any:
    """Reports the builder's outermost phase, and cancels the build once anything has raised."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phase, self.steps = "", 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.phase, self.steps = phase, steps
                self.tell(0)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.phase:
                self.tell(step + 1)
            return log.stopped_by is None

        def phase_finish(self, phase: str) -> None:
            if phase == self.phase:
                self.tell(self.steps)

        def tell(self, done: int) -> None:
            try:
                if log.stopped_by is None:
                    progress("build engine", min(done, self.steps), self.steps)
            except BaseException as error:
                log.stopped_by = error

    return Monitor()


def _refusal(error: Any, model: ir.Model | None) -> str:
    """One error of the parser as `node: its words`."""
    words = _words(error.desc())
    if words in ("", "false"):  # the parser's assertion without words
        words = error.code().name.lower().replace("_", " ")
    calls = " in ".join(reversed(error.local_function_stack()))
    node = _find(error, model) if model is not None else None
    if node is None:
        name = f"{error.node_operator()} {error.node_name()!r}" if error.node_operator() else "model"
    else:
        name = ir.describe(node)
    return f"{name}{f' in {calls}' if calls else ''}: {words}"


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


def _words(text: str) -> str:
    """The first lines of a message that say something, without positions in TensorRT's source."""
    lines = [line.strip() for line in text.splitlines() if not _NOISE.match(line)]
    return _SOURCE_POSITION.sub("", " ".join(lines[:3])).strip()[:400]


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
