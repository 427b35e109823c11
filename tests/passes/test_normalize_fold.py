"""normalize: what is computed at once, constants and BatchNormalization, and what has to be left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.passes._normalize_math import affine, fold_bias, scale_outputs
from graphq.passes.normalize import BATCH_NORM, Normalize
from graphq.pipeline import PassContext, PassRecord

RNG = np.random.default_rng(0)
Normalized = Callable[..., tuple[ir.Model, PassRecord]]
MakeContext = Callable[..., PassContext]


def build(text: str, opset: int = 21, ir_version: int = 10, domains: str = "", **weights: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text `name (inputs) => (outputs) {...}` and weights by name."""
    proto = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{domains}]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bn_weights(channels: int, prefix: str = "") -> dict[str, np.ndarray]:
    names = ("gamma", "beta", "mean", "var")
    return {prefix + name: floats(channels) if name != "var" else np.exp(floats(channels)) for name in names}


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def reasons(record: PassRecord) -> str:
    return "; ".join(reason for _, reason in record.skipped)


# ---- constant folding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("t = Transpose <perm = [1, 0]> (w)", floats(4, 3)),
        ("t = Cast <to = 1> (w)", floats(3, 4).astype(np.float16)),
        ("t = Reshape(w, s)", floats(12)),
        ("u = Reshape(w, s) v = Neg(u) t = Add(v, v)", floats(12)),
    ],
)
def test_weights_behind_layout_operators_become_constants(text: str, weight: np.ndarray, same: Normalized) -> None:
    proto = build(f"g (float[N,3] x) => (float[N,4] y) {{ {text} y = MatMul(x, t) }}", w=weight, s=np.array([3, 4]))
    model, _ = same(proto, {"x": floats(2, 3)}, fold_limit=0)
    assert ops(model) == ["MatMul"] and list(model.graph.initializers) == ["t"]


def test_several_outputs_are_folded(same: Normalized) -> None:
    proto = build(
        """g (float[N,3] x) => (float[N,2] y) {
            a, b = Split <axis = 1, num_outputs = 2> (w) c = MatMul(x, a) d = MatMul(x, b) y = Add(c, d) }""",
        w=floats(3, 4),
    )
    assert ops(same(proto, {"x": floats(2, 3)})[0]) == ["MatMul", "MatMul", "Add"]


def test_shape_computations_keep_dynamic_dimensions(same: Normalized) -> None:
    proto = build(
        """g (float[N,3,4] x) => (float[N,M] y) {
            s = Shape(x) zero = Constant <value = int64 {0}> () axes = Constant <value = int64[1] {0}> ()
            n = Gather(s, zero) m = Unsqueeze(n, axes) rest = Constant <value = int64[1] {-1}> () t = Concat <axis = 0> (m, rest)
            y = Reshape(x, t) }"""
    )
    for count in (1, 5):
        model, _ = same(proto, {"x": floats(count, 3, 4)})
    assert ops(model) == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]


@pytest.mark.parametrize(
    ("text", "weights", "kept"),
    [
        ("w = DequantizeLinear(q, s)", {"q": np.ones((3, 4), np.int8), "s": np.float32(0.5)}, "DequantizeLinear"),
        ("q = QuantizeLinear(f, s) w = DequantizeLinear(q, s)", {"f": floats(3, 4), "s": np.float32(0.5)}, "QuantizeLinear"),
        ("w = ConstantOfShape(s)", {"s": np.array([3000, 4000])}, "ConstantOfShape"),
        ("h = Add(p, p) w = Cast <to = 1> (h)", {"p": floats(3, 4).astype(np.float16)}, "Add"),
    ],
)
def test_what_must_not_be_folded(text: str, weights: dict[str, np.ndarray], kept: str, same: Normalized) -> None:
    rows = 3000 if kept == "ConstantOfShape" else 3
    model, _ = same(build(f"g (float[N,{rows}] x) => (float[N,M] y) {{ {text} y = MatMul(x, w) }}", **weights), {"x": floats(1, rows)})
    assert kept in ops(model)


def test_random_nodes_are_not_folded(normalize: Normalized) -> None:
    model, _ = normalize(build("g (float[4] x) => (float[4] y) { r = RandomNormalLike(w) y = Add(x, r) }", w=floats(4)))
    assert ops(model) == ["RandomNormalLike", "Add"]


def test_control_flow_is_not_folded(same: Normalized) -> None:
    proto = build(
        """g (float[2] x) => (float[2] y) {
            y = If (c) <then_branch = one () => (float[2] t) { t = Neg(x) }, else_branch = two () => (float[2] u) { u = Abs(x) }> }""",
        c=np.array(True),
    )
    assert "If" in ops(same(proto, {"x": floats(2)})[0])


def test_external_weights_stay_in_their_file(tmp_path: Path, make_context: MakeContext) -> None:
    text = "g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    proto = build(text, opset=17, w=floats(64, 64), v=floats(64, 64))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = ir.load(tmp_path / "m.onnx")
    Normalize().apply(model, make_context(model))
    assert all(isinstance(value.const_value, onnx_ir.ExternalTensor) for value in model.graph.initializers.values())


# ---- BatchNormalization ---------------------------------------------------------------------------------------------

HOSTS = {
    "conv": ("Conv <group = 2> (x, w)", floats(6, 2, 3, 3), floats(2, 4, 8, 8)),
    "conv_bias": ("Conv(x, w, b)", floats(6, 4, 3, 3), floats(2, 4, 8, 8)),
    "depthwise_1d": ("Conv <group = 6> (x, w)", floats(6, 1, 3), floats(2, 6, 8)),
    "transpose": ("ConvTranspose <strides = [2, 2]> (x, w, b)", floats(4, 6, 2, 2), floats(2, 4, 5, 5)),
    "transpose_groups": ("ConvTranspose <group = 2> (x, w)", floats(4, 3, 2, 2), floats(2, 4, 5, 5)),
    "gemm": ("Gemm <transB = 1> (x, w, b)", floats(6, 4), floats(3, 4)),
    "gemm_scaled": ("Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", floats(4, 6), floats(3, 4)),
    "gemm_no_bias": ("Gemm(x, w)", floats(4, 6), floats(3, 4)),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("opset", [13, 21])
def test_batch_norm_is_folded(host: str, opset: int, same: Normalized) -> None:
    call, weight, x = HOSTS[host]
    dims = ",".join("N" if axis == 0 else str(size) for axis, size in enumerate(x.shape))
    rank = ",".join("N" for _ in x.shape)
    norm = bn_weights(6)
    norm_call = "BatchNormalization <epsilon = 0.01> (h, gamma, beta, mean, var)"
    text = f"g (float[{dims}] x) => (float[{rank}] y) {{ h = {call} n = {norm_call} y = Relu(n) }}"
    bias = {"b": floats(6)} if "b)" in call else {}
    model, record = same(build(text, opset, w=weight, **bias, **norm), {"x": x})
    assert "BatchNormalization" not in ops(model) and not record.skipped
    kept = next(iter(model.graph)).meta[BATCH_NORM]
    assert kept["epsilon"] == pytest.approx(0.01)
    for name, array in norm.items():
        np.testing.assert_array_equal(kept[name], array)
    assert next(iter(ir.clone(model).graph)).meta[BATCH_NORM] is kept


def test_fold_with_scalar_and_matrix_bias(same: Normalized) -> None:
    for bias in (np.float32(0.7), floats(1, 6), floats(3, 1), floats(3, 6)):
        text = "g (float[3,4] x) => (float[3,6] y) { h = Gemm(x, w, b) y = BatchNormalization(h, gamma, beta, mean, var) }"
        model, _ = same(build(text, w=floats(4, 6), b=np.asarray(bias), **bn_weights(6)), {"x": floats(3, 4)})
        assert ops(model) == ["Gemm"]


def test_a_shared_weight_is_not_changed_for_the_other_reader(same: Normalized) -> None:
    text = """g (float[1,4,5,5] x) => (float[1,6,5,5] y) {
        a = Conv(x, w, b) p = BatchNormalization(a, gamma, beta, mean, var) c = Conv(x, w, b) y = Add(p, c) }"""
    model, _ = same(build(text, w=floats(6, 4, 1, 1), b=floats(6), **bn_weights(6)), {"x": floats(1, 4, 5, 5)})
    assert ops(model) == ["Conv", "Conv", "Add"] and len(model.graph.initializers) == 4


NORM = "y = BatchNormalization(h, gamma, beta, mean, var)"
IMAGE = "float[1,4,5,5]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"({IMAGE} x) => ({IMAGE} y, {IMAGE} z) {{ h = Conv(x, w) {NORM} z = Relu(h) }}", "read in 2 places"),
        (f"({IMAGE} x) => ({IMAGE} y, {IMAGE} h) {{ h = Conv(x, w) {NORM} }}", "read in 2 places"),
        (f"({IMAGE} h) => ({IMAGE} y) {{ {NORM} }}", "follows an input"),
        (f"({IMAGE} x) => ({IMAGE} y) {{ h = Relu(x) {NORM} }}", "follows Relu"),
        (f"({IMAGE} x, float[4] gamma) => ({IMAGE} y) {{ h = Conv(x, w) {NORM} }}", "parameters"),
        (f"({IMAGE} x, float[4,4,1,1] v) => ({IMAGE} y) {{ h = Conv(x, v) {NORM} }}", "weight is not a constant"),
        (f"({IMAGE} x, float[4] b) => ({IMAGE} y) {{ h = Conv(x, w, b) {NORM} }}", "the bias of Conv"),
        (f"(float[2,4] x) => (float[2,4] y) {{ h = Gemm <beta = 0.0> (x, m, mean) {NORM} }}", "beta 0"),
        (f"({IMAGE} x) => ({IMAGE} y) {{ d = DequantizeLinear(q, s) h = Conv(x, d) {NORM} }}", "quantized already"),
    ],
)  # fmt: skip
def test_batch_norm_that_stays(text: str, reason: str, same: Normalized) -> None:
    weights = bn_weights(4) | {"w": floats(4, 4, 1, 1), "m": floats(4, 4), "q": np.ones((4, 4, 1, 1), np.int8), "s": np.float32(0.1)}
    proto = build(f"g {text}")
    read = {name for node in proto.graph.node for name in node.input} - {entry.name for entry in proto.graph.input}
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(weights[name]), name) for name in weights if name in read)
    feeds = {entry.name: floats(*(dim.dim_value for dim in entry.type.tensor_type.shape.dim)) for entry in proto.graph.input}
    model, record = same(proto, feeds)
    assert "BatchNormalization" in ops(model) and reason in reasons(record)


def test_batch_norm_in_a_branch_is_not_folded_into_the_outer_graph(same: Normalized) -> None:
    proto = build(
        """g (float[1,4,5,5] x, bool c) => (float[1,4,5,5] y) {
            h = Conv(x, w)
            y = If (c) <then_branch = one () => (float[1,4,5,5] t) { t = BatchNormalization(h, gamma, beta, mean, var) },
                        else_branch = two () => (float[1,4,5,5] u) { k = Conv(x, w) u = BatchNormalization(k, gamma, beta, mean, var) }>
        }""",
        w=floats(4, 4, 1, 1), **bn_weights(4),
    )  # fmt: skip
    for flag in (True, False):
        model, record = same(proto, {"x": floats(1, 4, 5, 5), "c": np.array(flag)})
    assert ops(model).count("BatchNormalization") == 1 and "another graph" in reasons(record)


def test_training_batch_norm_stays(normalize: Normalized) -> None:
    text = """g (float[2,4,5,5] x) => (float[2,4,5,5] y) {
        h = Conv(x, w) y, m, v = BatchNormalization <training_mode = 1> (h, gamma, beta, mean, var) }"""
    model, record = normalize(build(text, w=floats(4, 4, 1, 1), **bn_weights(4)))
    assert "BatchNormalization" in ops(model) and "training mode" in reasons(record)


@pytest.mark.parametrize("groups", [1, 2])
def test_folding_math_against_the_definition(groups: int) -> None:
    """y = W x + b on matrices; then the textbook formula of BatchNormalization."""
    weight, bias, x = RNG.standard_normal((4, 6 // groups)), RNG.standard_normal(6), RNG.standard_normal((4, 10))
    gamma, beta, mean, var = (np.abs(RNG.standard_normal(6)) + 0.1 for _ in range(4))
    factor, offset = affine(gamma, beta, mean, var, 1e-3)

    def run(matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
        parts = [part.T @ rows for part, rows in zip(np.split(matrix, groups), np.split(x, groups), strict=True)]
        return np.concatenate(parts) + shift[:, None]

    expected = (run(weight, bias) - mean[:, None]) / np.sqrt(var + 1e-3)[:, None] * gamma[:, None] + beta[:, None]
    np.testing.assert_allclose(run(scale_outputs(weight, factor, 1, groups), fold_bias(bias, factor, offset)), expected, rtol=1e-12)
