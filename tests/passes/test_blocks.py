"""Where models fall into blocks."""

from __future__ import annotations

import onnx_ir
import pytest
from onnx import parser

from graphq import ir, linear
from graphq.models import onnx_path
from graphq.passes import _blocks

W = "<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[4] b = {1, 2, 3, 4}>"

CASES = {
    "a chain falls into layers, each with its bias": ("a = MatMul(x, w) c = Add(a, b) r = Relu(c) y = MatMul(r, w)", ["c", "y"]),
    "a residual sum ends a block": ("a = MatMul(x, w) r = Relu(a) c = MatMul(r, w) s = Add(x, c) y = MatMul(s, w)", ["s", "y"]),
    "so does one with a layer in each branch": ("a = MatMul(x, w) c = MatMul(x, w) s = Add(a, c) y = Relu(s)", ["s"]),
    "a sum without layers does not": ("a = MatMul(x, w) r = Relu(a) s = Add(a, r) y = MatMul(s, w)", ["a", "y"]),
    "a mask made of a shape is no branch": (
        "n = Shape(x) f = Cast <to = 1> (n) m = ReduceMax <keepdims = 0> (f) a = MatMul(x, w) s = Add(a, m) y = MatMul(s, w)", ["a", "y"],
    ),
    "a layer before all sums is one of its own": (
        "a = MatMul(x, w) r = Relu(a) c = MatMul(r, w) s = Add(r, c) e = MatMul(s, w) y = Add(s, e)", ["a", "s", "y"],
    ),
}  # fmt: skip


def ends(model: ir.Model, sums: int = 1) -> list[str | None]:
    layers = [node for node in model.graph if node.op_type in linear.LINEAR_OPS]
    return [value.name for value in _blocks.ends(model.graph, [node for node in layers if ir.is_constant(node.inputs[1])], sums)]


@pytest.mark.parametrize("case", CASES)
def test_ends(case: str) -> None:
    body, expected = CASES[case]
    text = f'<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) {W} {{ {body} }}'
    assert ends(onnx_ir.from_proto(parser.parse_model(text))) == expected


def test_several_sums_to_a_block() -> None:
    """The last block has what is left, and no layer is without a block."""
    model = ir.load(onnx_path("digits_vit"))
    one, two, three = (ends(model, sums) for sums in (1, 2, 3))
    assert len(one) == 10 and one[0] == "conv2d" and one[-1] == "logits"
    assert two == [one[0], *one[2:9:2], one[-1]] and three == [one[0], one[3], one[6], one[8], one[9]]
