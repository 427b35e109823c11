"""Sensitivity of layers: the numbers are those of a model with one layer quantized, and they rank layers as its loss does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from graphq import ir, sensitivity
from graphq.calibration import open_calibration
from graphq.errors import DataError, ModelError, TargetError
from graphq.exclude import given_name
from graphq.executor import Executor, Fetch
from graphq.models import digits, onnx_path
from graphq.passes.insert_qdq import InsertQdq
from graphq.pipeline import PassContext, run_passes
from graphq.recipe import load_recipe, parse_recipe
from graphq.sensitivity import Sensitivity, keeping_float
from graphq.targets import get_target
from graphq.verify import verify_graph

VIT, COUNT = onnx_path("digits_vit"), 96


@pytest.fixture(scope="module")
def calib(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "calib.npz"
    np.savez(path, input=digits.calibration(COUNT))
    return path


@pytest.fixture(scope="module")
def found(calib: Path) -> Sensitivity:
    return sensitivity.sensitivity(VIT, calib=calib)


@pytest.fixture(scope="module")
def prepared() -> PassContext:
    """digits_vit before insert-qdq in int8, with ranges from the samples that `found` takes them from."""
    model = ir.load(VIT)
    seen, held_out = open_calibration({"input": digits.calibration(COUNT)}, ir.inputs(model)).take(80).split(16)
    ctx = PassContext(model=ir.clone(model), reference=model, calib=seen, held_out=held_out, target=get_target("onnxruntime"))
    run_passes([one for one in load_recipe("int8").passes if one.name != "insert-qdq"], ctx, verify_graph)
    return ctx


def quantized_alone(prepared: PassContext, layer: str) -> PassContext:
    """What insert-qdq makes of that model if every other layer is excluded."""
    ctx = replace(prepared, model=ir.clone(prepared.model))
    others = tuple(node.name or "" for node in ctx.model.graph if node.op_type in ("Conv", "Gemm", "MatMul") and node.name != layer)
    run_passes([InsertQdq(exclude=others, error_samples=0, tables=False)], ctx, verify_graph)
    return ctx


def sqnr(ctx: PassContext, samples: Mapping[str, np.ndarray], value: str) -> float:
    plain, result = (Executor(model, [Fetch(value)]).run(samples)[0].astype(np.float64) for model in (ctx.reference, ctx.model))
    return float(10 * np.log10(np.sum(plain**2) / np.sum((result - plain) ** 2)))


def test_alone_is_what_insert_qdq_does_to_that_layer_alone(found: Sensitivity, prepared: PassContext) -> None:
    """To 0.1 dB, at the layer's own output and, on four samples, at the model's."""
    compared = [layer for layer in found.layers if layer.op_type == "MatMul"][::4]
    assert len(compared) >= 4
    for layer in compared:
        ctx = quantized_alone(prepared, layer.name)
        out = next(node.outputs[0].name or "" for node in ctx.model.graph if node.name == layer.name)
        batch = next(ctx.held_out.batches(16))
        assert layer.both_db[8] == pytest.approx(sqnr(ctx, batch, out), abs=0.1)
        first = {name: array[: sensitivity.EFFECT_SAMPLES] for name, array in batch.items()}
        assert layer.output_db == pytest.approx(sqnr(ctx, first, "logits"), abs=0.1)


def ranks(values: list[float]) -> np.ndarray:
    return np.argsort(np.argsort(values))


def test_layers_are_ranked_as_their_measured_loss_ranks_them(found: Sensitivity, prepared: PassContext) -> None:
    """Spearman correlation over 0.7 with the loss on test images; the errors of layers' own outputs have less than 0.2."""
    images = {"input": digits.images("test")[0][:64]}
    layers = [layer for layer in found.layers if layer.op_type == "MatMul"]
    measured = [sqnr(quantized_alone(prepared, layer.name), images, "logits") for layer in layers]
    assert np.corrcoef(ranks(measured), ranks([layer.output_db for layer in layers]))[0, 1] > 0.7
    assert np.corrcoef(ranks(measured), ranks([layer.both_db[8] for layer in layers]))[0, 1] < 0.2


def test_what_stands_in_a_row(found: Sensitivity) -> None:
    assert [layer.output_db for layer in found.layers] == sorted(layer.output_db for layer in found.layers) and len(found.layers) == 26
    assert sum(layer.work for layer in found.layers) == pytest.approx(1) == sum(layer.size for layer in found.layers)
    assert (found.bits, found.random) == ((8, 6, 4), False) and "64 to 79 of 96" in found.data
    for layer in found.layers:
        for width in found.bits:
            assert layer.both_db[width] < min(layer.weight_db[width], layer.activation_db[width]) + 1
        assert layer.both_db[8] > layer.both_db[6] > layer.both_db[4]
        assert layer.total_db < min(layer.inherited_db, layer.both_db[8]) + 1
    first = next(layer for layer in found.layers if layer.op_type == "Conv")
    assert first.inherited_db == float("inf") and first.total_db == pytest.approx(first.both_db[8], abs=1e-3)


@pytest.mark.parametrize(("count", "measured"), [(40, "24 to 39 of 40"), (6, "3 to 5 of 6"), (1, "too few to hold any back")])
def test_ranges_and_errors_come_from_different_samples_if_there_are_enough(count: int, measured: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "calib.npz", input=digits.calibration(count))
    found = sensitivity.sensitivity(onnx_path("digits_cnn"), calib=tmp_path / "calib.npz", bits=(8,))
    assert measured in found.data and len(found.layers) == 9


@pytest.mark.parametrize("estimator", ["percentile", "mse", "entropy"])
def test_every_range_estimator(estimator: str, calib: Path) -> None:
    plain, other = (
        sensitivity.sensitivity(onnx_path("digits_cnn"), calib=calib, bits=(4,), estimator=one) for one in ("min-max", estimator)
    )
    better = {layer.name: layer.activation_db[4] for layer in plain.layers}
    gains = [layer.activation_db[4] - better[layer.name] for layer in other.layers]
    assert any(gain != 0 for gain in gains) and (estimator != "mse" or np.mean(gains) > 1)


@pytest.mark.parametrize("target", ["tensorrt", "generic"])
def test_other_targets_have_other_formats(target: str, calib: Path) -> None:
    """Symmetric activations: what follows a ReLU loses a bit."""
    unsigned, signed = (
        sensitivity.sensitivity(onnx_path("digits_cnn"), calib=calib, bits=(8,), target=one) for one in ("onnxruntime", target)
    )
    before = {layer.name: layer.activation_db[8] for layer in unsigned.layers}
    assert np.median([before[layer.name] - layer.activation_db[8] for layer in signed.layers]) > 4


# ---- the recipe -----------------------------------------------------------------------------------------------------


def test_the_recipe_is_int8_with_these_layers_excluded(found: Sensitivity) -> None:
    names = [layer.name for layer in found.layers[:2]]
    recipe = keeping_float(names, "onnxruntime")
    assert parse_recipe(recipe.to_yaml(), "mine").passes == recipe.passes
    base = load_recipe("int8")
    assert recipe.gates == base.gates and len(recipe.passes) == len(base.passes)
    assert [replace(one, exclude=()) if isinstance(one, InsertQdq) else one for one in recipe.passes] == list(base.passes)
    assert next(one for one in recipe.passes if isinstance(one, InsertQdq)).exclude == tuple(names)


def test_a_layer_that_is_cut_apart_is_kept_float_by_the_name_that_it_came_with(found: Sensitivity) -> None:
    part = next(layer for layer in found.layers if layer.name != layer.given_name)
    model = ir.load(onnx_path("digits_vit"))
    assert part.given_name in {node.name for node in model.graph} and part.name not in {node.name for node in model.graph}
    data = open_calibration("random", ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    run_passes(keeping_float([part.given_name], "onnxruntime").passes, ctx, verify_graph)
    parts = [node for node in ctx.model.graph if given_name(node) == part.given_name]
    assert len(parts) == 3 and all(ir.constant(node.inputs[1]) is not None for node in parts)


CHAIN = """
agraph (float[batch, 8] x) => (float[batch, 8] y) {
  a = MatMul(x, w1)
  b = Tanh(a)
  c = MatMul(b, w2)
  d = Tanh(c)
  e = MatMul(d, w3)
  f = Tanh(e)
  y = MatMul(f, w4)
}"""


def save(folder: Path, text: str, *names: str, **weights: np.ndarray) -> Path:
    """A model file; `names` are those of its first MatMul nodes."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    for node, name in zip([node for node in proto.graph.node if node.op_type == "MatMul"], names, strict=False):
        node.name = name
    onnx.save(proto, folder / "model.onnx")
    return folder / "model.onnx"


def test_names_that_look_like_patterns_or_operators_mean_themselves(tmp_path: Path) -> None:
    """A name with wildcards, one of an operator type, and none at all."""
    weights = {f"w{index}": np.random.default_rng(index).standard_normal((8, 8)).astype(np.float32) for index in range(1, 5)}
    path = save(tmp_path, CHAIN, "a[1]*", "a1b", "MatMul", **weights)
    found = sensitivity.sensitivity(path, bits=(8,))
    names = [layer.name for layer in found.layers]
    assert {"a[1]*", "a1b", "MatMul"} < set(names) and len(names) == 4 and all(names)
    for name in names:
        model = ir.load(path)
        data = open_calibration("random", ir.inputs(model))
        ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
        run_passes(keeping_float([name], "onnxruntime").passes, ctx, verify_graph)
        weights_of = {node.name: ir.producer(node.inputs[1]) for node in ctx.model.graph if node.op_type == "MatMul"}
        assert [node for node, maker in weights_of.items() if maker is None] == [name]


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("agraph (float[batch, 8] x) => (float[batch, 8] y) { y = Tanh(x) }", "There is no layer"),
        ("agraph (float[batch, 8] x, float[8, 8] w) => (float[batch, 8] y) { y = MatMul(x, w) }", "1 MatMul: its weight is not a constant"),
        ("agraph (float[batch, 4, 8] x) => (float[batch, 3, 10] y) { y = ConvTranspose(x, w) }", "no integer kernel for it"),
    ],
)
def test_a_model_without_layers_says_why(text: str, words: str, tmp_path: Path) -> None:
    weights = {"w": np.ones((4, 3, 3), np.float32)} if "ConvTranspose" in text else {}
    with pytest.raises(ModelError, match=words):
        sensitivity.sensitivity(save(tmp_path, text, **weights))


def test_a_model_that_is_quantized_already_is_refused(tmp_path: Path, calib: Path) -> None:
    from graphq.convert import convert

    convert(onnx_path("digits_cnn"), tmp_path / "small.onnx", recipe="int8-weight-only", calib=calib)
    with pytest.raises(ModelError, match="it is quantized already"):
        sensitivity.sensitivity(tmp_path / "small.onnx", calib=calib)


def test_unknown_things(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no such model file"):
        sensitivity.sensitivity(tmp_path / "none.onnx")
    with pytest.raises(DataError, match="does not exist"):
        sensitivity.sensitivity(VIT, calib=tmp_path / "none.npz")
    with pytest.raises(TargetError, match="did you mean 'tensorrt'"):
        sensitivity.sensitivity(VIT, target="tensorrtt")
