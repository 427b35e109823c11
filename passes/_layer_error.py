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
from graphq.executor import Executor, Fetch
from graphq.quantizers import QParams
from graphq.targets import Target


@dataclass(frozen=True)
class LayerError:
    """`sqnr_db`: signal over quantization noise at the layer's output. `work`: its share of the multiply-adds, 0 to 1."""

    sqnr_db: float
    work: float


def measure(model: ir.Model, anchors: Sequence[ir.Node], qparams: Mapping[str, QParams], target: Target, data: CalibrationSet,
            batch: int = 8) -> dict[str, LayerError]:  # fmt: skip
    """Error of each of `anchors` (by name) with its input (`qparams` by value name) and its weight quantized."""
    probe = ir.clone(model)
    edit = Editor(probe)
    twins = {}
    names = {node.name for node in anchors}
    for node in [node for node in probe.graph if node.name in names]:
        twins[node.name or ""] = _add_twin(edit, node, qparams, target)
    fetches = [Fetch(value) for pair in twins.values() for value in pair]
    executor = Executor(probe, fetches)
    totals = sum(np.array([float(array) for array in arrays]) for arrays in executor.stream(data.batches(batch)))
    work = {node.name or "": _multiply_adds(node) for node in anchors}
    whole = sum(work.values()) or 1.0
    noise_and_power = np.asarray(totals, np.float64).reshape(-1, 2)
    return {
        name: LayerError(10 * float(np.log10(max(power, 1e-30) / max(noise, 1e-30))), work[name] / whole)
        for name, (noise, power) in zip(twins, noise_and_power, strict=True)
    }


def _add_twin(edit: Editor, node: ir.Node, qparams: Mapping[str, QParams], target: Target) -> tuple[str, str]:
    """A quantized copy of `node` beside it; returns the names of the scalars noise and power."""
    data = node.inputs[linear.LINEAR_OPS[node.op_type].data]
    assert data is not None
    attributes = {key: entry.value for key, entry in node.attributes.items()}
    out = edit.insert(node, node.op_type, list(node.inputs), output=f"{node.name}_twin", attributes=attributes, after=True)
    twin = out.producer()
    assert twin is not None
    qdq.insert_pair(edit, data, qparams[data.name or ""], target.activation, [(twin, linear.LINEAR_OPS[node.op_type].data)])
    qdq.insert_weight(edit, twin, qdq.spec_for_weight(twin, target.weight))
    error = edit.insert(twin, "Sub", [out, node.outputs[0]], output=f"{node.name}_error", after=True)
    scalars = []
    for part, value in (("noise", error), ("power", node.outputs[0])):
        scalar = edit.insert(error.producer(), "ReduceSumSquare", [value], output=f"{node.name}_{part}", attributes={"keepdims": 0}, after=True)
        scalars.append(scalar.name or "")
    return scalars[0], scalars[1]


def _multiply_adds(node: ir.Node) -> float:
    """Multiply-adds of one sample, up to unknown dimensions: weight size times output positions."""
    weight = linear.weight_of(node)
    shape = ir.shape_of(node.outputs[0]) or ()
    positions = shape[2:] if node.op_type in ("Conv", "ConvTranspose") else shape[1:-1]
    size = np.prod(tuple(weight.const_value.shape), dtype=np.float64) if weight is not None and weight.const_value is not None else 0.0
    return float(size * np.prod([dim if isinstance(dim, int) else 1 for dim in positions], dtype=np.float64))
