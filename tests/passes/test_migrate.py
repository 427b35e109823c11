"""migrate: the float function stays, outlier channels stop hurting, and what gains nothing is left alone."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.calibration import open_calibration
from graphq.errors import RecipeError
from graphq.executor import Executor
from graphq.noise import decibel
from graphq.passes import _migrate_math as math
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.migrate import Migrate
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, run_passes
from graphq.spec import QuantSpec
from graphq.targets import get_target
from graphq.verify import verify_graph

D, WIDTH = 32, 24
ACTIVATION = QuantSpec(8, signed=False, symmetric=False)

NORMED = """
agraph (float[batch, 8, 32] x) => (float[batch, 8, 24] y, float[batch, 8, 24] z) {
  n = LayerNormalization<axis = -1>(x, gamma, beta)
  y = MatMul(n, w1)
  z = MatMul(n, w2)
}"""

RESIDUAL = """
agraph (float[batch, 8, 32] x) => (float[batch, 8, 24] y, float[batch, 8, 32] r) {
  n = LayerNormalization<axis = -1>(x, gamma, beta)
  y = MatMul(n, w1)
  r = Add(n, x)
}"""

GEMM = """
agraph (float[batch, 32] x) => (float[batch, 24] y) {
  n = Gelu(x)
  y = Gemm<transB = 1>(n, w1, b)
}"""


def outlier_weights(seed: int, spread: float = 2.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    gamma = (10 ** rng.uniform(-spread / 2, spread / 2, D)).astype(np.float32)
    return {
        "gamma": gamma,
        "beta": (gamma * rng.standard_normal(D)).astype(np.float32),
        "w1": (rng.standard_normal((D, WIDTH)) / np.sqrt(D)).astype(np.float32),
        "w2": (rng.standard_normal((D, WIDTH)) / np.sqrt(D)).astype(np.float32),
    }


def context(text: str, weights: dict[str, np.ndarray], x: np.ndarray, target: str = "onnxruntime") -> PassContext:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items() if name in used)
    model = ir.onnx_ir.from_proto(proto)
    data = open_calibration({"x": x}, ir.inputs(model))
    calib, held_out = data.split(8)
    return PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=held_out, target=get_target(target))


def inputs(seed: int = 0, shape: tuple[int, ...] = (40, 8, D)) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def outputs(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return Executor(model).run({"x": x})


def types(ctx: PassContext) -> list[str]:
    return [node.op_type for node in ctx.model.graph]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("text", [NORMED, RESIDUAL])
def test_the_float_function_stays(text: str, seed: int) -> None:
    x = inputs(seed)
    ctx = context(text, outlier_weights(seed), x)
    before = outputs(ctx.model, x)
    run_passes([Migrate(min_gain_mul_db=0.5)], ctx, verify_graph)
    for a, b in zip(before, outputs(ctx.model, x), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5 * np.abs(a).max())


def test_a_factor_folds_into_a_normalization_that_nobody_else_reads() -> None:
    ctx = context(NORMED, outlier_weights(0), inputs())
    gamma = ir.constant(ctx.model.graph.initializers["gamma"])
    run_passes([Migrate()], ctx, verify_graph)
    assert types(ctx) == ["LayerNormalization", "MatMul", "MatMul"]
    assert not np.array_equal(ir.constant(ctx.model.graph.initializers["gamma"]), gamma)


def test_a_factor_costs_a_mul_where_others_read_the_value() -> None:
    ctx = context(RESIDUAL, outlier_weights(0), inputs())
    run_passes([Migrate()], ctx, verify_graph)
    assert sorted(types(ctx)) == ["Add", "LayerNormalization", "MatMul", "Mul"]
    add = next(node for node in ctx.model.graph if node.op_type == "Add")
    assert add.inputs[0].name == "n", "the residual must read the value as it was"


def test_a_gemm_with_a_transposed_weight() -> None:
    rng = np.random.default_rng(1)
    scale = 10 ** rng.uniform(-1, 1, D)
    x = (inputs(2, (64, D)) * scale).astype(np.float32)
    weights = {"w1": rng.standard_normal((WIDTH, D)).astype(np.float32), "b": rng.standard_normal(WIDTH).astype(np.float32)}
    ctx = context(GEMM, weights, x)
    before = outputs(ctx.model, x)[0]
    run_passes([Migrate()], ctx, verify_graph)
    assert "Mul" in types(ctx)
    np.testing.assert_allclose(outputs(ctx.model, x)[0], before, rtol=1e-4, atol=1e-4 * np.abs(before).max())


NORMED_GEMM = """
agraph (float[batch, 32] x) => (float[batch, 24] y) {
  n = LayerNormalization<axis = -1>(x, gamma, beta)
  y = Gemm<transB = 1>(n, w1, b)
}"""


@pytest.mark.parametrize("attribute", ["alpha = 0.5", "beta = 3.0"])
def test_a_scaled_gemm_takes_no_shift(attribute: str) -> None:
    rng, x = np.random.default_rng(1), inputs(4, (64, D)) + 3 * np.arange(1, D + 1, dtype=np.float32)
    weights = {"w1": rng.standard_normal((WIDTH, D)).astype(np.float32), "b": rng.standard_normal(WIDTH).astype(np.float32)}
    ctx = context(GEMM.replace("<transB = 1>", f"<transB = 1, {attribute}>"), weights, x)
    before = outputs(ctx.model, x)[0]
    run_passes([Migrate(shift=True, min_gain_mul_db=0.1, allow_no_effect=True)], ctx, verify_graph)
    assert "Sub" not in types(ctx)
    np.testing.assert_allclose(outputs(ctx.model, x)[0], before, rtol=1e-4, atol=1e-4 * np.abs(before).max())


@pytest.mark.parametrize("rule", ["smoothquant", "gps"])
@pytest.mark.parametrize(("text", "expected"), [(NORMED_GEMM, ["LayerNormalization", "Gemm"]), (GEMM, ["Gelu", "Sub", "Mul", "Gemm"])])
def test_a_shift_goes_into_the_normalization_or_costs_a_sub(text: str, expected: list[str], rule: Literal["smoothquant", "gps"]) -> None:
    rng = np.random.default_rng(1)
    weights = outlier_weights(3) | {"w1": rng.standard_normal((WIDTH, D)).astype(np.float32), "b": np.zeros(WIDTH, np.float32)}
    weights["beta"] += 20 * weights["gamma"]
    ctx = context(text, weights, (inputs(2, (64, D)) + 3 * np.arange(1, D + 1)).astype(np.float32))
    x = inputs(4, (64, D)) + 3 * np.arange(1, D + 1, dtype=np.float32)
    before = outputs(ctx.model, x)[0]
    record = run_passes([Migrate(rule=rule, shift=True, min_gain_mul_db=0.5)], ctx, verify_graph)[0]
    assert types(ctx) == expected and record.measurements[0].numbers["shifted"] == 1
    np.testing.assert_allclose(outputs(ctx.model, x)[0], before, rtol=1e-4, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize("seed", range(3))
def test_quantization_error_falls(seed: int, target: str) -> None:
    """Against plain insert-qdq on the same model, on the samples that gave the ranges (others clip, whatever the scale)."""
    seen, error = inputs(seed)[:32], {}
    for name, first in (("plain", []), ("migrated", [Migrate()])):
        ctx = context(NORMED, outlier_weights(seed, spread=3.0), inputs(seed), target)
        reference = outputs(ctx.model, seen)
        run_passes([Normalize(), *first, InsertQdq(float_budget=0.0)], ctx, verify_graph)
        error[name] = sum(float(np.mean((a - b) ** 2)) for a, b in zip(outputs(ctx.model, seen), reference, strict=True))
    assert error["migrated"] < error["plain"] / 2


def test_even_channels_are_left_alone() -> None:
    weights = outlier_weights(0, spread=0.0)
    with pytest.raises(RecipeError, match="changed nothing"):
        run_passes([Migrate(min_gain_db=1.0)], context(NORMED, weights, inputs()), verify_graph)


def test_excluded_layers_are_left_alone() -> None:
    with pytest.raises(RecipeError, match="changed nothing"):
        run_passes([Migrate(exclude=("*",))], context(NORMED, outlier_weights(0), inputs()), verify_graph)


def test_ranges_follow_without_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What insert-qdq wants to know was found out already: no further pass over the calibration set."""
    from graphq import pipeline

    runs: list[int] = []
    fold = pipeline.fold

    def counted(*args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return fold(*args, **kwargs)

    monkeypatch.setattr(pipeline, "fold", counted)
    ctx = context(NORMED, outlier_weights(0), inputs())
    run_passes([Normalize(), Migrate(), InsertQdq()], ctx, verify_graph)
    assert len(runs) == 1


def test_assumed_ranges_are_the_measured_ones() -> None:
    from graphq.observers import Range

    ctx = context(RESIDUAL, outlier_weights(3), inputs(3))
    run_passes([Migrate()], ctx, verify_graph)
    scaled = next(node for node in ctx.model.graph if node.op_type == "Mul").outputs[0].name
    observer = Range(scaled)
    assumed = ctx.observe([observer])[observer]
    ctx._stats.clear()
    measured = ctx.observe([observer])[observer]
    assert float(assumed["low"]) == pytest.approx(float(measured["low"]), rel=1e-5)
    assert float(assumed["high"]) == pytest.approx(float(measured["high"]), rel=1e-5)


def heavy_layer(seed: int, activation_bits: int = 8, weight_bits: int = 8, rows: int = 512) -> math.Layer:
    """Correlated, heavy-tailed, off-centre channels of very different sizes."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((D, D)) / 3 + np.eye(D)
    x = (rng.standard_t(5, (rows, D)) @ mix + rng.standard_normal(D)) * np.exp(1.2 * rng.standard_normal(D))
    weight = (rng.standard_normal((D, 64)) * np.exp(0.3 * rng.standard_normal((D, 1)))).astype(np.float32)
    x = x.astype(np.float32)
    activation = QuantSpec(activation_bits, signed=False, symmetric=False)
    return math.Layer(x, weight, x.min(0).astype(np.float64), x.max(0).astype(np.float64), activation, weight_bits)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_factors_are_the_formula(alpha: float) -> None:
    layer = heavy_layer(0)
    k = layer.smoothquant(alpha)
    expected = np.maximum(-layer.low, layer.high) ** alpha / np.abs(layer.weight).max(1) ** (1 - alpha)
    np.testing.assert_allclose(k / k[0], expected / expected[0], rtol=1e-4)
    assert np.exp(np.log(k).mean()) == pytest.approx(1.0, rel=1e-4)


def test_gps_balances_measured_errors() -> None:
    layer = heavy_layer(0, 4, 4)
    one = np.ones(D, np.float32)
    assert layer.gps().shape == (D,) and layer.noise(layer.gps()) < layer.noise(one) / 2


@pytest.mark.parametrize("rule", ["smoothquant", "gps"])
@pytest.mark.parametrize("seed", range(3))
def test_moving_scale_lowers_the_noise(seed: int, rule: str) -> None:
    layer = heavy_layer(seed)
    k, noise = math.best(layer, rule, math.ALPHAS)
    assert noise == layer.noise(k)
    assert decibel(layer.noise(np.ones(D, np.float32)), noise) > 3


@pytest.mark.parametrize("seed", range(3))
def test_the_best_exponent_depends_on_the_widths(seed: int) -> None:
    """T5 of METHODS.md 8."""
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)

    def noises(activation_bits: int, weight_bits: int) -> list[float]:
        layer = heavy_layer(seed, activation_bits, weight_bits)
        return [layer.noise(layer.smoothquant(alpha)) for alpha in alphas]

    for widths in ((8, 4), (8, 8)):
        assert 0 < int(np.argmin(noises(*widths))) < len(alphas) - 1, widths
    low, narrow_activation = noises(4, 4), noises(4, 8)
    assert low[-1] < 1.5 * min(low), "full migration is near the best where both sides have 4 bits"
    assert int(np.argmin(narrow_activation)) == len(alphas) - 1, "and the best where only activations have"


@pytest.mark.parametrize("seed", range(3))
def test_a_shift_helps_where_channels_lie_off_centre(seed: int) -> None:
    layer = heavy_layer(seed, 4)
    layer = layer.shifted(-4 * np.abs(layer.x).max(0))
    middle = (layer.low + layer.high) / 2
    assert math.best(layer.shifted(middle), "smoothquant", math.ALPHAS)[1] < math.best(layer, "smoothquant", math.ALPHAS)[1] / 2
