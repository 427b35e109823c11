"""stored: which constants are made of codes, and what they stand for."""

from __future__ import annotations

import numpy as np
import pytest

from graphq import ir, linear, stored

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
    np.testing.assert_array_equal(stored.decode(model, value(model, "w")), [[0.5, 2], [1.5, -2]])
    assert linear.linear_refusal(value(model, "y").producer()) == "it is quantized already"  # type: ignore[arg-type]


def test_floats_that_are_moved_are_not_stored_codes() -> None:
    model = ir.from_onnx_text(TEXT)
    assert stored.is_fixed(value(model, "t")) and not stored.is_stored(value(model, "t"))
    assert linear.linear_refusal(value(model, "b").producer()) == "its weight is not a constant of the graph"  # type: ignore[arg-type]
    np.testing.assert_array_equal(stored.decode(model, value(model, "t")), [[1, 3], [2, 4]])


@pytest.mark.parametrize("name", ["x", "d", "y"])
def test_what_depends_on_inputs_is_not_stored(name: str) -> None:
    model = ir.from_onnx_text(TEXT)
    assert not stored.is_fixed(value(model, name)) and not stored.decoders(value(model, name))
    with pytest.raises(ValueError, match="not a constant"):
        stored.decode(model, value(model, name))


def test_an_initializer_is_itself() -> None:
    model = ir.from_onnx_text(TEXT)
    assert stored.parts(value(model, "f")) == [value(model, "f")] and not stored.is_stored(value(model, "f"))
    np.testing.assert_array_equal(stored.decode(model, value(model, "f")), [[1, 2], [3, 4]])
