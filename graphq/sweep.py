"""The sweep: one walk over the reference and the current model that stops at every node a pass wants to work on.

Layer-by-layer methods need, for each linear node, the activations that reach it in the current model (everything before it
already changed) and in the reference. The walk keeps the tensors that later nodes still read (the frontier) for all
calibration samples, so that each node of either model runs once, whatever the depth (DESIGN.md 5).
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphq import ir
from graphq.calibration import CalibrationSet
from graphq.errors import ModelError
from graphq.executor import BATCH, Executor, Fetch

Batches = list[np.ndarray]
"""One array per calibration batch."""


@dataclass(frozen=True)
class SweepStep:
    """A stop of the sweep, before `node` has run in the current model; edit the node, then go on.

    Attributes:
        node: The node in the current model.
        x_ref, x_cur: What its first input is in the reference and in the current model, one array per batch.
        y_ref: Its first output in the reference.
    """

    node: ir.Node
    x_ref: Batches
    x_cur: Batches
    y_ref: Batches
    _run: Callable[[ir.Node], Batches]

    def y_cur(self) -> Batches:
        """First output of the node as it is now, fed with `x_cur`."""
        return self._run(self.node)


def sweep(model: ir.Model, reference: ir.Model, nodes: Sequence[ir.Node], calib: CalibrationSet, *, memory_budget: int = 2 << 30,
          progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> Iterator[SweepStep]:  # fmt: skip
    """Visit `nodes` of `model`'s main graph in topological order; their names are those of nodes in `reference`.

    Raises:
        ModelError: a node has no namesake in the reference.
    """
    namesakes = {node.name: node for node in reference.graph}
    position = {node: index for index, node in enumerate(model.graph)}
    stops = sorted(nodes, key=position.__getitem__)
    missing = [node for node in stops if node.name not in namesakes]
    if missing:
        raise ModelError("A sweep can only stop at nodes that the reference model has too.", where=ir.describe(missing[0]))
    batches = list(calib.batches(BATCH))
    with tempfile.TemporaryDirectory(prefix="graphq-sweep-") as folder:
        feeds = {name: [batch[name] for batch in batches] for name in batches[0]} if batches else {}
        store = _Store(Path(folder), memory_budget)
        current, float_walk = _Walk(model, feeds, store), _Walk(reference, feeds, store)
        for index, node in enumerate(stops):
            progress("sweep", index, len(stops))
            twin = namesakes[node.name]
            x_ref = float_walk.until(twin)
            y_ref = float_walk.step(twin)
            yield SweepStep(node, x_ref, current.until(node), y_ref, current.peek)


class _Store:
    """Keeps arrays in memory up to a budget and in memory-mapped files above it."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self.held, self.files = folder, budget, 0, 0

    def put(self, array: np.ndarray) -> np.ndarray:
        if self.held + array.nbytes <= self.budget or array.dtype == object:
            self.held += array.nbytes
            return array
        self.files += 1
        path = self.folder / f"{self.files}.npy"
        np.save(path, array, allow_pickle=False)
        return np.load(path, mmap_mode="r", allow_pickle=False)

    def drop(self, arrays: Batches) -> None:
        for array in arrays:
            if isinstance(array, np.memmap):
                Path(str(array.filename)).unlink(missing_ok=True)
            else:
                self.held -= array.nbytes


class _Walk:
    """One model's side of the sweep: which nodes have run, and the live tensors."""

    def __init__(self, model: ir.Model, feeds: dict[str, Batches], store: _Store) -> None:
        self.graph, self.model, self.store = model.graph, model, store
        self.done: set[ir.Node] = set()
        self.inputs = {value: feeds[value.name or ""] for value in model.graph.inputs if value.name in feeds}
        self.live: dict[ir.Value, Batches] = dict(self.inputs)

    def until(self, stop: ir.Node) -> Batches:
        """Run everything before `stop`; returns its first input."""
        pending = []
        for node in self.graph:
            if node is stop:
                break
            if node not in self.done:
                pending.append(node)
        self._run(pending, keep=set(stop.inputs))
        first = stop.inputs[0]
        assert first is not None
        return self._arrays(first)

    def step(self, node: ir.Node) -> Batches:
        """Run `node` itself; returns its first output."""
        self._run([node], keep={node.outputs[0]})
        return self._arrays(node.outputs[0])

    def _arrays(self, value: ir.Value) -> Batches:
        """The value for each batch, the same for all if it depends on no input."""
        if value in self.live:
            return self.live[value]
        maker, array = value.producer(), ir.constant(value)
        if maker is None or array is not None:
            assert array is not None, "every input is fed"
            return [array] * len(next(iter(self.inputs.values())))
        return self._execute([maker], [value])[value]

    def peek(self, node: ir.Node) -> Batches:
        """First output of `node` without counting it as run."""
        return self._execute([node], [node.outputs[0]])[node.outputs[0]]

    def _run(self, nodes: list[ir.Node], keep: set[ir.Value | None]) -> None:
        nodes = self._dynamic(nodes)
        self.done.update(nodes)
        wanted = [value for node in nodes for value in node.outputs if value in keep or self._is_read_later(value)]
        if nodes and wanted:
            self.live.update(self._execute(nodes, wanted, self.store.put))
        for value in [value for value in self.live if value not in keep and value not in self.inputs and not self._is_read_later(value)]:
            self.store.drop(self.live.pop(value))

    def _execute(self, nodes: Sequence[ir.Node], wanted: Sequence[ir.Value],
                 put: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> dict[ir.Value, Batches]:  # fmt: skip
        """Values that `nodes` make, for each batch, given to `put` batch by batch, so that no more than one lies in memory."""
        feeds = {value.name or "": arrays for value, arrays in self.live.items()}
        kinds = {name: arrays[0].dtype for name, arrays in feeds.items() if arrays}
        executor = Executor(self.model, [Fetch(value.name or "") for value in wanted], nodes=[*self._constants(nodes), *nodes], feeds=kinds)
        count = len(next(iter(feeds.values()), []))
        runs = (executor.run({name: arrays[index] for name, arrays in feeds.items()}) for index in range(count))
        results = [[put(array) for array in run] for run in runs]
        return {value: list(arrays) for value, arrays in zip(wanted, zip(*results, strict=True), strict=True)}

    def _is_read_later(self, value: ir.Value) -> bool:
        return any(self._outer(use.node) not in self.done for use in value.uses())

    def _outer(self, node: ir.Node) -> ir.Node:
        """The node of the main graph that holds `node`, which may lie in a subgraph."""
        return node if node.graph is self.graph else self._holders().get(node, node)

    def _holders(self) -> dict[ir.Node, ir.Node]:
        return {inner: node for node in self.graph for inner in ir.nodes_inside(node)}

    def _dynamic(self, nodes: Sequence[ir.Node]) -> list[ir.Node]:
        """Those of `nodes`, all that are due, that depend on a graph input; what does not is run with whoever reads it."""
        found = dict[ir.Node, None]()
        for node in nodes:
            makers = [(value, value.producer()) for value in ir.reads(node)]
            if any(value in self.live or value.is_graph_input() or maker in self.done or maker in found for value, maker in makers):
                found[node] = None
        return list(found)

    def _constants(self, nodes: Sequence[ir.Node]) -> list[ir.Node]:
        """The nodes that compute constants which `nodes` read, such as the DequantizeLinear of a weight, in order."""
        known, stack, found = {*nodes, *self.done}, list(nodes), list[ir.Node]()
        while stack:
            for value in ir.reads(stack.pop()):
                maker = value.producer()
                if maker is not None and maker not in known:
                    known.add(maker)
                    found.append(maker)
                    stack.append(maker)
        return sorted(found, key={node: index for index, node in enumerate(self.graph)}.__getitem__) if len(found) > 1 else found
