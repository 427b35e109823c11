"""`Uniform` against the formulas, against onnx's reference evaluator and against onnxruntime, bit for bit."""

import itertools

import numpy as np
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphq.quantizers import MIN_SCALE, QParams, Uniform, qparams_shape
from graphq.spec import PerAxis, PerGroup, PerTensor, QuantSpec

SHAPE = (7, 10)
GRANULARITIES = [PerTensor(), PerAxis(0), PerAxis(-1), PerGroup(0, 4), PerGroup(1, 4), PerGroup(1, 5), PerGroup(-1, 16)]
FORMATS = list(itertools.product([2, 3, 4, 5, 8], [True, False], [True, False]))
STORED = [(bits, *rest) for bits, *rest in FORMATS if bits in (2, 4, 8)]


def weight(seed=0, shape=SHAPE):
    return np.random.default_rng(seed).standard_t(3, shape).astype(np.float32) + np.float32(0.3)


def textbook(x, spec):
    """Codes, floats, scale and zero point of METHODS.md section 0 with a loop over scales; fully expanded."""
    x64 = x.astype(np.float64)
    codes, floats = np.empty(x.shape, np.int64), np.empty(x.shape, np.float32)
    for indices in groups(x.shape, spec.granularity):
        part = x64[indices]
        low, high = min(part.min(), 0), max(part.max(), 0)
        if spec.symmetric:
            scale = np.float32(max(-low, high) / (2 ** (spec.bits - 1) - 1))
            zero = 0 if spec.signed else 2 ** (spec.bits - 1)
        else:
            scale = np.float32((high - low) / (2**spec.bits - 1))
            zero = spec.qmin + int(np.rint(-low / np.float64(scale)))
        codes[indices] = np.clip(np.rint(x[indices] / scale) + zero, spec.qmin, spec.qmax)
        floats[indices] = (codes[indices] - zero).astype(np.float32) * scale
    return codes, floats


def groups(shape, granularity):
    if isinstance(granularity, PerTensor):
        return [np.ones(shape, bool)]
    axis = granularity.axis % len(shape)
    index = np.indices(shape)
    if isinstance(granularity, PerAxis):
        return [index[axis] == i for i in range(shape[axis])]
    key = [index[i] // granularity.size if i == axis else index[i] for i in range(len(shape))]
    flat = np.ravel_multi_index(key, shape)
    return [flat == k for k in np.unique(flat)]


def qdq_model(spec, qparams):
    kind = getattr(TensorProto, spec.storage.upper())
    options = {}
    if not isinstance(spec.granularity, PerTensor):
        options["axis"] = spec.granularity.axis
    if isinstance(spec.granularity, PerGroup):
        options["block_size"] = spec.granularity.size
    shape = qparams.scale.shape
    scale = helper.make_tensor("s", TensorProto.FLOAT, shape, qparams.scale.ravel())
    zero = helper.make_tensor("z", kind, shape, qparams.zero_point.ravel())
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **options),
        helper.make_node("Cast", ["q"], ["codes"], to=TensorProto.INT32),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["floats"], **options),
    ]
    outputs = [
        helper.make_tensor_value_info("codes", TensorProto.INT32, None),
        helper.make_tensor_value_info("floats", TensorProto.FLOAT, None),
    ]
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, None)], outputs, [scale, zero])
    opset = 25 if spec.bits == 2 else 21
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=13 if opset > 21 else 10)


def run_onnxruntime(model, x):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("bits, signed, symmetric", FORMATS)
def test_equals_the_textbook(bits, signed, symmetric, granularity):
    uniform, x = Uniform(QuantSpec(bits, signed, symmetric, granularity)), weight()
    qparams = uniform.fit_weight(x)
    codes, floats = textbook(x, uniform.spec)
    result = uniform.quantize(x, qparams)
    assert result.dtype == (np.int8 if signed else np.uint8)
    assert qparams.scale.shape == qparams.zero_point.shape == qparams_shape(x.shape, granularity)
    np.testing.assert_array_equal(result, codes)
    np.testing.assert_array_equal(uniform.dequantize(result, qparams), floats)
    simulated = uniform.fake_quantize(x, qparams)
    np.testing.assert_array_equal(simulated.view(np.int32), uniform.dequantize(result, qparams).view(np.int32))


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("bits, signed, symmetric", STORED)
def test_equals_onnx_bit_for_bit(bits, signed, symmetric, granularity):
    uniform, x = Uniform(QuantSpec(bits, signed, symmetric, granularity)), weight(1)
    qparams = uniform.fit_weight(x * np.float32(0.7))  # so that some elements saturate
    steps = np.random.default_rng(2).integers(-9, 9, x.shape).astype(np.float32) + np.float32(0.5)
    scale = np.abs(x).max() if qparams.scale.ndim else qparams.scale
    special = np.where(np.arange(x.size).reshape(x.shape) % 3, x, steps * scale)  # exact ties if per tensor
    special.flat[:4] = [1e6, -1e6, 1e-42, -0.0]
    model = qdq_model(uniform.spec, qparams)
    mine = uniform.quantize(special, qparams)
    for codes, floats in (ReferenceEvaluator(model).run(None, {"x": special}), run_onnxruntime(model, special)):
        np.testing.assert_array_equal(mine, codes)
        np.testing.assert_array_equal(uniform.dequantize(mine, qparams), floats)


@pytest.mark.parametrize("bits, signed, symmetric", STORED)
def test_the_largest_floats_saturate(bits, signed, symmetric):
    # onnx's evaluator casts x / scale to int32 and wraps around, and so does onnxruntime 1.31 for 2 bits: not compared.
    uniform = Uniform(QuantSpec(bits, signed, symmetric))
    qparams, x = uniform.fit(-1.3, 2.7), np.array([np.inf, 3e38, -3e38, -np.inf] * 5, np.float32)
    ends = [uniform.spec.qmax] * 2 + [uniform.spec.qmin] * 2
    np.testing.assert_array_equal(uniform.quantize(x, qparams), ends * 5)
    if bits > 2:
        np.testing.assert_array_equal(run_onnxruntime(qdq_model(uniform.spec, qparams), x)[0], ends * 5)


def test_ties_go_to_even_for_a_million_elements():
    uniform = Uniform(QuantSpec(8, False, False))
    qparams = uniform.fit(-1.37, 3.11)
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(size=500_000), (rng.integers(-90, 190, 500_000) + 0.5) * qparams.scale])
    x = x.astype(np.float32)
    codes, floats = run_onnxruntime(qdq_model(uniform.spec, qparams), x)
    np.testing.assert_array_equal(uniform.quantize(x, qparams), codes)
    np.testing.assert_array_equal(uniform.fake_quantize(x, qparams), floats)


@pytest.mark.parametrize("granularity", [*GRANULARITIES[:2], PerAxis(1), PerGroup(0, 3000), PerGroup(1, 32)], ids=str)
def test_tiling_does_not_show(granularity):
    uniform, x = Uniform(QuantSpec(4, True, False, granularity)), weight(4, (7001, 90))
    qparams = uniform.fit_weight(x)
    np.testing.assert_array_equal(uniform.quantize(x, qparams), textbook_fast(uniform, x, qparams))
    np.testing.assert_array_equal(uniform.quantize(x[::-1, ::-1][::-1, ::-1], qparams), uniform.quantize(x, qparams))


def textbook_fast(uniform, x, qparams):
    spread = [qparams.scale, qparams.zero_point]
    granularity = uniform.spec.granularity
    if isinstance(granularity, PerAxis):
        spread = [np.expand_dims(p, 1 - granularity.axis) for p in spread]
    elif isinstance(granularity, PerGroup):
        cut = tuple(slice(n) for n in x.shape)
        spread = [np.repeat(p, granularity.size, granularity.axis)[cut] for p in spread]
    return np.clip(np.rint(x / spread[0]) + spread[1], uniform.spec.qmin, uniform.spec.qmax)


@pytest.mark.parametrize("bits, signed, symmetric", FORMATS)
@pytest.mark.parametrize(
    "low, high",
    [(0, 0), (0, 1e-45), (-1e-40, 1e-42), (0.0, 3.4e38), (-3.4e38, 3.4e38), (2, 5), (-5, -2), (-1e300, 0), (-1e-30, 6)],
)
def test_any_range_gives_a_usable_scale(bits, signed, symmetric, low, high):
    spec = QuantSpec(bits, signed, symmetric)
    uniform, qparams = Uniform(spec), Uniform(spec).fit(low, high)
    assert np.isfinite(qparams.scale) and qparams.scale >= MIN_SCALE
    assert spec.qmin <= qparams.zero_point <= spec.qmax
    zero = np.zeros(3, np.float32)
    np.testing.assert_array_equal(uniform.fake_quantize(zero, qparams), zero)
    if abs(low) < 1e38 and abs(high) < 1e38:
        ends = np.array([low, high], np.float32)
        assert (np.abs(uniform.fake_quantize(ends, qparams) - ends) <= qparams.scale * 0.50001).all()


def test_an_empty_tensor_and_a_dead_channel():
    for granularity in (PerTensor(), PerAxis(1), PerGroup(0, 2), PerGroup(1, 2)):
        uniform = Uniform(QuantSpec(granularity=granularity))
        for x in (np.zeros((0, 4), np.float32), np.zeros((4, 0), np.float32), np.zeros((4, 5), np.float32)):
            qparams = uniform.fit_weight(x)
            assert (qparams.scale == 1).all()
            np.testing.assert_array_equal(uniform.fake_quantize(x, qparams), x)


def test_other_dtypes_are_read_as_float32():
    uniform = Uniform(QuantSpec(8, False, False))
    qparams, x = uniform.fit(-3, 4), weight().astype(np.float16)
    for dtype in (np.float16, np.float64):
        expected = uniform.quantize(x.astype(np.float32), qparams)
        np.testing.assert_array_equal(uniform.quantize(x.astype(dtype), qparams), expected)
    assert uniform.quantize(np.float32(4.0), qparams).shape == ()


@pytest.mark.parametrize("method", ["quantize", "fake_quantize"])
def test_nan_is_refused(method):
    uniform, x = Uniform(QuantSpec()), weight()
    x[3, 3] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        getattr(uniform, method)(x, uniform.fit(-1, 1))


@pytest.mark.parametrize("low, high", [(np.nan, 1), (-np.inf, 1), (0, np.inf), (2, 1)])
def test_a_range_that_is_none_is_refused(low, high):
    with pytest.raises(ValueError, match="range"):
        Uniform(QuantSpec()).fit(low, high)


def test_wrong_shapes_and_qparams_are_refused():
    uniform = Uniform(QuantSpec(granularity=PerAxis(1)))
    with pytest.raises(ValueError, match=r"\(10,\)"):
        uniform.quantize(weight(), uniform.fit(np.zeros(7), np.ones(7)))
    with pytest.raises(ValueError, match="rank"):
        Uniform(QuantSpec(granularity=PerAxis(2))).fit_weight(weight())
    zero = np.zeros((), np.int32)
    bad = [np.asarray(number, np.float32) for number in (0, np.nan, -1, np.inf)]
    for scale in (*bad, np.asarray(1.0), np.ones(2, np.float32)):
        with pytest.raises(ValueError, match="scale"):
            QParams(scale, zero)


@pytest.mark.parametrize(("grid", "bits", "opset", "granularity"), [
    ("e4m3", 8, 19, PerTensor()), ("e4m3", 8, 19, PerAxis(1)), ("e4m3", 8, 21, PerGroup(0, 16)), ("e2m1", 4, 23, PerTensor()),
    ("e2m1", 4, 23, PerGroup(1, 16)),
])  # fmt: skip
def test_small_floats_equal_onnx_bit_for_bit(grid: str, bits: int, opset: int, granularity: object) -> None:
    """Ties, subnormals, what lies beyond the largest, and every code itself."""
    spec = QuantSpec(bits, granularity=granularity, grid=grid)
    rng, quantizer = np.random.default_rng(0), Uniform(spec)
    x = (rng.standard_normal((32, 48)) * np.exp(rng.uniform(-9, 6, (32, 48)))).astype(np.float32)
    qparams = quantizer.fit_weight(x / 2)
    assert spec.opset == opset
    codes, kind = quantizer.quantize(x, qparams), helper.np_dtype_to_tensor_dtype(quantizer.quantize(x, qparams).dtype)
    attributes = {} if isinstance(granularity, PerTensor) else {"axis": granularity.axis}
    attributes |= {"block_size": granularity.size} if isinstance(granularity, PerGroup) else {}
    nodes = [helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], **attributes),
             helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], **attributes)]
    zeros = numpy_helper.from_array(np.zeros(qparams.scale.shape, codes.dtype), "z")
    graph = helper.make_graph(nodes, "g", [helper.make_tensor_value_info("x", 1, x.shape)],
                              [helper.make_tensor_value_info("q", kind, x.shape), helper.make_tensor_value_info("y", 1, x.shape)],
                              [numpy_helper.from_array(qparams.scale, "s"), zeros])  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11)
    made, floats = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(codes.astype(np.float32), np.asarray(made).astype(np.float32))
    np.testing.assert_array_equal(quantizer.dequantize(codes, qparams), floats)
    np.testing.assert_array_equal(quantizer.fake_quantize(x, qparams), floats)
    assert np.abs(codes.astype(np.float32)).max() == spec.qmax == -spec.qmin


@pytest.mark.parametrize("wrong", [{"bits": 4}, {"symmetric": False}, {"signed": False}])
def test_small_floats_have_one_form(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="e4m3"):
        QuantSpec(**({"grid": "e4m3"} | wrong))
