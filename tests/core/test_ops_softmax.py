"""Softmax operators: the function bodies compute what the numpy references compute, and the packed layout is what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import ops, ops_softmax
from graphq.backends import tensorrt
from graphq.errors import UsageError
from graphq.log_quantizers import LogParams, LogUniform
from graphq.ops_softmax import code_levels, pack_codes, softmax, softmax_params, unpack_codes
from graphq.targets import get_target

SHAPES = [(3, 1), (2, 8), (2, 3, 5, 197), (1, 2, 4, 64)]
TYPES = [np.float32, np.float16]
SOFTMAX = [name for name in ops.OPERATORS if name.startswith("SULQ")]


def scores(shape: tuple[int, ...], dtype: Any = np.float32, seed: int = 0) -> np.ndarray:
    """Some are masked, and so is all of the last row."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(shape) < 0.1, -np.inf, 2 * rng.standard_normal(shape)).astype(dtype)
    x.reshape(-1, shape[-1])[-1] = -np.inf
    return x


def fitted(x: np.ndarray, bits: int = 4, **options: bool) -> tuple[LogUniform, LogParams]:
    quantizer = LogUniform(bits, **options)
    return quantizer, quantizer.fit(softmax(x))


def calling(name: str, feeds: dict[str, np.ndarray]) -> onnx.ModelProto:
    """A model of one node that calls the function."""
    inputs = [onnx.helper.make_tensor_value_info(key, onnx.helper.np_dtype_to_tensor_dtype(array.dtype), array.shape)
              for key, array in feeds.items()]  # fmt: skip
    result = ops.OPERATORS[name].reference(**feeds)
    output = onnx.helper.make_tensor_value_info("out", onnx.helper.np_dtype_to_tensor_dtype(result.dtype), result.shape)
    graph = onnx.helper.make_graph([onnx.helper.make_node(name, list(feeds), ["out"], domain="graphq")], "g", inputs, [output])
    function = onnx.parser.parse_function(f'<domain: "graphq", opset_import: ["" : 21]>\n{ops.OPERATORS[name].body}')
    opsets = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("graphq", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, functions=[function], ir_version=10)
    onnx.checker.check_model(model)
    return model


def run(name: str, feeds: dict[str, np.ndarray], runtime: str) -> np.ndarray:
    model = calling(name, feeds)
    if runtime == "reference":
        return np.asarray(ReferenceEvaluator(model).run(None, feeds)[0])
    ort = pytest.importorskip("onnxruntime")
    return np.asarray(ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feeds)[0])


RUNTIMES = pytest.mark.parametrize("runtime", ["onnxruntime", "reference"])


@RUNTIMES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bits", [4, 8])
def test_body_of_softmax(shape: tuple[int, ...], dtype: Any, bits: int, runtime: str) -> None:
    x = scores(shape, dtype)
    params = softmax_params(*fitted(x, bits))
    y = run("SULQSoftmax", {"x": x, "params": params}, runtime)
    assert y.dtype == dtype
    np.testing.assert_allclose(*_equal_codes(y, ops_softmax.sulq_softmax(x, params), params), rtol=2e-3 if dtype == np.float16 else 1e-5)


def _equal_codes(y: np.ndarray, expected: np.ndarray, params: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both, once it is known that no more than 1 in 500 is another level, and then the next: float sums differ in their last bit."""
    shift, _, scale, *_ = params
    steps = np.abs(np.log(y.astype(np.float64) + shift) - np.log(expected.astype(np.float64) + shift)) / scale
    assert steps.max() < 1.05 and np.mean(steps > 0.5) <= 1 / 500
    same = steps < 0.5
    return y[same].astype(np.float32) + shift, expected[same].astype(np.float32) + shift


@RUNTIMES
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", TYPES)
def test_body_of_codes(shape: tuple[int, ...], dtype: Any, runtime: str) -> None:
    x = scores(shape, dtype)
    params = softmax_params(*fitted(x))
    packed = run("SULQSoftmaxCodes", {"x": x, "params": params}, runtime)
    expected = ops_softmax.sulq_softmax_codes(x, params)
    assert packed.dtype == np.int8 and packed.shape == expected.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    apart = np.abs(unpack_codes(packed).astype(int) - unpack_codes(expected))
    assert apart.max() <= 1 and np.mean(apart) <= 1 / 500


@RUNTIMES
@pytest.mark.parametrize("columns", [1, 8, 197])
def test_body_of_attention_value(columns: int, runtime: str) -> None:
    rng = np.random.default_rng(1)
    packed = rng.integers(-128, 128, (2, 3, 5, (columns + 1) // 2), dtype=np.int8)
    v = rng.standard_normal((2, 3, columns, 24)).astype(np.float32)
    levels = rng.random(16, dtype=np.float32)
    y = run("SULQAttentionValue", {"packed": packed, "levels": levels, "v": v}, runtime)
    np.testing.assert_allclose(y, ops_softmax.sulq_attention_value(packed, levels, v), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("name", SOFTMAX)
def test_tensorrt_rtx_builds_the_bodies(name: str, dtype: Any, tmp_path: Path) -> None:
    """It has no plugins: engines hold the body."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")
    x, params = scores((2, 3, 7, 9), dtype), softmax_params(*fitted(scores((2, 3, 7, 9))))
    packed = ops_softmax.sulq_softmax_codes(x, params)
    operands = {"x": x, "params": params, "packed": packed, "levels": np.ones(16, np.float32), "v": np.zeros((2, 3, 9, 8), dtype)}
    feeds = {key: operands[key] for key in ops.OPERATORS[name].inputs}
    onnx.save(calling(name, feeds), tmp_path / "m.onnx")
    built = tensorrt.build(tmp_path / "m.onnx", {key: array.shape for key, array in feeds.items()}, get_target("tensorrt-rtx"))
    assert memoryview(built.engine).nbytes > 0


def test_softmax_is_the_textbook_one_and_zero_where_all_is_masked() -> None:
    x = scores((4, 7, 33))
    weight = softmax(x)
    power = np.exp(x.astype(np.float64).reshape(-1, 33)[:-1])
    np.testing.assert_allclose(weight.reshape(-1, 33)[:-1], power / power.sum(-1, keepdims=True), rtol=1e-5)
    assert not weight.reshape(-1, 33)[-1].any()


def test_codes_times_levels_are_the_levels_themselves() -> None:
    x = scores((2, 5, 31))
    v = np.random.default_rng(2).standard_normal((2, 31, 16)).astype(np.float32)
    quantizer, params = fitted(x)
    operand = softmax_params(quantizer, params)
    packed = ops_softmax.sulq_softmax_codes(x, operand)
    expected = ops_softmax.sulq_softmax(x, operand) @ v
    y = ops_softmax.sulq_attention_value(packed, code_levels(quantizer, params), v)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"whole_exponents": True}, {"lowest_is_zero": True}])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_levels_are_those_of_the_quantizer(bits: int, options: dict[str, bool]) -> None:
    x = softmax(scores((4, 33)))
    quantizer, params = fitted(scores((4, 33)), bits, **options)
    codes = quantizer.quantize(x, params)
    np.testing.assert_array_equal(code_levels(quantizer, params)[codes.astype(int) + 8], quantizer.dequantize(codes, params))


def test_params_say_what_they_were_made_from() -> None:
    quantizer, params = fitted(scores((4, 33)), 3)
    assert ops_softmax._fitted(softmax_params(quantizer, params)) == (quantizer, params)


def test_layout_is_pairs_low_nibble_first() -> None:
    assert pack_codes(np.array([[1, 2, -1, -8, 7, 0]], np.int8)).view(np.uint8).tolist() == [[0x21, 0x8F, 0x07]]
    every = np.arange(-128, 128, dtype=np.int8)
    np.testing.assert_array_equal(pack_codes(unpack_codes(every)), every)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="do not fit a nibble"):
        code_levels(*fitted(scores((4, 33)), 5))
    x, params = np.zeros((4, 8), np.float32), np.ones(5, np.float32)
    packed, levels, v = np.zeros((3, 4, 5), np.int8), np.ones(16, np.float32), np.zeros((3, 9, 8), np.float16)
    for operator, operands, message in [
        ("SULQSoftmax", {"x": x.astype(float), "params": params}, "cannot take x of type float64"),
        ("SULQSoftmax", {"x": x[:, :0], "params": params}, r"x of type float32 and shape \[4, 0\]"),
        ("SULQSoftmaxCodes", {"x": x, "params": params[:4]}, r"params of type float32 and shape \[4\]"),
        ("SULQAttentionValue", {"packed": packed.view(np.uint8), "levels": levels, "v": v}, "packed of type uint8"),
        ("SULQAttentionValue", {"packed": packed, "levels": levels[:8], "v": v}, "cannot take levels"),
        ("SULQAttentionValue", {"packed": packed[:2], "levels": levels, "v": v}, r"packed of type int8 and shape \[2, 4, 5\]"),
        ("SULQAttentionValue", {"packed": packed, "levels": levels, "v": v[:, :8]}, r"packed of type int8 and shape \[3, 4, 5\]"),
        ("SULQAttentionValue", {"packed": packed, "levels": levels, "v": v[0, 0]}, "cannot take v"),
        ("SULQAttentionValue", {"packed": packed, "levels": levels, "v": np.zeros((3, 9, 257), np.float16)}, "D of at most 256"),
        ("SULQ", {}, "SULQSoftmax"),
    ]:
        with pytest.raises(UsageError, match=message):
            ops.check(operator, operands)


def test_results_are_as_promised() -> None:
    x, params = scores((2, 3, 7), np.float16), softmax_params(*fitted(scores((2, 3, 7))))
    packed, levels, v = np.zeros((2, 3, 4), np.int8), np.ones(16, np.float32), np.zeros((2, 7, 6), np.float16)
    for operator in [ops.OPERATORS[name] for name in SOFTMAX]:
        operands = {"x": x, "params": params, "packed": packed, "levels": levels, "v": v}
        taken = {key: operands[key] for key in operator.inputs}
        result = operator.reference(**taken)
        assert (result.shape, result.dtype) == ops.check(operator.name, taken)
