"""What quantizing each layer alone costs at its own output, with both sides in the formats that `insert-qdq` is about to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear, qdq, twins
from graphq.calibration import CalibrationSet
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
    pairs = [twins.Twin(node.name or "", qdq.spec_for_weight(node, weight), formats[linear.data_of(node).name or ""]) for node in anchors]
    work = [linear.multiply_adds(node) for node in anchors]
    return {
        twin.layer: LayerError(error.sqnr_db, own / (sum(work) or 1.0), error.shift, error.rows)
        for twin, error, own in zip(pairs, twins.measure(model, pairs, data), work, strict=True)
    }
