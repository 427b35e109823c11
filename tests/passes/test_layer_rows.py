"""Layers as matrix products: rows times weight is what ONNX Runtime computes, and sums of rows are what they say."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir, linear, noise
from graphq.calibration import open_calibration
from graphq.executor import Executor, Fetch
from graphq.passes import _layer_rows
from graphq.passes._layer_rows import Layer, collect, pick
from graphq.passes._sums import Sums
from graphq.sweep import SweepStep, sweep

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def all_rows_count_alike(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """Except where massive outputs are what is tested."""
    if "massive" not in request.node.name:
        monkeypatch.setattr(noise, "LIMIT", 1e12)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return onnx_ir.from_proto(proto)


LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "MatMul": ("MatMul(x, w)", (6, 5, 8), (8, 3)),
    "MatMul of matrices": ("MatMul(x, w)", (6, 8), (8, 3)),
    "Gemm": ("Gemm(x, w, b)", (6, 8), (8, 3)),
    "Gemm transB": ("Gemm <transB = 1> (x, w, b)", (6, 8), (3, 8)),
    "Gemm transA": ("Gemm <transA = 1> (x, w, b)", (6, 9), (6, 3)),
    "Gemm alpha, beta": ("Gemm <alpha = 0.5, beta = 3.0> (x, w, b)", (6, 8), (8, 3)),
    "Conv": ("Conv(x, w, b)", (6, 4, 7, 5), (3, 4, 3, 2)),
    "Conv strides, pads": ("Conv <strides = [2, 3], pads = [1, 0, 2, 3]> (x, w, b)", (6, 4, 7, 5), (3, 4, 3, 2)),
    "Conv dilations": ("Conv <dilations = [2, 3], pads = [1, 1, 1, 1]> (x, w, b)", (6, 4, 7, 7), (3, 4, 3, 2)),
    "Conv groups": ("Conv <group = 2> (x, w)", (6, 4, 5, 5), (6, 2, 3, 3)),
    "Conv depthwise": ("Conv <group = 3, pads = [1, 1, 1, 1]> (x, w, b)", (6, 3, 5, 5), (3, 1, 3, 3)),
    "Conv depthwise, two outputs": ("Conv <group = 3> (x, w)", (6, 3, 5, 5), (6, 1, 3, 3)),
    "Conv 1-D": ("Conv <strides = [2]> (x, w, b)", (6, 4, 9), (3, 4, 3)),
    "Conv 3-D": ("Conv <pads = [1, 0, 1, 0, 1, 0]> (x, w, b)", (6, 2, 4, 3, 5), (3, 2, 2, 3, 2)),
    "Conv SAME_UPPER": ("Conv <auto_pad = \"SAME_UPPER\", strides = [2, 2]> (x, w, b)", (6, 2, 7, 6), (3, 2, 4, 3)),
    "Conv SAME_LOWER": ("Conv <auto_pad = \"SAME_LOWER\", strides = [1, 3]> (x, w, b)", (6, 2, 7, 6), (3, 2, 4, 3)),
    "Conv VALID": ("Conv <auto_pad = \"VALID\"> (x, w, b)", (6, 2, 7, 6), (3, 2, 4, 3)),
}  # fmt: skip


def model_of(case: str) -> tuple[ir.Model, np.ndarray]:
    body, data, weight = LAYERS[case]
    bias = {"b": floats(weight[0] if "Conv" in case else 3)} if "b)" in body else {}
    declared = ", ".join(["N", *map(str, data[1:])])
    return build(f"g (float[{declared}] x) => (float[] y) {{ [it] y = {body} }}", w=floats(*weight), **bias), floats(*data)


def outputs(layer: Layer, y: np.ndarray) -> np.ndarray:
    """All rows of an output `y`, [G, N, O], channels last."""
    rows = np.moveaxis(y, linear.channel_axis(layer.node), -1)
    return np.moveaxis(rows.reshape(-1, *layer.weight().shape[:2]), 1, 0)


@pytest.mark.parametrize("case", LAYERS)
def test_rows_times_weight_is_the_output(case: str) -> None:
    """At all rows, at some of them, and at none, to the rounding of float32."""
    model, x = model_of(case)
    layer = Layer(model.graph[0])
    without = ir.clone(model)
    if len(without.graph[0].inputs) > 2:
        without.graph[0].resize_inputs(2)
    y = Executor(without).run({"x": x})[0]
    count = layer.count(x.shape)
    assert count * layer.weight().shape[0] * layer.weight().shape[1] == y.size
    for picked in (np.arange(count), np.array([1, count - 1]), np.arange(0)):
        made = layer.rows(x, picked) @ layer.weight().swapaxes(1, 2)
        np.testing.assert_allclose(made, outputs(layer, y)[:, picked], atol=1e-5)
        assert layer.rows(x, picked).dtype == np.float32


@pytest.mark.parametrize("case", LAYERS)
def test_a_weight_goes_back_where_it_came_from(case: str) -> None:
    model, _ = model_of(case)
    np.testing.assert_array_equal(Layer(model.graph[0]).stored(Layer(model.graph[0]).weight()), ir.constant(model.graph[0].inputs[1]))


# ---- sums -----------------------------------------------------------------------------------------------------------


def stop(case: str, samples: int = 30) -> tuple[SweepStep, np.ndarray, np.ndarray]:
    """A stop at the layer, whose input is quantized, and all X and R as float64."""
    body, shape, weight = LAYERS[case]
    x = floats(samples, *shape[1:])
    text = f"q = QuantizeLinear(x, scale, zero) d = DequantizeLinear(q, scale, zero) [it] y = {body.replace('(x', '(d')}"
    bias = {"b": floats(weight[0] if "Conv" in case else 3)} if "b)" in body else {}
    declared = ", ".join(["N", *map(str, shape[1:])])
    model = build(f"g (float[{declared}] x) => (float[] y) {{ {text} }}", w=floats(*weight), **bias, scale=np.float32(0.3),
                  zero=np.uint8(128))  # fmt: skip
    node = model.graph[2]
    (step,) = sweep(model, ir.clone(model), [node], open_calibration({"x": x}, ir.inputs(model)))
    layer, rounded = Layer(node), Executor(model, [Fetch("d")]).run({"x": x})[0]
    every = np.arange(layer.count(x.shape))
    read = layer.rows(rounded, every).astype(np.float64)
    return step, read, (layer.rows(x, every) - read) @ layer.weight().swapaxes(1, 2)


SUMMED = ("MatMul", "Gemm alpha, beta", "Conv strides, pads", "Conv groups", "Conv depthwise")


@pytest.mark.parametrize("case", SUMMED)
def test_collected_sums(case: str) -> None:
    """Against float64 sums over all rows; the rows are few enough that all are used."""
    step, x, r = stop(case)
    train, held = collect(step, 0)
    assert train.count + held.count == x.shape[1] and 0.1 < held.count / x.shape[1] < 0.3
    sums = train + held
    expected = {"gram": x.swapaxes(1, 2) @ x, "total": x.sum(1), "cross": r.swapaxes(1, 2) @ x, "lack": r.sum(1), "square": np.sum(r**2)}
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(sums, name), value, atol=2e-5 * np.abs(value).max())


@pytest.mark.parametrize("case", SUMMED)
def test_moved_sums_are_those_of_the_moved_layer(case: str) -> None:
    step, x, r = stop(case)
    sums = sum(collect(step, 0), Sums.none(*collect(step, 0)[0].cross.shape))
    delta, shift = 0.1 * RNG.standard_normal(sums.cross.shape), 0.1 * RNG.standard_normal(sums.lack.shape)
    after = r - x @ delta.swapaxes(1, 2) - shift[:, None]
    moved = sums.moved(delta, shift)
    assert moved.square == pytest.approx(np.sum(after**2), rel=1e-5)
    assert moved.error == pytest.approx(moved.square / sums.power)
    np.testing.assert_allclose(moved.cross, after.swapaxes(1, 2) @ x, atol=1e-4 * np.abs(sums.cross).max())
    np.testing.assert_allclose(moved.lack, after.sum(1), atol=1e-4 * np.abs(sums.lack).max())
    away = x - x.mean(1, keepdims=True)
    np.testing.assert_allclose(moved.centred_gram, away.swapaxes(1, 2) @ away, atol=1e-4 * np.abs(sums.gram).max())


def test_products_in_float32_are_good_enough() -> None:
    """Off by less than 1e-6 of sqrt(g_ii g_jj), for channels of very different size and with means."""
    x = (RNG.standard_normal((1, 4096, 64)) * np.exp(2 * RNG.standard_normal(64)) + RNG.standard_normal(64)).astype(np.float32)
    sums, wide = Sums.of(x, x[..., :2], x), x.astype(np.float64)
    gram = wide.swapaxes(1, 2) @ wide
    scale = np.sqrt(np.einsum("gdd->gd", gram))
    assert (np.abs(sums.gram - gram) / (scale[:, :, None] * scale[:, None])).max() < 1e-6


def test_means_that_dwarf_what_varies_do_not_spoil_it() -> None:
    """As behind a LayerNorm with large biases: what is left around the mean is still a sum of squares."""
    x = (RNG.standard_normal((1, 4096, 64)) + 3000 * RNG.standard_normal(64)).astype(np.float32)
    sums, around = Sums.of(x, x[..., :2], x), x - x.mean(1, keepdims=True, dtype=np.float64)
    np.testing.assert_allclose(sums.centred_gram, around.swapaxes(1, 2) @ around, atol=0.1)
    np.testing.assert_allclose(sums.cross - sums.lack[..., None] * sums.total[:, None] / sums.count, sums.centred_gram[:, :2], atol=0.1)
    np.linalg.cholesky(sums.centred_gram)


def test_rows_are_held_out_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of one side seldom has a neighbour on the other, and no row is on both."""
    step, x, _ = stop("MatMul", samples=100)
    seen: list[np.ndarray] = []
    gather: Callable[..., np.ndarray] = _layer_rows._gather
    monkeypatch.setattr(_layer_rows, "_gather", lambda rows, *rest: seen.append(rows) or gather(rows, *rest))
    collect(step, 0)
    (train, _, held, _) = seen  # gathered before and after the quantizer
    assert np.array_equal(np.sort(np.concatenate([train, held])), np.arange(x.shape[1]))
    assert len(held) == x.shape[1] // 5 and np.sum(np.diff(held) > 1) == 9


MASKED = """g (float[N, 5, 8] x, int64[N, M] attention_mask) => (float[N, 5, 3] y, float[N, 3] z, int64[N, M] same) {
  [tokens] y = MatMul(x, w) axis = Constant<value = int64[1] {1}> () p = ReduceMean<keepdims = 0>(x, axis) [pooled] z = MatMul(p, w)
  same = Identity(attention_mask) }"""


@pytest.mark.parametrize("length", [5, 4])
def test_padding_is_no_row(length: int) -> None:
    """Where the mask has a number for each row of a layer, whatever stands in padded tokens changes nothing."""
    x, mask = floats(30, 5, 8), (np.arange(length) < RNG.integers(1, length, (30, 1))).astype(np.int64)
    model = build(MASKED, w=floats(8, 3))
    found: dict[str | None, np.ndarray] = {}
    for step in sweep(model, ir.clone(model), [node for node in model.graph if node.name in ("tokens", "pooled")],
                      open_calibration({"x": x, "attention_mask": mask}, ir.inputs(model))):  # fmt: skip
        train, held = collect(step, 0)
        found[step.node.name] = (train + held).gram[0]
        assert _layer_rows.some(step, 1000, 0).shape[1] == train.count + held.count
    rows = x[mask == 1] if length == 5 else x.reshape(-1, 8)
    np.testing.assert_allclose(found["tokens"], rows.T @ rows, atol=1e-4)
    pooled = x.mean(1)
    np.testing.assert_allclose(found["pooled"], pooled.T @ pooled, atol=1e-4)


@pytest.mark.parametrize("count", [1, 7, 100, 1000, 12345])
def test_picked_rows_are_spread(count: int) -> None:
    """One of each stretch of count / 100 rows, at places that differ, the same for the same seed."""
    rows = pick(count, 100, 3)
    assert np.array_equal(rows, pick(count, 100, 3)) and len(rows) == min(count, 100)
    assert (np.diff(rows) > 0).all() and rows[0] >= 0 and rows[-1] < count
    if count > 100:
        assert np.abs(rows * 100 // count - np.arange(100)).max() <= 1
        assert not np.array_equal(rows, pick(count, 100, 4)) and len(np.unique(np.diff(rows))) > 3


def test_few_rows_are_used_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_layer_rows, "ROWS", 40)
    step, x, r = stop("Conv strides, pads", samples=200)
    train, held = collect(step, 0)
    limit = 32 * x.shape[2]
    assert train.count + held.count == limit < x.shape[1]
    expected = x.swapaxes(1, 2) @ x / x.shape[1]
    assert np.abs((train + held).gram / limit - expected).max() < 0.2 * expected.max()


REFUSED = {
    "y = MatMul(x, x)": "not a constant",
    "v = Mul(w, w) y = MatMul(x, v)": "not a constant",
    "y = ConvTranspose(x, w4)": "transposed convolution",
    "i = Cast <to = 3> (w) d = DequantizeLinear(i, s) y = MatMul(x, d)": "quantized already",
}


@pytest.mark.parametrize("body", REFUSED)
def test_refusals(body: str) -> None:
    shape = "2, 8, 4, 4" if "Conv" in body else "8, 8"
    weights = {"w": floats(8, 8), "w4": floats(8, 2, 3, 3), "s": np.float32(1)}
    model = build(f"g (float[{shape}] x) => (float[] y) {{ {body} }}", **weights)
    (node,) = _layer_rows.candidates(model)
    assert REFUSED[body] in str(_layer_rows.refusal(model, node, ()))


def test_refusal_of_excluded_nodes_and_subgraphs() -> None:
    model = build("""g (bool c, float[8, 8] x) => (float[] y) {
        [out] a = MatMul(x, w)
        y = If(c) <then_branch = t () => (float[] p) { [in] p = MatMul(a, w) }, else_branch = e () => (float[] q) { q = Neg(a) }> }""",
        w=floats(8, 8))  # fmt: skip
    outer, inner = _layer_rows.candidates(model)
    assert _layer_rows.refusal(model, outer, ()) is None
    assert _layer_rows.refusal(model, outer, ("o*",)) == _layer_rows.refusal(model, outer, ("MatMul",)) == "excluded by the recipe"
    assert _layer_rows.refusal(model, inner, ()) == "it lies in a subgraph"


def test_rows_with_massive_outputs_count_as_if_they_were_large_ones() -> None:
    rng = np.random.default_rng(0)
    x, r, y = (rng.normal(size=(1, 200, width)).astype(np.float32) for width in (3, 2, 2))
    plain = Sums.of(x, r, y)
    np.testing.assert_allclose(plain.gram[0], x[0].T @ x[0], rtol=1e-5)
    for rows in (x, r, y):
        rows[:, :2] *= 1000
    found = Sums.of(x, r, y)
    size = np.square(y[0]).mean(1)
    limit = noise.LIMIT * np.median(size)
    weights = np.minimum(limit / size, 1)
    np.testing.assert_allclose(found.gram[0], (x[0] * weights[:, None]).T @ x[0], rtol=1e-4)
    np.testing.assert_allclose(found.lack[0], weights @ r[0], rtol=1e-4, atol=1e-4)
    assert found.power == pytest.approx(float((weights[:, None] * y[0] ** 2).sum()), rel=1e-4)
    assert found.count == pytest.approx(weights.sum(), rel=1e-5)


def test_rows_without_an_output_do_not_make_the_others_massive() -> None:
    """More than half of them, as of a convolution over empty images."""
    x, r, y = (RNG.standard_normal((1, 40, width)).astype(np.float32) for width in (3, 2, 2))
    padded = [np.concatenate([rows, np.zeros((1, 60, rows.shape[2]), np.float32)], axis=1) for rows in (x, r, y)]
    plain, with_zeros = Sums.of(x, r, y), Sums.of(*padded)
    np.testing.assert_allclose(with_zeros.gram, plain.gram, rtol=1e-5, atol=1e-5)
    assert with_zeros.count == pytest.approx(plain.count + 60) and plain.power == pytest.approx(with_zeros.power)
