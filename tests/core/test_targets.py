"""Targets: each fact of the tables, and those of DESIGN.md 6 that ONNX Runtime can be asked about, by running it."""

from __future__ import annotations

from dataclasses import replace

import ml_dtypes
import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from graphq import ir, kernels_used, qdq
from graphq.editor import Editor
from graphq.errors import GraphqError, ModelError, TargetError
from graphq.executor import ORT_IR, ORT_OPSET, Executor
from graphq.quantizers import QParams, Uniform
from graphq.spec import PerAxis, PerTensor, QuantSpec
from graphq.targets import TARGETS, Target, get_target, require_legal, violations

RNG = np.random.default_rng(0)
EVERY = pytest.mark.parametrize("target", TARGETS.values(), ids=list(TARGETS))


def dequantized(storage: str, zero: int = 0, opset: int = 21, ir_version: int = 10) -> ir.Model:
    """A constant behind a DequantizeLinear, and a QDQ pair of the same type on the input."""
    model = ir.from_onnx_text(
        f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\nm (float[n, 4] x) => (float[n, 4] y) {{ y = Neg(x) }}'
    )
    edit, anchor = Editor(model), model.graph[0]
    scale, point = edit.initializer("s", np.float32(0.5)), edit.initializer("z", np.asarray(zero), storage)
    weight = edit.insert(anchor, "DequantizeLinear", [edit.initializer("q", np.ones((1, 4)), storage), scale, point], output="w")
    edit.rewire(anchor, 0, edit.insert(anchor, "Add", [model.graph.inputs[0], weight], output="sum"))
    return model


def rules(model: ir.Model, target: Target) -> list[str]:
    return [rule for _, rule in violations(model, target)]


# ---- tables ---------------------------------------------------------------------------------------------------------


@EVERY
def test_formats_hold_together(target: Target) -> None:
    assert target.name in TARGETS and TARGETS[target.name] is target and target.about
    for spec in (target.activation, target.weight):
        assert spec.storage in target.storage
        assert spec.opset <= target.minimum_opset <= target.opset
        assert spec.symmetric or not target.symmetric_only
        assert not target.symmetric_only or spec.signed  # an unsigned symmetric format has a zero point of 128
    assert isinstance(target.activation.granularity, PerTensor) and isinstance(target.weight.granularity, PerAxis)
    assert target.opset <= ir.MAX_OPSET and "int32" in target.storage or not target.bias_int32


@EVERY
def test_rules_are_of_operators_that_exist(target: Target) -> None:
    for op in {*target.ops, *target.fused_activations}:
        assert onnx.defs.has(op, max_inclusive_version=target.opset), op
    assert {op for op, rule in target.ops.items() if rule.anchor} == {"Conv", "Gemm", "MatMul"}
    assert not target.fused_activations & set(target.ops)
    assert all(rule.quantized_output for rule in target.ops.values() if rule.shared_scale)


def test_unknown_targets() -> None:
    with pytest.raises(TargetError, match="(?s)onnxruntime.*did you mean 'tensorrt'"):
        get_target("tensort")


# ---- violations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "zero", "legal"), [
    ("onnxruntime", 0, True), ("onnxruntime", 3, True), ("generic", 3, True),
    ("tensorrt", 0, True), ("tensorrt", 3, False), ("tensorrt-rtx", 0, True), ("tensorrt-rtx", -1, False),
])  # fmt: skip
def test_zero_points(name: str, zero: int, legal: bool) -> None:
    found = rules(dequantized("int8", zero), get_target(name))
    assert found == ([] if legal else [f"{name} refuses zero points other than 0"])


@pytest.mark.parametrize(("name", "storage", "legal"), [
    ("onnxruntime", "uint8", True), ("onnxruntime", "int4", True), ("onnxruntime", "uint4", True), ("onnxruntime", "int2", True),
    ("onnxruntime", "int32", True), ("onnxruntime", "int16", True), ("onnxruntime", "uint16", True), ("generic", "int16", True),
    ("generic", "uint16", True), ("generic", "uint2", True), ("generic", "int32", True), ("tensorrt", "int16", False),
    ("tensorrt", "int8", True), ("tensorrt", "int4", True), ("tensorrt", "uint8", False), ("tensorrt", "uint4", False),
    ("tensorrt", "int32", False), ("tensorrt-rtx", "int32", False), ("tensorrt-rtx", "uint8", False), ("tensorrt-rtx", "int2", False),
])  # fmt: skip
def test_storage_types(name: str, storage: str, legal: bool) -> None:
    assert rules(dequantized(storage), get_target(name)) == ([] if legal else [f"{name} does not take {storage} in DequantizeLinear"])


def test_quantize_linear_counts_as_well() -> None:
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>\nm (float[n, 4] x) => (float[n, 4] y) { y = Neg(x) }')
    spec = QuantSpec(8, signed=False, symmetric=False)
    qdq.insert_pair(Editor(model), model.graph.inputs[0], QParams(np.float32(1), np.int32(7)), spec, [(model.graph[0], 0)])
    zero = "tensorrt refuses zero points other than 0"
    both = [[f"tensorrt does not take uint8 in {op}", zero] for op in ("QuantizeLinear", "DequantizeLinear")]
    assert rules(model, get_target("tensorrt")) == both[0] + both[1]
    assert rules(model, get_target("onnxruntime")) == []


@pytest.mark.parametrize("name", ["onnxruntime", "generic", "tensorrt"])
@pytest.mark.parametrize("storage", ["int16", "uint16"])
def test_models_quantized_to_16_bits(storage: str, name: str) -> None:
    """As other tools write them: activations of 16 bits, weights of 8."""
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
m (float[n, 2] x) => (float[n, 2] y)
<float s = {{0.001}}, {storage} z = {{0}}, int8[2, 2] w = {{10, 20, 30, -40}}, float t = {{0.1}}, int8 o = {{0}}>
{{ q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, t, o) y = MatMul(d, v) }}""")
    model = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(ir.to_proto(model)))
    if name == "tensorrt":
        with pytest.raises(TargetError, match=f"does not take {storage}"):
            require_legal(model, get_target(name))
        return
    require_legal(model, get_target(name))
    np.testing.assert_allclose(Executor(model).run({"x": np.float32([[1, 2]])})[0], [[7, -6]], rtol=1e-3)


@EVERY
def test_opset(target: Target) -> None:
    model = dequantized("int8", opset=target.opset)
    assert rules(model, target) == []
    model.opset_imports[""] = target.opset + 1
    assert rules(model, target) == [f"opset {target.opset + 1} is newer than {target.opset}"]


def test_what_is_refused_is_named() -> None:
    model = dequantized("uint8", 128)
    with pytest.raises(TargetError, match="(?s)tensorrt cannot run.*DequantizeLinear.*does not take uint8.*refuses zero points"):
        require_legal(model, get_target("tensorrt"))
    require_legal(model, get_target("onnxruntime"))


def test_violations_inside_branches_and_functions_are_found() -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
m (float[n, 2] x, bool c) => (float[n, 2] y)
<int8 q = {1}, float s = {1}, int8 z = {1}>
{
   a = If(c) <then_branch = l () => (float p) { p = DequantizeLinear(q, s, z) },
              else_branch = r () => (float r) { r = DequantizeLinear(q, s) }>
   b = Add(a, x)
   y = local.Twice(b)
}
<domain: "local", opset_import: ["" : 21]>
Twice (v) => (w) {
   s = Constant <value = float {1}> ()
   z = Constant <value = int8 {2}> ()
   q = QuantizeLinear(v, s, z)
   w = DequantizeLinear(q, s, z)
}"""
    assert len(rules(ir.from_onnx_text(text), get_target("tensorrt"))) == 3


# ---- what ONNX Runtime loads ----------------------------------------------------------------------------------------


def relu(opset: int, ir_version: int) -> ir.Model:
    return ir.from_onnx_text(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\nm (float[n] x) => (float[n] y) {{ y = Relu(x) }}')


def test_the_newest_opset_and_file_format_load() -> None:
    target = get_target("onnxruntime")
    assert (target.opset, target.ir_version) == (ORT_OPSET, ORT_IR)
    assert Executor(relu(target.opset, target.ir_version)).run({"x": np.float32([-1, 2])})[0].tolist() == [0, 2]


@pytest.mark.skipif(not onnxruntime.__version__.startswith("1.31"), reason="a fact about ONNX Runtime 1.31")
@pytest.mark.parametrize(("opset", "version"), [(ORT_OPSET + 1, ORT_IR), (ORT_OPSET, ORT_IR + 1)])
def test_newer_ones_are_refused(opset: int, version: int) -> None:
    with pytest.raises(ModelError, match=f"(?s)cannot load the model.*opset {ORT_OPSET}, IR {ORT_IR} at most"):
        Executor(relu(opset, version))


@pytest.mark.parametrize(
    ("storage", "opset"),
    [("int8", 21), ("uint8", 21), ("int16", 21), ("uint16", 21), ("int4", 21), ("uint4", 21), ("int2", 25), ("uint2", 25), ("int32", 21)],
)
def test_stored_types_load(storage: str, opset: int) -> None:
    assert storage in get_target("onnxruntime").storage
    x = RNG.standard_normal((2, 4)).astype(np.float32)
    found = Executor(dequantized(storage, opset=opset, ir_version=13)).run({"x": x})[0]
    np.testing.assert_array_equal(found, -(x + np.float32(0.5)))


@pytest.mark.parametrize(("kind", "works"), [("FLOAT8E4M3FN", True), ("FLOAT8E5M2", True), ("FLOAT4E2M1", False)])
def test_narrow_floats(kind: str, works: bool) -> None:
    dtype = {"FLOAT8E4M3FN": ml_dtypes.float8_e4m3fn, "FLOAT8E5M2": ml_dtypes.float8_e5m2, "FLOAT4E2M1": ml_dtypes.float4_e2m1fn}[kind]
    opset = 23 if kind == "FLOAT4E2M1" else 21
    tensor = onnx.numpy_helper.from_array(np.ones(4).astype(dtype), "q")
    assert tensor.data_type == getattr(TensorProto, kind)
    graph = helper.make_graph([helper.make_node("DequantizeLinear", ["q", "s"], ["w"]), helper.make_node("Add", ["x", "w"], ["y"])], "g",
                              [helper.make_tensor_value_info("x", 1, [4])], [helper.make_tensor_value_info("y", 1, [4])],
                              initializer=[tensor, helper.make_tensor("s", 1, [], [0.5])])  # fmt: skip
    proto = helper.make_model(graph, ir_version=11, opset_imports=[helper.make_opsetid("", opset)])
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if works:
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        assert session.run(None, {"x": np.zeros(4, np.float32)})[0].tolist() == [0.5] * 4
    else:
        with pytest.raises(Exception, match="NOT_IMPLEMENTED|not implemented|Could not find an implementation"):
            onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


# ---- what ONNX Runtime fuses ----------------------------------------------------------------------------------------


def placed(op: str, output: bool, spec: QuantSpec | None = None) -> ir.Model:
    """One linear node with quantized input and weight, and its output quantized or not."""
    shapes = {
        "Conv": ("n, 8, 6, 6", (16, 8, 3, 3), "n, 16, 4, 4"),
        "MatMul": ("n, 4, 8", (8, 16), "n, 4, 16"),
        "Gemm": ("n, 8", (8, 16), "n, 16"),
    }
    before, weight, after = shapes[op]
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : 21]>\nm (float[{before}] x) => (float[{after}] y) {{ a = Neg(x)  y = Sqrt(a) }}'
    )
    edit, (first, last) = Editor(model), list(model.graph)
    values = [first.outputs[0], edit.initializer("w", RNG.standard_normal(weight).astype(np.float32))]
    node = edit.insert(last, op, values, output="product").producer()
    assert node is not None
    edit.rewire(last, 0, node.outputs[0])
    target = get_target("onnxruntime")
    qparams = Uniform(spec or target.activation).fit(-3.0, 3.0)
    qdq.insert_weight(edit, node, qdq.spec_for_weight(node, target.weight))
    qdq.insert_pair(edit, first.outputs[0], qparams, spec or target.activation, [(node, 0)])
    if output:
        qdq.insert_pair(edit, node.outputs[0], qparams, spec or target.activation, [(last, 0)])
    return model


@pytest.mark.parametrize(
    ("op", "output", "kernel"),
    [("Conv", True, "QLinearConv"), ("Conv", False, None), ("MatMul", True, "QLinearMatMul"), ("MatMul", False, "MatMulIntegerToFloat"),
     ("Gemm", True, "QGemm"), ("Gemm", False, "QGemm")],
)  # fmt: skip
def test_integer_kernels(op: str, output: bool, kernel: str | None) -> None:
    """The row of each anchor: Conv has an integer kernel only with a quantized output, the others have one either way."""
    assert get_target("onnxruntime").ops[op].quantized_output == (op == "Conv")
    found = kernels_used.kernels(placed(op, output))
    assert dict(found.counts) == ({kernel: 1} if kernel else {})
    assert len(found.floating) == (0 if kernel else 1)


def test_a_single_layer_is_loaded_by_a_deployed_session(tmp_path: object) -> None:
    model = placed("MatMul", False)
    x = -np.abs(RNG.standard_normal((2, 4, 8))).astype(np.float32)
    exact, fast = (Executor(model, deployed=deployed).run({"x": x})[0] for deployed in (False, True))
    np.testing.assert_allclose(fast, exact, rtol=1e-3, atol=1e-3)


def test_weight_only_int4_would_lose_its_float_activations() -> None:
    """METHODS.md 1.2: the deployed session takes MatMulNBits; graphq's own sessions must not (see test_executor)."""
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]>\nm (float[n, 64] x) => (float[n, 32] y) { y = Neg(x) }')
    edit = Editor(model)
    weight = edit.initializer("w", RNG.standard_normal((64, 32)).astype(np.float32))
    product = edit.insert(None, "MatMul", [model.graph.inputs[0], weight], output="p", like=model.graph.outputs[0])
    node = product.producer()
    assert node is not None
    edit.rewire(model.graph[1], 0, product)
    qdq.insert_weight(edit, node, qdq.spec_for_weight(node, replace(get_target("onnxruntime").weight, bits=4), 32))
    assert dict(kernels_used.kernels(model).counts) == {"MatMulNBits": 1}


def test_errors_are_graphq_errors() -> None:
    assert issubclass(TargetError, GraphqError)
