"""round: what is stored and computed, how much better than round to nearest, and which layers are refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from graphq import ir, linear, precision, qdq
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import RecipeError, TargetError
from graphq.executor import Executor, Fetch
from graphq.passes.aqer import Aqer
from graphq.passes.round import Round
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.precision import Bits
from graphq.quantizers import Uniform
from graphq.spec import QuantSpec
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "round"
ALGORITHMS = ("rtn", "gptq", "wqer", "greedy", "adaround")
RNG = np.random.default_rng(3)
SHAPES: dict[str, tuple[int, ...]] = {
    "w": (48, 20), "wt": (20, 48), "v": (20, 12), "b": (20,), "c": (12,), "d": (6,),
    "k": (20, 6, 3, 3), "grouped": (20, 3, 3, 3), "deep": (6, 1, 3, 3), "one": (20, 6, 1, 1),
    "wide": (6, 6, 3, 3),
}  # fmt: skip
WEIGHTS = {name: RNG.standard_t(6, shape).astype(np.float32) for name, shape in SHAPES.items()}


def heavy_tailed(seed: int, *shape: int, axis: int = -1) -> np.ndarray:
    """Correlated channels of very different size along `axis`, with means and heavy tails."""
    rng = np.random.default_rng(seed)
    width = shape[axis]
    mix = rng.standard_normal((width, width)) / np.sqrt(width) + np.eye(width)
    rows = rng.standard_t(5, (*np.delete(shape, axis), width)) @ mix * np.exp(0.5 * rng.standard_normal(width))
    return np.ascontiguousarray(np.moveaxis(rows + rng.standard_normal(width), -1, axis), np.float32)


def build(text: str) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in WEIGHTS.items() if name in used)
    return onnx_ir.from_proto(proto)


def quantize_inputs(model: ir.Model, x: np.ndarray, bits: int) -> None:
    """Put one pair on everything that a layer reads, with the range of the float model on `x`."""
    edit, spec = Editor(model), QuantSpec(bits, signed=False, symmetric=False)
    nodes = [node for node in model.graph if node.op_type in linear.LINEAR_OPS]
    values = list(dict.fromkeys(linear.data_of(node) for node in nodes))
    for value, array in zip(values, Executor(model, [Fetch(value.name or "") for value in values]).run({"x": x}), strict=True):
        readers = [(node, 0) for node in nodes if node.inputs[0] is value]
        qdq.insert_pair(edit, value, Uniform(spec).fit(array.min(), array.max()), spec, readers)


def context(reference: ir.Model, x: np.ndarray, bits: int | None = 8, target: str = "onnxruntime") -> PassContext:
    model, data = ir.clone(reference), open_calibration({"x": x}, ir.inputs(reference))
    if bits is not None:
        quantize_inputs(model, x, bits)
    return PassContext(model=model, reference=reference, calib=data, held_out=data, target=get_target(target))


def apply(ctx: PassContext, *passes: Pass) -> PassRecord:
    record = run_passes(passes, ctx, verify_graph)[-1]
    require_legal(ctx.model, ctx.target)
    return record


def error(ctx: PassContext, x: np.ndarray) -> float:
    """Noise over signal at the output."""
    made, wanted = (Executor(model).run({"x": x})[0].astype(np.float64) for model in (ctx.model, ctx.reference))
    return float(np.sum((made - wanted) ** 2) / np.sum(wanted**2))


def stored(ctx: PassContext) -> dict[str | None, ir.Node]:
    """The DequantizeLinear of each layer's weight."""
    makers = {node.name: ir.producer(node.inputs[1]) for node in ctx.model.graph if node.op_type in linear.LINEAR_OPS}
    return {name: maker for name, maker in makers.items() if maker is not None and maker.op_type == "DequantizeLinear"}


ROWS, IMAGES = "N, 48", "N, 6, 6, 6"
LAYERS: dict[str, tuple[str, str]] = {
    "MatMul": (ROWS, "[it] y = MatMul(x, w)"),
    "MatMul and Add": ("N, 5, 48", "[it] a = MatMul(x, w) [add] y = Add(a, b)"),
    "Gemm": (ROWS, "[it] y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b)"),
    "Gemm transB": (ROWS, "[it] y = Gemm <transB = 1> (x, wt)"),
    "Conv": (IMAGES, "[it] y = Conv <strides = [2, 1], pads = [1, 0, 1, 2]> (x, k, b)"),
    "Conv 1 x 1": (IMAGES, "[it] y = Conv(x, one)"),
    "Conv dilations": (IMAGES, "[it] y = Conv <dilations = [2, 1]> (x, k)"),
    "Conv groups": (IMAGES, "[it] y = Conv <group = 2> (x, grouped, b)"),
    "Conv depthwise": (IMAGES, "[it] y = Conv <group = 6, pads = [1, 1, 1, 1]> (x, deep, d)"),
}  # fmt: skip


def layer(case: str, seed: int = 0, samples: int = 300) -> tuple[ir.Model, np.ndarray, np.ndarray]:
    """The float model, calibration data, and data that it does not see."""
    shape, body = LAYERS[case]
    x = heavy_tailed(seed, 2 * samples, *map(int, shape.split(", ")[1:]), axis=1 if shape == IMAGES else -1)
    return build(f"g (float[{shape}] x) => (float[] y) {{ {body} }}"), x[:samples], x[samples:]


# ---- what is stored and computed ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group_size", [None, 16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("case", ["MatMul and Add", "Gemm transB"])
def test_table(case: str, bits: int, symmetric: bool, group_size: int | None) -> None:
    """ONNX Runtime and the reference evaluator compute with the codes that are stored (1e-5); those keep to their bits."""
    reference, x, _ = layer(case, samples=64)
    ctx = context(reference, x, bits=None)
    apply(ctx, Round(layers="all", bits=bits, symmetric=symmetric, group_size=group_size))
    maker, spec = stored(ctx)["it"], QuantSpec(bits, signed=symmetric, symmetric=symmetric)
    arrays = [ir.constant(value) for value in maker.inputs]
    codes, scale, zero = (array.astype(np.float64) for array in arrays if array is not None)
    assert str(maker.inputs[0].dtype).lower() == spec.storage and codes.min() >= spec.qmin and codes.max() <= spec.qmax  # type: ignore[union-attr]
    assert not (symmetric and zero.any())
    axis = 0  # summed over: a Gemm that reads floats holds its weight like a MatMul now
    if group_size:
        scale, zero = (np.repeat(part, group_size, axis).take(np.arange(48), axis) for part in (scale, zero))
    else:
        scale, zero = (np.expand_dims(part, axis) for part in (scale, zero))
    weight = (codes - zero) * scale
    bias = next((ir.constant(node.inputs[1]) for node in ctx.model.graph if node.op_type == "Add"), None)
    if bias is None:
        bias = ir.constant(linear.bias_of(next(node for node in ctx.model.graph if node.name == "it")))
    expected = x @ weight + bias
    for made in (Executor(ctx.model).run({"x": x})[0], ReferenceEvaluator(ir.to_proto(ctx.model)).run(None, {"x": x})[0]):
        np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", LAYERS)
def test_both_engines_agree(case: str, algorithm: str) -> None:
    """With quantized activations, on every kind of layer."""
    reference, x, fresh = layer(case)
    ctx = context(reference, x)
    record = apply(ctx, Round(algorithm=algorithm, group_size=24))
    a, b = Executor(ctx.model).run({"x": fresh})[0], ReferenceEvaluator(ir.to_proto(ctx.model)).run(None, {"x": fresh})[0]
    np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(a).max())
    assert ("block_size" in stored(ctx)["it"].attributes) == ("Conv" not in case)
    (measured,) = record.measurements
    assert measured.numbers["bits"] == 4
    assert measured.numbers["sqnr_db"] == pytest.approx(-10 * np.log10(error(ctx, x)), abs=0.3)


@pytest.mark.parametrize("group_size", [48, 49])
def test_a_group_larger_than_the_inputs_is_a_channel(group_size: int) -> None:
    reference, x, _ = layer("MatMul")
    ctx = context(reference, x)
    apply(ctx, Round(group_size=group_size))
    assert ("block_size" in stored(ctx)["it"].attributes) == (group_size == 48)


def test_the_result_is_the_same_each_time() -> None:
    reference, x, _ = layer("MatMul and Add")
    protos = []
    for _ in range(2):
        ctx = context(reference, x)
        apply(ctx, Round(repair=True))
        protos.append(ir.to_proto(ctx.model).SerializeToString())
    assert protos[0] == protos[1]


# ---- how good it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [3, 4])
def test_errors_fall_in_this_order(seed: int, bits: int) -> None:
    """METHODS.md 8, T1, on data that nothing has seen: activations of 4 bits, weights of `bits`."""
    errors = {}
    for algorithm in ALGORITHMS:
        for name, passes in {"": [], "aqer + ": [Aqer()]}.items():
            reference, x, fresh = layer("MatMul and Add", seed, samples=800)
            ctx = context(reference, x, bits=4)
            apply(ctx, *passes, Round(bits=bits, algorithm=algorithm))
            errors[name + algorithm] = error(ctx, fresh)
    assert errors["rtn"] > errors["aqer + rtn"] > max(errors["aqer + gptq"], errors["aqer + greedy"], errors["aqer + wqer"])
    assert all(errors[name] > errors[f"aqer + {name}"] for name in ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("case", LAYERS)
def test_every_kind_of_layer_gains(case: str, algorithm: str) -> None:
    """Over round to nearest in the whole range of the weights, on data that it has not seen."""
    errors = []
    for options in (Round(algorithm="rtn", scales="min-max", correct_bias=False, bits=3), Round(algorithm=algorithm, bits=3)):
        reference, x, fresh = layer(case, samples=600)
        ctx = context(reference, x)
        apply(ctx, options)
        errors.append(error(ctx, fresh))
    assert errors[1] < (0.95 if algorithm == "rtn" else 0.85) * errors[0]


DEEP = "g (float[N, 48] x) => (float[] y) { [one] h = Gemm(x, w, b) [act] r = Relu(h) [two] a = MatMul(r, v) [add] y = Add(a, c) }"


@pytest.mark.parametrize("seed", range(3))
def test_repair_makes_good_what_the_layers_before_lost(seed: int) -> None:
    errors = []
    for repair in (False, True):
        x = heavy_tailed(seed, 1600, 48)
        ctx = context(build(DEEP), x[:800], bits=4)
        record = apply(ctx, Round(bits=3, repair=repair))
        assert all(("alpha" in one.numbers) == repair for one in record.measurements)
        errors.append(error(ctx, x[800:]))
    assert errors[1] < 0.95 * errors[0]


CHAINS = {"matrices": ("N, 48", DEEP[DEEP.index("{") :]), "convolutions": (
    IMAGES, "{ [a] h = Conv <pads = [1, 1, 1, 1]> (x, wide) [act] r = Relu(h) [b] y = Conv <group = 2> (r, grouped, b) }")}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CHAINS)
def test_a_repair_for_the_reference_makes_up_for_the_weights_of_layers_before(case: str, seed: int) -> None:
    """Weights alone are rounded, so that a repair for the layer's own input has nothing to do."""
    dims, body = CHAINS[case]
    rows, errors = heavy_tailed(seed, 1600, *map(int, dims.split(", ")[1:]), axis=1), {}
    for repair in (False, True, "reference"):
        ctx = context(build(f"g (float[{dims}] x) => (float[] y) {body}"), rows[:800], bits=None)
        apply(ctx, Round(bits=3, repair=repair, layers="all"))
        errors[repair] = error(ctx, rows[800:])
    assert errors["reference"] < 0.97 * errors[False] == pytest.approx(0.97 * errors[True])


def test_a_repair_for_the_reference_leaves_alone_what_stands_for_something_else_there() -> None:
    """Its channels have another order since, and so its output another name."""
    text, x = "g (float[N, 48] x) => (float[] y) { [one] h = Gemm(x, w, b) [two] y = MatMul(h, v) }", heavy_tailed(0, 200, 48)
    made = []
    for repair in (False, "reference"):
        ctx = context(build(text), x, bits=None)
        one = next(node for node in ctx.model.graph if node.name == "one")
        ctx.edit.now_makes(one.outputs[0], "reordered")
        apply(ctx, Round(repair=repair, layers="all", exclude=("two",)))
        made.append(ir.constant(stored(ctx)["one"].inputs[0]))
    np.testing.assert_array_equal(*made)


@pytest.mark.parametrize("case", ["MatMul and Add", "Gemm", "Gemm transB", "Conv", "Conv groups"])
def test_the_mean_error_goes_into_the_bias(case: str) -> None:
    """All rows are used here, so that it vanishes on the calibration data; without, it does not."""
    means = []
    for correct_bias in (True, False):
        reference, x, _ = layer(case, samples=60)
        ctx = context(reference, x)
        apply(ctx, Round(correct_bias=correct_bias))
        lost = Executor(ctx.model).run({"x": x})[0] - Executor(reference).run({"x": x})[0].astype(np.float64)
        means.append(np.abs(np.moveaxis(lost, 1 if "Conv" in case else -1, 0).reshape(lost.shape[1 if "Conv" in case else -1], -1).mean(1)))
    assert means[0].max() < 1e-4 < 1e-2 < means[1].max()


# ---- which layers ---------------------------------------------------------------------------------------------------


def test_only_layers_with_quantized_inputs() -> None:
    ctx = context(build(DEEP), heavy_tailed(0, 64, 48), bits=None)
    quantize_inputs(ctx.model, heavy_tailed(0, 64, 48), 8)
    first = next(node for node in ctx.model.graph if node.name == "one")
    Editor(ctx.model).rewire(first, 0, ctx.model.graph.inputs[0])
    record = apply(ctx, Round())
    assert set(stored(ctx)) == {"two"} and [reason for _, reason in record.skipped] == ["its input is float (layers: all takes it)"]


def test_all_layers() -> None:
    ctx = context(build(DEEP), heavy_tailed(0, 64, 48), bits=None)
    apply(ctx, Round(layers="all"))
    assert set(stored(ctx)) == {"one", "two"}


def test_bits_that_a_layer_asks_for() -> None:
    ctx = context(build(DEEP), heavy_tailed(0, 64, 48))
    nodes = {node.name: node for node in ctx.model.graph}
    precision.ask(ctx.edit, nodes["one"], Bits(None, 8))
    precision.ask(ctx.edit, nodes["two"], Bits(2, 8))
    record = apply(ctx, Round())
    assert [str(maker.inputs[0].dtype) for maker in stored(ctx).values()] == ["UINT2"] and ir.opset(ctx.model) == 25  # type: ignore[union-attr]
    assert [reason for _, reason in record.skipped] == ["a float weight was asked for it"]


REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "excluded": ("[it] y = MatMul(x, w)", {"exclude": ("i*",)}, "excluded by the recipe"),
    "not quantized": ("[it] y = MatMul(x, w)", {}, "its input is float"),
    "dynamic": ("t = Transpose(x) [it] y = MatMul(x, t)", {"layers": "all"}, "its weight is not a constant"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """More of them in test_layer_rows."""
    body, options, reason = REFUSED[case]
    reference = build(f"g (float[N, 48] x) => (float[] y) {{ {body} }}")
    with pytest.raises(RecipeError, match=reason):
        apply(context(reference, heavy_tailed(0, 64, 48), bits=None), Round(**options))


def test_a_shared_weight_is_rounded_for_each_reader() -> None:
    text = "g (float[N, 48] x) => (float[] y, float[] z) { [one] y = MatMul(x, w) t = Abs(x) [two] z = MatMul(t, w) }"
    ctx = context(build(text), heavy_tailed(0, 300, 48))
    apply(ctx, Round())
    codes = [ir.constant(maker.inputs[0]) for maker in stored(ctx).values()]
    assert len(codes) == 2 and not np.array_equal(*codes) and "w" not in ctx.model.graph.initializers


def test_an_unknown_bias_is_left_alone() -> None:
    """The error is then that of rounding alone, against what the layer reads now."""
    reference = build("g (float[N, 48] x) => (float[] y) { r = ReduceMean(x) [it] y = Gemm(x, w, r) }")
    ctx = context(reference, heavy_tailed(0, 300, 48))
    apply(ctx, Round(repair=True))
    assert set(stored(ctx)) == {"it"} and error(ctx, heavy_tailed(0, 300, 48)) < 0.05


def test_what_a_target_cannot_store_is_refused_before_calibration() -> None:
    reference, x, _ = layer("MatMul")
    for options in ({"bits": 2}, {"symmetric": False}):
        ctx = context(reference, x, target="tensorrt")
        with pytest.raises(TargetError, match="tensorrt"):
            Round(**options).precheck(ctx.model, ctx.target)
    asking = context(reference, x, target="tensorrt")
    precision.ask(asking.edit, next(node for node in asking.model.graph if node.name == "it"), Bits(2, 8))
    with pytest.raises(TargetError, match="int2 weights"):
        Round().precheck(asking.model, asking.target)


def test_a_target_without_zero_points_gets_symmetric_codes() -> None:
    reference, x, _ = layer("MatMul")
    for target, storage in (("tensorrt", "INT4"), ("onnxruntime", "UINT4")):
        ctx = context(reference, x, bits=None, target=target)
        apply(ctx, Round(layers="all"))
        assert str(stored(ctx)["it"].inputs[0].dtype) == storage  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "options", [{"bits": 1}, {"bits": 9}, {"group_size": 1}, {"samples": -1}, {"algorithm": "best"}, {"scales": "max"}]
)
def test_bad_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Round(**options)


def test_patterns_that_match_nothing_are_refused() -> None:
    reference, x, _ = layer("MatMul")
    with pytest.raises(RecipeError, match="matches no node"):
        apply(context(reference, x), Round(exclude=("nobody",)))


def dump(model: ir.Model) -> str:
    rows = [f"{name}: {value.dtype}{list(value.shape or ())}" for name, value in model.graph.initializers.items()]
    for node in model.graph:
        attributes = [f" {key}={ir.attribute(node, key)}" for key in ("axis", "block_size") if key in node.attributes]
        operands = ", ".join(value.name or "-" for value in node.inputs if value)
        rows.append(f"[{node.name}] {node.outputs[0].name} = {node.op_type}({operands}){''.join(attributes)}")
    return "\n".join([f"opset {ir.opset(model)}", *rows, ""])


@pytest.mark.parametrize(("case", "options"), [("groups", {"group_size": 4}), ("two_bits", {"bits": 2, "algorithm": "gptq"})])
def test_golden(case: str, options: dict[str, Any]) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    ctx = context(onnx_ir.from_proto(parser.parse_model(before)), heavy_tailed(0, 100, 6))
    apply(ctx, Round(**options))
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(ctx.model)}", encoding="utf-8")
    else:
        assert dump(ctx.model) == expected
