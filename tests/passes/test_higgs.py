"""higgs: grids that are the best there are for normal numbers, codes that decode to what was meant, and better than plain rounding."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from graphq import ir, precision, stored
from graphq.calibration import open_calibration
from graphq.codebooks import Codebook, Coded
from graphq.editor import Editor
from graphq.errors import RecipeError, TargetError
from graphq.executor import Executor
from graphq.noise import decibel
from graphq.passes import _block_transform_math as blocks
from graphq.passes import _higgs_math as math
from graphq.passes import _round_math
from graphq.passes.higgs import Higgs
from graphq.passes.normalize import Normalize
from graphq.passes.round import Round
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.precision import Bits
from graphq.spec import PerGroup, QuantSpec
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "higgs"
GROUP = 32


# ---- grids and arrays -----------------------------------------------------------------------------------------------


def grid_error(book: Codebook) -> float:
    """Mean squared error of a normal number on a grid of p = 1, in closed form."""
    points = book.points[:, 0].astype(np.float64)
    share, mean = math._cells(points)
    return float(1 - 2 * np.sum(points * mean) + np.sum(points**2 * share))


@pytest.mark.parametrize(("bits", "expected"), [(1, 0.36338), (2, 0.11748), (3, 0.03455), (4, 0.00950)])
def test_t8(bits: int, expected: float) -> None:
    """The mean squared error of the grid is the Lloyd-Max constant, in closed form and on samples: 1 %."""
    book = math.grid(bits, 1)
    x = np.random.default_rng(0).standard_normal(400_000).astype(np.float32)
    assert grid_error(book) == pytest.approx(expected, rel=0.01)
    assert np.mean((book.dequantize(book.quantize(x)[:, None])[:, 0] - x) ** 2) == pytest.approx(expected, rel=0.01)
    np.testing.assert_allclose(book.points, -book.points[::-1], atol=1e-6)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_pairs_of_numbers_err_less(bits: int) -> None:
    """By 5 % at 2 bits and more above; each point is the mean of what is nearest to it, to 0.05."""
    line, plane = math.grid(bits, 1), math.grid(bits, 2)
    x = np.random.default_rng(1).standard_normal((100_000, 2)).astype(np.float32)
    places = plane.quantize(x)[:, 0]
    assert plane.points.shape == (4**bits, 2)
    assert np.mean((plane.dequantize(places[:, None]) - x) ** 2) < 0.95 * grid_error(line)
    counts = np.bincount(places, minlength=len(plane.points))
    means = np.stack([np.bincount(places, x[:, axis], len(counts)) / np.maximum(counts, 1) for axis in (0, 1)], axis=1)
    assert np.abs(means - plane.points)[counts > 1000].max(initial=0.0) < 0.05


def heavy(seed: int, *shape: int) -> np.ndarray:
    return np.asarray(np.random.default_rng(seed).standard_t(3, shape))


def sqnr(weight: np.ndarray, made: np.ndarray, gram: np.ndarray | None = None) -> float:
    """Of the weight itself, or of what it makes of inputs with this Gram matrix."""
    gram = np.eye(weight.shape[1]) if gram is None else gram
    power, noise = (float(np.einsum("od,de,oe->", part, gram, part)) for part in (weight, made - weight))
    return decibel(power, noise)


@pytest.mark.parametrize("seed", range(3))
def test_heavy_tails(seed: int) -> None:
    """METHODS.md 4, item 10, 4 bits in groups of 256: rounding about 11 dB, Hadamard first 18.4, the grid 20.4. Pairs are better still."""
    weight = heavy(seed, 64, 1024)
    one = blocks.block_hadamard(1024, 256, seed)
    rows, spec = one.undo(weight.T).T, QuantSpec(4, granularity=PerGroup(1, 256))
    flat = np.eye(1024)[None]
    plain, mixed = (_round_math.rounded(part[None], flat, spec, "rtn", is_clipped=False).weight[0] for part in (weight, rows))
    grids = [math.nearest(rows, math.grid(4, numbers), 256).decode() for numbers in (1, 2)]
    made = [sqnr(weight, plain), sqnr(rows, mixed), *(sqnr(rows, part) for part in grids)]
    assert made[0] + 4 < made[1] < made[2] - 1 < made[3] - 1.3


@pytest.mark.parametrize("numbers", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_each_step_helps(seed: int, numbers: int) -> None:
    """Nearest < GPTQ on the grid < codes and scales in turn, on the error that they minimize and on inputs that they have not seen."""
    rng = np.random.default_rng(seed)
    mix = (rng.standard_normal((96, 96)) / np.sqrt(96) + np.eye(96)) * np.exp(0.5 * rng.standard_normal(96))
    x = rng.standard_t(5, (6000, 96)) @ mix
    gram, fresh = (part.T @ part / len(part) for part in (x[:3000], x[3000:]))
    one, weight, book = blocks.block_hadamard(96, GROUP, seed), heavy(seed, 40, 96), math.grid(3, numbers)
    rows, gram, fresh = one.undo(weight.T).T, _round_math.damped(one.gram(gram)[None], 3000)[0], one.gram(fresh)
    nearest = math.nearest(rows, book, GROUP)
    gptq = math.feedback(rows, book, GROUP, gram)
    best = math.descend(rows, gptq, gram)
    for seen in (gram, fresh):
        made = [sqnr(rows, coded.decode(), seen) for coded in (nearest, gptq, best)]
        assert made[0] + 1 < made[1] < made[2] - 0.2
    assert best.places.min() >= 0 and best.places.max() < len(book.points) and best.places.shape == (40, 96 // numbers)


def test_descent_never_loses() -> None:
    """Also from bad codes, with scales that would be negative, and with a Gram matrix of one direction."""
    rng, book = np.random.default_rng(0), math.grid(2, 1)
    rows, direction = rng.standard_normal((20, GROUP)), rng.standard_normal((1, GROUP))
    for gram in (np.eye(GROUP), direction.T @ direction + 1e-6 * np.eye(GROUP)):
        bad = Coded(book, rng.integers(0, 4, (20, GROUP)), np.ones((20, 1), np.float32))
        made = math.descend(rows, bad, gram)
        assert sqnr(rows, made.decode(), gram) >= sqnr(rows, bad.decode(), gram) and (made.scale > 0).all()


def test_groups_of_zeros() -> None:
    coded = math.descend(np.zeros((3, GROUP)), math.nearest(np.zeros((3, GROUP)), math.grid(3, 1), GROUP), np.eye(GROUP))
    assert np.isfinite(coded.decode()).all()


# ---- in a model -----------------------------------------------------------------------------------------------------

LAYERS = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 5, 96] x, float[96, 64] v, float[64] c, float[32, 96] w, float[32] d) => (float[N, 5, 64] y, float[N, 5, 32] z) {
  [plain] a = MatMul(x, v)
  [bias] y = Add(a, c)
  flat = Constant<value_ints = [-1, 96]>()
  r = Reshape(x, flat)
  [gemm] g = Gemm<transB = 1>(r, w, d)
  back = Constant<value_ints = [-1, 5, 32]>()
  z = Reshape(g, back)
}"""
CONV = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 8, 6, 6] x, float[12, 8, 2, 2] k, float[12] c) => (float[N, 12, 3, 3] y) { [conv] y = Conv<strides = [2, 2]>(x, k, c) }"""
Weighted = Callable[[str, np.random.Generator], ir.Model]


def data(seed: int, *shape: int) -> np.ndarray:
    return heavy(seed, *shape).astype(np.float32)


def apply(model: ir.Model, x: np.ndarray, *passes: Pass, target: str = "onnxruntime") -> PassRecord:
    samples = open_calibration({"x": x}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=samples, held_out=samples, target=get_target(target))
    record = run_passes([Normalize(), *passes], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return record


OPTIONS: dict[str, dict[str, Any]] = {
    "nearest": {}, "greedy": {"rounding": "greedy"}, "activations": {"where": "activations", "rounding": "greedy"},
    "pairs": {"numbers": 2}, "4 bits": {"bits": 4}, "2 bits in pairs": {"bits": 2, "numbers": 2, "where": "activations"},
}  # fmt: skip


@pytest.mark.parametrize("case", OPTIONS)
@pytest.mark.parametrize("text", [LAYERS, CONV])
def test_both_engines_agree(weighted: Weighted, text: str, case: str) -> None:
    """1e-5; the function of graphq is the only one, and reports see a weight that is stored as codes."""
    model, x = weighted(text, np.random.default_rng(0)), data(0, 60, *((8, 6, 6) if text == CONV else (5, 96)))
    before = Executor(model).run({"x": x})
    record = apply(model, x, Higgs(group_size=GROUP, **OPTIONS[case]))
    assert [function.name for function in model.functions.values()] == ["LookupWeight"]
    layers = [node for node in model.graph if node.name in ("plain", "gemm", "conv")]
    assert all(stored.is_stored(node.inputs[1]) for node in layers) and len(record.measurements) == len(layers)
    one, other = Executor(model).run({"x": x}), ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})
    for a, b, wanted in zip(one, other, before, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
        power, noise = (float(np.sum(part.astype(np.float64) ** 2)) for part in (wanted, a - wanted))
        assert decibel(power, noise) > (8 if "2 bits" in case else 12)


def test_where_the_transform_is_undone_makes_no_difference(weighted: Weighted) -> None:
    """The same codes, to 1e-4 of the output."""
    made = []
    x = data(0, 60, 5, 96)
    for where in ("weights", "activations"):
        model = weighted(LAYERS, np.random.default_rng(0))
        apply(model, x, Higgs(group_size=GROUP, where=where))  # type: ignore[arg-type]
        made.append(Executor(model).run({"x": x})[0])
    np.testing.assert_allclose(made[0], made[1], atol=1e-4 * np.abs(made[0]).max())


@pytest.mark.parametrize("seed", range(3))
def test_better_than_gptq_at_its_bits_and_group_size(weighted: Weighted, seed: int) -> None:
    """On heavy-tailed weights with outliers, held out: by 1 dB."""
    x, fresh, noise = data(seed, 400, 5, 96), data(seed + 10, 100, 5, 96), []
    for one in (Round(bits=3, group_size=GROUP, algorithm="gptq", layers="all"), Higgs(group_size=GROUP, rounding="greedy")):
        model = weighted(LAYERS, np.random.default_rng(seed))
        weight = heavy(seed, 96, 64).astype(np.float32)
        model.graph.initializers["v"].const_value = ir.make_tensor(weight, "float32", "v")
        wanted = Executor(model).run({"x": fresh})[0]
        apply(model, x, one)
        noise.append(float(np.mean((Executor(model).run({"x": fresh})[0] - wanted) ** 2)))
    assert decibel(noise[0], noise[1]) > 1


@pytest.mark.parametrize(
    ("text", "options", "reason"),
    [
        (CONV, {"exclude": ("*",)}, "excluded by the recipe"),
        (LAYERS.replace("96", "13"), {}, "its 13 inputs cannot be divided into groups of 16 to 64"),
        (CONV.replace("[12, 8, 2, 2]", "[12, 4, 2, 2]").replace("<strides", "<group = 2, strides"), {}, "several groups"),
    ],
)
def test_what_stays_float(weighted: Weighted, text: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(TargetError, match=reason):
        apply(weighted(text, np.random.default_rng(0)), data(0, 8, 5, 13) if "13" in text else data(0, 8, 8, 6, 6), Higgs(**options))


def test_what_was_asked_of_a_layer(weighted: Weighted) -> None:
    model, x = weighted(LAYERS, np.random.default_rng(0)), data(0, 8, 5, 96)
    nodes = {node.name: node for node in model.graph}
    precision.ask(Editor(model), nodes["plain"], Bits(None, None))
    precision.ask(Editor(model), nodes["gemm"], Bits(4, None))
    record = apply(model, x, Higgs(group_size=GROUP))
    assert [(entry.where, entry.numbers["bits"]) for entry in record.measurements] == [("gemm", 4)]
    assert [reason for _, reason in record.skipped] == ["a float weight was asked for it"]


def test_options() -> None:
    assert Higgs().needs_data is False and Higgs(rounding="greedy").needs_data is True
    for bad in ({"bits": 5}, {"numbers": 3}, {"group_size": 8}):
        with pytest.raises(ValidationError):
            Higgs(**bad)  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="matches no node"):
        Higgs(exclude=("nobody",)).precheck(ir.from_onnx_text(LAYERS), get_target("generic"))


def dump(model: ir.Model) -> str:
    constants = [f"{name}: {value.dtype}{list(value.shape or ())}" for name, value in model.graph.initializers.items()]
    nodes = [f"{n.outputs[0].name} = {n.op_type}({', '.join(v.name or '-' for v in n.inputs if v)})" for n in model.graph]
    return "\n".join([*constants, *nodes, ""])


@pytest.mark.parametrize("where", ["weights", "activations"])
def test_golden(weighted: Weighted, where: Any) -> None:
    """`GRAPHQ_GOLDEN=write` writes the files anew."""
    path, model = GOLDEN / f"{where}.txt", weighted(LAYERS, np.random.default_rng(0))
    before = dump(model)
    apply(model, data(0, 8, 5, 96), Higgs(group_size=GROUP, where=where))
    text = f"{before}----\n{dump(model)}"
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text
