"""insert-qdq: which nodes become integer on which target, in graphs of every kind."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir, kernels_used
from graphq.executor import Executor
from graphq.pipeline import PassRecord
from graphq.targets import TARGETS

RNG = np.random.default_rng(0)
START = RNG.bit_generator.state

Quantize = Callable[..., tuple[ir.Model, PassRecord]]
Run = Callable[..., np.ndarray]
Sqnr = Callable[[np.ndarray, np.ndarray], float]
IntegerLayers = Callable[[ir.Model], set[str | None]]


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """Whatever ran before, a test sees the same data."""
    RNG.bit_generator.state = START


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def ops(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == op_type]


def maker(value: ir.Value | None) -> str | None:
    node = ir.producer(value)
    return None if node is None else node.op_type


@pytest.mark.parametrize("target", TARGETS)
def test_two_readers_share_one_pair(target: str, quantize: Quantize) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { q = MatMul(x, w) k = MatMul(x, v) y = Mul(q, k) }"
    model, _ = quantize(build(text, w=floats(8, 8), v=floats(8, 8)), {"x": floats(32, 8)}, target)
    assert len(ops(model, "QuantizeLinear")) == 1
    first, second = ops(model, "MatMul")
    assert first.inputs[0] is second.inputs[0] and maker(first.inputs[0]) == "DequantizeLinear"


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_that_two_layers_share(target: str, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    """Each gets its own DequantizeLinear, also where a third reader needs the floats."""
    text = "g (float[N, 8] x) => (float[N, 8] y) { a = MatMul(x, w) t = Tanh(a) b = MatMul(t, w) d = ReduceSum(w) y = Add(b, d) }"
    proto, feeds = build(text, w=floats(8, 8)), {"x": floats(64, 8)}
    model, _ = quantize(proto, feeds, target)
    first, second = ops(model, "MatMul")
    assert first.inputs[1] is not second.inputs[1] and maker(ops(model, "MatMul")[0].inputs[1]) == "DequantizeLinear"
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28


@pytest.mark.parametrize("target", ["onnxruntime", "generic"])
def test_a_bias_that_two_layers_share(target: str, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    """Correcting and quantizing one leaves the other's alone."""
    text = "g (float[N, 16] x) => (float[] y) { a = Gemm(x, w, b) t = Relu(a) c = Gemm(t, v, b) u = Neg(c) d = MatMul(u, w) y = Add(d, b) }"
    proto, feeds = build(text, w=floats(16, 16), v=floats(16, 16), b=floats(16)), {"x": floats(256, 16)}
    model, _ = quantize(proto, feeds, target, error_samples=256, float_budget=0)
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28


def test_concat_and_max_pool_use_one_scale(quantize: Quantize) -> None:
    text = """g (float[N, 4, 8, 8] x) => (float[N, 4, 4, 4] y) {
        a = Conv(x, w) b = Conv(x, v) c = Concat <axis = 1> (a, b)
        p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (c) y = Conv(p, u) }"""
    model, _ = quantize(build(text, w=floats(4, 4, 1, 1), v=9 * floats(4, 4, 1, 1), u=floats(4, 8, 1, 1)), {"x": floats(8, 4, 8, 8)})
    (concat,), (pool,) = ops(model, "Concat"), ops(model, "MaxPool")
    after = [use.node for node in (concat, pool) for use in node.outputs[0].uses()]
    pairs = [ir.producer(value) for value in (*concat.inputs, *pool.inputs)] + after
    scales = {float(ir.constant(node.inputs[1])) for node in pairs}  # type: ignore[arg-type,union-attr]
    assert len(pairs) == 5 and len(scales) == 1
    assert {"QLinearConcat": 1, "QLinearConv": 3}.items() <= kernels_used.kernels(model).counts.items()


KERNELS: dict[str, tuple[str, dict[str, np.ndarray], dict[str, int]]] = {
    "QLinearConv": ("float[N, 4, 8, 8] x", {"w": floats(4, 4, 3, 3)}, {"QLinearConv": 2, "QLinearAdd": 1}),
    "Clip": ("float[N, 4, 8, 8] x", {"w": floats(4, 4, 3, 3), "low": np.float32(0), "high": np.float32(6)}, {"QLinearConv": 2}),
    "MatMul": ("float[N, 6, 8] x", {"w": floats(8, 8), "b": floats(8)}, {"MatMulIntegerToFloat": 2}),
    "Gemm": ("float[N, 8] x", {"w": floats(8, 8), "b": floats(8)}, {"QGemm": 2}),
    "pools": ("float[N, 4, 8, 8] x", {"w": floats(4, 4, 1, 1), "v": floats(4, 4)},
              {"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QLinearAveragePool": 1, "QGemm": 1}),
    "flat": ("float[N, 4, 2, 2] x", {"w": floats(4, 4, 1, 1), "v": floats(16, 8)}, {"QLinearConv": 1, "QGemm": 1}),
}  # fmt: skip
BODIES = {
    "QLinearConv": "a = Conv <pads = [1, 1, 1, 1]> (x, w) r = Relu(a) c = Conv <pads = [1, 1, 1, 1]> (r, w) s = Add(c, r) y = Relu(s)",
    "Clip": "a = Conv <pads = [1, 1, 1, 1]> (x, w) r = Clip(a, low, high) y = Conv <pads = [1, 1, 1, 1]> (r, w)",
    "MatMul": "a = MatMul(x, w) c = Add(a, b) t = Gelu(c) d = MatMul(t, w) y = Add(d, b)",
    "Gemm": "a = Gemm(x, w, b) t = Tanh(a) y = Gemm <transB = 1> (t, w, b)",
    "pools": """a = Conv(x, w) p = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (a) c = Conv(p, w)
        q = GlobalAveragePool(c) f = Flatten(q) y = Gemm(f, v)""",
    "flat": "a = Conv(x, w) f = Flatten(a) y = Gemm(f, v)",
}


@pytest.mark.parametrize("case", KERNELS)
def test_integer_kernels_really_run(case: str, quantize: Quantize) -> None:
    """What ONNX Runtime makes of the graph: integer kernels, and no linear operator in floats."""
    declared, weights, expected = KERNELS[case]
    proto = build(f"g ({declared}) => (float[N, A] y) {{ {BODIES[case]} }}", **weights)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    feeds = {"x": floats(32, *[dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim][1:])}
    if case == "QLinearConv":
        proto.graph.node.append(onnx.helper.make_node("Conv", ["y", "w"], ["z"]))  # something integer reads the sum
        proto.graph.output[0].name = "z"
        expected = {"QLinearConv": 3, "QLinearAdd": 1}
    model, _ = quantize(proto, feeds, float_budget=0)
    found = kernels_used.kernels(model)
    assert expected.items() <= found.counts.items() and not found.floating, found


@pytest.mark.parametrize("target", TARGETS)
def test_the_outputs_keep_their_names(target: str, quantize: Quantize, sqnr: Sqnr, integer_layers: IntegerLayers) -> None:
    """A convolution whose result the caller gets, and one that also goes on inside."""
    text = "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y, float[N, 4, 8, 8] z) { y = Conv(x, w) z = Conv(y, w) }"
    proto, feeds = build(text, w=floats(4, 4, 1, 1)), {"x": floats(8, 4, 8, 8)}
    model, _ = quantize(proto, feeds, target)
    assert [value.name for value in model.graph.outputs] == ["y", "z"] and len(integer_layers(model)) == 2
    before, after = (Executor(one).run(feeds) for one in (onnx_ir.from_proto(proto), model))
    assert all(sqnr(a, b) > 25 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", ["MatMul", "Gemm"])
def test_a_layer_whose_output_is_the_callers_and_read_on(target: str, layer: str, quantize: Quantize, sqnr: Sqnr) -> None:
    """What is taken out of the bias behind it must not be missing in the output itself."""
    text = f"g (float[N, 16] x) => (float[N, 8] y, float[N, 8] z) {{ y = {layer}(x, w) z = Add(y, b) }}"
    proto, feeds = build(text, w=floats(16, 8), b=floats(8)), {"x": np.abs(floats(256, 16))}
    model, _ = quantize(proto, feeds, target, error_samples=256)
    before, after = (Executor(one).run(feeds) for one in (onnx_ir.from_proto(proto), model))
    assert all(sqnr(a, b) > 30 for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dead", [0.0, 1e-30, 1e-20])
def test_dead_channels_with_a_bias(target: str, dead: float, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    """A channel without weights still has its bias, whatever the scale of an INT32 one would be."""
    weight, bias = floats(4, 4, 1, 1), np.float32([1, -20, 3, 1e-3])
    weight[1] *= np.float32(dead)
    text = "g (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y) { a = Conv(x, w, b) r = Relu(a) y = Conv(r, w, b) }"
    proto, feeds = build(text, w=weight, b=bias), {"x": floats(8, 4, 8, 8)}
    model, _ = quantize(proto, feeds, target)
    for deployed in (False, True):
        result = run(model, feeds, deployed=deployed)
        assert sqnr(run(proto, feeds), result) > 28
        np.testing.assert_allclose(result[:, 1], -20, rtol=0.01)


@pytest.mark.parametrize("target", TARGETS)
def test_dead_inputs_and_all_zero_weights(target: str, quantize: Quantize, run: Run) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { z = Mul(x, none) a = MatMul(z, w) b = MatMul(x, v) y = Add(a, b) }"
    proto, feeds = build(text, none=np.float32(0), w=floats(8, 8), v=np.zeros((8, 8), np.float32)), {"x": floats(32, 8)}
    model, _ = quantize(proto, feeds, target)
    np.testing.assert_array_equal(run(model, feeds), 0)


@pytest.mark.parametrize("batch", ["1", "3", "N"])
@pytest.mark.parametrize("size", ["8", "H"])
def test_fixed_and_open_dimensions(batch: str, size: str, quantize: Quantize, run: Run, sqnr: Sqnr, integer_layers: IntegerLayers) -> None:
    text = (
        f"g (float[{batch}, 4, {size}, {size}] x) => (float[{batch}, 4, {size}, {size}] y) {{ a = Conv(x, w) r = Relu(a) y = Conv(r, w) }}"
    )
    proto, feeds = build(text, w=floats(4, 4, 1, 1)), {"x": floats(6, 4, 8, 8)}
    model, _ = quantize(proto, feeds)
    assert len(integer_layers(model)) == 2 and ir.inputs(model) == ir.inputs(onnx_ir.from_proto(proto))
    few = {"x": feeds["x"][: int(batch) if batch != "N" else 5]}
    assert sqnr(run(proto, few), run(model, few)) > 28
    if size == "H":
        other = {"x": np.tile(few["x"], (1, 1, 2, 1))}
        assert sqnr(run(proto, other), run(model, other)) > 25


def test_unknown_shapes(quantize: Quantize, run: Run, sqnr: Sqnr, integer_layers: IntegerLayers) -> None:
    """Nothing is known about an inner value, not even its rank."""
    text = "g (float[N, 4] x, int64[N] rows) => (float[] y) { t = Reshape(x, rows) a = MatMul(t, w) b = Tanh(a) y = MatMul(b, w) }"
    proto, feeds = build(text, w=floats(4, 4)), {"x": floats(2, 4), "rows": np.array([-1, 4])}
    model, record = quantize(proto, feeds, float_budget=0)
    assert len(integer_layers(model)) == 2 and sqnr(run(proto, feeds), run(model, feeds)) > 25


def test_data_without_a_batch_axis(quantize: Quantize) -> None:
    """The mean over output channels, which is all that a vector has, is no bias."""
    proto, feeds = build("g (float[256] x) => (float[256] y) { [fc] y = Add(a, b) }", b=floats(256)), {"x": np.abs(floats(256))}
    proto.graph.initializer.append(numpy_helper.from_array(np.abs(floats(256, 256)), "w"))
    proto.graph.node.insert(0, onnx.helper.make_node("MatMul", ["x", "w"], ["a"], "mm"))
    model, _ = quantize(proto, feeds, "generic", center=False)
    np.testing.assert_array_equal(ir.constant(next(node for node in model.graph if node.name == "fc").inputs[1]),
                                  numpy_helper.to_array(proto.graph.initializer[0]))  # fmt: skip


IF_MODEL = """g (float[N, 8] x, bool[N] pick) => (float[N, 8] y) {
    a = MatMul(x, w) i = Cast <to = 7> (pick) m = ReduceMax <keepdims = 0> (i) c = Cast <to = 9> (m)
    b = If(c) < then_branch = left () => (float[N, 8] p) { h = MatMul(a, w) p = Tanh(h) },
                else_branch = right () => (float[N, 8] q) { q = Neg(a) }>
    y = MatMul(b, w) }"""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("pick", [True, False])
def test_if(target: str, pick: bool, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    """Layers around it become integer, those inside stay float; the shared weight serves both."""
    proto, feeds = build(IF_MODEL, w=floats(8, 8)), {"x": floats(32, 8), "pick": np.full(32, pick)}
    model, record = quantize(proto, feeds, target, float_budget=0)
    assert [maker(node.inputs[1]) for node in ops(model, "MatMul")].count("DequantizeLinear") == 2
    ((where, reason),) = record.skipped
    assert where.startswith("MatMul 'h'") and "subgraph" in reason
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.inf, -np.inf]])
def test_a_weight_that_is_not_finite_stays_float(target: str, bad: list[float], quantize: Quantize, integer_layers: IntegerLayers) -> None:
    weight, w = floats(8, 8), floats(8, 8)
    weight.reshape(-1)[: len(bad)] = bad
    text = "g (float[N, 8] x) => (float[N, 8] y) { [one] a = MatMul(x, w) t = Tanh(a) [two] y = MatMul(t, v) }"
    model, record = quantize(build(text, w=w, v=weight), {"x": floats(32, 8)}, target, float_budget=0)
    assert integer_layers(model) == {"one"}
    ((where, reason),) = record.skipped
    assert "'two'" in where and "NaN" in reason


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_to_quantize_is_fine_where_the_recipe_allows_it(target: str, quantize: Quantize) -> None:
    text = "g (float[N, 8] x) => (float[N, 8] y) { t = Tanh(x) y = Softmax(t) }"
    model, record = quantize(build(text), {"x": floats(32, 8)}, target, allow_no_effect=True)
    assert not record.edits and [node.op_type for node in model.graph] == ["Tanh", "Softmax"]


ATTENTION = """g (int64[N, 6] ids, int64[N, 6] attention_mask) => (float[N, 6, 16] y) {
    length = Shape <start = 1> (ids) last = Squeeze(length) pos = Range(zero, last, one) p = Gather(table, pos) e = Gather(words, ids)
    h = Add(e, p) n = LayerNormalization(h, g)
    q = MatMul(n, wq) k = MatMul(n, wk) v = MatMul(n, wv)
    t = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, t)
    f = Cast <to = 1> (attention_mask) inv = Sub(unit, f) big = Mul(inv, huge) m = Unsqueeze(big, axis) z = Add(s, m)
    r = Softmax(z) c = MatMul(r, v) o = MatMul(c, wo) y = Add(o, h) }"""


@pytest.mark.parametrize("target", TARGETS)
def test_masks_softmax_norms_and_tables_stay_untouched(
    target: str, quantize: Quantize, run: Run, sqnr: Sqnr, integer_layers: IntegerLayers
) -> None:
    """A mask of -3e38 through a quantizer would wipe out everything else."""
    weights = {name: floats(16, 16) / 4 for name in ("wq", "wk", "wv", "wo")}
    proto = build(ATTENTION, **weights, g=floats(16), table=floats(16, 16), words=floats(50, 16), huge=np.float32(-3e38),
                  unit=np.float32(1), axis=np.array([1]), zero=np.int64(0), one=np.int64(1))  # fmt: skip
    mask = np.ones((32, 6), np.int64)
    mask[:, 4:] = 0
    feeds = {"ids": RNG.integers(0, 50, (32, 6)), "attention_mask": mask}
    model, _ = quantize(proto, feeds, target, float_budget=0)
    assert len(integer_layers(model)) == 4 and len(ops(model, "QuantizeLinear")) == 2
    for op_type in ("Softmax", "LayerNormalization", "Gather", "Cast", "Sub", "Mul", "Range", "Unsqueeze"):
        assert all(maker(value) != "DequantizeLinear" for node in ops(model, op_type) for value in node.inputs if op_type != "Mul" or value)
    for deployed in (False, True):
        result = run(model, feeds, deployed=deployed)
        assert np.isfinite(result).all() and sqnr(run(proto, feeds), result) > 28


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
def test_a_table_that_two_nodes_read_is_stored_once(target: str, quantize: Quantize) -> None:
    text = "g (int64[N, 6] ids) => (float[N, 6, 16] y) { e = Gather(words, ids) f = Gather(words, ids) h = Add(e, f) y = MatMul(h, w) }"
    proto, feeds = build(text, words=floats(2000, 16), w=floats(16, 16)), {"ids": RNG.integers(0, 512, (32, 6))}
    model, _ = quantize(proto, feeds, target)
    assert [name for name in model.graph.initializers if name.startswith("words")].count("words_quantized") == 1
    assert sum(len(ir.constant_shape(value)) == 2 for value in model.graph.initializers.values()) == 2
    model, _ = quantize(proto, feeds, target, exclude=("Gather",))
    assert "words" in model.graph.initializers


def test_what_one_layer_keeps_float_does_not_bring_in_another(quantize: Quantize) -> None:
    """r1 is too small to be rounded for z; that c2 stays float must not make it large enough."""
    text = """g (float[N,8,16,16] x) => (float[] y, float[] z) {
        r1 = Conv(x, w1) z = Sin(r1) c2 = Conv(x, w2) s2 = Relu(c2) c3 = Conv<pads=[1,1,1,1]>(s2, w3) y = Relu(c3) }"""
    w2, x = floats(8, 8, 1, 1), floats(32, 8, 16, 16)
    w2[:, 0] *= 1e-3
    x[:, 0] *= 300
    _, record = quantize(build(text, w1=floats(4, 8, 1, 1), w2=w2, w3=floats(8, 8, 3, 3)), {"x": x})
    assert [reason.split(":")[0].split(" its")[0] for _, reason in record.skipped] == ["kept float", "onnxruntime would have to round"]


@pytest.mark.parametrize("tables", [True, False])
def test_large_tables_are_stored_in_8_bits(tables: bool, quantize: Quantize, run: Run, sqnr: Sqnr) -> None:
    """Word embeddings, yes; positions, no. Rows are looked up as codes."""
    text = "g (int64[N, 6] ids) => (float[N, 6, 16] y) { e = Gather(words, ids) p = Gather(places, ids) h = Add(e, p) y = MatMul(h, w) }"
    proto, feeds = build(text, words=floats(2000, 16), places=floats(512, 16), w=floats(16, 16)), {"ids": RNG.integers(0, 512, (32, 6))}
    model, _ = quantize(proto, feeds, tables=tables)
    words, places = ops(model, "Gather")
    kinds = [ir.constant(node.inputs[0]).dtype.name for node in (words, places)]  # type: ignore[union-attr]
    assert kinds == ["int8" if tables else "float32", "float32"] and "words" not in model.graph.initializers or not tables
    assert sqnr(run(proto, feeds), run(model, feeds)) > 28
