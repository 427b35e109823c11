"""Which blocked weights ONNX Runtime multiplies as codes (MatMulNBits), and TensorRT-RTX keeps in 4 bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

import graphq
from graphq import ir
from graphq.calibration import random_calibration
from graphq.kernels_used import kernels
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.round import Round
from graphq.pipeline import Pass, PassContext, run_passes
from graphq.recipe import parse_recipe
from graphq.spec import ModelInput
from graphq.targets import get_target
from graphq.verify import verify_graph

K, WIDTH = 512, 64
LAYERS = {"MatMul": "y = MatMul(x, w)", "Gemm": "y = Gemm(x, w, b)", "transB": "y = Gemm<transB = 1>(x, t, b)"}


def float_model(body: str) -> ir.Model:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((K, WIDTH)).astype(np.float32)
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, {K}] x) => (float[N, {WIDTH}] y) {{ {body} }}')
    arrays = {"w": weight, "t": weight.T.copy(), "b": np.zeros(WIDTH, np.float32)}
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used)
    return onnx_ir.from_proto(proto)


def stored(body: str, one: Pass, target: str = "onnxruntime") -> ir.Model:
    model = float_model(body)
    data = random_calibration([ModelInput("x", np.dtype(np.float32), (None, K))], 32)
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
    run_passes([one], ctx, verify_graph)
    return model


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group_size", [0, 16, 32, 64, 128, 256])
@pytest.mark.parametrize("case", LAYERS)
def test_onnxruntime_multiplies_codes(case: str, group_size: int, bits: int) -> None:
    """Of every width that is stored as it is, for a Gemm of either layout, and with one scale a channel as well."""
    found = kernels(stored(LAYERS[case], QuantizeWeights(bits=bits, group_size=group_size)))  # type: ignore[arg-type]
    assert found.counts == {"MatMulNBits": 1} and not found.floating and not found.conversions


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("case", LAYERS)
def test_so_it_does_of_what_round_stores(case: str, symmetric: bool) -> None:
    found = kernels(stored(LAYERS[case], Round(layers="all", group_size=32, symmetric=symmetric, algorithm="rtn")))
    assert found.counts == {"MatMulNBits": 1} and not found.floating


def test_codes_of_a_table_are_decoded_at_load_and_multiplied_as_floats() -> None:
    found = kernels(stored(LAYERS["MatMul"], QuantizeWeights(format="nf4", group_size=32)))
    assert not found.counts and not found.conversions and [kernel.op_type for kernel in found.floating] == ["MatMul"]


@pytest.mark.parametrize("group_size", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("case", LAYERS)
def test_tensorrt_rtx_keeps_four_bits(case: str, group_size: int, tmp_path: Path) -> None:
    """With float16 activations, which is what its kernels for 4-bit weights read."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed")
    model = float_model(LAYERS[case])
    onnx.save(ir.to_proto(model), tmp_path / "m.onnx")
    recipe = parse_recipe(f"passes:\n- normalize\n- quantize-weights: {{bits: 4, group_size: {group_size}}}\n- cast-float\n", "w4a16")
    x = np.random.default_rng(0).standard_normal((32, K)).astype(np.float32)
    report = graphq.convert(tmp_path / "m.onnx", tmp_path / "m.engine", recipe=recipe, calib={"x": x}, target="tensorrt-rtx", emit="engine")
    assert report.engine is not None and report.engine.counts == {"float16 x int4": 1}
