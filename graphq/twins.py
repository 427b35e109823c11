"""What quantizing a layer costs, at its own output and at the model's: measured with quantized twins beside the float layers.

A twin is a copy of a layer with its weight, its activation or both quantized. It reads the same float values as the layer,
so that errors do not add up over layers, and all twins of all layers run at once: one pass over a few samples is enough for the
whole model, whatever the number of layers and of widths. The session of that pass holds the whole model, whatever the memory budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear, qdq
from graphq.calibration import CalibrationSet
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.executor import BATCH, THREADS, WORKERS, Executor, Feeds, Fetch
from graphq.noise import decibel, row_weights
from graphq.pipeline import Progress, no_progress
from graphq.quantizers import Format, Uniform
from graphq.spec import QuantSpec

FEW_RUNS = 4
"""Batches for which a session is not worth preparing."""

TWINS_AT_ONCE = 16
"""Twins whose errors `effects` holds in memory at a time."""


@dataclass(frozen=True, eq=False)
class Twin:
    """A quantized copy of a layer: `weight` and `activation` say how, None leaves that side float.

    Attributes:
        layer: Name of the node.
        weight: Format of its weight, with the axis that fits it (`qdq.spec_for_weight`); qparams are min-max.
        activation: Format and qparams of the value that it reads.
    """

    layer: str
    weight: QuantSpec | None = None
    activation: Format | None = None


@dataclass(frozen=True, eq=False)
class LayerError:
    """How far a layer's output is from that of the float layer.

    Attributes:
        noise: Sum of the squared differences over all samples; rows with massive activations count less (see `graphq.noise`).
        power: Sum of the squares of the float output, in the same way.
        shift: Mean difference of each output channel, float64 of shape (channels,); None if the output's rank is unknown, or 1.
        rows: Positions that the mean was taken over.
        trust: What to multiply `shift` by for the least squared error on other samples, 0 to 1; 1 if it cannot be told.
    """

    noise: float
    power: float
    shift: np.ndarray | None
    rows: int
    trust: float = 1.0

    @property
    def relative(self) -> float:
        """Noise over power."""
        return self.noise / max(self.power, 1e-30)

    @property
    def sqnr_db(self) -> float:
        return decibel(self.power, self.noise)


def measure(model: ir.Model, twins: Sequence[Twin], data: CalibrationSet, progress: Progress = no_progress) -> list[LayerError]:
    """The error of each twin against its float layer, both fed with what the float model computes."""
    if not twins:
        return []
    probe = _Probe(model)
    for twin in twins:
        probe.sum_up(probe.twin_error(twin), probe.layers[twin.layer].outputs[0])
    return probe.run(data, progress)


def measure_together(
    model: ir.Model, twins: Sequence[Twin], data: CalibrationSet, progress: Progress = no_progress
) -> list[tuple[LayerError, LayerError]]:
    """For each layer of `twins`, one a layer, two errors in a model where all of them are quantized.

    The first is what the layer inherits: its output error if everything before it is quantized, but not itself; the second
    is its output error with itself quantized as well.
    """
    probe = _Probe(model)
    second = probe.double()
    for twin in twins:
        plain, layer = probe.layers[twin.layer].outputs[0], second[twin.layer]
        probe.sum_up(probe.difference(probe.copy(layer), plain), plain)
        probe.quantize(layer, twin)
        probe.sum_up(probe.difference(layer, plain), plain)
    found = probe.run(data, progress)
    return list(zip(found[::2], found[1::2], strict=True))


def effects(model: ir.Model, twins: Sequence[Twin], data: CalibrationSet, progress: Progress = no_progress) -> np.ndarray:
    """What each twin alone does to the model's outputs, if it takes the place of its layer.

    The model runs once for each twin, so a few samples must do: on images, four rank layers nearly as well as many.

    Returns:
        Noise over power, mean over the float outputs; float64 of shape (twins,).

    Raises:
        ModelError: no output is float.
    """
    disturbed = Disturbed(model, [twin.layer for twin in twins])
    plains = [disturbed.run(batch) for batch in data.batches(BATCH)]
    noise, power = np.zeros((len(twins), len(disturbed.outputs))), np.sum([[_power(array) for array in plain] for plain in plains], axis=0)
    done = 0
    for start in range(0, len(twins), TWINS_AT_ONCE):
        probe = _Probe(model)
        errors = [probe.twin_error(twin) for twin in twins[start : start + TWINS_AT_ONCE]]
        executor = Executor(probe.model, [Fetch(error.name or "") for error in errors])
        for batch, plain in zip(data.batches(BATCH), plains, strict=True):
            for index, array in enumerate(executor.run(batch), start):
                changed = disturbed.run(batch, twins[index].layer, array)
                with np.errstate(invalid="ignore"):
                    noise[index] += [_power(one - other) for one, other in zip(changed, plain, strict=True)]
            done += len(errors) * len(next(iter(batch.values())))
            progress("measure effects", done, len(twins) * len(data))
    return np.asarray((noise / np.maximum(power, 1e-30)).mean(1))


def _power(array: np.ndarray) -> float:
    """Sum of the squares of what is finite: a mask of -inf has none."""
    return float(np.sum(array.astype(np.float64) ** 2, where=np.isfinite(array)))


class Disturbed:
    """A model with an error added to the output of one layer at a time; one session serves all layers."""

    def __init__(self, model: ir.Model, layers: Iterable[str]) -> None:
        self.outputs = [value.name or "" for value in model.graph.outputs if ir.is_float(value)]
        if not self.outputs:
            raise ModelError("The model has no float output whose error could be measured.", expected="an output of type float32")
        probe = _Probe(model)
        self._inputs = {layer: probe.add_error_input(probe.layers[layer]) for layer in dict.fromkeys(layers)}
        self._executor = Executor(probe.model, [Fetch(name) for name in self.outputs])

    def run(self, feeds: Feeds, layer: str = "", error: np.ndarray | None = None) -> list[np.ndarray]:
        """The float outputs, with `error` added to the output of `layer`."""
        errors = {name: np.zeros((), np.float32) for name in self._inputs.values()}
        if error is not None:
            errors[self._inputs[layer]] = error
        return self._executor.run({**feeds, **errors})


@dataclass(frozen=True)
class _Sums:
    """Names of the reductions behind one `LayerError`: sums over channels, or (of convolutions) over everything.

    `shift` is empty where there is none.
    """

    noise: str
    power: str
    size: str
    shift: str


class _Probe:
    """A clone of a model with twins in it, and sums over their errors that are reduced inside the graph."""

    def __init__(self, model: ir.Model) -> None:
        self.model = ir.clone(model)
        self.edit = Editor(self.model)
        self.layers = {node.name or "": node for node in self.model.graph}
        self._sums: list[_Sums] = []
        self._reduced: dict[tuple[ir.Value, str], str] = {}
        self._pairs: dict[tuple[ir.Value, QuantSpec, bytes, bytes], ir.Value] = {}

    def twin_error(self, twin: Twin) -> ir.Value:
        """Output of the twin, minus that of its layer."""
        layer = self.layers[twin.layer]
        copy = self.copy(layer)
        self.quantize(copy, twin)
        return self.difference(copy, layer.outputs[0])

    def copy(self, node: ir.Node) -> ir.Node:
        """A second node that computes the same, right after `node`."""
        attributes = {key: entry.value for key, entry in node.attributes.items()}
        out = self.edit.insert(node, node.op_type, list(node.inputs), output=f"{node.name}_twin", attributes=attributes, after=True)
        made = out.producer()
        assert made is not None
        return made

    def quantize(self, node: ir.Node, twin: Twin) -> None:
        """Let `node` read its weight and its activation as `twin` says; nodes that read one value alike share its quantizer."""
        if twin.weight is not None:
            index, quantizer = linear.LINEAR_OPS[node.op_type].weight, Uniform(twin.weight)
            value = node.inputs[index]
            weight = ir.constant(value)
            assert value is not None and weight is not None, "twins are of layers with constant weights"
            rounded = self.edit.shared((value, twin.weight), f"{value.name}_rounded",
                                       lambda: quantizer.fake_quantize(weight, quantizer.fit_weight(weight)), "float32")  # fmt: skip
            self.edit.rewire(node, index, rounded)
        if twin.activation is None:
            return
        spec, qparams = twin.activation
        data, index = linear.data_of(node), linear.data_index(node)
        key = (data, spec, qparams.scale.tobytes(), qparams.zero_point.tobytes())
        if key in self._pairs:
            self.edit.rewire(node, index, self._pairs[key])
        else:
            self._pairs[key] = qdq.insert_pair(self.edit, data, qparams, spec, [(node, index)])

    def difference(self, node: ir.Node, plain: ir.Value) -> ir.Value:
        """Output of `node`, minus `plain`, which is computed before it."""
        return self.edit.insert(node, "Sub", [node.outputs[0], plain], output=f"{node.name}_error", like=plain, after=True)

    def double(self) -> dict[str, ir.Node]:
        """A second copy of all nodes behind the first, on the same inputs and constants; by the names of the first."""
        graph, other = self.model.graph, ir.clone(self.model).graph
        ours = ir.values_by_name(graph)
        for value in [*other.inputs, *other.initializers.values()]:
            value.replace_all_uses_with(ours[value.name or ""])
        found = {}
        for node in list(other):
            found[node.name or ""] = node
            other.remove(node)
            node.name = self.edit.unique(node.name or "node")
            for out in node.outputs:
                out.name = self.edit.unique(out.name or "")
            graph.append(node)
        return found

    def add_error_input(self, node: ir.Node) -> str:
        """Let everybody who reads the output of `node` read it with a new model input added; returns the name of that."""
        out = node.outputs[0]
        given = ir.Value(name=self.edit.unique(f"{node.name}_error"), type=ir.tensor_type("float32"))
        self.model.graph.inputs.append(given)
        readers = [(use.node, use.idx) for use in ir.uses(out)]
        moved = self.edit.insert(node, "Add", [out, given], output=f"{node.name}_disturbed", like=out, after=True)
        for reader, index in readers:
            self.edit.rewire(reader, index, moved)
        if out.is_graph_output():
            self.edit.replace_output(out, moved)
        return given.name or ""

    def sum_up(self, error: ir.Value, plain: ir.Value) -> None:
        """Take the sums that make a `LayerError` of `error`, the difference from `plain`."""
        rank, shift, along = None if plain.shape is None else len(plain.shape), "", None
        if rank is not None and rank > 1:
            channel = linear.channel_axis(plain.producer()) % rank  # type: ignore[arg-type]
            shift = self._reduce("ReduceSum", error, error, [axis for axis in range(rank) if axis != channel])
            along = [channel] if channel == rank - 1 else None
        noise, power = (self._reduce("ReduceSumSquare", value, error, along) for value in (error, plain))
        self._sums.append(_Sums(noise, power, self._reduce("Size", plain, error), shift))

    def _reduce(self, op: str, value: ir.Value, after: ir.Value, axes: Sequence[int] | None = None) -> str:
        """Name of `value` reduced by `op`, computed after the value `after`."""
        if (value, op) not in self._reduced:
            operands, name = [value], f"{value.name}_{op}"
            if axes is not None:
                operands.append(self.edit.shared(tuple(axes), f"{name}_axes", lambda: np.array(axes, np.int64), "int64"))
            attributes = {} if op == "Size" else {"keepdims": 0}
            made = self.edit.insert(after.producer(), op, operands, output=name, attributes=attributes, after=True)
            self._reduced[value, op] = made.name or ""
        return self._reduced[value, op]

    def run(self, data: CalibrationSet, progress: Progress) -> list[LayerError]:
        """The sums over all of `data`, in the order they were asked for."""
        fetches = list(self._reduced.values())
        size = data.fixed_batch or BATCH // WORKERS
        executor = Executor(self.model, [Fetch(name) for name in fetches], threads=THREADS, prepack=len(data) > FEW_RUNS * size)
        found: dict[str, list[np.ndarray]] = {name: [] for name in fetches}
        for index, arrays in enumerate(executor.stream(data.batches(size))):
            for name, array in zip(fetches, arrays, strict=True):
                found[name].append(array.astype(np.float64))
            progress("measure layers", min((index + 1) * size, len(data)), len(data))
        return [_layer_error(found, sums) for sums in self._sums]


def _layer_error(found: Mapping[str, list[np.ndarray]], sums: _Sums) -> LayerError:
    error, power = (np.concatenate([array.reshape(-1) for array in found[name]]) for name in (sums.noise, sums.power))
    weights = row_weights(power) if found[sums.noise][0].ndim else np.ones(len(power))
    with np.errstate(invalid="ignore"):  # NaN is an answer, too
        error, power = error @ weights, power @ weights
    if not sums.shift:
        return LayerError(float(error), float(power), None, int(np.sum(found[sums.size])))
    totals = np.array(found[sums.shift])
    rows = np.array([int(size) // max(totals.shape[1], 1) for size in found[sums.size]])
    return LayerError(float(error), float(power), totals.sum(0) / max(rows.sum(), 1), int(rows.sum()), _trust(totals, rows))


def _trust(totals: np.ndarray, rows: np.ndarray) -> float:
    """How far the means of the batches agree: `1 - variance of their mean / its square`, over all channels (James and Stein).

    Args:
        totals: Sum of each channel in each batch, float64 [batches, channels].
        rows: Positions of each batch.
    """
    if len(rows) < 2 or not rows.all():
        return 1.0
    means, mean = totals / rows[:, None], totals.sum(0) / rows.sum()
    variance = np.mean((means - mean) ** 2) / (len(rows) - 1)
    return float(max(0.0, 1 - variance / max(float(np.mean(mean**2)), 1e-30)))
