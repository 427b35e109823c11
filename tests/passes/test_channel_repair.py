"""channel-repair: tensors get smaller, what is left makes up for what went, and who keeps all channels."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.calibration import open_calibration
from graphq.errors import GraphqError, RecipeError
from graphq.executor import Executor
from graphq.models import digits, onnx_path
from graphq.passes.bias_correct import BiasCorrect
from graphq.passes.channel_repair import ChannelRepair
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import BATCH_NORM, Normalize
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "channel_repair"


def build(body: str, seed: int = 0, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\ng {body}')
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        array = rng.uniform(0.5, 2, shape) if name.startswith("p_") else rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]) or 1)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return proto


def passed(proto: onnx.ModelProto, feeds: dict[str, np.ndarray], *passes: Pass) -> tuple[ir.Model, list[PassRecord]]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    data = open_calibration(feeds, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    records = run_passes([Normalize(), *passes], ctx, verify_graph)
    require_legal(model, ctx.target)
    return model, records


def repair(proto: onnx.ModelProto, x: np.ndarray, **options: Any) -> tuple[ir.Model, PassRecord]:
    model, records = passed(proto, {"x": x}, ChannelRepair(**options))
    return model, records[-1]


def outputs(model: ir.Model | onnx.ModelProto, x: np.ndarray, name: str = "x") -> np.ndarray:
    model = onnx_ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    return Executor(model, threads=1).run({name: x})[0].astype(np.float64)


def error(model: ir.Model, proto: onnx.ModelProto, x: np.ndarray) -> float:
    wanted = outputs(proto, x)
    return float(np.sum((outputs(model, x) - wanted) ** 2) / np.sum((wanted - wanted.mean(0)) ** 2))


def shapes(model: ir.Model) -> dict[str | None, tuple[int, ...]]:
    return {name: tuple(value.const_value.shape) for name, value in model.graph.initializers.items() if value.const_value is not None}  # type: ignore[misc]


def rows(seed: int, *shape: int) -> np.ndarray:
    """Heavy-tailed and correlated along axis 1."""
    rng = np.random.default_rng(seed)
    x = np.moveaxis(rng.standard_t(5, shape), 1, -1) @ rng.normal(size=(shape[1], shape[1])) / np.sqrt(shape[1])
    return np.ascontiguousarray(np.moveaxis(x, -1, 1), np.float32)


def test_golden() -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half anew. Channel 3 is dead, channel 2 the sum of 0 and 1 for x that is not negative."""
    path = GOLDEN / "mlp.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = repair(parser.parse_model(before), np.abs(rows(0, 512, 4)), share=0.5, multiple=1)
    found = [f"{name}: {np.asarray(ir.constant(value)).round(1).tolist()}" for name, value in model.graph.initializers.items()]
    found += [f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})"
              for node in model.graph]  # fmt: skip
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text("\n".join([f"{before}----", *found, ""]), encoding="utf-8")
    else:
        assert "\n".join([*found, ""]) == expected


MLP = """(float[n, 24] x) => (float[n, 12] y) {
    [one] a = MatMul(x, w) b = Add(a, b1) s = Sigmoid(b) h = Mul(b, s) [two] c = MatMul(h, v) y = Add(c, b2) }"""
GATED = """(float[n, t, 24] x) => (float[n, t, 12] y) {
    [gate] a = MatMul(x, w) s = Sigmoid(a) g = Mul(a, s) [up] u = MatMul(x, q) h = Mul(g, u) [two] y = MatMul(h, v) }"""
CONVS = """(float[n, 8, 6, 6] x) => (float[n, 8, 6, 6] y) {
    [one] a = Conv<pads = [1, 1, 1, 1]>(x, w, b1) r = Relu(a) n = BatchNormalization(r, p_g, p_b, p_m, p_v)
    [two] y = Conv<pads = [1, 1, 1, 1]>(n, v, b2) }"""
INVERTED = """(float[n, 8, 6, 6] x) => (float[n, 10] y) {
    [wide] a = Conv(x, w, b1) r = Clip(a, zero, six) [depth] d = Conv<group = 32, pads = [1, 1, 1, 1]>(r, q, b3) e = PRelu(d, slope)
    p = GlobalAveragePool(e) f = Flatten(p) [two] y = Gemm<transB = 1, alpha = 0.5>(f, v, b2) }"""
CASES = {
    "mlp": (MLP, (24,), {"w": (24, 64), "b1": (64,), "v": (64, 12), "b2": (12,)}, {"w": (24, 48), "b1": (48,), "v": (48, 12), "b2": (12,)}),
    "gated": (GATED, (24, 5), {"w": (24, 64), "q": (24, 64), "v": (64, 12)}, {"w": (24, 48), "q": (24, 48), "v": (48, 12)}),
    "convs": (CONVS, (8, 6, 6), {"w": (32, 8, 3, 3), "b1": (32,), "v": (8, 32, 3, 3), "b2": (8,)} | {f"p_{p}": (32,) for p in "gbmv"},
              {"w": (24, 8, 3, 3), "b1": (24,), "v": (8, 24, 3, 3), "b2": (8,)} | {f"p_{p}": (24,) for p in "gbmv"}),
    "inverted": (INVERTED, (8, 6, 6), {"w": (32, 8, 1, 1), "b1": (32,), "q": (32, 1, 3, 3), "b3": (32,), "slope": (32, 1, 1),
                                       "zero": (), "six": (), "v": (10, 32), "b2": (10,)},
                 {"w": (24, 8, 1, 1), "b1": (24,), "q": (24, 1, 3, 3), "b3": (24,), "slope": (24, 1, 1),
                  "zero": (), "six": (), "v": (10, 24), "b2": (10,)}),
}  # fmt: skip


def case(name: str, seed: int = 0) -> tuple[onnx.ModelProto, np.ndarray, np.ndarray, dict[str, tuple[int, ...]]]:
    """A model, calibration rows, rows that it does not see, and the shapes after a quarter of the channels has gone."""
    body, size, before, after = CASES[name]
    proto = build(body, seed, **before)
    for tensor in proto.graph.initializer:
        if tensor.name in ("zero", "six"):
            tensor.CopyFrom(numpy_helper.from_array(np.float32(0 if tensor.name == "zero" else 1), tensor.name))
    count = {"mlp": 600, "gated": 400}.get(name, 64)
    x = rows(seed, 2 * count, *(size if name != "gated" else size[::-1]))
    return proto, x[:count], x[count:], after


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_repaired_beats_unrepaired_and_everything_shrinks(name: str, seed: int) -> None:
    proto, x, unseen, after = case(name, seed)
    (model, record), (plain, _) = (repair(proto, x, share=0.25, repair=repaired) for repaired in (True, False))
    assert shapes(model) == shapes(plain) == after
    assert error(model, proto, unseen) < 0.95 * error(plain, proto, unseen)
    (found,) = record.measurements
    hidden = after["w"][1] if name in ("mlp", "gated") else after["w"][0]
    assert found.where == "two" and found.numbers["channels_after"] == hidden == 0.75 * found.numbers["channels_before"]


@pytest.mark.parametrize("name", CASES)
def test_every_value_has_its_new_shape(name: str) -> None:
    proto, x, *_ = case(name)
    model, _ = repair(proto, x, share=0.25)
    fresh = onnx_ir.from_proto(onnx.shape_inference.infer_shapes(_without_shapes(ir.to_proto(model)), strict_mode=True))
    inferred = {value.name: ir.shape_of(value) for node in fresh.graph for value in node.outputs}
    for node in model.graph:
        (out,) = node.outputs
        ours, theirs = ir.shape_of(out) or (), inferred[out.name] or ()
        assert [dim for dim in ours if isinstance(dim, int)] == [dim for dim in theirs if isinstance(dim, int)], out.name


def _without_shapes(proto: onnx.ModelProto) -> onnx.ModelProto:
    del proto.graph.value_info[:]
    return proto


def test_layers_in_a_row() -> None:
    """The middle one is refitted, and cut on both sides."""
    body = """(float[n, 24] x) => (float[n, 12] y) {
    [one] a = Gemm(x, w, b1) r = Relu(a) [two] b = Gemm(r, v, b2) s = Relu(b) [three] y = Gemm(s, u, b3) }"""
    proto = build(body, w=(24, 64), b1=(64,), v=(64, 48), b2=(48,), u=(48, 12), b3=(12,))
    x = rows(0, 1200, 24)
    model, record = repair(proto, x[:600], share=0.25)
    assert shapes(model) == {"w": (24, 48), "b1": (48,), "v": (48, 32), "b2": (32,), "u": (32, 12), "b3": (12,)}  # 36 is as near 32 as 40
    assert [found.where for found in record.measurements] == ["two", "three"]
    assert error(model, proto, x[600:]) < 0.5 * error(repair(proto, x[:600], share=0.25, repair=False)[0], proto, x[600:])


def test_channels_that_others_make_up_for_cost_nothing() -> None:
    proto, x, unseen, _ = case("mlp")
    for tensor in proto.graph.initializer:
        if tensor.name in ("w", "b1"):
            array = numpy_helper.to_array(tensor).copy()
            array[..., 40:] = array[..., :24]  # copies
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    model, _ = repair(proto, x, share=0.375)
    plain, _ = repair(proto, x, share=0.375, repair=False)
    assert shapes(model)["w"] == (24, 40)
    assert error(model, proto, unseen) < min(0.02, error(plain, proto, unseen) / 5)  # what the ridge costs


def test_a_trained_network() -> None:
    """Two fifths of the hidden channels of each block of a transformer: hardly an image gets another class."""
    proto, feeds = onnx.load(onnx_path("digits_vit")), {"input": digits.calibration(16)}
    images = digits.images("test")[0][:200]
    wanted, lost = outputs(proto, images, "input"), {}
    for repaired in (True, False):
        model, records = passed(proto, feeds, ChannelRepair(share=0.4, repair=repaired))
        found = outputs(model, images, "input")
        lost[repaired] = np.sum((found - wanted) ** 2)
        assert len(records[-1].measurements) == 4 and (not repaired or np.mean(found.argmax(1) == wanted.argmax(1)) > 0.97)
    assert lost[True] < 0.5 * lost[False]


def test_it_goes_before_quantizers() -> None:
    """Passes that compare with the original's layers leave alone those that have other channels now."""
    proto, x, *_ = case("mlp")
    model, records = passed(proto, {"x": x}, ChannelRepair(share=0.25), InsertQdq(), BiasCorrect(allow_no_effect=True))
    assert any("same channels" in reason for _, reason in records[-1].skipped)
    assert shapes(model)["b1"] == (48,)


# ---- who keeps all channels -----------------------------------------------------------------------------------------


BASE = {"w": (24, 64), "v": (64, 12)}
HEAD = "(float[n, 24] x) => (float[n, 12] y)"
REFUSED = {
    "does not keep them apart": (HEAD + "{ a = MatMul(x, w) r = Relu(a) [two] b = MatMul(r, v) m = ReduceMean(r, last) y = Add(b, m) }",
                                 BASE),
    "Softmax": (HEAD + "{ a = MatMul(x, w) r = Softmax(a) [two] y = MatMul(r, v) }", BASE),
    "input or output of the model": ("(float[n, 64] x) => (float[n, 12] y) { r = Relu(x) [two] y = MatMul(r, v) }", {"v": (64, 12)}),
    "'three'": (HEAD + "{ a = MatMul(x, w) r = Relu(a) [two] b = MatMul(r, v) [three] c = MatMul(r, q) y = Add(b, c) }",
                BASE | {"q": (64, 12)}),
    "LayerNormalization": (HEAD + "{ a = MatMul(x, w) r = LayerNormalization(a, q) [two] y = MatMul(r, v) }", BASE | {"q": (64,)}),
    "is an input or output": ("(float[n, 24] x) => (float[n, 12] y, float[n, 64] r) "
                                "{ a = MatMul(x, w) r = Relu(a) [two] y = MatMul(r, v) }", BASE),
    "not a constant of the graph": (HEAD + "{ d = Mul(x, x) t = Transpose(d) a = MatMul(x, w) k = MatMul(t, a) "
                      "q = MatMul(x, k) r = Relu(q) [two] y = MatMul(r, v) }", BASE),
    "is not a constant": (HEAD + "{ m = ReduceMax<keepdims = 0>(x) a = Gemm(x, w, m) r = Relu(a) [two] y = MatMul(r, v) }", BASE),
    "lie in groups": ("(float[n, 24, 5] x) => (float[n, 12, 5] y) { a = Conv(x, w) r = Relu(a) [two] y = Conv<group = 2>(r, v) }",
                      {"w": (64, 24, 1), "v": (12, 32, 1)}),
    "makes them in groups": ("(float[n, 24, 5] x) => (float[n, 12, 5] y) { a = Conv<group = 2>(x, w) r = Relu(a) [two] y = Conv(r, v) }",
                           {"w": (64, 12, 1), "v": (12, 64, 1)}),
    "too few to leave": (HEAD + "{ a = MatMul(x, w) r = Relu(a) [two] y = MatMul(r, v) }", {"w": (24, 8), "v": (8, 12)}),
    "excluded": (HEAD + "{ [skipped] a = MatMul(x, w) r = Relu(a) [two] y = MatMul(r, v) }", BASE),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    body, weights = REFUSED[reason]
    proto = build(body, **weights)
    if "last" in body:
        proto.graph.initializer.append(numpy_helper.from_array(np.array([-1]), "last"))
    size = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim[1:]]
    model, record = repair(proto, rows(0, 64, *size), allow_no_effect=True, exclude=("skipped",) if reason == "excluded" else ())
    assert any("'two'" in where and reason in text for where, text in record.skipped), record.skipped
    assert not record.edits and len(model.graph) == len(proto.graph.node)


def test_options_that_fit_nothing_are_refused() -> None:
    proto, x, *_ = case("mlp")
    with pytest.raises(GraphqError, match="nowhere"):
        repair(proto, x, exclude=("nowhere",))
    with pytest.raises(RecipeError, match="changed nothing"):
        repair(proto, x, share=0.01)


def test_what_is_remembered_of_a_normalization_is_cut_too() -> None:
    body = """(float[n, 8, 6, 6] x) => (float[n, 8, 6, 6] y) {
    [one] a = Conv(x, w) b = BatchNormalization(a, p_g, p_b, p_m, p_v) r = Relu(b) [two] y = Conv(r, v) }"""
    proto = build(body, w=(32, 8, 1, 1), v=(8, 32, 1, 1), **{f"p_{p}": (32,) for p in "gbmv"})
    model, _ = repair(proto, rows(0, 100, 8, 6, 6), share=0.25)
    memory = next(node for node in model.graph if node.name == "one").meta[BATCH_NORM]
    assert all(memory[key].shape == (24,) for key in ("gamma", "beta", "mean", "var")) and np.ndim(memory["epsilon"]) == 0


def test_it_gives_the_same_bytes_twice() -> None:
    proto, x, *_ = case("convs")
    first, second = (ir.to_proto(repair(proto, x, share=0.25)[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
