"""codebooks: what is emitted equals the numpy form, in ONNX Runtime and in the reference evaluator."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from graphq import codebooks, ir, linear, qdq
from graphq.codebooks import Codebook
from graphq.editor import Editor
from graphq.executor import Executor, decode
from graphq.quantizers import Uniform
from graphq.spec import PerGroup, QuantSpec

RNG = np.random.default_rng(0)


def book(levels: int, size: int = 1) -> Codebook:
    points = RNG.standard_normal((levels, size)).astype(np.float32)
    return Codebook(np.sort(points, axis=0) if size == 1 else points)


def layer(operator: str, width: int = 8, depth: int = 8) -> tuple[ir.Model, Editor, ir.Node, np.ndarray]:
    """A layer with a random weight, and that weight as rows [O, K]."""
    data, result = (f"[n, {depth}]", "[n, m]") if operator != "Conv" else (f"[n, {depth // 4}, 5, 5]", "[n, m, 4, 4]")
    model = ir.from_onnx_text(f'<ir_version: 13, opset_import: ["" : 25]>\nm (float{data} x) => (float{result} y) {{ y = Neg(x) }}')
    edit = Editor(model)
    shape = {"Conv": (width, depth // 4, 2, 2), "Gemm": (width, depth), "MatMul": (depth, width)}[operator]
    weight = RNG.standard_normal(shape).astype(np.float32)
    attributes = {"transB": 1} if operator == "Gemm" else {}
    values = [model.graph.inputs[0], edit.initializer("w", weight)]
    made = edit.insert(None, operator, values, output="a", attributes=attributes, like=model.graph.outputs[0])
    edit.replace(model.graph.outputs[0], made)
    edit.prune()
    node = made.producer()
    assert node is not None
    return model, edit, node, weight.T if operator == "MatMul" else weight.reshape(width, -1)


@pytest.mark.parametrize("operator", ["MatMul", "Gemm", "Conv"])
@pytest.mark.parametrize(("levels", "size"), [(4, 1), (16, 1), (11, 1), (256, 1), (16, 2), (200, 4)])
def test_the_graph_holds_what_numpy_decodes(operator: str, levels: int, size: int) -> None:
    model, edit, node, rows = layer(operator)
    coded = codebooks.encode(rows, book(levels, size), RNG.uniform(0.5, 2, (8, 2)).astype(np.float32))
    value = codebooks.insert(edit, node, coded)
    edit.prune()
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto)
    own = decode(model, value)
    assert linear.linear_refusal(node) == "it is quantized already"
    by_rows = own.T if operator == "MatMul" else own.reshape(8, -1)
    np.testing.assert_array_equal(by_rows, coded.decode())
    feeds = {"x": RNG.standard_normal((3, 8) if operator != "Conv" else (3, 2, 5, 5)).astype(np.float32)}
    expected = ReferenceEvaluator(proto).run(None, feeds)[0]
    np.testing.assert_allclose(Executor(model).run(feeds)[0], expected, rtol=1e-5, atol=1e-5)
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_empty_tensor_value_info(value.name))
    np.testing.assert_array_equal(ReferenceEvaluator(proto).run(None, feeds)[0], own)


@pytest.mark.parametrize("size", [1, 2])
def test_codes_are_those_of_the_nearest_points(size: int) -> None:
    one = book(13, size)
    units = RNG.standard_normal((5, 12)).astype(np.float32)
    distances = np.square(units.reshape(5, -1, 1, size) - one.points).sum(-1)
    np.testing.assert_array_equal(one.quantize(units), distances.argmin(-1))
    np.testing.assert_array_equal(one.dequantize(one.quantize(units)).reshape(5, -1, size), one.points[distances.argmin(-1)])


def test_bytes_count_codes_points_and_scales() -> None:
    model, edit, node, rows = layer("MatMul", 32, 64)
    codebooks.insert(edit, node, codebooks.encode(rows, book(16), np.ones((32, 2), np.float32)))
    edit.prune()
    assert qdq.quantized_weight_bytes(model) == (4 * 32 * 64, 32 * 64 // 2 + 4 * 64 + 4 * 16 + 4)


@pytest.mark.parametrize("points", [np.zeros((2, 1)), np.zeros((1, 1), np.float32), np.float32([[0], [np.inf]]), np.float32([[1], [0]])])
def test_tables_that_are_none(points: np.ndarray) -> None:
    with pytest.raises(ValueError, match="points"):
        Codebook(points)


def test_normal_floats_are_those_of_the_paper() -> None:
    """QLoRA, arXiv 2305.14314, appendix E (1e-6)."""
    paper = [-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
             0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0]  # fmt: skip
    np.testing.assert_allclose(codebooks.nf4().points[:, 0], paper, atol=1e-6)
    assert codebooks.nf4().storage == codebooks.fp4().storage == "int4"


def test_four_bit_floats_are_those_of_the_type() -> None:
    codes = np.arange(16, dtype=np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    np.testing.assert_array_equal(codebooks.fp4().points[:, 0], np.unique(codes))


def test_the_largest_weight_of_a_group_is_exact() -> None:
    rows = RNG.standard_normal((4, 64)).astype(np.float32)
    rows[0, :16] = 0
    coded = codebooks.encode(rows, codebooks.fp4(), codebooks.widest(rows, codebooks.fp4(), 16))
    largest = np.abs(rows).reshape(4, 4, 16).max(2)
    np.testing.assert_allclose(np.abs(coded.decode()).reshape(4, 4, 16).max(2), largest, rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_normal_floats_beat_integers_on_normal_weights(seed: int) -> None:
    """On the squared error, groups of 64, round to nearest with the scale of the largest, by a tenth at least."""
    rows = np.random.default_rng(seed).standard_normal((64, 512)).astype(np.float32)
    uniform = Uniform(QuantSpec(4, granularity=PerGroup(1, 64)))
    integers = uniform.fake_quantize(rows, uniform.fit_weight(rows))
    normal = codebooks.encode(rows, codebooks.nf4(), codebooks.widest(rows, codebooks.nf4(), 64)).decode()
    assert np.sum((normal - rows) ** 2) < 0.9 * np.sum((integers - rows) ** 2)
