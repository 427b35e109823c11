"""quantize-weights: what is stored, how close it is, how small, and which layers are refused."""

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

from graphq import ir, linear, qdq, stored
from graphq.calibration import random_calibration
from graphq.errors import TargetError
from graphq.executor import Executor, decode
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.quantizers import Uniform
from graphq.spec import ModelInput, PerAxis, PerGroup, QuantSpec
from graphq.targets import TARGETS, get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "quantize_weights"
RNG = np.random.default_rng(0)


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, opset: int = 21, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def quantize(proto: onnx.ModelProto, target: str = "onnxruntime", normalize: bool = True, **options: Any) -> tuple[ir.Model, PassRecord]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    none = random_calibration([ModelInput("x", np.dtype(np.float32), (None, 1))], 1)  # it reads none
    ctx = PassContext(model=model, reference=ir.clone(model), calib=none, held_out=none, target=get_target(target))
    passes: list[Pass] = [Normalize()] if normalize else []
    record = run_passes([*passes, QuantizeWeights(**options)], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return model, record


def layers(model: ir.Model) -> dict[str | None, ir.Node | None]:
    """The node that makes the weight of each layer."""
    return {node.name: ir.producer(node.inputs[1]) for node in ir.all_nodes(model) if node.op_type in linear.LINEAR_OPS}


def dump(model: ir.Model) -> str:
    rows = []
    for name, value in model.graph.initializers.items():
        array = ir.constant(value)
        assert array is not None
        rows.append(f"{name}: {value.dtype}{list(array.shape)} sum {float(array.astype(np.float64).sum()):.3g}")
    for node in model.graph:
        attributes = [f" {key}={ir.attribute(node, key)}" for key in ("axis", "block_size") if key in node.attributes]
        operands = ", ".join(value.name or "-" for value in node.inputs if value)
        rows.append(f"[{node.name}] {node.outputs[0].name} = {node.op_type}({operands}){''.join(attributes)}")
    return "\n".join([f"opset {ir.opset(model)}", *rows, ""])


@pytest.mark.parametrize(("case", "options"), [("int8_shared", {}), ("int4_groups", {"bits": 4, "group_size": 2})])
def test_golden(case: str, options: dict[str, Any]) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = quantize(parser.parse_model(before), **options)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


LAYERS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "MatMul": ("float[N, 64] x", "[it] y = MatMul(x, w)", (64, 24)),
    "Gemm": ("float[N, 64] x", "[it] y = Gemm(x, w)", (64, 24)),
    "transB": ("float[N, 64] x", "[it] y = Gemm <transB = 1> (x, w)", (24, 64)),
    "Conv": ("float[N, 8, 6, 6] x", "[it] y = Conv <group = 2> (x, w)", (24, 4, 3, 3)),
    "ConvTranspose": ("float[N, 8, 6, 6] x", "[it] y = ConvTranspose <group = 2> (x, w)", (8, 12, 3, 3)),
}
LEAST = {8: 40, 4: 15, 3: 8, 2: 1}  # dB of a Gaussian weight with one scale a channel


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group_size", [0, 16, 32])
@pytest.mark.parametrize("case", LAYERS)
def test_table(case: str, group_size: int, bits: int) -> None:
    """Stored codes and scales are those of the formula; ONNX Runtime and the reference evaluator compute with them (1e-5)."""
    declared, body, shape = LAYERS[case]
    weight = floats(*shape)
    proto = build(f"g ({declared}) => (float[] y) {{ {body} }}", w=weight)
    if group_size and "Conv" in case:
        with pytest.raises(TargetError, match="kernel positions"):
            quantize(proto, bits=bits, group_size=group_size)
        return
    model, record = quantize(proto, bits=bits, group_size=group_size)
    maker = layers(model)["it"]
    assert maker is not None and maker.op_type == "DequantizeLinear"
    axis = {"Conv": 0}.get(case, 1)
    if case == "transB":  # held like that of a MatMul, for the kernel that multiplies codes
        weight, body = weight.T.copy(), "[it] y = Gemm (x, w)"
    granularity = PerGroup(1 - axis, group_size) if group_size else PerAxis(axis)
    quantizer = Uniform(QuantSpec(bits, granularity=granularity))
    params = quantizer.fit_weight(weight)
    codes, scale = ir.constant(maker.inputs[0]), ir.constant(maker.inputs[1])
    assert codes is not None and maker.inputs[0].dtype == getattr(ir.DataType, f"INT{4 if bits == 3 else bits}")  # type: ignore[union-attr]
    np.testing.assert_array_equal(codes.astype(np.int8), quantizer.quantize(weight, params))
    np.testing.assert_array_equal(scale, params.scale)
    (measured,) = record.measurements
    assert measured.where == "it" and measured.numbers["weight_sqnr_db"] > LEAST[bits]
    feeds = {"x": floats(4, *[dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim][1:])}
    plain = build(f"g ({declared}) => (float[] y) {{ {body} }}", w=quantizer.fake_quantize(weight, params))
    expected = Executor(onnx_ir.from_proto(plain)).run(feeds)[0]
    results = [Executor(model).run(feeds)[0]]
    if case != "ConvTranspose":  # the evaluator does not know groups of it
        results.append(ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0])
    for result in results:
        np.testing.assert_allclose(result, expected, atol=1e-5 * np.abs(expected).max())


def test_groups_beat_channels() -> None:
    """On the error of the weight, of which they minimise the largest part."""
    proto = build("g (float[N, 256] x) => (float[] y) { [it] y = MatMul(x, w) }", w=RNG.standard_t(3, (256, 64)).astype(np.float32))
    errors = [quantize(proto, bits=4, group_size=size)[1].measurements[0].numbers["weight_sqnr_db"] for size in (0, 128, 32, 16)]
    assert errors == sorted(errors) and errors[-1] > errors[0] + 3


@pytest.mark.parametrize(("bits", "group_size", "share"), [(8, 0, 0.27), (4, 32, 0.17), (4, 0, 0.14), (2, 0, 0.08)])
def test_sizes(bits: int, group_size: int, share: float) -> None:
    """Of what it was, scales and zero points included."""
    proto = build("g (float[N, 256] x) => (float[] y) { [it] y = MatMul(x, w) }", w=floats(256, 128))
    model, _ = quantize(proto, bits=bits, group_size=group_size)
    before, after = qdq.quantized_weight_bytes(model)
    assert before == 4 * 256 * 128 and after <= share * before
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values()) == after and all(
        value.uses() for value in model.graph.initializers.values()
    )


REFUSED: dict[str, tuple[str, dict[str, np.ndarray], dict[str, Any], str]] = {
    "dynamic": ("t = Transpose(x) [it] y = MatMul(x, t)", {}, {}, "not a constant"),
    "vector": ("[it] y = MatMul(x, w)", {"w": floats(6)}, {}, "vector"),
    "stack": ("[it] y = MatMul(x, w)", {"w": floats(2, 6, 4)}, {}, "stack"),
    "empty": ("e = Slice(x, zero, zero, one) [it] y = MatMul(e, w)", {"w": floats(0, 4), "zero": np.array([0]), "one": np.array([1])},
              {}, "empty"),
    "double": ("d = Cast <to = 11> (x) [it] y = MatMul(d, w)", {"w": np.ones((6, 4))}, {}, "not float32"),
    "quantized": ("w = DequantizeLinear(q, s) [it] y = MatMul(x, w)", {"q": np.ones((6, 4), np.int8), "s": np.float32(2)},
                  {}, "quantized already"),
    "excluded": ("[it] y = MatMul(x, w)", {"w": floats(6, 4)}, {"exclude": ("i?",)}, "excluded by the recipe"),
    "groups": ("[it] y = MatMul(x, w)", {"w": floats(6, 4)}, {"group_size": 4, "format": "nf4"},
               "its 6 inputs are not a multiple of the group size 4"),
    "kernel": ("[it] y = Conv(x, w)", {"w": floats(4, 6, 1)}, {"group_size": 2}, "kernel positions"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case: str) -> None:
    """Nothing else is in the model: it is refused at once with the reason, or the reason is reported if that is allowed."""
    body, weights, options, reason = REFUSED[case]
    proto = build(f"g (float[{'N, 6, 9' if case == 'kernel' else 'N, 6'}] x) => (float[] y) {{ {body} }}", **weights)
    if case in ("double",):
        proto.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    with pytest.raises(TargetError, match=f"There is nothing to quantize(?s:.*){reason}"):
        quantize(proto, **options)
    model, record = quantize(proto, allow_no_effect=True, **options)
    ((where, said),) = record.skipped
    assert "'it'" in where and reason in said and not record.edits
    assert layers(model)["it"] is None or case in ("quantized", "dynamic")


def test_only_the_asked_operators() -> None:
    text = "g (float[N, 4, 1, 1] x) => (float[] y) { [conv] a = Conv(x, w) f = Flatten(a) [fc] y = Gemm(f, v) }"
    model, record = quantize(build(text, w=floats(4, 4, 1, 1), v=floats(4, 4)), op_types=("Gemm",))
    assert layers(model)["conv"] is None and layers(model)["fc"] is not None and not record.skipped


def test_a_shared_weight_is_cloned() -> None:
    """Two layers and a float reader: each layer has codes of its own, and the floats stay for the third."""
    text = """g (float[N, 8] x) => (float[] y) {
        [a] a = MatMul(x, w) t = Tanh(a) [b] b = Gemm <transB = 1> (t, w) d = ReduceSum(w) y = Add(b, d) }"""
    proto = build(text, w=floats(8, 8))
    model, _ = quantize(proto)
    first, second = layers(model).values()
    assert first is not second and first is not None and second is not None
    assert ir.attribute(first, "axis") == 1 and ir.attribute(second, "axis") == 0
    x = {"x": floats(16, 8)}
    before, after = Executor(onnx_ir.from_proto(proto)).run(x)[0], Executor(model).run(x)[0]
    assert np.abs(before - after).max() < 0.05 * np.abs(before).max()


def test_subgraphs_stay_float() -> None:
    text = """g (float[N, 4] x, bool c) => (float[] y) { [outer] a = MatMul(x, w)
        y = If(c) < then_branch = left () => (float[] p) { [inner] p = MatMul(a, w) },
                   else_branch = right () => (float[] q) { q = Neg(a) }> }"""
    model, _ = quantize(build(text, w=floats(4, 4)))
    assert layers(model)["outer"] is not None and layers(model)["inner"] is None


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_targets(target: str, bits: int) -> None:
    proto = build("g (float[N, 64] x) => (float[] y) { y = MatMul(x, w) }", w=floats(64, 8))
    if bits == 2 and target.startswith("tensorrt"):
        with pytest.raises(TargetError, match="does not take int2 weights"):
            quantize(proto, target, bits=bits)
        return
    model, _ = quantize(proto, target, bits=bits)
    assert ir.opset(model) == {2: 25, 4: 21, 8: 21}[bits]


def test_without_normalize_first() -> None:
    """A weight that a caller may override is not a constant; old operator sets are raised."""
    proto = build("g (float[N, 64] x, float[64, 8] w) => (float[] y) { [fixed] a = MatMul(x, v) [free] b = MatMul(x, w) y = Add(a, b) }",
                  opset=13, w=floats(64, 8), v=floats(64, 8))  # fmt: skip
    model, record = quantize(proto, normalize=False, bits=4)
    assert layers(model)["fixed"] is not None and layers(model)["free"] is None and ir.opset(model) == 21
    ((where, reason),) = record.skipped
    assert "'free'" in where and "not a constant" in reason


def test_old_operator_sets_are_raised_for_groups() -> None:
    proto = build("g (float[N, 64] x) => (float[] y) { [it] y = MatMul(x, w) }", opset=13, w=floats(64, 8))
    model, _ = quantize(proto, normalize=False, bits=8, group_size=16)
    assert ir.opset(model) == 21 and np.isfinite(Executor(model).run({"x": floats(2, 64)})[0]).all()


@pytest.mark.parametrize("fallback", [0, 8])
@pytest.mark.parametrize("form", ["integer", "nf4"])
def test_weights_that_cannot_be_grouped(form: str, fallback: int) -> None:
    """With a fallback they get 8 bits and one scale a channel; without one they stay float, for the reason given. Integers need no
    whole groups."""
    text = "g (float[N, 4, 3, 3] x) => (float[] y) { [conv] a = Conv(x, w) f = Flatten(a) [odd] h = Gemm(f, v) [fc] y = Gemm(h, u) }"
    proto = build(text, w=floats(8, 4, 3, 3), v=floats(8, 64), u=floats(64, 4))
    model, record = quantize(proto, bits=4, format=form, group_size=16, fallback_bits=fallback)
    kinds = {node.name: str(stored.parts(node.inputs[1])[0].dtype) for node in model.graph if node.op_type in linear.LINEAR_OPS}
    other = "INT8" if fallback else "FLOAT"
    assert kinds == {"conv": other, "odd": "INT4" if form == "integer" else other, "fc": "INT4"}
    assert len(record.skipped) == (0 if fallback else 1 + (form == "nf4"))


@pytest.mark.parametrize("shape", [(72, 24), (40, 24), (20, 24)])
@pytest.mark.parametrize("body", ["MatMul(x, w)", "Gemm <transB = 1> (x, w)"])
def test_the_last_group_may_be_smaller(body: str, shape: tuple[int, int]) -> None:
    """Both engines compute with its codes (1e-5); below one group there is one scale an output channel."""
    weight, wide = floats(*shape) * np.geomspace(1, 8, shape[0])[:, None].astype(np.float32), shape[0] >= 32
    proto = build(f"g (float[N, {shape[0]}] x) => (float[] y) {{ [it] y = {body} }}", w=weight.T if "transB" in body else weight)
    model, record = quantize(proto, bits=4, group_size=32)
    maker = layers(model)["it"]
    assert maker is not None and ("block_size" in maker.attributes) == wide
    assert ir.constant_shape(maker.inputs[1]) == ((-(-shape[0] // 32), 24) if wide else (24,))
    feeds = {"x": floats(5, shape[0])}
    made, expected = Executor(model).run(feeds)[0], ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0]
    np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())
    own = decode(model, maker.outputs[0])
    lost = 10 * np.log10(np.sum(weight**2) / np.sum((weight - own) ** 2))
    assert record.measurements[0].numbers["weight_sqnr_db"] == pytest.approx(lost, abs=1e-3) and lost > 15


@pytest.mark.parametrize("options", [{"bits": 5}, {"bits": 16}, {"group_size": -1}, {"group_size": 2000}, {"groups": 32}])
def test_wrong_options(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        QuantizeWeights(**options)


@pytest.mark.parametrize("options", [{}, {"bits": 4, "group_size": 4}])
def test_layers_that_share_a_weight_share_its_codes(options: dict[str, Any]) -> None:
    """MatMul and Gemm read the same matrix; a transposed Gemm has other channels, so it gets other codes."""
    text = """g (float[N, 8] x) => (float[N, 8] y) {
        a = MatMul(x, w) r = Relu(a) b = MatMul(r, w) s = Relu(b) c = Gemm(s, w) t = Relu(c) y = Gemm <transB = 1> (t, w) }"""
    model, _ = quantize(build(text, w=floats(8, 8)), **options)
    makers = [maker for maker in layers(model).values() if maker is not None]
    assert len(makers) == 4 and all(maker.op_type == "DequantizeLinear" for maker in makers)
    for index in (0, 1):
        assert len({maker.inputs[index] for maker in makers[:3]}) == 1 and makers[3].inputs[index] is not makers[0].inputs[index]
    integers = [value for value in model.graph.initializers.values() if value.dtype != ir.DataType.FLOAT]
    codes = [value for value in integers if len(ir.constant_shape(value)) == 2]
    assert len(codes) == (2 if not options else 4)  # groups have zero points of two dimensions


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [np.inf, -np.inf]])
def test_a_weight_that_is_not_finite_stays_float(bad: list[float]) -> None:
    weight = floats(8, 8)
    weight.reshape(-1)[: len(bad)] = bad
    text = "g (float[N, 8] x) => (float[N, 8] y) { [one] a = MatMul(x, w) [two] y = MatMul(a, v) }"
    model, record = quantize(build(text, w=floats(8, 8), v=weight))
    assert layers(model)["one"] is not None and layers(model)["two"] is None
    ((where, reason),) = record.skipped
    assert "'two'" in where and "NaN" in reason


@pytest.mark.parametrize("form", ["nf4", "fp4"])
@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("case", ["MatMul", "transB", "Conv", "ConvTranspose"])
def test_codes_of_a_table(case: str, group_size: int, form: str) -> None:
    """Both engines multiply what the report measured (1e-5); a Conv, which has no groups, gets 8-bit integers where groups are asked."""
    declared, body, shape = LAYERS[case]
    weight = floats(*shape)
    proto = build(f"g ({declared}) => (float[] y) {{ {body} }}", w=weight)
    model, record = quantize(proto, format=form, group_size=group_size, fallback_bits=8)
    node = next(node for node in model.graph if node.name == "it")
    own = decode(model, node.inputs[1])  # type: ignore[arg-type]
    (measured,) = record.measurements
    is_integer = "Conv" in case and group_size
    assert measured.numbers["bits"] == (8 if is_integer else 4) and bool(model.functions) != is_integer
    lost = 10 * np.log10(np.sum(weight**2) / np.sum((weight - own) ** 2))
    assert measured.numbers["weight_sqnr_db"] == pytest.approx(lost, abs=1e-3) and lost > 14
    feeds = {"x": floats(4, *[dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim][1:])}
    made = Executor(model).run(feeds)[0]
    if case == "ConvTranspose":  # the reference evaluator has no groups of one: the float model, with what is stored
        expected = Executor(onnx_ir.from_proto(build(f"g ({declared}) => (float[] y) {{ {body} }}", w=own))).run(feeds)[0]
    else:
        expected = ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0]
    np.testing.assert_allclose(made, expected, atol=1e-5 * np.abs(expected).max())
