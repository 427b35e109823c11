"""MatMul and Gemm layers that read tokens: rows along the last axis, which is the one they sum over."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphq import ir, linear, precision, stored
from graphq.calibration import CalibrationSet
from graphq.exclude import is_excluded
from graphq.executor import BATCH, Executor, Fetch, decode
from graphq.pipeline import PassContext
from graphq.precision import Bits

TokenLayers = dict[tuple[ir.Value, int], list[ir.Node]]
"""The layers that read one activation, by it and the bits that it shall get."""

SAMPLES, ROWS = 64, 32
"""Samples that errors are measured on, and rows of a batch of them, at most."""

def find(model: ir.Model, ctx: PassContext, exclude: Sequence[str], bits: int) -> TokenLayers:
    """Layers of the main graph with a constant weight, float or dequantized; others are skipped with the reason.

    Args:
        exclude: Patterns (`*`, `?`) of node names or operator types that are left alone.
        bits: Width of activations for layers that do not ask for another (see `graphq.precision`).
    """
    found: TokenLayers = {}
    for node in model.graph:
        if node.domain or node.op_type not in linear.LINEAR_OPS:
            continue
        width = precision.asked(node, Bits(None, bits)).activation
        reason = _refusal(node, exclude)
        if reason is None and width is not None:
            found.setdefault((linear.data_of(node), width), []).append(node)
        else:
            ctx.skip(node, reason or "it asks for float activations")
    return found


def _refusal(node: ir.Node, exclude: Sequence[str]) -> str | None:
    if is_excluded(node, exclude):
        return "excluded by the recipe"
    if node.op_type not in ("MatMul", "Gemm"):
        return "a position of its output sums over several rows, so that rows cannot have scales of their own"
    if ir.attribute(node, "transA", 0):
        return "its data is transposed, so that rows are channels"
    if not stored.is_fixed(linear.weight_of(node)):
        return "its weight is not a constant of the graph"
    data = linear.data_of(node)
    if stored.is_fixed(data) or not ir.is_float(data):
        return "its data input is not a float32 activation"
    maker = data.producer()
    if maker is not None and (maker.op_type == "DequantizeLinear" or maker.domain == ir.DOMAIN):
        return "its data input is quantized already"
    return None


def rows(model: ir.Model, values: Sequence[ir.Value], data: CalibrationSet) -> dict[ir.Value, np.ndarray]:
    """Rows of each value, float32 of shape (rows, D): up to `ROWS` of each batch of the first `SAMPLES` of `data`, evenly spread."""
    parts: dict[ir.Value, list[np.ndarray]] = {value: [] for value in values}
    executor = Executor(model, [Fetch(value.name or "") for value in parts])
    for batch in data.take(SAMPLES).batches(BATCH):
        for value, array in zip(parts, executor.run(batch), strict=True):
            tokens = array.reshape(-1, array.shape[-1])
            parts[value].append(tokens[np.linspace(0, len(tokens) - 1, min(ROWS, len(tokens))).astype(int)])
    return {value: np.concatenate(arrays) for value, arrays in parts.items()}


def matrix(model: ir.Model, node: ir.Node) -> np.ndarray:
    """The weight of a MatMul or Gemm as [D, O], float32; it may be stored as codes."""
    value = linear.weight_of(node)
    assert value is not None
    array = decode(model, value)
    return array.T if linear.in_axis(node) else array
