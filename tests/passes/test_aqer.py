"""aqer: a refit lowers the error on rows that it has not seen, is exact where the formula says so, and is refused where it cannot help."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser
from pydantic import ValidationError

from graphq import ir, linear, qdq
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import RecipeError
from graphq.executor import Executor, Fetch
from graphq.passes import _aqer_math as math
from graphq.passes._sums import Sums
from graphq.passes.aqer import Aqer
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.quantizers import Uniform
from graphq.spec import QuantSpec
from graphq.targets import get_target
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "aqer"
TINY = 1e-30
"""A weight that is next to nothing; zeros would stay as they are."""

ALPHAS = (0.0, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)


# ---- layers and data ------------------------------------------------------------------------------------------------


def heavy_tailed(seed: int, *shape: int, axis: int = -1) -> np.ndarray:
    """Correlated channels of very different size along `axis`, with means and heavy tails."""
    rng = np.random.default_rng(seed)
    width = shape[axis]
    mix = rng.standard_normal((width, width)) / np.sqrt(width) + np.eye(width)
    rows = rng.standard_t(5, (*np.delete(shape, axis), width)) @ mix * np.exp(0.7 * rng.standard_normal(width))
    return np.ascontiguousarray(np.moveaxis(rows + rng.standard_normal(width), -1, axis), np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items() if name in used)
    return onnx_ir.from_proto(proto)


def quantize_inputs(model: ir.Model, x: np.ndarray, bits: int) -> None:
    """Put one pair on everything that a layer reads, with the range of the float model on `x`."""
    edit, spec = Editor(model), QuantSpec(bits, signed=False, symmetric=False)
    nodes = [node for node in model.graph if node.op_type in linear.LINEAR_OPS]
    values = list(dict.fromkeys(linear.data_of(node) for node in nodes))
    executor = Executor(model, [Fetch(value.name or "") for value in values])
    for value, array in zip(values, executor.run({"x": x}), strict=True):
        readers = [(node, 0) for node in nodes if node.inputs[0] is value]
        qdq.insert_pair(edit, value, Uniform(spec).fit(array.min(), array.max()), spec, readers)


def context(reference: ir.Model, x: np.ndarray, bits: int | None = 4) -> PassContext:
    model, data = ir.clone(reference), open_calibration({"x": x}, ir.inputs(reference))
    if bits is not None:
        quantize_inputs(model, x, bits)
    return PassContext(model=model, reference=reference, calib=data, held_out=data, target=get_target("onnxruntime"))


def refit(ctx: PassContext, **options: Any) -> PassRecord:
    return run_passes([Aqer(**options)], ctx, verify_graph)[0]


def error(ctx: PassContext, x: np.ndarray) -> float:
    """Noise over signal at the outputs."""
    pairs = zip(Executor(ctx.model).run({"x": x}), Executor(ctx.reference).run({"x": x}), strict=True)
    noise, power = np.sum([(np.sum((a - b.astype(np.float64)) ** 2), np.sum(b.astype(np.float64) ** 2)) for a, b in pairs], axis=0)
    return float(noise / power)


# ---- the formula ----------------------------------------------------------------------------------------------------


def sums(seed: int, groups: int = 1, rows: int = 400) -> tuple[Sums, np.ndarray, np.ndarray]:
    """Of rows quantized to 4 bits, whose float output is wanted; with those rows, X and R."""
    rng = np.random.default_rng(seed)
    x = heavy_tailed(seed, groups, rows, 24)
    quantizer = Uniform(QuantSpec(4, signed=False, symmetric=False))
    rounded = quantizer.fake_quantize(x, quantizer.fit(x.min(), x.max()))
    weight = rng.standard_normal((groups, 16, 24)).astype(np.float32)
    y = x @ weight.swapaxes(1, 2)
    r = y - rounded @ weight.swapaxes(1, 2)
    return Sums.of(rounded, r, y), rounded.astype(np.float64), r.astype(np.float64)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("seed", range(3))
def test_the_error_on_the_fitted_rows_falls_and_is_monotone_in_alpha(seed: int, with_bias: bool) -> None:
    total, _, _ = sums(seed)
    errors = [total.moved(*math.ridge(total, alpha, with_bias=with_bias)).error for alpha in ALPHAS[1:]]
    assert errors == sorted(errors) and errors[0] < 0.8 * total.error and errors[-1] <= total.error


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("alpha", [1e-3, 0.1, 10.0])
def test_the_normal_equations_hold(alpha: float, with_bias: bool, groups: int) -> None:
    """`Aᵀ(R - A Δ) = λ Δ` with `A = [X | 1]`, to 1e-8 of the left side's first part."""
    total, _, _ = sums(0, groups)
    delta, shift = math.ridge(total, alpha, with_bias=with_bias)
    after = total.moved(delta, shift)
    diagonal = np.einsum("gdd->gd", total.gram)
    size = (diagonal.sum() + total.count * groups * with_bias) / (diagonal.size + groups * with_bias)
    np.testing.assert_allclose(after.cross, alpha * size * delta, atol=1e-8 * np.abs(total.cross).max())
    if with_bias:
        np.testing.assert_allclose(after.lack, alpha * size * shift, atol=1e-8 * np.abs(total.cross).max())
    assert with_bias or not shift.any()


def test_it_is_least_squares_without_a_ridge() -> None:
    total, x, r = sums(0)
    delta, shift = math.ridge(total, 1e-12, with_bias=True)
    rows = np.concatenate([x[0], np.ones((x.shape[1], 1))], 1)
    expected = np.linalg.lstsq(rows, r[0], rcond=None)[0]
    np.testing.assert_allclose(np.concatenate([delta[0], shift.T], 1), expected.T, atol=1e-4 * np.abs(expected).max())


def test_an_infinite_ridge_changes_no_bit() -> None:
    total, _, _ = sums(0)
    weight = np.random.default_rng(0).standard_normal(total.cross.shape).astype(np.float32)
    delta, shift = math.ridge(total, 1e20, with_bias=True)
    assert np.array_equal((weight + delta).astype(np.float32), weight) and np.abs(shift).max() < 1e-15


def test_nothing_comes_of_nothing() -> None:
    """Inputs that are always zero, and no rows at all."""
    total, x, _ = sums(0)
    outputs = np.zeros((1, x.shape[1], 16), np.float32)
    zero = Sums.of(np.zeros(x.shape, np.float32), outputs, outputs)
    for one in (zero, Sums.none(*total.cross.shape)):
        delta, shift = math.ridge(one, 0.1, with_bias=False)
        assert not delta.any() and not shift.any()
        assert math.refit(np.ones(total.cross.shape), total, one, math.ALPHAS, with_bias=True) is None


def test_the_alpha_is_the_one_that_serves_the_held_out_rows_best() -> None:
    """With fewer rows than inputs, a weak ridge fits noise: strong ones win, and what is reported is their error."""
    few, (many, _, _) = sums(0, rows=20)[0], sums(0, rows=4000)
    weight = np.full(many.cross.shape, TINY)
    for train, strong in ((few, True), (many, False)):
        found = math.refit(weight, train, many, ALPHAS[1:], with_bias=True)
        assert found is not None and (found.alpha >= 0.1) == strong
        errors = {alpha: many.moved(*math.ridge(train, alpha, with_bias=True)).error for alpha in ALPHAS[1:]}
        assert found.after == errors[found.alpha] == min(errors.values()) < found.before == many.error
    np.testing.assert_array_equal(found.delta, math.ridge(many + many, found.alpha, with_bias=True)[0])


@pytest.mark.parametrize("with_bias", [False, True])
def test_zeros_of_a_pruned_weight_stay(with_bias: bool) -> None:
    """The others get the least-squares change of what may change."""
    total = sums(0, rows=4000)[0]
    kept = np.random.default_rng(1).random(total.cross.shape) < 0.5
    delta, shift = math.ridge(total, 0.01, with_bias=with_bias, kept=kept)
    assert not delta[~kept].any() and delta[kept].any() and shift.any() == with_bias
    damping = 0.01 * np.trace((total.gram if not with_bias else np.append(total.gram[0].diagonal(), total.count)[None, None] * np.eye(
        total.gram.shape[1] + 1))[0]) / (total.gram.shape[1] + with_bias)
    slope = total.moved(delta, shift).cross - damping * delta
    assert np.abs(slope[kept]).max() < 2e-3 * np.abs(total.cross).max()


def test_a_refit_is_judged_by_what_is_stored() -> None:
    """Where storing makes all weights alike, no refit helps; where it overshoots, a stronger ridge is taken."""
    train, (held, _, _) = sums(0)[0], sums(0, rows=4000)
    weight = np.random.default_rng(0).standard_normal(train.cross.shape)
    assert math.refit(weight, train, held, math.ALPHAS, with_bias=False, store=lambda rows: 0 * rows) is None
    plain = math.refit(weight, train, held, math.ALPHAS, with_bias=True)
    careful = math.refit(weight, train, held, math.ALPHAS, with_bias=True, store=lambda rows: 3 * rows - 2 * np.tile(weight, (1, 5, 1)))
    assert plain is not None and careful is not None and careful.alpha > plain.alpha


def test_the_mean_goes_into_the_bias_before_refits_are_compared() -> None:
    """Then the error without one is that around the mean."""
    train, (held, _, r) = sums(0)[0], sums(0, rows=4000)
    found = math.refit(np.full(train.cross.shape, TINY), train, held, math.ALPHAS, with_bias=True, takes_mean=True)
    assert found is not None and found.before == pytest.approx(np.sum((r - train.mean_lack[:, None]) ** 2) / held.power, rel=1e-3)


# ---- the pass -------------------------------------------------------------------------------------------------------

W, B = np.random.default_rng(7).standard_normal((24, 16)), np.random.default_rng(8).standard_normal(16)
KERNEL = np.random.default_rng(9).standard_normal((16, 6, 3, 3))
WEIGHTS = {name: array.astype(np.float32) for name, array in {
    "w": W, "wt": W.T, "b": B, "c": B[:16], "k": KERNEL, "grouped": KERNEL[:, :3], "deep": KERNEL[:6, :1], "d": B[:6],
}.items()}  # fmt: skip
ROWS, IMAGES = "N, 24", "N, 6, 6, 6"
LAYERS: dict[str, tuple[str, str]] = {
    "MatMul and Add": (ROWS, "[it] a = MatMul(x, w) [add] y = Add(a, b)"),
    "MatMul": (ROWS, "[it] y = MatMul(x, w)"),
    "MatMul of tokens": ("N, 5, 24", "[it] a = MatMul(x, w) [add] y = Add(b, a)"),
    "Gemm": (ROWS, "[it] y = Gemm(x, w, b)"),
    "Gemm without a bias": (ROWS, "[it] y = Gemm(x, w)"),
    "Gemm transB, alpha, beta": (ROWS, "[it] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, wt, b)"),
    "Conv": (IMAGES, "[it] y = Conv <pads = [1, 1, 1, 1]> (x, k, b)"),
    "Conv strides, dilations": (IMAGES, "[it] y = Conv <strides = [2, 1], dilations = [1, 2]> (x, k, b)"),
    "Conv groups": (IMAGES, "[it] y = Conv <group = 2> (x, grouped)"),
    "Conv depthwise": (IMAGES, "[it] y = Conv <group = 6, pads = [1, 1, 1, 1]> (x, deep, d)"),
}  # fmt: skip


def layer(case: str, seed: int, samples: int) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """The float model, calibration data, and data that it does not see."""
    shape, body = LAYERS[case]
    x = heavy_tailed(seed, 2 * samples, *map(int, shape.split(", ")[1:]), axis=1 if shape == IMAGES else -1)
    return build(f"g (float[{shape}] x) => (float[] y) {{ {body} }}", **WEIGHTS), x[:samples], x[samples:]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", LAYERS)
def test_the_error_falls_on_data_that_it_has_not_seen(case: str, seed: int) -> None:
    reference, x, fresh = layer(case, seed, 600)
    ctx = context(reference, x)
    before = error(ctx, fresh)
    record = refit(ctx)
    assert error(ctx, fresh) < 0.97 * before
    (measured,) = record.measurements
    assert measured.numbers["error_before"] == pytest.approx(before, rel=0.25)
    assert measured.numbers["error_after"] == pytest.approx(error(ctx, fresh), rel=0.25)
    assert measured.numbers["alpha"] in math.ALPHAS


DEEP = "g (float[N, 24] x) => (float[] y) { [one] h = Gemm(x, w, b) [act] r = Relu(h) [two] a = MatMul(r, v) [add] y = Add(a, c) }"


def deep(seed: int, samples: int = 600) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    x = heavy_tailed(seed, 2 * samples, 24)
    rng = np.random.default_rng(seed)
    weights = {"v": rng.standard_normal((16, 12)).astype(np.float32), "c": np.zeros(12, np.float32)}
    return build(DEEP, **{**WEIGHTS, **weights}), x[:samples], x[samples:]


def test_each_layer_sees_what_the_refitted_ones_before_it_produce() -> None:
    """So that two runs, one a layer, give the weights of one run."""
    reference, x, _ = deep(0)
    once, twice = context(reference, x), context(reference, x)
    refit(once)
    refit(twice, exclude=("two",))
    refit(twice, exclude=("one",))
    for name in ("w", "v", "b", "c"):
        a, b = (ir.constant(one.model.graph.initializers[name]) for one in (once, twice))
        np.testing.assert_array_equal(a, b)
        assert not np.array_equal(a, ir.constant(reference.graph.initializers[name]))


@pytest.mark.parametrize("seed", range(3))
def test_several_layers(seed: int) -> None:
    reference, x, fresh = deep(seed)
    ctx = context(reference, x)
    before = error(ctx, fresh)
    refit(ctx)
    assert error(ctx, fresh) < 0.9 * before


def test_the_result_is_the_same_each_time() -> None:
    reference, x, _ = deep(0)
    protos = []
    for _ in range(2):
        ctx = context(reference, x)
        refit(ctx)
        protos.append(ir.to_proto(ctx.model).SerializeToString())
    assert protos[0] == protos[1]


def test_a_shared_weight_becomes_two() -> None:
    reference = build(
        "g (float[N, 24] x) => (float[] y, float[] z) { [one] y = MatMul(x, w) t = Tanh(x) [two] z = MatMul(t, w) }", **WEIGHTS
    )
    ctx = context(reference, heavy_tailed(0, 600, 24))
    assert refit(ctx).edits["weight"] == 1
    first, second = (ir.constant(node.inputs[1]) for node in ctx.model.graph if node.op_type == "MatMul")
    assert not np.array_equal(first, second)


def test_samples() -> None:
    """Only the first so many count."""
    reference, x, _ = deep(0)
    few, cut = context(reference, x), context(reference, x)
    cut.calib = cut.calib.take(200)
    refit(few, samples=200)
    refit(cut)
    np.testing.assert_array_equal(*(ir.constant(ctx.model.graph.initializers["w"]) for ctx in (few, cut)))


def test_float_activations_leave_nothing_to_repair() -> None:
    reference, x, _ = deep(0)
    with pytest.raises(RecipeError, match="no refit lowers its error"):
        refit(context(reference, x, bits=None))
    ctx = context(reference, x, bits=None)
    assert not refit(ctx, allow_no_effect=True).edits


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "excluded": ("y = Gemm(x, w, b)", {"exclude": ("Gemm",)}, "excluded by the recipe"),
    "weight": ("t = Transpose(x) y = MatMul(x, t)", {}, "its weight is not a constant"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    body, options, reason = REFUSED[case]
    reference = build(f"g (float[N, 24] x) => (float[] y) {{ {body} }}", **WEIGHTS)
    with pytest.raises(RecipeError, match=reason):
        refit(context(reference, heavy_tailed(0, 64, 24)), **options)


@pytest.mark.parametrize("options", [{"alphas": ()}, {"alphas": (0.0,)}, {"samples": -1}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Aqer(**options)


def test_patterns_that_match_nothing_are_refused() -> None:
    reference, x, _ = deep(0)
    with pytest.raises(RecipeError, match="matches no node"):
        refit(context(reference, x), exclude=("nobody",))


def dump(model: ir.Model) -> str:
    rows = [f"{name}: {value.dtype}{list(value.shape or ())}" for name, value in model.graph.initializers.items()]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    return "\n".join([*rows, ""])


@pytest.mark.parametrize("case", ["biases"])
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew: a bias is made where one can be, and nothing else is added."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    ctx = context(onnx_ir.from_proto(parser.parse_model(before)), heavy_tailed(0, 300, 4))
    refit(ctx)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(ctx.model)}", encoding="utf-8")
    else:
        assert dump(ctx.model) == expected
