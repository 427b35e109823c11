"""Model-local functions: added once, called through the editor, and understood by everything that handles a model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import functions, ir
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.executor import Executor, Fetch
from graphq.inspect import inspect
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, run_passes
from graphq.sweep import sweep
from graphq.targets import TARGETS, get_target, violations
from graphq.verify import verify_graph

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 1, 2, 3, 4, 5, 6, 7, 8}, float[4, 4] v = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}>
{ [first] a = MatMul(x, w)  b = Tanh(a)  [second] y = MatMul(b, v) }"""
ROUNDED = """Rounded (x, scale, zero) => (y) {
  codes = QuantizeLinear (x, scale, zero)
  y = DequantizeLinear (codes, scale, zero)
}"""
STEP = np.float32(0.25)
X = np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)


def called(text: str = TEXT, body: str = ROUNDED) -> ir.Model:
    """The model with the results of both MatMuls rounded to quarters by a local function."""
    model = ir.from_onnx_text(text)
    edit = Editor(model)
    for name in ("first", "second"):
        node = next(node for node in model.graph if node.name == name)
        out = node.outputs[0]
        operands = [out, edit.initializer("step", STEP), edit.initializer("zero", np.int8(0))]
        edit.replace(out, functions.call(edit, body, node, operands, output=f"{name}_rounded", like=out))
        edit.rewire(ir.uses(operands[1])[0].node, 0, node.outputs[0])
    return model


def wanted() -> np.ndarray:
    w = np.tile(np.arange(1, 9, dtype=np.float32).reshape(2, 4), (2, 1))
    return np.clip(np.rint(np.tanh(np.clip(np.rint(X @ w / STEP), -128, 127) * STEP) / STEP), -128, 127) * STEP


def run(model: ir.Model) -> np.ndarray:
    return Executor(model).run({"x": X})[0]


def context(model: ir.Model) -> PassContext:
    data = open_calibration({"x": X}, ir.inputs(model))
    return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))


def test_one_function_serves_all_nodes() -> None:
    model = called()
    assert [function.name for function in model.functions.values()] == ["Rounded"]
    assert [node.op_type for node in model.graph if node.domain == ir.DOMAIN] == ["Rounded", "Rounded"]
    np.testing.assert_allclose(run(model), wanted(), atol=1e-6)


def test_adding_is_an_edit_and_calling_is_one() -> None:
    model = ir.from_onnx_text(TEXT)
    edit = Editor(model)
    tanh = next(node for node in model.graph if node.op_type == "Tanh")
    for _ in range(2):
        functions.call(edit, "Same (x) => (y) { y = Relu (x) }", tanh, [tanh.outputs[0]], output="same", like=tanh.outputs[0])
    assert edit.edits == {"function": 1, "insert": 2}
    assert model.opset_imports[ir.DOMAIN] == 1


@pytest.mark.parametrize("after", [True, False])
def test_the_node_stands_where_asked_and_is_typed(after: bool) -> None:
    model = ir.from_onnx_text(TEXT)
    tanh = next(node for node in model.graph if node.op_type == "Tanh")
    like = tanh.outputs[0] if after else tanh.inputs[0]
    out = functions.call(Editor(model), "Same (x) => (y) { y = Relu (x) }", tanh, [like], output="same", like=like, after=after)
    assert [node.op_type for node in model.graph] == ["MatMul", *(["Tanh", "Same"] if after else ["Same", "Tanh"]), "MatMul"]
    assert out.shape == like.shape and out.dtype == like.dtype


def test_the_reference_evaluator_agrees() -> None:
    model = called()
    np.testing.assert_allclose(ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": X})[0], run(model), atol=1e-6)


def test_another_function_of_that_name_is_refused() -> None:
    model = called()
    out = next(iter(model.graph)).outputs[0]
    with pytest.raises(ModelError, match=r"another function graphq\.Rounded"):
        functions.call(Editor(model), "Rounded (x) => (y) { y = Round (x) }", None, [out], output="z", like=out)


def test_the_same_function_is_known_again_in_a_file(tmp_path: Path) -> None:
    ir.save(called(), tmp_path / "m.onnx")
    model = ir.load(tmp_path / "m.onnx")
    first = next(iter(model.graph))
    edit = Editor(model)
    operands = [first.outputs[0], edit.initializer("step", STEP), edit.initializer("zero", np.int8(0))]
    functions.call(edit, ROUNDED, first, operands, output="z", like=first.outputs[0])
    assert len(model.functions) == 1 and "function" not in edit.edits


# ---- everything that handles a model --------------------------------------------------------------------------------


def test_a_file_and_a_clone_keep_it(tmp_path: Path) -> None:
    model = called()
    ir.save(model, tmp_path / "m.onnx")
    clone = ir.clone(model)
    key = next(iter(model.functions))
    assert clone.functions[key] is not model.functions[key]
    for other in (ir.load(tmp_path / "m.onnx"), clone):
        np.testing.assert_array_equal(run(other), run(model))


def test_the_checker_takes_it() -> None:
    verify_graph(called())
    onnx.checker.check_model(ir.to_proto(called()), full_check=True)


def test_inner_values_views_and_segments() -> None:
    model = called()
    whole, extrema = Executor(model, [Fetch("first_rounded"), Fetch("first_rounded", "extrema")]).run({"x": X})
    assert extrema.tolist() == [whole.min(), whole.max()]
    nodes = [node for node in model.graph if node.name != "first"]
    first = Executor(model, [Fetch("a")]).run({"x": X})[0]
    segment = Executor(model, nodes=nodes, feeds={"a": np.dtype(np.float32)})
    np.testing.assert_array_equal(segment.run({"a": first})[0], run(model))


def test_a_sweep_walks_through_it() -> None:
    model, reference = called(), ir.from_onnx_text(TEXT)
    second = next(node for node in model.graph if node.name == "second")
    (step,) = sweep(model, reference, [second], open_calibration({"x": X}, ir.inputs(model)))
    rounded = Executor(model, [Fetch("first_rounded")]).run({"x": X})[0]
    np.testing.assert_allclose(np.concatenate(step.x_cur), np.tanh(rounded), atol=1e-6)


def test_normalize_keeps_it_and_infers_through_it() -> None:
    model = called()
    for node in model.graph:
        for out in node.outputs:
            if not out.is_graph_output():
                out.shape = out.type = None
    expected = run(model)
    run_passes([Normalize()], context(model), verify_graph)
    assert [node.op_type for node in model.graph] == ["MatMul", "Rounded", "Tanh", "MatMul", "Rounded"] and len(model.functions) == 1
    assert all(out.dtype == ir.DataType.FLOAT and ir.shape_of(out) == ("n", 4) for node in model.graph for out in node.outputs)
    np.testing.assert_array_equal(run(model), expected)


def test_normalize_inlines_foreign_functions_beside_it() -> None:
    foreign = TEXT.replace("b = Tanh(a)", "b = other.Squash(a)").replace('["" : 21]', '["" : 21, "other" : 1]')
    model = called(f'{foreign}\n<domain: "other", opset_import: ["" : 21]> Squash (p) => (q) {{ q = Tanh(p) }}')
    run_passes([Normalize()], context(model), verify_graph)
    assert [function.name for function in model.functions.values()] == ["Rounded"]
    assert [node.op_type for node in model.graph] == ["MatMul", "Rounded", "Tanh", "MatMul", "Rounded"]
    np.testing.assert_allclose(run(model), wanted(), atol=1e-6)


def test_raising_the_opset_keeps_it() -> None:
    """QuantizeLinear has another definition in opset 25: a function must not import the old one beside the new."""
    model = called()
    expected = run(model)
    Editor(model).raise_opset(25)
    (function,) = model.functions.values()
    assert ir.opset(model) == 25 and function.opset_imports[""] == 25
    verify_graph(model)
    np.testing.assert_array_equal(run(model), expected)


def test_a_newer_model_gets_a_function_of_its_opset() -> None:
    model = called(TEXT.replace("21", "25"))
    assert next(iter(model.functions.values())).opset_imports[""] == 25
    verify_graph(model)
    np.testing.assert_allclose(run(model), wanted(), atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_no_target_objects(target: str) -> None:
    assert not list(violations(called(), TARGETS[target]))


def test_inspect_counts_calls_and_bodies(tmp_path: Path) -> None:
    ir.save(called(), tmp_path / "m.onnx")
    found = inspect(tmp_path / "m.onnx")
    assert found.ops == {"MatMul": 2, "graphq.Rounded": 2, "Tanh": 1, "QuantizeLinear": 1, "DequantizeLinear": 1}
    assert found.already_quantized and found.domains == {ir.DOMAIN: 1}
    assert [node.refusal for node in found.linear] == [None, None]
