"""insert-qdq below 8 bits, with weights left to a later pass, with attention, and with integers moved through shape changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import ir, precision
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import TargetError
from graphq.executor import Executor
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, run_passes
from graphq.precision import Bits
from graphq.quantizers import QParams, Uniform
from graphq.spec import QuantSpec
from graphq.targets import get_target
from graphq.verify import verify_graph

ATTENTION = """<ir_version: 10, opset_import: ["" : 21]> g (float[N,4,8] x, float[8,8] wq, float[8,8] wk, float[8,8] wo)
    => (float[N,4,8] y) {
    [to_q] q = MatMul(x, wq)
    [to_k] k = MatMul(x, wk)
    k_t = Transpose<perm=[0,2,1]>(k)
    [scores] s = MatMul(q, k_t)
    p = Softmax<axis=-1>(s)
    [mix] c = MatMul(p, k)
    c_t = Transpose<perm=[0,2,1]>(c)
    c_2 = Transpose<perm=[0,2,1]>(c_t)
    [out] y = MatMul(c_2, wo)
}"""


def attention(**bits: Bits) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The model with weights, `bits` asked for by node name, and calibration inputs."""
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(ATTENTION)
    for value in [value for value in model.graph.inputs if value.name != "x"]:
        model.graph.inputs.remove(value)
        value.const_value = ir.make_tensor(rng.normal(size=(8, 8)).astype(np.float32), "float32", value.name or "")
        model.graph.register_initializer(value)
    for node in model.graph:
        if node.name in bits:
            precision.ask(Editor(model), node, bits[node.name])
    return model, {"x": rng.normal(size=(6, 4, 8)).astype(np.float32)}


def quantized(model: ir.Model, feeds: dict[str, np.ndarray], target: str = "generic", **options: Any) -> ir.Model:
    data = open_calibration(feeds, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
    run_passes([Normalize(), InsertQdq(error_samples=0, **options)], ctx, verify_graph)
    return model


def named(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def storage(node: ir.Node, index: int) -> str | None:
    """Type of the codes behind input `index`; None if it is float."""
    maker = ir.producer(node.inputs[index])
    return None if maker is None or maker.op_type != "DequantizeLinear" else str(maker.inputs[0].dtype).lower()  # type: ignore[union-attr]


def evaluate(model: ir.Model, feeds: dict[str, np.ndarray]) -> Iterator[np.ndarray]:
    yield from ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)


@pytest.mark.parametrize(("bits", "stored"), [(8, "int8"), (6, "int8"), (4, "int4"), (3, "int8")])
def test_activations_take_the_asked_levels(bits: int, stored: str) -> None:
    model, feeds = attention()
    quantized(model, feeds, activation_bits=bits, weights=False)
    pair = ir.producer(named(model, "to_q").inputs[0])
    assert pair is not None and storage(named(model, "to_q"), 0) == stored
    qparams = QParams(*(np.asarray(ir.constant(value), kind) for value, kind in zip(pair.inputs[1:], (np.float32, np.int32), strict=True)))
    expected = Uniform(QuantSpec(bits)).fake_quantize(feeds["x"], qparams)
    model.graph.outputs[:] = [pair.outputs[0]]
    np.testing.assert_array_equal(next(evaluate(model, feeds)), expected)
    assert len(np.unique(expected)) <= 1 << bits


def test_weights_are_left_to_a_later_pass() -> None:
    model, feeds = attention()
    quantized(model, feeds, weights=False)
    assert [storage(named(model, name), 1) for name in ("to_q", "to_k", "out")] == [None] * 3
    assert [storage(named(model, name), 0) for name in ("to_q", "to_k", "out")] == ["int8"] * 3


@pytest.mark.parametrize("on", [False, True])
def test_attention_is_quantized_when_asked(on: bool) -> None:
    model, feeds = attention()
    quantized(model, feeds, attention=on)
    found = [storage(named(model, name), index) for name in ("scores", "mix") for index in (0, 1)]
    assert found == ["int8" if on else None] * 4


def test_bits_asked_for_a_layer_win() -> None:
    model, feeds = attention(to_q=Bits(4, 6), to_k=Bits(None, 4), out=Bits(4, None))
    quantized(model, feeds)
    assert [storage(named(model, name), 1) for name in ("to_q", "to_k", "out")] == ["int4", None, "int4"]
    assert storage(named(model, "to_q"), 0) == "int8", "x is read by to_q and to_k: the wider of 6 and 4 bits, stored in 8"
    assert storage(named(model, "out"), 0) is None


def test_a_layer_asked_to_stay_float_says_so() -> None:
    model, feeds = attention(to_q=Bits(None, None))
    data = open_calibration(feeds, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("generic"))
    record = run_passes([Normalize(), InsertQdq(error_samples=0)], ctx, verify_graph)[1]
    assert [reason for where, reason in record.skipped if "to_q" in where] == ["float was asked for it"]


def test_four_bits_behind_a_clip_are_stored_in_eight() -> None:
    """ONNX Runtime 1.31 fails to load a Clip before a QuantizeLinear to 4 bits."""
    model = ir.from_onnx_text(
        ATTENTION.replace("[to_q] q = MatMul(x, wq)", "six = Constant<value_float=1.0>() r = Clip(x, , six) [to_q] q = MatMul(r, wq)")
    )
    full, feeds = attention()
    for value in [value for value in model.graph.inputs if value.name != "x"]:
        model.graph.inputs.remove(value)
        value.const_value = full.graph.initializers[value.name or ""].const_value
        model.graph.register_initializer(value)
    quantized(model, feeds, activation_bits=4, weights=False)
    assert storage(named(model, "to_q"), 0) == "int8" and storage(named(model, "to_k"), 0) == "int4"
    assert np.isfinite(Executor(model, deployed=True).run(feeds)[0]).all()


def test_codes_that_a_target_does_not_store_get_a_clip_and_8_bits() -> None:
    """TensorRT has no 4-bit integer activations, and no convolution with 4-bit weights: the values are those of 4 bits all the same."""
    native, feeds = attention()
    clipped, _ = attention()
    quantized(native, feeds, "generic", activation_bits=4, weight_bits=4)
    quantized(clipped, feeds, "tensorrt-rtx", activation_bits=4, weight_bits=4)
    assert {storage(named(native, "to_q"), 0), storage(named(native, "to_q"), 1)} == {"int4"}
    assert (storage(named(clipped, "to_q"), 0), storage(named(clipped, "to_q"), 1)) == ("int8", "int4")
    np.testing.assert_allclose(next(evaluate(clipped, feeds)), next(evaluate(native, feeds)), atol=1e-5)


def test_4_bit_weights_of_a_convolution_are_stored_in_8_for_tensorrt() -> None:
    rng = np.random.default_rng(0)
    model = conv_net()
    quantized(model, {"x": rng.standard_normal((8, 3, 6, 6)).astype(np.float32)}, "tensorrt-rtx", activation_bits=4, weight_bits=4)
    node = named(model, "conv")
    codes = ir.constant(ir.producer(node.inputs[1]).inputs[0])  # type: ignore[union-attr]
    assert (storage(node, 0), storage(node, 1)) == ("int8", "int8") and codes is not None and np.abs(codes).max() <= 8


def conv_net() -> ir.Model:
    weight = ", ".join(f"{value:.3f}" for value in np.random.default_rng(1).standard_normal(108))
    return ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
        g (float[n, 3, 6, 6] x) => (float[n, 4, 4, 4] y) <float[4, 3, 3, 3] w = {{{weight}}}> {{ [conv] y = Conv(x, w) }}""")


@pytest.mark.parametrize("target", ["onnxruntime"])
def test_a_target_without_8_bit_floats_refuses_before_calibration(target: str) -> None:
    model, _ = attention()
    with pytest.raises(TargetError, match="does not take float8e4m3fn"):
        InsertQdq(format="fp8").precheck(model, get_target(target))


@pytest.mark.parametrize("wrong", [{"activation_bits": 4}, {"weight_bits": 6}, {"ranges": "mse"}, {"ranges": "entropy"}])
def test_what_8_bit_floats_do_not_go_with(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="fp8"):
        InsertQdq(format="fp8", **wrong)


@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("percentile", [99.0, 100.0])
def test_8_bit_floats(per_channel: bool, percentile: float) -> None:
    """Both sides of every product, attention included: five in a row here, each of which rounds to 3 bits of mantissa."""
    model, feeds = attention()
    before = next(evaluate(model, feeds))
    options = {"format": "fp8", "attention": True, "per_channel": per_channel, "ranges": "percentile", "percentile": percentile}
    quantized(model, feeds, "tensorrt-rtx", **options)
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert len(products) > 4 and {storage(node, side) for node in products for side in (0, 1)} == {"float8e4m3fn"}
    after = next(evaluate(model, feeds))
    error = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert 0 < error < 0.3


def test_shape_changes_move_integers_on_a_target_that_can() -> None:
    model, feeds = attention()
    before = next(evaluate(model, feeds))
    quantized(model, feeds, "onnxruntime")
    moved = named(model, "out").inputs[0].producer()  # type: ignore[union-attr]
    chain = [moved]
    while chain[-1].op_type != "QuantizeLinear":  # type: ignore[union-attr]
        chain.append(ir.producer(chain[-1].inputs[0]))  # type: ignore[union-attr]
    assert [node.op_type for node in chain if node] == ["DequantizeLinear", "Transpose", "Transpose", "QuantizeLinear"]
    error = next(evaluate(model, feeds)) - before
    assert np.linalg.norm(error) < 0.03 * np.linalg.norm(before)
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("bits", [4, 8])
def test_integers_below_eight_bits_are_not_moved(bits: int, run: Callable[..., np.ndarray]) -> None:
    model, feeds = attention()
    quantized(model, feeds, "onnxruntime", activation_bits=bits)
    moving = [node.inputs[0].dtype for node in model.graph if node.op_type == "Transpose" and node.outputs[0].name == "c_t"]
    assert moving == [ir.DataType.UINT8 if bits == 8 else ir.DataType.FLOAT]
    assert np.isfinite(run(model, feeds)).all()
