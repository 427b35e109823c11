"""insert-qdq: that the numbers stay close, what beats the plain alternative, and what keeps a layer float."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from graphq import ir, qdq
from graphq.errors import TargetError
from graphq.passes.insert_qdq import InsertQdq
from graphq.pipeline import PassRecord
from graphq.targets import TARGETS

GOLDEN = Path(__file__).parent / "golden" / "insert_qdq"
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
SYMMETRIC = ["generic", "tensorrt", "tensorrt-rtx"]

Feeds = Mapping[str, np.ndarray]
Quantize = Callable[..., tuple[ir.Model, PassRecord]]
Run = Callable[..., np.ndarray]
Sqnr = Callable[[np.ndarray, np.ndarray], float]
IntegerLayers = Callable[[ir.Model], set[str | None]]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whatever ran before, a test sees the same data."""
    RNG.bit_generator.state = START


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def ops(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == op_type]


# ---- golden text ----------------------------------------------------------------------------------------------------


def dump(model: ir.Model) -> str:
    """Nodes with their edges, constants with type, shape and the sum of codes (of weights) or values to three digits (of the others)."""
    rows = []
    for name, value in model.graph.initializers.items():
        array = ir.constant(value)
        assert array is not None
        total = "" if array.dtype == np.int32 else f" sum {float(array.astype(np.float64).sum()):.3g}"
        rows.append(f"{name}: {value.dtype}{list(array.shape)}{total}")
    for node in model.graph:
        axis = f" axis={ir.attribute(node, 'axis')}" if "axis" in node.attributes else ""
        rows.append(f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(v.name or '-' for v in node.inputs if v)}){axis}")
    return "\n".join([*rows, f"output {model.graph.outputs[0].name}", ""])


@pytest.mark.parametrize("case", ["conv_residual", "matmul_gelu_tensorrt"])
def test_golden(case: str, quantize: Quantize) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    proto = parser.parse_model(before)
    shape = [dim.dim_value or 16 for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    ramp = np.linspace(-2, 2, int(np.prod(shape)), dtype=np.float32).reshape(shape)
    model, _ = quantize(proto, {"x": ramp}, "tensorrt" if case.endswith("tensorrt") else "onnxruntime", error_samples=0)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- numbers --------------------------------------------------------------------------------------------------------

CONV = """g (float[N, 4, 8, 8] x) => (float[N, 6, 8, 8] y)
    { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a) c = Conv(r, w2, b2) s = Add(c, r) y = Conv(s, w3) }"""
MLP = """g (float[N, 16] x) => (float[N, 8] y)
    { a = Gemm <transB = 1> (x, w1, b1) r = Gelu(a) h = MatMul(r, w2) i = Add(h, b2) t = Tanh(i) y = Gemm(t, w3) }"""


def conv() -> tuple[onnx.ModelProto, Feeds]:
    weights = {"w1": floats(6, 4, 3, 3), "b1": floats(6), "w2": floats(6, 6, 1, 1), "b2": floats(6), "w3": floats(6, 6, 1, 1)}
    return build(CONV, **weights), {"x": floats(12, 4, 8, 8)}


def mlp() -> tuple[onnx.ModelProto, Feeds]:
    weights = {"w1": floats(32, 16) / 4, "b1": floats(32), "w2": floats(32, 24) / 6, "b2": floats(24), "w3": floats(24, 8)}
    return build(MLP, **weights), {"x": floats(256, 16)}


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("ranges", ["min-max", "percentile", "mse", "entropy"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("network", [conv, mlp])
def test_table(
    network: Any, target: str, ranges: str, per_channel: bool, quantize: Quantize, run: Run, sqnr: Sqnr, integer_layers: IntegerLayers
) -> None:
    """Three 8-bit layers after one another: 24 dB at least, in ONNX Runtime and in the reference evaluator alike."""
    proto, feeds = network()
    model, record = quantize(proto, feeds, target, ranges=ranges, per_channel=per_channel, float_budget=0)
    assert len(integer_layers(model)) == 3 and not record.skipped
    result = run(model, feeds)
    assert sqnr(run(proto, feeds), result) > 24
    second = ReferenceEvaluator(ir.to_proto(model)).run(None, dict(feeds))[0]
    assert sqnr(second, result) > 45  # they may round a value at the border of two codes differently
    scale = ir.constant(ops(model, "DequantizeLinear")[0].inputs[1])
    assert scale is not None
    weights = [node.inputs[1] for node in ops(model, "Conv") + ops(model, "Gemm") + ops(model, "MatMul")]
    assert {np.ndim(ir.constant(ir.producer(value).inputs[1])) for value in weights} == {int(per_channel)}  # type: ignore[union-attr]


@pytest.mark.parametrize("network", [conv, mlp])
def test_deployed_equals_simulated(network: Any, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    """ONNX Runtime's integer kernels give what the Q/DQ graph says, up to codes at the border of two (35 dB)."""
    proto, feeds = network()
    model, _ = quantize(proto, feeds)
    assert sqnr(run(model, feeds), run(model, feeds, deployed=True)) > 35


def test_one_layer_equals_the_formula(quantize: Quantize, run: Run) -> None:
    """`y = Q(x) Q(W)` in numpy, to 1e-5 of the largest output."""
    weight, x = floats(16, 8), floats(64, 16)
    model, _ = quantize(build("g (float[N, 16] x) => (float[N, 8] y) { y = MatMul(x, w) }", w=weight), {"x": x}, "generic")
    x_scale = np.float32(np.abs(x).max() / 127)
    w_scale = (np.abs(weight).max(0) / 127).astype(np.float32)
    expected = (np.clip(np.rint(x / x_scale), -128, 127) * x_scale) @ (np.clip(np.rint(weight / w_scale), -128, 127) * w_scale)
    np.testing.assert_allclose(run(model, {"x": x}), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_sizes(quantize: Quantize) -> None:
    proto, feeds = mlp()
    model, _ = quantize(proto, feeds)
    before, after = qdq.quantized_weight_bytes(model)
    assert before == 4 * (32 * 16 + 32 * 24 + 24 * 8) and after < 0.35 * before  # tiny layers: their scales weigh 5 bytes a channel
    assert all(value.uses() for value in model.graph.initializers.values())


# ---- better than the plain alternative on its own objective ---------------------------------------------------------


def one_layer(outputs: int = 8, **more: np.ndarray) -> onnx.ModelProto:
    body = "a = MatMul(x, w) [bias] y = Add(a, b)" if "b" in more else "y = MatMul(x, w)"
    return build(f"g (float[N, 16] x) => (float[N, {outputs}] y) {{ {body} }}", w=floats(16, outputs), **more)


@pytest.mark.parametrize("target", ["onnxruntime", "generic"])
def test_mse_beats_min_max_on_heavy_tails(target: str, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    """On the error of what it quantizes, seen through a layer."""
    x = RNG.standard_t(2.5, (2048, 16)).astype(np.float32)
    proto = one_layer()
    reference = run(proto, {"x": x})
    errors = {ranges: sqnr(reference, run(quantize(proto, {"x": x}, target, ranges=ranges)[0], {"x": x})) for ranges in ("mse", "min-max")}
    assert errors["mse"] > errors["min-max"] + 0.2


@pytest.mark.parametrize("target", TARGETS)
def test_correct_bias_lowers_the_mean_error(target: str, quantize: Quantize, run: Run) -> None:
    """Positive inputs and a coarse weight give every channel a mean error; what the samples agree on is gone."""
    x, proto = np.abs(floats(512, 16)) ** 3, one_layer(b=floats(8))
    reference = run(proto, {"x": x})
    shifts = {}
    for correct in (True, False):
        options = {"correct_bias": correct, "error_samples": 512, "float_budget": 0, "center": False, "per_channel": False}
        model, _ = quantize(proto, {"x": x}, target, **options)
        shifts[correct] = np.abs((run(model, {"x": x}) - reference).mean(0, dtype=np.float64)).max()
    assert shifts[True] < 0.1 * shifts[False]


def test_correct_bias_needs_enough_rows(quantize: Quantize) -> None:
    """The mean over a handful of positions is noise: nothing is taken out of the bias then."""
    x, bias = np.abs(floats(100, 16)), floats(8)
    model, _ = quantize(one_layer(b=bias), {"x": x}, "generic", error_samples=100, center=False)
    np.testing.assert_array_equal(ir.constant(ops(model, "Add")[0].inputs[1]), bias)


@pytest.mark.parametrize("target", SYMMETRIC)
def test_center_lowers_the_error_of_one_sided_activations(target: str, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    x, proto = np.abs(floats(512, 16)), one_layer(b=floats(8))
    reference = run(proto, {"x": x})
    errors = {center: sqnr(reference, run(quantize(proto, {"x": x}, target, center=center)[0], {"x": x})) for center in (True, False)}
    assert errors[True] > errors[False] + 1


@pytest.mark.parametrize("alpha_beta", [(1.0, 0.5), (2.0, 3.0), (1.0, 0.0)])
@pytest.mark.parametrize("bias", [(8,), (1, 8), (1,), ()])
@pytest.mark.parametrize("target", ["onnxruntime", "generic"])
def test_biases_of_gemm(target: str, bias: tuple[int, ...], alpha_beta: tuple[float, float], quantize: Quantize, run: Run) -> None:
    """Scaled and broadcast biases are corrected by the right amount, or left alone."""
    alpha, beta = alpha_beta
    text = f"g (float[N, 16] x) => (float[N, 8] y) {{ [fc] y = Gemm <alpha = {alpha}, beta = {beta}> (x, w, b) }}"
    x, proto = np.abs(floats(512, 16)) ** 3, build(text, w=floats(16, 8), b=floats(*bias))
    reference = run(proto, {"x": x})
    shifts = {}
    for correct in (True, False):
        model, _ = quantize(proto, {"x": x}, target, correct_bias=correct, error_samples=512, float_budget=0, per_channel=False)
        shifts[correct] = np.abs((run(model, {"x": x}) - reference).mean(0, dtype=np.float64)).max()
    assert shifts[True] <= 1.001 * shifts[False]


# ---- layers that stay float -----------------------------------------------------------------------------------------


def deep(bad: float) -> tuple[onnx.ModelProto, Feeds]:
    """Ten layers of the same work; the input of the third has an outlier channel that its weight hardly reads."""
    text = " ".join(
        f"[l{k}] h{k} = MatMul({f't{k - 1}' if k else 'x'}, w{k}) t{k} = {'Mul(h2, spread)' if k == 2 else f'Tanh(h{k})'}"
        for k in range(10)
    )
    spread = np.ones(16, np.float32)
    spread[0] = bad
    weights = {f"w{k}": floats(16, 16) / 4 for k in range(10)}
    weights["w3"][0] /= bad
    return build(f"g (float[N, 16] x) => (float[N, 16] t9) {{ {text} }}", **weights, spread=spread), {"x": floats(64, 16)}


def test_the_worst_layer_stays_float_and_says_so(quantize: Quantize, run: Run, sqnr: Sqnr, integer_layers: IntegerLayers) -> None:
    proto, feeds = deep(100.0)
    model, record = quantize(proto, feeds)
    assert integer_layers(model) == {f"l{k}" for k in range(10) if k != 3}
    ((where, reason),) = record.skipped
    assert "'l3'" in where and reason.startswith("kept float: its own error of") and reason.endswith("dB is worse than 28 dB")
    measured = {entry.where: entry.numbers for entry in record.measurements}
    assert measured["l3"]["sqnr_db"] < 28 < min(numbers["sqnr_db"] for name, numbers in measured.items() if name != "l3")
    assert sum(numbers["work"] for numbers in measured.values()) == pytest.approx(1)
    everything, _ = quantize(proto, feeds, float_budget=0)
    reference = run(proto, feeds)
    assert sqnr(reference, run(model, feeds)) > sqnr(reference, run(everything, feeds)) + 3


@pytest.mark.parametrize(
    ("options", "kept"),
    [({"float_budget": 0.0}, 0), ({"float_budget": 0.3}, 3), ({"float_budget": 0.25}, 2), ({"float_budget": 1.0}, 10),
     ({"float_budget": 1.0, "min_sqnr_db": 0.0}, 0), ({"float_budget": 1.0, "error_samples": 0}, 0)],
)  # fmt: skip
def test_the_budget_is_kept(options: dict[str, Any], kept: int, quantize: Quantize, integer_layers: IntegerLayers) -> None:
    """With an unreachable limit every layer wants to stay float; the worst go first, as long as there is budget."""
    proto, feeds = deep(100.0)
    model, record = quantize(proto, feeds, **{"min_sqnr_db": 60.0, "allow_no_effect": True, **options})
    assert len(integer_layers(model)) == 10 - kept
    errors = {entry.where: entry.numbers["sqnr_db"] for entry in record.measurements}
    left = set(sorted(errors, key=errors.__getitem__)[:kept])
    assert integer_layers(model) == {f"l{k}" for k in range(10)} - left


def test_excluded_layers_are_in_the_report(quantize: Quantize, integer_layers: IntegerLayers) -> None:
    proto, feeds = deep(1.0)
    model, record = quantize(proto, feeds, exclude=("l1", "l[78]"))
    assert integer_layers(model) == {f"l{k}" for k in (0, 2, 3, 4, 5, 6, 9)}
    assert [reason for _, reason in record.skipped] == ["excluded by the recipe"] * 3


NOTHING = {
    "dynamic operands": ("g (float[N, 4] x) => (float[N, N] y) { t = Transpose(x) y = MatMul(x, t) }", {}),
    "vector": ("g (float[N, 4] x) => (float[N] y) { y = MatMul(x, w) }", {"w": floats(4)}),
    "no layers": ("g (float[N, 4] x) => (float[N, 4] y) { y = Softmax(x) }", {}),
    "float16": ("g (float16[N, 4] x) => (float16[N, 4] y) { y = MatMul(x, w) }", {"w": floats(4, 4).astype(np.float16)}),
}


@pytest.mark.parametrize("case", NOTHING)
def test_a_model_with_nothing_to_quantize_is_refused(case: str, quantize: Quantize) -> None:
    text, weights = NOTHING[case]
    proto = build(text, **weights)
    kind = np.float16 if case == "float16" else np.float32
    with pytest.raises(TargetError, match="nothing to quantize"):
        quantize(proto, {"x": floats(8, 4).astype(kind)})


def test_quantizing_twice_is_refused(quantize: Quantize) -> None:
    proto, feeds = mlp()
    model, _ = quantize(proto, feeds)
    with pytest.raises(TargetError, match="nothing to quantize"):
        quantize(ir.to_proto(model), feeds)


@pytest.mark.parametrize(
    "options",
    [
        {"ranges": "best"},
        {"percentile": 50},
        {"percentile": 101},
        {"float_budget": 1.1},
        {"min_sqnr_db": -1},
        {"error_samples": -1},
        {"bits": 4},
    ],
)
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        InsertQdq(**options)
