"""lower: write quantized matrix products as the operators of `graphq.ops`, which graphq's TensorRT plugins compute in one kernel each.

A MatMul or Gemm whose weight is 4-bit codes behind a DequantizeLinear becomes `W4A16Gemm`; one that reads 8-bit codes on both sides
`W8A8Gemm`; 8-bit activations with 4-bit weights `W4A8Gemm`. A softmax that `sulq-softmax` quantized becomes `SULQSoftmax`, or, with
codes of 4 bits, `SULQSoftmaxCodes` with the product behind it as `SULQAttentionValue`. The operators are model-local functions with a
body of standard operators: any runtime runs the result, slowly; with `--engine plugins` TensorRT takes the kernels instead.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, get_args

import numpy as np
from pydantic import Field

from graphq import functions, ir, linear, ops, ops_gemm
from graphq.errors import TargetError
from graphq.exclude import is_excluded, require_matches
from graphq.operands import Operand
from graphq.passes import _lower_softmax
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

OperatorName = Literal["W4A16Gemm", "W8A8Gemm", "W4A8Gemm", "SULQSoftmax", "SULQAttentionValue"]
_ALL: tuple[OperatorName, ...] = get_args(OperatorName)


@dataclass(frozen=True)
class Codes:
    """What the DequantizeLinear of a weight reads.

    Attributes:
        codes: `[K, N]`.
        scale: `[K / G, N]`.
        storage: `int4` or `int8`.
        key: Names the two wherever they are read: a weight that several products share is packed once.
    """

    codes: np.ndarray
    scale: np.ndarray
    storage: str
    key: Hashable


@dataclass(frozen=True)
class Product:
    """What a MatMul or Gemm becomes; `dtype` is the float type that it computes in."""

    operator: OperatorName
    weight: Codes
    dtype: np.dtype


@pass_options
class Lower(Pass):
    """Replaces quantized MatMul, Gemm and Softmax by the operators that graphq has kernels for.

    Attributes:
        operators: Which of them to write.
        min_size: Fewest weights that are worth it; smaller products are left to the runtime. Attention has none, and is not asked.
        exclude: Patterns of node names (or operator types) that stay as they are. Of attention, those of a softmax or its quantizer keep
            both; where the product is excluded, the softmax writes levels for it.
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
        kept: dict[ir.Node, str] = {}
        for node in [node for node in model.graph if node.domain == ir.DOMAIN and "Softmax" not in node.op_type]:
            if _is_behind_softmax(node):
                attention = _lower_softmax.plan(node, self.operators, self.exclude)
                if isinstance(attention, str):
                    ctx.skip(node, attention)
                else:
                    kept |= {use.node: attention.reason for use in ir.uses(node.outputs[0]) if attention.reason}
                    _lower_softmax.write(attention, ctx)
        for node in [node for node in model.graph if not node.domain and node.op_type in ("Gemm", "MatMul")]:
            found = kept.get(node) or self._product(node)
            if isinstance(found, str):
                ctx.skip(node, found)
            else:
                _lower(node, found, ctx)
        ctx.edit.prune()

    def _product(self, node: ir.Node) -> Product | str:
        """What `node` becomes, or why it stays."""
        weight = _weight(node)
        if isinstance(weight, str):
            return weight
        name, dtype = _operator(node, weight), _float_type(node)
        if is_excluded(node, self.exclude):
            return "excluded by the recipe"
        if name is None:
            return "8-bit weights with float activations have no kernel"
        if name not in self.operators:
            return f"{name} is not among the operators of the recipe"
        if weight.codes.size < self.min_size:
            return f"it has fewer than {self.min_size} weights"
        if node.op_type == "Gemm" and not _is_plain(node):
            return "it scales or transposes its data, or its bias is not a constant of one number a channel"
        if name == "W8A8Gemm" and len(weight.scale) > 1:
            return "W8A8Gemm takes one scale a channel, not one a group"
        if str(dtype) not in ops.OPERATORS[name].floats:
            return f"no kernel of {name} takes {dtype}; put cast-float before lower"
        product = Product(name, weight, dtype)
        return ops.refusal(name, _operands(node, product)) or product


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
    return Codes(rows, np.ascontiguousarray(scales), storage, (maker.inputs[0], maker.inputs[1], inputs))


def _activation(node: ir.Node) -> tuple[ir.Value, ir.Value] | None:
    """8-bit codes and their one scale, if those are what `node` reads."""
    maker = ir.producer(linear.data_of(node))
    if maker is None or maker.op_type != "DequantizeLinear":
        return None
    codes, scale, zero = (*maker.inputs, None)[:3]
    offset = None if zero is None else ir.constant(zero)
    fits = codes is not None and str(codes.dtype).lower() == "int8" and ir.shape_of(scale) == () and (zero is None or offset is not None)
    fits = fits and (ir.constant(scale) is not None or scale.dtype == ir.DataType.FLOAT)  # type: ignore[union-attr]
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


def _float_type(node: ir.Node) -> np.dtype:
    """The float type that `node` computes in."""
    dtype = node.outputs[0].dtype
    return np.dtype(np.float32 if dtype is None else dtype.numpy())


def _operands(node: ir.Node, product: Product) -> dict[str, Operand]:
    """What the contract looks at, before anything is packed; open axes of `x` are taken to be 1."""
    weight, dtype, integer = product.weight, str(product.dtype), product.operator != "W4A16Gemm"
    (k, n), by_row = weight.codes.shape, product.operator == "W8A8Gemm"
    *leading, last = ir.shape_of(linear.data_of(node)) or (1, k)
    shape = (*(size if isinstance(size, int) else 1 for size in leading), last if isinstance(last, int) else k)
    return {
        "x": Operand(shape, "int8" if integer else dtype),
        "x_scale": Operand((), "float32"),
        "weight": Operand((n, k), "int8") if by_row else Operand((n, ops_gemm.packed_width(k)), "uint8"),
        "w_scale": Operand((n,) if by_row else weight.scale.shape, "float32" if integer else dtype),
        "bias": Operand((n,), dtype),
    }


def _lower(node: ir.Node, product: Product, ctx: PassContext) -> None:
    name, weight, dtype = product.operator, product.weight, product.dtype
    data, stem, out = _activation(node), node.name or node.outputs[0].name or "product", node.outputs[0]
    by_row, floats = name == "W8A8Gemm", dtype if data is None else np.dtype(np.float32)
    pack = ops_gemm.pack_int8 if by_row else ops_gemm.pack_int4

    def shared(key: str, what: Hashable, make: Callable[[], np.ndarray], storage: str) -> ir.Value:
        return ctx.edit.shared((name, key, what, storage), f"{stem}_{key}", make, storage)

    bias = ir.constant(linear.bias_of(node)) if node.op_type == "Gemm" else None
    offsets = np.zeros(weight.codes.shape[1], dtype) if bias is None else np.broadcast_to(bias, weight.codes.shape[1:]).astype(dtype)
    scale = weight.scale[0] if by_row else weight.scale
    values: dict[str, ir.Value] = {
        "x": linear.data_of(node) if data is None else data[0],
        "weight": shared("weight", weight.key, lambda: pack(weight.codes), "int8" if by_row else "uint8"),
        "w_scale": shared("w_scale", weight.key, lambda: scale.astype(floats), str(floats)),
        "bias": shared("bias", offsets.tobytes(), lambda: offsets, str(dtype)),
    }
    if data is not None:
        step = ir.constant(data[1]) if data[1].dtype != ir.DataType.FLOAT else None
        values["x_scale"] = data[1] if step is None else shared("x_scale", data[1], lambda: step.astype(np.float32), "float32")
    operands = [values[key] for key in ops.OPERATORS[name].inputs]
    result = functions.call(ctx.edit, ops.OPERATORS[name].body, node, operands, output=f"{out.name}_lowered", like=out)
    ctx.edit.replace(out, result)
    ctx.edit.remove(node)
    ctx.measure(node.name or "", weights=float(weight.codes.size), bits=4.0 if weight.storage == "int4" else 8.0)
