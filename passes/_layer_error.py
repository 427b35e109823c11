"""What quantizing one layer alone costs at its own output: measured by a quantized twin beside each float layer.

All twins run in one session on float inputs, so that errors do not add up over layers and one pass over a few samples is
enough for the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear, qdq
from graphq.calibration import CalibrationSet
from graphq.editor import Editor
from graphq.executor import BATCH, Executor, Fetch
from graphq.quantizers import QParams
from graphq.spec import QuantSpec


@dataclass(frozen=True)
class LayerError:
    """What quantizing one layer does to its output.

    Attributes:
        sqnr_db: Signal over quantization noise.
        work: The layer's share of the multiply-adds, 0 to 1.
        shift: Mean error of each output channel, float64 of shape (channels,); None if the output's rank is unknown, or 1.
        rows: Positions that the mean was taken over.
    """

    sqnr_db: float
    work: float
    shift: np.ndarray | None
    rows: int


def measure(model: ir.Model, anchors: Sequence[ir.Node], formats: Mapping[str, tuple[QuantSpec, QParams]], weight: QuantSpec,
            data: CalibrationSet) -> dict[str, LayerError]:  # fmt: skip
    """Error of each of `anchors` (by name) with its input (as `formats` says, by value name) and its weight (as `weight`) quantized."""
    probe = ir.clone(model)
    edit = Editor(probe)
    wanted = {node.name for node in anchors}
    twins = {node.name or "": _add_twin(edit, node, formats, weight) for node in list(probe.graph) if node.name in wanted}
    fetches = [name for names in twins.values() for name in names]
    executor = Executor(probe, [Fetch(name) for name in fetches])
    totals: dict[str, np.ndarray] = {name: np.zeros(()) for name in fetches}
    samples = 0
    for batch in data.batches(BATCH):
        samples += len(next(iter(batch.values())))
        for name, array in zip(fetches, executor.run(batch), strict=True):
            totals[name] = totals[name] + array.astype(np.float64)
    work = {node.name or "": linear.multiply_adds(node) for node in anchors}
    whole = sum(work.values()) or 1.0
    found = {}
    for name, (noise, power, size, *shift) in twins.items():
        sqnr = 10 * float(np.log10(max(float(totals[power]), 1e-30) / max(float(totals[noise]), 1e-30)))
        channels = totals[shift[0]].size if shift else 1
        rows = int(totals[size]) // max(channels, 1)
        found[name] = LayerError(sqnr, work[name] / whole, totals[shift[0]].reshape(-1) / max(rows, 1) if shift else None, rows)
    return found


def _add_twin(edit: Editor, node: ir.Node, formats: Mapping[str, tuple[QuantSpec, QParams]], weight: QuantSpec) -> list[str]:
    """A quantized copy of `node` beside it; returns the names of its noise, power, output size and summed channel error."""
    data, plain = linear.data_of(node), node.outputs[0]
    attributes = {key: entry.value for key, entry in node.attributes.items()}
    out = edit.insert(node, node.op_type, list(node.inputs), output=f"{node.name}_twin", attributes=attributes, after=True)
    twin = out.producer()
    assert twin is not None
    spec, qparams = formats[data.name or ""]
    qdq.insert_pair(edit, data, qparams, spec, [(twin, linear.data_index(node))])
    qdq.insert_weight(edit, twin, qdq.spec_for_weight(twin, weight))
    error = edit.insert(twin, "Sub", [out, plain], output=f"{node.name}_error", after=True)

    def reduce(op: str, value: ir.Value, part: str, axes: Sequence[int] | None = None) -> str:
        operands = [value] if axes is None else [value, edit.initializer(f"{node.name}_{part}_axes", np.array(axes, np.int64))]
        attributes = {} if op == "Size" else {"keepdims": 0}
        return edit.insert(error.producer(), op, operands, output=f"{node.name}_{part}", attributes=attributes, after=True).name or ""

    names = [reduce("ReduceSumSquare", error, "noise"), reduce("ReduceSumSquare", plain, "power"), reduce("Size", plain, "size")]
    if plain.shape is not None and len(plain.shape) > 1:
        rank = len(plain.shape)
        names.append(reduce("ReduceSum", error, "shift", [axis for axis in range(rank) if axis != linear.channel_axis(node) % rank]))
    return names
