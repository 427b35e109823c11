"""Weights that are stored as something else than a float array: codes, and the nodes that make floats of them when a session loads.

Any small subgraph over constants may stand for a weight: a DequantizeLinear, a sum of several, a function of graphq. Whoever asks
here need not know which.
"""

from __future__ import annotations

import numpy as np

from graphq import ir
from graphq.executor import Executor, Fetch


def decoders(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that compute `value` from initializers alone, in order; none if it is an initializer, or depends on anything else."""
    found, seen = list[ir.Node](), set[ir.Value]()

    def visit(one: ir.Value) -> bool:
        if one in seen or ir.is_constant(one):
            return True
        maker = ir.producer(one)
        if maker is None or not any(entry is not None for entry in maker.inputs) or any(ir.subgraphs(maker)):
            return False
        if not all(visit(entry) for entry in maker.inputs if entry is not None):
            return False
        seen.update(maker.outputs)
        found.append(maker)
        return True

    return found if value is not None and visit(value) else []


def is_fixed(value: ir.Value | None) -> bool:
    """Whether `value` depends on constants only."""
    return ir.is_constant(value) or bool(decoders(value))


def is_stored(value: ir.Value | None) -> bool:
    """Whether `value` is made of stored codes: a DequantizeLinear or an operator of graphq is among its decoders."""
    maker = ir.producer(value)
    if maker is None or maker.op_type == "QuantizeLinear":
        return False
    return any(node.domain == ir.DOMAIN or node.op_type == "DequantizeLinear" for node in decoders(value))


def parts(value: ir.Value | None) -> list[ir.Value]:
    """The initializers that `value` is computed from."""
    makers = decoders(value)
    inputs = [entry for node in makers for entry in node.inputs if entry is not None] if makers else [value]
    return list(dict.fromkeys(entry for entry in inputs if entry is not None and entry.is_initializer()))


def decode(model: ir.Model, value: ir.Value) -> np.ndarray:
    """The array that `value`, which depends on constants only, stands for. It is computed at every call, and nothing is kept.

    Raises:
        ValueError: it depends on an input of the model.
    """
    array = ir.constant(value)
    if array is not None:
        return array
    makers = decoders(value)
    if not makers:
        raise ValueError(f"{value.name} is not a constant of the graph")
    return Executor(model, [Fetch(value.name or "")], nodes=makers, feeds={}, prepack=False).run({})[0]
