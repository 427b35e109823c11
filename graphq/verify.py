"""Is the model legal, and how far is it from the reference?"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import onnx

from graphq import ir, ir_proto
from graphq.calibration import CalibrationSet
from graphq.errors import VerifyError
from graphq.executor import BATCH, Executor, Feeds
from graphq.noise import decibel
from graphq.report import Latency, OutputComparison

ROUNDS, SECONDS = 3, 0.05
"""Timed runs of each model and seconds of timing, both at least."""


def verify_graph(model: ir.Model) -> None:
    """The onnx checker, without the bytes of the weights.

    Raises:
        VerifyError: the checker refuses the graph; its words are passed on.
    """
    try:
        onnx.checker.check_model(_weights_as_inputs(model))
    except (onnx.checker.ValidationError, RuntimeError, ValueError) as error:  # the last two: it cannot even be written down
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise VerifyError("The graph is not valid ONNX.", where=str(first).strip().splitlines()[0][:300],
                          hint="this is a fault of the pass named below, not of your model") from error  # fmt: skip


def _weights_as_inputs(model: ir.Model) -> onnx.ModelProto:
    """The checker insists on reading external data, so large weights are shown to it as inputs; and on ranks, which runtimes do not."""
    proto = ir_proto.outline(model)
    listed = {entry.name for entry in proto.graph.input}
    for entry in [entry for entry in proto.graph.initializer if entry.data_location == onnx.TensorProto.EXTERNAL]:
        if entry.name not in listed:
            proto.graph.input.append(onnx.helper.make_tensor_value_info(entry.name, entry.data_type, list(entry.dims)))
        proto.graph.initializer.remove(entry)
    for value in (*proto.graph.input, *proto.graph.output):
        if value.type.HasField("tensor_type"):
            value.type.tensor_type.shape.SetInParent()
    return proto


class Runnable(Protocol):
    """A model, or what was made of it, ready to run."""

    def run(self, feeds: Feeds) -> list[Any]:
        """The outputs, in order."""


class Streaming(Protocol):
    """One that takes many batches at once, so that what is too large to be held is read once for all of them."""

    def stream(self, batches: Iterable[Feeds]) -> Iterator[list[Any]]:
        """The outputs for each of `batches`."""


def compare(reference: Runnable, result: Runnable, data: CalibrationSet, names: Sequence[str]) -> tuple[OutputComparison, ...]:
    """Each output of `result` against the same of `reference` over all of `data`, batch by batch; raises as `compare_outputs`."""
    return compare_outputs(((reference.run(batch), result.run(batch)) for batch in data.batches(BATCH)), names)


def compare_outputs(batches: Iterable[tuple[Sequence[Any], Sequence[Any]]], names: Sequence[str]) -> tuple[OutputComparison, ...]:
    """The same from the outputs of the reference and of the result for each batch.

    Raises:
        VerifyError: an output is not finite where the reference is, or changed its shape.
    """
    sums = [_Sums("logit" in name.lower()) for name in names]
    for originals, results in batches:
        for entry, name, before, after in zip(sums, names, originals, results, strict=True):
            for a, b in _pairs(before, after, name):
                if a.shape != b.shape:
                    raise VerifyError(f"Output {name!r} changed its shape.", expected=str(a.shape), where=str(b.shape))
                if a.dtype.kind == "f" and not np.isfinite(b[np.isfinite(a)]).all():
                    what = f"Output {name!r} holds NaN or infinity where the reference does not."
                    raise VerifyError(what, hint="`graphq compare` shows where")
                entry.add(a, b)
    return tuple(entry.result(name) for name, entry in zip(names, sums, strict=True))


def _pairs(before: Any, after: Any, name: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The tensors of one output of both models: itself, or the elements of a sequence; nothing for an absent optional."""
    one, other = ([] if value is None else value if isinstance(value, list) else [value] for value in (before, after))
    if len(one) != len(other):
        raise VerifyError(f"Output {name!r} changed its length.", expected=f"{len(one)} elements", where=f"{len(other)} elements")
    return [(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=True)]


class _Sums:
    """Running sums of one output; `of_tokens` says that its last of three axes, too, holds scores of classes: one choice a token."""

    def __init__(self, of_tokens: bool = False) -> None:
        self.of_tokens, self.choices = of_tokens, 0
        self.power = self.noise = self.cosines = self.largest = 0.0
        self.samples = self.agreed = 0

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        rows, is_classes = len(a) if a.ndim and a.size else 1, a.ndim == 2 or (a.ndim == 3 and self.of_tokens)
        if a.dtype.kind in "OSU":  # strings are the same or not
            a, b = np.zeros(a.shape), a != b
        a, b = (np.asarray(part, np.float64) for part in (a, b))
        if is_classes and a.size and a.shape[-1] > 1:
            same_choice = np.argmax(a, -1) == np.argmax(b, -1)
            self.agreed, self.choices = self.agreed + int(same_choice.sum()), self.choices + same_choice.size
        a, b = a.reshape(rows, -1), b.reshape(rows, -1)
        finite = np.isfinite(a)  # a mask of -inf may as well be a large number
        a, b = np.where(finite, a, 0.0), np.where(finite, b, 0.0)
        error = b - a
        self.power += float((a * a).sum())
        self.noise += float((error * error).sum())
        self.largest = max(self.largest, float(np.abs(error).max(initial=0.0)))
        norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
        same = (a == b).all(1)
        self.cosines += float(np.where(same, 1.0, (a * b).sum(1) / np.maximum(norms, 1e-30)).sum())
        self.samples += rows

    def result(self, name: str) -> OutputComparison:
        count = max(self.samples, 1)
        sqnr = decibel(self.power, self.noise)
        return OutputComparison(name, sqnr, self.cosines / count, self.largest, self.agreed / self.choices if self.choices else None)


def measure_latency(reference: Executor, result: Executor, feeds: Feeds, *, enough: float = 1.0, seconds: float = 3.0) -> Latency:
    """Latency of two models, run in turn: the fastest run of each, since other load (and warming up) only ever adds.

    A few rounds if the speed-up reaches `enough`; rounds for up to `seconds` before it is said not to.
    """
    from onnxruntime import __version__ as version

    fastest = [float("inf"), float("inf")]
    started, rounds = time.perf_counter(), 0
    while rounds < ROUNDS or time.perf_counter() - started < (SECONDS if fastest[0] >= enough * fastest[1] else seconds):
        for index, executor in enumerate((reference, result)):
            before = time.perf_counter()
            executor.run(feeds)
            fastest[index] = min(fastest[index], (time.perf_counter() - before) * 1e3)
        rounds += 1
    first, second = fastest
    return Latency(len(next(iter(feeds.values()))), first, second, first / second, f"onnxruntime {version} CPU", reference.threads)


def require_same_interface(reference: ir.Model, model: ir.Model) -> None:
    """Raises VerifyError if inputs changed their names, order, types or shapes, or outputs their names or order."""
    both = (reference, model)
    inputs = [[f"{entry.name} {entry.dtype}{list(entry.shape or ())}" for entry in ir.inputs(one)] for one in both]
    outputs = [[value.name for value in one.graph.outputs] for one in both]
    for what, (before, after) in (("inputs", inputs), ("outputs", outputs)):
        if before != after:
            raise VerifyError(f"The model's {what} changed.", expected=str(before), where=str(after))
