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

from graphq import ir, linear, stored
from graphq.calibration import open_calibration
from graphq.errors import GraphqError, RecipeError
from graphq.executor import Executor, decode
from graphq.passes import _channels
from graphq.passes import _nm_math as math
from graphq.passes.aqer import Aqer
from graphq.passes.higgs import Higgs
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.nm_prune import NmPrune
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.round import Round
from graphq.passes.svd_branch import SvdBranch
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


# ---- the pass -------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "MatMul": ("5, 32", "[it] m = MatMul(x, w) y = Add(m, b)", (32, 24)),
    "Gemm": ("32", "[it] y = Gemm(x, w, b)", (32, 24)),
    "transB": ("32", "[it] y = Gemm <transB = 1> (x, w, b)", (24, 32)),
    "Conv 1x1": ("32, 6, 6", "[it] y = Conv(x, w, b)", (24, 32, 1, 1)),
    "Conv 3x3": ("8, 6, 6", "[it] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", (24, 8, 3, 3)),
    "Conv in groups": ("16, 6, 6", "[it] y = Conv <group = 2> (x, w, b)", (24, 8, 3, 3)),
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


@pytest.mark.parametrize(("case", "places"), [("Conv 3x3", ("centre", "edge", "corner")), ("Conv1d", ("centre", "edge")), ("Conv 1x1", ()),
                                              ("MatMul", ())])  # fmt: skip
def test_where_a_kernel_would_lose_its_weights_is_reported(case: str, places: tuple[str, ...]) -> None:
    """The share at each place of the weight before it is pruned, at the rate of the pattern."""
    proto, x = model_of(case)
    (measured,) = prune(proto, x, n=1)[1].measurements
    found = {key: value for key, value in measured.numbers.items() if key.startswith("sparsity_")}
    assert list(found) == [f"sparsity_{place}" for place in places]
    if places:
        size = np.abs(floats(*LAYERS[case][2]))
        gone = (size < np.quantile(size, 0.75)).mean((0, 1)).reshape(-1)
        assert found["sparsity_centre"] == pytest.approx(gone[len(gone) // 2], abs=1e-3)


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
              for score, refit in (("magnitude", False), ("sparsegpt", False), ("sparsegpt", True), ("alps", True))]  # fmt: skip
    assert errors[0] > errors[1] > errors[2] > errors[3]


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


def quantized(model: ir.Model, x: np.ndarray, one: Pass, *before: Pass, target: str = "onnxruntime") -> ir.Model:
    copy = ir.clone(model)
    data = open_calibration({"x": x}, ir.inputs(copy))
    run_passes([*before, one], PassContext(copy, ir.clone(copy), data, data, get_target(target)), verify_graph)
    return copy


def stored_weight(model: ir.Model) -> np.ndarray:
    """What the quantized weight of `it` stands for."""
    value = linear.weight_of(next(node for node in model.graph if node.name == "it"))
    assert value is not None and stored.is_stored(value)
    return decode(model, value)


ROUNDERS: dict[str, Pass] = {
    **{f"round {name}{' repaired' * repair}{' asymmetric' * (not symmetric)}":
       Round(algorithm=name, repair=repair, symmetric=symmetric, layers="all")  # type: ignore[arg-type]
       for name in ("rtn", "gptq", "wqer", "greedy") for repair in (False, True) for symmetric in (True, False)},
    "round in groups": Round(algorithm="greedy", group_size=16, layers="all"), "round to 8 bits": Round(bits=8, layers="all"),
    "quantize-weights 4": QuantizeWeights(bits=4), "quantize-weights 8": QuantizeWeights(bits=8),
    "quantize-weights in groups": QuantizeWeights(bits=4, group_size=16),
    "insert-qdq": InsertQdq(float_budget=0.0), "insert-qdq 4": InsertQdq(weight_bits=4, float_budget=0.0),
}  # fmt: skip


@pytest.mark.parametrize("case", ROUNDERS)
def test_zeros_survive_quantization(case: str) -> None:
    """And the weights that were kept do not all become zeros."""
    proto, x = model_of("MatMul")
    model, _ = prune(proto, x)
    before, after = weight_of(model, "it"), stored_weight(quantized(model, x, ROUNDERS[case]))
    assert not after[before == 0].any() and np.count_nonzero(after) > np.count_nonzero(before) / 2


@pytest.mark.parametrize("case", ["Conv 3x3", "Conv in groups"])
def test_zeros_of_convolutions_survive_quantization(case: str) -> None:
    proto, x = model_of(case)
    model, _ = prune(proto, x)
    before = weight_of(model, "it")
    for one, target in ((Round(bits=4, repair=True, layers="all"), "onnxruntime"), (InsertQdq(float_budget=0.0), "tensorrt")):
        assert not stored_weight(quantized(model, x, one, target=target))[before == 0].any()


def test_zeros_survive_int8_activations_with_rounded_weights_and_a_refit() -> None:
    proto, x = model_of("MatMul")
    model, _ = prune(proto, x)
    found = quantized(model, x, Round(bits=8, repair=True), InsertQdq(weights=False), Aqer(allow_no_effect=True))
    assert not stored_weight(found)[weight_of(model, "it") == 0].any()
    assert error(found, proto, x) < 1.5 * error(model, proto, x)


@pytest.mark.parametrize("one", [Higgs(bits=4), SvdBranch(rank=4, min_gain_db=0)], ids=lambda one: one.name)
def test_a_pass_that_undoes_the_pattern_is_refused(one: Pass) -> None:
    proto, x = model_of("MatMul")
    model = onnx_ir.from_proto(proto)
    with pytest.raises(RecipeError, match="2:4 sparsity of a weight is undone") as caught:
        quantized(model, x, one, NmPrune())
    assert any(f"pass: {one.name}" in note for note in caught.value.__notes__)


def test_the_pattern_is_guarded_through_a_newer_opset() -> None:
    proto, x = model_of("MatMul")
    proto.opset_import[0].version = 13
    with pytest.raises(RecipeError, match="sparsity of a weight is undone"):
        quantized(onnx_ir.from_proto(proto), x, Higgs(bits=4), NmPrune())


def test_rounding_that_keeps_zeros_still_beats_rounding_to_nearest() -> None:
    proto, x = model_of("MatMul")
    model, _ = prune(proto, x)
    base = ir.to_proto(model)
    errors = {name: error(quantized(model, x, Round(bits=3, algorithm=name, layers="all")), base, x) for name in ("rtn", "gptq", "greedy")}
    assert errors["greedy"] <= errors["gptq"] < errors["rtn"]


# ---- channels that fill no group, and their order -------------------------------------------------------------------


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize(("dims", "body", "shape", "axis"), [
    ("30", "[it] y = MatMul(x, w)", (30, 16), 0), ("6, 5, 5", "[it] y = Conv(x, w)", (16, 6, 3, 3), 1),
    ("12, 5, 5", "[it] y = Conv <group = 2> (x, w)", (16, 6, 3, 3), 1),
])  # fmt: skip
def test_channels_that_fill_no_group_stay_dense(dims: str, body: str, shape: tuple[int, ...], axis: int, score: math.Score) -> None:
    x = floats(64, *map(int, dims.split(", ")))
    model, record = prune(build(f"(float[N, {dims}] x) => (float[] y) {{ {body} }}", w=floats(*shape)), x, score=score)
    rows = np.moveaxis(weight_of(model, "it"), axis, -1)
    whole = shape[axis] // 4 * 4
    assert (np.count_nonzero(rows[..., :whole].reshape(*rows.shape[:-1], -1, 4), axis=-1) == 2).all() and rows[..., whole:].all()
    numbers = record.measurements[0].numbers
    assert numbers["dense_channels"] == shape[axis] - whole == 2
    assert numbers["zeros"] == pytest.approx(whole / 2 / shape[axis]) == pytest.approx(np.mean(rows == 0))


def test_the_search_for_an_order_finds_one_that_loses_nothing() -> None:
    """Half of the channels are nothing, and lie together."""
    energy = np.abs(floats(40, 18)).astype(np.float64)
    energy[:, 8:16] = 0
    before, order, after = math.permutation(energy, 2, 4)
    assert before < 0.9 * energy[:, :16].sum() and after == pytest.approx(energy[:, :16].sum())
    assert sorted(order) == list(range(18)) and list(order[16:]) == [16, 17]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_an_order_keeps_more_and_says_how_much(n: int, m: int, seed: int) -> None:
    energy = np.random.default_rng(seed).standard_t(4, (64, 48)) ** 2
    before, order, after = math.permutation(energy, n, m)
    kept = [float((rows * math.largest(rows, n, m)).sum()) for rows in (energy, energy[:, order])]
    assert [before, after] == pytest.approx(kept) and after > before and sorted(order) == list(range(48))
    np.testing.assert_array_equal(order, math.permutation(energy, n, m)[1])


CHAINS: dict[str, tuple[str, str, str]] = {
    "an activation": ("4, 16", "h = MatMul(x, a) i = Add(h, b) g = Gelu(i) [it] y = MatMul(g, w)", "a b w"),
    "a gate": ("4, 16", "h = MatMul(x, a) u = MatMul(x, c) s = Sigmoid(h) t = Mul(h, s) g = Mul(t, u) [it] y = MatMul(g, w)", "a c w"),
    "a normalization": (
        "4, 16", "h = MatMul(x, a) n = LayerNormalization <axis = -1> (h, b, d) [it] y = MatMul(n, w) z = MatMul(n, v)", "a b d w v"),
    "a residual": ("4, 16", "h = MatMul(x, a) r = Relu(h) t = MatMul(r, c2) s = Add(h, t) [it] y = MatMul(s, w)", "a c2 w"),
    "Gemm": ("16", "h = Gemm <transB = 1> (x, at, b) r = Relu(h) [it] y = Gemm <transB = 1, alpha = 0.5> (r, wt)", "at b wt"),
    "transposed": ("4, 16", "h = MatMul(x, a) t = Transpose <perm = [0, 2, 1]> (h) r = Tanh(t) [it] y = Conv(r, w1)", "a w1"),
    "images": (
        "16, 6, 6", "h = Conv(x, k, b) p = PRelu(h, e) q = Conv <group = 32> (p, dw, b) m = MaxPool <kernel_shape = [2, 2]> (q) "
        "[it] y = Conv(m, kw)", "k b e dw kw"),
    "a constant of its own axis": ("4, 16", "h = MatMul(x, a) i = Mul(f, h) j = Clip(i, lo) [it] y = MatMul(j, w)", "a f lo w"),
}  # fmt: skip
CONSTANTS = {
    "a": (16, 32), "c": (16, 32), "c2": (32, 32), "at": (32, 16), "b": (32,), "d": (32,), "w": (32, 8), "v": (32, 5), "wt": (8, 32),
    "w1": (8, 32, 1), "k": (32, 16, 1, 1), "dw": (32, 1, 2, 2), "e": (32, 1, 1), "kw": (8, 32, 1, 1), "f": (4, 32), "lo": (),
}  # fmt: skip


def chain(case: str, outputs: str = "float[] y") -> tuple[onnx.ModelProto, np.ndarray]:
    dims, body, names = CHAINS[case]
    outputs = f"{outputs}, float[] z" if "z = " in body else outputs
    weights = {name: np.asarray(floats(*CONSTANTS[name], seed=seed)) for seed, name in enumerate(names.split(" "))}
    return build(f"(float[N, {dims}] x) => ({outputs}) {{ {body} }}", **weights), floats(32, *map(int, dims.split(", ")), seed=9)


def normalized(proto: onnx.ModelProto, x: np.ndarray) -> tuple[ir.Model, PassContext]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    data = open_calibration({"x": x}, ir.inputs(model))
    ctx = PassContext(model, ir.clone(model), data, data, get_target("onnxruntime"))
    run_passes([Normalize()], ctx, verify_graph)
    return model, ctx


@pytest.mark.parametrize("case", CHAINS)
def test_another_order_of_channels_changes_nothing(case: str) -> None:
    """1e-5 of the largest output, and the weight itself is reordered."""
    proto, x = chain(case)
    model, ctx = normalized(proto, x)
    node, before = next(node for node in model.graph if node.name == "it"), weight_of(model, "it")
    found, order = _channels.region(node), np.random.default_rng(0).permutation(32)
    assert isinstance(found, _channels.Region)
    found.reorder(ctx.edit, order)
    verify_graph(model)
    np.testing.assert_array_equal(weight_of(model, "it"), before.take(order, linear.in_axis(node)))
    results = [Executor(one, threads=1).run({"x": x}) for one in (model, onnx_ir.from_proto(proto))]
    for ours, wanted in zip(*results, strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


MIXED = {
    "an input": ("32", "[it] y = Gemm(x, w)", "input or output of the model"),
    "a reshape": ("16", "h = Gemm(x, a) r = Reshape(h, s) t = Relu(r) u = Reshape(t, s) [it] y = Gemm(u, w)", "Reshape"),
    "a softmax": ("16", "h = Gemm(x, a) r = Softmax(h) [it] y = Gemm(r, w)", "Softmax"),
    "another reader": ("16", "h = Gemm(x, a) t = Concat <axis = 1> (h, h) z = Relu(t) [it] y = Gemm(h, w)", "Concat"),
    "a computed weight": ("16", "h = Gemm(x, a) t = Transpose(h) z = MatMul(h, t) [it] y = Gemm(h, w)", "does not sum over them"),
    "transposed data": ("16", "h = Gemm(x, a) t = Transpose(h) r = Relu(t) [it] y = Gemm <transA = 1> (r, w)", "rows are channels"),
    "groups": ("16, 4, 4", "h = Conv <group = 2> (x, kg) r = Relu(h) [it] y = Conv(r, kw)", "in groups"),
}


@pytest.mark.parametrize("case", MIXED)
def test_channels_that_cannot_be_told_apart_keep_their_order(case: str) -> None:
    dims, body, reason = MIXED[case]
    outputs_ = "float[] y, float[] z" if "z = " in body else "float[] y"
    constants = {"w": floats(32, 8), "a": floats(16, 32), "s": np.array([-1, 32]), "kg": floats(32, 8, 1, 1), "kw": floats(8, 32, 1, 1)}
    proto = build(f"(float[N, {dims}] x) => ({outputs_}) {{ {body} }}", **constants)
    _, record = prune(proto, floats(32, *map(int, dims.split(", "))), permute=True)
    assert any("keep their order" in text and reason in text for _, text in record.notes)


@pytest.mark.parametrize("score", ["magnitude", "wanda", "alps"])
@pytest.mark.parametrize("case", ["an activation", "images", "a residual"])
def test_permute_keeps_more(case: str, score: math.Score) -> None:
    """Of the weights' energy, as reported; and where neighbours differ little, the output is closer."""
    proto, x = chain(case)
    plain, _ = prune(proto, x, score=score, refit=False)
    better, record = prune(proto, x, score=score, refit=False, permute=True)
    kept = [row.numbers for row in record.measurements if "kept" in row.numbers]
    assert kept and all(row["kept"] > row["kept_before"] for row in kept)
    assert error(better, proto, x) < 1.1 * error(plain, proto, x)


REFUSED = {
    "a depthwise convolution": ("8, 6, 6", "y = Conv <group = 8> (x, kd)", "a depthwise convolution sums over one channel"),
    "small groups": ("6, 6, 6", "y = Conv <group = 2> (x, k3)", "its 3 input channels a group do not fill a group of 4"),
    "three channels": ("3, 6, 6", "y = Conv(x, k3)", "its 3 input channels do not fill a group of 4"),
    "a transposed convolution": ("8, 6, 6", "y = ConvTranspose(x, kt)", "transposed convolution"),
    "a computed weight": ("4, 4", "r = Transpose <perm = [0, 2, 1]> (x) y = MatMul(x, r)", "its weight is not a constant"),
    "a quantized weight": ("32", "c = DequantizeLinear(q, s, z) y = MatMul(x, c)", "quantized already"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """The node is named with the reason and stays as it is."""
    dims, body, reason = REFUSED[case]
    constants = {
        "kd": floats(8, 1, 3, 3), "k3": floats(8, 3, 3, 3), "kt": floats(8, 4, 3, 3), "q": np.ones((32, 8), np.int8),
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
