"""Zero points for runtimes without them: `Q(x) W + b = (Q(x) + z s) W + (b - z s colsum(W))`.

A symmetric quantizer wastes half of its codes on a range like that of GELU's output, [-0.17, 10]. Adding `z s`, the zero point
of the asymmetric quantizer in units of x, gives codes that are the same integers with zero point 0; what that adds to the
output is constant and goes into the bias. One element-wise operation that compilers fuse into the quantizer (the shift of
SQ-b, MPTQ-ViT, arXiv 2401.14895). Zero padding would not be shifted, so convolutions are left alone.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.passes import _bias
from graphq.quantizers import QParams

WORTHWHILE = 1.15
"""Centre only if that makes the scale smaller by this factor."""


def is_worthwhile(low: float, high: float) -> bool:
    """Whether `[low, high]` (extended to contain 0) is so one-sided that a zero point pays."""
    low, high = min(low, 0.0), max(high, 0.0)
    return (high - low) * WORTHWHILE < 2 * max(-low, high)


def insert(edit: Editor, value: ir.Value, qparams: QParams) -> tuple[ir.Value, QParams]:
    """`value + z s`, and the qparams with zero point 0 that give it the codes that `qparams` give to `value`."""
    offset = edit.initializer(f"{value.name}_offset", _offset(qparams))
    maker = value.producer()
    moved = edit.insert(maker, "Add", [value, offset], output=f"{value.name}_centered", like=value, after=maker is not None)
    return moved, replace(qparams, zero_point=np.zeros_like(qparams.zero_point))


def compensate(edit: Editor, node: ir.Node, activation: QParams, weight: np.ndarray) -> None:
    """Take `z s colsum(W)` out of the bias of `node`, with `weight` as it will be once it is quantized."""
    _bias.shift(edit, node, -float(_offset(activation)) * weight.sum(linear.in_axis(node), dtype=np.float64))


def _offset(qparams: QParams) -> np.ndarray:
    return np.float32(qparams.zero_point) * qparams.scale
