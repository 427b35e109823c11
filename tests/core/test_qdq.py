"""qdq: what is emitted equals the quantizer bit for bit, in ONNX Runtime and in the reference evaluator, for every format."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator

from graphq import ir, qdq
from graphq.editor import Editor
from graphq.executor import Executor, Fetch, decode
from graphq.quantizers import MIN_SCALE, QParams, Uniform
from graphq.spec import Granularity, PerAxis, PerGroup, PerTensor, QuantSpec

RNG = np.random.default_rng(0)
FORMATS = list(itertools.product(range(2, 9), (True, False), (True, False)))
GRANULARITIES: list[Granularity] = [PerTensor(), PerAxis(1), PerAxis(0), PerGroup(0, 4), PerGroup(0, 5)]


def matmul(width: int = 6, depth: int = 8) -> tuple[ir.Model, Editor, ir.Node]:
    """y = x w, with a random weight [depth, width]; opset 25, which knows all widths."""
    model = ir.from_onnx_text(
        f'<ir_version: 13, opset_import: ["" : 25]>\nm (float[n, {depth}] x) => (float[n, {width}] y) {{ y = Neg(x) }}'
    )
    edit = Editor(model)
    weight = RNG.standard_normal((depth, width)).astype(np.float32)
    value = edit.insert(None, "MatMul", [model.graph.inputs[0], edit.initializer("w", weight)], output="a", like=model.graph.outputs[0])
    edit.replace(model.graph.outputs[0], value)
    edit.prune()
    node = value.producer()
    assert node is not None
    return model, edit, node


def conv(bias: np.ndarray | None = None, groups: int = 1) -> tuple[ir.Model, Editor, ir.Node]:
    """A 3x3 convolution of 4 channels to 6."""
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>\nm (float[n, 4, 5, 5] x) => (float[n, 6, 3, 3] y) { y = Neg(x) }')
    edit = Editor(model)
    weight = edit.initializer("w", RNG.standard_normal((6, 4 // groups, 3, 3)).astype(np.float32))
    values = [model.graph.inputs[0], weight, *([edit.initializer("b", bias)] if bias is not None else [])]
    value = edit.insert(None, "Conv", values, output="a", attributes={"group": groups}, like=model.graph.outputs[0])
    edit.replace(model.graph.outputs[0], value)
    edit.prune()
    node = value.producer()
    assert node is not None
    return model, edit, node


def both(model: ir.Model, name: str, **feeds: np.ndarray) -> list[np.ndarray]:
    """One value by ONNX Runtime and by the reference evaluator."""
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    del proto.graph.output[:]
    proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    return [Executor(model, [Fetch(name)]).run(feeds)[0], ReferenceEvaluator(proto).run(None, feeds)[0]]


# ---- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "signed", "symmetric"), FORMATS)
def test_pairs_equal_the_quantizer(bits: int, signed: bool, symmetric: bool) -> None:
    """Widths that ONNX does not store (3, 5, 6, 7) need the Clip for this. The input reaches far out of the range, and onto ties.

    Not farther, though: the reference evaluator casts to int32 before it clips."""
    spec = QuantSpec(bits, signed, symmetric)
    qparams = Uniform(spec).fit(-1.7, 2.9)
    ties = (np.arange(-300, 300) + 0.5) * qparams.scale
    x = np.concatenate([RNG.standard_normal(8 * 200) * 3, ties, [0, -0.0, 1e6, -1e6, 0, 0, 0, 0]]).astype(np.float32)
    x = x[: len(x) // 8 * 8].reshape(-1, 8)
    model, edit, node = matmul()
    qdq.insert_pair(edit, model.graph.inputs[0], qparams, spec, [(node, 0)])
    ops = [entry.op_type for entry in model.graph]
    assert ops == [*([] if bits in (2, 4, 8) else ["Clip"]), "QuantizeLinear", "DequantizeLinear", "MatMul"]
    expected = Uniform(spec).fake_quantize(x, qparams)
    assert expected.min() == (spec.qmin - int(qparams.zero_point)) * qparams.scale
    for found in both(model, "x_dequantized", x=x):
        np.testing.assert_array_equal(found, expected)
    codes = next(entry for entry in model.graph if entry.op_type == "QuantizeLinear").outputs[0]
    stored = spec.storage if bits in (2, 4) else f"{'' if signed else 'u'}int8"
    assert str(codes.dtype).lower() == stored
    if stored.endswith("8"):  # ONNX Runtime hands out no narrower ones
        for found in both(model, "x_quantized", x=x):
            np.testing.assert_array_equal(found, Uniform(spec).quantize(x, qparams))


def test_only_the_readers_asked_for_read_the_pair() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
m (float[n, 4] x) => (float[n, 4] y, float[n, 4] z)
{ a = Relu(x)  [first] y = Add(a, a)  [second] z = Neg(a) }""")
    edit, a, first = Editor(model), model.graph[0].outputs[0], model.graph[1]
    spec = QuantSpec(8)
    result = qdq.insert_pair(edit, a, Uniform(spec).fit(-1, 1), spec, [(first, 1)])
    assert [node.op_type for node in model.graph] == ["Relu", "QuantizeLinear", "DequantizeLinear", "Add", "Neg"]
    assert [value.name if value else None for value in first.inputs] == ["a", "a_dequantized"] and result.name == "a_dequantized"
    assert model.graph[4].inputs[0] is a
    assert ir.shape_of(result) == ir.shape_of(a) and result.producer().inputs[0].dtype == ir.DataType.INT8  # type: ignore[union-attr]
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    y, z = Executor(model).run({"x": x})
    kept = np.maximum(x, 0)
    np.testing.assert_array_equal(y, kept + Uniform(spec).fake_quantize(kept, Uniform(spec).fit(-1, 1)))
    np.testing.assert_array_equal(z, -kept)


def test_a_pair_for_a_reader_inside_a_branch() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["" : 21]>
m (float[n, 4] x, bool c) => (float[n, 4] y)
{ y = If(c) <then_branch = l () => (float[n, 4] p) { p = Neg(x) }, else_branch = r () => (float[n, 4] q) { q = Abs(x) }> }""")
    edit, spec = Editor(model), QuantSpec(8)
    inner = next(node for node in ir.all_nodes(model) if node.op_type == "Neg")
    qparams = Uniform(spec).fit(-1, 1)
    qdq.insert_pair(edit, model.graph.inputs[0], qparams, spec, [(inner, 0)])
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    for flag, expected in ((True, -Uniform(spec).fake_quantize(x, qparams)), (False, np.abs(x))):
        np.testing.assert_array_equal(Executor(model).run({"x": x, "c": np.array(flag)})[0], expected)


# ---- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize(("bits", "signed", "symmetric"), FORMATS)
def test_weights_equal_the_quantizer(bits: int, signed: bool, symmetric: bool, granularity: Granularity) -> None:
    spec = QuantSpec(bits, signed, symmetric, granularity)
    model, edit, node = matmul()
    weight = ir.constant(node.inputs[1])
    assert weight is not None
    qparams = qdq.insert_weight(edit, node, spec)
    edit.prune()
    expected = Uniform(spec).fake_quantize(weight, qparams)
    x = RNG.standard_normal((2, 8)).astype(np.float32)
    for found in both(model, "w_dequantized", x=x):
        np.testing.assert_array_equal(found, expected)
    codes = model.graph.initializers["w_quantized"]
    assert str(codes.dtype).lower() == spec.storage and set(model.graph.initializers) == {"w_quantized", "w_scale", "w_zero_point"}
    np.testing.assert_allclose(Executor(model).run({"x": x})[0], x @ expected, rtol=1e-5, atol=1e-5)


def test_given_qparams_are_used() -> None:
    model, edit, node = matmul()
    qparams = QParams(np.float32(0.5), np.int32(0))
    assert qdq.insert_weight(edit, node, QuantSpec(4), qparams) is qparams
    found = ir.constant(model.graph.initializers["w_scale"])
    assert found is not None and float(found) == 0.5


def test_a_shared_weight_stays_float_for_its_other_reader() -> None:
    model, edit, node = matmul(8)
    edit.insert(node, "MatMul", [node.outputs[0], node.inputs[1]], output="second", after=True)
    qdq.insert_weight(edit, node, QuantSpec(8, granularity=PerAxis(1)))
    readers = {use.node.op_type for use in model.graph.initializers["w"].uses()}
    assert readers == {"MatMul"} and node.inputs[1] is not model.graph.initializers["w"]


def test_the_other_reader_of_a_shared_weight_that_changed_since_gets_codes_of_its_own() -> None:
    model, edit, node = matmul(8)
    second = edit.insert(node, "MatMul", [node.outputs[0], node.inputs[1]], output="second", after=True).producer()
    assert second is not None
    spec = QuantSpec(8, granularity=PerAxis(1))
    qparams = qdq.insert_weight(edit, node, spec)
    new = np.flip(np.asarray(ir.constant(second.inputs[1])), 0)  # which has the same scales
    edit.set_weight(second, 1, new)
    qdq.insert_weight(edit, second, spec, qparams)
    found = decode(model, second.inputs[1])  # type: ignore[arg-type]
    np.testing.assert_allclose(found, new, atol=float(qparams.scale.max()))


@pytest.mark.parametrize(("op", "attributes", "axis", "group_axis"), [
    ("MatMul", {}, 1, 0), ("Gemm", {}, 1, 0), ("Gemm", {"transB": 1}, 0, 1), ("Conv", {}, 0, 1), ("ConvTranspose", {}, 1, 0)])  # fmt: skip
def test_the_axis_fits_the_operator(op: str, attributes: dict[str, int], axis: int, group_axis: int) -> None:
    _, edit, node = matmul(8)
    node.op_type = op
    for key, value in attributes.items():
        edit.set_attribute(node, key, value)
    spec = QuantSpec(4, granularity=PerAxis(7))
    assert qdq.spec_for_weight(node, spec).granularity == PerAxis(axis)
    assert qdq.spec_for_weight(node, spec, 32).granularity == PerGroup(group_axis, 32)
    assert qdq.spec_for_weight(node, QuantSpec(4)) == QuantSpec(4)


# ---- biases ---------------------------------------------------------------------------------------------------------


def test_bias_codes_have_the_scale_of_the_accumulator() -> None:
    bias = RNG.standard_normal(6).astype(np.float32)
    model, edit, node = conv(bias)
    weight_params = qdq.insert_weight(edit, node, QuantSpec(8, granularity=PerAxis(0)))
    activation = Uniform(QuantSpec(8, signed=False, symmetric=False)).fit(-1, 3)
    qdq.insert_bias(edit, node, activation, weight_params)
    scale = activation.scale * weight_params.scale
    codes = np.rint(bias.astype(np.float64) / scale)
    found, second = both(model, "b_dequantized", x=np.zeros((1, 4, 5, 5), np.float32))
    np.testing.assert_array_equal(found, codes.astype(np.float32) * scale)
    np.testing.assert_array_equal(second, found)
    assert np.abs(found - bias).max() <= scale.max() / 2 * (1 + 1e-5)
    stored = model.graph.initializers["b_quantized"]
    assert stored.dtype == ir.DataType.INT32 and node.inputs[2] is not None and node.inputs[2].name == "b_dequantized"


def test_a_bias_with_one_weight_scale() -> None:
    model, edit, node = conv(np.float32([1, 2, 3, 4, 5, 6]))
    weight_params = qdq.insert_weight(edit, node, QuantSpec(8))
    qdq.insert_bias(edit, node, QParams(np.float32(0.1), np.int32(0)), weight_params)
    scale = ir.constant(model.graph.initializers["b_scale"])
    assert scale is not None and scale.shape == (6,) and len(np.unique(scale)) == 1
    for found in both(model, "b_dequantized", x=np.zeros((1, 4, 5, 5), np.float32)):
        np.testing.assert_allclose(found, [1, 2, 3, 4, 5, 6], rtol=1e-5, atol=scale[0] / 2)


@pytest.mark.parametrize("granularity", [PerAxis(0), PerTensor()])
def test_dead_channels_are_widened_until_the_bias_fits(granularity: Granularity) -> None:
    """A weight of almost nothing has a scale of almost nothing; the bias in its steps would overflow int32."""
    bias = np.float32([0.5, 1e6, -3, 0, 2, -1e6])
    model, edit, node = conv(bias)
    weight = ir.constant(node.inputs[1])
    assert weight is not None
    weight = weight * np.float32([1, 1e-30, 1e-12, 1e-30, 0, 1e-20]).reshape(-1, 1, 1, 1)
    edit.set_weight(node, 1, weight)
    spec, activation = QuantSpec(8, granularity=granularity), QParams(np.float32(1e-3), np.int32(0))
    fitted = Uniform(spec).fit_weight(weight)
    widened = qdq.widen_for_bias(fitted, activation, bias)
    assert widened.scale.dtype == np.float32 and (widened.scale >= fitted.scale).all()
    assert np.array_equal(widened.zero_point, fitted.zero_point)
    steps = np.abs(bias.astype(np.float64)) / (activation.scale * widened.scale).astype(np.float64)
    assert steps.max() <= qdq.INT32_LIMIT * (1 + 1e-6)
    if isinstance(granularity, PerAxis):
        assert widened.scale[0] == fitted.scale[0]  # a live channel keeps its own
    qdq.insert_weight(edit, node, spec, widened)
    qdq.insert_bias(edit, node, activation, widened)
    found = both(model, "b_dequantized", x=np.zeros((1, 4, 5, 5), np.float32))[0]
    np.testing.assert_allclose(found, bias, rtol=1e-5, atol=float((activation.scale * widened.scale).max()))


def test_a_bias_of_zero_on_a_dead_channel_stays_zero() -> None:
    weight, activation, bias = (
        QParams(np.full(6, MIN_SCALE, np.float32), np.zeros(6, np.int32)),
        QParams(np.float32(1e-9), np.int32(0)),
        np.zeros(6, np.float32),
    )
    widened = qdq.widen_for_bias(weight, activation, bias)
    model, edit, node = conv(bias)
    qdq.insert_bias(edit, node, activation, widened)
    codes = ir.constant(model.graph.initializers["b_quantized"])
    assert codes is not None and not codes.any() and (qdq.bias_scale(activation, widened, (6,)) > 0).all()
    for found in both(model, "b_dequantized", x=np.zeros((1, 4, 5, 5), np.float32)):
        assert not found.any()


def test_without_a_bias_nothing_is_widened() -> None:
    qparams = QParams(np.float32([1e-30]), np.int32([0]))
    assert qdq.widen_for_bias(qparams, qparams, None) is qparams


# ---- bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "stored"),
    [(QuantSpec(8, granularity=PerAxis(1)), 64 * 32 + 32 * 4 + 32), (QuantSpec(8), 64 * 32 + 4 + 1),
     (QuantSpec(4, granularity=PerGroup(0, 32)), 64 * 32 // 2 + 2 * 32 * 4 + 32), (QuantSpec(2), 64 * 32 // 4 + 4 + 1),
     (QuantSpec(3, granularity=PerAxis(1)), 64 * 32 // 2 + 32 * 4 + 16)],
)  # fmt: skip
def test_bytes_of_quantized_weights(spec: QuantSpec, stored: int) -> None:
    model, edit, node = matmul(32, 64)
    assert qdq.quantized_weight_bytes(model) == (0, 0)
    qdq.insert_weight(edit, node, spec)
    edit.prune()
    assert qdq.quantized_weight_bytes(model) == (64 * 32 * 4, stored)


def test_pairs_and_biases_are_no_weights_and_shared_codes_count_once() -> None:
    model, edit, node = conv(np.zeros(6, np.float32))
    spec = QuantSpec(8, granularity=PerAxis(0))
    params = qdq.insert_weight(edit, node, spec)
    before = qdq.quantized_weight_bytes(model)
    assert before[0] == 4 * 6 * 4 * 9
    qdq.insert_bias(edit, node, QParams(np.float32(1), np.int32(0)), params)
    qdq.insert_pair(edit, model.graph.inputs[0], QParams(np.float32(1), np.int32(0)), QuantSpec(8), [(node, 0)])
    maker = node.inputs[1].producer()  # type: ignore[union-attr]
    assert maker is not None
    edit.insert(node, "DequantizeLinear", list(maker.inputs), output="again", attributes={"axis": 0})
    assert qdq.quantized_weight_bytes(model) == before
