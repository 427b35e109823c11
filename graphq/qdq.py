"""QuantizeLinear and DequantizeLinear in the graph: the one place where passes write them.

An activation edge gets a QDQ pair, a weight or a bias becomes integer codes with one
DequantizeLinear. Numbers come from `graphq.quantizers`, so that the graph and the simulation cannot differ.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from graphq import ir, linear, ops, stored, tables
from graphq.editor import Editor
from graphq.quantizers import MIN_SCALE, QParams, Uniform
from graphq.spec import PerAxis, PerGroup, PerTensor, QuantSpec
from graphq.targets import Target

INT32_LIMIT = float(1 << 30)
"""Largest magnitude of a bias code: half of the type, which leaves the accumulator as much room again."""

_PART = "graphq.quantizer"
"""Metadata of the nodes besides QuantizeLinear and DequantizeLinear that a quantizer is made of."""


def insert_pair(edit: Editor, value: ir.Value, qparams: QParams, spec: QuantSpec, readers: Iterable[tuple[ir.Node, int]],
                through: Sequence[ir.Node] = (), *, narrow: bool = True) -> ir.Value:  # fmt: skip
    """Put one QDQ pair on `value` and let `readers` (node, input index) read its result, which is returned.

    A width that ONNX does not store gets an explicit Clip before it, and 8-bit codes; so does any below 8 if not `narrow`, and 4 bits
    behind a Clip, which ONNX Runtime 1.31 would merge into a QuantizeLinear of 8 bits only. `through` is a chain of nodes, the last
    of which makes `value`, that only move elements: they then move codes, and what the first of them reads is quantized.
    """
    start = through[0].inputs[0] if through else value
    assert start is not None
    anchor, after = start.producer(), True
    if anchor is None or anchor.graph is not edit.model.graph:
        anchor, after = None, False
    name, source = value.name or "value", start
    is_narrow = narrow and spec.bits == spec.storage_bits and (anchor is None or anchor.op_type != "Clip")
    own = spec if spec.bits == 8 or is_narrow else replace(spec, bits=8)
    scale, zero = _qparam_values(edit, name, qparams, own)
    if spec.bits != own.bits:
        steps = np.array([spec.qmin - int(qparams.zero_point), spec.qmax - int(qparams.zero_point)], np.float32) * qparams.scale
        low, high = (edit.initializer(f"{name}_clip_{end}", np.asarray(step)) for end, step in zip(("low", "high"), steps, strict=True))
        source = edit.insert(anchor, "Clip", [source, low, high], output=f"{name}_clipped", like=start, after=after)
        anchor, after = source.producer(), True
        edit.annotate(anchor, _PART, "clip")  # type: ignore[arg-type]
    codes = edit.insert(anchor, "QuantizeLinear", [source, scale, zero], output=f"{name}_quantized", after=after)
    codes.shape, codes.type = start.shape, ir.tensor_type(own.storage)
    maker = codes.producer()
    if through:
        edit.rewire(through[0], 0, codes)
        for node in through:
            node.outputs[0].type = ir.tensor_type(spec.storage)
        codes, maker = value, through[-1]
    result = edit.insert(maker, "DequantizeLinear", [codes, scale, zero], output=f"{name}_dequantized", after=True)
    result.shape, result.type = value.shape, ir.tensor_type("float32")
    for node, index in readers:
        edit.rewire(node, index, result)
    return result


def is_quantizer(node: ir.Node) -> bool:
    """Whether `node` is a quantizer of activations, or one of the nodes that one is made of; products of `graphq.ops` are none."""
    if node.domain == ir.DOMAIN:
        return node.op_type not in ops.OPERATORS
    return node.op_type in ("QuantizeLinear", "DequantizeLinear") or _PART in node.metadata_props


def is_quantized(value: ir.Value | None) -> bool:
    """Whether a DequantizeLinear or an operator of graphq makes `value`, or it is put together of such."""
    maker = ir.producer(value)
    if maker is None:
        return False
    if maker.op_type == "Concat" and not maker.domain:
        return all(map(is_quantized, maker.inputs))
    return maker.op_type == "DequantizeLinear" or maker.domain == ir.DOMAIN


def before_quantizer(value: ir.Value | None) -> ir.Value | None:
    """What a quantizer of graphq's reads if one makes `value`, by a QDQ pair or by a function; `value` itself otherwise."""
    maker = ir.producer(value)
    if maker is not None and maker.domain == ir.DOMAIN:
        return maker.inputs[0]
    if maker is not None and maker.op_type == "DequantizeLinear":
        maker = ir.producer(maker.inputs[0])
    if maker is None or maker.op_type != "QuantizeLinear":
        return value
    clip = clip_before(maker)
    return maker.inputs[0] if clip is None else clip.inputs[0]


def clip_before(node: ir.Node) -> ir.Node | None:
    """The Clip that a quantizer of graphq's has before the QuantizeLinear `node`, if it has one."""
    clip = ir.producer(node.inputs[0])
    return clip if clip is not None and clip.metadata_props.get(_PART) else None


def insert_weight(edit: Editor, node: ir.Node, spec: QuantSpec, qparams: QParams | None = None, codes: np.ndarray | None = None, *,
                  narrow: bool = True) -> QParams:  # fmt: skip
    """Store the weight of a linear node as codes with a DequantizeLinear before the node.

    Args:
        qparams: Of the weight; min-max by default.
        codes: Of the weight's shape, within the range of `spec`; the nearest by default, stored once for all nodes that
            share the weight.
        narrow: Whether codes of fewer than 8 bits may be stored in fewer.
    """
    index = linear.LINEAR_OPS[node.op_type].weight
    value = node.inputs[index]
    weight = ir.constant(value)
    assert value is not None and weight is not None, "insert_weight needs a constant weight"
    quantizer = Uniform(spec)
    qparams = quantizer.fit_weight(weight) if qparams is None else qparams
    name, storage = value.name or "weight", (spec if narrow else replace(spec, bits=8)).storage
    key = (value, spec, storage, hashlib.sha256(qparams.scale.tobytes() + qparams.zero_point.tobytes()).digest())
    if codes is None:
        integers = edit.shared((*key, "codes"), f"{name}_quantized", lambda: quantizer.quantize(weight, qparams), storage)
    else:
        integers = edit.initializer(f"{name}_quantized", codes, storage)
    scale = edit.shared((*key, "scale"), f"{name}_scale", lambda: qparams.scale, "float32")
    zero = edit.shared((*key, "zero"), f"{name}_zero_point", lambda: qparams.zero_point, storage)
    attributes: dict[str, int] = {}
    if isinstance(spec.granularity, PerAxis | PerGroup):
        attributes["axis"] = spec.granularity.axis
    if isinstance(spec.granularity, PerGroup):
        attributes["block_size"] = spec.granularity.size
    operands = [integers, scale, zero]
    result = edit.insert(node, "DequantizeLinear", operands, output=f"{name}_dequantized", attributes=attributes, like=value)
    edit.rewire(node, index, result)
    return qparams


def insert_lookup(edit: Editor, node: ir.Node, codes: np.ndarray, qparams: QParams, spec: QuantSpec, *, after: bool) -> None:
    """Let a Gather read `codes` instead of its float table, dequantized (per tensor) after it, row by row, or before it."""
    table, out = node.inputs[0], node.outputs[0]
    name = table.name or "table"  # type: ignore[union-attr]
    integers = edit.shared((table, "table"), f"{name}_quantized", lambda: codes, spec.storage)
    if not after:
        operands = [integers, *_qparam_values(edit, name, qparams, spec)]
        edit.rewire(node, 0, edit.insert(node, "DequantizeLinear", operands, output=f"{name}_dequantized", like=table))
        return
    readers = [(use.node, use.idx) for use in out.uses()]
    edit.rewire(node, 0, integers)
    result = edit.insert(
        node, "DequantizeLinear", [out, *_qparam_values(edit, name, qparams, spec)], output=f"{out.name}_dequantized", like=out, after=True
    )
    out.type = ir.tensor_type(spec.storage)
    for reader, index in readers:
        edit.rewire(reader, index, result)
    if out.is_graph_output():
        edit.replace_output(out, result)


def insert_bias(edit: Editor, node: ir.Node, activation: QParams, weight: QParams) -> None:
    """Store the constant bias of a Conv or Gemm as INT32 codes of scale `activation.scale * weight.scale`, axis 0."""
    index = linear.LINEAR_OPS[node.op_type].bias
    value, bias = linear.bias_of(node), ir.constant(linear.bias_of(node))
    assert index is not None and value is not None and bias is not None, "insert_bias needs a constant bias"
    scale = bias_scale(activation, weight, bias.shape)
    codes = np.rint(bias.astype(np.float64) / scale).astype(np.int32)
    name = value.name or "bias"
    operands = [edit.initializer(f"{name}_quantized", codes), edit.initializer(f"{name}_scale", scale)]
    result = edit.insert(node, "DequantizeLinear", operands, output=f"{name}_dequantized", attributes={"axis": 0}, like=value)
    edit.rewire(node, index, result)


def bias_scale(activation: QParams, weight: QParams, shape: tuple[int, ...]) -> np.ndarray:
    """Scale of an INT32 bias, float32 of the bias's shape."""
    return np.broadcast_to(activation.scale * weight.scale, shape).astype(np.float32)


def widen_for_bias(weight: QParams, activation: QParams, bias: np.ndarray | None) -> QParams:
    """`weight` with the scales of (almost) dead channels raised until the bias codes fit into 30 bits and their scale is a normal float."""
    if bias is None:
        return weight
    least = np.maximum(np.abs(bias.astype(np.float64)) / INT32_LIMIT, MIN_SCALE) / float(activation.scale)
    if not weight.scale.ndim:
        least = least.max(initial=0.0)
    return replace(weight, scale=np.maximum(weight.scale, np.asarray(least, np.float32)))


def _qparam_values(edit: Editor, name: str, qparams: QParams, spec: QuantSpec) -> tuple[ir.Value, ir.Value]:
    return edit.initializer(f"{name}_scale", qparams.scale), edit.initializer(f"{name}_zero_point", qparams.zero_point, spec.storage)


def spec_for_weight(node: ir.Node, spec: QuantSpec, group_size: int | None = None) -> QuantSpec:
    """`spec` with the axis that fits the weight of `node`: one scale an output channel, or a group along the reduction axis."""
    if isinstance(spec.granularity, PerTensor):
        return spec
    if group_size is not None:
        return replace(spec, granularity=PerGroup(linear.in_axis(node), group_size))
    return replace(spec, granularity=PerAxis(linear.out_axis(node)))


def has_small_floats(model: ir.Model) -> bool:
    """Whether anything is quantized to floats of 8 or 4 bits, for which ONNX Runtime's CPU has no kernels: its optimizer fails on them."""
    kinds = {ir.DataType.FLOAT8E4M3FN, ir.DataType.FLOAT4E2M1}
    return any(node.op_type == "DequantizeLinear" and node.inputs[0] is not None and node.inputs[0].dtype in kinds for node in model.graph)


def quantized_weight_bytes(model: ir.Model) -> tuple[int, int]:
    """Bytes of the quantized weights and tables as float32, and as stored with their scales and zero points."""
    before, after = 0, 0
    seen: set[ir.Value] = set()
    for floats, parts in _stored_arrays(model):
        fresh = [part for part in dict.fromkeys(parts) if part not in seen and ir.is_constant(part)]
        if fresh:
            seen.update(fresh)
            before += 4 * floats
            after += sum(map(stored.nbytes, fresh))
    return before, after


def _stored_arrays(model: ir.Model) -> Iterator[tuple[int, list[ir.Value]]]:
    """Elements of each weight or table that is stored as codes, and what it is made of: those of layers first."""
    for node in ir.all_nodes(model):
        if node.domain == ir.DOMAIN and node.op_type in ops.OPERATORS:
            packed = dict(zip(ops.OPERATORS[node.op_type].inputs, node.inputs, strict=True))
            inputs = (ir.shape_of(node.inputs[0]) or (0,))[-1]
            if "weight" in packed and isinstance(inputs, int):
                parts = [packed[key] for key in ("weight", "w_scale")]
                yield inputs * ir.constant_shape(packed["weight"])[0], [part for part in parts if part is not None]
        elif node.domain == "" and node.op_type in linear.LINEAR_OPS and _reads_stored(node):
            weight = linear.weight_of(node)
            yield math.prod(dim for dim in ir.shape_of(weight) or (0,) if isinstance(dim, int)), stored.parts(weight)
    for node in ir.all_nodes(model):
        if (table := tables.codes_of(node)) is not None:
            makers = [use.node for use in ir.uses(node.outputs[0])] if table is node.inputs[0] else [ir.producer(node.inputs[0])]
            numbers = [value for maker in makers if maker is not None for value in maker.inputs[1:] if value is not None]
            yield math.prod(ir.constant_shape(table)), [table, *numbers]
        codes = node.inputs[0] if node.op_type == "DequantizeLinear" and node.inputs else None
        if codes is not None and codes.is_initializer() and codes.const_value is not None and codes.dtype != ir.DataType.INT32:
            yield math.prod(ir.constant_shape(codes)), [value for value in node.inputs if value is not None]


def quantized_nodes(model: ir.Model, target: Target) -> dict[str, int]:
    """Quantized nodes by type: linear ones with quantized weights, lookups in quantized tables, others that `target` fuses with the
    quantizers around them, operators of graphq that compute on codes."""
    counts: Counter[str] = Counter()
    for node in model.graph:
        if node.domain == ir.DOMAIN and node.op_type in ops.OPERATORS:
            counts[node.op_type] += 1
        if node.domain or node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            continue
        if (codes := tables.codes_of(node)) is not None and codes.dtype is not None:
            counts[f"Gather ({codes.dtype.bitwidth}-bit table)"] += 1
        if node.op_type in linear.LINEAR_OPS:
            found = _reads_stored(node)
        elif node.op_type in target.ops:
            uses = [use.node.op_type for out in node.outputs for use in ir.uses(out)]
            reads = bool(node.inputs) and _made_by(node.inputs[0], "DequantizeLinear")
            found = reads and bool(uses) and set(uses) == {"QuantizeLinear"}
        else:
            continue
        counts[node.op_type] += found
    return dict(+counts)


def _reads_stored(node: ir.Node) -> bool:
    """Whether the weight of a linear `node` is stored as codes; one that is itself a part of decoding a weight has none."""
    return stored.is_stored(linear.weight_of(node)) and not stored.is_fixed(node.outputs[0])


def _made_by(value: ir.Value | None, op_type: str) -> bool:
    maker = ir.producer(value)
    return maker is not None and maker.op_type == op_type
