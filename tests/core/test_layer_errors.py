"""Layer errors: what a quantized twin beside each float layer says equals the same computed by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir, linear, qdq, twins
from graphq.calibration import CalibrationSet, open_calibration
from graphq.executor import Executor, Fetch
from graphq.quantizers import Format, Uniform
from graphq.spec import PerTensor, QuantSpec
from graphq.targets import get_target
from graphq.twins import LayerError, Twin

ACTIVATION = QuantSpec(8, signed=False, symmetric=False)
WEIGHT = get_target("onnxruntime").weight
RNG = np.random.default_rng(0)
SAMPLES = 10  # two batches and a short one


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def data(model: ir.Model, **arrays: np.ndarray) -> CalibrationSet:
    return open_calibration(arrays, ir.inputs(model))


def measure(model: ir.Model, calib: CalibrationSet, weight: QuantSpec = WEIGHT) -> dict[str, LayerError]:
    """With min-max ranges of every layer's input."""
    anchors = [node for node in model.graph if linear.is_linear(node)]
    names = list(dict.fromkeys(linear.data_of(node).name or "" for node in anchors))
    arrays = Executor(model, [Fetch(name) for name in names]).run(next(calib.batches(len(calib))))
    found = {
        name: (ACTIVATION, Uniform(ACTIVATION).fit(float(array.min()), float(array.max())))
        for name, array in zip(names, arrays, strict=True)
    }
    return errors(model, anchors, found, weight, calib)


def errors(model: ir.Model, nodes: list[ir.Node], found: dict[str, Format], weight: QuantSpec,
           calib: CalibrationSet) -> dict[str, LayerError]:  # fmt: skip
    pairs = [Twin(node.name or "", qdq.spec_for_weight(node, weight), found[linear.data_of(node).name or ""]) for node in nodes]
    return {pair.layer: error for pair, error in zip(pairs, twins.measure(model, pairs, calib), strict=True)}


LAYERS = {
    "MatMul": ("float[N, 5, 16] x", "a = Tanh(x) [fc] y = MatMul(a, w)", {"w": floats(16, 8)}),
    "Gemm": ("float[N, 16] x", "a = Tanh(x) [fc] y = Gemm <transB = 1> (a, w, b)", {"w": floats(8, 16), "b": floats(8)}),
    "Conv": ("float[N, 3, 9, 9] x", "a = Tanh(x) [fc] y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (a, w, b)",
             {"w": floats(8, 3, 3, 3), "b": floats(8)}),
    "depthwise": ("float[N, 4, 9] x", "a = Tanh(x) [fc] y = Conv <group = 4> (a, w)", {"w": floats(8, 1, 3)}),
}  # fmt: skip


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_equals_the_definition(case: str, per_channel: bool) -> None:
    """SQNR to 1e-3 dB, mean error of each channel to 1e-5 of the largest output, over all batches."""
    declared, body, weights = LAYERS[case]
    model = build(f"g ({declared}) => (float[] y) {{ {body} }}", **weights)
    spec = WEIGHT if per_channel else replace(WEIGHT, granularity=PerTensor())
    shape = [SAMPLES, *ir.inputs(model)[0].shape[1:]]  # type: ignore[index]
    x = floats(*shape)
    found = measure(model, data(model, x=x), spec)["fc"]
    plain, hidden = Executor(model, [Fetch("y"), Fetch("a")]).run({"x": x})
    node = next(node for node in model.graph if node.name == "fc")
    weight = ir.constant(node.inputs[1])
    assert weight is not None
    quantizer = Uniform(qdq.spec_for_weight(node, spec))
    quantized = quantizer.fake_quantize(weight, quantizer.fit_weight(weight))
    copy = ir.clone(model)
    node = next(node for node in copy.graph if node.name == "fc")
    node.replace_input_with(1, ir.make_value("q", ir.make_tensor(quantized, "float32", "q")))
    copy.graph.register_initializer(node.inputs[1])
    rounded = Uniform(ACTIVATION).fake_quantize(hidden, Uniform(ACTIVATION).fit(float(hidden.min()), float(hidden.max())))
    result = Executor(copy, [Fetch("y")], nodes=[node], feeds={"a": np.dtype(np.float32)}).run({"a": rounded})[0]
    error = result.astype(np.float64) - plain
    channel = linear.channel_axis(node) % plain.ndim
    assert found.sqnr_db == pytest.approx(10 * np.log10((plain.astype(np.float64) ** 2).sum() / (error**2).sum()), abs=1e-3)
    assert found.shift is not None and found.rows == plain.size // plain.shape[channel]
    axes = tuple(axis for axis in range(plain.ndim) if axis != channel)
    np.testing.assert_allclose(found.shift, error.mean(axes), atol=1e-5 * np.abs(plain).max())


CHAIN = "g (float[N, 8] x) => (float[N, 8] z) { [one] a = MatMul(x, w1) [two] b = MatMul(a, w2) t = Tanh(b) [three] z = Gemm(t, w3) }"


def test_errors_do_not_add_up() -> None:
    """A bad first layer, an outlier in its weight's only column, leaves the others' own errors as they are."""
    weights = {f"w{k}": floats(8, 8) for k in (1, 2, 3)}
    model = build(CHAIN, **weights)
    calib = data(model, x=floats(SAMPLES, 8))
    found = measure(model, calib)
    rough = errors(model, [node for node in model.graph if node.name == "two"],
                   {"a": (ACTIVATION, Uniform(ACTIVATION).fit(-20.0, 20.0))}, WEIGHT, calib)  # fmt: skip
    again = measure(model, calib)
    assert {name: error.sqnr_db for name, error in again.items()} == {name: error.sqnr_db for name, error in found.items()}
    assert rough["two"].sqnr_db < found["two"].sqnr_db and list(rough) == ["two"]


def test_the_model_is_not_changed() -> None:
    model = build(CHAIN, **{f"w{k}": floats(8, 8) for k in (1, 2, 3)})
    before = ir.to_proto(model).SerializeToString()
    measure(model, data(model, x=floats(SAMPLES, 8)))
    assert ir.to_proto(model).SerializeToString() == before


@pytest.mark.parametrize(
    ("text", "arrays"),
    [
        (
            "g (float[N, 8] x, int64[N] to) => (float[] y) { t = Reshape(x, to) [fc] y = MatMul(t, w) }",
            {"x": floats(2, 8), "to": np.array([-1, 8])},
        ),
        ("g (float[8] x) => (float[] y) { [fc] y = MatMul(x, w) }", {"x": floats(8)}),
    ],
)
def test_no_mean_where_the_channels_are_not_known(text: str, arrays: dict[str, np.ndarray]) -> None:
    """An output of unknown rank; a vector, whose mean over positions does not exist."""
    model = build(text, w=floats(8, 8))
    error = measure(model, data(model, **arrays))["fc"]
    assert error.shift is None and error.sqnr_db > 30


def test_dead_layers_have_no_error() -> None:
    model = build("g (float[N, 8] x) => (float[] y) { [fc] y = MatMul(x, w) }", w=np.zeros((8, 4), np.float32))
    error = measure(model, data(model, x=floats(SAMPLES, 8)))["fc"]
    assert error.sqnr_db == float("inf") and error.shift is not None and not error.shift.any()


@pytest.mark.parametrize(("common", "low", "high"), [(0.0, 0.0, 0.4), (10.0, 0.95, 1.0)])
def test_trust_is_what_batches_agree_on(common: float, low: float, high: float) -> None:
    """Means that differ from batch to batch as much as from zero are noise; shrunk by it, they predict other samples best."""
    rng = np.random.default_rng(0)
    truth = common * rng.standard_normal(64)
    rows = np.array([4, 4, 2, 4])
    totals = rows[:, None] * truth + np.sqrt(rows)[:, None] * rng.standard_normal((4, 64))
    trust, mean = twins._trust(totals, rows), totals.sum(0) / rows.sum()
    assert low <= trust <= high
    losses = {factor: float(np.mean((factor * mean - truth) ** 2)) for factor in (trust, 0.0, 1.0, (1 + trust) / 2)}
    assert losses[trust] <= 1.02 * min(losses[1.0], losses[(1 + trust) / 2])
    assert twins._trust(totals[:1], rows[:1]) == 1
