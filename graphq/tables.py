"""Facts about embedding tables: which nodes look rows up in one, whether passes make codes of it, and whether one is codes already."""

from __future__ import annotations

from graphq import ir

MIN_ROWS = 1024
"""Smaller tables (positions, token types) stay float: they hold little, and what they add stays to the end."""


def is_lookup(node: ir.Node) -> bool:
    """Whether `node` is a Gather of rows, not known before, of a constant float32 matrix."""
    if node.op_type != "Gather" or node.domain or ir.attribute(node, "axis", 0) != 0:
        return False
    table = node.inputs[0]
    is_table = table is not None and table.is_initializer() and table.dtype == ir.DataType.FLOAT and len(ir.shape_of(table) or ()) == 2
    return is_table and not ir.is_constant(node.inputs[1])


def refusal(node: ir.Node) -> str | None:
    """Why the table that the lookup `node` reads stays float; None if it does not."""
    rows = ir.constant_shape(node.inputs[0])[0]  # type: ignore[arg-type]
    return f"its table has {rows} rows, and tables of fewer than {MIN_ROWS} hold little" if rows < MIN_ROWS else None


def codes_of(node: ir.Node) -> ir.Value | None:
    """The codes that `node` looks rows up in, dequantized before it or after it; None if it does not."""
    if node.op_type != "Gather" or node.domain or not node.inputs:
        return None
    table, maker = node.inputs[0], ir.producer(node.inputs[0])
    if maker is not None:
        codes = maker.inputs[0] if maker.op_type == "DequantizeLinear" else None
    else:
        codes = table if any(use.node.op_type == "DequantizeLinear" and use.idx == 0 for use in ir.uses(node.outputs[0])) else None
    return codes if codes is not None and codes.is_initializer() else None
