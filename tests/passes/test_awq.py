"""awq: the float function stays, rounding behind it hurts less, and every guard keeps its layer as it is."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir, precision
from graphq.calibration import open_calibration
from graphq.executor import Executor
from graphq.passes import _awq_math as math
from graphq.passes.awq import Awq
from graphq.passes.normalize import Normalize
from graphq.passes.round import Round
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.precision import Bits
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, PerGroup, QuantSpec
from graphq.targets import get_target
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "awq"
D, WIDTH, GROUP = 64, 48, 16
NORMED = """
g (float[n, 8, 64] x) => (float[n, 8, 48] y, float[n, 8, 48] z) {
  t = LayerNormalization<axis = -1>(x, gamma, beta)
  [q] y = MatMul(t, w1)
  [k] z = MatMul(t, w2) }"""
RELU = """
g (float[n, 8, 64] x) => (float[n, 8, 48] y) {
  [first] h = MatMul(x, square) hb = Add(h, b) r = Relu(hb) [second] y = MatMul(r, w1) }"""
GELU = RELU.replace("Relu", "Gelu")
GEMM = "g (float[n, 64] x) => (float[n, 48] y) { t = Gelu(x) [fc] y = Gemm<transB = 1>(t, wt, c) }"
DYNAMIC = "g (float[n, 8, 64] x) => (float[n, 8, 8] y) { u = Transpose<perm = [0, 2, 1]>(x) y = MatMul(x, u) }"
TURNED = "g (float[n, 64] x) => (float[n, 48] y) { t = Gelu(x) s = Transpose(t) [fc] y = Gemm<transA = 1>(s, w1, c) }"


def correlated(seed: int, *shape: int) -> np.ndarray:
    """Heavy-tailed rows of channels that differ widely in size and move together."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_t(4, (*shape, D)) @ (np.eye(D) + 0.3 * rng.standard_normal((D, D)) / np.sqrt(D))
    return (mixed * 10 ** rng.uniform(-1, 1, D)).astype(np.float32)


def context(text: str, seed: int = 0, target: str = "onnxruntime") -> PassContext:
    rng = np.random.default_rng(seed)
    gamma = (10 ** rng.uniform(-1, 1, D)).astype(np.float32)

    def floats(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(D)).astype(np.float32)

    weights = {"gamma": gamma, "beta": gamma * floats(D), "w1": floats(D, WIDTH), "w2": floats(D, WIDTH), "wt": floats(WIDTH, D)}
    weights |= {"square": floats(D, D) * gamma, "b": floats(D), "c": floats(WIDTH)}
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items() if name in used)
    model = onnx_ir.from_proto(proto)
    x = correlated(seed, 96, 8) if "n, 8" in text else correlated(seed, 512)
    data = open_calibration({"x": x}, ir.inputs(model))
    calib, held_out = data.split(len(x) // 4)
    return PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=held_out, target=get_target(target))


def run(ctx: PassContext, *passes: Pass) -> PassRecord:
    return run_passes([Normalize(), *passes], ctx, verify_graph)[1]


def outputs(model: ir.Model, data: Any) -> list[np.ndarray]:
    (batch,) = data.batches(len(data))
    return Executor(model).run(batch)


def error(ctx: PassContext, plain: ir.Model) -> float:
    """Noise over signal on rows that calibration has not seen."""
    pairs = list(zip(outputs(ctx.model, ctx.held_out), outputs(plain, ctx.held_out), strict=True))
    return sum(float(np.sum((a - b) ** 2)) for a, b in pairs) / sum(float(np.sum(b**2)) for _, b in pairs)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", [NORMED, RELU, GELU, GEMM])
def test_the_float_function_stays(text: str, seed: int) -> None:
    """Within 1e-5 of the largest output."""
    ctx = context(text, seed)
    before = outputs(ctx.model, ctx.held_out)
    record = run(ctx, Awq(group_size=GROUP, min_gain_mul_db=0, min_gain_db=0))
    assert record.measurements
    for a, b in zip(before, outputs(ctx.model, ctx.held_out), strict=True):
        np.testing.assert_allclose(b, a, rtol=0, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize(("symmetric", "bits", "group"), [(True, 4, GROUP), (False, 4, GROUP), (True, 4, None), (False, 3, 32)])
@pytest.mark.parametrize("seed", range(3))
def test_rounding_behind_it_hurts_less(seed: int, symmetric: bool, bits: int, group: int | None) -> None:
    """On held-out rows, by at least a twentieth of the squared error, for round to nearest with and without clipped scales."""
    how: dict[str, Any] = {"bits": bits, "group_size": group, "symmetric": symmetric}
    for scales in ("min-max", "mse"):
        nearest = Round(layers="all", algorithm="rtn", correct_bias=False, scales=scales, **how)  # type: ignore[arg-type]
        errors = []
        for passes in ([nearest], [Awq(scales=scales, **how), nearest]):  # type: ignore[arg-type]
            ctx = context(NORMED, seed)
            plain = ir.clone(ctx.model)
            run(ctx, *passes)
            errors.append(error(ctx, plain))
        assert errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize(("text", "operators"), [
    (NORMED, ["LayerNormalization", "MatMul", "MatMul"]),
    (RELU, ["MatMul", "Add", "Relu", "MatMul"]),
])  # fmt: skip
def test_the_factor_disappears_where_it_can(text: str, operators: list[str]) -> None:
    ctx = context(text)
    run(ctx, Awq(group_size=GROUP, min_gain_db=0, min_gain_mul_db=100))
    assert [node.op_type for node in ctx.model.graph] == operators


SMALL = {
    "folded": "g (float[n, 4] x) => (float[n, 3] y) { t = LayerNormalization(x, gamma, beta) [q] y = MatMul(t, w) }",
    "mul": "g (float[n, 4] x) => (float[n, 3] y) { t = Gelu(x) [fc] y = MatMul(t, w) }",
}


@pytest.mark.parametrize("case", SMALL)
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the files anew."""
    rng, gain = np.random.default_rng(0), np.float32([1, 2, 4, 16])
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{SMALL[case]}')
    weights = {"gamma": gain, "beta": gain / 2, "w": rng.standard_normal((4, 3)).astype(np.float32)}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items() if name in SMALL[case])
    model = onnx_ir.from_proto(proto)
    data = open_calibration({"x": (rng.standard_normal((512, 4)) * gain).astype(np.float32)}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    run(ctx, Awq(bits=3, min_gain_db=0, min_gain_mul_db=0))
    rows = [f"{name}: {np.asarray(ir.constant(value), np.float64).round(3).tolist()}" for name, value in model.graph.initializers.items()]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    path, text = GOLDEN / f"{case}.txt", "\n".join(rows) + "\n"
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text


def test_a_mul_has_to_gain_more() -> None:
    ctx = context(GELU)
    assert not run(ctx, Awq(group_size=GROUP, min_gain_mul_db=100, allow_no_effect=True)).measurements
    ctx = context(GELU)
    assert run(ctx, Awq(group_size=GROUP, min_gain_mul_db=0.1)).measurements
    assert sum(node.op_type == "Mul" for node in ctx.model.graph) in (1, 2)


def test_it_follows_what_a_layer_was_asked_for() -> None:
    ctx = context(NORMED)
    precision.ask(ctx.edit, ctx.model.graph[1], Bits(None, None))
    record = run(ctx, Awq(group_size=GROUP, min_gain_mul_db=0))
    assert any("float weight was asked" in reason for _, reason in record.skipped)
    assert not any(one.numbers["folded"] for one in record.measurements)  # another layer reads the normalization too


@pytest.mark.parametrize(("text", "options", "reason"), [
    (TURNED, {}, "rows are channels"),
    (GEMM, {"exclude": ("fc",)}, "excluded"),
    (DYNAMIC, {}, "not a constant"),
    (GELU, {"min_gain_mul_db": 50.0}, "Mul of its own"),
])  # fmt: skip
def test_refusals(text: str, options: dict[str, Any], reason: str) -> None:
    ctx = context(text)
    record = run(ctx, Awq(group_size=GROUP, allow_no_effect=True, **options))
    assert any(reason in skipped for _, skipped in record.skipped)


def test_on_targets_without_zero_points_the_search_is_symmetric() -> None:
    spec = Awq(group_size=GROUP)._spec(context(GEMM).model.graph[-1], D, get_target("tensorrt-rtx"))
    assert spec.symmetric and spec.granularity == PerGroup(1, GROUP)
    assert not Awq()._spec(context(GEMM).model.graph[-1], D, get_target("onnxruntime")).symmetric


# ---- arithmetic -----------------------------------------------------------------------------------------------------


def test_the_scale_is_that_of_the_paper() -> None:
    size = np.array([1.0, 4.0, 16.0])
    np.testing.assert_allclose(math.scale(size, 0.5), np.array([1, 2, 4]) / 2, rtol=1e-6)
    np.testing.assert_array_equal(math.scale(size, 0), np.ones(3))
    np.testing.assert_allclose(math.scale(np.array([0, 4.0, 16]), 0.5), [1, 2 / np.sqrt(8), 4 / np.sqrt(8)], rtol=1e-6)
    np.testing.assert_array_equal(math.scale(np.zeros(3), 0.5), np.ones(3))


def test_noise_is_that_of_the_output() -> None:
    """Against the product itself, rows of equal power, min-max scales (1e-4)."""
    rng = np.random.default_rng(0)
    x, weight = rng.choice([-1.0, 1.0], (32, D)).astype(np.float32), rng.standard_normal((8, D)).astype(np.float32)
    s, spec = rng.uniform(0.5, 2, D).astype(np.float32), QuantSpec(4, granularity=PerAxis(0))
    stored = Uniform(spec).fake_quantize(weight * s, Uniform(spec).fit_weight(weight * s))
    wanted = np.sum(((x / s) @ stored.T - x @ weight.T) ** 2, dtype=np.float64)
    assert math.Layer(x, [weight], [spec], is_clipped=False).noise(s) == pytest.approx(wanted, rel=1e-4)
