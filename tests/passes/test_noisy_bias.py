"""noisy-bias: what is added before the quantizer is taken back in the bias, kept only where it helps; and who is left alone."""

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

from graphq import ir, linear
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import GraphqError
from graphq.executor import Executor, Fetch
from graphq.passes import _noisy_bias_math as math
from graphq.passes import _pairs
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.noisy_bias import NoisyBias
from graphq.passes.normalize import Normalize
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.quantizers import QParams, Uniform
from graphq.spec import QuantSpec
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "noisy_bias"
D, WIDTH = 32, 24
BODIES = {
    "MatMul and Add": "m = MatMul(r, w) y = Add(m, b)",
    "Gemm": "y = Gemm <transB = 1> (r, t, b)",
    "three layers": "m = MatMul(r, w) y = Add(m, b) k = MatMul(r, v) z = Add(k, b) u = Gemm(r, w)",
}
"""Layers that read r."""
PAIR = "q = QuantizeLinear(x, s, o) r = DequantizeLinear(q, s, o)"


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(body: str, shape: str = "32", **more: np.ndarray) -> onnx.ModelProto:
    outputs = ", ".join(f"float[] {name}" for name in "yzu" if f"{name} =" in body)
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, {shape}] x) => ({outputs}) {{ {body} }}')
    weights = {"w": floats(D, WIDTH), "v": floats(D, WIDTH, seed=1), "t": floats(WIDTH, D, seed=2), "b": floats(WIDTH, seed=3), **more}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def between_codes(bits: int, seed: int = 0, *, symmetric: bool = False) -> np.ndarray:
    """Rows whose elements lie close to the middle between two codes of a range from -1 to 1, but for the first, which gives the range."""
    rng, steps = np.random.default_rng(seed), 2**bits - (2 if symmetric else 1)
    x = (rng.integers(0, 2 ** (bits - 1) - 1, (64, D)) + 0.46 + 0.02 * rng.random((64, D))) * 2 / steps
    x[:, 0] = rng.choice([-1.0, 1.0], 64)
    return x.astype(np.float32)


def add_noise(
    proto: onnx.ModelProto, x: np.ndarray, *others: Pass, target: str = "onnxruntime", seed: int = 0, **options: Any
) -> tuple[ir.Model, PassRecord, ir.Model]:
    """The model after `others` and noisy-bias, what the latter did, and the model before it."""
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    calib, held_out = open_calibration({"x": x}, ir.inputs(model)).split(len(x) // 2)
    ctx = PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=held_out, target=get_target(target), seed=seed)
    run_passes([Normalize(), *others], ctx, verify_graph)
    before = ir.clone(model)
    record = run_passes([NoisyBias(**options)], ctx, verify_graph)[0]
    require_legal(model, ctx.target)
    return model, record, before


def quantizers(bits: int = 8, **options: Any) -> InsertQdq:
    return InsertQdq(activation_bits=bits, float_budget=0.0, correct_bias=False, **options)


def outputs(model: ir.Model | onnx.ModelProto, x: np.ndarray) -> list[np.ndarray]:
    model = onnx_ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    return Executor(model, threads=1).run({"x": x})


def noises(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "Add" and "_noisy" in (node.outputs[0].name or "")]


def dump(model: ir.Model) -> str:
    rows = [f"{name}: {np.asarray(ir.constant(value)).round(4).tolist()}" for name, value in model.graph.initializers.items()]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    return "\n".join([*rows, ""])


# ---- golden text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["shared_pair"])
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    x = np.random.default_rng(0).integers(0, 9, (40, 4)) + np.float32(0.45)
    model, _, _ = add_noise(parser.parse_model(before), x.astype(np.float32))
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- formulas -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 7, 768])
def test_noise_is_centred_and_depends_on_its_seeds_only(size: int) -> None:
    first, again, other = math.draw(size, (0, 1)), math.draw(size, (0, 1)), math.draw(size, (0, 2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (size,) and abs(first.mean()) < 1e-15 and np.abs(first).max() < 2
    assert size == 1 or not np.array_equal(first, other)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_search_is_the_least_error_of_all_candidates(bits: int, seed: int) -> None:
    quantizer, x, weight = Uniform(QuantSpec(bits, signed=False, symmetric=False)), between_codes(bits, seed), floats(D, WIDTH, seed=seed)
    qparams = quantizer.fit(-1, 1)
    units = [math.draw(D, (seed, number)) for number in range(2)]
    found = math.search(x, units, weight, quantizer, qparams)
    scaled = [np.float32(amplitude * float(qparams.scale)) * unit for unit in units for amplitude in math.AMPLITUDES]
    errors = [np.mean(((quantizer.fake_quantize((x + n).astype(np.float32), qparams) - n - x) @ weight) ** 2) for n in scaled]
    assert math.error(x, found, weight, quantizer, qparams) == pytest.approx(min(errors), rel=1e-3)
    assert math.gain_db(x, found, weight, quantizer, qparams) > 2
    assert math.gain_db(x, np.zeros(D, np.float32), weight, quantizer, qparams) == 0


# ---- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("body", BODIES)
def test_with_a_float_quantizer_nothing_changes(body: str, weights: bool, seed: int) -> None:
    """Without the quantizers of the activation, the model after computes what the one before does (1e-5)."""
    proto, x = build(f"r = Identity(x) {BODIES[body]}"), between_codes(6, seed)
    after, _, before = add_noise(proto, x, quantizers(6, weights=weights), seed=seed)
    assert len(noises(after)) == 1 and not noises(before)
    for model in (after, before):
        (pair,) = {_pairs.read(linear.data_of(node)).source: node for node in model.graph if node.op_type in linear.LINEAR_OPS}.items()  # type: ignore[union-attr]
        Editor(model).replace(linear.data_of(pair[1]), pair[0])
    for a, b in zip(outputs(before, x), outputs(after, x), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-5, atol=1e-5 * np.abs(a).max())


@pytest.mark.parametrize("target", ["onnxruntime", "generic", "tensorrt-rtx"])
@pytest.mark.parametrize("bits", [4, 5, 6, 8])
@pytest.mark.parametrize("weights", [False, True])
def test_table(weights: bool, bits: int, target: str) -> None:
    """`Q(x + n) W - n W + b` in either runtime (1e-5), with and without a zero point, stored in the type's own width or not."""
    if target == "tensorrt-rtx" and bits == 4:
        pytest.skip("TensorRT takes no 4-bit activations")
    x = between_codes(bits, symmetric=target != "onnxruntime")
    model, _, _ = add_noise(build("m = MatMul(x, w) y = Add(m, b)"), x, quantizers(bits, weights=weights, center=False), target=target)
    (added,) = noises(model)
    layer = next(node for node in model.graph if node.op_type == "MatMul")
    pair = _pairs.read(linear.data_of(layer))
    assert pair is not None and pair.source is added.outputs[0] and pair.quantizer.spec.bits == bits
    n, b = np.asarray(ir.constant(added.inputs[1])), floats(WIDTH, seed=3)
    weight = Executor(model, [Fetch(layer.inputs[1].name or "")]).run({"x": x})[0] if weights else floats(D, WIDTH)  # type: ignore[union-attr]
    expected = (pair.quantizer.fake_quantize(x + n, pair.qparams) - n) @ weight.astype(np.float64) + b
    evaluator = ReferenceEvaluator(ir.to_proto(model))
    for result in (outputs(model, x)[0], evaluator.run(None, {"x": x})[0]):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_lowers_the_error_of_what_lies_between_codes(bits: int, seed: int) -> None:
    """The plain alternative is no noise; on samples that neither search nor acceptance have seen."""
    proto, unseen = build("m = MatMul(x, w) y = Add(m, b)"), between_codes(bits, seed + 10)
    after, record, before = add_noise(proto, between_codes(bits, seed), quantizers(bits, weights=False), seed=seed)
    errors = [float(np.mean((outputs(model, unseen)[0] - outputs(proto, unseen)[0]) ** 2)) for model in (before, after)]
    assert errors[1] < errors[0] / 1.5 and record.measurements[0].numbers["gain_db"] > 2


@pytest.mark.parametrize("bits", [4, 8])
def test_smooth_data_gets_no_noise(bits: int) -> None:
    """As measured for METHODS.md 4-23: about no gain on Gaussian data."""
    proto, x = build("m = MatMul(x, w) y = Add(m, b)", "32, 32"), floats(128, 32, D)
    after, record, before = add_noise(proto, x, quantizers(bits))
    assert not record.edits and record.measurements[0].numbers["gain_db"] < 0.3
    assert [reason for _, reason in record.skipped] == ["no noise lowers its error on held-out samples by 0.3 dB"]
    np.testing.assert_array_equal(outputs(after, x)[0], outputs(before, x)[0])


def test_integer_biases_take_it_back_too() -> None:
    proto, x = build("y = Gemm <transB = 1> (x, t, b)"), between_codes(8)
    model, _, before = add_noise(proto, x, quantizers())
    old, new = (np.asarray(ir.constant(ir.producer(next(node for node in one.graph if node.op_type == "Gemm").inputs[2]).inputs[0]))  # type: ignore[union-attr]
                for one in (before, model))  # fmt: skip
    assert new.dtype == np.int32 and not np.array_equal(old, new)
    assert np.abs(outputs(model, x)[0].mean(0) - outputs(proto, x)[0].mean(0)).max() < 0.05


def test_layers_of_one_quantizer_share_a_noise() -> None:
    model, record, _ = add_noise(build(f"r = Identity(x) {BODIES['three layers']}"), between_codes(6), quantizers(6))
    assert len(noises(model)) == 1 and record.edits["insert"] == 1
    assert len(record.measurements) == 1


def test_two_quantizers_of_one_value_get_noises_of_their_own() -> None:
    second = "q2 = QuantizeLinear(x, s, o) r2 = DequantizeLinear(q2, s, o) k = MatMul(r2, v) z = Add(k, b)"
    more = {"s": np.array(2 / 255, np.float32), "o": np.array(128, np.uint8)}
    model, record, _ = add_noise(build(f"{PAIR} m = MatMul(r, w) y = Add(m, b) {second}", **more), between_codes(8))
    first, other = (np.asarray(ir.constant(node.inputs[1])) for node in noises(model))
    assert len(record.measurements) == 2 and not np.array_equal(first, other)


@pytest.mark.parametrize("seed", [0, 1])
def test_two_runs_give_the_same_bytes(seed: int) -> None:
    proto, x = build("m = MatMul(x, w) y = Add(m, b)"), between_codes(6)
    results = [
        ir.to_proto(add_noise(proto, x, quantizers(6), seed=one)[0]).SerializeToString(deterministic=True) for one in (seed, seed, 9)
    ]
    assert results[0] == results[1] != results[2]


# ---- where ----------------------------------------------------------------------------------------------------------

REFUSED = {
    "float data": ("m = MatMul(x, w) y = Add(m, b)", "its data input is not quantized"),
    "no bias": (f"{PAIR} m = MatMul(r, w) y = Tanh(m)", "no constant bias"),
    "a stack of matrices": (f"{PAIR} m = MatMul(r, w3) y = Add(m, b)", "no constant matrix"),
    "weight is computed": (f"{PAIR} c = MatMul(x, xs) m = Gemm(r, c, c1) y = Identity(m)", "no constant matrix"),
    "another reader": (f"{PAIR} m = MatMul(r, w) y = Add(m, b) z = Tanh(r)", "others than layers read"),
    "the caller reads": (f"{PAIR} m = MatMul(r, w) u = Add(m, b) y = Identity(r)", "others than layers read"),
    "one scale a channel": (
        "q = QuantizeLinear <axis = 1> (x, s32, o32) r = DequantizeLinear <axis = 1> (q, s32, o32) m = MatMul(r, w) y = Add(m, b)",
        "one constant scale",
    ),
    "codes that others read": (f"{PAIR} m = MatMul(r, w) y = Add(m, b) z = Cast <to = 1> (q)", "one constant scale"),
    "codes on the move": (
        "q = QuantizeLinear(x, s, o) k = Reshape(q, dims) r = DequantizeLinear(k, s, o) m = MatMul(r, w) y = Add(m, b)",
        "one constant scale",
    ),
    "16 bits": (
        "q = QuantizeLinear(x, s, o16) r = DequantizeLinear(q, s, o16) m = MatMul(r, w) y = Add(m, b)", "one constant scale",
    ),
    "an integer kernel before it": (
        f"{PAIR} f = Flatten(r) e = QuantizeLinear(f, s, o) d = DequantizeLinear(e, s, o) m = MatMul(d, w) y = Add(m, b)",
        "split the integer kernel",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """The node is named with the reason and stays as it is."""
    body, reason = REFUSED[case]
    more = {
        "s": np.array(1 / 127.5, np.float32), "o": np.array(128, np.uint8), "s32": np.full(32, 1 / 127.5, np.float32),
        "o32": np.full(32, 128, np.uint8), "o16": np.array(0, np.int16), "dims": np.array([-1, 32]), "w3": floats(2, D, WIDTH),
        "xs": floats(D, D), "c1": floats(D),
    }  # fmt: skip
    _, record, _ = add_noise(build(body, **more), between_codes(8))
    assert any(reason in text for _, text in record.skipped) and not record.edits


def test_convolutions_are_refused() -> None:
    body = f"{PAIR} y = Conv <pads = [1, 1, 1, 1]> (r, k, kb)"
    more = {"s": np.array(1 / 127.5, np.float32), "o": np.array(128, np.uint8), "k": floats(6, 4, 3, 3), "kb": floats(6)}
    _, record, _ = add_noise(build(body, "4, 6, 6", **more), floats(16, 4, 6, 6))
    assert "where a convolution pads there is no noise" in record.skipped[0][1] and not record.edits


def test_excluded_layers_are_left_alone() -> None:
    proto = build("m = MatMul(x, w) y = Add(m, b)")
    _, record, _ = add_noise(proto, between_codes(6), quantizers(6), exclude=("MatMul",))
    assert [reason for _, reason in record.skipped] == ["excluded by the recipe"] and not record.edits
    with pytest.raises(GraphqError, match="matches no node"):
        add_noise(proto, between_codes(6), quantizers(6), exclude=("nobody",))


@pytest.mark.parametrize("options", [{"draws": 0}, {"draws": 101}, {"min_gain_db": -0.1}, {"amplitude": 1}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NoisyBias(**options)


# ---- reading quantizers back ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("target", ["onnxruntime", "generic"])
def test_pairs_are_read_as_they_were_written(target: str, bits: int) -> None:
    from graphq import qdq

    signed = target == "generic"
    quantizer = Uniform(QuantSpec(bits, signed=signed, symmetric=signed))
    model = onnx_ir.from_proto(build("m = MatMul(x, w) y = Add(m, b)"))
    edit, layer = Editor(model), next(iter(model.graph))
    edit.raise_opset(quantizer.spec.opset)
    qparams = quantizer.fit(-1.0, 2.0)
    result = qdq.insert_pair(edit, linear.data_of(layer), qparams, quantizer.spec, [(layer, 0)])
    pair = _pairs.read(result)
    assert pair is not None and pair.source.name == "x" and pair.source.is_graph_input()
    assert isinstance(pair.qparams, QParams) and pair.qparams.scale == qparams.scale and pair.qparams.zero_point == qparams.zero_point
    x = floats(100, D) * 2
    np.testing.assert_array_equal(pair.quantizer.fake_quantize(x, pair.qparams), quantizer.fake_quantize(x, qparams))
    assert pair.head.op_type == ("QuantizeLinear" if bits in (2, 4, 8) else "Clip")


def test_a_clip_that_belongs_to_the_model_is_not_the_quantizers() -> None:
    body = "c = Clip(x, low, high) q = QuantizeLinear(c, s, o) r = DequantizeLinear(q, s, o) m = MatMul(r, w) y = Add(m, b)"
    more = {"s": np.array(6 / 255, np.float32), "o": np.array(0, np.uint8), "low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    model = onnx_ir.from_proto(build(body, **more))
    layer = next(node for node in model.graph if node.op_type == "MatMul")
    pair = _pairs.read(linear.data_of(layer))
    assert pair is not None and pair.source.name == "c" and pair.quantizer.spec.bits == 8
