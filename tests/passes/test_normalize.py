"""normalize: the same outputs from the canonical form; one case for everything it has to leave alone."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper, parser

from graphq import ir
from graphq.calibration import random_calibration
from graphq.errors import ModelError, TargetError
from graphq.models import onnx_path
from graphq.passes._normalize_math import affine, fold_bias, scale_outputs
from graphq.passes._normalize_opset import _fault
from graphq.passes.normalize import BATCH_NORM, Normalize
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.spec import ModelInput
from graphq.targets import get_target
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "normalize"
ASSETS = Path(__file__).parents[2].parent / "shared" / "assets" / "models"
RNG = np.random.default_rng(0)
Arrays = Mapping[str, np.ndarray]


def build(text: str, opset: int = 21, ir_version: int = 10, domains: str = "", **weights: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text `name (inputs) => (outputs) {...}` and weights by name."""
    proto = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{domains}]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def bn_weights(channels: int, prefix: str = "") -> dict[str, np.ndarray]:
    names = ("gamma", "beta", "mean", "var")
    return {prefix + name: floats(channels) if name != "var" else np.exp(floats(channels)) for name in names}


def make_context(model: ir.Model, target: str = "onnxruntime") -> PassContext:
    data = random_calibration([ModelInput("x", np.dtype(np.float32), (None, 1))], 1)  # normalize reads none
    return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))


def normalize(proto: onnx.ModelProto, target: str = "onnxruntime", **options: Any) -> tuple[ir.Model, PassRecord]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    ctx = make_context(model, target)
    return ctx.model, run_passes([Normalize(**options)], ctx, verify_graph)[0]


def outputs(proto: onnx.ModelProto, feeds: Arrays) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()})


def same(proto: onnx.ModelProto, feeds: Arrays, **options: Any) -> tuple[ir.Model, PassRecord]:
    """Normalize, and require equal outputs under equal names."""
    model, record = normalize(proto, **options)
    result = ir.to_proto(model)
    assert [value.name for value in result.graph.output] == [value.name for value in proto.graph.output]
    for before, after in zip(outputs(proto, feeds), outputs(result, feeds), strict=True):
        assert before.shape == after.shape and before.dtype == after.dtype
        np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(before).max(initial=0))))
    return model, record


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def reasons(record: PassRecord) -> str:
    return "; ".join(reason for _, reason in record.skipped)


def dump(model: ir.Model) -> str:
    """The graph as lines: one an input, a weight (type, shape, sum), a node and an output."""

    def line(value: ir.Value) -> str:
        dims = ir.shape_of(value)
        return f"{value.name}: {value.dtype}{'?' if dims is None else list(dims)}"

    rows = [f"opset {ir.opset(model)}, IR {model.ir_version}"]
    rows += [f"input {line(value)}" for value in model.graph.inputs]
    for value in sorted(model.graph.initializers.values(), key=lambda value: value.name or ""):
        array = ir.constant(value)
        assert array is not None
        rows.append(f"weight {line(value)} sum {float(np.sum(array)):.4g}")
    for node in model.graph:
        attributes = "".join(f" {key}={entry.value}" for key, entry in sorted(node.attributes.items()))
        read = ", ".join("-" if value is None else value.name or "?" for value in node.inputs)
        rows.append(f"[{node.name}] {', '.join(map(line, node.outputs))} = {node.op_type}({read}){attributes}")
    rows += [f"output {line(value)}" for value in model.graph.outputs]
    return "\n".join(rows) + "\n"


@pytest.mark.parametrize("case", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_golden(case: str) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = normalize(parser.parse_model(before))
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- names, constants, dead nodes -----------------------------------------------------------------------------------


def test_golden_cases_exist() -> None:
    assert len(list(GOLDEN.glob("*.txt"))) >= 3


def test_names_are_unique_over_all_graphs_and_the_interface_keeps_its_own() -> None:
    proto = build(
        """g (float[N,4] x, bool c) => (float[N,4] y, float[N,4] b) {
            a = Neg(x) b = Abs(a)
            y = If (c) <then_branch = one () => (float[N,4] t) { s = Relu(a) t = Mul(s, x) },
                        else_branch = two () => (float[N,4] t) { s = Neg(a) t = Add(s, b) }>
        }"""
    )
    for graph in [proto.graph, *(entry.g for entry in proto.graph.node[2].attribute)]:
        for index, node in enumerate(graph.node):
            node.name = f"node_{index}"
    for flag in (True, False):
        model, _ = same(proto, {"x": floats(2, 4), "c": np.array(flag)})
    nodes = list(model.graph.all_nodes())
    values = [value.name for node in nodes for value in node.outputs]
    assert len({node.name for node in nodes}) == len(nodes) == 7 and all(node.name for node in nodes)
    assert len(set(values)) == len(values)
    assert [value.name for value in (*model.graph.inputs, *model.graph.outputs)] == ["x", "c", "y", "b"]


def test_nameless_nodes_are_called_after_their_output() -> None:
    model, _ = same(build("g (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"), {"x": floats(2)})
    assert [node.name for node in model.graph] == ["h", "y"]


def test_a_name_given_to_a_node_is_not_given_again_by_the_editor() -> None:
    model = onnx_ir.from_proto(build("g (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"))
    for node in model.graph:
        node.name = "n"
    ctx = make_context(model)
    Normalize().apply(model, ctx)
    assert [node.name for node in model.graph] == ["n", "n_1"]
    assert ctx.edit.unique("n") == "n_2"


def test_a_canonical_model_is_left_alone_and_that_is_fine() -> None:
    proto = build("g (float[2,3] x) => (float[2,4] y) { [n] y = MatMul(x, w) }", w=floats(3, 4))
    first, _ = normalize(proto)
    _, record = normalize(ir.to_proto(first))
    assert record.edits == {}


def test_initializers_listed_as_inputs_become_constants() -> None:
    proto = build("g (float[N,3] x, float[3,4] w, float[4] b) => (float[N,4] y) { y = Gemm(x, w, b) }", ir_version=3, opset=9,
                  w=floats(3, 4), b=floats(4))  # fmt: skip
    x = floats(2, 3)
    feeds = {"x": x} | {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    model, _ = same(proto, feeds)
    assert [value.name for value in model.graph.inputs] == ["x"] and model.ir_version == 10
    assert ir.constant(model.graph.node(0).inputs[1]) is not None


@pytest.mark.parametrize("attribute", ["value_float = 2.0", "value = float {2.0}", "value_floats = [2.0, 3.0]"])
def test_constants_become_initializers(attribute: str) -> None:
    model, _ = same(build(f"g (float[2] x) => (float[2] y) {{ c = Constant <{attribute}> () y = Mul(x, c) }}"), {"x": floats(2)})
    assert ops(model) == ["Mul"] and "c" in model.graph.initializers


def test_a_returned_constant_stays_a_node() -> None:
    model, _ = same(build("g (float[2] x) => (float[1] c, float[2] y) { c = Constant <value_floats = [2.0]> () y = Mul(x, c) }"),
                    {"x": floats(2)})  # fmt: skip
    assert ops(model) == ["Constant", "Mul"]


def test_constants_in_subgraphs_are_lifted_too() -> None:
    proto = build(
        """g (float[N,4] x, bool c) => (float[N,4] y) {
            y = If (c) <then_branch = one () => (float[N,4] t) { k = Constant <value_float = 2.0> () t = Mul(x, k) },
                        else_branch = two () => (float[N,4] t) { k = Constant <value_float = 3.0> () t = Mul(x, k) }>
        }"""
    )
    for flag in (True, False):
        model, _ = same(proto, {"x": floats(2, 4), "c": np.array(flag)})
    assert "Constant" not in ops(model)


def test_identity_and_idle_dropout_go() -> None:
    proto = build("""g (float[2] x) => (float[2] y, float[2] z) {
        a = Identity(x) b = Relu(a) c = Dropout(b) d = Identity(c) e = Neg(d) y = Identity(e) z = Abs(d) }""")
    model, _ = same(proto, {"x": floats(2)})
    assert ops(model) == ["Relu", "Neg", "Abs"]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("g (float[2] x) => (float[2] y) { y = Identity(x) }", "an input that is returned"),
        ("g (float[2] x) => (float[2] y, float[2] z) { y = Relu(x) z = Identity(y) }", "a second name of an output"),
        ("g (float[2] x) => (float[2] y, bool[2] m) { h, m = Dropout(x) y = Relu(h) }", "a mask that is read"),
    ],
)
def test_identities_that_give_a_name_stay(text: str, kept: str) -> None:
    model, _ = same(build(text), {"x": floats(2)})
    assert {"Identity", "Dropout"} & set(ops(model)), kept


def test_identity_of_an_outer_value_stays_in_a_branch() -> None:
    proto = build(
        """g (float[2] x, bool c) => (float[2] y, float[2] a) {
            a = Neg(x)
            y = If (c) <then_branch = one () => (float[2] t) { t = Identity(a) }, else_branch = two () => (float[2] u) { u = Relu(a) }>
        }"""
    )
    for flag in (True, False):
        same(proto, {"x": floats(2), "c": np.array(flag)})


def test_training_dropout_stays() -> None:
    proto = build("g (float[2] x) => (float[2] y) { y = Dropout(x, ratio, mode) }", ratio=np.float32(0), mode=np.array(True))
    model, _ = same(proto, {"x": floats(2)})
    assert ops(model) == ["Dropout"]


def test_dead_branches_go_with_what_only_they_read() -> None:
    proto = build(
        """g (float[2] x, bool c) => (float[2] y) {
            y = Relu(x) a = Neg(x) b = Mul(a, w)
            d = If (c) <then_branch = one () => (float[2] t) { t = Neg(b) }, else_branch = two () => (float[2] u) { u = Abs(b) }>
        }""",
        w=floats(2),
    )
    model, _ = same(proto, {"x": floats(2), "c": np.array(True)})
    assert ops(model) == ["Relu"] and not model.graph.initializers


def test_optional_inputs_that_are_left_out_stay_so() -> None:
    proto = build('g (float[1,1,4] x) => (float[1,1,2] y) { y = Clip(h, "", high) h = MatMul(x, w) }', w=floats(4, 2), high=np.float32(0.5))
    proto.graph.node.insert(0, proto.graph.node.pop(1))
    model, _ = same(proto, {"x": floats(1, 1, 4)})
    assert [value and value.name for value in list(model.graph)[1].inputs] == ["h", None, "high"]


def test_functions_are_inlined() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N,3] x) => (float[N,4] y) { h = local.dense(x, w) y = Relu(h) }
        <domain: "local", opset_import: ["" : 21]> dense (a, b) => (c) { d = Identity(b) c = MatMul(a, d) }"""
    proto = parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(floats(3, 4), "w"))
    model, _ = same(proto, {"x": floats(2, 3)})
    assert ops(model) == ["MatMul", "Relu"] and not model.functions


def test_a_function_that_cannot_be_inlined_is_refused() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N,3] x) => (float[N,3] y) { y = local.twice(x) }
        <domain: "local", opset_import: ["" : 18]> twice (a) => (c) { c = Add(a, a) }"""
    with pytest.raises(ModelError, match="cannot be inlined: Opset mismatch") as caught:
        normalize(parser.parse_model(text))
    assert caught.value.hint


def test_emitted_functions_of_graphq_stay() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "graphq" : 1]>
        g (float[N,3] x) => (float[N,3] y) { y = graphq.twice(x) }
        <domain: "graphq", opset_import: ["" : 21]> twice (a) => (c) { c = Add(a, a) }"""
    model, _ = same(parser.parse_model(text), {"x": floats(2, 3)})
    assert ops(model) == ["twice"] and len(model.functions) == 1


# ---- constant folding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weight"),
    [
        ("t = Transpose <perm = [1, 0]> (w)", floats(4, 3)),
        ("t = Cast <to = 1> (w)", floats(3, 4).astype(np.float16)),
        ("t = Reshape(w, s)", floats(12)),
        ("u = Reshape(w, s) v = Neg(u) t = Add(v, v)", floats(12)),
    ],
)
def test_weights_behind_layout_operators_become_constants(text: str, weight: np.ndarray) -> None:
    proto = build(f"g (float[N,3] x) => (float[N,4] y) {{ {text} y = MatMul(x, t) }}", w=weight, s=np.array([3, 4]))
    model, _ = same(proto, {"x": floats(2, 3)}, fold_limit=0)
    assert ops(model) == ["MatMul"] and list(model.graph.initializers) == ["t"]


def test_several_outputs_are_folded() -> None:
    proto = build(
        """g (float[N,3] x) => (float[N,2] y) {
            a, b = Split <axis = 1, num_outputs = 2> (w) c = MatMul(x, a) d = MatMul(x, b) y = Add(c, d) }""",
        w=floats(3, 4),
    )
    assert ops(same(proto, {"x": floats(2, 3)})[0]) == ["MatMul", "MatMul", "Add"]


def test_shape_computations_keep_dynamic_dimensions() -> None:
    proto = build(
        """g (float[N,3,4] x) => (float[N,M] y) {
            s = Shape(x) zero = Constant <value = int64 {0}> () axes = Constant <value = int64[1] {0}> ()
            n = Gather(s, zero) m = Unsqueeze(n, axes) rest = Constant <value = int64[1] {-1}> () t = Concat <axis = 0> (m, rest)
            y = Reshape(x, t) }"""
    )
    for count in (1, 5):
        model, _ = same(proto, {"x": floats(count, 3, 4)})
    assert ops(model) == ["Shape", "Gather", "Unsqueeze", "Concat", "Reshape"]


@pytest.mark.parametrize(
    ("text", "weights", "kept"),
    [
        ("w = DequantizeLinear(q, s)", {"q": np.ones((3, 4), np.int8), "s": np.float32(0.5)}, "DequantizeLinear"),
        ("q = QuantizeLinear(f, s) w = DequantizeLinear(q, s)", {"f": floats(3, 4), "s": np.float32(0.5)}, "QuantizeLinear"),
        ("w = ConstantOfShape(s)", {"s": np.array([3000, 4000])}, "ConstantOfShape"),
        ("h = Add(p, p) w = Cast <to = 1> (h)", {"p": floats(3, 4).astype(np.float16)}, "Add"),
    ],
)
def test_what_must_not_be_folded(text: str, weights: dict[str, np.ndarray], kept: str) -> None:
    rows = 3000 if kept == "ConstantOfShape" else 3
    model, _ = same(build(f"g (float[N,{rows}] x) => (float[N,M] y) {{ {text} y = MatMul(x, w) }}", **weights), {"x": floats(1, rows)})
    assert kept in ops(model)


def test_random_nodes_are_not_folded() -> None:
    model, _ = normalize(build("g (float[4] x) => (float[4] y) { r = RandomNormalLike(w) y = Add(x, r) }", w=floats(4)))
    assert ops(model) == ["RandomNormalLike", "Add"]


def test_control_flow_is_not_folded() -> None:
    proto = build(
        """g (float[2] x) => (float[2] y) {
            y = If (c) <then_branch = one () => (float[2] t) { t = Neg(x) }, else_branch = two () => (float[2] u) { u = Abs(x) }> }""",
        c=np.array(True),
    )
    assert "If" in ops(same(proto, {"x": floats(2)})[0])


def test_external_weights_stay_in_their_file(tmp_path: Path) -> None:
    text = "g (float[N,64] x) => (float[N,64] y) { h = MatMul(x, w) y = MatMul(h, v) }"
    proto = build(text, opset=17, w=floats(64, 64), v=floats(64, 64))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    model = ir.load(tmp_path / "m.onnx")
    Normalize().apply(model, make_context(model))
    assert all(isinstance(value.const_value, onnx_ir.ExternalTensor) for value in model.graph.initializers.values())


# ---- BatchNormalization ---------------------------------------------------------------------------------------------

HOSTS = {
    "conv": ("Conv <group = 2> (x, w)", floats(6, 2, 3, 3), floats(2, 4, 8, 8)),
    "conv_bias": ("Conv(x, w, b)", floats(6, 4, 3, 3), floats(2, 4, 8, 8)),
    "depthwise_1d": ("Conv <group = 6> (x, w)", floats(6, 1, 3), floats(2, 6, 8)),
    "transpose": ("ConvTranspose <strides = [2, 2]> (x, w, b)", floats(4, 6, 2, 2), floats(2, 4, 5, 5)),
    "transpose_groups": ("ConvTranspose <group = 2> (x, w)", floats(4, 3, 2, 2), floats(2, 4, 5, 5)),
    "gemm": ("Gemm <transB = 1> (x, w, b)", floats(6, 4), floats(3, 4)),
    "gemm_scaled": ("Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", floats(4, 6), floats(3, 4)),
    "gemm_no_bias": ("Gemm(x, w)", floats(4, 6), floats(3, 4)),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("opset", [13, 21])
def test_batch_norm_is_folded(host: str, opset: int) -> None:
    call, weight, x = HOSTS[host]
    dims = ",".join("N" if axis == 0 else str(size) for axis, size in enumerate(x.shape))
    rank = ",".join("N" for _ in x.shape)
    norm = bn_weights(6)
    norm_call = "BatchNormalization <epsilon = 0.01> (h, gamma, beta, mean, var)"
    text = f"g (float[{dims}] x) => (float[{rank}] y) {{ h = {call} n = {norm_call} y = Relu(n) }}"
    bias = {"b": floats(6)} if "b)" in call else {}
    model, record = same(build(text, opset, w=weight, **bias, **norm), {"x": x})
    assert "BatchNormalization" not in ops(model) and not record.skipped
    kept = next(iter(model.graph)).meta[BATCH_NORM]
    assert kept["epsilon"] == pytest.approx(0.01)
    for name, array in norm.items():
        np.testing.assert_array_equal(kept[name], array)
    assert next(iter(ir.clone(model).graph)).meta[BATCH_NORM] is kept


def test_fold_with_scalar_and_matrix_bias() -> None:
    for bias in (np.float32(0.7), floats(1, 6), floats(3, 1), floats(3, 6)):
        text = "g (float[3,4] x) => (float[3,6] y) { h = Gemm(x, w, b) y = BatchNormalization(h, gamma, beta, mean, var) }"
        model, _ = same(build(text, w=floats(4, 6), b=np.asarray(bias), **bn_weights(6)), {"x": floats(3, 4)})
        assert ops(model) == ["Gemm"]


def test_a_shared_weight_is_not_changed_for_the_other_reader() -> None:
    text = """g (float[1,4,5,5] x) => (float[1,6,5,5] y) {
        a = Conv(x, w, b) p = BatchNormalization(a, gamma, beta, mean, var) c = Conv(x, w, b) y = Add(p, c) }"""
    model, _ = same(build(text, w=floats(6, 4, 1, 1), b=floats(6), **bn_weights(6)), {"x": floats(1, 4, 5, 5)})
    assert ops(model) == ["Conv", "Conv", "Add"] and len(model.graph.initializers) == 4


NORM = "y = BatchNormalization(h, gamma, beta, mean, var)"
IMAGE = "float[1,4,5,5]"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"({IMAGE} x) => ({IMAGE} y, {IMAGE} z) {{ h = Conv(x, w) {NORM} z = Relu(h) }}", "read in 2 places"),
        (f"({IMAGE} x) => ({IMAGE} y, {IMAGE} h) {{ h = Conv(x, w) {NORM} }}", "read in 2 places"),
        (f"({IMAGE} h) => ({IMAGE} y) {{ {NORM} }}", "follows an input"),
        (f"({IMAGE} x) => ({IMAGE} y) {{ h = Relu(x) {NORM} }}", "follows Relu"),
        (f"({IMAGE} x, float[4] gamma) => ({IMAGE} y) {{ h = Conv(x, w) {NORM} }}", "parameters"),
        (f"({IMAGE} x, float[4,4,1,1] v) => ({IMAGE} y) {{ h = Conv(x, v) {NORM} }}", "weight is not a constant"),
        (f"({IMAGE} x, float[4] b) => ({IMAGE} y) {{ h = Conv(x, w, b) {NORM} }}", "the bias of Conv"),
        (f"(float[2,4] x) => (float[2,4] y) {{ h = Gemm <beta = 0.0> (x, m, mean) {NORM} }}", "beta 0"),
        (f"({IMAGE} x) => ({IMAGE} y) {{ d = DequantizeLinear(q, s) h = Conv(x, d) {NORM} }}", "weight is not a constant"),
    ],
)  # fmt: skip
def test_batch_norm_that_stays(text: str, reason: str) -> None:
    weights = bn_weights(4) | {"w": floats(4, 4, 1, 1), "m": floats(4, 4), "q": np.ones((4, 4, 1, 1), np.int8), "s": np.float32(0.1)}
    proto = build(f"g {text}")
    read = {name for node in proto.graph.node for name in node.input} - {entry.name for entry in proto.graph.input}
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(weights[name]), name) for name in weights if name in read)
    feeds = {entry.name: floats(*(dim.dim_value for dim in entry.type.tensor_type.shape.dim)) for entry in proto.graph.input}
    model, record = same(proto, feeds)
    assert "BatchNormalization" in ops(model) and reason in reasons(record)


def test_batch_norm_in_a_branch_is_not_folded_into_the_outer_graph() -> None:
    proto = build(
        """g (float[1,4,5,5] x, bool c) => (float[1,4,5,5] y) {
            h = Conv(x, w)
            y = If (c) <then_branch = one () => (float[1,4,5,5] t) { t = BatchNormalization(h, gamma, beta, mean, var) },
                        else_branch = two () => (float[1,4,5,5] u) { k = Conv(x, w) u = BatchNormalization(k, gamma, beta, mean, var) }>
        }""",
        w=floats(4, 4, 1, 1), **bn_weights(4),
    )  # fmt: skip
    for flag in (True, False):
        model, record = same(proto, {"x": floats(1, 4, 5, 5), "c": np.array(flag)})
    assert ops(model).count("BatchNormalization") == 1 and "another graph" in reasons(record)


def test_training_batch_norm_stays() -> None:
    text = """g (float[2,4,5,5] x) => (float[2,4,5,5] y) {
        h = Conv(x, w) y, m, v = BatchNormalization <training_mode = 1> (h, gamma, beta, mean, var) }"""
    model, record = normalize(build(text, w=floats(4, 4, 1, 1), **bn_weights(4)))
    assert "BatchNormalization" in ops(model) and "training mode" in reasons(record)


@pytest.mark.parametrize("groups", [1, 2])
def test_folding_math_against_the_definition(groups: int) -> None:
    """y = W x + b on matrices; then the textbook formula of BatchNormalization."""
    weight, bias, x = RNG.standard_normal((4, 6 // groups)), RNG.standard_normal(6), RNG.standard_normal((4, 10))
    gamma, beta, mean, var = (np.abs(RNG.standard_normal(6)) + 0.1 for _ in range(4))
    factor, offset = affine(gamma, beta, mean, var, 1e-3)

    def run(matrix: np.ndarray, shift: np.ndarray) -> np.ndarray:
        parts = [part.T @ rows for part, rows in zip(np.split(matrix, groups), np.split(x, groups), strict=True)]
        return np.concatenate(parts) + shift[:, None]

    expected = (run(weight, bias) - mean[:, None]) / np.sqrt(var + 1e-3)[:, None] * gamma[:, None] + beta[:, None]
    np.testing.assert_allclose(run(scale_outputs(weight, factor, 1, groups), fold_bias(bias, factor, offset)), expected, rtol=1e-12)


# ---- operator set and shapes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("opset", [7, 11, 13, 17, 18, 20])
def test_the_operator_set_is_raised(opset: int) -> None:
    call = "ReduceMean <axes = [1], keepdims = 0> (s)" if opset < 18 else "ReduceMean <keepdims = 0> (s, axes)"
    weights = {"w": floats(4, 5)} | ({} if opset < 18 else {"axes": np.array([1])})
    proto = build(f"g (float[N,4] x) => (float[N] y) {{ h = MatMul(x, w) s = Softmax <axis = 1> (h) y = {call} }}", opset, 7, **weights)
    model, _ = same(proto, {"x": floats(3, 4)})
    assert ir.opset(model) == 21 and model.ir_version == 10


@pytest.mark.parametrize("opset", [12, 17])
def test_branches_are_raised_too(opset: int) -> None:
    proto = build(
        """g (float[2,4] x, bool c) => (float[4] y) {
            a = Neg(x)
            y = If (c) <then_branch = one () => (float[4] t) { t = ReduceMean <axes = [0], keepdims = 0> (a) },
                        else_branch = two () => (float[4] u) { u = ReduceMax <axes = [0], keepdims = 0> (a) }>
        }""",
        opset,
    )
    for flag in (True, False):
        model, _ = same(proto, {"x": floats(2, 4), "c": np.array(flag)})
    assert ir.opset(model) == 21 and all("axes" not in node.attributes for node in model.graph.all_nodes())


@pytest.mark.parametrize(
    ("op", "inputs", "attributes", "fault"),
    [
        ("ReduceMean", 1, {"axes": [0]}, "no attribute 'axes'"),
        ("Upsample", 2, {}, "does not exist"),
        ("Nonsense", 1, {}, "does not exist"),
        ("Relu", 2, {}, "does not take 2 inputs"),
        ("Concat", 9, {"axis": 0}, None),
    ],
)
def test_what_a_converter_left_behind_is_found(op: str, inputs: int, attributes: dict[str, Any], fault: str | None) -> None:
    node = ir.make_node(op, [ir.Value(name=f"x{index}") for index in range(inputs)], ["y"], attributes=attributes)
    found = _fault(node, 21)
    assert found is None if fault is None else found is not None and fault in found


def test_a_newer_model_keeps_its_operator_set() -> None:
    model, _ = same(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", 23, 11), {"x": floats(2)})
    assert (ir.opset(model), model.ir_version) == (23, 11)


def test_the_format_is_not_newer_than_the_target_loads() -> None:
    model, _ = normalize(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", 21, 13), target="tensorrt-rtx")
    assert model.ir_version == 11


def test_an_operator_set_above_the_target_is_refused() -> None:
    model = onnx_ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", 26, 13))
    with pytest.raises(TargetError, match="opset 26") as caught:
        Normalize().precheck(model, get_target("tensorrt-rtx"))
    assert "opset_version=24" in caught.value.hint
    Normalize().precheck(model, get_target("onnxruntime"))


@pytest.mark.parametrize(
    ("text", "opset", "op"),
    [
        ("g (float[1,4,5,5] x) => (float[1,4,5,5] y) { y = GroupNormalization <num_groups = 2> (x, s, s) }", 18, ""),
        ("g (float[1,C,5,5] x) => (float[1,C,5,5] y) { y = GroupNormalization <num_groups = 2> (x, s, s) }", 18, "GroupNormalization"),
    ],
)
def test_group_normalization_is_converted_or_refused(text: str, opset: int, op: str) -> None:
    proto = build(text, opset, 8, s=floats(2))
    if not op:
        same(proto, {"x": floats(1, 4, 5, 5)})
        return
    with pytest.raises(ModelError, match=op) as caught:
        normalize(proto)
    assert caught.value.where.startswith(op) and "opset_version=21" in caught.value.hint


def test_an_operator_that_no_converter_knows_is_refused_by_name(caplog: pytest.LogCaptureFixture) -> None:
    text = """g (float[1,2,4,4] x) => (float[1,2,8,8] y) {
        h = Relu(x) y = Upsample <mode = "nearest", width_scale = 2.0, height_scale = 2.0> (h) }"""
    proto = build(text, 1, 3)
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="opset 1 to 21"):
        normalize(proto)
    assert not caplog.records


def test_scan_of_opset_8_is_refused() -> None:
    body = parser.parse_graph("b (float[2] s, float[2] v) => (float[2] t, float[2] o) { t = Add(s, v) o = Identity(t) }")
    node = helper.make_node("Scan", ["", "s0", "x"], ["y", "z"], body=body, num_scan_inputs=1)
    proto = build("g (float[1,2] s0, float[1,3,2] x) => (float[1,2] y, float[1,3,2] z) { y = Relu(s0) z = Relu(x) }", 8, 3)
    del proto.graph.node[:]
    proto.graph.node.append(node)
    with pytest.raises(ModelError, match="Scan has a batch axis"):
        normalize(proto)


def test_shapes_and_types_are_inferred() -> None:
    model, _ = same(build("g (float[N,4] x) => (float[N,6] y) { h = MatMul(x, w) y = Relu(h) }", w=floats(4, 6)), {"x": floats(2, 4)})
    value = model.graph.node(0).outputs[0]
    assert ir.shape_of(value) == ("N", 6) and value.dtype == ir.DataType.FLOAT


def test_a_failing_inference_is_noted_and_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("inference is broken")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    _, record = normalize(build("g (float[N,4] x) => (float[N,6] y) { h = MatMul(x, w) y = Relu(h) }", w=floats(4, 6)))
    assert "inference is broken" in reasons(record)


def test_quantized_models_are_left_alone() -> None:
    proto = build(
        """g (float[N,4] x) => (float[N,3] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, z) h = MatMul(d, v) y = Relu(h) }""",
        s=np.float32(0.1), z=np.int8(0), w=np.arange(12, dtype=np.int8).reshape(4, 3),
    )  # fmt: skip
    model, _ = same(proto, {"x": floats(2, 4)})
    assert ops(model) == [node.op_type for node in proto.graph.node]


def test_operators_of_other_domains_stay_when_the_operator_set_is_raised() -> None:
    proto = build("g (float[2,4] x) => (float[2,4] y) { h = com.microsoft.Gelu(x) y = Relu(h) }", 17, 8, ', "com.microsoft" : 1')
    model, _ = same(proto, {"x": floats(2, 4)})
    assert ops(model) == ["Gelu", "Relu"] and ir.opset(model) == 21


MODELS = [onnx_path("digits_cnn"), onnx_path("digits_vit"), *sorted(ASSETS.glob("*.onnx"))]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_real_models(path: Path) -> None:
    proto = onnx.load(path)
    feeds = next(random_calibration(ir.inputs(ir.load(path)), 2).batches(2))
    if path.stem in ("imdn_x2", "espcn_x3"):  # any size will do
        feeds = {name: array[..., :32, :32] for name, array in feeds.items()}
    model, record = same(proto, feeds)
    assert ir.opset(model) == 21 and "BatchNormalization" not in ops(model) and not record.skipped


def test_targets_may_ask_for_a_higher_operator_set() -> None:
    model = onnx_ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    ctx = make_context(model)
    ctx.target = replace(ctx.target, minimum_opset=25)
    Normalize().apply(model, ctx)
    assert (ir.opset(model), model.ir_version) == (25, 13)
