"""Operators that ONNX itself defines by a body of others, and what a graph does not say of its constants and types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from graphq import ir, ir_proto
from graphq.errors import ModelError


def of(node: ir.Node, version: int, kinds: Sequence[ir.DataType | None]) -> tuple[ir.Function, Mapping[str, Any]] | None:
    """The body that ONNX defines the operator of `node` by, and defaults of its attributes; None if it has none."""
    return ir_proto.standard_body(node, version, kinds) if node.domain in ("", "ai.onnx") else None


def constant_of(node: ir.Node, attributes: Mapping[str, Any], where: str) -> Any:
    """The tensor of the Constant `node`."""
    for name, value in attributes.items():
        if name == "value":
            return value
        if name in ("value_float", "value_floats"):
            return ir.make_tensor(np.asarray(value, np.float32), "float32", node.outputs[0].name or "")
        if name in ("value_int", "value_ints"):
            return ir.make_tensor(np.asarray(value, np.int64), "int64", node.outputs[0].name or "")
    raise ModelError("A Constant holds neither a tensor nor numbers.", where=where, expected="value, value_float(s) or value_int(s)")


def made_type(op_type: str, attributes: Mapping[str, Any], kinds: Sequence[ir.DataType | None]) -> ir.DataType | None:
    """Element type of the first output, where the graph does not state it but the operator does."""
    if op_type == "Cast":
        return ir.DataType(attributes["to"])
    if op_type == "QuantizeLinear":
        narrow = attributes.get("output_dtype", 0)
        return ir.DataType(narrow) if narrow else kinds[2] if len(kinds) > 2 else ir.DataType.UINT8
    if op_type == "CastLike":
        return kinds[1]
    if op_type in ("Identity", "Reshape", "Transpose", "Slice", "Squeeze", "Unsqueeze", "Gather", "Concat", "Expand", "Flatten"):
        return kinds[0] if kinds else None
    return None
