"""`inspect` tells what is in a model and why a node stays float; `kernels` tells what ONNX Runtime really computes on integers."""

from pathlib import Path

import numpy as np
import onnx
import pytest

from graphq import ir, report
from graphq.convert import convert
from graphq.errors import GraphqError, ModelError
from graphq.inspect import compare_files, inspect, pass_options, pass_summaries
from graphq.kernels_used import kernels
from graphq.models import digits, onnx_path

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
NEWEST = '<ir_version: 13, opset_import: ["" : 25, "graphq" : 1]>'
MIXED = f"""{HEAD}
mixed (float[n, 2] x, float[2, 2] other) => (float[n, 2] y)
<float[2, 2] w = {{1, 2, 3, 4}}, float[2] vector = {{1, 2}}>
{{
   [by_weight] a = MatMul(x, w)
   [by_input] b = MatMul(a, other)
   [by_vector] c = MatMul(b, vector)
   y = Add(b, c)
}}"""
QUANTIZED = f"""{HEAD}
quantized (float[n, 4] x) => (float[n, 4] y)
<float s = {{0.1}}, uint8 z = {{128}}, int8 zw = {{0}},
 int8[4, 4] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}},
 float[4, 4] v = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}}>
{{
   xq = QuantizeLinear(x, s, z)
   xd = DequantizeLinear(xq, s, z)
   wd = DequantizeLinear(w, s, zw)
   [first] a = MatMul(xd, wd)
   aq = QuantizeLinear(a, s, z)
   ad = DequantizeLinear(aq, s, z)
   b = Softmax(ad)
   [second] y = MatMul(b, v)
}}"""


def write(folder: Path, text: str) -> Path:
    path = folder / "model.onnx"
    ir.save(ir.from_onnx_text(text), path)
    return path


def test_a_trained_network() -> None:
    found = inspect(onnx_path("digits_cnn"))
    assert found.ops["Conv"] == 8 and found.ops["Gemm"] == 1 and next(iter(found.ops)) in ("Conv", "BatchNormalization")
    assert [(entry.name, entry.dtype, entry.shape) for entry in found.inputs] == [("input", "float32", ("batch", 1, 32, 32))]
    assert found.dynamic_axes == ("input.0 (batch)",)
    assert len([node for node in found.linear if node.refusal is None]) == 9 and found.quantizable_share > 0.95
    assert not found.already_quantized
    assert all(fit.reason is None for fit in found.targets)


NESTED = f"""{NEWEST}
nested (float[n, 4] x) => (float[n, 2] y)
<uint2[4, 2] high = {{1, 2, 3, 1, 2, 3, 0, 0}}, uint2[4, 2] low = {{0, 1, 0, 1, 0, 1, 2, 2}}, float[2] scale = {{1, 2}}>
{{ w = graphq.Steps(high, low, scale)  [it] y = MatMul(x, w) }}
<domain: "graphq", opset_import: ["" : 25]>
Steps (high, low, scale) => (w) {{ h = Cast<to = 1>(high)  l = Cast<to = 1>(low)  codes = Add(h, l)  w = Mul(codes, scale) }}"""


def test_weights_that_a_function_makes_of_codes_are_known(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, NESTED))
    assert found.already_quantized
    (node,) = found.linear
    assert (node.storage, node.weight_shape, node.refusal) == ("2 x uint2", (4, 2), "already quantized (2 x uint2)")


def test_every_refusal_has_its_reason(tmp_path: Path) -> None:
    found = {node.name: node.refusal for node in inspect(write(tmp_path, MIXED)).linear}
    assert found["by_weight"] is None
    assert found["by_input"] == "its weight is not a constant of the graph"
    assert found["by_vector"] == "its weight is a vector"


def test_a_weight_that_normalize_lifts_can_be_quantized(tmp_path: Path) -> None:
    text = f"""{HEAD}
    hidden (float[n, 2] x) => (float[n, 2] y)
    {{ w = Constant<value = float[2, 2] {{1, 2, 3, 4}}>()  t = Transpose<perm = [1, 0]>(w)  y = MatMul(x, t) }}"""
    found = inspect(write(tmp_path, text))
    assert [node.refusal for node in found.linear] == [None]
    assert found.quantizable_share == 1 and found.ops == {"Constant": 1, "Transpose": 1, "MatMul": 1}


def test_a_quantized_model_is_known_as_one(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, QUANTIZED))
    nodes = {node.name: node for node in found.linear}
    assert found.already_quantized
    assert (nodes["first"].storage, nodes["first"].refusal, nodes["first"].weight_shape) == ("int8", "already quantized (int8)", (4, 4))
    assert nodes["second"].refusal is None
    reasons = {fit.name: fit.reason for fit in found.targets}
    assert reasons["onnxruntime"] is None
    assert "tensorrt" in reasons and reasons["tensorrt"] is not None


def test_recipes_do_not_fit_a_model_without_weights(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, f"{HEAD} plain (float[n, 2] x) => (float[n, 2] y) {{ y = Relu(x) }}"))
    assert found.recipes and all("no Conv" in (fit.reason or "") for fit in found.recipes if fit.name not in ("fp16", "bf16"))


def test_recipes_for_an_export_in_float16(tmp_path: Path) -> None:
    """An engine of it is built by recipe fp16, which changes nothing."""
    text = '<ir_version: 10, opset_import: ["" : 17]> g (float16[n, 4] x, float16[4, 4] w) => (float16[n, 4] y) { y = MatMul(x, w) }'
    proto = onnx.parser.parse_model(text)
    weight = proto.graph.input.pop()
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((4, 4), np.float16), weight.name))
    onnx.save(proto, tmp_path / "m.onnx")
    reasons = {fit.name: fit.reason for fit in inspect(tmp_path / "m.onnx", "tensorrt").recipes}
    assert reasons["fp16"] is None and reasons["bf16"] == "There is nothing in float32."
    assert "FLOAT16" in (reasons["int8-fp16"] or "")


def test_an_unknown_rank_is_said(tmp_path: Path) -> None:
    found = inspect(write(tmp_path, f"{HEAD} open (float x) => (float[n] y) {{ y = Flatten(x) }}"))
    assert found.inputs[0].shape in ((), None)


def test_an_inspection_becomes_json() -> None:
    assert report.plain(inspect(onnx_path("digits_cnn")))["ops"]["Conv"] == 8


def test_kernels_of_a_float_model_are_float() -> None:
    found = kernels(onnx_path("digits_cnn"))
    assert not found.integer and not found.conversions and not found.counts
    convolutions = {"node_conv2d", *(f"node_conv2d_{index}" for index in range(1, 8))}
    assert {kernel.original for kernel in found.floating} == {"node_linear"} | convolutions


def test_kernels_of_a_quantized_model(tmp_path: Path) -> None:
    found = kernels(write(tmp_path, QUANTIZED))
    assert dict(found.counts).get("QLinearMatMul", 0) + dict(found.counts).get("MatMulIntegerToFloat", 0) == 1
    assert "first" in [kernel.original for kernel in found.integer]
    assert [kernel.original for kernel in found.floating] == ["second"]
    assert all("Softmax" in kernel.note for kernel in found.conversions if kernel.op_type == "DequantizeLinear")


def test_a_model_does_not_differ_from_itself() -> None:
    found, described = compare_files(onnx_path("digits_cnn"), onnx_path("digits_cnn"), samples=4)
    assert [(one.name, one.sqnr_db, one.max_abs, one.top1_agreement) for one in found] == [("logits", float("inf"), 0.0, 1.0)]
    assert "random" in described


def test_layers_are_compared_worst_first(tmp_path: Path) -> None:
    rounded = write(tmp_path, MIXED.replace("{1, 2, 3, 4}", "{1, 2, 3, 4.5}"))
    original = tmp_path / "original.onnx"
    ir.save(ir.from_onnx_text(MIXED), original)
    found, _ = compare_files(original, rounded, layers=True, samples=4)
    assert {"y"} <= {one.name for one in found}
    assert [one.sqnr_db for one in found] == sorted(one.sqnr_db for one in found)


def test_models_with_other_outputs_are_not_compared(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="different inputs: input and x, other"):
        compare_files(onnx_path("digits_cnn"), write(tmp_path, MIXED))


def test_every_pass_has_a_summary_and_documented_options() -> None:
    for name, summary in pass_summaries().items():
        assert summary and "cannot be imported" not in summary, name
        assert [option.name for option in pass_options(name)[1] if not option.about] == [], name


def test_options_show_type_and_default() -> None:
    about, options = pass_options("insert-qdq")
    found = {option.name: (option.type, option.default) for option in options}
    assert about.startswith("Quantizes")
    assert found["ranges"][0].startswith("min-max | percentile") and found["per_channel"] == ("boolean", "true")
    assert options[-1].name == "allow_no_effect"


def test_an_unknown_pass_is_refused() -> None:
    with pytest.raises(GraphqError, match="did you mean 'insert-qdq'"):
        pass_options("insert-qd")


def test_layers_that_no_pass_quantizes_are_named(tmp_path: Path) -> None:
    text = "g (float[s, n, 4] x) => (float[] y) { [recurrent] y = LSTM <hidden_size = 3> (x, w, r) }"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> {text.replace("w, r", "x, x")}')
    ir.save(model, tmp_path / "m.onnx")
    (node,) = inspect(tmp_path / "m.onnx").linear
    assert node.op_type == "LSTM" and node.refusal == "not quantized by any pass"


def test_layers_that_b_computes_on_codes_are_not_compared(tmp_path: Path) -> None:
    """The demo's: values that were rescaled have other names, and codes are no floats."""
    calib = {"input": digits.calibration(16)}
    convert(onnx_path("digits_vit"), tmp_path / "b.onnx", calib=calib, limits={"min_speedup": None})
    np.savez(tmp_path / "data.npz", **calib)
    found, _ = compare_files(onnx_path("digits_vit"), tmp_path / "b.onnx", tmp_path / "data.npz", layers=True)
    assert len(found) > 50 and found[0].sqnr_db > 20
