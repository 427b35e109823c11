"""stored: which constants are made of codes, and what they stand for."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from graphq import ir, linear, qdq, stored
from graphq.executor import decode

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
TEXT = """
<ir_version: 10, opset_import: ["" : 21]>
m (float[n, 2] x) => (float[n, 2] y, float[n, 2] z)
<int8[2,2] q = {1, 2, 3, -4}, float s = {0.5}, float[2,2] f = {1, 2, 3, 4}, float[2,2] g = {0, 1, 0, 0}>
{
  a = DequantizeLinear(q, s)
  w = Add(a, g)
  y = MatMul(x, w)
  t = Transpose(f)
  b = MatMul(x, t)
  c = DequantizeLinear(q, s)
  d = Mul(c, x)
  z = Add(b, d)
}
"""


def value(model: ir.Model, name: str) -> ir.Value:
    return ir.values_by_name(model.graph)[name]


def test_a_weight_may_be_any_subgraph_over_constants() -> None:
    model = ir.from_onnx_text(TEXT)
    assert [node.op_type for node in stored.decoders(value(model, "w"))] == ["DequantizeLinear", "Add"]
    assert {part.name for part in stored.parts(value(model, "w"))} == {"q", "s", "g"}
    np.testing.assert_array_equal(decode(model, value(model, "w")), [[0.5, 2], [1.5, -2]])
    assert linear.linear_refusal(value(model, "y").producer()) == "it is quantized already"  # type: ignore[arg-type]


def test_floats_that_are_moved_are_not_stored_codes() -> None:
    model = ir.from_onnx_text(TEXT)
    assert stored.is_fixed(value(model, "t")) and not stored.is_stored(value(model, "t"))
    assert linear.linear_refusal(value(model, "b").producer()) == "its weight is not a constant of the graph"  # type: ignore[arg-type]
    np.testing.assert_array_equal(decode(model, value(model, "t")), [[1, 3], [2, 4]])


@pytest.mark.parametrize("name", ["x", "d", "y"])
def test_what_depends_on_inputs_is_not_stored(name: str) -> None:
    model = ir.from_onnx_text(TEXT)
    assert not stored.is_fixed(value(model, name)) and not stored.decoders(value(model, name))
    with pytest.raises(ValueError, match="not a constant"):
        decode(model, value(model, name))


def test_an_initializer_is_itself() -> None:
    model = ir.from_onnx_text(TEXT)
    assert stored.parts(value(model, "f")) == [value(model, "f")] and not stored.is_stored(value(model, "f"))
    np.testing.assert_array_equal(decode(model, value(model, "f")), [[1, 2], [3, 4]])


def test_constant_nodes_are_constants_too() -> None:
    model = ir.from_onnx_text(f"""{HEAD}
m (float[n, 2] x) => (float[n, 2] y) <int8[2,2] q = {{1, 2, 3, -4}}>
{{ s = Constant <value = float {{0.5}}> ()  h = Constant <value_float = 2.0> ()
  a = DequantizeLinear(q, s)  w = Mul(a, h)  y = MatMul(x, w) }}""")
    assert stored.is_stored(value(model, "w")) and {part.name for part in stored.parts(value(model, "w"))} == {"q", "s"}
    assert sum(map(stored.nbytes, stored.parts(value(model, "w")))) == 8 == qdq.quantized_weight_bytes(model)[1]
    np.testing.assert_array_equal(decode(model, value(model, "w")), [[1, 2], [3, -4]])
    assert stored.is_fixed(value(model, "h")) and decode(model, value(model, "h")) == 2


def test_a_weight_inside_a_branch() -> None:
    model = ir.from_onnx_text(f"""{HEAD}
m (float[n, 2] x, bool c) => (float[n, 2] y) <float outer = {{2}}>
{{ y = If(c) <then_branch = t () => (float[n, 2] a) <int8[2,2] q = {{1, 2, 3, -4}}, float s = {{0.5}}>
     {{ d = DequantizeLinear(q, s)  w = Mul(d, outer)  a = MatMul(x, w) }}, else_branch = e () => (float[n, 2] b) {{ b = Neg(x) }}> }}""")
    product = next(node for node in ir.all_nodes(model) if node.op_type == "MatMul")
    weight = linear.weight_of(product)
    assert weight is not None and stored.is_stored(weight)
    np.testing.assert_array_equal(decode(model, weight), [[1, 2], [3, -4]])


@pytest.mark.parametrize("op", ["RandomNormalLike(q)", "Bernoulli(q)", "Dropout(q)"])
def test_random_numbers_are_not_fixed(op: str) -> None:
    model = ir.from_onnx_text(f"{HEAD}\nm () => (float[2] y) <float[2] q = {{0.5, 0.5}}> {{ r = {op}  y = Neg(r) }}")
    assert not stored.is_fixed(value(model, "y"))


def test_a_weight_at_the_end_of_a_long_chain() -> None:
    body = " ".join(f"c{index + 1} = Neg(c{index})" for index in range(3000))
    model = ir.from_onnx_text(f"""{HEAD}
m (float[n, 2] x) => (float[n, 2] y) <float[2, 2] c0 = {{1, 2, 3, 4}}> {{ {body}  y = MatMul(x, c3000) }}""")
    assert len(stored.decoders(value(model, "c3000"))) == 3000
    assert linear.linear_refusal(model.graph[-1]) == "its weight is not a constant of the graph"


def test_what_many_read_is_computed_once() -> None:
    body = " ".join(f"c{index + 1} = Add(c{index}, c{index})" for index in range(40))
    model = ir.from_onnx_text(f"{HEAD}\nm () => (float[1] c40) <float[1] c0 = {{1}}> {{ {body} }}")
    assert [node.outputs[0].name for node in stored.decoders(value(model, "c40"))] == [f"c{index + 1}" for index in range(40)]


def test_facts_about_operators_need_no_runtime() -> None:
    code = "import sys, graphq.linear; sys.exit('graphq.executor' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=60).returncode == 0
