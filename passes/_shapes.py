"""Element types and shapes that onnx infers, for values that do not state them: those of exporters, and those that passes make."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from graphq import ir, ir_proto
from graphq.passes._normalize_graph import graph_nodes
from graphq.pipeline import PassContext


def infer_shapes(ctx: PassContext) -> int:
    """Fill in the element types and dimensions that are not stated. What cannot be inferred stays unknown, with a note.

    Returns:
        How many values know more now. No edits are counted: what the model computes is the same.
    """
    values = {value.name: value for value in _all_values(ctx.model) if value.name}
    if all(value.dtype is not None and value.shape is not None for value in values.values()):
        return 0
    try:
        known = ir_proto.outline(ctx.model, shapes=True)
        inferred = onnx.shape_inference.infer_shapes(known, check_type=False, strict_mode=False, data_prop=True)
    except Exception as error:  # onnx raises several types; a model without shapes still converts
        ctx.skipped.append(("shape inference", f"onnx cannot infer shapes: {str(error).strip()[:200]}"))
        return 0
    found = [(values[entry.name], entry.type) for entry in _entries(inferred.graph) if entry.name in values]
    return sum(_merge(value, kind.tensor_type) for value, kind in found if kind.HasField("tensor_type"))


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    for node in graph_nodes(model):
        yield from node.outputs


def _entries(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto]:
    yield from [*graph.output, *graph.value_info]
    for node in graph.node:
        for entry in node.attribute:
            for subgraph in [entry.g, *entry.graphs]:
                yield from _entries(subgraph)


def _merge(value: ir.Value, tensor: onnx.TypeProto.Tensor) -> bool:
    """Complete a value's type and shape; what it states already is kept."""
    changed = False
    if value.dtype is None and tensor.elem_type:
        value.dtype = ir.DataType(tensor.elem_type)
        changed = True
    if value.dtype is None or not tensor.HasField("shape"):
        return changed
    new = tuple(_dim(entry) for entry in tensor.shape.dim)
    old = ir.shape_of(value)
    if old is not None and len(old) != len(new):
        return changed
    merged = new if old is None else tuple(a if isinstance(a, int) or b is None else b if a is None or isinstance(b, int) else a
                                           for a, b in zip(old, new, strict=True))  # fmt: skip
    if merged != old:
        value.shape = ir.Shape(merged)
        changed = True
    return changed


def _dim(entry: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if entry.HasField("dim_value"):
        return entry.dim_value
    return None if entry.dim_param.startswith("unk__") else entry.dim_param or None
