"""cast-float: half precision where it is safe, float32 where a reason says so, and few Casts between them."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.backends import tensorrt
from graphq.calibration import open_calibration
from graphq.errors import RecipeError, TargetError
from graphq.executor import Executor, Fetch
from graphq.half import HALVES
from graphq.models import digits, onnx_path
from graphq.noise import decibel
from graphq.passes.block_float import BlockFloat
from graphq.passes.cast_float import CastFloat
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.lower import Lower
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.passes.sulq_softmax import SulqSoftmax
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target, require_legal
from graphq.verify import require_same_interface, verify_graph

GOLDEN = Path(__file__).parent / "golden" / "cast_float"
BOTH = pytest.mark.parametrize("precision", ["fp16", "bf16"])
FLOAT = ir.DataType.FLOAT


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(text: str, opset: int = 21, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def layers(body: str, *, width: int = 8, inner: str = "", **weights: np.ndarray) -> onnx.ModelProto:
    """MatMul, `body` from `a` to `b`, MatMul: what lies between two layers that become half."""
    weights = {"w": floats(width, width, seed=1), "v": floats(width, width, seed=2), **weights}
    return build(f"g (float[N, {width}] x) => (float[N, {width}] y) {inner} {{ a = MatMul(x, w)\n{body}\ny = MatMul(b, v) }}", **weights)


def cast(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *others: Pass, target: str = "tensorrt-rtx",
         **options: Any) -> tuple[ir.Model, PassRecord]:  # fmt: skip
    """The model after normalize, `others` and cast-float, and what that did."""
    model, record = quantize(proto, feeds, *others, CastFloat(**options), target=target)
    require_same_interface(onnx_ir.from_proto(proto), model)
    check_types(model)
    return model, record


def quantize(proto: onnx.ModelProto, feeds: Mapping[str, np.ndarray], *passes: Pass, target: str) -> tuple[ir.Model, PassRecord]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    data = open_calibration(dict(feeds), ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
    record = run_passes([Normalize(), *passes], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return model, record


def check_types(model: ir.Model) -> None:
    """Types are as onnx infers them, inputs and outputs are not half, and no Cast undoes another."""
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True)
    inferred = {entry.name: entry.type.tensor_type.elem_type for entry in [*proto.graph.value_info, *proto.graph.output]}
    floating = {FLOAT, *(one.code for one in HALVES.values())}
    for node in model.graph:
        for value in node.outputs:
            assert value.dtype is None or int(value.dtype) == inferred[value.name], value
        maker = ir.producer(node.inputs[0]) if node.op_type == "Cast" else None
        if maker is not None and maker.op_type == "Cast":
            assert not {maker.inputs[0].dtype, maker.outputs[0].dtype, node.outputs[0].dtype} <= floating  # type: ignore[union-attr]
    assert not any(value.dtype in {one.code for one in HALVES.values()} for value in [*model.graph.inputs, *model.graph.outputs])


def reason_for(op: str, record: PassRecord) -> str:
    (found,) = {reason for row, reason in record.skipped if row.startswith(f"{op} ")}
    return found


def casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for node in model.graph)


def run(model: ir.Model | onnx.ModelProto, feeds: Mapping[str, np.ndarray]) -> np.ndarray:
    model = model if isinstance(model, ir.Model) else onnx_ir.from_proto(model)
    return Executor(model, threads=1).run(feeds)[0]


def sqnr(a: np.ndarray, b: np.ndarray) -> float:
    return decibel(float((a.astype(np.float64) ** 2).sum()), float(((a.astype(np.float64) - b) ** 2).sum()))


# ---- golden text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["overflow"])
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = cast(parser.parse_model(before), {"x": np.linspace(-2, 2, 32, dtype=np.float32).reshape(8, 4)})
    rows = [f"{name}: {value.dtype} {np.asarray(ir.constant(value)).tolist()}" for name, value in model.graph.initializers.items()]
    for node in model.graph:
        read = ", ".join(str(value.name) for value in node.inputs if value)
        rows.append(f"{node.outputs[0].name} {node.outputs[0].dtype} = {node.op_type}({read})")
    text = "\n".join([*rows, ""])
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{text}", encoding="utf-8")
    else:
        assert text == expected


# ---- numbers --------------------------------------------------------------------------------------------------------


def by_hand(x: np.ndarray, kind: Any) -> np.ndarray:
    """MatMul, Relu, Add in half precision with float32 sums."""

    def rounded(array: np.ndarray) -> np.ndarray:
        return array.astype(kind).astype(np.float32)

    a = rounded(rounded(x) @ rounded(floats(8, 8, seed=1)))
    b = rounded(np.maximum(a, 0) + rounded(np.float32(0.1)))
    return rounded(b @ rounded(floats(8, 8, seed=2)))


@BOTH
def test_computes_what_the_type_computes(precision: str) -> None:
    """As numpy with the same type after each node: to one step of the type, since sums may be taken in another order."""
    proto, x = layers("r = Relu(a)\nb = Add(r, c)", c=np.float32(0.1)), floats(16, 8)
    model, record = cast(proto, {"x": x}, precision=precision)
    expected = by_hand(x, np.float16 if precision == "fp16" else ml_dtypes.bfloat16)
    np.testing.assert_allclose(run(model, {"x": x}), expected, rtol=2.0 ** (1 - HALVES[precision].digits), atol=1e-3)
    assert casts(model) == 2 and not record.skipped and ir.opset(model) == (21 if precision == "fp16" else 22)
    assert {value.dtype for value in model.graph.initializers.values()} == {HALVES[precision].code}


@BOTH
@pytest.mark.parametrize("name", ["digits_vit", "digits_cnn"])
def test_trained_networks(name: str, precision: str) -> None:
    """All layers are half, and the outputs keep 50 dB in float16, 28 in bfloat16."""
    x = digits.calibration(32)
    proto = onnx.load(onnx_path(name))
    model, record = cast(proto, {"input": x}, precision=precision)
    assert sqnr(run(proto, {"input": x}), run(model, {"input": x})) > (50 if precision == "fp16" else 28)
    assert casts(model) == 2 and not any(row.startswith(("MatMul", "Conv", "Gemm")) for row, _ in record.skipped)


def naive(proto: onnx.ModelProto) -> ir.Model:
    """Everything half, whatever it is."""
    model, _ = cast(proto, {"x": floats(1, 8) * 1e-2}, margin=1, min_sqnr_db=0, error_samples=0)
    return model


def test_an_overflow_in_the_middle() -> None:
    """Activations of 1e5 stay right; naive conversion gives infinity times 0."""
    proto, x = layers("i = Mul(a, big)\nj = Relu(i)\nb = Mul(j, small)", big=np.float32(3e4), small=np.float32(1e-4)), floats(64, 8)
    model, record = cast(proto, {"x": x})
    assert sqnr(run(proto, {"x": x}), run(model, {"x": x})) > 55
    assert not np.isfinite(run(naive(proto), {"x": x})).all()
    assert {row.split()[0] for row, _ in record.skipped} == {"Mul", "Relu"} and casts(model) == 4
    assert "too near to the limit of float16" in reason_for("Relu", record)


def test_bfloat16_does_not_overflow_there() -> None:
    proto, x = layers("i = Mul(a, big)\nj = Relu(i)\nb = Mul(j, small)", big=np.float32(3e4), small=np.float32(1e-4)), floats(64, 8)
    model, record = cast(proto, {"x": x}, precision="bf16")
    assert casts(model) == 2 and not record.skipped and sqnr(run(proto, {"x": x}), run(model, {"x": x})) > 38


# ---- reasons --------------------------------------------------------------------------------------------------------

BIG, SMALL = np.float32(3e3), np.float32(1e-4)
REASONS = {
    "excluded": ("b = Relu(a)", {"exclude": ("Relu",)}, {}, "Relu", "excluded by the recipe"),
    "no form": ("q, s, z = DynamicQuantizeLinear(a)\nb = DequantizeLinear(q, s, z)", {"target": "onnxruntime"}, {},
                "DynamicQuantizeLinear", "no float16 form"),
    "range": ("i = Mul(a, c)\nj = Neg(i)\nb = Mul(j, d)", {"margin": 10.0}, {"c": BIG, "d": SMALL}, "Neg", "too near to the limit"),
    "beyond": ("b = Mul(a, c)", {"margin": 1.0}, {"c": np.array([7e4, *[0] * 7], np.float32)}, "Mul", "a constant of 7e+04 is beyond"),
    "constant vanishes": ("b = Add(a, c)", {}, {"c": np.float32(1e-12)}, "Add", "a constant of 1e-12 is 0 in float16"),
    "weights vanish": ("i = Mul(a, d)\nb = MatMul(i, c)", {"margin": 1.0}, {"c": floats(8, 8, seed=3) * 1e-6, "d": BIG},
                       "MatMul", "it alone would leave "),
    "values vanish": ("s = Mul(a, c)\nt = Neg(s)\nb = Div(t, c)", {}, {"c": np.float32(1e-6)}, "Neg", "too small for float16"),
    "partial sums": ("m = Mul(a, c)\ns = ReduceMean (m, axes)\nt = Add(s, m)\nb = Mul(t, d)", {"margin": 1.0},
                     {"c": BIG, "d": SMALL, "axes": np.array([1])}, "ReduceMean", "a sum over 8 elements may reach"),
    "own error": ("d = Add(a, c)\nb = Sub(d, c)", {}, {"c": np.float32(500)}, "Sub", "it alone would leave "),
    "coarse inputs": ("d = Add(a, c)\nb = Sub(d, c)", {}, {"c": np.float32(500)}, "Add", "what reads it needs more digits than float16"),
    "integers": ("h = Abs(a)\ni = Cast <to = 7> (h)\nj = Cast <to = 1> (i)\nb = Add(a, j)", {}, {}, "Abs", "whole numbers are made of"),
    "large integers": ("i = Cast <to = 7> (a)\nk = Mul(i, n)\nj = Cast <to = 1> (k)\nb = Add(a, j)", {},
                       {"n": np.array(1000)}, "Cast", "are not exact in float16"),
    "islands": ("i = Abs(a)\nj = Relu(i)\nb = Neg(j)", {"exclude": ("Abs", "Neg")}, {}, "Relu", "Casts around it would cost more"),
}  # fmt: skip
"""Nodes between two layers, options, constants, the operator that has to stay float32, and a part of the reason."""


@pytest.mark.parametrize("case", REASONS)
def test_reasons(case: str) -> None:
    """Each keeps its node in float32 and is in the report; the result is right."""
    body, options, weights, op, reason = REASONS[case]
    proto, x = layers(body, **weights), floats(32, 8)
    model, record = cast(proto, {"x": x}, **{**options, "exclude": tuple(options.get("exclude", ()))})
    assert any(row.startswith(f"{op} ") and reason in why for row, why in record.skipped), record.skipped
    assert any(value.dtype != HALVES["fp16"].code for node in model.graph if node.op_type == op for value in node.outputs)
    assert sqnr(run(proto, {"x": x}), run(model, {"x": x})) > 25


def test_functions_stay_float32() -> None:
    text = """g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w) b = graphq.Twice(a) y = MatMul(b, w) }
    <domain: "graphq", opset_import: ["" : 21]> Twice (x) => (y) { y = Add(x, x) }"""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21, "graphq" : 1]>\n{text}')
    proto.graph.initializer.append(numpy_helper.from_array(floats(8, 8), "w"))
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("b", onnx.TensorProto.FLOAT, ["N", 8]))
    model, record = cast(proto, {"x": floats(8, 8)})
    assert reason_for("Twice", record) == "functions of graphq compute in float32" and casts(model) == 4
    assert sqnr(run(proto, {"x": floats(8, 8)}), run(model, {"x": floats(8, 8)})) > 55


ATTENTION = """g (float[N, 4, 8] x) => (float[N, 4, 8] y) {
    a = MatMul(x, w)\nu = Transpose <perm = [0, 2, 1]> (a)\ns = MatMul(x, u)\np = Softmax(s)\nr = Relu(a)\ny = MatMul(p, r) }"""
LOWERED = {
    "W8A8Gemm": (layers("b = Relu(a)", width=64), (16, 64), (InsertQdq(error_samples=0), Lower())),
    "SULQSoftmax": (build(ATTENTION, w=floats(8, 8)), (16, 4, 8), (SulqSoftmax(bits=6), Lower())),
    "SULQAttentionValue": (build(ATTENTION, w=floats(8, 8)), (16, 4, 8), (SulqSoftmax(bits=4), Lower())),
}


@BOTH
@pytest.mark.parametrize("name", LOWERED)
def test_operators_of_graphq_become_half(name: str, precision: str) -> None:
    """Each in what its contract calls T, with no Cast around it; a code of 4 bits may become its neighbour."""
    proto, shape, passes = LOWERED[name]
    x = floats(*shape)
    model, _ = cast(proto, {"x": x}, *passes, precision=precision, target="generic", min_sqnr_db=0)
    calls = [node for node in model.graph if node.op_type == name]
    assert any(node.outputs[0].dtype == HALVES[precision].code for node in calls) and casts(model) <= 2
    lowered = quantize(proto, {"x": x}, *passes, target="generic")[0]
    assert sqnr(run(lowered, {"x": x}), run(model, {"x": x})) > (40 if precision == "fp16" else 30)


def test_subgraphs_stay_float32_and_read_float32() -> None:
    """What a branch reads from outside is cast for it, once."""
    body = """m = ReduceMax <keepdims = 0> (x)\nz = Greater(m, zero)
    b = If (z) <then_branch = p () => (float[N, 8] t) { u = Relu(a) t = Add(u, a) },
                else_branch = q () => (float[N, 8] e) { e = Neg(a) }>"""
    proto, x = layers(body, zero=np.float32(0)), floats(8, 8)
    model, record = cast(proto, {"x": x})
    assert reason_for("If", record) == "it has subgraphs, which stay float32"
    inner = [value.dtype for node in model.graph for one in ir.nodes_inside(node) for value in one.inputs]
    assert set(inner) == {FLOAT} and casts(model) <= 5
    for feed in (x, -np.abs(x)):
        assert sqnr(run(proto, {"x": feed}), run(model, {"x": feed})) > 55


def test_bounds_beyond_the_type_become_its_limit() -> None:
    largest = float(np.finfo(np.float32).max)
    model, record = cast(layers("b = Clip(a, , c)", c=np.float32(largest)), {"x": floats(8, 8)})
    (clip,) = [node for node in model.graph if node.op_type == "Clip"]
    bound = ir.constant(clip.inputs[2])
    assert bound is not None and float(bound) == 65504 and not record.skipped


MASKS = {
    "product": "o = Sub(one, m)\nn = Mul(o, low)\nt = Add(s, n)",
    "choice": "k = Cast <to = 9> (m)\nt = Where(k, s, low)",
    "two": "o = Sub(one, m)\nn = Mul(o, low)\nk = Cast <to = 9> (m)\nf = Where(k, s, low)\nt = Add(f, n)",
}


def masked(case: str, after: str = "p = Softmax(t)") -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    proto = build(f"""g (float[N, 4, 8] x, float[N, 1, 4] m) => (float[N, 4, 8] y)
    {{ a = MatMul(x, w)\nu = Transpose <perm = [0, 2, 1]> (a)\ns = MatMul(x, u)\n{MASKS[case]}\n{after}\ny = MatMul(p, a) }}""",
                  w=floats(8, 8), one=np.float32(1), low=np.float32(np.finfo(np.float32).min))  # fmt: skip
    mask = np.ones((16, 1, 4), np.float32)
    mask[1:, :, 2:] = 0
    return proto, {"x": floats(16, 4, 8), "m": mask}


@BOTH
@pytest.mark.parametrize("case", MASKS)
def test_masks_that_stand_for_infinity_become_half(case: str, precision: str) -> None:
    """The smallest float32 is out of either type; shortened, it masks as before, exactly."""
    proto, feeds = masked(case)
    model, record = cast(proto, feeds, precision=precision)
    assert not record.skipped and casts(model) == 3 + (case == "two")  # x, y, and m: to half, to bool, to both
    expected, found = run(proto, feeds), run(model, feeds)
    assert sqnr(expected, found) > (50 if precision == "fp16" else 30)
    probe = Executor(model, [Fetch("p")]).run(feeds)[0]
    assert not probe[4, :, 2:].any()


@pytest.mark.parametrize("case", MASKS)
def test_rows_that_are_masked_everywhere_stay_averages(case: str) -> None:
    """Added to -3.4e38 float32 loses the scores, so that such a row is an average; with a shorter mask it would be their softmax."""
    proto, feeds = masked(case)
    feeds["m"][1] = 0
    model, record = cast(proto, feeds)
    assert any("low alone would leave" in reason for _, reason in record.skipped) == (case == "product")
    expected, found = run(proto, feeds), run(model, feeds)
    finite = np.isfinite(expected)  # two such masks add up to minus infinity in float32, which gives NaN
    assert sqnr(expected[finite], found[finite]) > 50


@pytest.mark.parametrize("samples", [0, 4])
def test_a_constant_mask_with_a_row_masked_everywhere_stays(samples: int) -> None:
    """Whether errors are measured or not; with one element kept in each row it becomes half."""
    low = np.where(np.tril(np.ones((4, 4))) > 0, 0, np.finfo(np.float32).min).astype(np.float32)
    text = """g (float[N, 4, 8] x) => (float[N, 4, 8] y) {
        a = MatMul(x, w)\nu = Transpose <perm = [0, 2, 1]> (a)\ns = MatMul(x, u)\nt = Add(s, m)\np = Softmax(t)\ny = MatMul(p, a) }"""
    x, full = floats(16, 4, 8), low.copy()
    full[0] = low[0, 1]
    for mask, stays in ((low, False), (full, True)):
        proto = build(text, w=floats(8, 8), m=mask)
        model, record = cast(proto, {"x": x}, error_samples=samples)
        assert any("masks everything" in reason for _, reason in record.skipped) == stays
        assert sqnr(run(proto, {"x": x}), run(model, {"x": x})) > 50 and bool(record.skipped) == stays


@pytest.mark.parametrize(("after", "scale"), [("p = Relu(t)", 1), ("q = Neg(t)\np = Softmax(q)", 1), ("p = Softmax(t)", 30)])
def test_masks_that_may_mean_something_else_stay(after: str, scale: float) -> None:
    """What does not end in a Softmax, and what is too near to the scores."""
    proto, feeds = masked("product", after)
    model, record = cast(proto, {**feeds, "x": feeds["x"] * scale})
    assert any("beyond float16" in reason for row, reason in record.skipped if row.startswith("Mul "))


def test_fixed_inputs_keep_their_type() -> None:
    """The scales of a Resize are float32 by definition."""
    proto = build("g (float[N, 2, 4, 4] x) => (float[N, 2, 8, 8] y) { a = Conv(x, w) b = Resize(a, , s) y = Add(b, b) }",
                  w=floats(2, 2, 1, 1), s=np.array([1, 1, 2, 2], np.float32))  # fmt: skip
    model, record = cast(proto, {"x": floats(2, 2, 4, 4)})
    assert [value.dtype for node in model.graph if node.op_type == "Resize" for value in node.inputs[2:]] == [FLOAT]
    assert casts(model) == 2 and not record.skipped


def test_shared_constants_are_copied() -> None:
    text, x = "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, v) r = Add(a, w) y = Mul(r, w) }", floats(8, 8)
    proto = build(text, v=floats(8, 8), w=floats(8))
    model, _ = cast(proto, {"x": x}, exclude=("Mul",))
    assert {value.dtype for value in model.graph.initializers.values()} == {FLOAT, HALVES["fp16"].code} and casts(model) == 2


def test_sizes_need_no_cast() -> None:
    proto = layers("s = Shape(a)\nr = Reshape(a, s)\nb = Relu(r)")
    model, record = cast(proto, {"x": floats(8, 8)}, exclude=("Relu",))
    assert casts(model) == 4 and set(record.skipped[i][1] for i in range(len(record.skipped))) == {"excluded by the recipe"}


def test_quantizers_do_not_hide_what_a_node_does() -> None:
    """A model of 3-bit activations turns the smallest difference into steps; that is no reason for float32."""
    proto, x = layers("r = Relu(a)\nt = MatMul(r, u)\nb = Softmax(t)", u=floats(8, 8, seed=5) * 4), floats(64, 8)
    model, record = cast(proto, {"x": x}, InsertQdq(activation_bits=3, min_sqnr_db=0, error_samples=0), min_sqnr_db=45)
    assert not any("it alone" in reason for _, reason in record.skipped)


def test_several_readers_share_a_cast() -> None:
    proto = layers("r = Relu(a)\ns = Neg(a)\nt = Abs(a)\nu = Add(r, s)\nb = Add(u, t)")
    model, _ = cast(proto, {"x": floats(8, 8)}, exclude=("Relu", "Neg", "Abs", "Add"))
    assert casts(model) == 4


def test_nothing_to_do_is_an_error() -> None:
    with pytest.raises(RecipeError, match=r"changed nothing(.|\n)*excluded by the recipe"):
        cast(layers("b = Relu(a)"), {"x": floats(8, 8)}, exclude=("MatMul", "Relu"))


EXPORTS = {
    "all": "g (float16[N, 8] x) => (float16[N, 8] y) { a = MatMul(x, w) y = Relu(a) }",
    "inside": "g (float[N, 8] x) => (float[N, 8] y) { h = Cast <to = 10> (x) a = MatMul(h, w) r = Relu(a) y = Cast <to = 1> (r) }",
}


@pytest.mark.parametrize("case", EXPORTS)
def test_an_export_in_float16_is_left_as_it_is(case: str) -> None:
    """Whoever builds an engine of one takes the recipe fp16; bf16 is refused, as it would change nothing."""
    proto, x = build(EXPORTS[case], w=floats(8, 8).astype(np.float16)), floats(16, 8)
    feeds = {"x": x.astype(np.float16) if case == "all" else x}
    model, record = quantize(proto, feeds, CastFloat(), target="tensorrt-rtx")
    (reason,) = [why for where, why in record.skipped if where == "the model"]
    assert not record.edits and "float16 already" in reason
    assert [node.op_type for node in model.graph] == [node.op_type for node in proto.graph.node]
    with pytest.raises((TargetError, RecipeError), match="nothing in float32|changed nothing"):
        quantize(proto, feeds, CastFloat(precision="bf16"), target="tensorrt-rtx")


def test_a_model_of_integers_is_refused() -> None:
    proto, feeds = build("g (int64[N, 8] x) => (int64[N, 8] y) { y = Add(x, x) }"), {"x": np.ones((8, 8), np.int64)}
    with pytest.raises(TargetError, match="nothing in float32"):
        quantize(proto, feeds, CastFloat(), target="tensorrt-rtx")
    _, record = quantize(proto, feeds, CastFloat(allow_no_effect=True), target="tensorrt-rtx")
    assert record.skipped == (("the model", "nothing in it is float32"),)


def test_a_newer_opset_alone_is_nothing_done() -> None:
    """bfloat16 needs opset 22, which is no effect of its own: the rest would be lost on a model that gets larger by it."""
    identity = build("g (float[N, 8] x) => (float[N, 8] y) { y = Identity(x) }", opset=17)
    with pytest.raises(RecipeError, match="changed nothing"):
        cast(identity, {"x": floats(8, 8)}, precision="bf16")
    with pytest.raises(RecipeError, match=r"changed nothing(.|\n)*number 3 of 3"):
        cast(layers("b = Relu(a)"), {"x": floats(8, 8)}, CastFloat(), precision="bf16")


def test_refusals() -> None:
    with pytest.raises(TargetError, match=r"does not run bfloat16(.|\n)*precision: fp16"):
        cast(layers("b = Relu(a)"), {"x": floats(8, 8)}, precision="bf16", target="onnxruntime")
    with pytest.raises(RecipeError, match="matches no node"):
        cast(layers("b = Relu(a)"), {"x": floats(8, 8)}, exclude=("Gemmm",))


# ---- with quantizers ------------------------------------------------------------------------------------------------

QUANTIZERS = {"int8": (InsertQdq(),), "int8 weights": (QuantizeWeights(bits=8),), "int4 blocks": (QuantizeWeights(bits=4, group_size=32),)}


@BOTH
def test_what_passes_make_without_stating_types(precision: str) -> None:
    """The activation's way through blocks of MXFP8: a dozen nodes, half but for what float16 cannot hold (a floor of 2 to the -100)."""
    proto, x = layers("b = Relu(a)", width=32), floats(16, 32)
    model, record = cast(proto, {"x": x}, BlockFloat(format="mxfp8"), precision=precision)
    assert not any("not known" in reason for _, reason in record.skipped)
    assert casts(model) <= (4 if precision == "fp16" else 2)
    blocks = [node.inputs[0].dtype for node in model.graph if node.op_type == "QuantizeLinear"]
    assert len(blocks) == 2 and HALVES[precision].code in blocks
    plain = quantize(proto, {"x": x}, BlockFloat(format="mxfp8"), target="tensorrt-rtx")[0]
    expected, block, both = (run(made, {"x": x}) for made in (proto, plain, model))
    assert sqnr(expected, both) > sqnr(expected, block) - (0.5 if precision == "fp16" else 1.5)


@BOTH
@pytest.mark.parametrize("opset", [20, 23, 24])
def test_no_cast_goes_between_a_quantizer_and_its_product(opset: int, precision: str) -> None:
    """From opset 23 on, a DequantizeLinear makes what its attribute says, and without that the type of its scale."""
    proto = onnx.version_converter.convert_version(onnx.load(onnx_path("digits_vit")), opset)
    model, record = cast(proto, {"input": digits.calibration(32)}, InsertQdq(), precision=precision, target="generic")
    makers = [ir.producer(value) for node in model.graph if node.op_type in ("MatMul", "Gemm") for value in node.inputs[:2]]
    assert sum(maker is not None and maker.op_type == "DequantizeLinear" for maker in makers) >= 34
    assert not any(maker is not None and maker.op_type == "Cast" for maker in makers) and casts(model) <= 2
    assert not any(row.startswith("DequantizeLinear") for row, _ in record.skipped)


@BOTH
@pytest.mark.parametrize("target", ["tensorrt-rtx", "onnxruntime"])
@pytest.mark.parametrize("case", QUANTIZERS)
def test_quantizers_are_typed_like_the_floats_around_them(case: str, target: str, precision: str) -> None:
    """Scales are half, INT32 biases keep what they lose otherwise; the error is that of the quantizers."""
    if target == "onnxruntime" and precision == "bf16":
        pytest.skip("ONNX Runtime has no bfloat16")
    x, proto = digits.calibration(32), onnx.load(onnx_path("digits_vit"))
    feeds = {"input": x}
    model, _ = cast(proto, feeds, *QUANTIZERS[case], target=target, precision=precision)
    scales = {node.inputs[1].dtype for node in model.graph if node.op_type.endswith("quantizeLinear") and node.inputs[1] is not None}
    assert HALVES[precision].code in scales
    expected = run(proto, feeds)
    quantized = quantize(proto, feeds, *QUANTIZERS[case], target=target)[0]
    both, one, other = (np.mean((run(made, feeds) - expected) ** 2)
                        for made in (model, quantized, cast(proto, feeds, precision=precision)[0]))  # fmt: skip
    assert both < (1.5 if precision == "fp16" else 3) * (one + other)  # 8 bits of scale times 8 bits of code


def test_a_scale_that_float16_loses_stays_float32() -> None:
    proto = layers("q = QuantizeLinear(a, s, z)\nd = DequantizeLinear(q, s, z)\nb = Mul(d, c)", s=np.float32(2.1e-7), z=np.int8(0), c=BIG)
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(floats(8, 8, seed=1) * 1e-5, proto.graph.initializer[0].name))
    x = floats(16, 8)
    model, record = cast(proto, {"x": x})
    assert "a scale keeps" in reason_for("DequantizeLinear", record)
    assert sqnr(run(proto, {"x": x}), run(model, {"x": x})) > 30


@BOTH
@pytest.mark.parametrize("others", [(), (InsertQdq(),), (QuantizeWeights(bits=4, group_size=32, fallback_bits=8),)])
@pytest.mark.parametrize("name", ["digits_vit", "digits_cnn"])
def test_tensorrt_takes_it(name: str, others: tuple[Pass, ...], precision: str) -> None:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")
    model, _ = cast(onnx.load(onnx_path(name)), {"input": digits.calibration(32)}, *others, precision=precision)
    assert tensorrt.parse(model, get_target("tensorrt-rtx")) == []
