"""Is the model legal, and how far is it from the reference?"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import numpy as np
import onnx

from graphq import ir
from graphq.calibration import CalibrationSet
from graphq.errors import VerifyError
from graphq.executor import BATCH, Executor, Feeds
from graphq.report import Latency, OutputComparison


def verify_graph(model: ir.Model) -> None:
    """The onnx checker, without the bytes of the weights.

    Raises:
        VerifyError: the checker refuses the graph; its words are passed on.
    """
    try:
        onnx.checker.check_model(_weights_as_inputs(model))
    except onnx.checker.ValidationError as error:
        raise VerifyError("The graph is not valid ONNX.", where=str(error).strip().splitlines()[0][:300],
                          hint="this is a fault of the pass named below, not of your model")  # fmt: skip


def _weights_as_inputs(model: ir.Model) -> onnx.ModelProto:
    """The checker insists on reading external data, so large weights are shown to it as inputs."""
    shell, weights = ir.without_weights(model)
    proto = ir.to_proto(shell)
    for entry in [entry for entry in proto.graph.initializer if entry.name in weights]:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(entry.name, entry.data_type, list(entry.dims)))
        proto.graph.initializer.remove(entry)
    return proto


def compare(reference: Executor, result: Executor, data: CalibrationSet, names: Sequence[str]) -> tuple[OutputComparison, ...]:
    """Each output of `result` against the same of `reference` over all of `data`, batch by batch.

    Raises:
        VerifyError: an output is not finite where the reference is, or changed its shape.
    """
    sums = [_Sums() for _ in names]
    for batch in data.batches(BATCH):
        for entry, name, a, b in zip(sums, names, reference.run(batch), result.run(batch), strict=True):
            if a.shape != b.shape:
                raise VerifyError(f"Output {name!r} changed its shape.", expected=str(a.shape), where=str(b.shape))
            if a.dtype.kind == "f" and not np.isfinite(b[np.isfinite(a)]).all():
                raise VerifyError(f"Output {name!r} holds NaN or infinity where the reference does not.", hint="`graphq compare` shows where")
            entry.add(a, b)
    return tuple(entry.result(name) for name, entry in zip(names, sums, strict=True))


class _Sums:
    """Running sums of one output."""

    def __init__(self) -> None:
        self.power = self.noise = self.cosines = self.largest = 0.0
        self.samples = self.agreed = 0
        self.classes = False

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        rows = len(a) if a.ndim else 1
        a, b = (np.nan_to_num(np.asarray(part, np.float64).reshape(rows, -1), posinf=0, neginf=0) for part in (a, b))
        error = b - a
        self.power += float((a * a).sum())
        self.noise += float((error * error).sum())
        self.largest = max(self.largest, float(np.abs(error).max(initial=0.0)))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = (a == b).all(1)
        self.cosines += float(np.where(same, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-30)).sum())
        self.samples += rows
        if a.shape[1] > 1:
            self.classes = True
            self.agreed += int((a.argmax(1) == b.argmax(1)).sum())

    def result(self, name: str) -> OutputComparison:
        count = max(self.samples, 1)
        sqnr = math.inf if self.noise == 0 else 10 * math.log10(max(self.power, 1e-300) / self.noise)
        return OutputComparison(name, sqnr, self.cosines / count, self.largest, self.agreed / count if self.classes else None)


def measure_latency(reference: Executor, result: Executor, feeds: Feeds, *, rounds: int = 5, seconds: float = 1.0) -> Latency:
    """Median latency of two models, run in turn after one warm-up each, at most about `seconds` in all."""
    from onnxruntime import __version__ as version

    runs = {"reference": reference, "result": result}
    for executor in runs.values():
        executor.run(feeds)
    taken: dict[str, list[float]] = {name: [] for name in runs}
    started = time.perf_counter()
    while len(taken["result"]) < 3 or (time.perf_counter() - started < seconds and len(taken["result"]) < rounds):
        for name, executor in runs.items():
            before = time.perf_counter()
            executor.run(feeds)
            taken[name].append((time.perf_counter() - before) * 1e3)
    first, second = (statistics.median(taken[name]) for name in runs)
    return Latency(len(next(iter(feeds.values()))), first, second, first / second, f"onnxruntime {version} CPU", reference.threads)


def require_same_interface(reference: ir.Model, model: ir.Model) -> None:
    """Raises VerifyError if inputs or outputs changed their names or order."""
    for what, before, after in (("inputs", [entry.name for entry in ir.inputs(reference)], [entry.name for entry in ir.inputs(model)]),
                                ("outputs", [value.name for value in reference.graph.outputs], [value.name for value in model.graph.outputs])):  # fmt: skip
        if before != after:
            raise VerifyError(f"The model's {what} changed.", expected=str(before), where=str(after))

