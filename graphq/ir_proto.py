"""Models, or parts of them, as protobufs without the bytes of their weights: what sessions and checkers are given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir

from graphq.ir import DataType, Function, Model, Node, Value, reads, shape_of
from graphq.ir_files import HEAVY, in_memory

Kind = np.dtype | list[Any]
"""Element type of what is fed; for a sequence, a list with that of its elements."""

_NOWHERE = "-"
"""Location of references whose arrays are handed to a session."""


def light_proto(model: Model) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The protobuf form without the bytes of the main graph's larger initializers, and their arrays by name.

    They are empty external references in it. This is how sessions share weights instead of copying them; types that numpy
    does not know (4 and 2 bits, small floats) stay inside.
    """
    proto = _proto_of(model, list(model.graph))
    _add_ends(proto, model)
    return proto, _add_weights(proto.graph, list(model.graph.initializers.values()))


def outline(model: Model, *, shapes: bool = False) -> onnx.ModelProto:
    """The protobuf form in which all larger initializers of the main graph, of any type, are empty references: no weight is read.

    `shapes` says whether to write down those of values inside the graph.
    """
    proto = _proto_of(model, list(model.graph))
    _add_ends(proto, model)
    if shapes:
        inside = (value for node in model.graph for value in node.outputs if not value.is_graph_output())
        proto.graph.value_info.extend(onnx_ir.serde.serialize_value(value) for value in inside)
    for name, tensor in ((name, value.const_value) for name, value in model.graph.initializers.items()):
        if tensor is not None:
            proto.graph.initializer.append(_reference(name, tensor) if _is_heavy(tensor) else _whole(name, tensor))
    return proto


def segment_proto(model: Model, nodes: Sequence[Node], feeds: Mapping[str, Kind]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of `nodes` (of one graph, in order) that is fed `feeds`, and the arrays of its larger weights, as `light_proto`."""
    proto, made = _proto_of(model, nodes), {value.name for node in nodes for value in node.outputs}
    graphs = {model.graph, *(node.graph for node in nodes)}
    read = dict.fromkeys(value for node in nodes for value in reads(node) if value.name not in made and value.graph in graphs)
    for name in [value.name or "" for value in read if not (value.is_initializer() and value.const_value is not None)]:
        proto.graph.input.append(onnx.helper.make_value_info(name, _type_proto(feeds[name])))
    return proto, _add_weights(proto.graph, [value for value in read if value.is_initializer()])


def kind_of(array: np.ndarray | list[Any]) -> Kind:
    """The element type of an array; in a list, that of the arrays in a sequence."""
    return [kind_of(array[0]) if array else np.dtype(np.float32)] if isinstance(array, list) else array.dtype


def _type_proto(kind: Kind) -> onnx.TypeProto:
    if isinstance(kind, list):
        return onnx.helper.make_sequence_type_proto(_type_proto(kind[0]))
    return onnx.helper.make_tensor_type_proto(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind)), None)


def _proto_of(model: Model, nodes: Sequence[Node]) -> onnx.ModelProto:
    """`nodes` of the main graph, and the functions that they may call."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items())
    proto.functions.extend(onnx_ir.serde.serialize_function(function) for function in model.functions.values())
    proto.graph.name = model.graph.name or "graph"
    proto.graph.node.extend(onnx_ir.serde.serialize_node(node) for node in nodes)
    return proto


def _add_ends(proto: onnx.ModelProto, model: Model) -> None:
    """Write the graph's inputs and outputs."""
    for own, values in ((proto.graph.input, model.graph.inputs), (proto.graph.output, model.graph.outputs)):
        own.extend(onnx_ir.serde.serialize_value(value) for value in values)


def _add_weights(graph: onnx.GraphProto, values: Sequence[Value]) -> dict[str, np.ndarray]:
    """Write initializers, large ones that are read as empty references, and return the arrays of these."""
    arrays = dict[str, np.ndarray]()
    for value in values:
        name, tensor = value.name or "", value.const_value
        if tensor is None:
            continue
        is_shared = _is_heavy(tensor) and np.dtype(tensor.dtype.numpy()).isbuiltin == 1 and bool(value.uses())
        if is_shared:
            arrays[name] = tensor.numpy()
        graph.initializer.append(_reference(name, tensor) if is_shared else _whole(name, tensor))
    return arrays


def _is_heavy(tensor: onnx_ir.TensorProtocol) -> bool:
    return tensor.nbytes > HEAVY and tensor.dtype != DataType.STRING


def _reference(name: str, tensor: onnx_ir.TensorProtocol) -> onnx.TensorProto:
    empty = onnx_ir.ExternalTensor(_NOWHERE, 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name)  # type: ignore[arg-type]
    return onnx_ir.serde.serialize_tensor(empty)


def _whole(name: str, tensor: onnx_ir.TensorProtocol) -> onnx.TensorProto:
    proto = onnx_ir.serde.serialize_tensor(in_memory(tensor))
    proto.name = name
    return proto


def standard_body(node: Node, version: int, types: Sequence[DataType | None]) -> tuple[Function, dict[str, Any]] | None:
    """The body of others that ONNX defines the operator of `node` by, and its attributes' defaults; None if it has no body.

    Args:
        version: Of the default operator set.
        types: Element types of what the node reads, as far as they are known.
    """
    try:
        schema: Any = onnx.defs.get_schema(node.op_type, version, "")
    except onnx.defs.SchemaError:
        return None
    if schema.has_function:
        data = schema.get_function_with_opset_version(max(one for one in schema.function_opset_versions if one <= version))
    elif schema.has_context_dependent_function:
        shapes = [None if value is None else shape_of(value) for value in node.inputs]
        known = [onnx.helper.make_tensor_type_proto(int(kind or DataType.FLOAT), shape).SerializeToString()
                 for kind, shape in zip(types, shapes, strict=True)]  # fmt: skip
        latest = max(one for one in schema.context_dependent_function_opset_versions if one <= version)
        data = schema.get_context_dependent_function_with_opset_version(latest, onnx_ir.to_proto(node).SerializeToString(), known)
    else:
        return None
    proto = onnx.FunctionProto.FromString(data)
    if not proto.node:
        return None
    defaults = {name: entry.default_value for name, entry in schema.attributes.items() if entry.default_value.name}
    return onnx_ir.serde.deserialize_function(proto), {
        name: onnx_ir.serde.deserialize_attribute(value) for name, value in defaults.items()
    }
