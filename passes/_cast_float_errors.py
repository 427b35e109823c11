"""What half precision costs each node at its own output: twins that read rounded inputs beside the nodes, all in one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from graphq import ir
from graphq.calibration import CalibrationSet
from graphq.editor import Editor
from graphq.executor import BATCH, Executor, Fetch
from graphq.half import Half, Slots
from graphq.noise import decibel


def measure(model: ir.Model, nodes: Mapping[ir.Node, Slots], half: Half, data: CalibrationSet) -> dict[ir.Node, float]:
    """Signal over noise in dB of each node's first output, with it and what it reads rounded to half precision.

    Elements that the float32 model makes infinite (masks) are left out. Minus infinity where half precision gives NaN or infinity
    instead of a number.
    """
    probe = _Probe(model, half)
    sums = [probe.twin(node.name or "", slots) for node, slots in nodes.items()]
    executor = Executor(probe.edit.model, [Fetch(name) for pair in sums for name in pair], prepack=False)
    totals = np.zeros(len(sums) * 2)
    for arrays in executor.stream(data.batches(data.fixed_batch or BATCH)):
        totals += [float(array) for array in arrays]
    return {node: decibel(power, noise) if np.isfinite(noise) else -np.inf
            for node, noise, power in zip(nodes, totals[::2], totals[1::2], strict=True)}  # fmt: skip


class _Probe:
    """A clone of a model with rounded twins in it."""

    def __init__(self, model: ir.Model, half: Half) -> None:
        self.edit, self.half = Editor(ir.clone(model)), half
        self.nodes = {node.name or "": node for node in self.edit.model.graph}
        self._rounded: dict[ir.Value, ir.Value] = {}
        self._limit = self.edit.initializer("graphq_largest", np.asarray(np.finfo(np.float32).max))
        self._zero = self.edit.initializer("graphq_zero", np.zeros((), np.float32))

    def twin(self, name: str, slots: Slots) -> tuple[str, str]:
        """Names of the sums of squares of the error and of the output."""
        node = self.nodes[name]
        inputs: list[ir.Value | None] = list(node.inputs)
        for index in slots.inputs:
            value = inputs[index]
            assert value is not None
            if value not in self._rounded:
                self._rounded[value] = self._round(value, ir.producer(value))
            inputs[index] = self._rounded[value]
        out = node.outputs[0]
        attributes = {key: entry.value for key, entry in node.attributes.items()}
        copy = self.edit.insert(node, node.op_type, inputs, output=f"{name}_twin", attributes=attributes, like=out, after=True)
        rounded = self._round(copy, copy.producer())
        finite = self._after(rounded, "LessOrEqual", [self._after(rounded, "Abs", [out]), self._limit])
        error, power = (self._after(finite, "Where", [finite, value, self._zero])
                        for value in (self._after(rounded, "Sub", [rounded, out]), out))  # fmt: skip
        names = [self._after(value, "ReduceSumSquare", [value], {"keepdims": 0}).name or "" for value in (error, power)]
        return names[0], names[1]

    def _round(self, value: ir.Value, maker: ir.Node | None) -> ir.Value:
        after = maker if maker is not None and maker.graph is self.edit.model.graph else None
        casts = [(self.half.code, f"{value.name}_half"), (ir.DataType.FLOAT, f"{value.name}_wide")]
        for code, name in casts:
            value = self.edit.insert(after, "Cast", [value], output=name, attributes={"to": int(code)}, after=after is not None)
            after = value.producer()
        return value

    def _after(self, value: ir.Value, op: str, inputs: Sequence[ir.Value], attributes: Mapping[str, int] | None = None) -> ir.Value:
        return self.edit.insert(value.producer(), op, inputs, output=f"{value.name}_{op}", attributes=attributes, after=True)
