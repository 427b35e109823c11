"""reconstruct: what it gains on data that nothing has seen, what it leaves as it is, and what may be learned."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from graphq import ir, linear
from graphq.calibration import open_calibration
from graphq.errors import RecipeError, UsageError
from graphq.executor import Executor, decode
from graphq.passes import _learned
from graphq.passes._learned import Codes, Floats, Steps
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.nm_prune import NmPrune
from graphq.passes.reconstruct import Reconstruct
from graphq.passes.round import Round
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph

pytest.importorskip("torch", reason="needs torch")

WIDTH, HIDDEN, SAMPLES = 16, 32, 160
RESIDUAL = """g (float[N, 16] x) => (float[N, 16] y) {
  [up] h = MatMul(x, w1) [bias1] hb = Add(h, b1) r = Relu(hb) [down] d = MatMul(r, w2) [bias2] db = Add(d, b2) s = Add(x, db)
  [up2] h2 = Gemm(s, w3, b3) r2 = Relu(h2) [down2] d2 = MatMul(r2, w4) y = Add(s, d2) }"""
SHAPES = {"w1": (WIDTH, HIDDEN), "b1": (HIDDEN,), "w2": (HIDDEN, WIDTH), "b2": (WIDTH,), "w3": (WIDTH, HIDDEN), "b3": (HIDDEN,),
          "w4": (HIDDEN, WIDTH)}  # fmt: skip
IMAGES = """g (float[N, 4, 8, 8] x) => (float[N, 8, 8, 8] y) {
  [stem] a = Conv <pads = [1, 1, 1, 1]> (x, k1, c1) r = Relu(a) [conv] c = Conv <pads = [1, 1, 1, 1]> (r, k2, c2) y = Add(r, c) }"""
KERNELS = {"k1": (8, 4, 3, 3), "c1": (8,), "k2": (8, 8, 3, 3), "c2": (8,)}


def build(text: str, seed: int, shapes: dict[str, tuple[int, ...]]) -> ir.Model:
    rng = np.random.default_rng(100 + seed)
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    for name, shape in shapes.items():
        size = np.sqrt(max(np.prod(shape) / max(shape[0 if name[0] in "kc" else -1], 1), 1))
        proto.graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) / size).astype(np.float32), name))
    return onnx_ir.from_proto(proto)


def inputs(seed: int, count: int, *shape: int) -> np.ndarray:
    """Channels (axis 1) that are correlated and of different size."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((shape[0], shape[0])) / np.sqrt(shape[0]) + np.eye(shape[0])
    rows = np.moveaxis(rng.standard_normal((count, *shape)), 1, -1) @ mix * np.exp(0.3 * rng.standard_normal(shape[0]))
    return np.ascontiguousarray(np.moveaxis(rows, -1, 1), np.float32)


QUANTIZED = (InsertQdq(activation_bits=4, weights=False, ranges="mse", tables=False, error_samples=0),
             Round(bits=3, algorithm="rtn", scales="min-max", correct_bias=False))  # fmt: skip


def quantized(seed: int = 0, *passes: Pass, text: str = RESIDUAL) -> tuple[PassContext, np.ndarray]:
    """A context whose model is quantized, and data that nothing has seen."""
    shapes, shape = (SHAPES, (WIDTH,)) if text is RESIDUAL else (KERNELS, (4, 8, 8))
    model, count = build(text, seed, shapes), SAMPLES if text is RESIDUAL else 40
    x = inputs(seed, 2 * count, *shape)
    data = open_calibration({"x": x[:count]}, ir.inputs(model))
    ctx = PassContext(model=ir.clone(model), reference=model, calib=data, held_out=data, target=get_target("onnxruntime"), seed=seed)
    run_passes(passes or QUANTIZED, ctx, verify_graph)
    return ctx, x[count:]


def apply(ctx: PassContext, *passes: Pass) -> PassRecord:
    return run_passes(passes, ctx, verify_graph)[-1]


def error(ctx: PassContext, x: np.ndarray) -> float:
    made, wanted = (Executor(model).run({"x": x})[0].astype(np.float64) for model in (ctx.model, ctx.reference))
    return float(np.sum((made - wanted) ** 2) / np.sum(wanted**2))


def layout(model: ir.Model) -> list[tuple[Any, ...]]:
    """All that learning must not change: nodes, and types and shapes of constants."""
    nodes = [(node.op_type, [value.name for value in node.inputs if value], [out.name for out in node.outputs]) for node in model.graph]
    return [*nodes, *((name, value.dtype, tuple(value.shape or ())) for name, value in model.graph.initializers.items())]


@pytest.mark.parametrize("options", [{}, {"rounding": "gates", "rate": 0.2}], ids=["through", "gates"])
@pytest.mark.parametrize("text", [RESIDUAL, IMAGES], ids=["matrices", "convolutions"])
@pytest.mark.parametrize("seed", range(3))
def test_it_gains_on_data_that_nothing_has_seen(seed: int, text: str, options: dict[str, Any]) -> None:
    """A tenth of the error of round to nearest at least (with gates, which converge later, a hundredth); nodes and formats stay."""
    ctx, fresh = quantized(seed, text=text)
    before, was = error(ctx, fresh), layout(ctx.model)
    record = apply(ctx, Reconstruct(steps=60, batch=20 if text is RESIDUAL else 8, **options))
    assert error(ctx, fresh) < (0.99 if options else 0.9) * before and layout(ctx.model) == was
    assert [one.where for one in record.measurements] == (["s", "y"] if text is RESIDUAL else ["a", "y"])
    for node in ctx.model.graph:
        if node.op_type == "DequantizeLinear" and ir.is_constant(node.inputs[0]):
            codes = ir.constant(node.inputs[0])
            assert codes is not None and 0 <= codes.astype(int).min() and codes.astype(int).max() <= 7  # 3 bits


def test_the_report_tells_what_the_model_does() -> None:
    """The SQNR of the last block on what was held out is that of the model in both engines (0.01 dB), and what it gained is a gain."""
    ctx, _ = quantized()
    record = apply(ctx, Reconstruct(steps=40, batch=20))
    held = np.concatenate([batch["x"] for index, batch in enumerate(ctx.calib.batches(20)) if index % 5 == 4])
    numbers = record.measurements[-1].numbers
    (wanted,) = Executor(ctx.reference).run({"x": held})
    for made in (Executor(ctx.model).run({"x": held})[0], ReferenceEvaluator(ir.to_proto(ctx.model)).run(None, {"x": held})[0]):
        assert numbers["sqnr_db"] == pytest.approx(-10 * np.log10(np.sum((made - wanted) ** 2) / np.sum(wanted**2)), abs=0.01)
    assert numbers["gained_db"] == pytest.approx(numbers["sqnr_db"] - numbers["sqnr_before_db"]) and numbers["gained_db"] > 0


def test_the_same_call_twice_gives_the_same_bytes() -> None:
    made = []
    for _ in range(2):
        ctx, _ = quantized()
        apply(ctx, Reconstruct(steps=10))
        made.append(ir.to_proto(ctx.model).SerializeToString())
    assert made[0] == made[1]


def test_what_does_not_help_is_not_kept() -> None:
    """Rates that throw everything about leave the model as it was, and the report says so; no error, as there was nothing to gain."""
    ctx, _ = quantized()
    before = ir.to_proto(ctx.model).SerializeToString()
    record = apply(ctx, Reconstruct(steps=3, rate=1000, bias_rate=1000, step_rate=10))
    assert ir.to_proto(ctx.model).SerializeToString() == before and not record.edits
    assert all(one.numbers["gained_db"] == 0 and one.numbers["found_db"] < one.numbers["sqnr_db"] for one in record.measurements)
    assert ("the model", "no block's error on the samples that judge fell") in record.skipped


def test_a_budget_ends_it() -> None:
    ctx, _ = quantized()
    record = apply(ctx, Reconstruct(steps=1_000_000, budget_s=0.2))
    assert len(record.measurements) == 2 and all(one.numbers["steps"] < 1_000_000 for one in record.measurements)


@pytest.mark.parametrize("n", [2, 3])
def test_zeros_of_a_pattern_stay(n: int) -> None:
    """Of 3:4 too, which many weights of few codes have by chance."""
    ctx, fresh = quantized(0, NmPrune(n=n), *QUANTIZED)
    before, weights = error(ctx, fresh), [node for node in ctx.model.graph if node.op_type in linear.LINEAR_OPS]
    masks = [decode(ctx.model, node.inputs[1]) == 0 for node in weights]  # type: ignore[arg-type]
    apply(ctx, Reconstruct(steps=40, batch=20))
    after = [decode(ctx.model, node.inputs[1]) for node in weights]  # type: ignore[arg-type]
    assert all((array[mask] == 0).all() and mask.mean() >= 1 - n / 4 for array, mask in zip(after, masks, strict=True))
    assert error(ctx, fresh) < before


def test_a_layer_that_is_excluded_keeps_its_weight() -> None:
    ctx, _ = quantized()
    codes = {node.name: ir.constant(ir.producer(node.inputs[1]).inputs[0]) for node in ctx.model.graph if node.op_type in linear.LINEAR_OPS}  # type: ignore[union-attr]
    apply(ctx, Reconstruct(steps=20, exclude=("up",)))
    after = {node.name: ir.constant(ir.producer(node.inputs[1]).inputs[0]) for node in ctx.model.graph if node.op_type in linear.LINEAR_OPS}  # type: ignore[union-attr]
    assert {name for name in codes if not np.array_equal(codes[name], after[name])} == {"down", "up2", "down2"}


def test_nothing_to_learn_is_an_error() -> None:
    model = build("g (float[N, 16] x) => (float[N, 16] y) { y = Relu(x) }", 0, {})
    data = open_calibration({"x": inputs(0, 8, WIDTH)}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    with pytest.raises(RecipeError, match="changed nothing"):
        apply(ctx, Reconstruct())


def test_a_block_that_torch_cannot_run_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """And is skipped with the operator that is missing; the others are learned."""
    from graphq.torch_executor import OPERATORS

    ctx, _ = quantized()
    monkeypatch.delitem(OPERATORS, "Gemm")  # of the second block
    record = apply(ctx, Reconstruct(steps=20))
    assert [one.where for one in record.measurements] == ["s"]
    assert any("its block stays as it is" in reason and "Gemm" in reason for _, reason in record.skipped)


def test_without_torch_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == "torch" or name.startswith("graphq.torch_executor")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch", None)
    ctx, _ = quantized()
    with pytest.raises(UsageError, match=r"graphq\[torch\]"):
        Reconstruct().precheck(ctx.model, ctx.target)


# ---- what can be learned --------------------------------------------------------------------------------------------


def found(ctx: PassContext) -> tuple[list[_learned.Learned], list[str]]:
    reasons: list[str] = []
    twins = {node.name or "": node for node in ctx.reference.graph}
    return _learned.find(list(ctx.model.graph), twins, lambda node, reason: reasons.append(reason)), reasons


def test_everything_in_a_quantized_model() -> None:
    """Each weight starts where the float weight lies, within half a step of its code; 4 bits of activations are stored as such."""
    ctx, _ = quantized()
    entries, reasons = found(ctx)
    codes = [one for one in entries if isinstance(one, Codes)]
    assert len(codes) == 4 and not reasons
    assert sum(isinstance(one, Floats) for one in entries) == 3 and sum(isinstance(one, Steps) for one in entries) == 4
    for one in codes:
        assert np.array_equal(np.rint(one.place), np.asarray(ir.constant(one.value)).astype(np.float32)) and (one.low, one.high) == (0, 7)
        assert not np.array_equal(one.place, np.rint(one.place)) and not one.pinned.any()


def test_a_step_moves_the_ends_of_its_clip() -> None:
    """Activations of 3 bits, which are clipped before a quantizer of 8."""
    ctx, _ = quantized(0, InsertQdq(activation_bits=3, weights=False, tables=False, error_samples=0), Round(bits=4))
    steps = [one for one in found(ctx)[0] if isinstance(one, Steps)]
    assert steps and all(len(one.values) == 3 for one in steps)
    apply(ctx, Reconstruct(steps=20, step_rate=0.01))
    for one in steps:
        scale, low, high = (float(np.asarray(ir.constant(value))) for value in one.values)
        assert scale != float(one.starts[0])
        assert (high - low) / scale == pytest.approx(7, rel=1e-5)


def test_steps_that_integer_biases_are_in_units_of_stay() -> None:
    ctx, _ = quantized(0, InsertQdq(error_samples=0), text=IMAGES)
    entries, _ = found(ctx)
    biased = {node.inputs[0] for node in ctx.model.graph if node.op_type == "Conv"}
    scales = {ir.producer(value).inputs[1] for value in biased}  # type: ignore[union-attr]
    assert sum(isinstance(one, Codes) for one in entries) == 2
    assert not any(isinstance(one, Steps) and set(one.values) & scales for one in entries)
    assert not any(isinstance(one, Floats) for one in entries)


def test_a_weight_that_two_layers_read_is_left_alone() -> None:
    text = "g (float[N, 16] x) => (float[N, 32] y) { [one] a = MatMul(x, w1) r = Relu(x) [two] b = MatMul(r, w1) y = Mul(a, b) }"
    model = build(text, 0, {"w1": (WIDTH, HIDDEN)})
    reasons: list[str] = []
    assert not _learned.find(list(model.graph), {}, lambda node, reason: reasons.append(reason))
    assert reasons == ["others read its weight too"] * 2
