"""center: a symmetric target gets the codes of the asymmetric quantizer, exactly; who cannot be centred is left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.calibration import open_calibration
from graphq.executor import Executor, Fetch
from graphq.passes import _center
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, run_passes
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

SYMMETRIC = ["generic", "tensorrt", "tensorrt-rtx"]
ASYMMETRIC = QuantSpec(8, signed=True, symmetric=False)
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return onnx_ir.from_proto(proto)


def quantize(model: ir.Model, x: np.ndarray, target: str = "generic", **options: Any) -> ir.Model:
    model = ir.clone(model)
    data = open_calibration({"x": x}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
    options = {"correct_bias": False, "float_budget": 0, **options}
    run_passes([Normalize(), InsertQdq(**options)], ctx, verify_graph)
    require_legal(model, ctx.target)
    return model


def centered(model: ir.Model) -> list[str]:
    return [value.name or "" for value in model.graph.initializers.values() if (value.name or "").endswith("_offset")]


def sqnr(reference: np.ndarray, result: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / np.sum((reference.astype(np.float64) - result) ** 2)))


LAYERS = {
    "MatMul with an Add": ("a = MatMul(x, w) y = Add(b, a)", {"w": floats(16, 8), "b": floats(8)}),
    "MatMul with a 1xN Add": ("a = MatMul(x, w) y = Add(a, b)", {"w": floats(16, 8), "b": floats(1, 8)}),
    "Gemm": ("y = Gemm(x, w, b)", {"w": floats(16, 8), "b": floats(8)}),
    "Gemm, transposed": ("y = Gemm <transB = 1> (x, w, b)", {"w": floats(8, 16), "b": floats(8)}),
    "Gemm, scalar bias": ("y = Gemm(x, w, b)", {"w": floats(16, 8), "b": floats()}),
    "Gemm without a bias": ("y = Gemm(x, w)", {"w": floats(16, 8)}),
    "Gemm, then Add": ("a = Gemm(x, w) y = Add(a, b)", {"w": floats(16, 8), "b": floats(8)}),
}


@pytest.mark.parametrize("target", SYMMETRIC)
@pytest.mark.parametrize("case", LAYERS)
def test_equals_the_asymmetric_quantizer(case: str, target: str) -> None:
    """The output is that of asymmetric codes of x, to 2e-6 of the largest; no zero point is left in the graph."""
    body, weights = LAYERS[case]
    x = np.abs(floats(200, 16)) - np.float32(0.17)
    model = build(f"g (float[N, 16] x) => (float[N, 8] y) {{ {body} }}", **weights)
    result = quantize(model, x, target)
    assert len(centered(result)) == 1
    params = Uniform(ASYMMETRIC).fit(float(x.min()), float(x.max()))
    axis = 0 if "transB" in body else 1
    quantizer = Uniform(QuantSpec(8, granularity=PerAxis(axis)))
    weight = quantizer.fake_quantize(weights["w"], quantizer.fit_weight(weights["w"]))
    product = Uniform(ASYMMETRIC).fake_quantize(x, params).astype(np.float64) @ (weight.T if axis == 0 else weight)
    expected = product + weights.get("b", np.float32(0))
    np.testing.assert_allclose(Executor(result).run({"x": x})[0], expected, atol=2e-6 * np.abs(expected).max())
    zeros = [ir.constant(node.inputs[2]) for node in result.graph if node.op_type == "QuantizeLinear"]
    assert zeros and not any(np.any(zero) for zero in zeros)


def test_codes_are_the_same_integers() -> None:
    """Bit for bit, shifted by the zero point, but where `x / s` lies between two codes to the last bit."""
    x = np.abs(floats(500, 16)) - np.float32(0.17)
    model = quantize(build("g (float[N, 16] x) => (float[N, 8] y) { y = Gemm(x, w) }", w=floats(16, 8)), x)
    node = next(node for node in model.graph if node.op_type == "QuantizeLinear")
    codes = Executor(model, [Fetch(node.outputs[0].name or "")]).run({"x": x})[0].astype(int)
    expected = Uniform(ASYMMETRIC).quantize(x, Uniform(ASYMMETRIC).fit(float(x.min()), float(x.max())))
    assert (codes != expected).mean() < 1e-3 and np.abs(codes - expected).max() <= 1


@pytest.mark.parametrize("ranges", ["min-max", "percentile", "mse"])
@pytest.mark.parametrize("activation", ["Gelu", "Relu", "Softplus", "HardSwish"])
def test_lowers_the_error_behind_one_sided_activations(activation: str, ranges: str) -> None:
    """Half of the codes of a symmetric quantizer lie where there is nothing (how much that costs depends on the weights' own error)."""
    text = f"g (float[N, 16] x) => (float[N, 8] y) {{ h = MatMul(x, v) r = {activation}(h) y = Gemm(r, w) }}"
    model, x = build(text, v=floats(16, 32), w=floats(32, 8)), floats(400, 16)
    plain, moved = (quantize(model, x, center=center, ranges=ranges) for center in (False, True))
    reference = Executor(model).run({"x": x})[0]
    assert centered(moved) == ["r_offset"] and not centered(plain)
    assert sqnr(reference, Executor(moved).run({"x": x})[0]) > sqnr(reference, Executor(plain).run({"x": x})[0]) + 0.2


REFUSED: dict[str, tuple[str, dict[str, np.ndarray]]] = {
    "two-sided": ("z = Sub(x, one) y = Gemm(z, w)", {"one": np.float32(1.5)}),
    "no bias of its own": ("a = MatMul(x, w) y = Tanh(a)", {}),
    "bias that is no constant": ("a = MatMul(x, w) k = ReduceMean(x) y = Add(a, k)", {}),
    "one bias for all": ("a = MatMul(x, w) y = Add(a, k)", {"k": floats(1)}),
    "Add that others read past": ("a = MatMul(x, w) c = Add(a, k) t = Tanh(a) y = Mul(c, t)", {"k": floats(8)}),
    "alpha": ("y = Gemm <alpha = 0.5> (x, w)", {}),
    "beta": ("y = Gemm <beta = 0.5> (x, w, k)", {"k": floats(8)}),
    "one of two readers cannot": ("a = MatMul(x, w) s = Softmax(a) c = Gemm(x, w) y = Add(c, s)", {}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """Quantized all the same, without a shift, and close to the original."""
    body, weights = REFUSED[case]
    x = np.abs(floats(200, 16)).clip(0, 3)
    model = build(f"g (float[N, 16] x) => (float[N, 8] y) {{ {body} }}", w=floats(16, 8), **weights)
    result = quantize(model, x)
    assert not centered(result) and sqnr(Executor(model).run({"x": x})[0], Executor(result).run({"x": x})[0]) > 25


def test_a_matmul_whose_product_the_caller_reads_is_refused() -> None:
    model = build("g (float[N, 16] x) => (float[N, 8] y, float[N, 8] a) { a = MatMul(x, w) y = Add(a, b) }", w=floats(16, 8), b=floats(8))
    x = np.abs(floats(200, 16))
    result = quantize(model, x)
    assert not centered(result)
    for before, after in zip(Executor(model).run({"x": x}), Executor(result).run({"x": x}), strict=True):
        assert sqnr(before, after) > 30


def test_convolutions_are_refused() -> None:
    """Their padding of zeros would not be shifted."""
    model = build("g (float[N, 4, 8, 8] x) => (float[] y) { y = Conv <pads = [1, 1, 1, 1]> (x, w, b) }", w=floats(4, 4, 3, 3), b=floats(4))
    assert not centered(quantize(model, np.abs(floats(8, 4, 8, 8))))


def test_targets_with_zero_points_need_none() -> None:
    model = build("g (float[N, 16] x) => (float[N, 8] y) { y = Gemm(x, w) }", w=floats(16, 8))
    assert not centered(quantize(model, np.abs(floats(200, 16)), "onnxruntime"))


def test_two_readers_are_both_compensated() -> None:
    """One shift, two biases, one of them new."""
    text = "g (float[N, 16] x) => (float[N, 8] y) { a = MatMul(x, w) c = Add(a, b) d = Gemm(x, v) t = Tanh(d) y = Mul(c, t) }"
    model, x = build(text, w=floats(16, 8), v=floats(16, 8), b=floats(8)), np.abs(floats(200, 16))
    result = quantize(model, x)
    assert len(centered(result)) == 1
    assert sqnr(Executor(model).run({"x": x})[0], Executor(result).run({"x": x})[0]) > 33


@pytest.mark.parametrize(
    ("low", "high", "worthwhile"),
    [(0.0, 1.0, True), (-1.0, 0.0, True), (-0.17, 10.0, True), (0.5, 1.0, True), (-1.0, 1.0, False), (-0.8, 1.0, False), (-0.7, 1.0, True),
     (0.0, 0.0, False)],
)  # fmt: skip
def test_is_worthwhile(low: float, high: float, worthwhile: bool) -> None:
    """When the scale shrinks by 1.15 and more; a range that does not contain 0 is extended first."""
    assert _center.is_worthwhile(low, high) is worthwhile
