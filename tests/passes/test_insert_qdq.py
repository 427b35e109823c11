"""insert-qdq: which nodes become integer on which target, that the numbers stay close, and what keeps a layer float."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from graphq import ir, kernels_used, qdq
from graphq.calibration import open_calibration
from graphq.errors import TargetError
from graphq.executor import Executor
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.targets import TARGETS, get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "insert_qdq"
RNG = np.random.default_rng(0)
START = RNG.bit_generator.state
SYMMETRIC = ["generic", "tensorrt", "tensorrt-rtx"]

Feeds = Mapping[str, np.ndarray]


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


def quantize(proto: onnx.ModelProto, feeds: Feeds, target: str = "onnxruntime", **options: Any) -> tuple[ir.Model, PassRecord]:
    """The model after normalize and insert-qdq, and what the latter did."""
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    data = open_calibration(dict(feeds), ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
    record = run_passes([Normalize(), InsertQdq(**options)], ctx, verify_graph)[1]
    require_legal(model, ctx.target)
    return model, record


def run(model: onnx.ModelProto | ir.Model, feeds: Feeds, *, deployed: bool = False) -> np.ndarray:
    """First output, by exact ONNX semantics or as deployed."""
    model = model if isinstance(model, ir.Model) else onnx_ir.from_proto(onnx.ModelProto.FromString(model.SerializeToString()))
    return Executor(model, deployed=deployed, threads=1).run(feeds)[0]


def sqnr(reference: np.ndarray, result: np.ndarray) -> float:
    """Signal over noise in dB."""
    noise = np.sum((reference.astype(np.float64) - result) ** 2)
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / max(noise, 1e-30)))


def ops(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == op_type]


def maker(value: ir.Value | None) -> str | None:
    node = ir.producer(value)
    return None if node is None else node.op_type


def integer_layers(model: ir.Model) -> set[str | None]:
    return {node.name for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul") and maker(node.inputs[1]) == "DequantizeLinear"}


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
def test_golden(case: str) -> None:
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
def test_table(network: Any, target: str, ranges: str, per_channel: bool) -> None:
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
def test_deployed_equals_simulated(network: Any) -> None:
    """ONNX Runtime's integer kernels give what the Q/DQ graph says, up to codes at the border of two (35 dB)."""
    proto, feeds = network()
    model, _ = quantize(proto, feeds)
    assert sqnr(run(model, feeds), run(model, feeds, deployed=True)) > 35


def test_one_layer_equals_the_formula() -> None:
    """`y = Q(x) Q(W)` in numpy, to 1e-5 of the largest output."""
    weight, x = floats(16, 8), floats(64, 16)
    model, _ = quantize(build("g (float[N, 16] x) => (float[N, 8] y) { y = MatMul(x, w) }", w=weight), {"x": x}, "generic")
    x_scale = np.float32(np.abs(x).max() / 127)
    w_scale = (np.abs(weight).max(0) / 127).astype(np.float32)
    expected = (np.clip(np.rint(x / x_scale), -128, 127) * x_scale) @ (np.clip(np.rint(weight / w_scale), -128, 127) * w_scale)
    np.testing.assert_allclose(run(model, {"x": x}), expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


# ---- better than the plain alternative on its own objective ---------------------------------------------------------


def one_layer(outputs: int = 8, **more: np.ndarray) -> onnx.ModelProto:
    body = "a = MatMul(x, w) [bias] y = Add(a, b)" if "b" in more else "y = MatMul(x, w)"
    return build(f"g (float[N, 16] x) => (float[N, {outputs}] y) {{ {body} }}", w=floats(16, outputs), **more)


@pytest.mark.parametrize("target", ["onnxruntime", "generic"])
def test_mse_beats_min_max_on_heavy_tails(target: str) -> None:
    """On the error of what it quantizes, seen through a layer."""
    x = RNG.standard_t(2.5, (2048, 16)).astype(np.float32)
    proto = one_layer()
    reference = run(proto, {"x": x})
    errors = {ranges: sqnr(reference, run(quantize(proto, {"x": x}, target, ranges=ranges)[0], {"x": x})) for ranges in ("mse", "min-max")}
    assert errors["mse"] > errors["min-max"] + 0.2


@pytest.mark.parametrize("target", TARGETS)
def test_correct_bias_lowers_the_mean_error(target: str) -> None:
    """Positive inputs and a coarse weight give every channel a mean error; it is gone for the data it was measured on."""
    x, proto = np.abs(floats(512, 16)) ** 3, one_layer(b=floats(8))
    reference = run(proto, {"x": x})
    shifts = {}
    for correct in (True, False):
        options = {"correct_bias": correct, "error_samples": 512, "float_budget": 0, "center": False, "per_channel": False}
        model, _ = quantize(proto, {"x": x}, target, **options)
        shifts[correct] = np.abs((run(model, {"x": x}) - reference).mean(0, dtype=np.float64)).max()
    assert shifts[True] < 1e-4 * shifts[False]


def test_correct_bias_needs_enough_rows() -> None:
    """The mean over a handful of positions is noise: nothing is taken out of the bias then."""
    x, bias = np.abs(floats(100, 16)), floats(8)
    model, _ = quantize(one_layer(b=bias), {"x": x}, "generic", error_samples=100, center=False)
    np.testing.assert_array_equal(ir.constant(ops(model, "Add")[0].inputs[1]), bias)


@pytest.mark.parametrize("target", SYMMETRIC)
def test_center_lowers_the_error_of_one_sided_activations(target: str) -> None:
    x, proto = np.abs(floats(512, 16)), one_layer(b=floats(8))
    reference = run(proto, {"x": x})
    errors = {center: sqnr(reference, run(quantize(proto, {"x": x}, target, center=center)[0], {"x": x})) for center in (True, False)}
    assert errors[True] > errors[False] + 1


@pytest.mark.parametrize("alpha_beta", [(1.0, 0.5), (2.0, 3.0), (1.0, 0.0)])
@pytest.mark.parametrize("bias", [(8,), (1, 8), (1,), ()])
@pytest.mark.parametrize("target", ["onnxruntime", "generic"])
def test_biases_of_gemm(target: str, bias: tuple[int, ...], alpha_beta: tuple[float, float]) -> None:
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


def test_the_worst_layer_stays_float_and_says_so() -> None:
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
def test_the_budget_is_kept(options: dict[str, Any], kept: int) -> None:
    """With an unreachable limit every layer wants to stay float; the worst go first, as long as there is budget."""
    proto, feeds = deep(100.0)
    model, record = quantize(proto, feeds, **{"min_sqnr_db": 60.0, "allow_no_effect": True, **options})
    assert len(integer_layers(model)) == 10 - kept
    errors = {entry.where: entry.numbers["sqnr_db"] for entry in record.measurements}
    left = set(sorted(errors, key=errors.__getitem__)[:kept])
    assert integer_layers(model) == {f"l{k}" for k in range(10)} - left


def test_excluded_layers_are_in_the_report() -> None:
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
def test_a_model_with_nothing_to_quantize_is_refused(case: str) -> None:
    text, weights = NOTHING[case]
    proto = build(text, **weights)
    kind = np.float16 if case == "float16" else np.float32
    with pytest.raises(TargetError, match="nothing to quantize"):
        quantize(proto, {"x": floats(8, 4).astype(kind)})


def test_quantizing_twice_is_refused() -> None:
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


# ---- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_two_readers_share_one_pair(target: str) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { q = MatMul(x, w) k = MatMul(x, v) y = Mul(q, k) }"
    model, _ = quantize(build(text, w=floats(8, 8), v=floats(8, 8)), {"x": floats(32, 8)}, target)
    assert len(ops(model, "QuantizeLinear")) == 1
    first, second = ops(model, "MatMul")
    assert first.inputs[0] is second.inputs[0] and maker(first.inputs[0]) == "DequantizeLinear"


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_two_layers_share(target: str) -> None:
    """Each gets its own codes, also where a third reader needs the floats."""
    text = "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w) t = Tanh(a) b = MatMul(t, w) d = ReduceSum(w) y = Add(b, d) }"
    proto, feeds = build(text, w=floats(8, 8)), {"x": floats(64, 8)}
    model, _ = quantize(proto, feeds, target)
    first, second = ops(model, "MatMul")
    assert first.inputs[1] is not second.inputs[1] and maker(ops(model, "MatMul")[0].inputs[1]) == "DequantizeLinear"
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28


@pytest.mark.parametrize("target", ["onnxruntime", "generic"])
def test_a_bias_that_two_layers_share(target: str) -> None:
    """Correcting and quantizing one leaves the other's alone."""
    text = "g (float[N, 16] x) => (float[] y) { a = Gemm(x, w, b) t = Relu(a) c = Gemm(t, v, b) u = Neg(c) d = MatMul(u, w) y = Add(d, b) }"
    proto, feeds = build(text, w=floats(16, 16), v=floats(16, 16), b=floats(16)), {"x": floats(256, 16)}
    model, _ = quantize(proto, feeds, target, error_samples=256, float_budget=0)
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28


def test_concat_and_max_pool_use_one_scale() -> None:
    text = """g (float[N, 4, 8, 8] x) => (float[N, 4, 4, 4] y) {
        a = Conv(x, w) b = Conv(x, v) c = Concat <axis = 1> (a, b)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c) y = Conv(p, u) }"""
    model, _ = quantize(build(text, w=floats(4, 4, 1, 1), v=9 * floats(4, 4, 1, 1), u=floats(4, 8, 1, 1)), {"x": floats(8, 4, 8, 8)})
    (concat,), (pool,) = ops(model, "Concat"), ops(model, "MaxPool")
    after = [use.node for node in (concat, pool) for use in node.outputs[0].uses()]
    pairs = [ir.producer(value) for value in (*concat.inputs, *pool.inputs)] + after
    scales = {float(ir.constant(node.inputs[1])) for node in pairs}  # type: ignore[arg-type,union-attr]
    assert len(pairs) == 5 and len(scales) == 1
    assert {"QLinearConcat": 1, "QLinearConv": 3}.items() <= kernels_used.kernels(model).counts.items()


KERNELS: dict[str, tuple[str, dict[str, np.ndarray], dict[str, int]]] = {
    "QLinearConv": ("float[N, 4, 8, 8] x", {"w": floats(4, 4, 3, 3)}, {"QLinearConv": 2, "QLinearAdd": 1}),
    "Clip": ("float[N, 4, 8, 8] x", {"w": floats(4, 4, 3, 3), "low": np.float32(0), "high": np.float32(6)}, {"QLinearConv": 2}),
    "MatMul": ("float[N, 6, 8] x", {"w": floats(8, 8), "b": floats(8)}, {"MatMulIntegerToFloat": 2}),
    "Gemm": ("float[N, 8] x", {"w": floats(8, 8), "b": floats(8)}, {"QGemm": 2}),
    "pools": ("float[N, 4, 8, 8] x", {"w": floats(4, 4, 1, 1), "v": floats(4, 4)},
              {"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QLinearAveragePool": 1, "QGemm": 1}),
    "flat": ("float[N, 4, 2, 2] x", {"w": floats(4, 4, 1, 1), "v": floats(16, 8)}, {"QLinearConv": 1, "QGemm": 1}),
}  # fmt: skip
BODIES = {
    "QLinearConv": "a = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu(a) c = Conv <pads = [1, 1, 1, 1]> (r, w) s = Add(c, r) y = Relu(s)",
    "Clip": "a = Conv <pads = [1, 1, 1, 1]> (x, w) r = Clip(a, low, high) y = Conv <pads = [1, 1, 1, 1]> (r, w)",
    "MatMul": "a = MatMul(x, w) c = Add(a, b) t = Gelu(c) d = MatMul(t, w) y = Add(d, b)",
    "Gemm": "a = Gemm(x, w, b) t = Tanh(a) y = Gemm <transB = 1> (t, w, b)",
    "pools": """a = Conv(x, w) p = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (a) c = Conv(p, w)
        q = GlobalAveragePool(c) f = Flatten(q) y = Gemm(f, v)""",
    "flat": "a = Conv(x, w) f = Flatten(a) y = Gemm(f, v)",
}


@pytest.mark.parametrize("case", KERNELS)
def test_integer_kernels_really_run(case: str) -> None:
    """What ONNX Runtime makes of the graph: integer kernels, and no linear operator in floats."""
    declared, weights, expected = KERNELS[case]
    proto = build(f"g ({declared}) => (float[N, A] y) {{ {BODIES[case]} }}", **weights)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    feeds = {"x": floats(32, *[dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim][1:])}
    if case == "QLinearConv":
        proto.graph.node.append(onnx.helper.make_node("Conv", ["y", "w"], ["z"]))  # something integer reads the sum
        proto.graph.output[0].name = "z"
        expected = {"QLinearConv": 3, "QLinearAdd": 1}
    model, _ = quantize(proto, feeds, float_budget=0)
    found = kernels_used.kernels(model)
    assert expected.items() <= found.counts.items() and not found.floating, found


@pytest.mark.parametrize("target", TARGETS)
def test_the_outputs_keep_their_names(target: str) -> None:
    """A convolution whose result the caller gets, and one that also goes on inside."""
    text = "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y, float[N, 4, 8, 8] z) { y = Conv(x, w) z = Conv(y, w) }"
    proto, feeds = build(text, w=floats(4, 4, 1, 1)), {"x": floats(8, 4, 8, 8)}
    model, _ = quantize(proto, feeds, target)
    assert [value.name for value in model.graph.outputs] == ["y", "z"] and len(integer_layers(model)) == 2
    before, after = (Executor(one).run(feeds) for one in (onnx_ir.from_proto(proto), model))
    assert all(sqnr(a, b) > 25 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", ["MatMul", "Gemm"])
def test_a_layer_whose_output_is_the_callers_and_read_on(target: str, layer: str) -> None:
    """What is taken out of the bias behind it must not be missing in the output itself."""
    text = f"g (float[N, 16] x) => (float[N, 8] y, float[N, 8] z) {{ y = {layer}(x, w) z = Add(y, b) }}"
    proto, feeds = build(text, w=floats(16, 8), b=floats(8)), {"x": np.abs(floats(256, 16))}
    model, _ = quantize(proto, feeds, target, error_samples=256)
    before, after = (Executor(one).run(feeds) for one in (onnx_ir.from_proto(proto), model))
    assert all(sqnr(a, b) > 30 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dead", [0.0, 1e-30, 1e-20])
def test_dead_channels_with_a_bias(target: str, dead: float) -> None:
    """A channel without weights still has its bias, whatever the scale of an INT32 one would be."""
    weight, bias = floats(4, 4, 1, 1), np.float32([1, -20, 3, 1e-3])
    weight[1] *= np.float32(dead)
    text = "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, w, b) }"
    proto, feeds = build(text, w=weight, b=bias), {"x": floats(8, 4, 8, 8)}
    model, _ = quantize(proto, feeds, target)
    for deployed in (False, True):
        result = run(model, feeds, deployed=deployed)
        assert sqnr(run(proto, feeds), result) > 28
        np.testing.assert_allclose(result[:, 1], -20, rtol=0.01)


@pytest.mark.parametrize("target", TARGETS)
def test_dead_inputs_and_all_zero_weights(target: str) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { z = Mul(x, none) a = MatMul(z, w) b = MatMul(x, v) y = Add(a, b) }"
    proto, feeds = build(text, none=np.float32(0), w=floats(8, 8), v=np.zeros((8, 8), np.float32)), {"x": floats(32, 8)}
    model, _ = quantize(proto, feeds, target)
    np.testing.assert_array_equal(run(model, feeds), 0)


@pytest.mark.parametrize("batch", ["1", "3", "N"])
@pytest.mark.parametrize("size", ["8", "H"])
def test_fixed_and_open_dimensions(batch: str, size: str) -> None:
    text = (
        f"g (float[{batch}, 4, {size}, {size}] x) => (float[{batch}, 4, {size}, {size}] y) {{ a = Conv(x, w) r = Relu(a) y = Conv(r, w) }}"
    )
    proto, feeds = build(text, w=floats(4, 4, 1, 1)), {"x": floats(6, 4, 8, 8)}
    model, _ = quantize(proto, feeds)
    assert len(integer_layers(model)) == 2 and ir.inputs(model) == ir.inputs(onnx_ir.from_proto(proto))
    few = {"x": feeds["x"][: int(batch) if batch != "N" else 5]}
    assert sqnr(run(proto, few), run(model, few)) > 28
    if size == "H":
        other = {"x": np.tile(few["x"], (1, 1, 2, 1))}
        assert sqnr(run(proto, other), run(model, other)) > 25


def test_unknown_shapes() -> None:
    """Nothing is known about an inner value, not even its rank."""
    text = "g (float[N, 4] x, int64[N] rows) => (float[] y) { t = Reshape(x, rows) a = MatMul(t, w) b = Tanh(a) y = MatMul(b, w) }"
    proto, feeds = build(text, w=floats(4, 4)), {"x": floats(2, 4), "rows": np.array([-1, 4])}
    model, record = quantize(proto, feeds, float_budget=0)
    assert len(integer_layers(model)) == 2 and sqnr(run(proto, feeds), run(model, feeds)) > 25


def test_data_without_a_batch_axis() -> None:
    """The mean over output channels, which is all that a vector has, is no bias."""
    proto, feeds = build("g (float[256] x) => (float[256] y) { [fc] y = Add(a, b) }", b=floats(256)), {"x": np.abs(floats(256))}
    proto.graph.initializer.append(numpy_helper.from_array(np.abs(floats(256, 256)), "w"))
    proto.graph.node.insert(0, onnx.helper.make_node("MatMul", ["x", "w"], ["a"], "mm"))
    model, _ = quantize(proto, feeds, "generic", center=False)
    np.testing.assert_array_equal(ir.constant(next(node for node in model.graph if node.name == "fc").inputs[1]),
                                  numpy_helper.to_array(proto.graph.initializer[0]))  # fmt: skip


IF_MODEL = """g (float[N, 8] x, bool[N] pick) => (float[N, 8] y) {
    a = MatMul(x, w) i = Cast <to = 7> (pick) m = ReduceMax <keepdims = 0> (i) c = Cast <to = 9> (m)
    b = If(c) < then_branch = left () => (float[N, 8] p) { h = MatMul(a, w) p = Tanh(h) },
                else_branch = right () => (float[N, 8] q) { q = Neg(a) }>
    y = MatMul(b, w) }"""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pick", [True, False])
def test_if(target: str, pick: bool) -> None:
    """Layers around it become integer, those inside stay float; the shared weight serves both."""
    proto, feeds = build(IF_MODEL, w=floats(8, 8)), {"x": floats(32, 8), "pick": np.full(32, pick)}
    model, _ = quantize(proto, feeds, target, float_budget=0)
    assert [maker(node.inputs[1]) for node in ops(model, "MatMul")].count("DequantizeLinear") == 2
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28


ATTENTION = """g (int64[N, 6] ids, int64[N, 6] attention_mask) => (float[N, 6, 16] y) {
    length = Shape <start = 1> (ids) last = Squeeze(length) pos = Range(zero, last, one) p = Gather(table, pos) e = Gather(words, ids)
    h = Add(e, p) n = LayerNormalization(h, g)
    q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)
    t = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, t)
    f = Cast <to = 1> (attention_mask) inv = Sub(unit, f) big = Mul(inv, huge) m = Unsqueeze(big, axis) z = Add(s, m)
    r = Softmax(z) c = MatMul(r, v) o = MatMul(c, wo) y = Add(o, h) }"""


@pytest.mark.parametrize("target", TARGETS)
def test_masks_softmax_norms_and_tables_stay_untouched(target: str) -> None:
    """A mask of -3e38 through a quantizer would wipe out everything else."""
    weights = {name: floats(16, 16) / 4 for name in ("wq", "wk", "wv", "wo")}
    proto = build(ATTENTION, **weights, g=floats(16), table=floats(16, 16), words=floats(50, 16), huge=np.float32(-3e38),
                  unit=np.float32(1), axis=np.array([1]), zero=np.int64(0), one=np.int64(1))  # fmt: skip
    mask = np.ones((32, 6), np.int64)
    mask[:, 4:] = 0
    feeds = {"ids": RNG.integers(0, 50, (32, 6)), "attention_mask": mask}
    model, _ = quantize(proto, feeds, target, float_budget=0)
    assert len(integer_layers(model)) == 4 and len(ops(model, "QuantizeLinear")) == 2
    for op_type in ("Softmax", "LayerNormalization", "Gather", "Cast", "Sub", "Mul", "Range", "Unsqueeze"):
        assert all(maker(value) != "DequantizeLinear" for node in ops(model, op_type) for value in node.inputs if op_type != "Mul" or value)
    for deployed in (False, True):
        result = run(model, feeds, deployed=deployed)
        assert np.isfinite(result).all() and sqnr(run(proto, feeds), result) > 28


@pytest.mark.parametrize("tables", [True, False])
def test_large_tables_are_stored_in_8_bits(tables: bool) -> None:
    """Word embeddings, yes; positions, no. Rows are looked up as codes."""
    text = "g (int64[N, 6] ids) => (float[N, 6, 16] y) { e = Gather(words, ids) p = Gather(places, ids) h = Add(e, p) y = MatMul(h, w) }"
    proto, feeds = build(text, words=floats(2000, 16), places=floats(512, 16), w=floats(16, 16)), {"ids": RNG.integers(0, 512, (32, 6))}
    model, _ = quantize(proto, feeds, tables=tables)
    words, places = ops(model, "Gather")
    kinds = [ir.constant(node.inputs[0]).dtype.name for node in (words, places)]  # type: ignore[union-attr]
    assert kinds == ["int8" if tables else "float32", "float32"] and "words" not in model.graph.initializers or not tables
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28


def test_sizes() -> None:
    proto, feeds = mlp()
    model, _ = quantize(proto, feeds)
    before, after = qdq.quantized_weight_bytes(model)
    assert before == 4 * (32 * 16 + 32 * 24 + 24 * 8) and after < 0.35 * before  # tiny layers: their scales weigh 5 bytes a channel
    assert all(value.uses() for value in model.graph.initializers.values())
