"""What may be half in a node: read off ONNX's definitions, and off the contracts of graphq's own operators."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from graphq import ir, ops
from graphq.errors import UsageError
from graphq.half import HALVES
from graphq.passes._cast_float_slots import GENERIC, Slots, slots


def model(body: str, inputs: str = "float[1, 5] x", outputs: str = "float[1, 5] y", opset: int = 22, inner: str = "") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\nm ({inputs}) => ({outputs})\n<{inner}> {{ {body} }}')

ROWS = [
    ("y = Add(x, x)", "bf16", 22, Slots((0, 1), (0,), False)),
    ("y = Transpose(x)", "fp16", 21, Slots((0,), (0,), True)),
    ("y = Concat <axis = 0> (x, x, x)", "fp16", 21, Slots((0, 1, 2), (0,), True)),
    ("y = Resize(x, , s)", "fp16", 21, Slots((0,), (0,), True)),
    ("y = DequantizeLinear(i, s)", "bf16", 22, Slots((1,), (0,), False)),
    ("y = DequantizeLinear(i, s)", "fp16", 23, Slots((1,), (0,), False)),
    ("y = DequantizeLinear(i, s)", "bf16", 24, Slots((1,), (0,), False)),
    ("y = DequantizeLinear <output_dtype = 1> (i, s)", "fp16", 23, "its output y is float32 whatever it reads"),
    ("y = QuantizeLinear(x, s)", "fp16", 21, Slots((0, 1), (), False)),
    ("y = QuantizeLinear(x, s)", "fp16", 23, Slots((0, 1), (), False)),
    ("y = QuantizeLinear(x, s)", "bf16", 24, Slots((0, 1), (), False)),
    ("y = Cast <to = 1> (i)", "fp16", 21, Slots((), (0,), True)),
    ("y = MaxPool <kernel_shape = [1]> (x)", "fp16", 21, Slots((0,), (0,), False)),
    ("y = MaxPool <kernel_shape = [1]> (x)", "bf16", 21, "it has no bfloat16 form in opset 21"),
    ("y = MaxPool <kernel_shape = [1]> (x)", "bf16", 22, Slots((0,), (0,), False)),
    ("y = Range(s, s, s)", "fp16", 21, "it has no float16 form in opset 21"),
    ("y = RandomNormal <shape = [1, 5]> ()", "fp16", 21, "its output output is float32 whatever it reads"),
    ("y = com.microsoft.FastGelu(x)", "fp16", 21, "com.microsoft.FastGelu is not an operator of ONNX"),
]


@pytest.mark.parametrize(("body", "name", "opset", "expected"), ROWS)
def test_slots_are_read_off_the_definitions(body: str, name: str, opset: int, expected: Slots | str) -> None:
    made = "uint8[1, 5] y" if "y = Quantize" in body else "float[1, 5] y"
    graph = model(body, outputs=made, inner="float[4] s = {1, 1, 1, 1}, int8[1, 5] i = {1, 2, 3, 4, 5}", opset=opset)
    (node,) = graph.graph
    assert slots(node, opset, HALVES[name]) == expected


OPERANDS = {
    "W4A16Gemm": {"x": (2, 64), "weight": (4, 32), "w_scale": (2, 4), "bias": (4,)},
    "W8A8Gemm": {"x": (2, 64), "weight": (4, 64), "x_scale": (), "w_scale": (4,), "bias": (4,)},
    "W4A8Gemm": {"x": (2, 64), "weight": (4, 32), "x_scale": (), "w_scale": (2, 4), "bias": (4,)},
    "SULQSoftmax": {"x": (2, 6), "params": (5,)},
    "SULQSoftmaxCodes": {"x": (2, 6), "params": (5,)},
    "SULQAttentionValue": {"packed": (2, 3), "levels": (16,), "v": (6, 4)},
}
INTEGERS = {("W8A8Gemm", "x"): "int8", ("W4A8Gemm", "x"): "int8", ("W8A8Gemm", "weight"): "int8", ("W4A8Gemm", "weight"): "uint8",
            ("W4A16Gemm", "weight"): "uint8", ("SULQAttentionValue", "packed"): "int8"}  # fmt: skip


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name", ops.OPERATORS)
def test_generic_inputs_are_those_of_the_contract(name: str, kind: type) -> None:
    """The contract takes half in all of them together, and in no other input."""
    def operands(half: frozenset[str]) -> dict[str, np.ndarray]:
        types = {key: kind if key in half else INTEGERS.get((name, key), np.float32) for key in OPERANDS[name]}
        return {key: np.zeros(shape, types[key]) for key, shape in OPERANDS[name].items()}

    ops.check(name, operands(GENERIC[name]))
    for key in OPERANDS[name].keys() - GENERIC[name]:
        with pytest.raises(UsageError):
            ops.check(name, operands(GENERIC[name] | {key}))
