"""The graph: reading, writing and looking at ONNX models. The one module that imports onnx_ir; `graphq.editor` changes them."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
from onnx_ir import DataType, Function, Graph, Model, Node, Shape, Value, from_onnx_text

from graphq.errors import ModelError
from graphq.spec import ModelInput
from graphq.untrusted import check_file, check_names, check_tensors

__all__ = [
    "DOMAIN", "DataType", "Function", "Graph", "Model", "Node", "Shape", "Value", "all_nodes", "attribute", "clone", "constant",
    "constant_shape", "describe", "from_onnx_text", "function_from_text", "inputs", "is_float", "is_same_function", "light_proto", "load",
    "make_node", "nodes_inside", "opset", "own_functions_aside", "producer", "reads", "save", "segment_proto", "shape_of", "subgraphs",
    "to_proto", "uses", "values_by_name",
]  # fmt: skip

DOMAIN = "graphq"
"""Domain of the operators that passes write as model-local functions (see `graphq.functions`)."""

MAX_OPSET, _PROTOBUF_LIMIT = onnx.defs.onnx_opset_version(), 1 << 31
_NUMPY_TYPES = {name: getattr(ml_dtypes, name) for name in ("int4", "uint4", "int2", "uint2", "bfloat16")} | {
    "float8e4m3fn": ml_dtypes.float8_e4m3fn, "float4e2m1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip


# ---- reading and writing --------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model; external data stays memory-mapped.

    Raises:
        ModelError: the file is missing, empty, not an ONNX model, of an unknown opset, or its external data is missing,
            too short or outside the model's folder.
    """
    path = Path(path)
    check_file(path)
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf raises several unrelated types
        raise _not_onnx(path, "it does not parse as protobuf") from error
    if not proto.ir_version or not proto.HasField("graph"):
        raise _not_onnx(path, "it holds no graph")
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > MAX_OPSET:
            raise ModelError(
                f"The model uses opset {entry.version}, which is not known here.", where=str(path),
                expected=f"opset {MAX_OPSET} at most", hint="export with a lower opset_version, or update the onnx package",
            )  # fmt: skip
    try:
        check_names(proto.graph, path)
        check_tensors(proto, path, lambda kind: onnx_ir.DataType(kind).bitwidth)
        model = onnx_ir.from_proto(proto)
    except ModelError:
        raise
    except Exception as error:
        raise _not_onnx(path, f"its graph cannot be read ({error})") from error
    onnx_ir.external_data.set_base_dir(model.graph, str(path.parent.resolve()))
    for graph in model.graphs():
        for value in graph.initializers.values():  # those of subgraphs are few and small, as are constants in attributes
            if graph is not model.graph or not isinstance(value.const_value, onnx_ir.ExternalTensor):
                value.const_value = _in_memory(value.const_value)
    for node in all_nodes(model):
        while node.inputs and node.inputs[-1] is None:  # ONNX Runtime 1.31 crashes on a LayerNormalization that leaves its bias out so
            node.resize_inputs(len(node.inputs) - 1)
        for name, entry in list(node.attributes.items()):
            if entry.type == onnx_ir.AttributeType.TENSOR and not entry.is_ref():
                node.attributes[name] = make_attribute(name, _in_memory(entry.value))
    return model


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model with all its bytes; weights go to `<name>.data` beside it when they do not fit into one file (2 GiB)."""
    path = Path(path)
    total = sum(tensor.nbytes for tensor in _tensors(model))
    if total > _PROTOBUF_LIMIT - (1 << 26):
        return onnx_ir.save(model, path, external_data=f"{path.name}.data")
    if any(isinstance(tensor, onnx_ir.ExternalTensor) for tensor in _tensors(model)):
        model = onnx_ir.external_data.load_to_model(model.clone())  # the input's data file may not be there tomorrow
    onnx_ir.save(model, path)


def _not_onnx(path: Path, why: str) -> ModelError:
    return ModelError(
        f"This is not a readable ONNX model: {why}.", where=str(path), expected="an .onnx file as an exporter wrote it",
        hint="check that the download or export finished (the file may be cut off)",
    )  # fmt: skip


# ---- looking --------------------------------------------------------------------------------------------------------


def clone(model: Model) -> Model:
    """A model that can be changed without changing the first; weights are shared until they are replaced."""
    return model.clone()


def light_proto(model: Model, *, shapes: bool = False) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """The protobuf form without the bytes of the main graph's larger initializers, and their arrays by name.

    They are empty external references in it. This is how sessions share weights instead of copying them; types that numpy
    does not know (4 and 2 bits, small floats) stay inside. `shapes` says whether to write down those of values inside the graph.
    """
    proto = _proto_of(model, list(model.graph))
    inside = [value for node in model.graph for value in node.outputs if not value.is_graph_output()] if shapes else []
    for own, entries in (
        (proto.graph.value_info, inside),
        (proto.graph.input, model.graph.inputs),
        (proto.graph.output, model.graph.outputs),
    ):
        own.extend(onnx_ir.serde.serialize_value(value) for value in entries)
    return proto, _add_weights(proto.graph, list(model.graph.initializers.values()))


def segment_proto(model: Model, nodes: Sequence[Node], feeds: Mapping[str, np.dtype]) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """A model of `nodes` (main graph, in order) that is fed `feeds`, and the arrays of its larger weights, as `light_proto`."""
    proto, made = _proto_of(model, nodes), {value.name for node in nodes for value in node.outputs}
    read = dict.fromkeys(value for node in nodes for value in reads(node) if value.name not in made and value.graph is model.graph)
    for name in [value.name or "" for value in read if not (value.is_initializer() and value.const_value is not None)]:
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(feeds[name]))
        proto.graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
    return proto, _add_weights(proto.graph, [value for value in read if value.is_initializer()])


def _proto_of(model: Model, nodes: Sequence[Node]) -> onnx.ModelProto:
    """`nodes` of the main graph, and the functions that they may call."""
    proto = onnx.ModelProto(ir_version=model.ir_version)
    proto.opset_import.extend(onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items())
    proto.functions.extend(onnx_ir.serde.serialize_function(function) for function in model.functions.values())
    proto.graph.name = model.graph.name or "graph"
    proto.graph.node.extend(onnx_ir.serde.serialize_node(node) for node in nodes)
    return proto


def _add_weights(graph: onnx.GraphProto, values: Sequence[Value]) -> dict[str, np.ndarray]:
    """Write initializers, large ones that are read as empty references, and return the arrays of these."""
    arrays = dict[str, np.ndarray]()
    for value in values:
        name, tensor = value.name or "", value.const_value
        if tensor is None:
            continue
        if _is_heavy(tensor) and value.uses():
            arrays[name] = tensor.numpy()
            tensor = onnx_ir.ExternalTensor("-", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=name)  # type: ignore[arg-type]
        else:
            tensor = _in_memory(tensor)
        graph.initializer.append(onnx_ir.serde.serialize_tensor(tensor))
        graph.initializer[-1].name = name
    return arrays


def _is_heavy(tensor: onnx_ir.TensorProtocol) -> bool:
    return tensor.nbytes > 1024 and np.dtype(tensor.dtype.numpy()).isbuiltin == 1


def _in_memory(tensor: Any) -> Any:
    """The tensor as an array of its own: one in a file would be read, and one in a protobuf copied, whenever somebody looks at it."""
    if not isinstance(tensor, onnx_ir.ExternalTensor | onnx_ir.TensorProtoTensor):
        return tensor
    return onnx_ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def subgraphs(node: Node) -> Iterator[Graph]:
    """The graphs in the attributes of `node`: branches of If, bodies of Loop and Scan."""
    for entry in node.attributes.values():
        if entry.type == onnx_ir.AttributeType.GRAPH:
            yield entry.value
        elif entry.type == onnx_ir.AttributeType.GRAPHS:
            yield from entry.value


def nodes_inside(node: Node) -> Iterator[Node]:
    """The nodes of the subgraphs of `node`, at any depth."""
    for graph in subgraphs(node):
        yield from graph.all_nodes()


def reads(node: Node) -> Iterator[Value]:
    """The values that `node` reads, those that its subgraphs read from outside included."""
    yield from (value for value in node.inputs if value is not None)
    within = {*subgraphs(node), *(graph for inner in nodes_inside(node) for graph in subgraphs(inner))}
    yield from (value for inner in nodes_inside(node) for value in inner.inputs if value is not None and value.graph not in within)


def to_proto(model: Model) -> onnx.ModelProto:
    return onnx_ir.to_proto(model)


def opset(model: Model) -> int:
    """Version of the default operator set."""
    return model.opset_imports.get("", model.opset_imports.get("ai.onnx", 1))


def all_nodes(model: Model) -> Iterator[Node]:
    """Every node of the main graph, its subgraphs and the model-local functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def values_by_name(graph: Graph) -> dict[str, Value]:
    """Inputs, initializers and node outputs of one graph (not of its subgraphs)."""
    values = [*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)]
    return {value.name: value for value in values if value.name}


def producer(value: Value | None) -> Node | None:
    return None if value is None else value.producer()


def constant(value: Value | None) -> np.ndarray | None:
    """The array of an initializer or of a Constant node's output; None if the value is not constant."""
    if value is None or value.is_graph_input():
        return None
    if value.is_initializer():
        return None if value.const_value is None else value.const_value.numpy()
    node = value.producer()
    if node is not None and node.op_type == "Constant" and node.domain == "" and "value" in node.attributes:
        return node.attributes["value"].as_tensor().numpy()
    return None


def attribute(node: Node, name: str, default: Any = None) -> Any:
    return node.attributes[name].value if name in node.attributes else default


def shape_of(value: Value | None) -> tuple[int | str | None, ...] | None:
    """Shape as ints, symbols and None; None when not even the rank is known."""
    if value is None or value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else dim.value for dim in value.shape)


def constant_shape(value: Value | None) -> tuple[int, ...]:
    """Shape of an initializer, without reading it."""
    if value is None or value.const_value is None:
        raise ValueError("not an initializer")
    return tuple(int(dim) for dim in value.const_value.shape)  # type: ignore[arg-type]


def uses(value: Value) -> tuple[Any, ...]:
    """Who reads `value`: entries with `node` and `idx`, the input index."""
    return tuple(value.uses())


def is_float(value: Value | None) -> bool:
    """Whether the element type is float32, or not stated."""
    return value is not None and value.dtype in (DataType.FLOAT, None)


def inputs(model: Model) -> tuple[ModelInput, ...]:
    """The inputs a caller has to feed (initializers that are listed as inputs are left out)."""
    found = []
    for value in model.graph.inputs:
        if value.name in model.graph.initializers:
            continue
        if not isinstance(value.type, onnx_ir.TensorType):
            raise ModelError("A model input is not a tensor.", where=f"input {value.name!r}: {value.type}", expected="tensor inputs")
        if value.dtype == DataType.STRING:
            raise ModelError("A model input is text.", where=f"input {value.name!r}", expected="numbers", hint="cut the model behind it")
        dtype = np.dtype(value.dtype.numpy()) if value.dtype else np.dtype(np.float32)
        found.append(ModelInput(value.name or "", dtype, shape_of(value), _lookup_limit(value)))
    return tuple(found)


def _lookup_limit(value: Value) -> int | None:
    """The rows of the smallest constant table that `value` indexes, straight or through a Cast."""
    limits = []
    for node, index in ((use.node, use.idx) for use in uses(value)):
        if node.op_type == "Cast":
            limits.append(_lookup_limit(node.outputs[0]))
        elif node.op_type == "Gather" and index == 1 and (shape := shape_of(node.inputs[0])) and constant(node.inputs[0]) is not None:
            rows = shape[attribute(node, "axis", 0)]
            limits.append(rows if isinstance(rows, int) else None)
    return min((limit for limit in limits if limit), default=None)


def describe(node: Node) -> str:
    """`Conv 'stem' (1x3x8x8, 4x3x3x3)`: how errors and skips name a node."""

    def size(value: Value | None) -> str:
        dims = shape_of(value)
        return "-" if value is None else "?" if dims is None else "x".join("?" if dim is None else str(dim) for dim in dims) or "scalar"

    return f"{node.op_type} {node.name!r} ({', '.join(size(value) for value in node.inputs)})"


def _tensors(model: Model) -> Iterator[Any]:
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


def make_tensor(array: np.ndarray, storage: str, name: str) -> onnx_ir.TensorProtocol:
    """A tensor of the ONNX type `storage` (`int8`, `uint4`, `float32`...) from an array that holds its values."""
    return onnx_ir.Tensor(np.asarray(array, order="C").astype(_NUMPY_TYPES.get(storage, storage), copy=False), name=name)


def make_node(op_type: str, values: Sequence[Value | None], outputs: Sequence[str], *, domain: str = "", name: str = "",
              attributes: Mapping[str, Any] | None = None) -> Node:  # fmt: skip
    return onnx_ir.node(op_type, values, attributes, domain=domain, name=name or outputs[0], outputs=[Value(name=out) for out in outputs])


def make_value(name: str, tensor: Any) -> Value:
    """A constant value, to be registered as an initializer."""
    return Value(name=name, shape=tensor.shape, type=onnx_ir.TensorType(tensor.dtype), const_value=tensor)


def make_attribute(name: str, value: Any) -> onnx_ir.Attr:
    return onnx_ir.convenience.convert_attribute(name, value)


def tensor_type(storage: str) -> onnx_ir.TensorType:
    """The type of a tensor of `int8`, `uint4`, `float32`..."""
    return onnx_ir.TensorType(onnx_ir.DataType[{"float32": "FLOAT"}.get(storage, storage.upper())])


def function_from_text(text: str) -> Function:
    return onnx_ir.serde.deserialize_function(onnx.parser.parse_function(text))


def is_same_function(a: Function, b: Function) -> bool:
    """Whether two functions take, compute and return the same, name by name."""
    one, other = (onnx_ir.serde.serialize_function(function) for function in (a, b))
    return (one.input, one.output, one.node) == (other.input, other.output, other.node)


@contextmanager
def own_functions_aside(model: Model) -> Iterator[None]:
    """Take the functions of `DOMAIN` out of `model`, so that no tool inlines them; put back, they import the opset it then has."""
    kept = {key: function for key, function in model.functions.items() if function.domain == DOMAIN}
    for key in kept:
        del model.functions[key]
    try:
        yield
    finally:
        for key, function in kept.items():
            function.opset_imports[""] = opset(model)
            model.functions[key] = function
