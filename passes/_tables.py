"""Embedding tables: `Gather(table, ids)` becomes `DequantizeLinear(Gather(codes, ids))`, so that only the rows that are read are
converted; runtimes that want a DequantizeLinear right behind every integer constant get it there.

One scale for the whole table, because a row's own scale would have to be looked up as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from graphq import ir, qdq
from graphq.editor import Editor
from graphq.exclude import is_excluded
from graphq.noise import decibel
from graphq.quantizers import Uniform
from graphq.spec import PerTensor, QuantSpec
from graphq.targets import Target

MIN_ROWS = 1024
"""Smaller tables (positions, token types) stay float: they hold little, and what they add stays to the end."""


def lookups(model: ir.Model, exclude: Sequence[str]) -> Iterator[ir.Node]:
    """Gather nodes that read rows of a large constant float table, but for those that a pattern of `exclude` fits."""
    for node in model.graph:
        if node.op_type != "Gather" or node.domain or ir.attribute(node, "axis", 0) != 0 or is_excluded(node, exclude):
            continue
        table = node.inputs[0]
        shape = ir.shape_of(table)
        is_table = (
            table is not None and table.is_initializer() and table.dtype == ir.DataType.FLOAT and shape is not None and len(shape) == 2
        )
        if is_table and int(shape[0]) >= MIN_ROWS and not ir.is_constant(node.inputs[1]):  # type: ignore[index,arg-type]
            yield node


def quantize(edit: Editor, node: ir.Node, spec: QuantSpec, target: Target) -> float:
    """Quantize the table that `node` reads; returns the SQNR of the table in dB."""
    spec = replace(spec, granularity=PerTensor())
    table = ir.constant(node.inputs[0])
    assert table is not None
    quantizer = Uniform(spec)
    qparams = quantizer.fit_weight(table)
    power, noise = quantizer.sums(table, qparams)
    qdq.insert_lookup(edit, node, quantizer.quantize(table, qparams), qparams, spec, after=target.integer_lookup)
    return decibel(power, noise)
