"""Zeros of weights: N:M patterns are told from zeros elsewhere, kernel positions get their share, codes count as what they stand for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from graphq import cli, ir, qdq, report, sparsity
from graphq.console_sparsity import show
from graphq.editor import Editor
from graphq.models import onnx_path
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 8, 6, 6] x, float[8, 8, 3, 3] w, float[8, 1, 3, 3] d, float[n, 9, 8] h, float[8, 6] v) => (float[] y, float[] z)
{ [conv] a = Conv<pads = [1, 1, 1, 1]>(x, w)  [depthwise] y = Conv<group = 8>(a, d)  [matrix] z = MatMul(h, v) }"""


def masked(shape: tuple[int, ...], n: int, m: int, axis: int = 1, seed: int = 0) -> np.ndarray:
    """Random weights, at most `n` of every `m` along `axis` not zero."""
    rng = np.random.default_rng(seed)
    moved = rng.normal(size=(*np.delete(shape, axis), shape[axis] // m, m))
    keep = np.argsort(rng.random(moved.shape), axis=-1) < n
    return np.moveaxis((moved * keep).reshape(*np.delete(shape, axis), shape[axis]), -1, axis).astype(np.float32)


def model(**weights: np.ndarray) -> ir.Model:
    found = ir.from_onnx_text(TEXT)
    for value in [value for value in found.graph.inputs if value.name in "wdv"]:
        found.graph.inputs.remove(value)
        array = weights.get(value.name or "", np.ones([int(size) for size in ir.shape_of(value) or ()], np.float32))  # type: ignore[arg-type]
        value.const_value = ir.make_tensor(array, "float32", value.name or "")
        found.graph.register_initializer(value)
    return found


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (2, 8), (4, 16), (1, 32)])
def test_a_pattern_is_found(n: int, m: int) -> None:
    weight = masked((6, 64, 3, 3), n, m)
    assert sparsity.pattern(weight) == (n, m)
    assert sparsity.pattern(masked((6, 64), n, m)) == (n, m)


def test_what_is_no_pattern() -> None:
    rng = np.random.default_rng(0)
    assert sparsity.pattern(rng.normal(size=(6, 64))) is None
    assert sparsity.pattern(rng.normal(size=(64, 64)) * (rng.random((64, 64)) < 0.3)) is None  # as many zeros, somewhere
    assert sparsity.pattern(masked((64, 6), 2, 4, axis=0)[:, :3]) is None  # fewer channels than a group
    assert sparsity.pattern(masked((64, 64), 2, 4, axis=0)) is None  # along the outputs


def test_channels_that_are_left_over_are_not_looked_at() -> None:
    weight = np.concatenate([masked((6, 8), 2, 4), np.ones((6, 3), np.float32)], axis=1)
    assert sparsity.pattern(weight) == (2, 4)


def test_the_sparsest_pattern_and_of_equal_ones_the_smallest() -> None:
    both = masked((6, 64), 2, 4)
    assert sparsity.fullest(both, 4) == 2 and sparsity.fullest(both, 8) == 4 and sparsity.pattern(both) == (2, 4)  # and not 4:8
    weight = masked((6, 64), 2, 4).reshape(6, 8, 2, 4)
    weight[:, :, 1, :] = 0  # 2 of 8 now, and still 2:4
    assert sparsity.pattern(weight.reshape(6, 64)) == (2, 8)
    assert sparsity.pattern(np.zeros((6, 64))) == (0, 4)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("rate", [0.5, 0.75])
def test_sparsity_of_positions_is_that_of_the_smallest_weights(rate: float, seed: int) -> None:
    weight = np.random.default_rng(seed).normal(size=(16, 16, 3, 3)) * np.array([[1, 2, 1], [2, 4, 2], [1, 2, 1]])
    shares = sparsity.position_sparsity(weight, rate)
    gone = np.zeros(weight.size, bool)
    gone[np.argsort(np.abs(weight), axis=None)[: int(rate * weight.size)]] = True
    np.testing.assert_allclose(shares, gone.reshape(weight.shape).mean((0, 1)), atol=1e-12)
    assert shares.mean() == pytest.approx(rate, abs=1e-12)
    numbers = sparsity.position_numbers(weight, 4 - round(4 * rate), 4)
    assert numbers["sparsity_centre"] < numbers["sparsity_edge"] < numbers["sparsity_corner"]


def test_an_nm_weight_is_even() -> None:
    """What SpRe starts from: the pattern leaves the same share at each position, so no position is below it."""
    weight = masked((8, 64, 3, 3), 2, 4)
    np.testing.assert_allclose(sparsity.position_sparsity(weight, 0.5), 0.5, atol=1e-12)


def test_equal_weights_go_in_equal_parts() -> None:
    np.testing.assert_allclose(sparsity.position_sparsity(np.ones((3, 5, 3, 3)), 0.3), 0.3)
    np.testing.assert_allclose(sparsity.position_sparsity(np.zeros((2, 4, 1, 2)), 0.5), 0.5)
    assert [float(sparsity.position_sparsity(np.ones((2, 2, 1)), rate)[0]) for rate in (0.0, 1.0)] == [0, 1]


@pytest.mark.parametrize(("kernel", "places"), [((), []), ((1, 1), []), ((3, 3), ["centre", "edge", "corner"]), ((3,), ["centre", "edge"]),
                                                ((2, 2), ["centre"]), ((3, 3, 3), ["centre", "edge", "corner"])])  # fmt: skip
def test_places_of_a_kernel(kernel: tuple[int, ...], places: list[str]) -> None:
    weight = np.random.default_rng(0).normal(size=(4, 4, *kernel))
    assert list(sparsity.position_numbers(weight, 2, 4)) == [f"sparsity_{place}" for place in places]


# ---- models ---------------------------------------------------------------------------------------------------------


def test_layers_of_a_model(tmp_path: Path) -> None:
    ir.save(model(w=masked((8, 8, 3, 3), 2, 4), v=masked((8, 6), 1, 4, axis=0)), tmp_path / "m.onnx")
    found = {layer.name: layer for layer in sparsity.find_zeros(tmp_path / "m.onnx").layers}
    assert {name: layer.pattern for name, layer in found.items()} == {"conv": (2, 4), "depthwise": None, "matrix": (1, 4)}
    assert {name: layer.zeros for name, layer in found.items()} == {"conv": 0.5, "depthwise": 0, "matrix": 0.75}
    assert found["matrix"].shape == (6, 8) and not found["matrix"].positions  # [O, I], as it is for convolutions
    assert len(found["conv"].positions) == 9


@pytest.mark.parametrize("symmetric", [True, False])
def test_codes_are_what_they_stand_for(tmp_path: Path, symmetric: bool) -> None:
    quantized = model(w=masked((8, 8, 3, 3), 2, 4))
    node = next(node for node in quantized.graph if node.name == "conv")
    weight, spec = np.asarray(ir.constant(node.inputs[1])), QuantSpec(8, signed=symmetric, symmetric=symmetric, granularity=PerAxis(0))
    qparams = Uniform(spec).fit_weight(weight)
    codes = Uniform(spec).quantize(weight, qparams).astype(np.int8 if symmetric else np.uint8)
    qdq.insert_weight(Editor(quantized), node, spec, qparams, codes)
    ir.save(quantized, tmp_path / "m.onnx")
    found = sparsity.find_zeros(tmp_path / "m.onnx")
    assert found.layers[0].pattern == (2, 4) and found.layers[0].zeros >= 0.5


def test_shares_are_of_all_weights(tmp_path: Path) -> None:
    ir.save(model(w=np.zeros((8, 8, 3, 3), np.float32)), tmp_path / "m.onnx")
    found = sparsity.find_zeros(tmp_path / "m.onnx")
    assert found.weights == 576 + 72 + 48 and found.share == pytest.approx(576 / 696)


def test_a_trained_network_as_the_command_shows_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["inspect", str(onnx_path("digits_cnn")), "--sparsity", "--json"])
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)["sparsity"]
    assert len(found["layers"]) == 9 and found["layers"] == report.plain(sparsity.find_zeros(onnx_path("digits_cnn")))["layers"]
    with pytest.raises(SystemExit):
        cli.main(["inspect", str(onnx_path("digits_cnn")), "--sparsity"])
    shown = capsys.readouterr().out
    assert "weights in 9 layers; no N:M pattern" in shown and " / " in shown.split("zeros:")[1]
    assert sum(" / " in line for line in shown.split("zeros:")[1].split("\n")) == 5 and "and 1 more;" in shown


def test_patterns_are_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ir.save(model(w=masked((8, 8, 3, 3), 2, 4), v=masked((8, 6), 2, 4, axis=0)), tmp_path / "m.onnx")
    show(sparsity.find_zeros(tmp_path / "m.onnx"))
    shown = capsys.readouterr().out
    assert "2 layers 2:4" in shown and "... / ... / ..." in shown  # an N:M weight has no denser position
