"""The graph: reading, writing (see `graphq.ir_files`) and looking at ONNX models; `graphq.editor` changes them.

This module, `ir_files` and `ir_proto` alone import onnx_ir.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
from onnx_ir import DataType, Function, Graph, Model, Node, Shape, Value, from_onnx_text

from graphq.errors import ModelError
from graphq.ir_files import MAX_OPSET, Keep, data_files, load, save, spilling, tensors
from graphq.spec import ModelInput

__all__ = [
    "DOMAIN", "MAX_OPSET", "DataType", "Function", "Graph", "Keep", "Model", "Node", "Shape", "Value", "all_nodes", "attribute",
    "clone", "constant", "constant_shape", "data_files", "describe", "from_onnx_text", "function_from_text", "inline", "inputs",
    "is_constant", "is_float", "is_same_function", "lazy_tensor", "load", "make_attribute", "make_node", "make_tensor",
    "make_value", "nodes_inside", "opset", "own_functions_aside", "producer", "reads",
    "save", "shape_of", "spilling", "subgraphs", "tensor_type", "to_proto", "uses", "values_by_name",
    "weight_bytes",
]  # fmt: skip

DOMAIN = "graphq"
"""Domain of the operators that passes write as model-local functions (see `graphq.functions`)."""

_NUMPY_TYPES = {name: getattr(ml_dtypes, name) for name in ("int4", "uint4", "int2", "uint2", "bfloat16")} | {
    "float8e4m3fn": ml_dtypes.float8_e4m3fn, "float4e2m1": ml_dtypes.float4_e2m1fn,
}  # fmt: skip


# ---- looking --------------------------------------------------------------------------------------------------------


def clone(model: Model) -> Model:
    """A model that can be changed without changing the first; weights are shared until they are replaced."""
    return model.clone()


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
    if value is None or not is_constant(value):
        return None
    if value.const_value is not None and value.is_initializer():
        return value.const_value.numpy()
    return value.producer().attributes["value"].as_tensor().numpy()  # type: ignore[union-attr]


def is_constant(value: Value | None) -> bool:
    """Whether `constant` has an array for `value`, without reading it."""
    if value is None or value.is_graph_input():
        return False
    if value.is_initializer():
        return value.const_value is not None
    node = value.producer()
    return node is not None and node.op_type == "Constant" and node.domain == "" and "value" in node.attributes


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
        elif node.op_type == "Gather" and index == 1 and (shape := shape_of(node.inputs[0])) and is_constant(node.inputs[0]):
            rows = shape[attribute(node, "axis", 0)]
            limits.append(rows if isinstance(rows, int) else None)
    return min((limit for limit in limits if limit), default=None)


def describe(node: Node) -> str:
    """`Conv 'stem' (1x3x8x8, 4x3x3x3)`: how errors and skips name a node."""

    def size(value: Value | None) -> str:
        dims = shape_of(value)
        return "-" if value is None else "?" if dims is None else "x".join("?" if dim is None else str(dim) for dim in dims) or "scalar"

    return f"{node.op_type} {node.name!r} ({', '.join(size(value) for value in node.inputs)})"


def weight_bytes(model: Model) -> int:
    """Bytes of all initializers."""
    return sum(tensor.nbytes for tensor in tensors(model))


def make_tensor(array: np.ndarray, storage: str, name: str) -> onnx_ir.TensorProtocol:
    """A tensor of the ONNX type `storage` (`int8`, `uint4`, `float32`...) from an array that holds its values."""
    array = np.asarray(array, order="C")
    if storage in ("int4", "uint4"):
        return onnx_ir.PackedTensor(_packed(array), DataType[storage.upper()], shape=array.shape, name=name)
    return onnx_ir.Tensor(array.astype(_NUMPY_TYPES.get(storage, storage), copy=False), name=name)


def lazy_tensor(make: Callable[[], np.ndarray], storage: str, shape: Sequence[int], name: str) -> onnx_ir.TensorProtocol:
    """A tensor of what `make` returns, an array of type `storage` and of `shape`: made whenever somebody looks at it, kept by nobody."""
    return onnx_ir.LazyTensor(lambda: make_tensor(make(), storage, name), tensor_type(storage).dtype, onnx_ir.Shape(shape), name=name)


def _packed(codes: np.ndarray) -> np.ndarray:
    """Two codes of 4 bits a byte, the first in the low half: uint8 [ceil(size / 2)] from an array of any integer type."""
    flat = (codes if codes.itemsize == 1 else codes.astype(np.int8)).reshape(-1).view(np.uint8)
    pairs = (flat if len(flat) % 2 == 0 else np.append(flat, np.uint8(0))).view("<u2")
    return (pairs & 0x0F | pairs >> 4 & 0xF0).astype(np.uint8)


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


def inline(model: Model, is_chosen: Callable[[Function], bool]) -> None:
    """Put the bodies of the functions that are chosen in the place of their calls."""
    from onnx_ir.passes.common import InlinePass

    if any(map(is_chosen, model.functions.values())):
        InlinePass(is_chosen)(model)


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
