"""block-float: products on small floats in blocks; the graph, ONNX's reference, and the emulation in float32 agree."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import block_floats, half, ir
from graphq.backends import tensorrt
from graphq.backends.engine_layers import facts, read_plan
from graphq.block_floats import BLOCKS, FormatName
from graphq.calibration import open_calibration, random_calibration
from graphq.errors import TargetError
from graphq.executor import Executor
from graphq.passes.block_float import HEADROOM, BlockFloat
from graphq.passes.cast_float import CastFloat
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph

FORMATS = list(BLOCKS)
NET = """<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 3, 64] x, float[64, 96] w1, float[40, 96] w2, float[40] b2, float[30, 8] w3) => (float[m, 40] y, float[n, 3, 8] z)
    <int64[2] rows = {-1, 96}, int64[1] from = {0}, int64[1] to = {30}, int64[1] last = {2}> {
    [first] h = MatMul(x, w1)
    a = Relu(h)
    flat = Reshape(a, rows)
    [second] y = Gemm<transB = 1>(flat, w2, b2)
    part = Slice(x, from, to, last)
    [odd] z = MatMul(part, w3)
}"""


Weighted = Callable[[str, np.random.Generator], ir.Model]
Net = Callable[[], tuple[ir.Model, dict[str, np.ndarray]]]
Converted = Callable[..., tuple[ir.Model, dict[str, np.ndarray], PassRecord]]


def quantized(exact: ir.Model, x: np.ndarray, target: str = "tensorrt", **options: Any) -> tuple[ir.Model, PassRecord]:
    model = ir.clone(exact)
    data = open_calibration({"x": x}, ir.inputs(model))
    ctx = PassContext(model=model, reference=exact, calib=data, held_out=data, target=get_target(target))
    _, record = run_passes([Normalize(), BlockFloat(**options)], ctx, verify_graph)
    return model, record


@pytest.fixture
def net(weighted: Weighted) -> Net:
    def net() -> tuple[ir.Model, dict[str, np.ndarray]]:
        rng = np.random.default_rng(0)
        model = weighted(NET, rng)
        x = rng.normal(size=(8, 3, 64)).astype(np.float32)
        x[0, 0] = 0  # whole blocks of zeros
        return model, {"x": x * np.exp(2 * rng.normal(size=(1, 1, 64))).astype(np.float32)}

    return net


@pytest.fixture
def converted(net: Net) -> Converted:
    def converted(target: str = "tensorrt", **options: Any) -> tuple[ir.Model, dict[str, np.ndarray], PassRecord]:
        exact, feeds = net()
        model, record = quantized(exact, feeds["x"], target, **options)
        return model, feeds, record

    return converted


# ---- arrays ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_blocks_hold_what_they_say(kind: FormatName) -> None:
    rng = np.random.default_rng(0)
    weight = (rng.standard_normal((96, 7)) * np.exp(3 * rng.standard_normal((96, 7)))).astype(np.float32)
    weight[:32] = 0
    found, block = block_floats.quantize(weight, kind), BLOCKS[kind]
    assert found.codes.shape == weight.shape and found.scale.shape == (96 // block, 7) and np.isfinite(found.scale).all()
    if found.scale_codes is not None and found.tensor_scale is not None:
        np.testing.assert_array_equal(found.scale, found.scale_codes.astype(np.float32) * found.tensor_scale)
    else:
        np.testing.assert_array_equal(np.log2(found.scale), np.round(np.log2(found.scale)))
        assert np.abs(found.codes.astype(np.float32)).max() <= 448
    back = found.dequantize()
    assert not back[:32].any() and np.isfinite(back).all()
    top = np.repeat(np.abs(weight.reshape(-1, block, 7)).max(1), block, axis=0)
    step = {"nvfp4": 1 / 6 + 1 / 16, "mxfp8": 1 / 14}[kind]  # half of the widest step, and what rounding the scale adds
    whole = 0.5 * block_floats.FLOOR * float(found.tensor_scale or 0)  # a block far below the tensor's largest
    assert (np.abs(back - weight) <= step * top + whole).all()


def test_the_grid_of_4_bits() -> None:
    block = np.array([[0, 0.24, 0.26, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 5.1, 6, -6, -0.5, -3, -1, 2]], np.float32).T
    codes = block_floats.quantize(block, "nvfp4").codes
    assert codes.dtype == ml_dtypes.float4_e2m1fn
    np.testing.assert_array_equal(codes[:, 0].astype(np.float32), [0, 0, 0.5, 1, 1, 2, 2, 4, 4, 6, 6, -6, -0.5, -3, -1, 2])


# ---- graphs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", [True, False])
@pytest.mark.parametrize("kind", FORMATS)
def test_the_emulation_is_what_onnx_defines(converted: Converted, kind: FormatName, activations: bool) -> None:
    """ONNX Runtime has no 4-bit floats: it runs the emulation, and ONNX's reference evaluator the graph itself."""
    model, feeds, record = converted(format=kind, activations=activations)
    assert [reason for _, reason in record.skipped] == [f"its 30 inputs are not a multiple of the block of {BLOCKS[kind]}"]
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    ours, reference = Executor(model).run(feeds), ReferenceEvaluator(proto).run(None, feeds)
    for got, want in zip(ours, reference, strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_more_bits_lose_less(converted: Converted, net: Net) -> None:
    exact, feeds = net()
    want = Executor(exact).run(feeds)[0]
    errors = {kind: np.linalg.norm(Executor(converted(format=kind)[0]).run(feeds)[0] - want) / np.linalg.norm(want) for kind in FORMATS}
    assert 0 < errors["mxfp8"] < 0.1 and 2 * errors["mxfp8"] < errors["nvfp4"] < 0.3


def test_a_model_without_4_bits_is_its_own_emulation(net: Net) -> None:
    model, _ = net()
    assert block_floats.emulated(model) is model


@pytest.mark.parametrize("options", [{"exclude": ("first",)}, {"exclude": ("Gemm",)}])
def test_what_is_excluded_stays(converted: Converted, options: dict[str, Any]) -> None:
    model, _, record = converted(**options)
    assert "excluded by the recipe" in {reason for _, reason in record.skipped}
    assert sum(node.op_type == "QuantizeLinear" for node in model.graph) == 2  # codes, and scales of blocks


@pytest.mark.parametrize("kind", FORMATS)
def test_a_target_without_small_floats_refuses_before_calibration(net: Net, kind: FormatName) -> None:
    with pytest.raises(TargetError, match="does not take float"):
        BlockFloat(format=kind).precheck(net()[0], get_target("onnxruntime"))


def test_nothing_to_quantize_is_refused_before_calibration(net: Net) -> None:
    with pytest.raises(TargetError, match=r"nothing to quantize(?s:.*)excluded by the recipe(?s:.*)a multiple of 16 inputs"):
        BlockFloat(exclude=("first", "second")).precheck(net()[0], get_target("tensorrt"))


ONE = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 64] x, float[64, 96] w) => (float[n, 96] y) {
    h = Relu(x)
    [fc] y = MatMul(h, w)
}"""


def test_values_beyond_calibration_fit_up_to_the_headroom(weighted: Weighted) -> None:
    rng = np.random.default_rng(0)
    exact = weighted(ONE, rng)
    x = rng.normal(size=(32, 64)).astype(np.float32)
    model, _ = quantized(exact, x)
    sqnr = []
    for factor in (1, HEADROOM, 20 * HEADROOM):
        want, got = (np.asarray(Executor(one).run({"x": np.float32(factor) * x})[0], np.float64) for one in (exact, model))
        sqnr.append(10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)))
    assert sqnr[0] > 15 and abs(sqnr[1] - sqnr[0]) < 1 and sqnr[2] < 3


def test_what_calibration_never_saw_stays_float(weighted: Weighted) -> None:
    """It has no scale, and the operator set stays as it was: nothing was chosen."""
    exact = weighted(ONE, np.random.default_rng(0))
    model, record = quantized(exact, -np.ones((8, 64), np.float32), allow_no_effect=True)
    assert record.skipped[0][1] == "calibration saw nothing but zeros in its input"
    assert not record.edits and ir.opset(model) == 21


@pytest.mark.parametrize("kind", FORMATS)
def test_a_weight_that_products_share_is_stored_once(weighted: Weighted, kind: FormatName) -> None:
    """Once as it is, and once in blocks along the other axis."""
    text = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 64] x, float[64, 64] w) => (float[n, 64] y) {
        h = MatMul(x, w)
        t = MatMul(h, w)
        y = Gemm<transB = 1>(t, w)
    }"""
    model, record = quantized(weighted(text, np.random.default_rng(0)), np.ones((8, 64), np.float32), format=kind)
    assert not record.skipped
    codes = [value for value in model.graph.initializers.values() if ir.shape_of(value) == (64, 64)]
    assert sorted(len(value.uses()) for value in codes) == [1, 2]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_not_quantized_may_become_half(kind: FormatName, precision: Literal["fp16", "bf16"]) -> None:
    """How such models are deployed. Passes find the values of 4 bits by name, and the run is that of half precision."""
    model = ir.load(Path(__file__).parents[2] / "models" / "digits_vit.onnx")
    data = random_calibration(ir.inputs(model), 8)
    exact = ir.clone(model)
    ctx = PassContext(model=model, reference=exact, calib=data, held_out=data, target=get_target("tensorrt"))
    run_passes([Normalize(), BlockFloat(format=kind), CastFloat(precision=precision)], ctx, verify_graph)
    storage = {"fp16": "FLOAT16", "bf16": "BFLOAT16"}[precision]
    products = [node for node in model.graph if node.op_type == "MatMul"]
    assert products and all(str(node.outputs[0].dtype) == storage for node in products)
    wide = half.emulated(block_floats.emulated(model))
    assert all(node.op_type == "Cast" or not any(map(half.is_half, node.outputs)) for node in wide.graph)
    (batch,) = data.batches(8)
    want, got = (Executor(one).run(batch)[0] for one in (exact, model))
    assert 10 * np.log10(np.sum(want**2) / np.sum((want - got) ** 2)) > {"nvfp4": 8, "mxfp8": 18}[kind]


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                    reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")  # fmt: skip
@pytest.mark.parametrize(("kind", "got"), [("nvfp4", "float4e2m1 x float4e2m1"), ("mxfp8", "float32 x float32")])
def test_what_the_builder_makes_of_it(converted: Converted, kind: FormatName, got: str, tmp_path: Path) -> None:
    """4-bit kernels for NVFP4, from plain Q/DQ; TensorRT-RTX 1.7 takes MXFP8 too, but computes in floats."""
    model, feeds, _ = converted("tensorrt-rtx", format=kind)
    ir.save(model, tmp_path / "m.onnx")
    built = tensorrt.build(tmp_path / "m.onnx", {"x": feeds["x"].shape}, get_target("tensorrt-rtx"))
    nodes = {node.node: node for node in facts(model, read_plan(built.plan)).nodes}
    assert nodes["first"].got == nodes["second"].got == got
