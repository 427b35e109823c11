"""Weights that are stored as something else than a float array: codes, and the nodes that make floats of them when a session loads.

Any small subgraph over constants may stand for a weight: a DequantizeLinear, a sum of several, a function of graphq. Whoever asks
here need not know which. `graphq.executor.decode` computes what they stand for.
"""

from __future__ import annotations

import onnx

from graphq import ir, ir_proto

RANDOM = frozenset({"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"})
"""Operators with another result at each run, whatever they read."""


_NO_CODES = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.INT64})
"""Element types of scales, tables and shapes."""


def decoders(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that compute `value` from initializers alone, in order; none if it is an initializer, or depends on anything else."""
    found, seen, pending = dict[ir.Node, None](), set[ir.Value](), [value] if value is not None else []
    while pending:
        maker = ir.producer(pending[-1])
        if not (ir.is_constant(pending[-1]) if maker is None else _is_repeatable(maker)):
            return []
        waiting = [] if maker is None else [entry for entry in maker.inputs if entry is not None and entry not in seen]
        pending += waiting
        if not waiting:
            seen.add(pending.pop())
            found.update({} if maker is None else {maker: None})
    return list(found)


def _is_repeatable(node: ir.Node) -> bool:
    """Whether `node` makes the same of the same constants, and reads nothing but its inputs."""
    if node.op_type == "Constant":
        return True
    return any(entry is not None for entry in node.inputs) and not any(ir.subgraphs(node)) and node.op_type not in RANDOM


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
    """The initializers, and what Constant nodes hold, that `value` is computed from."""
    makers = decoders(value)
    inputs = [entry for node in makers for entry in node.inputs] if makers else [value]
    return list(dict.fromkeys(entry for entry in inputs if entry is not None and ir.is_constant(entry)))


def shape(model: ir.Model, value: ir.Value) -> tuple[int, ...] | None:
    """Of what stands for a weight, inferred without computing it where the graph does not say; None if that fails."""
    known = ir.shape_of(value)
    if known is None:
        proto, _ = ir_proto.segment_proto(model, decoders(value), {})
        proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(value.name or ""))
        try:
            found = onnx.shape_inference.infer_shapes(proto, data_prop=True).graph.output[0].type.tensor_type
        except (onnx.shape_inference.InferenceError, RuntimeError, ValueError):
            return None
        known = tuple(dim.dim_value or None for dim in found.shape.dim) if found.HasField("shape") else None
    return known if known is not None and all(isinstance(dim, int) for dim in known) else None  # type: ignore[return-value]


def storage(value: ir.Value) -> str:
    """The element type of the codes that `value` is made of: `int8`, or `4 x uint2` where several arrays of codes make one weight."""
    found = [part for part in parts(value) if part.dtype not in _NO_CODES] or parts(value)
    largest = max(found, key=nbytes)
    count = sum((part.dtype, nbytes(part)) == (largest.dtype, nbytes(largest)) for part in found)
    name = "" if largest.dtype is None else str(largest.dtype.numpy())
    return f"{count} x {name}" if count > 1 else name


def nbytes(part: ir.Value) -> int:
    """Bytes that a constant takes in the file."""
    maker = part.producer()
    tensor = part.const_value if maker is None else maker.attributes["value"].as_tensor()
    return 0 if tensor is None else tensor.nbytes
