"""_value_layer: the layer behind attention and activations is found, channel by channel, and takes a factor for them."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.editor import Editor
from graphq.executor import Executor
from graphq.passes import _scaling, _value_layer

T, H, D = 5, 2, 3
C = H * D
RNG = np.random.default_rng(0)
CONSTANTS: dict[str, np.ndarray] = {
    "w": RNG.standard_normal((4, C)).astype(np.float32), "b": RNG.standard_normal(C).astype(np.float32),
    "out": RNG.standard_normal((C, 4)).astype(np.float32), "heads": np.array([0, 0, H, D]),
    "whole": np.array([-1, T, C]), "axis": np.array([0]), "tokens": np.array([-1, C, T]),
}  # fmt: skip
VALUES = "m = MatMul(x, w) v = Add(m, b) "
ATTENTION = (
    "r = Reshape(v, heads) t = Transpose<perm=[0,2,1,3]>(r) u = MatMul(a, t) s = Transpose<perm=[0,2,1,3]>(u) c = Reshape(s, whole) "
)
CASES = {
    "attention": VALUES + ATTENTION,
    "an activation between": "m = MatMul(x, w) v = Add(b, m) c = Relu(v) ",
    "no bias": "v = MatMul(x, w) " + ATTENTION,
    "channels reordered": VALUES + "r = Reshape(v, heads) s = Transpose<perm=[0,1,3,2]>(r) c = Reshape(s, whole) ",
    "through other shapes": VALUES + "r = Unsqueeze(v, axis) s = Squeeze(r, axis) c = Identity(s) ",
}
OTHERS = {
    "another activation": "v = MatMul(x, w) c = Gelu(v) ",
    "another reader": "v = MatMul(x, w) c = Relu(v) n = Neg(v) ",
    "a residual": "v = MatMul(x, w) n = Neg(v) c = Add(v, n) ",
    "tokens become channels": "v = MatMul(x, w) r = Reshape(v, tokens) c = Transpose<perm=[0,2,1]>(r) ",
}


def build(body: str) -> ir.Model:
    text = f"{body} y = MatMul(c, out)"
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,{T},4] x, float[N,{H},{T},{T}] a) => (float[N,{T},4] y) {{ {text} }}'
    )
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used)
    return ir.onnx_ir.from_proto(ir.onnx.shape_inference.infer_shapes(proto))


@pytest.mark.parametrize("case", CASES)
def test_the_function_stays_and_no_mul_is_added(case: str) -> None:
    model = build(CASES[case])
    layer = model.graph[-1]
    x, a = RNG.standard_normal((2, T, 4)).astype(np.float32), RNG.random((2, H, T, T)).astype(np.float32)
    (before,) = Executor(model).run({"x": x, "a": a})
    k = np.exp(RNG.standard_normal(C)).astype(np.float32)
    edit, value = Editor(model), layer.inputs[0]
    assert value is not None and _scaling.can_fold(value, [layer])
    assert _scaling.divide(edit, value, [layer], k) is value
    _scaling.multiply(edit, layer, k)
    assert edit.edits["insert"] == 0
    (after,) = Executor(model).run({"x": x, "a": a})
    np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


def test_the_channels_are_those_that_are_read() -> None:
    found = _value_layer.source(build(CASES["channels reordered"]).graph[-1].inputs[0])  # type: ignore[arg-type]
    assert found is not None
    np.testing.assert_array_equal(found.channels, np.arange(C).reshape(H, D).T.reshape(-1))


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_is_refused(case: str) -> None:
    assert _value_layer.source(build(OTHERS[case]).graph[-1].inputs[0]) is None  # type: ignore[arg-type]


def test_a_shift_does_not_fold() -> None:
    """The rows of attention need not sum to 1 for all that is known."""
    model = build(CASES["attention"])
    layer = model.graph[-1]
    assert layer.inputs[0] is not None and not _scaling.can_fold(layer.inputs[0], [layer], shift=True)
