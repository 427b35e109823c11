"""The QuantizeLinear and DequantizeLinear on an activation's edge, read back as the quantizer that `qdq.insert_pair` wrote."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphq import ir
from graphq.quantizers import QParams, Uniform
from graphq.spec import QuantSpec


@dataclass(frozen=True)
class Pair:
    """One quantizer for a whole tensor.

    Attributes:
        source: The float value that is quantized.
        head: The node that reads it: the QuantizeLinear, or before it the Clip of a width that ONNX does not store.
        quantizer, qparams: What the nodes compute.
    """

    source: ir.Value
    head: ir.Node
    quantizer: Uniform
    qparams: QParams


def read(value: ir.Value) -> Pair | None:
    """The pair whose DequantizeLinear makes `value`.

    None if there is none, if other nodes stand inside it or read its codes, or if its scale is not one constant.
    """
    last = value.producer()
    first = ir.producer(last.inputs[0]) if last is not None and last.op_type == "DequantizeLinear" else None
    if last is None or first is None or first.op_type != "QuantizeLinear" or len(ir.uses(first.outputs[0])) != 1 or len(first.inputs) < 3:
        return None
    scale, zero = (ir.constant(entry) for entry in first.inputs[1:3])
    kind = first.inputs[2].dtype if first.inputs[2] is not None else None
    if list(last.inputs[1:]) != list(first.inputs[1:]) or scale is None or zero is None or scale.size != 1 or kind is None:
        return None
    if not kind.is_integer() or kind.bitwidth > 8:
        return None
    qparams = QParams(scale.astype(np.float32).reshape(()), zero.astype(np.int32).reshape(()))
    clip = ir.producer(first.inputs[0])
    bits = _clipped_bits(clip, float(scale.item()), kind.bitwidth)
    head = first if bits is None or clip is None else clip
    quantizer = Uniform(QuantSpec(bits or kind.bitwidth, signed=kind.is_signed(), symmetric=False))
    source = head.inputs[0]
    return None if source is None else Pair(source, head, quantizer, qparams)


def _clipped_bits(clip: ir.Node | None, scale: float, storage_bits: int) -> int | None:
    """The width that `clip` leaves of `storage_bits`; None if it clips something else than codes."""
    if clip is None or clip.op_type != "Clip" or len(clip.inputs) < 3 or len(ir.uses(clip.outputs[0])) != 1:
        return None
    low, high = (ir.constant(entry) for entry in clip.inputs[1:3])
    if low is None or high is None:
        return None
    bits = float(np.log2((high.item() - low.item()) / scale + 1))
    return round(bits) if round(bits) < storage_bits and abs(bits - round(bits)) < 1e-3 else None
