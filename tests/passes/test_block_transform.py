"""Hadamard matrices, and transforms of what layers read: exact, and gone where the layer before takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from graphq import ir, precision
from graphq.editor import Editor
from graphq.executor import Executor
from graphq.passes import _block_transform
from graphq.passes import _block_transform_math as math
from graphq.passes import _hadamard_math as hadamard
from graphq.passes._block_transform_math import Transform
from graphq.precision import Bits

ORDERS = [1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 36, 48, 60, 64, 128, 192, 384, 768, 1536]
D, H = 12, 3


@pytest.mark.parametrize("size", ORDERS)
def test_hadamard_matrices(size: int) -> None:
    """Orthogonal to 1e-12, with entries of one size and a constant first column."""
    matrix = hadamard.hadamard(size)
    assert matrix is not None
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5)
    np.testing.assert_allclose(matrix[:, 0], size**-0.5)


@pytest.mark.parametrize("size", [3, 5, 6, 10, 43, 172])
def test_what_stands_in_where_there_is_none(size: int) -> None:
    assert hadamard.hadamard(size) is None
    matrix = hadamard.orthogonal(size, 0)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(matrix[:, 0], size**-0.5, atol=1e-12)


@pytest.mark.parametrize("keeps_mean", [False, True])
@pytest.mark.parametrize("size", [8, 12, 43, 192])
def test_rotations(size: int, keeps_mean: bool) -> None:
    """Orthogonal; other signs for another seed; row means stay where that is asked for, and channels are mixed."""
    q = hadamard.rotation(size, 1, keeps_mean=keeps_mean)
    np.testing.assert_allclose(q.T @ q, np.eye(size), atol=1e-12)
    assert not np.allclose(q, hadamard.rotation(size, 2, keeps_mean=keeps_mean))
    if keeps_mean:
        np.testing.assert_allclose(q.sum(1), 1, atol=1e-12)
    assert np.abs(q).max() < (0.9 if size < 20 else 0.7)


def test_factors_have_hadamard_matrices_where_there_are() -> None:
    assert [hadamard.factors(size) for size in (64, 172, 192, 384, 768)] == [(8, 8), (43, 4), (16, 12), (24, 16), (32, 24)]


def test_blocks() -> None:
    assert [math.best_block(size, 64, 16) for size in (192, 768, 172, 17, 34, 15, 131)] == [64, 64, 43, 17, 34, None, None]


def transforms(size: int) -> dict[str, Transform]:
    rng = np.random.default_rng(size)
    return {
        "one matrix": Transform(1, rng.standard_normal((1, size, size))),
        "a matrix for all blocks": math.block_hadamard(size, 4, 0),
        "a matrix a block": Transform(size // 4, rng.standard_normal((size // 4, 4, 4))),
        "a product": Transform(3, hadamard.rotation(size // 3, 0)[None], hadamard.rotation(3, 1)),
    }


@pytest.mark.parametrize("case", transforms(12))
def test_a_transform_is_its_matrix(case: str) -> None:
    """To 1e-9 in float64."""
    one, rng = transforms(12)[case], np.random.default_rng(0)
    x, weight, whole = rng.standard_normal((2, 5, 12)), rng.standard_normal((12, 7)), one.rows(np.eye(12))
    np.testing.assert_allclose(one.rows(x), x @ whole, atol=1e-9)
    np.testing.assert_allclose(one.undo(weight), np.linalg.inv(whole) @ weight, atol=1e-9)
    np.testing.assert_allclose(one.inverse().undo(one.undo(weight)), weight, atol=1e-9)
    np.testing.assert_allclose(one.gram(x[0].T @ x[0]), (x[0] @ whole).T @ (x[0] @ whole), atol=1e-9)


# ---- in a graph -----------------------------------------------------------------------------------------------------

HEADS = {"v": (8, D), "b": (D,), "out": (D, 6), "heads": [0, 0, H, D // H], "whole": [0, 0, D]}
ATTENTION = (
    "m = MatMul(x, v) n = Add(m, b) r = Reshape(n, heads) t = Transpose<perm=[0,2,1,3]>(r) u = MatMul(a, t) "
    "s = Transpose<perm=[0,2,1,3]>(u) c = Reshape(s, whole) "
)
CASES = {
    "of an input": ("float[N, 5, 12] c, float[N, 3, 5, 5] a", ""),
    "of rows": ("float[N, 12] c", ""),
    "behind Gelu": ("float[N, 5, 8] x", "m = MatMul(x, v) c = Gelu(m) "),
}


def build(inputs: str, body: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    text = f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[] y) {{ {body} y = MatMul(c, out) }}'
    proto = parser.parse_model(text)
    used, rng = {name for node in proto.graph.node for name in node.input}, np.random.default_rng(0)
    for name, value in HEADS.items():
        array = rng.standard_normal(value).astype(np.float32) if isinstance(value, tuple) else np.array(value, np.int64)
        if name in used:
            proto.graph.initializer.append(numpy_helper.from_array(array, name))
    proto = ir.onnx.shape_inference.infer_shapes(proto, data_prop=True)
    shapes = {"x": (2, 5, 8), "a": (2, 3, 5, 5), "c": (2, 12) if "N, 12" in inputs else (2, 5, 12)}
    feeds = {value.name: rng.standard_normal(shapes[value.name]).astype(np.float32) for value in proto.graph.input}
    return ir.onnx_ir.from_proto(proto), feeds


def transformed(inputs: str, body: str, transform: Transform) -> Editor:
    """The model's editor after its last layer's input was transformed; both engines compute what they did, to 1e-5."""
    model, feeds = build(inputs, body)
    (before,), layer, edit = Executor(model).run(feeds), model.graph[-1], Editor(model)
    _block_transform.apply(edit, layer.inputs[0], [layer], transform)  # type: ignore[arg-type]
    for after in (Executor(model).run(feeds)[0], ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0]):
        np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())
    return edit


@pytest.mark.parametrize("name", transforms(D))
@pytest.mark.parametrize("case", CASES)
def test_the_function_stays(case: str, name: str) -> None:
    edit = transformed(*CASES[case], transforms(D)[name])
    made = [node for node in edit.model.graph if node.name and precision.asked(node, Bits(8, 8)) == Bits(None, None)]
    assert len(made) == (2 if name == "a product" else 1), "no pass shall quantize the products that were inserted"
    assert all(node.op_type == "MatMul" for node in made)


@pytest.mark.parametrize("given", ["[0, 0, 3, 4]", "computed"])
@pytest.mark.parametrize(("block", "folds"), [(4, True), (2, True), (6, False), (12, False)])
def test_blocks_that_keep_to_a_head_disappear(block: int, folds: bool, given: str) -> None:
    """Also where the shape of a Reshape is computed from the input's, as exporters write it."""
    body = ATTENTION
    if given == "computed":
        body = "q = Shape<end = 2>(x) z = Constant<value_ints = [3, 4]>() e = Concat<axis = 0>(q, z) " + body.replace("heads", "e")
    edit = transformed("float[N, 5, 8] x, float[N, 3, 5, 5] a", body, math.block_hadamard(D, block, 0))
    assert (edit.edits["insert"] == 0) == folds


@pytest.mark.parametrize(
    "body",
    [
        ATTENTION.replace("c = Reshape", "k = Reshape") + "c = Relu(k) ",
        ATTENTION + "z = Neg(c) ",
    ],
)
def test_what_lies_between_may_refuse(body: str) -> None:
    """A Relu keeps the scale of a channel, not what is mixed; and somebody else reads the value as it is."""
    assert transformed("float[N, 5, 8] x, float[N, 3, 5, 5] a", body, math.block_hadamard(D, 4, 0)).edits["insert"]


REFUSED = {
    "not a matrix product": "[it] y = Neg(x)",
    "its data is transposed, so that rows are channels": "[it] y = Gemm<transA = 1>(x, w)",
    "its weight is not a constant of the graph": "[it] y = MatMul(x, x)",
    "it is quantized already": "d = DequantizeLinear(q, s) [it] y = MatMul(x, d)",
    "excluded by the recipe": "[excluded] y = MatMul(x, w)",
    "its data input is not a float32 activation": "[it] y = MatMul(w, w)",
    "its data is a vector": "i = Constant<value = int64 {0}>() r = Gather(x, i) [it] y = MatMul(r, w)",
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str) -> None:
    constants = "<float[4, 4] w = {" + ", ".join(["1"] * 16) + "}, int8[4, 4] q = {" + ", ".join(["1"] * 16) + "}, float s = {1}>"
    body = f"g (float[4, 4] x) => (float[4, 4] y) {constants} {{ {REFUSED[reason]} }}"
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {body}')
    model = ir.onnx_ir.from_proto(ir.onnx.shape_inference.infer_shapes(proto))
    assert _block_transform.refusal(model, model.graph[-1], ["excluded"]) == reason


@pytest.mark.parametrize("shape", [(1,), (1, 1), (12,), (1, 12), (5, 1), (5, 12)])
def test_a_bias_of_any_shape_is_taken_along(shape: tuple[int, ...]) -> None:
    """Into the layer before, whose bias is broadcast: to 1e-5."""
    rng = np.random.default_rng(0)
    proto = parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g (float[5, 8] x) => (float[5, 6] y) '
                               "{ c = Gemm(x, v, b) y = MatMul(c, out) }")  # fmt: skip
    for name, size in {"v": (8, D), "b": shape, "out": (D, 6)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), name))
    model, x = ir.onnx_ir.from_proto(ir.onnx.shape_inference.infer_shapes(proto)), rng.standard_normal((5, 8)).astype(np.float32)
    before, edit, layer = Executor(model).run({"x": x})[0], Editor(model), model.graph[-1]
    _block_transform.apply(edit, layer.inputs[0], [layer], math.block_hadamard(D, 4, 0))  # type: ignore[arg-type]
    assert not edit.edits["insert"]
    np.testing.assert_allclose(Executor(model).run({"x": x})[0], before, atol=1e-5 * np.abs(before).max())


EVERYWHERE = """<ir_version: 10, opset_import: ["" : 21]>
g (float[64, 64] x) => (float[64, 64] y) {
  [fine] a = MatMul(x, w) r = Relu(a) [turned] t = Gemm<transA = 1>(r, v) z = Add(r, t) m = ReduceMax<keepdims = 0>(z)
  zero = Constant<value = float {0}>() c = Greater(m, zero)
  y = If(c) < then_branch = g1 () => (float[64, 64] p) { [inner] p = MatMul(z, w) },
              else_branch = g2 () => (float[64, 64] q) { q = Neg(z) }> }"""


@pytest.mark.parametrize("line", ["rotate", "wush", "awq: {min_gain_db: 0, min_gain_mul_db: 0}", "digit-planes"])
def test_no_layer_is_left_out_without_a_reason(line: str, after: Callable[..., Any]) -> None:
    """What lies in a subgraph, and a product whose data is transposed, of which digit-planes takes the weight."""
    rng, proto = np.random.default_rng(0), parser.parse_model(EVERYWHERE)
    for name, size in {"w": (64, 64), "v": (64, 64)}.items():
        proto.graph.initializer.append(numpy_helper.from_array(rng.standard_normal(size).astype(np.float32), name))
    x = rng.standard_normal((64, 64)).astype(np.float32)
    _, record = after(ir.onnx_ir.from_proto(ir.onnx.shape_inference.infer_shapes(proto)), x, line)
    reasons = {where.split("'")[1]: reason for where, reason in record.skipped if "'" in where}
    assert reasons["inner"] == "it lies in a subgraph" and ("turned" in reasons) == (line != "digit-planes")


def test_float_layers_that_were_asked_for_are_left_alone() -> None:
    model, _ = build(*CASES["of rows"])
    precision.ask(Editor(model), model.graph[-1], Bits(None, None))
    assert not _block_transform.edges(model)
