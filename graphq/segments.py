"""Run a model that is too large to be held: segment by segment, all batches through one segment before the next is read."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from graphq import block_floats, half, ir, ir_proto, kernels_used, qdq
from graphq.executor import Executor, Feeds, Fetch
from graphq.sweep import Batches, Store, Walk

SEGMENT = 128 << 20
"""Bytes of weights that a segment reads at most; one layer at least."""


class Segments:
    """The interface of `Executor` over sessions that hold a segment of `model` each and are gone when the next is opened.

    What a runtime fuses over the end of a segment stays apart; the numbers are otherwise those of one session.

    Args:
        model: The model.
        deployed: As for `Executor`.
        counts: Whether to count integer kernels.
        memory_budget: Bytes of values between segments that stay in memory; the rest goes to disk.

    Attributes:
        kernels: How often each integer kernel is found in a deployed model, once it has run, if they are counted.
    """

    def __init__(self, model: ir.Model, *, deployed: bool = False, counts: bool = False, memory_budget: int = 2 << 30) -> None:
        self.model = model if deployed else half.emulated(block_floats.emulated(model))
        self.deployed, self.counts, self.memory_budget, self.kernels = deployed, counts, memory_budget, Counter[str]()

    def run(self, feeds: Feeds) -> list[np.ndarray]:
        """The model's outputs."""
        return next(self.stream([feeds]))

    def stream(self, batches: Iterable[Feeds]) -> Iterator[list[np.ndarray]]:
        """The model's outputs for each of `batches`."""
        self.kernels.clear()
        with tempfile.TemporaryDirectory(prefix="graphq-segments-") as folder:
            store, feeds = Store(Path(folder), self.memory_budget), dict[str, Batches]()
            for batch in batches:
                for name, array in batch.items():
                    feeds.setdefault(name, []).append(store.put(array))
            walk, found = Walk(self.model, feeds, store, self._session), dict[ir.Value, Batches]()
            outputs = list(self.model.graph.outputs)
            for ends in [*_ends(self.model), outputs]:
                asked = [value for value in ends if value not in found]
                arrays = zip(asked, walk.advance(asked), strict=True)
                found.update((value, entry) for value, entry in arrays if value in outputs)
            yield from (list(arrays) for arrays in zip(*(found[value] for value in outputs), strict=True))

    def _session(self, fetches: Sequence[Fetch], nodes: Sequence[ir.Node], feeds: Mapping[str, ir_proto.Kind]) -> Executor:
        if not (self.deployed and self.counts):
            return Executor(self.model, fetches, nodes=nodes, feeds=feeds, deployed=self.deployed)
        with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
            path = Path(folder) / "optimized.onnx"
            executor = Executor(self.model, fetches, nodes=nodes, feeds=feeds, deployed=True, optimized_path=str(path))
            self.kernels.update(kernels_used.read_optimized(path, self.model).counts)
        return executor


def _ends(model: ir.Model) -> Iterator[list[ir.Value]]:
    """For each segment but the last: the values made so far that later nodes read, or that are returned.

    What depends on constants alone is no such value, but made again by whoever reads it; nor are codes of activations (see `Walk`).
    """
    nodes, size = list(model.graph), 0
    varies, weights = set(model.graph.inputs), set[ir.Value]()
    last = {value: index for index, node in enumerate(nodes) for value in ir.reads(node)}
    for index, node in enumerate(nodes):
        own = {value for value in ir.reads(node) if value.is_initializer() and value.const_value is not None}
        more = sum(value.const_value.nbytes for value in own - weights if value.const_value is not None)
        if size and more and size + more > SEGMENT:
            made = [(value, qdq.is_quantizer(one)) for one in nodes[:index] for value in one.outputs if value in varies]
            yield [value for value, is_code in made if value.is_graph_output() or (last.get(value, -1) >= index and not is_code)]
            size, weights = 0, set()
            more = sum(value.const_value.nbytes for value in own if value.const_value is not None)
        size, weights = size + more, weights | own
        if any(value in varies for value in ir.reads(node)):
            varies.update(node.outputs)
