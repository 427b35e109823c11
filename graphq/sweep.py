"""The sweep: one walk over the reference and the current model that stops at every node, or block of nodes, a pass wants to work on.

Layer-by-layer methods need, for each linear node, the activations that reach it in the current model (everything before it
already changed) and what it computes in the reference; block-by-block methods the same of many nodes at once. Either walk keeps
the tensors that later nodes still read (the frontier) for all calibration samples, so that each node runs once at most, whatever
the depth.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from graphq import ir, ir_proto, qdq
from graphq.calibration import CalibrationSet
from graphq.errors import ModelError
from graphq.executor import BATCH, Executor, Fetch

Batches = list[np.ndarray]
"""One array per calibration batch."""

MASK = "attention_mask"
"""The model input that exporters of language models name so: [batch, sequence], 0 where a token is padding."""

Session = Callable[[Sequence[Fetch], Sequence[ir.Node], Mapping[str, ir_proto.Kind]], Executor]


@dataclass(frozen=True)
class SweepStep:
    """A stop of the sweep, before `node` has run in the current model; edit the node, then go on.

    Attributes:
        node: The node in the current model.
        x_cur: What its first input is in the current model, one array per batch.
        x_raw: The same before its quantizer; `x_cur` itself if it has none.
        mask: The model input `MASK`, one array per batch; none if the model has no such input.
    """

    node: ir.Node
    x_cur: Batches
    x_raw: Batches
    mask: Batches
    _current: Walk
    _reference: Walk
    _twin: ir.Node | None

    @property
    def twin(self) -> ir.Node | None:
        """The node of that name in the reference, if there is one."""
        return self._twin

    @cached_property
    def y_ref(self) -> Batches:
        """First output of the node in the reference, which runs only for those who ask; to be read before the sweep goes on.

        Raises:
            ModelError: the reference has no node of that name.
        """
        if self._twin is None:
            raise ModelError("The reference model has no such node.", where=ir.describe(self.node))
        return self._reference.advance([self._twin.outputs[0]])[0]

    def y_cur(self) -> Batches:
        """First output of the node as it is now, fed with `x_cur`: the node runs once more for it."""
        return self._current.peek(self.node.outputs[0])


def sweep(model: ir.Model, reference: ir.Model, nodes: Sequence[ir.Node], calib: CalibrationSet, *, memory_budget: int = 2 << 30,
          progress: Callable[[str, int, int], None] = lambda what, done, total: None) -> Iterator[SweepStep]:  # fmt: skip
    """Visit `nodes` of `model`'s main graph in topological order; nodes of `reference` are found by their names."""
    namesakes = {node.name: node for node in reference.graph}
    position = {node: index for index, node in enumerate(model.graph)}
    stops = sorted(nodes, key=position.__getitem__)
    with tempfile.TemporaryDirectory(prefix="graphq-sweep-") as folder:
        store = Store(Path(folder), memory_budget)
        feeds = _feeds(calib, BATCH, store)
        current, float_walk = Walk(model, feeds, store), Walk(reference, feeds, store)
        for index, node in enumerate(stops):
            progress("sweep", index, len(stops))
            x_cur, x_raw = current.advance([node.inputs[0], qdq.before_quantizer(node.inputs[0])], keep=node.inputs[1:])
            yield SweepStep(node, x_cur, x_raw, feeds.get(MASK, []), current, float_walk, namesakes.get(node.name))


@dataclass(frozen=True)
class BlockStep:
    """A stop of `sweep_blocks`, before `nodes` have run in the current model; edit them, then go on.

    Attributes:
        end: The value that the block is there for.
        nodes: What has to run for it and has not, each after those that it reads from.
        x_cur: What these read that others made: arrays, one per batch, by the names of the values.
        y_ref: What `end` is in the reference, one array per batch.
        mask: The model input `MASK`, one array per batch; none if the model has no such input.
    """

    end: ir.Value
    nodes: tuple[ir.Node, ...]
    x_cur: Mapping[str, Batches]
    y_ref: Batches
    mask: Batches


def sweep_blocks(model: ir.Model, reference: ir.Model, ends: Sequence[ir.Value], calib: CalibrationSet, *, batch: int = BATCH,
                 memory_budget: int = 2 << 30) -> Iterator[BlockStep]:  # fmt: skip
    """Visit the blocks of `model`'s main graph that end with each of `ends`, in their order; the reference's values by their names.

    Args:
        batch: Samples in a batch.

    Raises:
        ModelError: the reference has no value of that name.
    """
    namesakes = ir.values_by_name(reference.graph)
    unknown = [value.name for value in ends if value.name not in namesakes]
    if unknown:
        raise ModelError("The reference model has no such value.", where=f"value {unknown[0]!r}")
    with tempfile.TemporaryDirectory(prefix="graphq-sweep-") as folder:
        store = Store(Path(folder), memory_budget)
        feeds = _feeds(calib, batch, store)
        current, float_walk = Walk(model, feeds, store), Walk(reference, feeds, store)
        for end in ends:
            (y_ref,) = float_walk.advance([namesakes[end.name or ""]])
            nodes, x_cur = current.waiting(end)
            yield BlockStep(end, tuple(nodes), x_cur, y_ref, feeds.get(MASK, []))
            current.advance([end])


def _feeds(calib: CalibrationSet, size: int, store: Store) -> dict[str, Batches]:
    """The model's inputs, batch by batch."""
    feeds = dict[str, Batches]()
    for batch in calib.batches(size):
        for name, array in batch.items():
            feeds.setdefault(name, []).append(store.put(array))
    return feeds


class Store:
    """Keeps arrays in memory up to a budget and in memory-mapped files above it; sequences and texts always in memory."""

    def __init__(self, folder: Path, budget: int) -> None:
        self.folder, self.budget, self.held, self.files = folder, budget, 0, 0

    def put(self, array: np.ndarray) -> np.ndarray:
        size = _size(array)
        if self.held + size <= self.budget or not isinstance(array, np.ndarray) or array.dtype == object:
            self.held += size
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
                self.held -= _size(array)


def _size(array: np.ndarray | list[np.ndarray]) -> int:
    """Bytes of an array, or of all in a sequence."""
    return sum(map(_size, array)) if isinstance(array, list) else array.nbytes


class Walk:
    """One model's side of the sweep: which nodes have run, and the live tensors. `session` opens the executor of some nodes."""

    def __init__(self, model: ir.Model, feeds: dict[str, Batches], store: Store, session: Session | None = None) -> None:
        self.graph, self.store = model.graph, store
        self.session = session or (lambda fetches, nodes, feeds: Executor(model, fetches, nodes=nodes, feeds=feeds))
        self.done: set[ir.Node] = set()
        self.inputs = {value: feeds[value.name or ""] for value in model.graph.inputs if value.name in feeds}
        self.live: dict[ir.Value, Batches] = dict(self.inputs)

    def advance(self, values: Sequence[ir.Value | None], keep: Sequence[ir.Value | None] = ()) -> list[Batches]:
        """Run what `values` (returned) and `keep` depend on and has not run yet. What neither they nor anybody later need is dropped."""
        asked = [value for value in (*values, *keep) if value is not None]
        due = self._due(asked)
        dynamic = self._dynamic(due)
        self.done.update(dynamic)
        wanted = [value for node in dynamic for value in node.outputs if value in asked or self._is_read_later(value)]
        if wanted:
            self.live.update(self._execute(due, wanted, self.store.put))
        for value in [value for value in self.live if value not in asked and value not in self.inputs and not self._is_read_later(value)]:
            self.store.drop(self.live.pop(value))
        return [self._arrays(value) for value in values if value is not None]

    def peek(self, value: ir.Value) -> Batches:
        """What `value` is now, without counting anything as run."""
        return self._execute(self._due([value]), [value])[value]

    def waiting(self, value: ir.Value) -> tuple[list[ir.Node], dict[str, Batches]]:
        """The nodes that have to run for `value` and have not, and the live tensors that they read, by name."""
        nodes = self._due([value])
        read = dict.fromkeys(one for node in nodes for one in ir.reads(node))
        return nodes, {one.name or "": self.live[one] for one in read if one in self.live}

    def _arrays(self, value: ir.Value) -> Batches:
        """The value for each batch, the same for all if it depends on no input."""
        if value in self.live:
            return self.live[value]
        array = ir.constant(value)
        if array is None:
            assert value.producer() not in self.done, "a step is over when the sweep goes on"
            return self.peek(value)
        return [array] * len(next(iter(self.inputs.values())))

    def _execute(self, nodes: Sequence[ir.Node], wanted: Sequence[ir.Value],
                 put: Callable[[np.ndarray], np.ndarray] = lambda array: array) -> dict[ir.Value, Batches]:  # fmt: skip
        """Values that `nodes` make, for each batch, given to `put` batch by batch, so that no more than one lies in memory."""
        feeds = {value.name or "": arrays for value, arrays in self.live.items()}
        kinds = {name: ir_proto.kind_of(arrays[0]) for name, arrays in feeds.items() if arrays}
        executor = self.session([Fetch(value.name or "") for value in wanted], nodes, kinds)
        count = len(next(iter(feeds.values()), []))
        runs = (executor.run({name: arrays[index] for name, arrays in feeds.items()}) for index in range(count))
        results = [[put(array) for array in run] for run in runs]
        return {value: list(arrays) for value, arrays in zip(wanted, zip(*results, strict=True), strict=True)}

    def _due(self, values: Iterable[ir.Value]) -> list[ir.Node]:
        """The nodes that have to run for `values`, each after those that it reads from."""
        found, stack = dict[ir.Node, None](), [(value.producer(), False) for value in values]
        while stack:
            node, is_ready = stack.pop()
            if node is None or node in self.done or node in found:
                continue
            if is_ready:
                found[node] = None
            else:
                stack.append((node, True))
                stack += [(value.producer(), False) for value in ir.reads(node)]
        return list(found)

    def _dynamic(self, nodes: Sequence[ir.Node]) -> list[ir.Node]:
        """Those of `nodes` that depend on a graph input; what does not runs again with whoever reads it."""
        found = dict[ir.Node, None]()
        for node in nodes:
            makers = [(value, value.producer()) for value in ir.reads(node)]
            if any(value in self.live or value.is_graph_input() or maker in self.done or maker in found for value, maker in makers):
                found[node] = None
        return list(found)

    def _is_read_later(self, value: ir.Value, inside: bool = False) -> bool:
        """Whether a node that has not run reads `value`, or its quantized form: stops may ask for what lies before a quantizer.

        Codes are no such thing (`inside` follows them from what lies before): ONNX Runtime does not hand out those of 4 bits.
        """
        return any(
            self._outer(use.node) not in self.done
            or (
                qdq.is_quantizer(use.node)
                and (inside or use.node.op_type != "DequantizeLinear")
                and self._is_read_later(use.node.outputs[0], inside=True)
            )
            for use in value.uses()
        )

    def _outer(self, node: ir.Node) -> ir.Node:
        """The node of the main graph that holds `node`, which may lie in a subgraph."""
        return node if node.graph is self.graph else self._holders.get(node, node)

    @cached_property
    def _holders(self) -> dict[ir.Node, ir.Node]:
        return {inner: node for node in self.graph for inner in ir.nodes_inside(node)}
