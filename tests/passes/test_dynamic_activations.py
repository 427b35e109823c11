"""dynamic-activations: one scale a token, the same in every runtime; and who is left alone."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator
from pydantic import ValidationError

from graphq import ir, precision
from graphq.backends import tensorrt
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import GraphqError, RecipeError
from graphq.executor import Executor, Fetch
from graphq.passes import _dynamic_math as math
from graphq.passes.dynamic_activations import DynamicActivations
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.precision import Bits
from graphq.quantizers import Uniform
from graphq.spec import QuantSpec
from graphq.targets import TARGETS, get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "dynamic_activations"
D, WIDTH = 24, 16


def floats(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def quantize(
    proto: onnx.ModelProto, *others: Pass, target: str = "onnxruntime", ask: dict[str, Bits] | None = None, **options: Any
) -> tuple[ir.Model, PassRecord]:
    """The model after `others` and dynamic-activations; `ask` requests bits by node name before."""
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    for node in model.graph:
        if ask and node.name in ask:
            precision.ask(Editor(model), node, ask[node.name])
    data = open_calibration({"x": floats(8, *(ir.shape_of(model.graph.inputs[0]) or ())[1:])}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
    record = run_passes([Normalize(), *others, DynamicActivations(**options)], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return model, record


def both(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    """First output in ONNX Runtime and in the reference evaluator."""
    return [Executor(model, threads=1).run({"x": x})[0], ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]]


def calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == ir.DOMAIN]


def dump(model: ir.Model) -> str:
    rows = [f"{name}: {np.asarray(ir.constant(value)).tolist()}" for name, value in model.graph.initializers.items()]
    rows += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
             for node in model.graph]  # fmt: skip
    return "\n".join([*rows, *map(onnx.printer.to_text, ir.to_proto(model).functions), ""])


# ---- golden text ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["shared_input"])
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = quantize(parser.parse_model(before), bits=4)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- numbers --------------------------------------------------------------------------------------------------------

LAYERS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "MatMul": ("5, 24", "y = MatMul(x, w)", (D, WIDTH)),
    "MatMul of an image of tokens": ("3, 5, 24", "y = MatMul(x, w)", (D, WIDTH)),
    "Gemm": ("24", "y = Gemm(x, w)", (D, WIDTH)),
    "transB": ("24", "y = Gemm <transB = 1> (x, w)", (WIDTH, D)),
}


def layer(case: str, seed: int = 0) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray]:
    """The model, data with rows of very different sizes, and the weight as [D, O]."""
    dims, body, shape = LAYERS[case]
    weight, x = floats(*shape, seed=seed), floats(6, *map(int, dims.split(", ")), seed=seed + 1)
    x = x * np.exp(floats(*x.shape[:-1], 1, seed=seed + 2) * 2)
    return build(f"g (float[N, {dims}] x) => (float[] y) {{ {body} }}", w=weight), x, weight if shape[0] == D else weight.T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("case", LAYERS)
def test_table(case: str, bits: int, symmetric: bool) -> None:
    """The graph computes with the formula's numbers in either runtime (1e-5), none of them more than half a step off."""
    proto, x, weight = layer(case)
    model, _ = quantize(proto, bits=bits, symmetric=symmetric)
    rounded = math.fake_quantize(x, bits, symmetric=symmetric)
    reach = np.abs(x).max(-1, keepdims=True) if symmetric else np.ptp(x, -1, keepdims=True)
    step = reach / math.levels(bits, symmetric=symmetric)
    assert (np.abs(rounded - x) <= 0.5001 * step).all()
    expected = rounded @ weight
    for result in both(model, x):
        np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_nodes_give_the_formula_bit_for_bit(bits: int, symmetric: bool) -> None:
    """Rows of zeros, of subnormal numbers, of the largest, and of one element among them."""
    x = floats(6, D)
    x[0], x[1], x[2], x[3] = 0, 1e-41, x[2] * 1e-38, x[3] * 1e38
    x[4] = np.eye(1, D)
    identity = build(f"g (float[N, {D}] x) => (float[] y) {{ y = MatMul(x, w) }}", w=np.eye(D, dtype=np.float32))
    model, _ = quantize(identity, bits=bits, symmetric=symmetric)
    (call,) = calls(model)
    probe = Executor(model, [Fetch(call.outputs[0].name or "")], threads=1).run({"x": x})[0]
    assert np.isfinite(probe).all() and not probe[0].any()
    np.testing.assert_array_equal(probe[[0, 3, 4, 5]], math.fake_quantize(x, bits, symmetric=symmetric)[[0, 3, 4, 5]])
    np.testing.assert_allclose(
        probe, math.fake_quantize(x, bits, symmetric=symmetric), atol=1e-37
    )  # whether subnormal results are flushed is the runtime's


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [4, 8])
def test_beats_one_range_for_all_tokens(bits: int, seed: int) -> None:
    """The plain alternative, with the exact range of the data it is tested on; errors relative to each token's output."""
    _, x, weight = layer("MatMul", seed)
    quantizer = Uniform(QuantSpec(bits, signed=False, symmetric=False))
    static = quantizer.fake_quantize(x, quantizer.fit(x.min(), x.max()))
    powers = np.sum((x @ weight) ** 2, -1, dtype=np.float64)
    errors = [np.mean(np.sum(((one - x) @ weight) ** 2, -1) / powers) for one in (static, math.fake_quantize(x, bits))]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("seed", range(3))
def test_a_zero_point_gives_one_sided_tokens_nearly_twice_the_levels(seed: int) -> None:
    _, x, _ = layer("MatMul", seed)
    x = np.maximum(x, -0.1 * np.abs(x))
    errors = [np.mean((math.fake_quantize(x, 4, symmetric=symmetric) - x) ** 2, -1) for symmetric in (True, False)]
    assert np.mean(errors[1] / errors[0]) < 0.4


# ---- where ----------------------------------------------------------------------------------------------------------


def test_layers_of_one_input_share_a_quantizer_and_others_read_it_as_it_was() -> None:
    text = "g (float[N, 5, 24] x) => (float[] y, float[] z, float[] r) { n = Gelu(x) y = MatMul(n, w) z = MatMul(n, v) r = Relu(n) }"
    model, record = quantize(build(text, w=floats(D, WIDTH), v=floats(D, WIDTH)))
    (call,) = calls(model)
    assert {use.node.op_type for use in ir.uses(call.outputs[0])} == {"MatMul"} and len(ir.uses(call.outputs[0])) == 2
    assert record.edits == {"initializer": 1, "function": 1, "insert": 1, "rewire": 2}
    assert next(node for node in model.graph if node.op_type == "Relu").inputs[0] is call.inputs[0]


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [0, 8])
def test_weights_may_be_quantized_before_or_after(group_size: int, bits: int) -> None:
    proto, x, _ = layer("MatMul")
    weights = QuantizeWeights(bits=bits, group_size=group_size)
    before, _ = quantize(proto, weights)
    after, _ = quantize(proto)
    data = open_calibration({"x": x}, ir.inputs(after))
    run_passes([weights], PassContext(after, ir.clone(after), data, data, get_target("onnxruntime")), verify_graph)
    assert [node.op_type for node in before.graph] == ["DynamicQuantize", "DequantizeLinear", "MatMul"]
    assert sorted(node.op_type for node in after.graph) == ["DequantizeLinear", "DynamicQuantize", "MatMul"]
    np.testing.assert_array_equal(both(before, x)[0], both(after, x)[0])


def test_bits_that_a_layer_asks_for_come_first() -> None:
    text = "g (float[N, 5, 24] x) => (float[] y, float[] z, float[] r) { [a] y = MatMul(x, w) [b] z = MatMul(x, w) [c] r = MatMul(x, w) }"
    asked = {"a": Bits(8, 4), "b": Bits(8, None)}
    model, record = quantize(build(text, w=floats(D, WIDTH)), ask=asked, bits=6)
    makers = {node.name: ir.producer(node.inputs[0]) for node in model.graph if node.op_type == "MatMul"}
    levels = {name: None if maker is None else np.asarray(ir.constant(maker.inputs[1])).item() for name, maker in makers.items()}
    assert levels == {"a": 7, "b": None, "c": 31}
    assert [reason for _, reason in record.skipped] == ["it asks for float activations"]


REFUSED: dict[str, tuple[str, str]] = {
    "a convolution": ("y = Conv(x, k)", "sums over several rows"),
    "a Gemm that reads columns": ("r = Squeeze(x, ax) y = Gemm <transA = 1> (r, t)", "its data is transposed"),
    "two activations": ("r = Transpose <perm = [0, 2, 1]> (x) y = MatMul(x, r)", "its weight is not a constant"),
    "data is constant": ("c = DequantizeLinear(v, s, z) r = MatMul(c, w) y = Add(r, x)", "not a float32 activation"),
    "data is float16": ("r = Cast <to = 10> (x) m = MatMul(r, h) y = Cast <to = 1> (m)", "not a float32 activation"),
    "quantized already": (
        "q = QuantizeLinear(x, s, z) r = DequantizeLinear(q, s, z) y = MatMul(r, w)", "is quantized already",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """The node is named with the reason and stays as it is."""
    body, reason = REFUSED[case]
    shape = "5, 24" if "w)" in body or "h)" in body or "Transpose" in body else "1, 24"
    proto = build(
        f"g (float[N, {shape}] x) => (float[] y) {{ {body} }}", k=floats(4, 1, 1), t=floats(1, WIDTH), w=floats(D, WIDTH),
        h=floats(D, WIDTH).astype(np.float16), v=np.ones((1, D), np.int8), s=np.array(0.1, np.float32), z=np.array(0, np.int8),
        ax=np.array([1]),
    )  # fmt: skip
    with pytest.raises(RecipeError, match="changed nothing"):
        quantize(proto)
    model, record = quantize(proto, allow_no_effect=True)
    assert len(record.skipped) == 1 and reason in record.skipped[0][1] and not record.edits and not calls(model)


def test_its_own_quantizers_count_as_such() -> None:
    proto, _, _ = layer("MatMul")
    with pytest.raises(RecipeError, match="is quantized already"):
        quantize(proto, DynamicActivations())


def test_after_insert_qdq_nothing_is_left() -> None:
    proto, _, _ = layer("MatMul")
    with pytest.raises(RecipeError, match="is quantized already"):
        quantize(proto, InsertQdq(float_budget=0.0))


def test_excluded_layers_keep_their_input() -> None:
    text = "g (float[N, 5, 24] x) => (float[] y, float[] z) { [first] y = MatMul(x, w) [last] z = MatMul(x, w) }"
    model, record = quantize(build(text, w=floats(D, WIDTH)), exclude=("la*",))
    makers = {node.name: ir.producer(node.inputs[0]) for node in model.graph if node.op_type == "MatMul"}
    assert makers["first"] is not None and makers["last"] is None
    assert [reason for _, reason in record.skipped] == ["excluded by the recipe"]
    with pytest.raises(GraphqError, match="matches no node"):
        quantize(build(text, w=floats(D, WIDTH)), exclude=("nobody",))


@pytest.mark.parametrize("bits", [1, 9, "many"])
def test_bad_bits(bits: Any) -> None:
    with pytest.raises(ValidationError):
        DynamicActivations(bits=bits)


def test_two_runs_give_the_same_bytes() -> None:
    proto, _, _ = layer("MatMul")
    first, second = (ir.to_proto(quantize(proto)[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_takes_it(target: str) -> None:
    proto, x, _ = layer("MatMul")
    model, _ = quantize(proto, QuantizeWeights(), target=target)
    assert np.isfinite(both(model, x)[0]).all()


def test_engine(tmp_path: Path) -> None:
    """TensorRT-RTX builds one, the function inside: it is not run, which needs a GPU."""
    pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")
    proto, x, _ = layer("MatMul")
    model, _ = quantize(proto, QuantizeWeights(), target="tensorrt-rtx")
    tensorrt.emit_engine(model, tmp_path / "m.engine", get_target("tensorrt-rtx"), open_calibration({"x": x}, ir.inputs(model)))
    assert (tmp_path / "m.engine").stat().st_size > 10_000
