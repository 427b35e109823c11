"""bias-correct: after it, no layer's output is off in the mean, wherever its bias stands; and who has none is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir, linear
from graphq.calibration import CalibrationSet, open_calibration
from graphq.errors import RecipeError
from graphq.executor import Executor, Fetch
from graphq.passes.bias_correct import BiasCorrect, channel_mean
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph

RNG = np.random.default_rng(0)
SAMPLES = 10  # two batches and a short one


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return onnx_ir.from_proto(proto)


def correct(
    model: ir.Model, x: np.ndarray, *passes: Pass, target: str = "onnxruntime", **options: Any
) -> tuple[ir.Model, PassRecord, ir.Model]:
    """The corrected model, what the pass did, and the model before it."""
    model, data = ir.clone(model), open_calibration({"x": x}, ir.inputs(model))

    def context(model: ir.Model, data: CalibrationSet = data) -> PassContext:
        return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))

    ctx = context(model)
    run_passes([Normalize(), *passes], ctx, verify_graph)
    before = ir.clone(ctx.model)
    return ctx.model, run_passes([BiasCorrect(**options)], ctx, verify_graph)[0], before


def values(model: ir.Model, x: np.ndarray, names: list[str]) -> list[np.ndarray]:
    return Executor(model, [Fetch(name) for name in names]).run({"x": x})


def shifts(model: ir.Model, result: ir.Model, x: np.ndarray, layer: str) -> np.ndarray:
    """Mean error of each channel of the output of `layer`, behind the Add that holds its bias if one does."""
    node = next(node for node in model.graph if node.outputs[0].name == layer)
    a, b = values(model, x, [layer])[0], values(result, x, [layer])[0]
    axis = linear.channel_axis(node) if node.op_type in linear.LINEAR_OPS else -1
    return np.asarray(channel_mean([b - a.astype(np.float64)], axis))


ROUGH = QuantizeWeights(bits=4)
INTEGER = InsertQdq(correct_bias=False, float_budget=0.0, per_channel=False)
LAYERS: dict[str, tuple[str, str, dict[str, np.ndarray]]] = {
    "Conv": ("4, 6, 6", "y = Conv(x, w, b)", {"w": floats(6, 4, 3, 3), "b": floats(6)}),
    "Conv without a bias": ("4, 6, 6", "y = Conv(x, w)", {"w": floats(6, 4, 3, 3)}),
    "ConvTranspose": ("4, 6, 6", "y = ConvTranspose(x, w, b)", {"w": floats(4, 6, 2, 2), "b": floats(6)}),
    "Gemm": ("16", "y = Gemm(x, w, b)", {"w": floats(16, 8), "b": floats(8)}),
    "Gemm, beta": ("16", "y = Gemm <beta = 0.5> (x, w, b)", {"w": floats(16, 8), "b": floats(8)}),
    "Gemm, scalar bias": ("16", "y = Gemm(x, w, b)", {"w": floats(16, 8), "b": floats()}),
    "Gemm without a bias": ("16", "y = Gemm <transB = 1> (x, w)", {"w": floats(8, 16)}),
    "MatMul and Add": ("5, 16", "a = MatMul(x, w) y = Add(a, b)", {"w": floats(16, 8), "b": floats(8)}),
    "Add and MatMul": ("5, 16", "a = MatMul(x, w) y = Add(b, a)", {"w": floats(16, 8), "b": floats(1, 1, 8)}),
}  # fmt: skip


def layer(case: str) -> tuple[ir.Model, np.ndarray]:
    shape, body, weights = LAYERS[case]
    x = np.abs(floats(SAMPLES, *map(int, shape.split(", "))))
    return build(f"g (float[N, {shape}] x) => (float[] y) {{ {body} }}", **weights), x


@pytest.mark.parametrize("case", LAYERS)
def test_float_biases(case: str) -> None:
    """The shift is gone to 1e-6 of the output, for weights of 4 bits that shift it by much more."""
    model, x = layer(case)
    result, record, before = correct(model, x, ROUGH)
    largest = np.abs(values(model, x, ["y"])[0]).max()
    old, new = (np.abs(shifts(model, one, x, "y")).max() for one in (before, result))
    assert old > 1e-3 * largest and new < 1e-6 * largest
    (measured,) = record.measurements
    assert measured.numbers["mean_shift"] == pytest.approx(old, rel=1e-3)


@pytest.mark.parametrize("case", ["Conv", "Gemm"])
def test_int32_biases(case: str) -> None:
    """Codes of scale `s_x s_w` cannot do better than half a step, and do."""
    model, x = layer(case)
    result, _, before = correct(model, x, INTEGER)
    node = next(node for node in result.graph if node.op_type == case)
    bias, plain = ir.producer(node.inputs[2]), node.outputs[0].name or ""
    assert bias is not None and bias.op_type == "DequantizeLinear" and bias.inputs[0].dtype == ir.DataType.INT32  # type: ignore[union-attr]
    scale = ir.constant(bias.inputs[1])
    assert scale is not None
    reference = values(model, x, ["y"])[0]
    old, new = (
        channel_mean([values(one, x, [plain])[0] - reference.astype(np.float64)], linear.channel_axis(node)) for one in (before, result)
    )
    assert (np.abs(new) <= 0.5001 * scale + 1e-6 * np.abs(reference).max()).all() and np.abs(new).max() < 0.1 * np.abs(old).max()


DEEP = """g (float[N, 16] x) => (float[] y) { [one] h = Gemm(x, w1, b) [act] r = Relu(h) [two] m = MatMul(r, w2) [bias] s = Add(m, b)
    [act2] t = Relu(s) [three] y = Gemm(t, w3, b) }"""


def deep() -> tuple[ir.Model, np.ndarray]:
    """Three layers that share one bias."""
    return build(DEEP, b=floats(16), **{f"w{k}": floats(16, 16) / 4 for k in (1, 2, 3)}), floats(64, 16)


def test_each_layer_sees_what_the_corrected_ones_before_it_produce() -> None:
    """So that not only its own rounding, but also what is left of theirs is made up for; a shared bias becomes three."""
    model, x = deep()
    result, record, _ = correct(model, x, ROUGH, samples=0)
    for name in ("h", "s", "y"):
        a, b = values(model, x, [name])[0], values(result, x, [name])[0]
        assert np.abs((b - a.astype(np.float64)).mean(0)).max() < 1e-6 * np.abs(a).max()
    assert [entry.where for entry in record.measurements] == ["one", "two", "three"]


def test_lowers_the_error() -> None:
    """The plain alternative is not to correct."""
    model, x = deep()
    result, _, before = correct(model, x, ROUGH, samples=0)
    reference = values(model, x, ["y"])[0]
    after, plain = (float(np.sum((values(one, x, ["y"])[0] - reference) ** 2, dtype=np.float64)) for one in (result, before))
    assert after < 0.95 * plain


@pytest.mark.parametrize("samples", [8, 0])
def test_samples(samples: int) -> None:
    """Only the first so many count: the mean of those vanishes."""
    model, x = layer("Gemm")
    result, _, _ = correct(model, x, ROUGH, samples=samples)
    used = x[: samples or None]
    assert np.abs(shifts(model, result, used, "y")).max() < 1e-6 * np.abs(values(model, used, ["y"])[0]).max()
    if samples:
        assert np.abs(shifts(model, result, x, "y")).max() > 1e-6


def test_fixed_batch() -> None:
    model = build("g (float[40, 16] x) => (float[40, 8] y) { y = Gemm(x, w) }", w=floats(16, 8))
    x = floats(80, 16)
    result, _, _ = correct(model, x, ROUGH, samples=3)
    assert np.abs(shifts(model, result, x[:40], "y")).max() < 1e-5


REFUSED = {
    "no bias": "a = MatMul(x, w) y = Tanh(a)",
    "the product is read as well": "a = MatMul(x, w) c = Add(a, b) t = Tanh(a) y = Mul(c, t)",
    "bias is computed": "c = Neg(b) d = ReduceMean(x) a = Gemm(x, w, d) y = Add(a, c)",
    "beta is 0": "y = Gemm <beta = 0.0> (x, w, b)",
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """The node is named with the reason; when nothing else is there, the pass fails."""
    model, x = build(f"g (float[N, 16] x) => (float[] y) {{ {REFUSED[case]} }}", w=floats(16, 8), b=floats(8)), np.abs(floats(SAMPLES, 16))
    with pytest.raises(RecipeError, match="no constant bias of its own"):
        correct(model, x, ROUGH)
    result, record, before = correct(model, x, ROUGH, allow_no_effect=True)
    assert len(record.skipped) == 1 and not record.edits
    np.testing.assert_array_equal(values(result, x, ["y"])[0], values(before, x, ["y"])[0])


def test_a_product_that_the_caller_reads_is_refused() -> None:
    model = build("g (float[N, 16] x) => (float[] y, float[] a) { a = MatMul(x, w) y = Add(a, b) }", w=floats(16, 8), b=floats(8))
    with pytest.raises(RecipeError, match="no constant bias of its own"):
        correct(model, floats(SAMPLES, 16), ROUGH)


def test_float_layers_are_not_touched() -> None:
    model, x = layer("Gemm")
    with pytest.raises(RecipeError, match="changed nothing"):
        correct(model, x)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_channel_mean(axis: int) -> None:
    batches = [floats(4, 3, 5), floats(4, 3, 5)]
    expected = np.moveaxis(np.concatenate([np.moveaxis(one, axis, -1).reshape(-1, one.shape[axis]) for one in batches]), 0, 0).mean(
        0, dtype=np.float64
    )
    np.testing.assert_allclose(channel_mean(batches, axis), expected, atol=1e-12)
    assert not channel_mean([np.zeros((0, 3), np.float32)], -1).any()
