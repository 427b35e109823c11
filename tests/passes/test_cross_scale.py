"""cross-scale: the float function stays, outlier channels stop hurting, and what gains nothing gets one step a token."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from graphq import ir, linear, precision
from graphq.backends import tensorrt
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import GraphqError, RecipeError
from graphq.executor import Executor, Fetch
from graphq.passes import _cross_scale_math as math
from graphq.passes import _dynamic_math
from graphq.passes.cross_scale import CrossScale
from graphq.passes.dynamic_activations import DynamicActivations
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.precision import Bits
from graphq.targets import TARGETS, get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "cross_scale"
D, WIDTH = 32, 24

NORMED = "(float[N, 8, 32] x) => (float[] y, float[] z) { n = LayerNormalization(x, gamma, beta) y = MatMul(n, w) z = MatMul(n, v) }"
RESIDUAL = "(float[N, 8, 32] x) => (float[] y, float[] r) { n = LayerNormalization(x, gamma, beta) y = MatMul(n, w) r = Add(n, x) }"
GEMM = "(float[N, 32] x) => (float[] y) { n = Mul(x, gamma) y = Gemm <transB = 1> (n, t, b) }"


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def constants(seed: int = 0, spread: float = 3.0) -> dict[str, np.ndarray]:
    """Weights, and a gain whose channels reach over `spread` powers of ten."""
    gamma = (10 ** np.random.default_rng(seed).uniform(-spread / 2, spread / 2, D)).astype(np.float32)
    return {
        "gamma": gamma, "beta": gamma * floats(D, seed=seed + 1), "b": floats(WIDTH, seed=seed + 5),
        "w": floats(D, WIDTH, seed=seed + 2), "v": floats(D, WIDTH, seed=seed + 3), "t": floats(WIDTH, D, seed=seed + 4),
    }  # fmt: skip


def outlier(seed: int = 0) -> dict[str, np.ndarray]:
    """Weights, and a gain that makes one channel a hundred times larger than the others."""
    weights = constants(seed, spread=0.0)
    weights["gamma"][3] = 100
    weights["t"][:, 3] /= 100
    weights["w"][3] /= 100
    return weights


def build(text: str, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\ng {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def data(proto: onnx.ModelProto, seed: int = 0, samples: int = 200) -> np.ndarray:
    dims = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim][1:]
    return floats(samples, *dims, seed=seed + 9)


def quantize(
    proto: onnx.ModelProto, *others: Pass, x: np.ndarray | None = None, target: str = "onnxruntime", ask: Bits | None = None, **options: Any
) -> tuple[ir.Model, PassRecord]:
    """The model after `others` and cross-scale; `ask` requests bits for all layers before."""
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    for node in model.graph:
        if ask is not None and node.op_type in linear.LINEAR_OPS:
            precision.ask(Editor(model), node, ask)
    calib, held_out = open_calibration({"x": data(proto) if x is None else x}, ir.inputs(model)).split(8)
    ctx = PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=held_out, target=get_target(target))
    record = run_passes([Normalize(), *others, CrossScale(**options)], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return model, record


def per_token(proto: onnx.ModelProto, bits: int) -> ir.Model:
    """The plain alternative: dynamic-activations."""
    model = onnx_ir.from_proto(proto)
    samples = open_calibration({"x": data(proto)}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=samples, held_out=samples, target=get_target("generic"))
    run_passes([Normalize(), DynamicActivations(bits=bits)], ctx, verify_graph)
    return model


def calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == ir.DOMAIN]


def without_quantizers(model: ir.Model) -> ir.Model:
    edit = Editor(model)
    for call in calls(model):
        edit.replace(call.outputs[0], call.inputs[0])  # type: ignore[arg-type]
    return model


def outputs(model: ir.Model | onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    model = onnx_ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    return Executor(model, threads=1).run({"x": x})


def dump(model: ir.Model) -> str:
    rows = [f"{name}: {np.asarray(ir.constant(value)).round(4).tolist()}" for name, value in model.graph.initializers.items()]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    return "\n".join([*rows, *map(onnx.printer.to_text, ir.to_proto(model).functions), ""])


# ---- golden text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "rows"), [("normalization", "scaled"), ("gemm_as_in_the_paper", "unscaled")])
def test_golden(case: str, rows: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = quantize(parser.parse_model(before), rows=rows, alphas=(0.5,), min_gain_db=0.1)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5, 1.0])
@pytest.mark.parametrize("bits", [4, 8])
def test_fold_identity(bits: int, alpha: float, seed: int) -> None:
    """Steps for each token and channel are steps for each token of X / k, exactly (1e-12, float64); nothing is clipped."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, D)) * 10 ** rng.uniform(-1, 1, D) * 10 ** rng.uniform(-1, 1, (64, 1))
    t, c, top = np.abs(x).max(1, keepdims=True), np.abs(x).max(0), float(_dynamic_math.levels(bits))
    step = t**alpha * c ** (1 - alpha) / top
    assert (np.abs(x / step) < top * (1 + 1e-12)).all()
    k = math.factors(c, alpha)
    folded = math.fake_quantize(x / k, k, alpha, bits) * k
    np.testing.assert_allclose(folded, np.rint(x / step) * step, rtol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("alpha", [0.0, 0.15, 0.5])
def test_rows_after_the_division_are_no_longer_than_the_paper_says(alpha: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((64, D)) * 10 ** rng.uniform(-1.5, 1.5, D)
    k = math.factors(np.abs(x).max(0), alpha)
    assert (np.abs(x / k).max(1) <= np.abs(x).max(1) ** alpha * (1 + 1e-12)).all()


def test_a_column_that_did_not_move_is_divided_by_a_small_number_and_not_by_zero() -> None:
    k = math.factors(np.array([0.0, 1.0, 2.0, 1.0]), 0.5)
    np.testing.assert_allclose(k, np.sqrt([1e-3, 1, 2, 1]))
    np.testing.assert_array_equal(math.factors(np.zeros(4), 0.5), np.ones(4))


@pytest.mark.parametrize("rows", ["scaled", "unscaled"])
def test_search_reports_the_gain_it_measured(rows: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((128, D)) * 10 ** rng.uniform(-1, 1, D)).astype(np.float32)
    weights, c = [(floats(D, WIDTH), 8), (floats(D, WIDTH, seed=1), None)], np.abs(x).max(0)
    alpha, gain = math.search(x, weights, c, (0.15, 0.5, 0.99), 8, scaled=rows == "scaled")
    plain = math.noise(x, _dynamic_math.fake_quantize(x, 8), weights, np.ones(D))
    k, found = math.factors(c, alpha), {}
    found["scaled"] = math.noise(x, _dynamic_math.fake_quantize(x / k, 8), weights, k)
    found["unscaled"] = math.noise(x, math.fake_quantize(x / k, k, alpha, 8), weights, k)
    assert alpha < 0.99 and gain == pytest.approx(10 * np.log10(plain / found[rows])) and gain > 1


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rows", ["scaled", "unscaled"])
@pytest.mark.parametrize("text", [NORMED, RESIDUAL, GEMM])
def test_the_float_function_stays(text: str, rows: str, seed: int) -> None:
    """Without its quantizers the result computes what the model did (1e-5)."""
    proto = build(text, outlier(seed))
    model, record = quantize(proto, rows=rows)
    assert record.measurements[0].numbers["alpha"] < 1
    x = data(proto, seed)
    for before, after in zip(outputs(proto, x), outputs(without_quantizers(model), x), strict=True):
        np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize(("rows", "bits"), [("scaled", 2), *((rows, bits) for rows in ("scaled", "unscaled") for bits in range(3, 9))])
def test_table(rows: str, bits: int) -> None:
    """The quantizer's nodes give the formula's numbers in either runtime (1e-5), for rows of zeros and of unseen size too."""
    model, _ = quantize(build(GEMM, outlier()), rows=rows, bits=bits)
    x = floats(6, D, seed=5)
    x[0], x[1] = 0, x[1] * 100
    (call,) = calls(model)
    entry = call.inputs[0].name or ""  # type: ignore[union-attr]
    names = [entry, call.outputs[0].name or ""]
    source, result = Executor(model, [Fetch(name) for name in names], threads=1).run({"x": x})
    if rows == "scaled":
        expected = _dynamic_math.fake_quantize(source, bits)
    else:
        k, alpha = (np.asarray(ir.constant(value)) for value in call.inputs[1:3])
        expected = math.fake_quantize(source, k, alpha, bits)
    # Powers differ by a rounding between libraries, which moves an element that lies between two codes.
    close = np.isclose(result, expected, rtol=1e-5, atol=0)
    assert close.mean() > 0.99 and not result[0].any()
    proto = ir.to_proto(model)
    np.testing.assert_allclose(outputs(model, x)[0], ReferenceEvaluator(proto).run(None, {"x": x})[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("rows", "bits", "least_db"), [("scaled", 4, 3), ("scaled", 8, 5), ("unscaled", 8, 1.5)])
def test_beats_one_step_a_token(rows: str, bits: int, least_db: float, seed: int) -> None:
    """On samples that neither calibration nor the search has seen, for channels of different sizes."""
    proto = build(NORMED, constants(seed))
    seen, unseen = data(proto, seed, 600), data(proto, seed + 100)
    crossed, _ = quantize(proto, x=seen, rows=rows, bits=bits)
    plain = per_token(proto, bits)
    noises = [sum(float(np.mean((a - b) ** 2)) for a, b in zip(outputs(one, unseen), outputs(proto, unseen), strict=True))
              for one in (plain, crossed)]  # fmt: skip
    assert 10 * np.log10(noises[0] / noises[1]) > least_db


def test_what_calibration_has_not_seen_is_held_by_scaled_rows_and_clipped_by_the_papers() -> None:
    x = np.ones((1, 4))
    k = math.factors(np.array([1.0, 1.0, 1.0, 0.1]), 0.0)  # the last was ten times smaller
    held = _dynamic_math.fake_quantize(x / k, 8) * k
    clipped = math.fake_quantize(x / k, k, 0.0, 8) * k
    assert np.abs(held - x).max() < 0.05 and np.abs(clipped - x).max() == pytest.approx(0.9, abs=0.01)


# ---- where ----------------------------------------------------------------------------------------------------------


def test_factors_fold_into_a_normalization_that_nobody_else_reads() -> None:
    model, record = quantize(build(NORMED, constants()))
    assert [node.op_type for node in model.graph] == ["LayerNormalization", "DynamicQuantize", "MatMul", "MatMul"]
    (measured,) = record.measurements
    assert measured.where == "n" and measured.numbers["gain_db"] > 3


def test_factors_cost_a_mul_where_others_read_the_value() -> None:
    model, _ = quantize(build(RESIDUAL, constants()))
    assert sorted(node.op_type for node in model.graph) == ["Add", "DynamicQuantize", "LayerNormalization", "MatMul", "Mul"]
    add = next(node for node in model.graph if node.op_type == "Add")
    assert add.inputs[0].name == "n", "the residual must read the value as it was"  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", ["scaled", "unscaled"])
def test_even_channels_get_one_step_a_token(rows: str) -> None:
    """The weights stay, and the result is that of dynamic-activations."""
    weights = constants(spread=0.0)
    proto = build(NORMED, {**weights, "beta": np.zeros(D, np.float32)})
    model, record = quantize(proto, rows=rows, bits=6, min_gain_db=1.0)
    assert record.measurements[0].numbers["alpha"] == 1 and "weight" not in record.edits
    plain = per_token(proto, 6)
    np.testing.assert_array_equal(outputs(model, data(proto))[0], outputs(plain, data(proto))[0])


def test_weights_that_are_quantized_already_are_refused() -> None:
    proto = build(NORMED, constants())
    with pytest.raises(RecipeError, match="put this pass before those that quantize weights"):
        quantize(proto, QuantizeWeights())
    model, record = quantize(proto, QuantizeWeights(), allow_no_effect=True)
    assert len(record.skipped) == 2 and not record.edits and not calls(model)


def test_weights_are_quantized_after_it() -> None:
    proto = build(NORMED, constants())
    model, _ = quantize(proto)
    samples = open_calibration({"x": data(proto)}, ir.inputs(model))
    run_passes([QuantizeWeights()], PassContext(model, ir.clone(model), samples, samples, get_target("onnxruntime")), verify_graph)
    before, after = outputs(proto, data(proto))[0], outputs(model, data(proto))[0]
    assert 10 * np.log10(np.sum(before**2) / np.sum((after - before) ** 2)) > 30


def test_bits_that_layers_ask_for_count() -> None:
    """Activation bits are written, weight bits enter the error: 2 bits do not take factors well."""
    proto = build(NORMED, constants(spread=4.0))
    model, _ = quantize(proto, ask=Bits(8, 4))
    assert np.asarray(ir.constant(calls(model)[0].inputs[1])).item() == 7
    gains = [quantize(proto, ask=Bits(bits, 8))[1].measurements[0].numbers["gain_db"] for bits in (2, 8)]
    assert gains[0] < gains[1] - 1
    assert [quantize(proto, weight_bits=bits)[1].measurements[0].numbers["gain_db"] for bits in (2, 8)] == gains
    with pytest.raises(RecipeError, match="it asks for float activations"):
        quantize(proto, ask=Bits(8, None))


def test_excluded_layers_are_left_alone() -> None:
    proto = build(RESIDUAL, constants())
    with pytest.raises(RecipeError, match="excluded by the recipe"):
        quantize(proto, exclude=("MatMul",))
    with pytest.raises(GraphqError, match="matches no node"):
        quantize(proto, exclude=("nobody",))


@pytest.mark.parametrize(
    "options",
    [
        {"bits": 1},
        {"bits": 9},
        {"weight_bits": 1},
        {"alphas": ()},
        {"alphas": (1.0,)},
        {"alphas": (-0.1,)},
        {"rows": "all"},
        {"min_gain_db": -1},
    ],
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        CrossScale(**options)


def test_two_runs_give_the_same_bytes() -> None:
    proto = build(RESIDUAL, constants())
    first, second = (ir.to_proto(quantize(proto)[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("rows", ["scaled", "unscaled"])
@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_it(target: str, rows: str) -> None:
    proto = build(NORMED, constants())
    model, _ = quantize(proto, target=target, rows=rows)
    assert np.isfinite(outputs(model, data(proto))[0]).all()


@pytest.mark.parametrize("rows", ["scaled", "unscaled"])
def test_engine(rows: str, tmp_path: Path) -> None:
    """TensorRT-RTX builds one: it is not run, which needs a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")
    proto = build(NORMED, constants())
    model, _ = quantize(proto, target="tensorrt-rtx", rows=rows)
    samples = open_calibration({"x": data(proto)}, ir.inputs(model))
    tensorrt.emit_engine(model, tmp_path / "m.engine", get_target("tensorrt-rtx"), samples)
    assert (tmp_path / "m.engine").stat().st_size > 10_000
