"""lower: write quantized matrix products as the operators of `graphq.ops`, which graphq's TensorRT plugins compute in one kernel each.

A MatMul or Gemm whose weight is 4-bit codes behind a DequantizeLinear becomes `W4A16Gemm`; one that reads 8-bit codes on both sides
`W8A8Gemm`; 8-bit activations with 4-bit weights `W4A8Gemm`. A softmax that `sulq-softmax` quantized becomes `SULQSoftmax`, or, with
codes of 4 bits, `SULQSoftmaxCodes` with the product behind it as `SULQAttentionValue`. The operators are model-local functions with a
body of standard operators: any runtime runs the result, slowly; with `--engine plugins` TensorRT takes the kernels instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field

from graphq import functions, ir, linear, ops, ops_gemm
from graphq.errors import GraphqError, TargetError
from graphq.exclude import is_excluded, require_matches
from graphq.passes import _lower_softmax
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

OperatorName = Literal["W4A16Gemm", "W8A8Gemm", "W4A8Gemm", "SULQSoftmax", "SULQAttentionValue"]
_ALL: tuple[OperatorName, ...] = get_args(OperatorName)


@dataclass(frozen=True)
class Codes:
    """What a DequantizeLinear of a weight reads: codes `[K, N]`, and scales `[K / G, N]`."""

    codes: np.ndarray
    scale: np.ndarray
    storage: str


@pass_options
class Lower(Pass):
    """Replaces quantized MatMul and Gemm by the operators that graphq has kernels for.

    Attributes:
        operators: Which of them to write.
        min_size: Fewest weights that are worth it; smaller products are left to the runtime.
        exclude: Patterns of node names (or operator types) that stay as they are.
    """

    name: ClassVar[str] = "lower"

    operators: tuple[OperatorName, ...] = _ALL
    min_size: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        if not target.takes_plugins:
            raise TargetError(
                f"{target.name} has no plugins that could compute the operators of graphq.", where=f"pass {self.name}",
                expected="--target tensorrt or generic", hint="take the pass out: this runtime has kernels of its own for Q/DQ",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        for node in [node for node in model.graph if node.domain == ir.DOMAIN and "Softmax" not in node.op_type]:
            if _is_behind_softmax(node) and (why := _lower_softmax.lower(node, ctx, self.operators)):
                ctx.skip(node, why)
        for node in [node for node in model.graph if not node.domain and node.op_type in ("Gemm", "MatMul")]:
            weight = _weight(node)
            if isinstance(weight, str):
                ctx.skip(node, weight)
            elif reason := self._refusal(node, weight):
                ctx.skip(node, reason)
            else:
                _lower(node, weight, ctx)
        ctx.edit.prune()

    def _refusal(self, node: ir.Node, weight: Codes) -> str | None:
        name = _operator(node, weight)
        if is_excluded(node, self.exclude):
            return "excluded by the recipe"
        if name is None:
            return "8-bit weights with float activations have no kernel"
        if name == "W8A8Gemm" and len(weight.scale) > 1:
            return "W8A8Gemm takes one scale a channel, not one a group"
        if name not in self.operators:
            return f"{name} is not among the operators of the recipe"
        if weight.codes.size < self.min_size:
            return f"it has fewer than {self.min_size} weights"
        if node.op_type == "Gemm" and not _is_plain(node):
            return "it scales or transposes its data, or its bias is not a constant of one number a channel"
        try:
            ops.check(name, _operands(node, weight, name))
        except GraphqError as error:
            return f"{name} is not defined for it: {error.what}"
        return None


def _is_behind_softmax(node: ir.Node) -> bool:
    maker = ir.producer(node.inputs[0])
    return maker is not None and maker.op_type == "Softmax"


def _weight(node: ir.Node) -> Codes | str:
    """The codes of the weight of `node`, or why it has none that a kernel takes."""
    maker = ir.producer(linear.weight_of(node))
    codes = ir.constant(maker.inputs[0]) if maker is not None and maker.op_type == "DequantizeLinear" else None
    if maker is None or codes is None:
        return "its weight is not quantized"
    storage = str(maker.inputs[0].dtype).lower()  # type: ignore[union-attr]
    scale, zero = (ir.constant(value) if value is not None else None for value in (maker.inputs[1], (*maker.inputs, None)[2]))
    if storage not in ("int4", "int8") or codes.ndim != 2 or scale is None:
        return f"its weight is {storage} of rank {codes.ndim}, not a matrix of int4 or int8"
    if zero is not None and np.any(zero.astype(np.int8)):
        return "its weight has a zero point"
    inputs = linear.in_axis(node)
    rows = codes.astype(np.int8) if inputs == 0 else codes.astype(np.int8).T
    if scale.ndim == 2:
        scales = scale if inputs == 0 else scale.T
        if scales.shape[1] != rows.shape[1]:
            return "its scales lie along the outputs"
    elif scale.ndim == 0 or ir.attribute(maker, "axis", 1) % 2 != inputs:
        scales = np.broadcast_to(scale, (1, rows.shape[1]))
    else:
        return "its scales lie along the axis that is summed over"
    return Codes(rows, np.ascontiguousarray(scales), storage)


def _activation(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """8-bit codes and their one scale, if those are what `node` reads."""
    maker = ir.producer(linear.data_of(node))
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    codes, scale, zero = (*maker.inputs, None)[:3]
    offset = None if zero is None else ir.constant(zero)
    fits = codes is not None and str(codes.dtype).lower() == "int8" and ir.shape_of(scale) == () and (zero is None or offset is not None)
    return (codes, scale) if fits and not np.any(offset or 0) else None  # type: ignore[return-value]


def _operator(node: ir.Node, weight: Codes) -> OperatorName | None:
    is_integer = _activation(node) is not None
    return {("int4", False): "W4A16Gemm", ("int8", True): "W8A8Gemm", ("int4", True): "W4A8Gemm"}.get((weight.storage, is_integer))  # type: ignore[return-value]


def _is_plain(node: ir.Node) -> bool:
    """Whether a Gemm computes `x @ w + bias` with a constant vector as bias, or without one."""
    factors = [ir.attribute(node, name, 1.0) for name in ("alpha", "beta")]
    bias = linear.bias_of(node)
    shape = () if bias is None or ir.constant(bias) is None else ir.constant(bias).shape  # type: ignore[union-attr]
    return factors == [1.0, 1.0] and not ir.attribute(node, "transA", 0) and (bias is None or len(shape) == 1)


def _operands(node: ir.Node, weight: Codes, name: OperatorName) -> dict[str, np.ndarray]:
    """The operands of the operator `name`; `x` stands in by its shape, with every open axis 1."""
    kind = _float_type(node)
    outputs, found = weight.codes.shape[1], {}
    shape = tuple(size if isinstance(size, int) else 1 for size in ir.shape_of(linear.data_of(node)) or (1, len(weight.codes)))
    found["x"] = np.zeros(shape, np.int8 if name != "W4A16Gemm" else kind)
    found["weight"] = ops_gemm.pack_int8(weight.codes) if name == "W8A8Gemm" else ops_gemm.pack_int4(weight.codes)
    if name != "W4A16Gemm":
        found["x_scale"] = np.zeros((), np.float32)
    scale = weight.scale[0] if name == "W8A8Gemm" else weight.scale
    found["w_scale"] = scale.astype(kind if name == "W4A16Gemm" else np.float32)
    bias = ir.constant(linear.bias_of(node)) if node.op_type == "Gemm" else None
    found["bias"] = np.zeros(outputs, kind) if bias is None else np.broadcast_to(bias, (outputs,)).astype(kind)
    return found


def _float_type(node: ir.Node) -> np.dtype:
    """The float type that `node` computes in."""
    dtype = node.outputs[0].dtype
    return np.dtype(np.float32 if dtype is None else dtype.numpy())


def _lower(node: ir.Node, weight: Codes, ctx: PassContext) -> None:
    name = _operator(node, weight)
    assert name is not None
    arrays, data, stem = _operands(node, weight, name), _activation(node), node.name or node.outputs[0].name or "product"
    values: dict[str, ir.Value | None] = {
        key: ctx.edit.initializer(f"{stem}_{key}", arrays[key]) for key in ops.OPERATORS[name].inputs if key not in ("x", "x_scale")
    }
    values["x"], values["x_scale"] = (linear.data_of(node), None) if data is None else (data[0], data[1])
    if name != "W4A16Gemm" and data is not None and data[1].dtype != ir.DataType.FLOAT:
        scale = ir.constant(data[1])
        assert scale is not None
        values["x_scale"] = ctx.edit.initializer(f"{stem}_x_scale", scale.astype(np.float32))
    out = node.outputs[0]
    operands = [values[key] for key in ops.OPERATORS[name].inputs]
    result = functions.call(ctx.edit, ops.OPERATORS[name].body, node, operands, output=f"{out.name}_lowered", like=out)
    ctx.edit.replace(out, result)
    ctx.edit.remove(node)
    ctx.measure(node.name or "", weights=float(weight.codes.size), bits=4.0 if weight.storage == "int4" else 8.0)
