"""Latency of single layers, float and quantized: each is a little model of its own, which the runtime may fuse as it likes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from graphq import ir, linear, qdq
from graphq.editor import Editor
from graphq.executor import Executor, Fetch
from graphq.precision import Bits
from graphq.quantizers import QParams
from graphq.spec import QuantSpec
from graphq.targets import Target
from graphq.verify import measure_latency

FLOAT = Bits(None, None)

Activations = Mapping[Bits, tuple[QuantSpec, QParams] | None]


def milliseconds(model: ir.Model, layer: str, x: np.ndarray, activations: Activations, target: Target) -> dict[Bits, float]:
    """Latency of a layer in ms, for `FLOAT` and each key of `activations`: the fastest of several runs, with the quantizers at its edges.

    Args:
        layer: Name of the node.
        x: What it reads.
        activations: Format of what it reads for each choice of widths; None where that stays float.
    """
    feeds = {linear.data_of(_named(model, layer)).name or "": x}
    plain = _session(model, layer, FLOAT, {FLOAT: None}, feeds, target)
    found = {FLOAT: float("inf")}
    for bits in activations:
        measured = measure_latency(plain, _session(model, layer, bits, activations, feeds, target), feeds, enough=0.0)
        found[FLOAT] = min(found[FLOAT], measured.reference_ms)
        found[bits] = measured.result_ms
    return found


def _session(
    model: ir.Model, layer: str, bits: Bits, activations: Activations, feeds: Mapping[str, np.ndarray], target: Target
) -> Executor:
    """The layer alone in `bits`, its output rounded as well if the integer kernel wants that (any range will do for its speed)."""
    probe, known = ir.clone(model), {node.name for node in model.graph}
    edit, node = Editor(probe), _named(probe, layer)
    out, activation = node.outputs[0], activations[bits]
    if bits.weight is not None:
        qdq.insert_weight(edit, node, qdq.spec_for_weight(node, replace(target.weight, bits=bits.weight)))
    if activation is not None:
        spec, qparams = activation
        qdq.insert_pair(edit, linear.data_of(node), qparams, spec, [(node, linear.data_index(node))])
        if target.ops[node.op_type].quantized_output:
            out = qdq.insert_pair(edit, out, qparams, spec, [])
    nodes = [one for one in probe.graph if one is node or one.name not in known]
    kinds = {name: array.dtype for name, array in feeds.items()}
    return Executor(probe, [Fetch(out.name or "")], nodes=nodes, feeds=kinds, deployed=True)


def _named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)
