"""normalize: the operator set is raised or refused by name, shapes are inferred, and real models stay as they are."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import helper, numpy_helper, parser

from graphq import ir
from graphq.calibration import random_calibration
from graphq.errors import ModelError, TargetError
from graphq.models import onnx_path
from graphq.passes._normalize_opset import _fault
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, PassRecord
from graphq.targets import get_target

ASSETS = Path(__file__).parents[2].parent / "shared" / "assets" / "models"
RNG = np.random.default_rng(0)
Normalized = Callable[..., tuple[ir.Model, PassRecord]]
MakeContext = Callable[..., PassContext]


def build(text: str, opset: int = 21, ir_version: int = 10, domains: str = "", **weights: np.ndarray) -> onnx.ModelProto:
    """A model from ONNX text `name (inputs) => (outputs) {...}` and weights by name."""
    proto = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}{domains}]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph.all_nodes()]


def reasons(record: PassRecord) -> str:
    return "; ".join(reason for _, reason in record.skipped)


@pytest.mark.parametrize("opset", [7, 11, 13, 17, 18, 20])
def test_the_operator_set_is_raised(opset: int, same: Normalized) -> None:
    call = "ReduceMean <axes = [1], keepdims = 0> (s)" if opset < 18 else "ReduceMean <keepdims = 0> (s, axes)"
    weights = {"w": floats(4, 5)} | ({} if opset < 18 else {"axes": np.array([1])})
    proto = build(f"g (float[N,4] x) => (float[N] y) {{ h = MatMul(x, w) s = Softmax <axis = 1> (h) y = {call} }}", opset, 7, **weights)
    model, _ = same(proto, {"x": floats(3, 4)})
    assert ir.opset(model) == 21 and model.ir_version == 10


@pytest.mark.parametrize("opset", [12, 17])
def test_branches_are_raised_too(opset: int, same: Normalized) -> None:
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


def test_a_newer_model_keeps_its_operator_set(same: Normalized) -> None:
    model, _ = same(build("g (float[2] x) => (float[2] y) { y = Relu(x) }", 23, 11), {"x": floats(2)})
    assert (ir.opset(model), model.ir_version) == (23, 11)


def test_the_format_is_not_newer_than_the_target_loads(normalize: Normalized) -> None:
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
def test_group_normalization_is_converted_or_refused(text: str, opset: int, op: str, same: Normalized, normalize: Normalized) -> None:
    proto = build(text, opset, 8, s=floats(2))
    if not op:
        same(proto, {"x": floats(1, 4, 5, 5)})
        return
    with pytest.raises(ModelError, match=op) as caught:
        normalize(proto)
    assert caught.value.where.startswith(op) and "opset_version=21" in caught.value.hint


def test_an_operator_that_no_converter_knows_is_refused_by_name(caplog: pytest.LogCaptureFixture, normalize: Normalized) -> None:
    text = """g (float[1,2,4,4] x) => (float[1,2,8,8] y) {
        h = Relu(x) y = Upsample <mode = "nearest", width_scale = 2.0, height_scale = 2.0> (h) }"""
    proto = build(text, 1, 3)
    with caplog.at_level(logging.WARNING), pytest.raises(ModelError, match="opset 1 to 21"):
        normalize(proto)
    assert not caplog.records


def test_scan_of_opset_8_is_refused(normalize: Normalized) -> None:
    body = parser.parse_graph("b (float[2] s, float[2] v) => (float[2] t, float[2] o) { t = Add(s, v) o = Identity(t) }")
    node = helper.make_node("Scan", ["", "s0", "x"], ["y", "z"], body=body, num_scan_inputs=1)
    proto = build("g (float[1,2] s0, float[1,3,2] x) => (float[1,2] y, float[1,3,2] z) { y = Relu(s0) z = Relu(x) }", 8, 3)
    del proto.graph.node[:]
    proto.graph.node.append(node)
    with pytest.raises(ModelError, match="Scan has a batch axis"):
        normalize(proto)


def test_shapes_and_types_are_inferred(same: Normalized) -> None:
    model, _ = same(build("g (float[N,4] x) => (float[N,6] y) { h = MatMul(x, w) y = Relu(h) }", w=floats(4, 6)), {"x": floats(2, 4)})
    value = model.graph.node(0).outputs[0]
    assert ir.shape_of(value) == ("N", 6) and value.dtype == ir.DataType.FLOAT


def test_a_failing_inference_is_noted_and_not_an_error(monkeypatch: pytest.MonkeyPatch, normalize: Normalized) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("inference is broken")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    _, record = normalize(build("g (float[N,4] x) => (float[N,6] y) { h = MatMul(x, w) y = Relu(h) }", w=floats(4, 6)))
    assert "inference is broken" in reasons(record)


def test_quantized_models_are_left_alone(same: Normalized) -> None:
    proto = build(
        """g (float[N,4] x) => (float[N,3] y) {
            q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) v = DequantizeLinear(w, s, z) h = MatMul(d, v) y = Relu(h) }""",
        s=np.float32(0.1), z=np.int8(0), w=np.arange(12, dtype=np.int8).reshape(4, 3),
    )  # fmt: skip
    model, _ = same(proto, {"x": floats(2, 4)})
    assert ops(model) == [node.op_type for node in proto.graph.node]


def test_operators_of_other_domains_stay_when_the_operator_set_is_raised(same: Normalized) -> None:
    proto = build("g (float[2,4] x) => (float[2,4] y) { h = com.microsoft.Gelu(x) y = Relu(h) }", 17, 8, ', "com.microsoft" : 1')
    model, _ = same(proto, {"x": floats(2, 4)})
    assert ops(model) == ["Gelu", "Relu"] and ir.opset(model) == 21


MODELS = [onnx_path("digits_cnn"), onnx_path("digits_vit"), *sorted(ASSETS.glob("*.onnx"))]


@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_real_models(path: Path, same: Normalized) -> None:
    proto = onnx.load(path)
    feeds = next(random_calibration(ir.inputs(ir.load(path)), 2).batches(2))
    if path.stem in ("imdn_x2", "espcn_x3"):  # any size will do
        feeds = {name: array[..., :32, :32] for name, array in feeds.items()}
    model, record = same(proto, feeds)
    assert ir.opset(model) == 21 and "BatchNormalization" not in ops(model) and not record.skipped


def test_targets_may_ask_for_a_higher_operator_set(make_context: MakeContext) -> None:
    model = onnx_ir.from_proto(build("g (float[2] x) => (float[2] y) { y = Relu(x) }"))
    ctx = make_context(model)
    ctx.target = replace(ctx.target, minimum_opset=25)
    Normalize().apply(model, ctx)
    assert (ir.opset(model), model.ir_version) == (25, 13)
