"""Embedding tables: `Gather(table, ids)` becomes `DequantizeLinear(Gather(codes, ids))`, so that only the rows that are read are
converted; runtimes that want a DequantizeLinear right behind every integer constant get it there.

One scale for the whole table, because a row's own scale would have to be looked up as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graphq import ir, qdq, tables
from graphq.editor import Editor
from graphq.exclude import is_excluded
from graphq.noise import decibel
from graphq.pipeline import PassContext
from graphq.quantizers import Uniform
from graphq.spec import PerTensor, QuantSpec
from graphq.targets import Target


def any_large(model: ir.Model, exclude: Sequence[str]) -> bool:
    """Whether there is a table that `quantize_all` quantizes."""
    return any(_refusal(node, exclude) is None for node in model.graph if tables.is_lookup(node))


def quantize_all(model: ir.Model, ctx: PassContext, spec: QuantSpec, exclude: Sequence[str]) -> None:
    """Quantize the large embedding tables of `model`, but for those that a pattern of `exclude` fits."""
    for node in [node for node in model.graph if tables.is_lookup(node)]:
        if reason := _refusal(node, exclude):
            ctx.skip(node, reason)
        else:
            ctx.measure(node.name or "", weight_sqnr_db=quantize(ctx.edit, node, spec, ctx.target))


def _refusal(node: ir.Node, exclude: Sequence[str]) -> str | None:
    return "excluded by the recipe" if is_excluded(node, exclude) else tables.refusal(node)


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
