"""ln-reparam on graphs: the float function stays, and one quantizer for all channels gives the codes of one for each."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser
from pydantic import TypeAdapter

from graphq import ir, pipeline
from graphq.calibration import open_calibration
from graphq.errors import TargetError
from graphq.executor import Executor, Fetch
from graphq.observers import Range
from graphq.passes import _ln_reparam_math as math
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.ln_reparam import LnReparam
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec
from graphq.targets import get_target
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "ln_reparam"
ASSETS = Path(__file__).parents[2].parent / "shared" / "assets"
SEEDS = pytest.mark.parametrize("seed", range(3))
TARGETS = pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
D, WIDTH = 32, 24

GRAPHS = {
    "matmul_add": "n = LayerNormalization(x, gain, shift) a = MatMul(n, w) y = Add(a, b)",
    "add_first": "n = LayerNormalization(x, gain, shift) a = MatMul(n, w) y = Add(b, a)",
    "gemm": "n = LayerNormalization(x, gain, shift) y = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(n, wt, b)",
    "gemm_without_bias": "n = LayerNormalization(x, gain, shift) y = Gemm(n, w)",
    "two_layers": "n = LayerNormalization(x, gain, shift) a = MatMul(n, w) c = Add(a, b) d = Gemm(n, w, b) y = Mul(c, d)",
    "one_weight": "n = LayerNormalization(x, gain, shift) m = LayerNormalization(x, gain) c = Gemm(n, w, b) d = Gemm(m, w) y = Sub(c, d)",
    "without_shift": "n = LayerNormalization(x, gain) y = Gemm(n, w, b)",
    "no_bias_to_shift": "n = LayerNormalization(x, gain, shift) y = MatMul(n, w)",
    "rms": "n = RMSNormalization(x, gain) a = MatMul(n, w) y = Add(a, b)",
    "residual": "n = LayerNormalization(x, gain, shift) a = Gemm(n, w, b) s = ReduceMean(n) y = Add(a, s)",
    "rms_residual": "n = RMSNormalization(x, gain) a = Gemm(n, w, b) s = ReduceMean(n) y = Add(a, s)",
    "returned": "n = LayerNormalization(x, gain, shift) y = Gemm(n, w, b)",
    "computed_gain": "g = Abs(gain) n = LayerNormalization(x, g, shift) y = Gemm(n, w, b)",
}
FOLDED = [name for name in GRAPHS if name not in ("residual", "rms_residual", "returned", "computed_gain")]


def weights(seed: int, spread: float = 2.0) -> dict[str, np.ndarray]:
    """Channels whose ranges differ by factors up to 10^spread, and are one-sided."""
    rng = np.random.default_rng(seed)
    gain = (10 ** rng.uniform(-spread / 2, spread / 2, D)).astype(np.float32)
    w = (rng.standard_normal((D, WIDTH)) / np.sqrt(D)).astype(np.float32)
    return {"gain": gain, "shift": (2 * gain * rng.standard_normal(D)).astype(np.float32), "w": w, "wt": np.ascontiguousarray(w.T),
            "b": rng.standard_normal(WIDTH).astype(np.float32)}  # fmt: skip


def inputs(seed: int = 0, count: int = 64) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, D)).astype(np.float32)


def context(name: str, seed: int = 0, target: str = "onnxruntime", changed: dict[str, np.ndarray] | None = None) -> PassContext:
    returned = f", float[batch, {D}] n" if name == "returned" else ""
    text = f"g (float[batch, {D}] x) => (float[batch, {WIDTH}] y{returned}) {{ {GRAPHS[name]} }}"
    proto = parser.parse_model(f'<ir_version: 11, opset_import: ["" : 23]>\n{text}')
    arrays = weights(seed) | (changed or {})
    proto.graph.initializer.extend(numpy_helper.from_array(array, key) for key, array in arrays.items())
    return opened(ir.onnx_ir.from_proto(proto), inputs(seed), target)


def opened(model: ir.Model, x: np.ndarray, target: str = "onnxruntime") -> PassContext:
    data = open_calibration({ir.inputs(model)[0].name: x}, ir.inputs(model))
    return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))


def reparam(ctx: PassContext, **options: Any) -> PassRecord:
    return run_passes([LnReparam(**options)], ctx, verify_graph)[0]


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    return Executor(model).run({"x": x})


def inner(model: ir.Model, name: str, x: np.ndarray) -> np.ndarray:
    return Executor(model, [Fetch(name)]).run({"x": x})[0]


def data_of(model: ir.Model) -> str:
    """What the first layer reads."""
    return next(node for node in model.graph if node.op_type in ("MatMul", "Gemm")).inputs[0].name or ""


def types(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def dump(model: ir.Model) -> str:
    rows = [
        f"{name} = {np.round(np.asarray(ir.constant(value), np.float64), 4).tolist()}" for name, value in model.graph.initializers.items()
    ]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("case", ["folded", "branch"])
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    ctx = opened(ir.from_onnx_text(before), np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32))
    reparam(ctx)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(ctx.model)}", encoding="utf-8")
    else:
        assert dump(ctx.model) == expected


# ---- the function stays ---------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("name", GRAPHS)
def test_the_float_function_stays(name: str, seed: int) -> None:
    ctx, x = context(name, seed), inputs(seed + 10)
    before = run(ctx.model, x)
    record = reparam(ctx)
    for a, b in zip(before, run(ctx.model, x), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())
    assert bool(record.measurements[0].numbers["folded"]) == (name in FOLDED)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@TARGETS
def test_the_float_function_stays_at_any_width(bits: int, symmetric: bool, target: str) -> None:
    ctx, x = context("two_layers", target=target), inputs()
    (before,) = run(ctx.model, x)
    reparam(ctx, bits=bits, symmetric=symmetric)
    np.testing.assert_allclose(run(ctx.model, x)[0], before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


def test_it_folds_without_a_new_node() -> None:
    for name in FOLDED:
        ctx = context(name)
        before = types(ctx.model)
        reparam(ctx)
        assert types(ctx.model) == before


def test_other_readers_keep_the_value() -> None:
    ctx = context("residual")
    before = inner(ctx.model, "n", inputs())
    reparam(ctx)
    assert types(ctx.model) == ["LayerNormalization", "Mul", "Add", "Gemm", "ReduceMean", "Add"]
    np.testing.assert_array_equal(inner(ctx.model, "n", inputs()), before)


@pytest.mark.parametrize(("name", "added"), [("rms_residual", ["Mul", "Add"]), ("residual", ["Mul", "Add"])])
def test_a_branch_shifts_after_any_normalization(name: str, added: list[str]) -> None:
    ctx = context(name)
    assert reparam(ctx).measurements[0].numbers["shifted"] == 1
    assert types(ctx.model)[1:3] == added


@pytest.mark.parametrize("name", ["rms", "no_bias_to_shift"])
def test_only_scales_where_nothing_takes_a_shift(name: str) -> None:
    ctx = context(name)
    before = inner(ctx.model, "n", inputs())
    assert reparam(ctx).measurements[0].numbers["shifted"] == 0
    factor = inner(ctx.model, data_of(ctx.model), inputs()) / before
    np.testing.assert_allclose(factor, np.broadcast_to(factor[0], factor.shape), rtol=1e-3)


def test_a_channel_that_never_moved_is_not_blown_up() -> None:
    """Unseen data may move it: it is taken for one of 1/64 of the mean width."""
    gain, shift = weights(0)["gain"], weights(0)["shift"]
    gain[3] = shift[3] = 0
    gain[4], shift[4] = 1e-6, 0
    ctx = context("gemm", changed={"gain": gain, "shift": shift})
    (before,) = run(ctx.model, inputs())
    numbers = reparam(ctx).measurements[0].numbers
    assert numbers["narrowest"] == pytest.approx(math.NARROWEST, rel=0.05)
    np.testing.assert_allclose(run(ctx.model, inputs())[0], before, rtol=1e-5, atol=1e-5 * np.abs(before).max())


# ---- one quantizer for all channels ---------------------------------------------------------------------------------


@SEEDS
@TARGETS
@pytest.mark.parametrize("name", ["two_layers", "residual"])
def test_a_plain_quantizer_of_the_output_is_as_good_as_one_for_each_channel(name: str, target: str, seed: int) -> None:
    """insert-qdq takes the assumed range; its error is that of channel-wise quantization, up to codes at a border in float32."""
    ctx, x = context(name, seed, target), inputs(seed)
    y = inner(ctx.model, "n", x)
    reparam(ctx, headroom=1.0)
    value = data_of(ctx.model)
    stat = ctx.observe([Range(value)])[Range(value)]
    spec = ctx.target.activation
    plain = Uniform(spec)
    qparams = plain.fit(float(stat["low"]), float(stat["high"]))
    assert int(qparams.zero_point) == (0 if spec.symmetric else 128)
    found = plain.quantize(inner(ctx.model, value, x), qparams).astype(int) - int(qparams.zero_point)
    channels = math.channel_qparams(y.min(0).astype(float), y.max(0).astype(float), 8)
    each = Uniform(QuantSpec(8, signed=False, symmetric=False, granularity=PerAxis(1)))
    expected = each.quantize(y, channels).astype(int) - 128
    assert np.mean(found != expected) < 1e-3 and np.abs(found - expected).max() <= 1


@pytest.mark.parametrize(("bits", "headroom"), [(4, 1.0), (6, 1.0), (7, 1.1), (8, 1.1)])
def test_headroom_comes_with_the_bits(bits: int, headroom: float) -> None:
    found = []
    for options in ({}, {"headroom": headroom}):
        ctx = context("gemm")
        reparam(ctx, bits=bits, **options)
        found.append(inner(ctx.model, data_of(ctx.model), inputs()))
    np.testing.assert_array_equal(*found)


@SEEDS
@TARGETS
@pytest.mark.parametrize("bits", [4, 8])
def test_quantization_error_falls(bits: int, target: str, seed: int) -> None:
    """Against insert-qdq on the same model, on the samples that gave the ranges."""
    x, error = inputs(seed), {}
    options = {"activation_bits": bits, "float_budget": 0.0, "weights": False, "correct_bias": False}
    for first in ((), (LnReparam(bits=bits, headroom=1.0),)):
        ctx = context("two_layers", seed, "generic" if target != "onnxruntime" else target)
        (reference,) = run(ctx.model, x)
        run_passes([Normalize(), *first, InsertQdq(**options)], ctx, verify_graph)
        error[len(first)] = float(np.mean((run(ctx.model, x)[0] - reference) ** 2))
    assert error[1] < error[0] / 2


def test_ranges_follow_without_another_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """What insert-qdq wants to know of the normalization was found out already."""
    folds: list[list[Any]] = []
    fold = pipeline.fold

    def counted(model: ir.Model, observers: Any, *args: Any, **kwargs: Any) -> Any:
        folds.append(list(observers))
        return fold(model, observers, *args, **kwargs)

    monkeypatch.setattr(pipeline, "fold", counted)
    run_passes([Normalize(), LnReparam(), InsertQdq()], context("gemm"), verify_graph)
    assert len(folds) == 1


def test_the_same_data_give_the_same_bytes() -> None:
    results = []
    for _ in range(2):
        ctx = context("residual")
        reparam(ctx)
        results.append(ir.to_proto(ctx.model).SerializeToString(deterministic=True))
    assert results[0] == results[1]


# ---- what is left alone ---------------------------------------------------------------------------------------------

NO_LAYER = {
    "no_reader": "n = LayerNormalization(x, gain, shift) y = Gemm(x, w, b)",
    "activation": "n = LayerNormalization(x, gain, shift) a = Gemm(x, w, b) s = ReduceMean(n) y = Add(a, s)",
    "as_weight": "n = LayerNormalization(x, gain, shift) a = Gemm<transB = 1>(x, n) s = ReduceMean(a) y = Add(s, b)",
    "transposed": "n = LayerNormalization(x, gain, shift) a = Gemm<transA = 1>(n, u) s = ReduceMean(a) y = Add(s, b)",
    "in_a_branch": """n = LayerNormalization(x, gain, shift) c = Constant<value = bool {1}>()
        y = If(c) <then_branch = p () => (float[batch, 24] q) { q = MatMul(n, w) },
                   else_branch = r () => (float[batch, 24] s) { s = MatMul(x, w) }>""",
}


@pytest.mark.parametrize("case", NO_LAYER)
def test_without_a_layer_it_stays(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPHS, case, NO_LAYER[case])
    record = reparam(context(case, changed={"u": np.ones((64, 3), np.float32)}), allow_no_effect=True)
    assert [why for _, why in record.skipped] == ["no layer with constant weights reads its output"] and not record.edits


@pytest.mark.parametrize(("name", "reason"), [
    ("residual", "not only layers with constant weights read its output"),
    ("returned", "the model returns its output"),
    ("computed_gain", "its gain and shift are not constants for each channel"),
])  # fmt: skip
def test_without_branches_it_folds_or_stays(name: str, reason: str) -> None:
    record = reparam(context(name), branch=False, allow_no_effect=True)
    assert [why for _, why in record.skipped] == [reason] and not record.edits
    assert reparam(context("gemm"), branch=False).edits


def test_one_gain_for_all_channels_takes_no_factor() -> None:
    record = reparam(context("without_shift", changed={"gain": np.ones(1, np.float32)}), branch=False, allow_no_effect=True)
    assert [why for _, why in record.skipped] == ["its gain and shift are not constants for each channel"]


def test_nan_stays() -> None:
    gain = weights(0)["gain"]
    gain[5] = np.nan
    record = reparam(context("gemm", changed={"gain": gain}), allow_no_effect=True)
    assert [why for _, why in record.skipped] == ["a channel of its output has no finite value on calibration data"] and not record.edits


def test_a_model_without_normalization_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GRAPHS, "none", "y = Gemm(x, w, b)")
    with pytest.raises(TargetError, match="No LayerNormalization or RMSNormalization.*(?s:.*)int8"):
        reparam(context("none"))


@pytest.mark.parametrize("options", [{"bits": 1}, {"bits": 9}, {"headroom": 0.9}, {"headroom": 2.1}, {"symmetric": "maybe"}])
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        TypeAdapter(LnReparam).validate_python(options)


# ---- a real model ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 8])
def test_a_real_model_keeps_its_function(assets: ModuleType, bits: int) -> None:
    model = ir.load(ASSETS / "models" / "vit_tiny_patch16_224.onnx")
    images = assets.calibration("vit_tiny_patch16_224", 16)["input"]
    ctx = opened(model, images[:8])
    (before,) = Executor(model).run({"input": images})
    record = run_passes([Normalize(), LnReparam(bits=bits)], ctx, verify_graph)[1]
    (after,) = Executor(ctx.model).run({"input": images})
    assert np.linalg.norm(after - before) < 1e-4 * np.linalg.norm(before)
    assert len(record.measurements) == 24 and all(entry.numbers["folded"] and entry.numbers["shifted"] for entry in record.measurements)
    assert [why for _, why in record.skipped] == ["no layer with constant weights reads its output"]  # a Gather of one token
