"""Centre activations for runtimes without zero points: `x W + b = (x - c) W + (b + c W)`.

A symmetric quantizer wastes half of its codes on a range like that of GELU's output, [-0.17, 10]. Subtracting the middle of
the range makes the range symmetric and costs one element-wise operation that compilers fuse into the quantizer (the shift
of SQ-b, MPTQ-ViT, arXiv 2401.14895; METHODS.md 4-4). Zero padding would not be shifted, so convolutions are left alone.
"""

from __future__ import annotations

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.passes import _bias
from graphq.passes._placement import Placement

Range = tuple[float, float]

WORTHWHILE = 1.15
"""Centre only if the symmetric scale gets smaller by this factor."""


def center(edit: Editor, plan: Placement, ranges: dict[ir.Value, Range]) -> int:
    """Shift the values of `plan` where it pays; updates `plan.readers` and `ranges`; returns how many were shifted."""
    shifted = 0
    for value, readers in list(plan.readers.items()):
        low, high = ranges[value]
        anchors = [node for node, _ in readers]
        if (high - low) * WORTHWHILE >= 2 * max(-low, high) or not all(_shiftable(node) for node in anchors):
            continue
        middle = np.float32((low + high) / 2)
        constant = edit.initializer(f"{value.name}_center", middle)
        maker = value.producer()
        moved = edit.insert(maker, "Sub", [value, constant], output=f"{value.name}_centered", like=value, after=maker is not None)
        for node in anchors:
            edit.rewire(node, linear.data_index(node), moved)
            weight = ir.constant(linear.weight_of(node))
            assert weight is not None
            _bias.shift(edit, node, float(middle) * weight.sum(linear.in_axis(node), dtype=np.float64))
        plan.readers = {moved if key is value else key: entry for key, entry in plan.readers.items()}
        ranges[moved] = (low - float(middle), high - float(middle))
        shifted += 1
    return shifted


def _shiftable(node: ir.Node) -> bool:
    plain = ir.attribute(node, "alpha", 1.0) == 1.0 and ir.attribute(node, "beta", 1.0) == 1.0 and not ir.attribute(node, "transA", 0)
    return node.op_type in ("MatMul", "Gemm") and plain and _bias.can_shift(node)
