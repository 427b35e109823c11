"""The built-in recipes on trained networks with real data: accuracy, size, and a report that tells the truth about the file."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from graphq import ir, kernels_used, linear, report
from graphq.convert import convert
from graphq.executor import decode
from graphq.gates import Gates
from graphq.inspect import compare_files
from graphq.models import digits, onnx_path
from graphq.passes.sos import Sos
from graphq.recipe import Recipe, builtin_recipes, load_recipe
from graphq.report import Report
from graphq.targets import TARGETS, require_legal

MODELS = ("digits_cnn", "digits_vit")
SHARES = {"int8": 0.27, "int8-fp16": 0.27, "int8-weight-only": 0.27, "int4-weight-only": 0.17}
"""Bytes of the quantized weights with their scales, of what they were."""

CALIBRATED = {"int8", "int8-fp16"}


LOW_BIT = {
    ("digits_vit", "w8a8-vit"): (1, 0.27),
    ("digits_vit", "w6a6-vit"): (2, 0.27),
    ("digits_vit", "w4a4-vit"): (15, 0.16),
    ("digits_vit", "w4a4-vit-sos"): (15, 0.16),
    ("digits_vit", "w4a4-svdquant"): (12, 0.20),
    ("digits_vit", "w3a4-vit"): (25, 0.17),
    ("digits_vit", "w4a8"): (2, 0.16),
    ("digits_cnn", "w4a8"): (2, 0.16),
    ("digits_vit", "w4a4-wush"): (15, 0.16),
    ("digits_vit", "w4a16-gptq"): (2, 0.16),
    ("digits_vit", "w4a16-gptq-g32"): (2, 0.18),
    ("digits_vit", "w4a16-awq"): (2, 0.16),
    ("digits_vit", "nested-8-6-4-2"): (1, 0.27),
    ("digits_cnn", "nested-8-6-4-2"): (1, 0.27),
    ("digits_vit", "w3a16-higgs"): (2, 0.18),
    ("digits_vit", "mixed"): (2, 0.20),
    ("digits_cnn", "mixed"): (2, 0.20),
}
"""Points of accuracy that may be lost, and the share of the quantized weights' bytes, by model and recipe."""

HALF = {"fp16": 48, "bf16": 28}
"""What the outputs keep, in dB."""

FLOATS = {"fp8": ("FLOAT8E4M3FN", 0.01, 0.27), "nvfp4": ("FLOAT4E2M1", 0.08, 0.16)}
"""Recipes of small floats, which ONNX Runtime has no kernels for: type of the weights, accuracy that may be lost, share of their bytes."""

SPARSE = {
    ("digits_vit", "nm24"): 2, ("digits_cnn", "nm24"): 2, ("digits_vit", "nm24-int8"): 2, ("digits_cnn", "nm24-int8"): 2,
}  # fmt: skip
"""Points of accuracy that may be lost with 2:4 sparse weights."""

PLUGIN = {"w4a16-plugin"}
"""Tested in tests/passes/test_lower.py and below."""


LEARNED = {"w4a4-vit-sos"}
"""Recipes that need torch."""


def recipe(name: str) -> Recipe:
    """Without the gate on speed: the networks are tiny and the machine may be busy. What learns takes a few steps only."""
    found = load_recipe(name)
    if name in LEARNED:
        pytest.importorskip("torch", reason="needs torch")
        found = replace(found, passes=tuple(replace(one, steps=5) if isinstance(one, Sos) else one for one in found.passes))
    return replace(found, gates=replace(found.gates, min_speedup=None))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipes")
    inputs, labels = digits.images("test")
    np.savez(folder / "calib.npz", input=digits.calibration(64))
    np.savez(folder / "eval.npz", input=inputs, labels=labels)
    return folder


@cache
def converted(folder: Path, model: str, name: str, target: str = "onnxruntime") -> tuple[Report, Path]:
    out = folder / f"{model}.{name}.{target}.onnx"
    found = convert(onnx_path(model), out, recipe=recipe(name), calib=folder / "calib.npz", evaluate=folder / "eval.npz", target=target)
    return found, out


EVERY = [(model, name, "onnxruntime") for model in MODELS for name in SHARES if name != "int8-fp16"]
EVERY += [(model, "int8", target) for model in MODELS for target in TARGETS if target != "onnxruntime"]
EVERY += [(model, "int8-fp16", "tensorrt") for model in MODELS]
every = pytest.mark.parametrize(("model", "name", "target"), EVERY)


@cache
def accuracy(path: Path) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # tests share the machine
    return digits.accuracy(onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]))


def test_every_recipe_is_tested() -> None:
    by_model = {name for _, name in (*LOW_BIT, *SPARSE)}
    assert set(SHARES) | by_model | set(HALF) | set(FLOATS) | PLUGIN == set(builtin_recipes())


@pytest.mark.parametrize("name", HALF)
@pytest.mark.parametrize("model", MODELS)
def test_half_precision(folder: Path, model: str, name: str) -> None:
    """Half the size, and the classes of all but a few images, computed as the type computes; nothing has to stay float32."""
    found, out = converted(folder, model, name, "tensorrt-rtx")
    assert found.output.bytes < 0.6 * found.model.bytes
    assert found.accuracy is not None and found.accuracy.reference - found.accuracy.result <= 0.01
    (counts,) = [entry.numbers for entry in found.passes[-1].measurements if entry.where == "all nodes"]
    assert counts["float32"] == 0 and counts["casts"] == 2 == sum(node.op_type == "Cast" for node in ir.load(out).graph)
    assert found.comparison[0].sqnr_db > HALF[name] and not found.notes


@pytest.mark.parametrize(("model", "name"), [("digits_cnn", "fp8"), ("digits_vit", "fp8"), ("digits_vit", "nvfp4")])
def test_small_floats(folder: Path, model: str, name: str) -> None:
    found, out = converted(folder, model, name, "tensorrt-rtx")
    kind, lost, share = FLOATS[name]
    assert found.accuracy is not None and found.accuracy.reference - found.accuracy.result <= lost
    assert 0 < found.weight_bytes_after <= share * found.weight_bytes_before
    made = [node.inputs[0] for node in ir.load(out).graph if node.op_type == "DequantizeLinear"]
    assert kind in {str(value.dtype) for value in made if value is not None and value.is_initializer()}
    (again,), _ = compare_files(onnx_path(model), out, folder / "calib.npz")
    assert again.cosine > 0.99


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt-rtx"])
@pytest.mark.parametrize(("model", "name"), SPARSE)
def test_2_of_4_weights(folder: Path, model: str, name: str, target: str) -> None:
    """Pruned layers have the pattern in the file itself, whatever their weights are stored as; the report says who is eligible."""
    found, out = converted(folder, model, name, target)
    assert found.accuracy is not None and 100 * (found.accuracy.reference - found.accuracy.result) <= SPARSE[model, name]
    (record,) = [record for record in found.passes if record.name == "nm-prune"]
    numbers = {entry.where: entry.numbers for entry in record.measurements if "zeros" in entry.numbers}
    result = ir.load(out)
    layers = {node.name: node for node in result.graph if node.name in numbers}
    for node in layers.values():
        value = linear.weight_of(node)
        assert value is not None
        rows = np.moveaxis(decode(result, value), linear.in_axis(node), -1)
        rows = rows[..., : rows.shape[-1] // 4 * 4]
        assert np.count_nonzero(rows.reshape(-1, 4), axis=1).max() <= 2
    assert len(layers) == len(numbers) >= 4
    assert all(("eligible" in row) == (target != "onnxruntime") for row in numbers.values())


def test_4_bit_weights_for_plugins(folder: Path) -> None:
    """Each product is one operator, in half precision; the bodies make the file run anywhere."""
    found, out = converted(folder, "digits_vit", "w4a16-plugin", "tensorrt")
    assert found.accuracy is not None and found.accuracy.reference - found.accuracy.result <= 0.03
    model = ir.load(out)
    assert sum(node.op_type == "W4A16Gemm" for node in model.graph) >= 16 and len(model.functions) == 1
    assert found.output.bytes < 0.2 * found.model.bytes


@pytest.mark.parametrize(("model", "name"), LOW_BIT)
def test_low_bits(folder: Path, model: str, name: str, tmp_path: Path) -> None:
    found, out = converted(folder, model, name)
    lost, share = LOW_BIT[model, name]
    assert accuracy(onnx_path(model)) - accuracy(out) <= lost
    assert 0 < found.weight_bytes_after <= share * found.weight_bytes_before
    again = tmp_path / out.name
    convert(onnx_path(model), again, recipe=recipe(name), calib=folder / "calib.npz", evaluate=folder / "eval.npz")
    assert again.read_bytes() == out.read_bytes()


@every
def test_accuracy(folder: Path, model: str, name: str, target: str) -> None:
    """A point at most is lost on the test split, as the report says and as the file itself shows."""
    found, out = converted(folder, model, name, target)
    before, after = accuracy(onnx_path(model)), accuracy(out)
    assert before - after <= 1
    assert found.accuracy is not None and found.accuracy.samples == len(digits.split_indices("test"))
    assert 100 * found.accuracy.reference == pytest.approx(before) and 100 * found.accuracy.result == pytest.approx(after, abs=0.25)
    assert min(entry.cosine for entry in found.comparison) > 0.99


@every
def test_sizes(folder: Path, model: str, name: str, target: str) -> None:
    found, out = converted(folder, model, name, target)
    share = SHARES["int8" if model == "digits_cnn" else name]  # weights with kernel positions cannot be grouped and get 8 bits
    assert 0 < found.weight_bytes_after <= share * found.weight_bytes_before
    assert found.output.bytes == out.stat().st_size < found.model.bytes
    model_weights = sum(4 * node.inputs[1].const_value.size for node in ir.load(onnx_path(model)).graph if linear.is_linear(node))  # type: ignore[union-attr]
    assert found.weight_bytes_before >= (0.8 if name in CALIBRATED else 1) * model_weights  # the worst layers may stay float


@every
def test_nothing_is_left_over(folder: Path, model: str, name: str, target: str) -> None:
    """Every initializer is read, every value goes somewhere, the target takes the file, and nothing else is in the folder."""
    _, out = converted(folder, model, name, target)
    proto = onnx.load(out)
    read = {value for node in proto.graph.node for value in node.input}
    assert {entry.name for entry in proto.graph.initializer} <= read
    assert all(read & set(node.output) or {entry.name for entry in proto.graph.output} & set(node.output) for node in proto.graph.node)
    require_legal(ir.load(out), TARGETS[target])
    onnx.checker.check_model(proto, full_check=True)
    assert not [path.name for path in folder.iterdir() if path.suffix not in (".onnx", ".npz") or "failed" in path.name]


@every
def test_the_report_agrees_with_the_graph(folder: Path, model: str, name: str, target: str) -> None:
    found, out = converted(folder, model, name, target)
    result = ir.load(out)
    layers = Counter(node.op_type for node in result.graph if node.op_type in linear.LINEAR_OPS and _is_dequantized(linear.weight_of(node)))
    assert {op: count for op, count in found.quantized.items() if op in linear.LINEAR_OPS} == layers and layers
    if target == "onnxruntime":
        assert found.integer_kernels == kernels_used.kernels(out).counts
    else:
        assert not found.integer_kernels and found.latency is None
    skipped = {row.split("'")[1] for record in found.passes for row, _ in record.skipped}
    named = {node.name for node in result.graph if node.op_type in linear.LINEAR_OPS and not _is_dequantized(linear.weight_of(node))}
    assert named <= skipped  # whatever stayed float, the report says why
    embedded = report.read_embedded(result)
    assert embedded.quantized == found.quantized and embedded.comparison == found.comparison and embedded.recipe == found.recipe
    assert not found.notes and found.calibration.samples == 64


def _is_dequantized(value: ir.Value | None) -> bool:
    maker = ir.producer(value)
    return maker is not None and maker.op_type == "DequantizeLinear"


@pytest.mark.parametrize(("model", "kernels"), [("digits_cnn", {"QLinearConv"}), ("digits_vit", {"MatMulIntegerToFloat"})])
def test_int8_runs_on_integer_kernels(folder: Path, model: str, kernels: set[str]) -> None:
    """Each layer that the report calls quantized is computed on integers, by ONNX Runtime's own account."""
    found, out = converted(folder, model, "int8")
    used = kernels_used.kernels(out)
    assert kernels <= set(used.counts)
    quantized = {node.name for node in ir.load(out).graph if node.op_type in linear.LINEAR_OPS and _is_dequantized(linear.weight_of(node))}
    assert not quantized & {kernel.original for kernel in used.floating}


@pytest.mark.parametrize("name", SHARES)
@pytest.mark.parametrize("model", MODELS)
def test_without_data(tmp_path: Path, model: str, name: str) -> None:
    """It works, says in capitals that the inputs were random, and does not promise anything."""
    found = convert(onnx_path(model), tmp_path / "out.onnx", recipe=replace(recipe(name), gates=Gates()))
    (note,) = found.notes
    assert "RANDOM" in note and ("in ranges and verification" in note) == (name in CALIBRATED) and found.calibration.kind == "random"
    assert accuracy(tmp_path / "out.onnx") > 50


def test_weight_only_recipes_do_not_depend_on_the_data(folder: Path, tmp_path: Path) -> None:
    _, out = converted(folder, "digits_cnn", "int4-weight-only")
    convert(onnx_path("digits_cnn"), tmp_path / "out.onnx", recipe=recipe("int4-weight-only"))
    first, second = onnx.load(out), onnx.load(tmp_path / "out.onnx")
    assert first.graph == second.graph
