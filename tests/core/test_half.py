"""Half precision: numbers that are those of the types, not of ONNX Runtime's CPU."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from graphq import half, ir
from graphq.executor import Executor, Fetch
from graphq.half import HALVES

X = np.array([[3000.0, 1.0009766, -0.3333, 1e-6, 70.0]], np.float32)
TYPES = {"fp16": ("float16", np.float16), "bf16": ("bfloat16", ml_dtypes.bfloat16)}
BOTH = pytest.mark.parametrize("name", TYPES)


def model(body: str, inputs: str = "float[1, 5] x", outputs: str = "float[1, 5] y", opset: int = 22, inner: str = "") -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : {opset}]>\nm ({inputs}) => ({outputs})\n<{inner}> {{ {body} }}')


def square(name: str) -> ir.Model:
    """Casts, squares and adds in half precision; the square of 3000 is beyond float16."""
    kind = TYPES[name][0]
    body = f"h = Cast <to = {int(HALVES[name].code)}> (x)\ns = Mul(h, h)\nt = Add(s, h)\ny = Cast <to = 1> (t)"
    return model(body, inner=", ".join(f"{kind}[1, 5] {value}" for value in "hst"))


@BOTH
def test_limits_are_those_of_the_type(name: str) -> None:
    one, info = HALVES[name], ml_dtypes.finfo(TYPES[name][1])
    assert (one.limit, one.tiny, one.least) == (float(info.max), float(info.tiny), float(info.smallest_subnormal))
    exact = np.arange(2**one.digits + 2, dtype=np.float32)
    assert (one.round(exact[:-1]) == exact[:-1]).all() and one.round(exact[-1:]) != exact[-1:]
    largest = np.array([3.4e38, -np.inf, 2.0], np.float32)
    assert one.round(largest, saturate=True).astype(np.float64).tolist() == [one.limit, -one.limit, 2.0]
    assert np.isinf(one.round(largest)[:2].astype(np.float32)).all()


@BOTH
def test_executor_computes_as_the_type_does(name: str) -> None:
    """Bit for bit what numpy gives with the same type, at the output and inside; the model itself is not changed."""
    graph, kind = square(name), TYPES[name][1]
    with np.errstate(over="ignore"):
        h = X.astype(kind)
        s = (h.astype(np.float32) ** 2).astype(kind)
        t = (s.astype(np.float32) + h.astype(np.float32)).astype(kind)
    found = Executor(graph, [Fetch("y"), Fetch("s"), Fetch("h"), Fetch("s", "extrema")]).run({"x": X})
    for array, expected in zip(found, (t, s, h), strict=False):
        assert array.dtype == np.float32
        np.testing.assert_array_equal(array, expected.astype(np.float32))
    assert found[3].tolist() == [0, s.astype(np.float32).max()]
    assert np.isinf(found[0]).any() == (name == "fp16")
    assert [node.op_type for node in graph.graph] == ["Cast", "Mul", "Add", "Cast"]


def test_onnx_runtime_alone_never_overflows() -> None:
    """Why half precision is emulated. If this fails, ONNX Runtime's CPU has learned float16, and `emulated` may not be needed for it."""
    assert np.isfinite(Executor(square("fp16"), deployed=True).run({"x": X})[0]).all()


def test_what_goes_in_and_out_keeps_its_type() -> None:
    weight = "float16[1] w = {11878}"  # the bits of 0.1
    graph = model("t = Mul(x, w)\ny = Mul(t, t)", "float16[1, 5] x", "float16[1, 5] y, float16[1, 5] t", inner=weight)
    x = X.astype(np.float16) / 100
    y, t = Executor(graph).run({"x": x})
    expected = x * np.float16(0.1)
    assert y.dtype == t.dtype == np.float16
    np.testing.assert_array_equal(t, expected)
    np.testing.assert_array_equal(y, expected * expected)


@pytest.mark.parametrize("body", [
    "h = Cast <to = 10> (x)\nu = Unknown.F(h)\ny = Cast <to = 1> (u)",
    "h = Cast <to = 10> (x)\nb = Less(x, x)\nc = ReduceMin <keepdims = 0> (i)\nt = If (c) <then_branch = a () => (float16[1, 5] p) "
    "{ p = Neg(h) }, else_branch = e () => (float16[1, 5] q) { q = Neg(h) }>\ny = Cast <to = 1> (t)",
    "h = Cast <to = 10> (x)\nt = Neg(h)\ny = Cast <to = 1> (t)",
])  # fmt: skip
def test_what_is_not_understood_is_run_as_it_is(body: str) -> None:
    """Half values in subgraphs, in operators of other domains, and values of unknown type."""
    known = "" if "t = Neg" in body else "float16[1, 5] u, float16[1, 5] t, bool[1, 5] b, bool c"
    graph = model(body, inner=f"float16[1, 5] h{', ' * bool(known)}{known}")
    assert half.has_half(graph) and half.emulated(graph) is graph


def test_float32_models_are_run_as_they_are() -> None:
    graph = model("y = Mul(x, x)")
    assert not half.has_half(graph) and half.emulated(graph) is graph
