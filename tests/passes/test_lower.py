"""lower: quantized products become operators of graphq.ops, with the same results and a body that any runtime has."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import ir, ops_gemm
from graphq.backends.plugins import bind
from graphq.calibration import open_calibration
from graphq.errors import TargetError
from graphq.executor import Executor
from graphq.passes.cast_float import CastFloat
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.lower import Lower
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.sulq_softmax import SulqSoftmax
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph

NET = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 3, 64] x, float[64, 96] w1, float[40, 96] w2, float[40] b2) => (float[m, 40] y) <int64[2] rows = {-1, 96}> {
    [first] h = MatMul(x, w1)
    a = Relu(h)
    flat = Reshape(a, rows)
    [second] y = Gemm<transB = 1>(flat, w2, b2)
}"""


Lowered = Callable[..., tuple[ir.Model, ir.Model, dict[str, np.ndarray], PassRecord]]


@pytest.fixture
def lowered(weighted: Callable[[str, np.random.Generator], ir.Model]) -> Lowered:
    """The model before and after `lower`, its inputs, and what `lower` says."""

    def lowered(*passes: Pass, text: str = NET, target: str = "generic", **options: Any) -> Any:
        rng = np.random.default_rng(0)
        model = weighted(text, rng)
        feeds = {"x": rng.normal(size=(16, 3, 64)).astype(np.float32)}
        data = open_calibration(feeds, ir.inputs(model))
        ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
        run_passes([Normalize(), *passes], ctx, verify_graph)
        before = ir.clone(model)
        (record,) = run_passes([Lower(**options)], ctx, verify_graph)
        return before, model, feeds, record

    return lowered


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph if node.domain == ir.DOMAIN]


W4 = QuantizeWeights(bits=4, group_size=32)
W8A8 = InsertQdq(error_samples=0)
W4A8 = InsertQdq(error_samples=0, weight_bits=4)
HALF = CastFloat(precision="fp16")
TABLE = {
    "W4A16Gemm in half": (W4, HALF), "W4A16Gemm by channel in half": (QuantizeWeights(bits=4), HALF),
    "W8A8Gemm": (W8A8,), "W8A8Gemm by tensor": (InsertQdq(error_samples=0, per_channel=False),), "W4A8Gemm": (W4A8,),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_the_result_is_that_of_q_dq(lowered: Lowered, name: str) -> None:
    before, after, feeds, record = lowered(*TABLE[name])
    assert operators(after) == [name.split()[0]] * 2 and not record.skipped
    assert not any(node.op_type in ("MatMul", "Gemm") for node in after.graph)
    want, got = (np.asarray(Executor(model).run(feeds)[0]) for model in (before, after))
    assert want.shape == got.shape == (48, 40)
    np.testing.assert_allclose(got, want, atol=(0.05 if "half" in name else 1e-4) * np.abs(want).max())
    reference = ReferenceEvaluator(ir.to_proto(after)).run(None, feeds)[0]
    np.testing.assert_allclose(reference, got, atol=(0.01 if "half" in name else 1e-4) * np.abs(want).max())
    onnx.checker.check_model(ir.to_proto(after), full_check=True)


def test_the_weight_is_packed_as_the_contract_says(lowered: Lowered) -> None:
    before, after, _, _ = lowered(W4, HALF)
    node = next(node for node in after.graph if node.domain == ir.DOMAIN)
    codes = next(ir.constant(node.inputs[0]) for node in before.graph if node.op_type == "DequantizeLinear")
    assert codes is not None
    packed = ir.constant(node.inputs[1])
    assert packed is not None and packed.nbytes == 64 * 96 / 2
    np.testing.assert_array_equal(ops_gemm.unpack_int4(packed, 64), codes.astype(np.int8))


@pytest.mark.parametrize(("passes", "options", "reason"), [
    ((QuantizeWeights(bits=8),), {}, "8-bit weights with float activations"),
    ((W8A8,), {"operators": ("W4A16Gemm",)}, "W8A8Gemm is not among the operators"),
    ((InsertQdq(error_samples=0, weights=False), QuantizeWeights(bits=8, group_size=32)), {}, "W8A8Gemm takes one scale a channel"),
    ((W4,), {}, "no kernel of W4A16Gemm takes float32; put cast-float before lower"),
    ((W4, HALF), {"min_size": 10_000}, "fewer than 10000 weights"),
    ((W4, HALF), {"exclude": ("second",)}, "excluded by the recipe"),
    ((QuantizeWeights(bits=4, group_size=16), HALF), {}, "but one row, or as many as make groups of a multiple of 32"),
    ((QuantizeWeights(bits=4, exclude=("first",)), HALF), {}, "its weight is not quantized"),
])  # fmt: skip
def test_what_stays_is_named(lowered: Lowered, passes: tuple[Pass, ...], options: dict[str, Any], reason: str) -> None:
    _, after, _, record = lowered(*passes, allow_no_effect=True, **options)
    assert any(reason in why for _, why in record.skipped)
    stayed = [node for node in after.graph if node.op_type in ("Gemm", "MatMul") and not node.domain]
    assert len(stayed) == len(record.skipped) and len(operators(after)) == 2 - len(stayed)
    assert all(f"'{node.name}'" in what for node, (what, _) in zip(stayed, record.skipped, strict=True))


@pytest.mark.parametrize("attribute", ["alpha = 2.0", "beta = 0.5", "transA = 1"])
def test_a_gemm_that_does_more_stays(attribute: str) -> None:
    weight = ", ".join(str(index % 7 - 3) for index in range(1024))
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]> g (float[32, 32] x) => (float[32, 32] y)
        <int8[32, 32] w = {{{weight}}}, float s = {{0.1}}, int8 z = {{0}}, float[32] b = {{{", ".join(["1"] * 32)}}}>
        {{
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear(w, s)
            [fc] y = Gemm<{attribute}>(xd, wd, b)
        }}""")
    data = open_calibration({"x": np.ones((32, 32), np.float32)}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("generic"))
    _, record = run_passes([Normalize(), Lower(allow_no_effect=True)], ctx, verify_graph)
    assert not operators(model) and "scales or transposes" in record.skipped[0][1]


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
def test_a_target_without_plugins_is_refused(target: str) -> None:
    with pytest.raises(TargetError, match="no plugins"):
        Lower().precheck(ir.from_onnx_text(NET), get_target(target))


ATTENTION = """<ir_version: 10, opset_import: ["" : 21]> g (float[b, 3, 7, 7] s, float[b, 3, 7, 5] v) => (float[b, 3, 7, 5] y) {
    [softmax] p = Softmax<axis = -1>(s)
    [mix] y = MatMul(p, v)
}"""


def attention(bits: int, text: str = ATTENTION, **options: Any) -> tuple[ir.Model, ir.Model, dict[str, np.ndarray], PassRecord]:
    rng = np.random.default_rng(0)
    model = ir.from_onnx_text(text)
    shapes = {value.name: (8, *(int(size) for size in (ir.shape_of(value) or ())[1:])) for value in model.graph.inputs}  # type: ignore[arg-type]
    feeds = {name or "": 3 * rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    data = open_calibration(feeds, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("tensorrt"))
    run_passes([Normalize(), SulqSoftmax(bits=bits, quantizer=options.pop("quantizer", "sulq"))], ctx, verify_graph)
    if options.pop("returned", False):
        model.graph.outputs.append(next(node for node in model.graph if node.domain == ir.DOMAIN).outputs[0])
    before = ir.clone(model)
    (record,) = run_passes([Lower(allow_no_effect=True, **options)], ctx, verify_graph)
    return before, model, feeds, record


@pytest.mark.parametrize(("bits", "options", "made"), [
    (4, {}, ["SULQSoftmaxCodes", "SULQAttentionValue"]), (3, {}, ["SULQSoftmaxCodes", "SULQAttentionValue"]), (8, {}, ["SULQSoftmax"]),
    (4, {"operators": ("SULQSoftmax",)}, ["SULQSoftmax"]), (4, {"quantizer": "log2"}, ["SULQSoftmaxCodes", "SULQAttentionValue"]),
])  # fmt: skip
def test_attention_weights_become_codes(bits: int, options: dict[str, Any], made: list[str]) -> None:
    before, after, feeds, record = attention(bits, **options)
    assert operators(after) == made and not any(node.op_type == "Softmax" for node in after.graph)
    assert (not record.skipped) == ("SULQAttentionValue" in made)  # the product of floats is named as not quantized
    want, got = (np.asarray(Executor(model).run(feeds)[0]) for model in (before, after))
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("returned", ["softmax", "levels"])
@pytest.mark.parametrize("bits", [4, 8])
def test_attention_weights_that_the_model_returns(bits: int, returned: str) -> None:
    """Levels may be returned, but not as codes; a softmax that is returned is not to be quantized."""
    text = ATTENTION.replace(" y)", " y, float[b, 3, 7, 7] p)") if returned == "softmax" else ATTENTION
    before, after, feeds, record = attention(bits, text, returned=returned == "levels")
    assert operators(after) == (["SULQ"] if returned == "softmax" else ["SULQSoftmax"])
    reason = "the model returns what it reads" if returned == "softmax" else "what the model returns" if bits == 4 else "more than 4 bits"
    assert any(reason in why for _, why in record.skipped)
    assert [value.name for value in after.graph.outputs] == [value.name for value in before.graph.outputs]
    for want, got in zip(Executor(before).run(feeds), Executor(after).run(feeds), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("options", "reason"), [
    ({"quantizer": "log-sqrt2"}, "no kernel has its levels"), ({"operators": ("W8A8Gemm",)}, "SULQSoftmax is not among the operators"),
    ({"exclude": ("softmax",)}, "excluded by the recipe"), ({"exclude": ("SULQ",)}, "excluded by the recipe"),
])  # fmt: skip
def test_attention_weights_that_stay(options: dict[str, Any], reason: str) -> None:
    before, after, _, record = attention(4, **options)
    assert operators(after) == operators(before) and any(reason in why for _, why in record.skipped)


@pytest.mark.parametrize(("text", "options", "reason"), [
    (ATTENTION, {"exclude": ("mix",)}, "its product is excluded by the recipe"),
    (ATTENTION.replace("7, 5]", "7, 257]"), {}, "D of at most 256"),
])  # fmt: skip
def test_a_product_that_stays_gets_levels(text: str, options: dict[str, Any], reason: str) -> None:
    before, after, feeds, record = attention(4, text, **options)
    assert [node.op_type for node in after.graph] == ["SULQSoftmax", "MatMul"]
    assert next(why for what, why in record.skipped if "'mix'" in what).endswith(reason)
    np.testing.assert_allclose(Executor(after).run(feeds)[0], Executor(before).run(feeds)[0], atol=1e-4)


SHARED = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 3, 64] x, float[64, 64] w) => (float[m, 64] y) <int64[2] rows = {-1, 64}> {
    h = MatMul(x, w)
    a = Relu(h)
    b = MatMul(a, w)
    t = Reshape(b, rows)
    y = Gemm<transB = 1>(t, w)
}"""


@pytest.mark.parametrize("passes", [(W4, HALF), (W8A8,)])
def test_a_weight_that_products_share_is_packed_once(lowered: Lowered, passes: tuple[Pass, ...]) -> None:
    """Once as it is, and once turned."""
    _, model, _, _ = lowered(*passes, text=SHARED)
    first, second, turned = (node for node in model.graph if node.domain == ir.DOMAIN)
    assert first.inputs[1] is second.inputs[1] is not turned.inputs[1]
    assert first.inputs[-1] is second.inputs[-1] and first.op_type == turned.op_type


def test_plugins_take_the_place_of_the_bodies(lowered: Lowered) -> None:
    """Bytes stay as they are; the functions, which TensorRT would put in, go."""
    _, model, _, _ = lowered(W4, HALF, target="tensorrt")
    packed = [ir.constant(node.inputs[1]) for node in model.graph if node.domain == ir.DOMAIN]
    bind(model)
    bound = [node for node in model.graph if node.domain == ir.DOMAIN]
    assert len(bound) == 2 and not model.functions
    for node, before in zip(bound, packed, strict=True):
        after = ir.constant(node.inputs[1])
        assert after is not None and after.dtype == np.int8 and before is not None and after.tobytes() == before.tobytes()
        assert {"plugin_namespace", "plugin_version", "aot"} <= set(node.attributes)
