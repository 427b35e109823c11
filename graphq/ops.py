"""The custom operators of the domain `graphq` that kernels compute: what each takes, in which packed layout, and what it returns.

A pass packs operands with what stands in `graphq.ops_gemm` and `graphq.ops_softmax` and emits the operator, with its body of standard
operators, through `graphq.functions`; a kernel computes the same. Neither knows the other: both are tested against the references.
Contracts are as wide as the kernels: what no kernel takes is not written as an operator.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from graphq import ops_gemm, ops_softmax
from graphq.errors import UsageError
from graphq.names import unknown_name
from graphq.operands import FLOATS, HALVES, Operands, dtype_name

Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Operator:
    """One operator of the domain `graphq`.

    Attributes:
        inputs: Names of its inputs in order, those of the reference's parameters.
        layout: The packed layout of its weight or its codes; empty if it has neither.
        body: ONNX text for `graphq.functions.call`; needs opset 18.
        reference: What it computes, on arrays.
        check: Its contract, behind `graphq.ops.check`.
        floats: Types that its kernel computes in; its body takes float32 as well.
    """

    name: str
    inputs: tuple[str, ...]
    layout: str
    body: str
    reference: Callable[..., Array]
    check: Callable[[Operands], tuple[tuple[int, ...], str]]
    floats: tuple[str, ...] = FLOATS


_INTEGER_GEMM = ("x", "weight", "x_scale", "w_scale", "bias")
_ALL = (
    Operator(
        "W4A16Gemm", ("x", "weight", "w_scale", "bias"), ops_gemm.HALVES, ops_gemm.W4A16, ops_gemm.w4a16_gemm, ops_gemm.check, HALVES,
    ),
    Operator("W8A8Gemm", _INTEGER_GEMM, ops_gemm.ROWS, ops_gemm.W8A8, ops_gemm.w8a8_gemm, ops_gemm.check),
    Operator("W4A8Gemm", _INTEGER_GEMM, ops_gemm.HALVES, ops_gemm.W4A8, ops_gemm.w4a8_gemm, ops_gemm.check),
    Operator("SULQSoftmax", ("x", "params"), "", ops_softmax.SOFTMAX, ops_softmax.sulq_softmax, ops_softmax.check),
    Operator("SULQSoftmaxCodes", ("x", "params"), ops_softmax.PACKED, ops_softmax.CODES, ops_softmax.sulq_softmax_codes, ops_softmax.check),
    Operator(
        "SULQAttentionValue", ("packed", "levels", "v"), ops_softmax.PACKED, ops_softmax.ATTENTION_VALUE, ops_softmax.sulq_attention_value,
        ops_softmax.check,
    ),
)  # fmt: skip

OPERATORS: Mapping[str, Operator] = MappingProxyType({operator.name: operator for operator in _ALL})


def check(name: str, operands: Mapping[str, Any], where: str = "") -> tuple[tuple[int, ...], str]:
    """Shape and type of the result, once it is known that the operator `name` is defined for its operands.

    Args:
        operands: By input name: arrays, tensors, or whatever has a `shape` and a `dtype`.
        where: What to call the place in an error, such as a node.

    Raises:
        UsageError: an operand has a wrong shape or type; the message states what it must be.
    """
    if name not in OPERATORS:
        raise UsageError(**unknown_name("operator", name, OPERATORS))
    operator = OPERATORS[name]
    shapes = {key: tuple(operands[key].shape) for key in operator.inputs}
    dtypes = {key: dtype_name(operands[key]) for key in operator.inputs}
    return operator.check(Operands(name, shapes, dtypes, operator.floats, where))


def refusal(name: str, operands: Mapping[str, Any]) -> str | None:
    """Why the operator `name` is not defined for its operands, in a line; None if it is."""
    try:
        check(name, operands)
    except UsageError as error:
        return f"{error.what.rstrip('.')}, but {error.expected}"
    return None
