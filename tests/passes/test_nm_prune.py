"""nm-prune: N of M weights stay, along the input channels; what is left makes up for what went; and who stays dense."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser
from pydantic import ValidationError

from graphq import ir, linear
from graphq.calibration import open_calibration
from graphq.errors import GraphqError, RecipeError
from graphq.executor import Executor
from graphq.passes import _masked
from graphq.passes import _nm_math as math
from graphq.passes._nm_math import Pattern
from graphq.passes._round_math import damped
from graphq.passes.nm_prune import NmPrune
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "nm_prune"
SCORES: tuple[math.Score, ...] = ("magnitude", "wanda", "sparsegpt", "alps")
PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 2)]


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\ng {text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def prune(proto: onnx.ModelProto, x: np.ndarray, *others: Pass, **options: Any) -> tuple[ir.Model, PassRecord]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    data = open_calibration({"x": x}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    record = run_passes([Normalize(), *others, NmPrune(**options)], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return model, record


def outputs(model: ir.Model | onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    model = onnx_ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    return Executor(model, threads=1).run({"x": x})[0]


def error(model: ir.Model, proto: onnx.ModelProto, x: np.ndarray) -> float:
    """Relative squared error of the output."""
    wanted = outputs(proto, x).astype(np.float64)
    return float(np.sum((outputs(model, x) - wanted) ** 2) / np.sum(wanted**2))


def weight_of(model: ir.Model, name: str) -> np.ndarray:
    node = next(node for node in model.graph if node.name == name)
    return np.asarray(ir.constant(linear.weight_of(node)))


def dump(model: ir.Model) -> str:
    rows = [
        f"{name}: {np.asarray(ir.constant(value)).astype(np.float64).round(3).tolist()}" for name, value in model.graph.initializers.items()
    ]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    return "\n".join([*rows, ""])


@pytest.mark.parametrize("case", ["matmul_gemm"])
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = prune(parser.parse_model(before), floats(64, 4), score="wanda", refit=False)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- formulas -------------------------------------------------------------------------------------------------------


def layer(seed: int, inputs: int = 96, outputs: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight [O, D], a damped Gram matrix, and rows that it has not seen, heavy-tailed and correlated."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, (4000, inputs)) * 10 ** rng.uniform(-1, 1, inputs)
    x = x @ np.linalg.qr(rng.standard_normal((inputs, inputs)))[0] * 10 ** rng.uniform(-0.5, 0.5, inputs)
    gram = x[:2000].T @ x[:2000]
    return rng.standard_t(5, (outputs, inputs)), damped(gram[None], 2000)[0], x[2000:]


@pytest.mark.parametrize("seed", range(5))
def test_t4_each_method_beats_the_one_before_it(seed: int) -> None:
    """METHODS.md T4, 2:4, output error on rows that were not seen: magnitude > Wanda > SparseGPT >= mask and refit."""
    weight, gram, x = layer(seed)

    def lost(found: np.ndarray) -> float:
        return float(np.sum((x @ (found - weight).T) ** 2) / np.sum((x @ weight.T) ** 2))

    magnitude, wanda, sparsegpt, alps = (math.prune(weight, gram, Pattern(2, 4, weight.shape[1]), score) for score in SCORES)
    refits = [_masked.fit(*pruned, gram, weight @ gram) for pruned in (magnitude, wanda, sparsegpt, alps)]
    assert lost(magnitude[0]) > lost(wanda[0]) > lost(sparsegpt[0]) >= lost(refits[2]) > lost(refits[3])
    assert lost(refits[1]) < lost(wanda[0]) / 2 and lost(refits[0]) < lost(magnitude[0]) / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("score", SCORES)
def test_exactly_n_of_m_stay(score: math.Score, n: int, m: int, seed: int) -> None:
    weight, gram, _ = layer(seed)
    found, mask = math.prune(weight, gram, Pattern(n, m, 96), score)
    assert (mask.reshape(len(weight), -1, m).sum(-1) == n).all()
    assert not found[~mask].any() and not _masked.fit(found, mask, gram, weight @ gram)[~mask].any()
    if score in ("magnitude", "wanda"):
        np.testing.assert_array_equal(found[mask], weight[mask])


def test_of_equal_scores_the_first_stay() -> None:
    np.testing.assert_array_equal(math.largest(np.ones((1, 8)), 2, 4), [[True, True, False, False] * 2])


@pytest.mark.parametrize("score", SCORES)
def test_refit_is_the_least_squares_solution_of_each_output(score: math.Score) -> None:
    weight, gram, _ = layer(0)
    start, mask = math.prune(weight, gram, Pattern(2, 4, weight.shape[1]), score)
    found = _masked.fit(start, mask, gram, weight @ gram)
    for row, kept, one in zip(found, mask, weight, strict=True):
        exact = np.linalg.solve(gram[np.ix_(kept, kept)], gram[kept] @ one)
        np.testing.assert_allclose(row[kept], exact, atol=2e-2 * np.abs(exact).max())
        best = np.zeros(len(one))
        best[kept] = exact
        assert power(row - one, gram) <= power(best - one, gram) * (1 + 1e-4)


def power(delta: np.ndarray, gram: np.ndarray) -> float:
    return float(delta @ gram @ delta)


@pytest.mark.parametrize("seed", range(3))
def test_refit_never_loses_to_its_start(seed: int) -> None:
    weight, gram, _ = layer(seed)
    for score in SCORES:
        start, mask = math.prune(weight, gram, Pattern(2, 4, weight.shape[1]), score)
        found = _masked.fit(start, mask, gram, weight @ gram)
        assert all(power(a - one, gram) <= power(b - one, gram) * (1 + 1e-9) for a, b, one in zip(found, start, weight, strict=True))


def test_weights_that_fit_already_are_left_alone() -> None:
    weight, gram, _ = layer(0)
    pruned, mask = math.prune(weight, gram, Pattern(2, 4, 96), "magnitude")
    np.testing.assert_array_equal(_masked.fit(pruned, mask, gram, pruned @ gram), pruned)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inputs", [8, 132])
def test_sparsegpt_is_the_textbooks(inputs: int, seed: int) -> None:
    """The same without blocks: each column that goes is made up for through the inverse of what is left (OBS)."""
    weight, gram, _ = layer(seed, inputs, 8)
    found, mask = math.prune(weight, gram, Pattern(2, 4, inputs), "sparsegpt")
    left, expected = weight.copy(), np.empty(weight.shape, bool)
    first = [np.linalg.inv(gram[k:, k:])[0] for k in range(inputs)]
    for k in range(inputs):
        if k % 4 == 0:
            expected[:, k : k + 4] = math.largest(left[:, k : k + 4] ** 2 / [first[j][0] for j in range(k, k + 4)], 2, 4)
        gone = np.where(expected[:, k], 0.0, left[:, k])
        left[:, k:] -= gone[:, None] * first[k] / first[k][0]
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(found, left, atol=1e-8 * np.abs(weight).max())


# ---- the pass -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "MatMul": ("5, 32", "[it] m = MatMul(x, w) y = Add(m, b)", (32, 24)),
    "Gemm": ("32", "[it] y = Gemm(x, w, b)", (32, 24)),
    "transB": ("32", "[it] y = Gemm <transB = 1> (x, w, b)", (24, 32)),
    "Conv 1x1": ("32, 6, 6", "[it] y = Conv(x, w, b)", (24, 32, 1, 1)),
    "Conv 3x3": ("8, 6, 6", "[it] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", (24, 8, 3, 3)),
    "Conv1d": ("8, 20", "[it] y = Conv <strides = [2]> (x, w, b)", (24, 8, 3)),
}


def model_of(case: str) -> tuple[onnx.ModelProto, np.ndarray]:
    dims, body, shape = LAYERS[case]
    x = floats(96, *map(int, dims.split(", ")), seed=1)
    mixed = np.cumsum(x, axis=-1 if case in ("MatMul", "Gemm", "transB") else 1) + np.float32(0.5)  # neighbours are alike
    return build(f"(float[N, {dims}] x) => (float[] y) {{ {body} }}", w=floats(*shape), b=floats(24, seed=2)), mixed


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("case", LAYERS)
def test_table(case: str, n: int, m: int, score: math.Score) -> None:
    """Groups lie along the input channels, for each kernel position; refitted, the layer loses less."""
    proto, x = model_of(case)
    plain, plain_record = prune(proto, x, n=n, m=m, score=score, refit=False)
    refitted, record = prune(proto, x, n=n, m=m, score=score)
    axis = 0 if case in ("MatMul", "Gemm") else 1
    for model in (plain, refitted):
        groups = np.moveaxis(weight_of(model, "it"), axis, -1)
        assert (np.count_nonzero(groups.reshape(*groups.shape[:-1], -1, m), axis=-1) == n).all()
    assert error(refitted, proto, x) < error(plain, proto, x)
    for model, one in ((plain, plain_record), (refitted, record)):
        (measured,) = one.measurements
        assert measured.where == "it"
        assert measured.numbers["sqnr_db"] == pytest.approx(-10 * np.log10(error(model, proto, x)), abs=0.05)


def test_without_refit_magnitude_keeps_what_is_left_and_the_bias() -> None:
    proto, x = model_of("Gemm")
    model, record = prune(proto, x, score="magnitude", refit=False)
    weight, before = weight_of(model, "it"), floats(32, 24)
    np.testing.assert_array_equal(weight, np.where(weight != 0, before, 0))
    assert record.edits == {"weight": 1}


def test_the_mean_error_goes_into_the_bias() -> None:
    proto, x = model_of("MatMul")
    model, _ = prune(proto, x)
    shift = outputs(model, x).mean((0, 1), dtype=np.float64) - outputs(proto, x).mean((0, 1), dtype=np.float64)
    assert np.abs(shift).max() < 1e-5 * np.abs(outputs(proto, x)).max()


def test_a_layer_without_a_bias_is_refitted_too() -> None:
    proto, x = build("(float[N, 5, 32] x) => (float[] y) { [it] y = MatMul(x, w) }", w=floats(32, 24)), floats(96, 5, 32) + np.float32(0.5)
    plain, refitted = (prune(proto, x, refit=refit)[0] for refit in (False, True))
    assert error(refitted, proto, x) < error(plain, proto, x)


DEEP = """(float[N, 32] x) => (float[] y) { [one] h = Gemm(x, w1, b) r = Relu(h) [two] m = Gemm(r, w2, b) s = Relu(m)
    [three] y = Gemm(s, w3, b) }"""


@pytest.mark.parametrize("seed", range(3))
def test_order_of_algorithms_holds_through_a_network(seed: int) -> None:
    """On samples that the pass has not seen."""
    proto = build(DEEP, b=floats(32, seed=seed), **{f"w{k}": floats(32, 32, seed=seed + k) / 4 for k in (1, 2, 3)})
    x = floats(1200, 32, seed=seed) @ floats(32, 32, seed=seed + 9)
    errors = [error(prune(proto, x[:600], score=score, refit=refit)[0], proto, x[600:])
              for score, refit in (("magnitude", False), ("sparsegpt", False), ("sparsegpt", True))]  # fmt: skip
    assert errors[0] > errors[1] > errors[2]


def test_a_layer_sees_what_the_pruned_ones_before_it_produce() -> None:
    """Inputs that the first layer no longer gives cost the second nothing: it is fitted to what is there."""
    first = np.zeros((4, 8), np.float32)
    first[:, 0], first[0, 1:] = [3, 2, 0.1, 0.1], 1
    first[1, 1:], first[2, 1:] = 2, 0.1
    proto = build("(float[N, 4] x) => (float[] y) { [one] h = Gemm(x, w) [two] y = Gemm(h, v) }", w=first, v=floats(8, 3))
    x = floats(64, 4)
    both, _ = prune(proto, x)
    only, _ = prune(proto, x, exclude=("one",))
    assert not np.array_equal(weight_of(both, "two"), weight_of(only, "two"))


def test_zeros_survive_round_to_nearest() -> None:
    proto, x = model_of("MatMul")
    model, _ = prune(proto, x)
    before = weight_of(model, "it")
    data = open_calibration({"x": x}, ir.inputs(model))
    run_passes([QuantizeWeights(bits=4)], PassContext(model, ir.clone(model), data, data, get_target("onnxruntime")), verify_graph)
    codes = ir.constant(ir.producer(next(node for node in model.graph if node.name == "it").inputs[1]).inputs[0])  # type: ignore[union-attr]
    assert codes is not None and not codes.astype(np.int8)[before == 0].any() and codes.astype(np.int8).any()


REFUSED = {
    "a grouped convolution": ("8, 6, 6", "y = Conv <group = 2> (x, k)", "no grouped convolution"),
    "three channels": ("3, 6, 6", "y = Conv(x, k3)", "its 3 input channels are not a multiple of 4"),
    "a transposed convolution": ("8, 6, 6", "y = ConvTranspose(x, kt)", "transposed convolution"),
    "a computed weight": ("4, 4", "r = Transpose <perm = [0, 2, 1]> (x) y = MatMul(x, r)", "its weight is not a constant"),
    "a quantized weight": ("32", "c = DequantizeLinear(q, s, z) y = MatMul(x, c)", "quantized already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """The node is named with the reason and stays as it is."""
    dims, body, reason = REFUSED[case]
    constants = {
        "k": floats(8, 4, 3, 3), "k3": floats(8, 3, 3, 3), "kt": floats(8, 4, 3, 3), "q": np.ones((32, 8), np.int8),
        "s": np.array(0.1, np.float32), "z": np.array(0, np.int8),
    }  # fmt: skip
    proto = build(f"(float[N, {dims}] x) => (float[] y) {{ {body} }}", **constants)
    x = floats(8, *map(int, dims.split(", ")))
    with pytest.raises(RecipeError, match="changed nothing"):
        prune(proto, x)
    _, record = prune(proto, x, allow_no_effect=True)
    assert len(record.skipped) == 1 and reason in record.skipped[0][1] and not record.edits


def test_excluded_layers_stay_dense() -> None:
    proto = build(DEEP, b=floats(32), **{f"w{k}": floats(32, 32, seed=k) for k in (1, 2, 3)})
    model, record = prune(proto, floats(64, 32), exclude=("t*",))
    assert [np.count_nonzero(weight_of(model, name)) for name in ("one", "two", "three")] == [512, 1024, 1024]
    assert [reason for _, reason in record.skipped] == ["excluded by the recipe"] * 2
    with pytest.raises(GraphqError, match="matches no node"):
        prune(proto, floats(64, 32), exclude=("nobody",))


@pytest.mark.parametrize("options", [{"n": 4}, {"n": 5}, {"n": 0}, {"m": 33}, {"m": 1}, {"score": "random"}, {"samples": -1}])
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        NmPrune(**options)


def test_two_runs_give_the_same_bytes() -> None:
    proto, x = model_of("Conv 3x3")
    first, second = (ir.to_proto(prune(proto, x)[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
