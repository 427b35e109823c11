"""Run a model, or a part of one, with ONNX Runtime's public API and look at any of its values.

Whole tensors leave the session only when somebody asks for them: extrema and subsamples are reduced inside the graph.
QDQ fusion is off by default and half precision is emulated, so that the numbers are those of the ONNX semantics;
`deployed=True` gives the session that a user would run.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import onnx
from onnx import helper

from graphq import block_floats, half, ir, ir_proto, stored
from graphq.errors import ModelError
from graphq.observers import View

Feeds = Mapping[str, np.ndarray]
T = TypeVar("T")

BATCH = 4
"""Samples that run at once where nothing else is asked for: more is hardly faster on a CPU, and takes its memory."""

WORKERS = 2 if (os.cpu_count() or 1) > 1 else 1
THREADS = max(1, (os.cpu_count() or 1) // WORKERS)
"""Where many batches run, so many run at a time, on so many threads each: on two cores a fifth faster than one batch on both."""

SAMPLE_SIZE = 4096
"""Elements that the view `sample` takes from one calibration sample of a tensor, about."""

ROWS = 4
"""Rows that the view `rows` takes from one batch of a tensor, about."""

ORT_OPSET, ORT_IR = 26, 13
"""Newest operator set and file format that ONNX Runtime 1.31 loads."""


_FLAT, _ZERO = "graphq_view_flat", "graphq_view_zero"
"""Constants that the extrema views share: the shape `[1]`, and a zero of that shape."""


@dataclass(frozen=True)
class Fetch:
    """One value to look at: whole, as `(min(x, 0), max(x, 0))`, about `SAMPLE_SIZE` elements a sample, or about `ROWS` rows a batch."""

    value: str
    view: View = "whole"


class Executor:
    """An ONNX Runtime session over `model` that returns `fetches` in their order.

    Args:
        model: The model. It is not changed, though its nodes may be put in order; its weights are shared with the session, not copied.
        fetches: What to return; the model's outputs by default.
        nodes: Run only these nodes of the main graph, in their order in the graph. `feeds` then are the values they read.
        feeds: Element type by value name, for the values that are fed when `nodes` is given.
        deployed: Full optimization with integer kernels, as at the user's, instead of exact ONNX semantics.
        threads: Intra-op threads; 0 leaves it to the runtime.
        spin: Whether threads stay awake between runs, as a user's do: whatever else runs is slower then, tiny models are faster.
        prepack: Whether weights are laid out for speed first, which does not pay for a few runs.
        optimized_path: Where ONNX Runtime shall write its own optimized graph.
    """

    def __init__(self, model: ir.Model, fetches: Sequence[Fetch] | None = None, *, nodes: Sequence[ir.Node] | None = None,
                 feeds: Mapping[str, ir_proto.Kind] | None = None, deployed: bool = False, threads: int = 0, spin: bool = False,
                 prepack: bool = True, optimized_path: str | None = None) -> None:  # fmt: skip
        self.fetches = [Fetch(value.name or "") for value in model.graph.outputs] if fetches is None else list(fetches)
        if nodes is None:
            model = model if deployed else half.emulated(block_floats.emulated(model))
            proto, weights = ir_proto.light_proto(model)
        else:
            proto, weights = ir_proto.segment_proto(model, nodes, feeds or {})
        values = {} if all(fetch.view == "whole" for fetch in self.fetches) else ir.values_by_name(model.graph)
        _add_views(proto, self.fetches, {fetch.value: values.get(fetch.value) for fetch in self.fetches if fetch.view != "whole"})
        self.threads = threads or os.cpu_count() or 1
        self._session = _session(proto, weights, deployed, threads, prepack, spin, optimized_path)
        self._names = [entry.name for entry in self._session.get_inputs()]

    def run(self, feeds: Feeds) -> list[np.ndarray]:
        """One array per fetch. Feeds that the session does not read are ignored."""
        try:
            arrays = self._session.run(None, {name: feeds[name] for name in self._names})
        except KeyError as error:
            raise ModelError(f"Input {error} was not fed.", expected=f"arrays for {', '.join(self._names)}") from error
        except Exception as error:  # ORT's own exception types are not public
            shapes = ", ".join(f"{name} {feeds[name].dtype}{list(feeds[name].shape)}" for name in self._names)
            raise ModelError(
                f"ONNX Runtime failed while running the model: {_first_line(error)}", where=shapes,
                hint="check that the arrays have the shape the model was exported for, or try shorter sequences, as it may have a limit",
            ) from error  # fmt: skip
        return [_with_zero(array) if fetch.view == "extrema" else array for fetch, array in zip(self.fetches, arrays, strict=True)]

    def stream(self, batches: Iterable[Feeds]) -> Iterator[list[np.ndarray]]:
        return run_ahead(partial(self.run, batch) for batch in batches)


def decode(model: ir.Model, value: ir.Value) -> np.ndarray:
    """The array that `value`, which depends on constants only, stands for. It is computed at every call, and nothing is kept.

    Raises:
        ValueError: it depends on an input of the model.
    """
    array = ir.constant(value)
    if array is not None:
        return array
    makers = stored.decoders(value)
    if not makers:
        raise ValueError(f"{value.name} is not a constant of the graph")
    return Executor(model, [Fetch(value.name or "")], nodes=makers, feeds={}, prepack=False).run({})[0]


def run_ahead(jobs: Iterable[Callable[[], T]]) -> Iterator[T]:
    """What each of `jobs` returns, in their order; up to `WORKERS` of them run, or wait to be taken, behind the one that is due."""
    with ThreadPoolExecutor(WORKERS) as pool:
        pending = deque[Future[T]]()
        try:
            for job in jobs:
                pending.append(pool.submit(job))
                if len(pending) > WORKERS:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def _with_zero(extrema: np.ndarray) -> np.ndarray:
    """Extend a range to contain 0, as every quantizer does; the range of nothing becomes 0 to 0, NaN stays."""
    return np.array([np.minimum(extrema[0], 0), np.maximum(extrema[1], 0)], extrema.dtype)


_WRONG = ["ClipQuantRewrite", "ReluQuantRewrite"]
"""Rules of ONNX Runtime 1.31 that drop a Clip or Relu before a QuantizeLinear to 8-bit floats, or fail on it."""


def _session(proto: onnx.ModelProto, weights: Mapping[str, np.ndarray], deployed: bool, threads: int, prepack: bool, spin: bool,
             optimized_path: str | None) -> Any:  # fmt: skip
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4 if not deployed else 3
    if not spin:
        options.add_session_config_entry("session.force_spinning_stop", "1")
    if not deployed:
        options.enable_mem_pattern = False  # it would plan a second arena after the first run
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if not prepack:
        options.add_session_config_entry("session.disable_prepacking", "1")
    if optimized_path is not None:
        options.optimized_model_filepath = optimized_path
    present = {entry.name for entry in proto.graph.initializer}
    kept = {name: array for name, array in weights.items() if name in present}
    options.add_external_initializers(
        list(kept), [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array)) for array in kept.values()]
    )
    try:
        return ort.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"], disabled_optimizers=None if deployed else _WRONG
        )
    except Exception as error:
        raise ModelError(
            f"ONNX Runtime cannot load the model: {_first_line(error)}",
            expected=f"operators that ONNX Runtime {ort.__version__} implements (opset {ORT_OPSET}, IR {ORT_IR} at most)",
            hint="export with a lower opset, or without operators of other domains",
        ) from error  # fmt: skip


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:300] if str(error).strip() else type(error).__name__


def _add_views(proto: onnx.ModelProto, fetches: Sequence[Fetch], values: Mapping[str, ir.Value | None]) -> None:
    """Make the fetches the outputs of the graph, reduced where a view asks for it."""
    graph = proto.graph
    declared = {entry.name: entry for entry in [*graph.output, *graph.input, *graph.value_info]}
    fed = {entry.name for entry in graph.input} | {entry.name for entry in graph.initializer}
    del graph.output[:]
    views: dict[str, list[onnx.NodeProto]] = {}
    count = len(graph.node)
    if any(fetch.view == "extrema" for fetch in fetches):
        graph.initializer.append(helper.make_tensor(_FLAT, onnx.TensorProto.INT64, [1], [1]))
        graph.initializer.append(helper.make_tensor(_ZERO, onnx.TensorProto.FLOAT, [1], [0.0]))
    for index, fetch in enumerate(fetches):
        name, start = f"graphq_view_{index}", len(graph.node)
        if fetch.view == "whole" and fetch.value not in fed:
            graph.output.append(declared.get(fetch.value) or helper.make_empty_tensor_value_info(fetch.value))
            continue
        if fetch.view == "whole":
            graph.node.append(helper.make_node("Identity", [fetch.value], [name]))
        elif fetch.view == "extrema":
            _add_extrema(graph, fetch.value, name, _is_cheap(values[fetch.value]))
        elif fetch.view == "rows":
            _add_rows(graph, fetch.value, name, ir.shape_of(values[fetch.value]))
        else:
            _add_sample(graph, fetch.value, name, ir.shape_of(values[fetch.value]))
        views.setdefault(fetch.value, []).extend(graph.node[start:])
        graph.output.append(helper.make_empty_tensor_value_info(name))
    _place_views(graph, count, views)
    names = [entry.name for entry in graph.output]
    if len(set(names)) != len(names):
        raise ValueError(f"a value is fetched twice: {names}")


def _place_views(graph: onnx.GraphProto, count: int, views: dict[str, list[onnx.NodeProto]]) -> None:
    """Put the nodes of each view, which follow the graph's `count` own ones, right after the node whose value they reduce.

    At the end of the graph they cost ONNX Runtime time in the square of their number: 12 s for 2,000 of them, here 0.6 s.
    """
    nodes = list(graph.node[:count])
    made = {name for node in nodes for name in node.output}
    placed = [node for value, added in views.items() if value not in made for node in added]
    for node in nodes:
        placed += [node, *(one for name in node.output for one in views.get(name, ()))]
    del graph.node[:]
    graph.node.extend(placed)


def _add_extrema(graph: onnx.GraphProto, value: str, name: str, cheap: bool) -> None:
    """Reduce to `(min, max)`; `cheap` says that the value is `[N, C, ...]` and never negative.

    Then the maximum over positions is pooled first: ONNX Runtime pools in the blocked layout of its convolutions, while a
    reduction makes it copy the whole tensor back to NCHW.
    """
    source = f"{name}_pooled" if cheap else value
    if cheap:
        graph.node.append(helper.make_node("GlobalMaxPool", [value], [source]))
    for op, part in (("ReduceMax", "high"),) if cheap else (("ReduceMin", "low"), ("ReduceMax", "high")):
        graph.node.append(helper.make_node(op, [source], [f"{name}_{part}"], keepdims=0))
        graph.node.append(helper.make_node("Reshape", [f"{name}_{part}", _FLAT], [f"{name}_{part}_1"]))
    graph.node.append(helper.make_node("Concat", [_ZERO if cheap else f"{name}_low_1", f"{name}_high_1"], [name], axis=0))


def _add_rows(graph: onnx.GraphProto, value: str, name: str, shape: tuple[int | str | None, ...] | None) -> None:
    """Take some of the rows along the last axis, evenly spread."""
    rows = BATCH * sample_size((shape or ())[:-1])
    graph.node.append(helper.make_node("Flatten", [value], [f"{name}_flat"], axis=-1))
    _add_slice(graph, name, axis=0, step=max(1, rows // ROWS))


def _add_slice(graph: onnx.GraphProto, name: str, axis: int, step: int) -> None:
    """Every `step`-th index along `axis` of `<name>_flat`."""
    constants = {"start": [0], "end": [np.iinfo(np.int64).max], "axis": [axis], "step": [step]}
    for part, data in constants.items():
        graph.initializer.append(helper.make_tensor(f"{name}_{part}", onnx.TensorProto.INT64, [len(data)], data))
    graph.node.append(helper.make_node("Slice", [f"{name}_flat", *(f"{name}_{part}" for part in constants)], [name]))


def _is_cheap(value: ir.Value | None) -> bool:
    """Whether `value` is the float result of an activation that is never negative, with positions to pool over."""
    maker = ir.producer(value)
    shape = ir.shape_of(value)
    if maker is None or maker.domain or shape is None or len(shape) < 3 or 0 in shape or not ir.is_float(value):
        return False
    lower = ir.constant(maker.inputs[1]) if maker.op_type == "Clip" and len(maker.inputs) > 1 else None
    return maker.op_type in ("Relu", "Sigmoid") or (lower is not None and float(lower) >= 0)


def _add_sample(graph: onnx.GraphProto, value: str, name: str, shape: tuple[int | str | None, ...] | None) -> None:
    """Flatten each sample and take every k-th element, k coprime to the dimensions so that no channel is passed over."""
    graph.node.append(helper.make_node("Flatten", [value], [f"{name}_flat"], axis=1 if shape else 0))
    _add_slice(graph, name, axis=1, step=sample_step(shape))


def sample_step(shape: tuple[int | str | None, ...] | None) -> int:
    """Stride of the view `sample`."""
    step = max(1, sample_size(shape) // SAMPLE_SIZE)
    while step > 1 and any(math.gcd(step, dim) > 1 for dim in _dims(shape) if dim > 1):
        step += 1
    return step


def sample_size(shape: tuple[int | str | None, ...] | None) -> int:
    """Elements of one sample, about: unknown dimensions count as 64."""
    return math.prod(_dims(shape))


def _dims(shape: tuple[int | str | None, ...] | None) -> list[int]:
    return [dim if isinstance(dim, int) else 64 for dim in (shape or ())[1:]]
