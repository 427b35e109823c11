"""Models go through `graphq.convert` to TensorRT-RTX engines. They are built, not run: even loading an engine needs a GPU."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphq
from graphq import ir
from graphq.engines import EngineOptions
from graphq.errors import TargetError, VerifyError
from graphq.models import digits, onnx_path
from graphq.recipe import parse_recipe

pytestmark = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                                reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")  # fmt: skip

ASSETS = Path(__file__).resolve().parents[3] / "shared" / "assets"
RECIPES = ("int8", "int8-weight-only", "int4-weight-only")


def to_engine(model: Path, folder: Path, recipe: str, calib: Mapping[str, np.ndarray]) -> bytes:
    before = model.read_bytes()
    out = folder / "m.engine"
    report = graphq.convert(model, out, recipe=recipe, calib=calib, target="tensorrt-rtx", emit="engine")
    engine = out.read_bytes()
    assert engine.startswith(b"vtrt") and len(engine) > 100_000  # compiled code alone is more than that
    assert report.output.bytes == len(engine)
    assert report.quantized and model.read_bytes() == before
    assert list(folder.iterdir()) == [out]
    return engine


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["digits_vit", "digits_cnn"])
def test_digits(name: str, recipe: str, tmp_path: Path) -> None:
    to_engine(onnx_path(name), tmp_path, recipe, {"input": digits.calibration(32)})


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "mobilenet_v2_1.0_224", "squeezenet1_1", "minilm_l6_stsb"])
def test_real_models(name: str, assets: ModuleType, tmp_path: Path) -> None:
    to_engine(ASSETS / "models" / f"{name}.onnx", tmp_path, "int8", assets.calibration(name, 16))


HALF = {
    "fp16": ("- cast-float", "float16 x float16", 26, 9),
    "bf16": ("- cast-float: {precision: bf16}", "bfloat16 x bfloat16", 26, 9),
    "int8 and fp16": ("- insert-qdq\n- cast-float", "int8 x int8", 14, 9),
    "int8 and bf16": ("- insert-qdq\n- cast-float: {precision: bf16}", "int8 x int8", 14, 9),
    "int4 and fp16": ("- quantize-weights: {bits: 4, group_size: 32, fallback_bits: 8}\n- cast-float", "float16 x int4", 17, 1),
}
"""Passes, types of operands, and how many linear nodes of digits_vit and of digits_cnn get them in the engine, at least."""


@pytest.mark.parametrize("case", HALF)
@pytest.mark.parametrize("name", ["digits_vit", "digits_cnn"])
def test_half_precision(name: str, case: str, tmp_path: Path) -> None:
    passes, types, *least = HALF[case]
    recipe, out = parse_recipe(f"passes:\n- normalize\n{passes}\n", "half"), tmp_path / "m.engine"
    calib = {"input": digits.calibration(32)}
    report = graphq.convert(onnx_path(name), out, recipe=recipe, calib=calib, target="tensorrt-rtx", emit="engine")
    assert out.read_bytes().startswith(b"vtrt") and report.comparison[0].sqnr_db > 25
    assert report.engine is not None and report.engine.counts[types] >= least[name == "digits_cnn"]


def test_an_export_in_float16(tmp_path: Path) -> None:
    """Recipe fp16 changes nothing in it, and the engine is built."""
    text = '<ir_version: 10, opset_import: ["" : 17]> g (float16[n, 64] x) => (float16[n, 64] y) { h = MatMul(x, w) y = Relu(h) }'
    model, weight = onnx.parser.parse_model(text), np.random.default_rng(0).standard_normal((64, 64)).astype(np.float16)
    model.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    onnx.save(model, tmp_path / "m.onnx")
    report = graphq.convert(tmp_path / "m.onnx", tmp_path / "m.engine", recipe="fp16", calib={"x": weight}, target="tensorrt-rtx",
                            emit="engine")  # fmt: skip
    assert report.engine is not None and report.engine.counts == {"float16 x float16": 1} and not report.passes[-1].edits


@pytest.mark.parametrize("opset", [20, 23])
def test_integer_kernels_with_float16_between_them_at_any_opset(opset: int, tmp_path: Path) -> None:
    """A Cast between a DequantizeLinear and its product leaves no integer kernel."""
    onnx.save(onnx.version_converter.convert_version(onnx.load(onnx_path("digits_vit")), opset), tmp_path / "m.onnx")
    report = graphq.convert(tmp_path / "m.onnx", tmp_path / "m.engine", recipe="int8-fp16", calib={"input": digits.calibration(32)},
                            target="tensorrt-rtx", emit="engine")  # fmt: skip
    assert report.engine is not None and report.engine.counts["int8 x int8"] >= 26 and not report.engine.unfused


@pytest.mark.parametrize("passes", [
    "- ln-reparam: {bits: 8}", "- sulq-softmax: {bits: 4}", "- sulq-softmax: {bits: 4, quantizer: log2}",
    "- ln-reparam: {bits: 8}\n- sulq-softmax: {bits: 4}\n- insert-qdq",
])  # fmt: skip
def test_low_bit_quantizers_of_a_real_model(passes: str, assets: ModuleType, tmp_path: Path) -> None:
    """In their symmetric forms."""
    recipe = parse_recipe(f"passes:\n- normalize\n{passes}\ngates: {{max_size_ratio: 2}}\n", "low-bit")
    model, out = ASSETS / "models" / "vit_tiny_patch16_224.onnx", tmp_path / "m.engine"
    calib = assets.calibration("vit_tiny_patch16_224", 8)
    report = graphq.convert(model, out, recipe=recipe, calib=calib, target="tensorrt-rtx", emit="engine")
    assert out.read_bytes().startswith(b"vtrt") and report.comparison[0].sqnr_db > 12


def test_sparse_and_integer_weights_in_one_engine(tmp_path: Path) -> None:
    """2:4 weights keep their zeros as integers. Kernels are picked where the engine is loaded, so nothing is claimed about them."""
    model = onnx.load(onnx_path("digits_vit"))
    for tensor in model.graph.initializer:
        weight = numpy_helper.to_array(tensor)
        if weight.ndim == 2 and weight.shape[0] % 4 == 0 and min(weight.shape) > 4:
            groups = weight.T.reshape(-1, 4).copy()
            np.put_along_axis(groups, np.argsort(np.abs(groups), axis=1)[:, :2], 0, axis=1)
            tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(groups.reshape(weight.T.shape).T), tensor.name))
    onnx.save(model, tmp_path / "sparse.onnx")
    report = graphq.convert(tmp_path / "sparse.onnx", tmp_path / "m.engine", calib={"input": digits.calibration(16)}, target="tensorrt-rtx",
                            emit="engine", engine=EngineOptions(sparse=True))  # fmt: skip
    assert report.engine is not None and report.engine.options.sparse and report.engine.sparse_kernels is None
    assert report.engine.counts["int8 x int8"] >= 17 and not report.engine.unfused
    assert report.engine.not_run or report.engine.sqnr_db


NONZERO = """<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 3] y, int64[2, k] z)
    <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}> { y = MatMul(x, w) [found] z = NonZero(x) }"""


@pytest.mark.parametrize("emit", ["onnx", "engine"])
def test_what_the_parser_refuses_is_refused_before_calibration(emit: str, tmp_path: Path) -> None:
    """By the parser itself, where it is installed, for files that are only meant for it as well."""
    ir.save(ir.from_onnx_text(NONZERO), tmp_path / "m.onnx")
    seen: list[str] = []
    with pytest.raises(TargetError, match="parser of tensorrt-rtx refuses") as caught:
        graphq.convert(tmp_path / "m.onnx", tmp_path / f"out.{emit}", calib={"x": np.ones((16, 4), np.float32)}, target="tensorrt-rtx",
                       emit=emit, progress=lambda what, done, total: seen.append(what))  # fmt: skip
    assert "NonZero 'found'" in caught.value.where and "calibrate" not in seen and [file.name for file in tmp_path.iterdir()] == ["m.onnx"]


def test_a_size_that_somebody_asks_for_holds_for_engines(tmp_path: Path) -> None:
    """Code makes a small engine larger than the model; only a limit that is stated refuses that."""
    arguments = {"calib": {"input": digits.calibration(16)}, "target": "tensorrt-rtx", "emit": "engine", "recipe": "fp16"}
    report = graphq.convert(onnx_path("digits_cnn"), tmp_path / "m.engine", **arguments)
    assert report.output.bytes > report.model.bytes
    with pytest.raises(VerifyError, match="max_size_ratio is 1, measured"):
        graphq.convert(onnx_path("digits_cnn"), tmp_path / "n.engine", limits={"max_size_ratio": 1.0}, **arguments)
    assert not (tmp_path / "n.engine").exists()


def test_sizes_are_those_that_were_asked_for(tmp_path: Path) -> None:
    model = onnx.load(onnx_path("digits_cnn"))
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = "hw"
    model.graph.ClearField("value_info")
    onnx.save(model, tmp_path / "open.onnx")
    arguments = {"calib": {"input": digits.calibration(16)}, "target": "tensorrt-rtx", "emit": "engine", "recipe": "fp16"}
    report = graphq.convert(tmp_path / "open.onnx", tmp_path / "m.engine", **arguments)
    assert report.engine is not None and report.engine.shapes["input"][2][2] == 32
    assert any("no more than the calibration data has in input axis 2 (hw)" in note for note in report.notes)
    asked = {"input": ((1, 2, 4), (1, 1, 1), (32, 32, 64), (32, 32, 64))}
    report = graphq.convert(tmp_path / "open.onnx", tmp_path / "m.engine", engine={"shapes": asked}, **arguments)
    assert report.engine is not None and report.engine.shapes == asked and not report.engine.capped


RESIDUALS = {
    "branches": "- svd-branch: {rank: 8, weight_bits: 8, activation_bits: 8, min_gain_db: 0}\n- insert-qdq: {error_samples: 0}",
    "products of residuals": "- insert-qdq: {weights: false, error_samples: 0}\n- residual-expand: {gamma: 0.5, bits: 8}",
    "sums of residuals": "- residual-expand: {gamma: 0.5, bits: 4, group_size: 32}",
    "residual channels": "- residual-channels: {format: nvfp4}\n- block-float: {activations: false}",
}


@pytest.mark.parametrize("case", RESIDUALS)
def test_branches_and_residuals(case: str, tmp_path: Path) -> None:
    """The builder takes what stands beside a product, or sums up to its weight."""
    recipe, out = parse_recipe(f"passes:\n- normalize\n{RESIDUALS[case]}\n", case), tmp_path / "m.engine"
    calib = {"input": digits.calibration(32)}
    report = graphq.convert(onnx_path("digits_vit"), out, recipe=recipe, calib=calib, target="tensorrt-rtx", emit="engine")
    assert out.read_bytes().startswith(b"vtrt") and report.quantized["MatMul"] >= 16


CODES_OF_TABLES = {
    "nf4": "- quantize-weights: {format: nf4, group_size: 32}",
    "outliers": "- outliers: {min_gain_db: 0}",
    "higgs": "- higgs: {bits: 4}",
    "higgs at run time": "- higgs: {bits: 4, where: activations}",
}


@pytest.mark.parametrize("case", CODES_OF_TABLES)
def test_several_layers_with_codes_of_a_table(case: str, tmp_path: Path) -> None:
    """Bodies of functions that dequantize are put in place: the parser takes each of them once only."""
    recipe, out = parse_recipe(f"passes:\n- normalize\n{CODES_OF_TABLES[case]}\n", case), tmp_path / "m.engine"
    arguments = {"recipe": recipe, "calib": {"input": digits.calibration(32)}, "target": "tensorrt-rtx"}
    report = graphq.convert(onnx_path("digits_vit"), out, emit="engine", **arguments)
    assert out.read_bytes().startswith(b"vtrt") and report.quantized["MatMul"] >= 16 and report.comparison[0].sqnr_db > 15
    graphq.convert(onnx_path("digits_vit"), tmp_path / "m.onnx", **arguments)
    assert not {name for name in ir.load(tmp_path / "m.onnx").functions if name[1] == "LookupWeight"}
