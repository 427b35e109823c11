"""What passes that store weights need to know of them besides their numbers."""

from __future__ import annotations

from graphq import ir, linear


def not_grouped(node: ir.Node, group_size: int) -> str | None:
    """Why the weight of `node` cannot have a scale for each `group_size` of its inputs; None if it can, or for no groups (0)."""
    shape = ir.constant_shape(linear.weight_of(node))
    if not group_size:
        return None
    if len(shape) != 2:
        return "groups along the reduction axis need a matrix, this weight has kernel positions"
    size = shape[linear.in_axis(node)]
    return f"its {size} inputs are not a multiple of the group size {group_size}" if size % group_size else None
