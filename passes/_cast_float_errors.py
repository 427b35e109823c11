"""What half precision costs each node at its own output: twins that read rounded inputs beside the nodes, all in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphq import ir, qdq
from graphq.calibration import CalibrationSet
from graphq.editor import Editor
from graphq.executor import BATCH, Executor, Fetch
from graphq.half import Half
from graphq.noise import decibel
from graphq.passes._cast_float_slots import Slots
from graphq.twins import TWINS_AT_ONCE, Disturbed


def measure(model: ir.Model, nodes: Mapping[ir.Node, Slots], half: Half, data: CalibrationSet) -> dict[ir.Node, float]:
    """Signal over noise in dB of each node's first output, with it and what it reads rounded to half precision.

    Elements that the float32 model makes infinite (masks) are left out. Minus infinity where half precision gives NaN or infinity
    instead of a number.
    """
    probe = _Probe(model, half)
    sums = [probe.sums(node.name or "", slots) for node, slots in nodes.items()]
    executor = Executor(probe.edit.model, [Fetch(name) for pair in sums for name in pair], prepack=False)
    totals = np.zeros(len(sums) * 2)
    for arrays in executor.stream(data.batches(data.fixed_batch or BATCH)):
        totals += [float(array) for array in arrays]
    return {node: decibel(power, noise) if np.isfinite(noise) else -np.inf
            for node, noise, power in zip(nodes, totals[::2], totals[1::2], strict=True)}  # fmt: skip


def effects(
    model: ir.Model, nodes: Mapping[ir.Node, Slots], half: Half, data: CalibrationSet, *, inputs_only: bool = False
) -> dict[ir.Node, float]:
    """Signal over noise in dB at the model's outputs, the worst of them, if one node alone is half. One batch, and a run for each node.

    Quantizers of activations are left out of the model that is disturbed: they would make whole steps of the smallest differences.

    Args:
        inputs_only: The node itself is float32, and so are its constants; only what it reads of others was rounded.
    """
    model = _smooth(model)
    disturbed = Disturbed(model, [node.name or "" for node in nodes])
    batch, found = next(data.batches(data.fixed_batch or BATCH)), dict[ir.Node, float]()
    plains = disturbed.run(batch)
    for start in range(0, len(nodes), TWINS_AT_ONCE):
        probe, some = _Probe(model, half, inputs_only=inputs_only), list(nodes)[start : start + TWINS_AT_ONCE]
        names = [probe.error(node.name or "", nodes[node])[0].name or "" for node in some]
        for node, error in zip(some, Executor(probe.edit.model, [Fetch(name) for name in names], prepack=False).run(batch), strict=True):
            changed = disturbed.run(batch, node.name or "", error)
            found[node] = min(decibel(_power(plain), _power(other - plain)) for plain, other in zip(plains, changed, strict=True))
    return found


def change(model: ir.Model, other: ir.Model, data: CalibrationSet) -> float:
    """Signal over noise in dB of the float outputs of `other` against those of `model`, the worst of them."""
    names = [value.name or "" for value in model.graph.outputs if value.dtype == ir.DataType.FLOAT]
    if not names:
        return np.inf
    executors, totals = [Executor(one, [Fetch(name) for name in names], prepack=False) for one in (model, other)], np.zeros((len(names), 2))
    for batch in data.batches(data.fixed_batch or BATCH):
        plains, changed = (one.run(batch) for one in executors)
        totals += [(_power(a), _power(b - a)) for a, b in zip(plains, changed, strict=True)]
    return min(decibel(power, noise) for power, noise in totals)


def _smooth(model: ir.Model) -> ir.Model:
    """The model without the quantizers of its activations."""
    copy = ir.clone(model)
    edit = Editor(copy)
    for node in [node for node in copy.graph if node.op_type == "DequantizeLinear"]:
        out, source = node.outputs[0], qdq.before_quantizer(node.outputs[0])
        if source is not None and source is not out and not out.is_graph_output():
            edit.replace(out, source)
    return copy


def _power(array: np.ndarray) -> float:
    """Sum of the squares of what is finite: a mask of -inf has none."""
    return float(np.sum(array.astype(np.float64) ** 2, where=np.isfinite(array)))


class _Probe:
    """A clone of a model with rounded twins in it."""

    def __init__(self, model: ir.Model, half: Half, *, inputs_only: bool = False) -> None:
        self.edit, self.half, self.inputs_only = Editor(ir.clone(model)), half, inputs_only
        self.nodes = {node.name or "": node for node in self.edit.model.graph}
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._limit = self.edit.initializer("graphq_largest", np.asarray(np.finfo(np.float32).max))
        self._zero = self.edit.initializer("graphq_zero", np.zeros((), np.float32))

    def sums(self, name: str, slots: Slots) -> tuple[str, str]:
        """Names of the sums of squares of the error and of the output."""
        error, power = (self._after(value, "ReduceSumSquare", [value], {"keepdims": 0}).name or "" for value in self.error(name, slots))
        return error, power

    def error(self, name: str, slots: Slots) -> tuple[ir.Value, ir.Value]:
        """The error of the first output of a node and that output, both 0 where it is infinite."""
        node = self.nodes[name]
        inputs: list[ir.Value | None] = list(node.inputs)
        for index in slots.inputs:
            value = inputs[index]
            assert value is not None
            if self.inputs_only and ir.constant(value) is not None:
                continue
            if value not in self._rounded:
                self._rounded[value] = self._round(value, ir.producer(value))
            inputs[index] = self._rounded[value]
        out = node.outputs[0]
        attributes = {key: entry.value for key, entry in node.attributes.items()}
        copy = self.edit.insert(
            node, node.op_type, inputs, domain=node.domain, output=f"{name}_twin", attributes=attributes, like=out, after=True
        )
        rounded = copy if self.inputs_only else self._round(copy, copy.producer())
        finite = self._after(rounded, "LessOrEqual", [self._after(rounded, "Abs", [out]), self._limit])
        error, plain = (self._after(finite, "Where", [finite, value, self._zero])
                        for value in (self._after(rounded, "Sub", [rounded, out]), out))  # fmt: skip
        return error, plain

    def _round(self, value: ir.Value, maker: ir.Node | None) -> ir.Value:
        after = maker if maker is not None and maker.graph is self.edit.model.graph else None
        casts = [(self.half.code, f"{value.name}_half"), (ir.DataType.FLOAT, f"{value.name}_wide")]
        for code, name in casts:
            value = self.edit.insert(after, "Cast", [value], output=name, attributes={"to": int(code)}, after=after is not None)
            after = value.producer()
        return value

    def _after(self, value: ir.Value, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int] | None = None) -> ir.Value:
        return self.edit.insert(value.producer(), op, inputs, output=f"{value.name}_{op}", attributes=attributes, after=True)
