"""sulq-softmax: the graph computes what `LogUniform` computes, in every runtime; what is no attention is left alone."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator
from pydantic import TypeAdapter

from graphq import ir, ir_proto
from graphq.backends import tensorrt
from graphq.calibration import open_calibration
from graphq.errors import TargetError
from graphq.executor import Executor, Fetch
from graphq.log_quantizers import LogParams, LogUniform
from graphq.passes.normalize import Normalize
from graphq.passes.sulq_softmax import SulqSoftmax
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.targets import TARGETS, get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "sulq_softmax"
ASSETS = Path(__file__).parents[2].parent / "shared" / "assets"
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
ATTENTION = f"""{HEAD}
g (float[N, 2, 16, 16] x, float[N, 2, 16, 8] v) => (float[N, 2, 16, 8] y) {{
  [softmax] p = Softmax(x)
  [context] y = MatMul(p, v)
}}"""
KINDS: dict[str, dict[str, Any]] = {
    "sulq": {}, "rounded": {"round_exponent": True}, "log2": {"quantizer": "log2"}, "log-sqrt2": {"quantizer": "log-sqrt2"},
}  # fmt: skip
ALL_KINDS = pytest.mark.parametrize("kind", KINDS)


def feeds(seed: int = 0, count: int = 8, size: int = 16) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = 3 * rng.standard_normal((count, 2, size, size))
    return {"x": x.astype(np.float32), "v": rng.standard_normal((count, 2, size, size // 2)).astype(np.float32)}


def quantize(text: str = ATTENTION, data: dict[str, np.ndarray] | None = None, target: str = "onnxruntime",
             **options: Any) -> tuple[ir.Model, PassRecord]:  # fmt: skip
    model = ir.from_onnx_text(text)
    calib = open_calibration(feeds() if data is None else data, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=calib, target=get_target(target))
    record = run_passes([SulqSoftmax(**options)], ctx, verify_graph)[0]
    require_legal(model, ctx.target)
    return model, record


def calls(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.domain == ir.DOMAIN]


def stated(node: ir.Node, kind: str, bits: int) -> tuple[LogUniform, LogParams]:
    """The quantizer that a node's constants say it is."""
    numbers = [np.float32(ir.constant(value)) for value in node.inputs[1:4]]
    return LogUniform(bits, kind == "rounded", kind == "log-sqrt2"), LogParams(*numbers)


def sqnr(reference: np.ndarray, result: np.ndarray) -> float:
    return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / np.sum((result - reference).astype(np.float64) ** 2)))


def dump(model: ir.Model) -> str:
    rows = []
    for name, value in model.graph.initializers.items():
        rows.append(f"{name}: {value.dtype} {float(np.asarray(ir.constant(value), np.float64)):.4g}")
    for node in [*model.graph, *(node for function in model.functions.values() for node in function)]:
        rows.append(f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(v.name or '-' for v in node.inputs if v)})")
    return "\n".join([*rows, *(f"output {value.name}" for value in model.graph.outputs), ""])


@pytest.mark.parametrize(("case", "options"), [("attention", {}), ("log_sqrt2", {"quantizer": "log-sqrt2", "bits": 6})])
def test_golden(case: str, options: dict[str, Any]) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    ramp = {"x": np.linspace(-4, 4, 64, dtype=np.float32).reshape(2, 2, 4, 4) ** 2, "v": np.ones((2, 2, 4, 3), np.float32)}
    model, _ = quantize(before, ramp, **options)
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- numerics -------------------------------------------------------------------------------------------------------


@ALL_KINDS
@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("target", TARGETS)
def test_runtimes_compute_what_numpy_does(kind: str, bits: int, target: str) -> None:
    """METHODS.md 8, T14; data the fit has not seen lies beyond the range too."""
    model, _ = quantize(bits=bits, target=target, **KINDS[kind])
    (node,) = calls(model)
    (call,) = (value.name or "" for value in node.outputs)
    quantizer, params = stated(node, kind, bits)
    unseen = feeds(seed=1)
    unseen["x"] *= 2
    p, found = Executor(model, [Fetch("p"), Fetch(call)]).run(unseen)
    proto = ir.to_proto(model)
    proto.graph.output.append(onnx.helper.make_tensor_value_info(call, onnx.TensorProto.FLOAT, None))
    evaluated = ReferenceEvaluator(proto).run(None, unseen)[1]
    expected = quantizer.fake_quantize(p, params)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(evaluated, expected, atol=1e-5)
    assert len(np.unique(found)) <= 1 << bits


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
def test_the_context_is_better_than_with_uniform_weights(seed: int, bits: int) -> None:
    """On its own objective, the softmax output, and on what attention makes of it."""
    data = feeds(seed, size=64)
    model, record = quantize(ATTENTION.replace("16", "64").replace("8] ", "32] "), data, bits=bits)
    p, found, y = Executor(model, [Fetch("p"), Fetch(calls(model)[0].outputs[0].name or ""), Fetch("y")]).run(data)
    step = p.max() / (2**bits - 1)
    uniform = np.rint(p / step) * step
    assert sqnr(p, found) > sqnr(p, uniform)
    assert sqnr(p @ data["v"], y) > sqnr(p @ data["v"], uniform @ data["v"])
    assert record.measurements[0].numbers["sqnr_db"] == pytest.approx(sqnr(p, found), abs=1.0)


@pytest.mark.parametrize(("bits", "highest"), [(3, "seen"), (4, "seen"), (5, "one"), (8, "one")])
def test_fine_levels_reach_one(bits: int, highest: str) -> None:
    """Unseen data may have a larger weight than calibration: where levels are many, there is one for it."""
    data = feeds()
    data["x"] *= 0.2
    model, _ = quantize(data=data, bits=bits)
    (node,) = calls(model)
    quantizer, params = stated(node, "sulq", bits)
    top = quantizer.dequantize(np.array([quantizer.spec.qmax], np.int8), params)
    seen = Executor(model, [Fetch("p")]).run(data)[0].max()
    assert seen < 0.5 and top[0] == pytest.approx(1.0 if highest == "one" else seen, abs=1e-5)


def test_the_same_data_give_the_same_bytes() -> None:
    first, second = (ir.to_proto(quantize()[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_more_samples_are_fitted_to_if_asked() -> None:
    data = feeds()
    data["x"][1:] *= 0.1
    assert quantize(data=data, samples=1)[1].measurements != quantize(data=data, samples=8)[1].measurements


# ---- where ----------------------------------------------------------------------------------------------------------

WEIGHT = "<float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}>"
FORMS = {
    "other_operand": "p = Softmax(x) y = MatMul(v, p)",
    "constant_weight": "p = Softmax(x) y = MatMul(p, w)",
    "dropout": "p = Softmax(x) d = Dropout(p) y = MatMul(d, w)",
    "cast_and_back": "p = Softmax(x) h = Cast<to = 10>(p) f = Cast<to = 1>(h) y = MatMul(f, w)",
    "reshaped": "shape = Constant<value_ints = [-1, 4]>() p = Softmax(x) r = Reshape(p, shape) y = MatMul(r, w)",
    "transposed": "p = Softmax<axis = -2>(x) t = Transpose<perm = [0, 2, 1]>(p) y = MatMul(t, w)",
}


def small(form: str) -> str:
    return f"{HEAD} g (float[N, 4, 4] x, float[N, 3, 4] v) => (float[] y)\n{WEIGHT} {{ {form} }}"


def small_feeds(scale: float = 1.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"x": scale * rng.standard_normal((4, 4, 4)).astype(np.float32), "v": np.ones((4, 3, 4), np.float32)}


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_exporters_write(form: str) -> None:
    model, record = quantize(small(FORMS[form]), small_feeds())
    (node,) = calls(model)
    assert node.inputs[0].name == "p" and not record.skipped
    assert [use.node for use in ir.uses(node.inputs[0])] == [node]


def test_other_readers_keep_the_floats() -> None:
    text = small("p = Softmax(x) a = MatMul(p, w) s = ReduceSum(p) y = Add(a, s)").replace("y)", "y, float[] p)", 1)
    model, _ = quantize(text, small_feeds())
    (node,) = calls(model)
    assert {use.node.op_type for use in ir.uses(node.inputs[0])} == {"ReduceSum", "SULQ"}
    assert [value.name for value in model.graph.outputs] == ["y", "p"]
    data = small_feeds()
    np.testing.assert_array_equal(Executor(model).run(data)[1], Executor(ir.from_onnx_text(text)).run(data)[1])


def test_two_matmuls_read_one_quantizer() -> None:
    model, _ = quantize(small("p = Softmax(x) a = MatMul(p, w) b = MatMul(p, w) y = Add(a, b)"), small_feeds())
    (node,) = calls(model)
    assert [use.node.op_type for use in ir.uses(node.outputs[0])] == ["MatMul", "MatMul"]


def test_one_function_for_all_nodes() -> None:
    text = small("p = Softmax(x) a = MatMul(p, w) q = Softmax(a) t = Transpose<perm = [0, 2, 1]>(q) y = MatMul(w, t)")
    model, _ = quantize(text, small_feeds())
    assert [node.op_type for node in calls(model)] == ["SULQ", "SULQ"] and len(model.functions) == 1


@pytest.mark.parametrize(("bits", "storage"), [(2, "INT4"), (4, "INT4"), (5, "INT8"), (8, "INT8")])
def test_codes_have_the_narrowest_type(bits: int, storage: str) -> None:
    (node,) = calls(quantize(bits=bits)[0])
    assert str(node.inputs[-1].dtype) == storage


REFUSED = {
    "classifier": (small("y = Softmax(x)"), "no MatMul reads its output"),
    "gate": (small("p = Softmax(x) y = Mul(p, x)"), "no MatMul reads its output"),
    "shape_operand": (small("p = Softmax(x) c = Cast<to = 7>(p) y = Expand(v, c)"), "no MatMul reads its output"),
    "half": (small("h = Cast<to = 10>(x) p = Softmax(h) k = Cast<to = 10>(w) m = MatMul(p, k) y = Cast<to = 1>(m)")
             .replace("}>", "}, float16[N, 4, 4] p>", 1), "its output is FLOAT16, not float32"),
    "quantized": (small("s = Constant<value_float = 0.1>() p = Softmax(x) q = QuantizeLinear(p, s) d = DequantizeLinear(q, s)"
                        "y = MatMul(d, w)"), "its output is quantized already"),
    "subgraph": (f"""{HEAD} g (float[N, 4, 4] x, float[N, 3, 4] v) => (float[] y) {WEIGHT} {{
        c = Constant<value = bool {{1}}>()
        y = If(c) <then_branch = a () => (float[N, 4, 3] m) {{ p = Softmax(x) m = MatMul(p, w) }},
                   else_branch = b () => (float[N, 4, 3] n) {{ n = MatMul(x, w) }}> }}""", "it lies in a subgraph"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_left_alone(case: str) -> None:
    text, reason = REFUSED[case]
    model, record = quantize(text, small_feeds(), allow_no_effect=True)
    assert not calls(model) and [why for _, why in record.skipped] == [reason]


def test_nan_is_left_alone() -> None:
    model, record = quantize(small("n = Log(x) p = Softmax(n) y = MatMul(p, w)"), small_feeds(), allow_no_effect=True)
    assert not calls(model) and [why for _, why in record.skipped] == ["its output holds NaN on calibration data"]


def test_what_it_quantized_is_not_quantized_again() -> None:
    model = ir.from_onnx_text(ATTENTION)
    calib = open_calibration(feeds(), ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=calib, target=get_target("onnxruntime"))
    records = run_passes([SulqSoftmax(), SulqSoftmax(allow_no_effect=True)], ctx, verify_graph)
    assert len(calls(model)) == 1 and records[1].skipped[0][1] == "its output is quantized already"


def test_a_model_without_softmax_is_an_error() -> None:
    with pytest.raises(TargetError, match="No softmax.*(?s:.*)int8"):
        quantize(small("y = MatMul(x, w)"), small_feeds())


@pytest.mark.parametrize("options", [
    {"bits": 1}, {"bits": 9}, {"quantizer": "log10"}, {"samples": 0}, {"quantizer": "log2", "round_exponent": True},
])  # fmt: skip
def test_bad_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="validation error"):
        TypeAdapter(SulqSoftmax).validate_python(options)


# ---- engines and a real model ---------------------------------------------------------------------------------------


@ALL_KINDS
@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="TensorRT-RTX is not installed")
def test_engines_are_built(kind: str, tmp_path: Path) -> None:
    """The parser refuses a function with a QuantizeLinear that is called twice, so there is none in it for this target."""
    data = feeds()
    text = ATTENTION.replace(
        "y = MatMul(p, v)", "a = MatMul(p, v) t = Transpose<perm = [0, 1, 3, 2]>(v) b = MatMul(a, t) q = Softmax(b) y = MatMul(q, v)"
    )
    model, _ = quantize(text, data, target="tensorrt-rtx", **KINDS[kind])
    assert len(calls(model)) == 2
    tensorrt.emit_engine(model, tmp_path / "m.engine", get_target("tensorrt-rtx"), open_calibration(data, ir.inputs(model)))
    assert (tmp_path / "m.engine").read_bytes().startswith(b"vtrt")


@pytest.mark.parametrize("quantizer", ["sulq", "log2", "log-sqrt2"])
def test_runtimes_agree_on_a_real_model(assets: ModuleType, quantizer: Any) -> None:
    """To 1e-5, where both get the same attention: but for one number in 10,000, where theirs lie on either side of a boundary."""
    model = ir.load(ASSETS / "models" / "vit_tiny_patch16_224.onnx")
    images = assets.calibration("vit_tiny_patch16_224", 2)
    calib = open_calibration(images, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=calib, target=get_target("onnxruntime"))
    run_passes([Normalize(), SulqSoftmax(quantizer=quantizer)], ctx, verify_graph)
    calls = [node for node in model.graph if node.domain == ir.DOMAIN]
    assert len(calls) == 12
    names = [value.name or "" for node in calls for value in (node.inputs[0], node.outputs[0])]
    arrays = Executor(model, [Fetch(name) for name in names]).run(images)
    for node, x, y in zip(calls, arrays[::2], arrays[1::2], strict=True):
        alone, _ = ir_proto.segment_proto(model, [node], {node.inputs[0].name: x.dtype})  # type: ignore[union-attr]
        alone.graph.output.append(onnx.helper.make_empty_tensor_value_info(node.outputs[0].name))
        (expected,) = ReferenceEvaluator(alone).run(None, {node.inputs[0].name: x})  # type: ignore[union-attr]
        assert np.mean(np.abs(y - expected) > 1e-5) < 1e-4


def test_every_softmax_of_a_real_model(assets: ModuleType) -> None:
    model = ir.load(ASSETS / "models" / "vit_tiny_patch16_224.onnx")
    images = assets.calibration("vit_tiny_patch16_224", 8)
    calib = open_calibration(images, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=calib, target=get_target("onnxruntime"))
    before = Executor(model).run(images)[0]
    record = run_passes([Normalize(), SulqSoftmax()], ctx, verify_graph)[1]
    softmaxes = [node for node in model.graph if node.op_type == "Softmax"]
    assert len(softmaxes) == 12 and not record.skipped
    assert [[use.node.op_type for use in ir.uses(node.outputs[0])] for node in softmaxes] == [["SULQ"]] * 12
    assert min(entry.numbers["sqnr_db"] for entry in record.measurements) > 18
    assert sqnr(before, Executor(model).run(images)[0]) > 18
