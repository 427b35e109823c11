"""Elementwise operators: arithmetic, functions of one number, activations, comparisons, bits, choices."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.table import Call, operator
from graphq.torch_executor.tensors import cast, round_through

# ---- functions of one number ----------------------------------------------------------------------------------------

_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh, "Atan": torch.atan,
    "Atanh": torch.atanh, "Cos": torch.cos, "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Log": torch.log, "Neg": torch.neg,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Sigmoid": torch.sigmoid, "Sin": torch.sin, "Sinh": torch.sinh,
    "Softplus": functional.softplus, "Softsign": functional.softsign, "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
    "Mish": functional.mish, "HardSwish": functional.hardswish, "Identity": lambda x: x,
}  # fmt: skip
_STEPS: dict[str, Callable[[Tensor], Tensor]] = {
    "Ceil": torch.ceil, "Floor": torch.floor, "IsNaN": torch.isnan, "Not": torch.logical_not, "Sign": torch.sign,
}  # fmt: skip


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda call, *operands: function(*operands)


for _name, _function in _SMOOTH.items():
    operator(_name, since=1)(_plain(_function))
for _name, _function in _STEPS.items():
    operator(_name, gradient="none", since=1)(_plain(_function))


@operator("Round", gradient="none")
def round_(call: Call, x: Tensor) -> Tensor:
    return round_through(x) if call.is_own else torch.round(x)


@operator("IsInf", gradient="none")
def is_inf(call: Call, x: Tensor) -> Tensor:
    above, below = call.get("detect_positive", 1), call.get("detect_negative", 1)
    return torch.isposinf(x) & bool(above) | torch.isneginf(x) & bool(below)


@operator("Celu")
def celu(call: Call, x: Tensor) -> Tensor:
    return functional.celu(x, call.get("alpha", 1.0))


@operator("Elu")
def elu(call: Call, x: Tensor) -> Tensor:
    return functional.elu(x, call.get("alpha", 1.0))


@operator("Gelu")
def gelu(call: Call, x: Tensor) -> Tensor:
    return functional.gelu(x, approximate=call.get("approximate", "none"))


@operator("HardSigmoid")
def hard_sigmoid(call: Call, x: Tensor) -> Tensor:
    return torch.clamp(x * call.get("alpha", 0.2) + call.get("beta", 0.5), 0, 1)


@operator("LeakyRelu")
def leaky_relu(call: Call, x: Tensor) -> Tensor:
    return functional.leaky_relu(x, call.get("alpha", 0.01))


@operator("PRelu")
def p_relu(call: Call, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@operator("Selu")
def selu(call: Call, x: Tensor) -> Tensor:
    alpha, gamma = call.get("alpha", 1.67326319217681884765625), call.get("gamma", 1.05070102214813232421875)
    return gamma * torch.where(x > 0, x, alpha * torch.expm1(torch.clamp(x, max=0)))


@operator("Shrink")
def shrink(call: Call, x: Tensor) -> Tensor:
    bias, limit = call.get("bias", 0.0), call.get("lambd", 0.5)
    return torch.where(x < -limit, x + bias, torch.where(x > limit, x - bias, torch.zeros_like(x)))


@operator("Swish")
def swish(call: Call, x: Tensor) -> Tensor:
    return x * torch.sigmoid(call.get("alpha", 1.0) * x)


@operator("ThresholdedRelu")
def thresholded_relu(call: Call, x: Tensor) -> Tensor:
    return torch.where(x > call.get("alpha", 1.0), x, torch.zeros_like(x))


@operator("Clip", since=11)
def clip(call: Call, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


@operator("Dropout")
def dropout(call: Call, x: Tensor, *_: Any) -> Any:
    """As in inference: nothing is dropped."""
    return x if len(call.wanted) == 1 else (x, torch.ones_like(x, dtype=torch.bool))


# ---- arithmetic -----------------------------------------------------------------------------------------------------


operator("Add")(_plain(torch.add))
operator("Sub")(_plain(torch.sub))
operator("Mul")(_plain(torch.mul))


@operator("Div")
def div(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.div(a, b) if a.is_floating_point() or b.is_floating_point() else torch.div(a, b, rounding_mode="trunc")


@operator("Mod")
def mod(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.fmod(a, b) if call.get("fmod", 0) else torch.remainder(a, b)


@operator("Pow")
def pow_(call: Call, x: Tensor, exponent: Tensor) -> Tensor:
    return torch.pow(x, exponent).to(x.dtype)


@operator("Sum")
def sum_(call: Call, *operands: Tensor) -> Tensor:
    return functools.reduce(torch.add, operands)


@operator("Mean")
def mean(call: Call, *operands: Tensor) -> Tensor:
    return functools.reduce(torch.add, operands) / len(operands)


@operator("Max")
def max_(call: Call, *operands: Tensor) -> Tensor:
    return functools.reduce(torch.maximum, operands)


@operator("Min")
def min_(call: Call, *operands: Tensor) -> Tensor:
    return functools.reduce(torch.minimum, operands)


@operator("MatMul")
def matmul(call: Call, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@operator("Gemm")
def gemm(call: Call, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    a, b = a.T if call.get("transA", 0) else a, b.T if call.get("transB", 0) else b
    if c is not None and c.ndim == 1 and alpha == beta == 1 and c.dtype == a.dtype:
        return torch.addmm(c, a, b)
    y = torch.matmul(a, b)
    y = y if alpha == 1 else alpha * y
    return y if c is None else y + (c if beta == 1 else beta * c)


@operator("Einsum")
def einsum(call: Call, *operands: Tensor) -> Tensor:
    return torch.einsum(call.get("equation").replace(" ", ""), *operands)


@operator("Det")
def det(call: Call, x: Tensor) -> Tensor:
    return torch.linalg.det(x)


@operator("Where")
def where(call: Call, condition: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(condition, a, b)


@operator("Cast")
def cast_(call: Call, x: Tensor) -> Tensor:
    return cast(x, call.made, call.dtype, saturate=bool(call.get("saturate", 1)))  # type: ignore[arg-type]


@operator("CastLike")
def cast_like(call: Call, x: Tensor, like: Tensor) -> Tensor:
    kind = call.type(1)
    return cast(x, kind, call.dtype, saturate=bool(call.get("saturate", 1))) if kind is not None else x.to(like.dtype)


# ---- comparisons, logic, bits ---------------------------------------------------------------------------------------

_CHOICES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge, "Less": torch.lt, "LessOrEqual": torch.le,
    "And": torch.logical_and, "Or": torch.logical_or, "Xor": torch.logical_xor,
    "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or, "BitwiseXor": torch.bitwise_xor,
}  # fmt: skip
for _name, _choice in _CHOICES.items():
    operator(_name, gradient="none")(_plain(_choice))


@operator("BitwiseNot", gradient="none")
def bitwise_not(call: Call, x: Tensor) -> Tensor:
    """Of unsigned integers that a wider type holds, their own bits alone."""
    return cast(~x, call.types[0], call.dtype) if call.types[0] is not None else ~x


@operator("BitShift", gradient="none")
def bit_shift(call: Call, x: Tensor, bits: Tensor) -> Tensor:
    return torch.bitwise_left_shift(x, bits) if call.get("direction") == "LEFT" else torch.bitwise_right_shift(x, bits)


