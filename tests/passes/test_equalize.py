"""equalize: even channels, the same function; one case for every pair that is refused."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import numpy_helper, parser
from pydantic import ValidationError

from graphq import ir, linear
from graphq.calibration import random_calibration
from graphq.errors import RecipeError
from graphq.models import onnx_path
from graphq.passes._equalize_math import DEAD, Layout, balance, equalize_chain, in_range, out_range, scale, spread
from graphq.passes.equalize import Equalize
from graphq.passes.normalize import BATCH_NORM, Normalize
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.spec import ModelInput
from graphq.targets import get_target
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "equalize"
ASSETS = Path(__file__).parents[2].parent / "shared" / "assets" / "models"
RNG = np.random.default_rng(0)


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def uneven(*shape: int, axis: int = 0) -> np.ndarray:
    """Weights whose channels along `axis` differ by factors up to about a thousand."""
    dims = [1] * len(shape)
    dims[axis] = shape[axis]
    return floats(*shape) * np.exp(RNG.uniform(-3.5, 3.5, dims)).astype(np.float32)


def make_context(model: ir.Model) -> PassContext:
    data = random_calibration([ModelInput("x", np.dtype(np.float32), (None, 1))], 1)  # equalize reads none
    return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))


def equalize(proto: onnx.ModelProto, **options: Any) -> tuple[ir.Model, PassRecord]:
    ctx = make_context(onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString())))
    return ctx.model, run_passes([Equalize(**options)], ctx, verify_graph)[0]


def outputs(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, dict(feeds))


def close(proto: onnx.ModelProto, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> None:
    for before, after in zip(outputs(proto, feeds), outputs(ir.to_proto(model), feeds), strict=True):
        assert np.abs(after - before).max() <= 1e-5 * np.abs(before).max()


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph.all_nodes() if name in (node.name, str(node.outputs[0].name).removesuffix("_equalized")))


def blocks(node: ir.Node) -> np.ndarray:
    groups = int(ir.attribute(node, "group", 1))
    array = ir.constant(linear.weight_of(node))
    assert array is not None
    return Layout(linear.out_axis(node) == 0, groups).to_blocks(array)


def dump(model: ir.Model) -> str:
    weights = {name: np.asarray(ir.constant(value), np.float64) for name, value in model.graph.initializers.items()}
    rows = [f"{name} = {np.round(array, 4).tolist()}" for name, array in weights.items()]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("case", ["conv_depthwise", "matmul_add"])
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = equalize(parser.parse_model(before))
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- the function stays, the channels are even ----------------------------------------------------------------------

IMAGE = (2, 4, 8, 8)
PAIRS: dict[str, tuple[str, dict[str, np.ndarray], tuple[int, ...]]] = {
    "conv_conv": ("a = Conv(x, w, b) r = Relu(a) y = Conv(r, v)",
                  {"w": uneven(6, 4, 3, 3), "b": floats(6), "v": floats(5, 6, 1, 1)}, IMAGE),
    "no_activation": ("a = Conv(x, w) y = Conv(a, v, c)", {"w": uneven(6, 4, 3, 3), "v": floats(5, 6, 1, 1), "c": floats(5)}, IMAGE),
    "padded": ("a = Conv(x, w, b) r = Relu(a) y = Conv <pads = [1, 1, 1, 1]> (r, v)",
               {"w": uneven(6, 4, 1, 1), "b": floats(6), "v": floats(5, 6, 3, 3)}, IMAGE),
    "into_depthwise": ("a = Conv(x, w, b) r = Relu(a) y = Conv <group = 6> (r, v)",
                       {"w": uneven(6, 4, 1, 1), "b": floats(6), "v": floats(12, 1, 3, 3)}, IMAGE),
    "out_of_depthwise": ("a = Conv <group = 4> (x, w, b) r = Relu(a) y = Conv(r, v)",
                         {"w": uneven(8, 1, 3, 3), "b": floats(8), "v": floats(5, 8, 1, 1)}, IMAGE),
    "groups": ("a = Conv <group = 2> (x, w, b) r = Relu(a) y = Conv <group = 3> (r, v)",
               {"w": uneven(6, 2, 3, 3), "b": floats(6), "v": floats(9, 2, 1, 1)}, IMAGE),
    "transpose": ("a = ConvTranspose <group = 2> (x, w, b) r = Relu(a) y = ConvTranspose <group = 3> (r, v)",
                  {"w": uneven(4, 3, 2, 2, axis=1), "b": floats(6), "v": floats(6, 2, 2, 2)}, IMAGE),
    "conv_1d": ("a = Conv(x, w) r = LeakyRelu <alpha = 0.3> (a) y = Conv(r, v)", {"w": uneven(6, 4, 3), "v": floats(5, 6, 1)}, (2, 4, 8)),
    "prelu": ("a = Conv(x, w) r = PRelu(a, s) y = Conv(r, v)",
              {"w": uneven(6, 4, 1, 1), "s": floats(6, 1, 1), "v": floats(5, 6, 1, 1)}, IMAGE),
    "pool": ("a = Conv(x, w, b) r = Relu(a) p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r) y = Conv(p, v)",
             {"w": uneven(6, 4, 1, 1), "b": floats(6), "v": floats(5, 6, 1, 1)}, IMAGE),
    "gemm": ("a = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) r = Relu(a) y = Gemm <transB = 1> (r, v, c)",
             {"w": uneven(4, 6, axis=1), "b": floats(6), "v": floats(5, 6), "c": floats(5)}, (3, 4)),
    "gemm_scalar_bias": ("a = Gemm(x, w, b) r = Relu(a) y = MatMul(r, v)",
                         {"w": uneven(4, 6, axis=1), "b": floats(1), "v": floats(6, 5)}, (3, 4)),
    "matmul_add": ("a = MatMul(x, w) h = Add(b, a) r = Relu(h) y = MatMul(r, v)",
                   {"w": uneven(4, 6, axis=1), "b": floats(6), "v": floats(6, 5)}, (2, 3, 4)),
    "matmul_table": ("a = MatMul(x, w) h = Add(a, b) r = Relu(h) y = MatMul(r, v)",
                     {"w": uneven(4, 6, axis=1), "b": floats(3, 1), "v": floats(6, 5)}, (2, 3, 4)),
}  # fmt: skip


def pair_model(case: str) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    text, weights, shape = PAIRS[case]
    dims = ",".join(map(str, shape))
    return build(f"g (float[{dims}] x) => (float[{','.join('ABCD'[: len(shape)])}] y) {{ {text} }}", **weights), {"x": floats(*shape)}


@pytest.mark.parametrize("case", PAIRS)
def test_the_function_stays_and_both_sides_are_even(case: str) -> None:
    proto, feeds = pair_model(case)
    model, record = equalize(proto)
    close(proto, model, feeds)
    first, second = (blocks(named(model, name)) for name in ("a", "y"))
    np.testing.assert_allclose(out_range(first), in_range(second), rtol=1e-5)
    numbers = record.measurements[0].numbers
    assert numbers["channel_spread_after"] < numbers["channel_spread_before"]
    assert sorted(record.edits) in (["rename", "weight"], ["initializer", "rename", "rewire", "weight"])


def test_a_chain_converges() -> None:
    proto = build(
        """g (float[1,3,8,8] x) => (float[1,A,B,C] y) {
            a = Conv(x, u, b) r = Relu(a) d = Conv <group = 8> (r, v) s = Relu(d) y = Conv(s, w) }""",
        u=uneven(8, 3, 1, 1), b=floats(8), v=uneven(8, 1, 3, 3), w=floats(4, 8, 1, 1),
    )  # fmt: skip
    model, record = equalize(proto)
    close(proto, model, {"x": floats(1, 3, 8, 8)})
    first, middle, last = (blocks(named(model, name)) for name in ("a", "d", "y"))
    np.testing.assert_allclose(out_range(first), in_range(middle), rtol=5e-3)
    np.testing.assert_allclose(out_range(middle), in_range(last), rtol=5e-3)
    assert len(record.measurements) == 2


def test_subgraphs_are_equalized() -> None:
    branch = "a = Conv(x, w) r = Relu(a) {0} = Conv(r, v)"
    proto = build(
        f"""g (float[1,4,5,5] x, bool c) => (float[1,4,5,5] y) {{
            y = If (c) <then_branch = one () => (float[1,4,5,5] t) {{ {branch.format("t")} }},
                        else_branch = two () => (float[1,4,5,5] u) {{ u = Relu(x) }}> }}""",
        w=uneven(4, 4, 1, 1), v=floats(4, 4, 1, 1),
    )  # fmt: skip
    model, _ = equalize(proto)
    close(proto, model, {"x": floats(1, 4, 5, 5), "c": np.array(True)})


def test_the_remembered_batch_norm_is_scaled_with_the_layer() -> None:
    proto = build(
        """g (float[1,4,5,5] x) => (float[1,4,5,5] y) {
            a = Conv(x, w) n = BatchNormalization(a, g, b, m, s) r = Relu(n) y = Conv(r, v) }""",
        w=uneven(4, 4, 1, 1), v=floats(4, 4, 1, 1), g=floats(4), b=floats(4), m=floats(4), s=np.ones(4, np.float32),
    )  # fmt: skip
    ctx = make_context(onnx_ir.from_proto(proto))
    run_passes([Normalize()], ctx, verify_graph)
    node = named(ctx.model, "a")
    before, gamma = blocks(node), dict(node.meta[BATCH_NORM])
    run_passes([Equalize()], ctx, verify_graph)
    factor = out_range(before) / out_range(blocks(node))
    for key in ("gamma", "beta"):
        np.testing.assert_allclose(node.meta[BATCH_NORM][key], gamma[key] / factor, rtol=1e-5)
    np.testing.assert_array_equal(node.meta[BATCH_NORM]["mean"], gamma["mean"])


# ---- refusals -------------------------------------------------------------------------------------------------------

CONV = "float[1,4,5,5]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"({CONV} x) => ({CONV} y, {CONV} z) {{ a = Conv(x, w) z = Relu(a) y = Conv(a, v) }}", "its output is read by 2 nodes"),
        (f"({CONV} x) => ({CONV} y, {CONV} a) {{ a = Conv(x, w) y = Conv(a, v) }}", "an output of the graph"),
        (f"({CONV} x) => ({CONV} y, {CONV} r) {{ a = Conv(x, w) r = Relu(a) y = Conv(r, v) }}", "an output of the graph"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) r = Clip(a, low, high) y = Conv(r, v) }}", "Clip is not positively homogeneous"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) r = Gelu(a) y = Conv(r, v) }}", "Gelu is not positively homogeneous"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) r = Add(a, b) y = Conv(r, v) }}", "Add is not positively homogeneous"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) r = com.microsoft.Relu(a) y = Conv(r, v) }}", "not positively homogeneous"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) y = Conv(a, w) }}", "its weight is shared"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) y = Conv(a, v) z = Neg(v) }}", "Conv 'second' behind it: its weight is shared"),
        (f"({CONV} x, float[4] k) => ({CONV} y) {{ a = Conv(x, w, k) y = Conv(a, v) }}", "its bias is not a constant"),
        (f"({CONV} x, float[4,4,1,1] k) => ({CONV} y) {{ a = Conv(x, w) y = Conv(a, k) }}", "its weight is not a constant of the graph"),
        ("(float[4,4,1,1] x, float[1,4,5,5] k) => (float[1,4,5,5] y) { a = Conv(x, w) y = Conv(k, a) }", "is the weight or bias"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) y = MatMul(a, m) }}", "sums over another axis"),
        ("(float[4,4] x) => (float[4,4] y) { a = MatMul(x, m) y = Gemm <transA = 1> (a, n) }", "it transposes its input"),
        ("(float[4,4] x, float[4] k) => (float[4,4] y) { a = MatMul(x, m) h = Add(a, k) y = MatMul(h, n) }", "not a constant of its own"),
        ("(float[4,4] x) => (float[4,4] y) { a = MatMul(x, m) r = Relu(a) h = Add(r, k) y = MatMul(h, n) }",
         "Add is not positively homogeneous"),
        (f"({CONV} x) => ({CONV} y) {{ a = Conv(x, w) p, i = MaxPool <kernel_shape = [1, 1]> (a) y = Conv(p, v) z = Neg(i) }}",
         "second output"),
    ],
)  # fmt: skip
def test_refusals(text: str, reason: str) -> None:
    width = 5 if "MatMul(a, m)" in text else 4
    weights = {"w": floats(4, 4, 1, 1), "v": floats(4, 4, 1, 1), "m": floats(width, width),
               "n": floats(4, 4), "b": floats(4, 1, 1), "k": floats(4), "low": np.float32(0), "high": np.float32(6)}  # fmt: skip
    proto = build(f"g {text}")
    inputs = {entry.name for entry in proto.graph.input}
    read = {name for node in proto.graph.node for name in node.input} - inputs
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(weights[name]), name) for name in weights if name in read)
    proto.graph.node[0].name = "first"
    next(node for node in proto.graph.node if "y" in node.output).name = "second"
    model = onnx_ir.from_proto(proto)
    ctx = make_context(model)
    Equalize().apply(model, ctx)
    assert not ctx.edit.edits
    assert reason in "; ".join(why for where, why in ctx.skipped if "'first'" in where)


def test_a_value_read_in_a_subgraph_is_refused() -> None:
    proto = build(
        """g (float[1,4,5,5] x, bool c) => (float[1,4,5,5] y) {
            a = Conv(x, w)
            y = If (c) <then_branch = one () => (float[1,4,5,5] t) { t = Conv(a, v) },
                        else_branch = two () => (float[1,4,5,5] u) { u = Relu(x) }> }""",
        w=floats(4, 4, 1, 1), v=floats(4, 4, 1, 1),
    )  # fmt: skip
    _, record = equalize(proto, allow_no_effect=True)
    assert any("read in a subgraph" in why for _, why in record.skipped)


def test_no_pair_is_an_error_unless_allowed() -> None:
    proto = build("g (float[2,4] x) => (float[2,4] y) { a = MatMul(x, w) y = Gelu(a) }", w=floats(4, 4))
    with pytest.raises(RecipeError, match="changed nothing") as caught:
        equalize(proto)
    assert "Gelu is not positively homogeneous" in caught.value.hint
    assert equalize(proto, allow_no_effect=True)[1].edits == {}


@pytest.mark.parametrize("iterations", [0, -1, 1001, "many"])
def test_options_are_checked(iterations: Any) -> None:
    with pytest.raises(ValidationError):
        Equalize(iterations=iterations)


# ---- mathematics ----------------------------------------------------------------------------------------------------


def test_balance_is_the_formula_of_the_paper() -> None:
    first, second = np.array([4.0, 1.0, 9.0]), np.array([1.0, 4.0, 1.0])
    s = balance(first, second)
    np.testing.assert_allclose(s, np.sqrt(first * second) / second)
    np.testing.assert_allclose(first / s, second * s)


def test_dead_channels_are_left_alone() -> None:
    np.testing.assert_array_equal(balance(np.array([1.0, 0.0, 1.0, DEAD / 2]), np.array([1.0, 1.0, 0.0, 1.0])), np.ones(4))
    assert spread(np.array([2.0, 1.0, 0.0])) == 2 and spread(np.zeros(3)) == 1


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("out_first", [True, False])
def test_layout_round_trip(out_first: bool, groups: int) -> None:
    weight = RNG.standard_normal((4, 6, 3, 2))
    layout = Layout(out_first, groups)
    found = layout.to_blocks(weight)
    assert found.shape == ((groups, 4 // groups, 6, 6) if out_first else (groups, 6, 4 // groups, 6))
    np.testing.assert_array_equal(layout.from_blocks(found, weight.shape), weight)


def test_invariance_in_float64() -> None:
    weights = [RNG.standard_normal((1, 8, 3, 1)), RNG.standard_normal((1, 6, 8, 1)), RNG.standard_normal((1, 2, 6, 1))]
    weights[0] *= np.exp(RNG.uniform(-4, 4, (1, 8, 1, 1)))
    one, two = equalize_chain(weights, 100, 1e-12)
    scaled = [scale(weights[0], outputs=one), scale(weights[1], outputs=two, inputs=one), scale(weights[2], inputs=two)]

    def run(layers: list[np.ndarray], x: np.ndarray) -> np.ndarray:
        for layer in layers:
            x = np.maximum(layer[0, :, :, 0] @ x, 0)
        return x

    x = RNG.standard_normal((3, 50))
    np.testing.assert_allclose(run(scaled, x), run(weights, x), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(out_range(scaled[1]), in_range(scaled[2]), rtol=1e-9)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_it_beats_rounding_without_it(bits: int) -> None:
    """Its objective: the output error of layers whose weights and activations have one scale a tensor."""
    rng = np.random.default_rng(1)
    first, second = rng.standard_normal((1, 32, 16, 1)) * np.exp(rng.uniform(-2, 2, (1, 32, 1, 1))), rng.standard_normal((1, 8, 32, 1))
    x = rng.standard_normal((16, 500))

    def rounded(array: np.ndarray) -> np.ndarray:
        step = np.abs(array).max() / (2 ** (bits - 1) - 1)
        return np.round(array / step) * step

    def error(one: np.ndarray, two: np.ndarray) -> float:
        exact = two[0, :, :, 0] @ np.maximum(one[0, :, :, 0] @ x, 0)
        hidden = rounded(np.maximum(rounded(one)[0, :, :, 0] @ x, 0))
        return float(np.square(rounded(two)[0, :, :, 0] @ hidden - exact).mean())

    (s,) = equalize_chain([first, second], 20)
    assert error(scale(first, outputs=s), scale(second, inputs=s)) < 0.8 * error(first, second)


@pytest.mark.parametrize("path", [onnx_path("digits_cnn"), *sorted(ASSETS.glob("*.onnx"))], ids=lambda path: path.stem)
def test_real_models(path: Path) -> None:
    proto, model = onnx.load(path), ir.load(path)
    feeds = next(random_calibration(ir.inputs(model), 2).batches(2))
    if path.stem in ("imdn_x2", "espcn_x3"):  # any size will do
        feeds = {name: array[..., :32, :32] for name, array in feeds.items()}
    ctx = make_context(model)
    run_passes([Normalize(), Equalize(allow_no_effect=True)], ctx, verify_graph)
    close(proto, ctx.model, feeds)
