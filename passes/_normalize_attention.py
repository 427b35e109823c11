"""Step of normalize: the fused Attention operator (opset 23 and later) in terms of MatMul and Softmax, which passes know.

`Y = Softmax(mask(softcap(scale Q Kᵀ))) V` for each head. The operator's own function body in the onnx package covers every case
at once: after folding it leaves 48 nodes where this leaves 5, with copies of K and V and a Where between Softmax and MatMul, and
takes 7 times as long in ONNX Runtime. Attention with a cache, or that returns more than Y, stays as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from graphq import ir
from graphq.editor import Editor
from graphq.passes._normalize_graph import graph_nodes
from graphq.pipeline import PassContext

_LOWEST = np.float32(np.finfo(np.float32).min)
"""The score of a key that a query does not see: its weight is exactly 0, and a query that sees none gets no NaN."""


def decompose_attention(ctx: PassContext) -> bool:
    """Decompose every Attention node that has a plain form; others are skipped with the reason. Returns whether there was one."""
    found = [node for node in graph_nodes(ctx.model) if node.op_type == "Attention" and not node.domain]
    reasons = {node: _refusal(node) for node in found}
    triangles: dict[Any, ir.Value] = {}
    for node, reason in reasons.items():
        if reason is None:
            _Attention(ctx.edit, node, triangles).decompose()
        else:
            ctx.skip(node, reason)
    return None in reasons.values()


def _refusal(node: ir.Node) -> str | None:
    operands = [*node.inputs, *[None] * 7]
    data, mask = operands[:3], operands[3]
    if any(value is not None for value in operands[4:]):
        return "it reads a cache of keys and values"
    if any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return "it returns keys, values or scores as well"
    if any(value is None or value.dtype != ir.DataType.FLOAT for value in data):
        return "it does not compute in float32"
    if ir.attribute(node, "softmax_precision", 1) != 1:
        return "its softmax does not compute in float32"
    if any(ir.attribute(node, f"{side}_window_size", -1) != -1 for side in ("left", "right")):
        return "its queries see a window of keys only"
    shapes = [ir.shape_of(value) for value in data]
    if any(shape is None or len(shape) not in (3, 4) for shape in shapes):
        return "the rank of its inputs is not known"
    if any(not isinstance(heads, int) for heads in _heads(node)):
        return "its number of heads is not known"
    if "scale" not in node.attributes and _head_size(node) is None:
        return "the size of its heads is not known"
    return None if mask is None else _mask_refusal(node, mask)


def _mask_refusal(node: ir.Node, mask: ir.Value) -> str | None:
    if mask.dtype not in (ir.DataType.BOOL, ir.DataType.FLOAT):
        return "its mask is neither boolean nor float32"
    shape = ir.shape_of(mask)
    if not shape or shape[-1] is None or shape[-1] != _length(node, 1):
        return "its mask may be shorter than its keys"
    return None


def _heads(node: ir.Node) -> tuple[Any, Any]:
    """Number of heads of Q, and of K and V."""
    q, k = (ir.shape_of(value) or () for value in node.inputs[:2])
    return (
        q[1] if len(q) == 4 else ir.attribute(node, "q_num_heads"),
        k[1] if len(k) == 4 else ir.attribute(node, "kv_num_heads"),
    )


def _head_size(node: ir.Node) -> int | None:
    q = ir.shape_of(node.inputs[0]) or ()
    size = q[-1]
    return None if not isinstance(size, int) else size if len(q) == 4 else size // _heads(node)[0]


def _length(node: ir.Node, index: int) -> int | str | None:
    """Sequence length of Q (index 0) or K (index 1)."""
    shape = ir.shape_of(node.inputs[index]) or ()
    return shape[-2]


@dataclass
class _Attention:
    """One node that is being decomposed."""

    edit: Editor
    node: ir.Node
    triangles: dict[Any, ir.Value]
    """Causal masks that there are already, by what they depend on."""

    def decompose(self) -> None:
        node = self.node
        q, k, v = node.inputs[:3]
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        flat, (q_heads, kv_heads) = len(ir.shape_of(q) or ()) == 3, _heads(node)
        scale = ir.attribute(node, "scale")
        factor = 1 / np.sqrt(np.float32(_head_size(node))) if scale is None else np.float32(scale)
        q = self.put("Mul", self.put("Transpose", self.split(q, q_heads), perm=[0, 2, 1, 3]) if flat else q, self.number("scale", factor))
        k = self.put("Transpose", self.split(k, kv_heads) if flat else k, perm=[0, 2, 3, 1] if flat else [0, 1, 3, 2])
        v = self.put("Transpose", self.split(v, kv_heads), perm=[0, 2, 1, 3]) if flat else v
        if q_heads != kv_heads:
            repeats = self.number("heads", np.repeat(np.arange(kv_heads), q_heads // kv_heads))
            k, v = (self.put("Gather", value, repeats, axis=1) for value in (k, v))
        causal = bool(ir.attribute(node, "is_causal", 0))
        bias = mask if mask is not None and mask.dtype == ir.DataType.FLOAT else None
        seen = self.both(mask if bias is None else None, self.triangle() if causal else None)
        scores = self.masked(self.softcap(self.put("MatMul", q, k)), bias, seen)
        result = self.put("MatMul", self.put("Softmax", scores), v)
        if mask is not None and _may_hide_all(mask, causal):
            result = self.put("Where", self.sees_any(bias, seen), result, self.number("nothing", np.float32(0)))
        if flat:
            result = self.put("Reshape", self.put("Transpose", result, perm=[0, 2, 1, 3]), self.number("joined", np.array([0, 0, -1])))
        result.shape, result.type = node.outputs[0].shape, node.outputs[0].type
        self.edit.replace(node.outputs[0], result)
        self.edit.remove(node)

    def softcap(self, scores: ir.Value) -> ir.Value:
        cap = np.float32(ir.attribute(self.node, "softcap", 0.0))
        if not cap:
            return scores
        limit = self.number("softcap", cap)
        return self.put("Mul", self.put("Tanh", self.put("Div", scores, limit)), limit)

    def both(self, one: ir.Value | None, other: ir.Value | None) -> ir.Value | None:
        """Which keys a query sees, if it is told by two masks, by one or by none."""
        return self.put("And", one, other) if one is not None and other is not None else one if other is None else other

    def masked(self, scores: ir.Value, bias: ir.Value | None, seen: ir.Value | None) -> ir.Value:
        """The scores plus `bias`, or `_LOWEST` for a key that is not seen."""
        if bias is None and seen is None:
            return scores
        lowest = self.number("lowest", _LOWEST)
        if bias is not None:
            scores = self.put("Add", scores, self.put("Max", bias, lowest))
        return scores if seen is None else self.put("Where", seen, scores, lowest)

    def sees_any(self, bias: ir.Value | None, seen: ir.Value | None) -> ir.Value:
        """Whether a query sees a key at all: boolean of shape (..., queries or 1, 1)."""
        if bias is not None:
            seen = self.both(self.put("Greater", bias, self.number("minus_infinity", np.float32(-np.inf))), seen)
        most = self.put("ReduceMax", self.put("Cast", seen, to=ir.DataType.INT32), self.number("last", np.array([-1])))
        return self.put("Cast", most, to=ir.DataType.BOOL)

    def triangle(self) -> ir.Value:
        """Whether query i may see key j: j <= i, boolean of shape (queries, keys)."""
        lengths = [_length(self.node, index) for index in (0, 1)]
        key = (self.node.graph, *lengths)
        if key not in self.triangles:
            rows, columns = (self.positions(index) for index in (0, 1))
            rows = self.put("Unsqueeze", rows, self.number("axis", np.array([1])))
            triangle = self.put("GreaterOrEqual", rows, columns)
            triangle.shape, triangle.dtype = ir.Shape(lengths), ir.DataType.BOOL
            if None in lengths:
                return triangle
            self.triangles[key] = triangle
        return self.triangles[key]

    def positions(self, index: int) -> ir.Value:
        """0, 1, 2... for each query (index 0) or key (index 1)."""
        length, value = _length(self.node, index), self.node.inputs[index]
        if isinstance(length, int):
            end = self.number("length", np.int64(length))
        else:
            axis = len(ir.shape_of(value) or ()) - 2
            end = self.put("Squeeze", self.put("Shape", value, start=axis, end=axis + 1))
        return self.put("Range", self.number("first", np.int64(0)), end, self.number("step", np.int64(1)))

    def split(self, value: ir.Value | None, heads: int) -> ir.Value:
        """[B, S, heads * D] as [B, S, heads, D]."""
        return self.put("Reshape", value, self.number("split", np.array([0, 0, heads, -1])))

    def number(self, name: str, array: Any) -> ir.Value:
        return self.edit.initializer(f"{self.node.name}_{name}", np.asarray(array), graph=self.node.graph)  # type: ignore[arg-type]

    def put(self, op_type: str, *values: ir.Value | None, **attributes: Any) -> ir.Value:
        """A node before the one that is being decomposed."""
        return self.edit.insert(self.node, op_type, values, output=f"{self.node.name}_{op_type.lower()}", attributes=attributes)


def _may_hide_all(mask: ir.Value, is_causal: bool) -> bool:
    """Whether a query may see no key at all: never if the mask is a constant that leaves one to each."""
    array = ir.constant(mask)
    if array is None:
        return True
    seen = array if array.dtype == np.bool_ else array > -np.inf
    if is_causal:
        seen = seen & np.tri(*seen.shape[-2:], dtype=np.bool_)
    return not seen.any(-1).all()
