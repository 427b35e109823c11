"""Twins: what they say a layer loses, at its own output and at the model's, equals the same worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir, linear, noise, qdq, twins
from graphq.calibration import CalibrationSet, open_calibration
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.executor import Executor, Fetch
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, PerTensor, QuantSpec
from graphq.twins import Twin

UNSIGNED = QuantSpec(8, signed=False, symmetric=False)
SIGNED = QuantSpec(8)
WEIGHT = QuantSpec(8, granularity=PerAxis(0))
SAMPLES = 10  # two batches and a short one


@pytest.fixture(autouse=True)
def all_rows_count_alike(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Except where massive outputs are what is tested."""
    if "massive" not in request.node.name:
        monkeypatch.setattr(noise, "LIMIT", 1e12)


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def data(model: ir.Model, **arrays: np.ndarray) -> CalibrationSet:
    return open_calibration(arrays, ir.inputs(model))


def layers(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if linear.is_linear(node)]


def fetched(model: ir.Model, calib: CalibrationSet, *names: str) -> list[np.ndarray]:
    return Executor(model, [Fetch(name) for name in names]).run(next(calib.batches(len(calib))))


def twins_of(
    model: ir.Model, calib: CalibrationSet, bits: int = 8, weight: QuantSpec = WEIGHT, activation: QuantSpec = UNSIGNED
) -> list[Twin]:
    """A twin of each layer, with both sides quantized and min-max ranges."""
    spec, nodes = replace(activation, bits=bits), layers(model)
    names = list(dict.fromkeys(linear.data_of(node).name or "" for node in nodes))
    ranges = {name: (float(x.min()), float(x.max())) for name, x in zip(names, fetched(model, calib, *names), strict=True)}
    return [
        Twin(node.name or "", qdq.spec_for_weight(node, replace(weight, bits=bits)),
             (spec, Uniform(spec).fit(*ranges[linear.data_of(node).name or ""])))
        for node in nodes
    ]  # fmt: skip


def quantized(model: ir.Model, chosen: list[Twin]) -> ir.Model:
    """A copy of `model` with the layers of `chosen` quantized in place, as a pass would do it."""
    model = ir.clone(model)
    nodes, edit = {node.name: node for node in model.graph}, Editor(model)
    for twin in chosen:
        node = nodes[twin.layer]
        if twin.weight is not None:
            qdq.insert_weight(edit, node, twin.weight)
        if twin.activation is not None:
            spec, qparams = twin.activation
            qdq.insert_pair(edit, linear.data_of(node), qparams, spec, [(node, linear.data_index(node))])
    return model


def relative(result: np.ndarray, reference: np.ndarray) -> float:
    return float(np.sum((result.astype(np.float64) - reference) ** 2) / np.sum(reference.astype(np.float64) ** 2))


LAYERS = {
    "MatMul": ("float[N, 5, 16] x", "a = Tanh(x) [fc] y = MatMul(a, w)", {"w": floats(16, 8)}),
    "Gemm": ("float[N, 16] x", "a = Tanh(x) [fc] y = Gemm <transB = 1> (a, w, b)", {"w": floats(8, 16), "b": floats(8)}),
    "Conv": ("float[N, 3, 9, 9] x", "a = Tanh(x) [fc] y = Conv <strides = [2, 2], pads = [1, 1, 1, 1]> (a, w, b)",
             {"w": floats(8, 3, 3, 3), "b": floats(8)}),
}  # fmt: skip


@pytest.mark.parametrize("bits", [8, 6, 4])
@pytest.mark.parametrize("weight", [WEIGHT, SIGNED], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("activation", [UNSIGNED, SIGNED], ids=["asymmetric", "symmetric"])
@pytest.mark.parametrize("case", LAYERS)
def test_equals_the_definition(case: str, activation: QuantSpec, weight: QuantSpec, bits: int) -> None:
    """Either side and both, over several batches: relative error to 1e-3 of itself, mean error to 1e-5 of the largest output."""
    declared, body, weights = LAYERS[case]
    model = build(f"g ({declared}) => (float[] y) {{ {body} }}", **weights)
    calib = data(model, x=floats(SAMPLES, *ir.inputs(model)[0].shape[1:], seed=1))  # type: ignore[index, arg-type]
    (both,) = twins_of(model, calib, bits, weight, activation)
    sides = [both, replace(both, activation=None), replace(both, weight=None)]
    plain, a = fetched(model, calib, "y", "a")
    node = layers(model)[0]
    axis = linear.channel_axis(node) % plain.ndim
    w, quantizer, (spec, qparams) = ir.constant(node.inputs[1]), Uniform(both.weight), both.activation  # type: ignore[arg-type, misc]
    rounded = quantizer.fake_quantize(w, quantizer.fit_weight(w)), Uniform(spec).fake_quantize(a, qparams)  # type: ignore[arg-type]
    by_hand = build(f"g ({declared.replace(' x', ' a')}) => (float[] y) {{ {body.partition(') ')[2]} }}",
                    **{name: array for name, array in weights.items() if name != "w"}, w=w)  # fmt: skip
    for twin, error in zip(sides, twins.measure(model, sides, calib), strict=True):
        by_hand.graph.initializers["w"].const_value = ir.make_tensor(rounded[0] if twin.weight else w, "float32", "w")  # type: ignore[arg-type]
        result = Executor(by_hand).run({"a": rounded[1] if twin.activation else a})[0]
        assert error.relative == pytest.approx(relative(result, plain), rel=1e-3)
        assert error.sqnr_db == pytest.approx(-10 * math.log10(error.relative))
        assert error.shift is not None and error.rows == plain.size // plain.shape[axis]
        expected = (result.astype(np.float64) - plain).mean(tuple(one for one in range(plain.ndim) if one != axis))
        np.testing.assert_allclose(error.shift, expected, atol=1e-5 * np.abs(plain).max())


def test_massive_rows_do_not_hide_what_the_others_suffer() -> None:
    """One row in fifty is a thousand times as large and takes the range: the error of the others is what is reported."""
    model = build("g (float[N, 50, 16] x) => (float[] y) { a = Identity(x) [fc] y = MatMul(a, w) }", w=floats(16, 8))
    x = floats(SAMPLES, 50, 16, seed=1)
    x[:, 7] *= 1000
    calib = data(model, x=x)
    twin = replace(twins_of(model, calib)[0], weight=None)
    (error,) = twins.measure(model, [twin], calib)
    plain, result = (fetched(one, calib, "y")[0] for one in (model, quantized(model, [twin])))
    rest = np.arange(50) != 7
    assert relative(result, plain) < 1e-3 and relative(result[:, rest], plain[:, rest]) > 0.5
    assert error.relative == pytest.approx(relative(result[:, rest], plain[:, rest]), rel=0.3)


def test_no_error_is_no_noise() -> None:
    """A layer whose weight is 0, and a twin that quantizes nothing."""
    model = build("g (float[N, 8] x) => (float[] y) { [fc] y = MatMul(x, w) }", w=np.zeros((8, 4), np.float32))
    calib = data(model, x=floats(SAMPLES, 8))
    dead, same = twins.measure(model, [*twins_of(model, calib), Twin("fc")], calib)
    for error in (dead, same):
        assert error.relative == 0 and error.sqnr_db == math.inf and error.shift is not None and not error.shift.any()


def test_twins_that_read_one_value_alike_share_its_quantizer() -> None:
    model = build(
        "g (float[N, 8] x) => (float[] y, float[] z) { [q] y = MatMul(x, w) [k] z = MatMul(x, v) }", w=floats(8, 8), v=floats(8, 8)
    )
    chosen = twins_of(model, data(model, x=floats(SAMPLES, 8)))
    probe = twins._Probe(model)
    for twin in [*chosen, *(replace(one, weight=None) for one in chosen)]:
        probe.twin_error(twin)
    assert [node.op_type for node in probe.model.graph].count("QuantizeLinear") == 1


BRANCHES = """
g (float[N, 8] x, bool[N] pick) => (float[N, 8] y, float[N, 4] side)
{
   [first] a = MatMul(x, w1)
   b = Relu(a)
   [second] c = MatMul(b, w2)
   d = Add(c, b)
   [side] side = Gemm(d, w3)
   [any] m = Cast <to = 7> (pick)
   t = ReduceMax <keepdims = 0> (m)
   f = Cast <to = 9> (t)
   e = If(f) <
      then_branch = left () => (float[n, 8] p) { p = Add(a, d) },
      else_branch = right () => (float[n, 8] q) { r = Neg(d)  q = Sub(r, a) }>
   [last] y = MatMul(e, w4)
}"""


@pytest.fixture(params=range(3))
def branches(request: pytest.FixtureRequest) -> tuple[ir.Model, CalibrationSet]:
    """A model with a residual, two outputs and a subgraph that reads from outside, and samples for it."""
    seed = request.param
    shapes = {"w1": (8, 8), "w2": (8, 8), "w3": (8, 4), "w4": (8, 8)}
    model = build(BRANCHES, **{name: floats(*shape, seed=seed + index) for index, (name, shape) in enumerate(shapes.items())})
    return model, data(model, x=floats(SAMPLES, 8, seed=seed + 9), pick=np.arange(SAMPLES) % 2 == 0)


def test_effects_equal_those_of_the_model_with_one_layer_quantized(branches: tuple[ir.Model, CalibrationSet]) -> None:
    """Each output to 1e-3 of its error; their mean is what counts."""
    model, calib = branches
    chosen = twins_of(model, calib, bits=5)
    found = twins.effects(model, chosen, calib)
    plain = fetched(model, calib, "y", "side")
    for twin, effect in zip(chosen, found, strict=True):
        result = fetched(quantized(model, [twin]), calib, "y", "side")
        expected = np.mean([relative(*pair) for pair in zip(result, plain, strict=True)])
        assert effect == pytest.approx(expected, rel=1e-3)
    assert found[2] > 0, "a layer whose output is an output of the model"


def test_effects_do_not_depend_on_how_many_twins_run_at_once(
    branches: tuple[ir.Model, CalibrationSet], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, calib = branches
    chosen = twins_of(model, calib)
    together = twins.effects(model, chosen, calib)
    monkeypatch.setattr(twins, "TWINS_AT_ONCE", 1)
    np.testing.assert_array_equal(twins.effects(model, chosen, calib), together)


def test_errors_in_a_model_that_is_quantized_everywhere(branches: tuple[ir.Model, CalibrationSet]) -> None:
    """What a layer inherits is its error with all layers quantized but itself; to 1e-3 of it."""
    model, calib = branches
    chosen, nodes = twins_of(model, calib, bits=6), layers(model)
    names = [node.outputs[0].name or "" for node in nodes]
    plain, total = fetched(model, calib, *names), fetched(quantized(model, chosen), calib, *names)
    for index, (inherited, own) in enumerate(twins.measure_together(model, chosen, calib)):
        others = quantized(model, [twin for other, twin in enumerate(chosen) if other != index])
        assert own.relative == pytest.approx(relative(total[index], plain[index]), rel=1e-3)
        assert inherited.relative == pytest.approx(relative(fetched(others, calib, names[index])[0], plain[index]), rel=1e-3)
    assert twins.measure_together(model, chosen, calib)[0][0].sqnr_db == math.inf, "nothing comes before the first layer"


def test_the_model_is_not_changed(branches: tuple[ir.Model, CalibrationSet]) -> None:
    model, calib = branches
    before = ir.to_proto(model).SerializeToString()
    for look in (twins.measure, twins.measure_together, twins.effects):
        look(model, twins_of(model, calib), calib)
    assert ir.to_proto(model).SerializeToString() == before


def test_only_float_outputs_count() -> None:
    text = "g (float[N, 8] x) => (float[N, 4] y, int64[N, 1] top) { [fc] y = MatMul(x, w) top = ArgMax(y) }"
    model = build(text, w=floats(8, 4))
    calib = data(model, x=floats(SAMPLES, 8, seed=1))
    (twin,) = twins_of(model, calib)
    assert twins.effects(model, [twin], calib)[0] == pytest.approx(twins.measure(model, [twin], calib)[0].relative, rel=1e-3)
    del model.graph.outputs[0]
    with pytest.raises(ModelError, match="no float output"):
        twins.effects(model, [twin], calib)


def test_a_mask_of_infinities_is_left_out() -> None:
    text = "g (float[N, 4] x) => (float[N, 4] y) { [fc] a = MatMul(x, w) y = Add(a, mask) }"
    model = build(text, w=floats(4, 4), mask=np.array([0, 0, -np.inf, 0], np.float32))
    calib = data(model, x=floats(SAMPLES, 4, seed=1))
    assert 0 < twins.effects(model, twins_of(model, calib), calib)[0] < 1e-3


def test_per_tensor_weights_are_worse_than_per_channel() -> None:
    w = floats(16, 8) * 10.0 ** np.arange(-4, 4, dtype=np.float32)
    model = build("g (float[N, 16] x) => (float[] y) { [fc] y = MatMul(x, w) }", w=w)
    calib = data(model, x=floats(SAMPLES, 16, seed=1))
    (twin,) = twins_of(model, calib, bits=4)
    coarse = replace(twin, weight=replace(twin.weight, granularity=PerTensor()))  # type: ignore[type-var]
    fine, rough = twins.measure(model, [twin, coarse], calib)
    assert rough.noise > fine.noise
