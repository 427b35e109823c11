"""Editor: every change is counted, names stay unique, what others share or return is left alone, and dead parts go."""

from __future__ import annotations

from collections.abc import Hashable

import ml_dtypes
import numpy as np
import onnx
import pytest

from graphq import ir
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.executor import Executor

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
SHARED = f"""{HEAD}
shared (float[n, 2] x) => (float[n, 2] y, float[n, 2] z)
<float[2, 2] w = {{1, 2, 3, 4}}>
{{ y = MatMul(x, w)  z = MatMul(x, w) }}"""
CHAIN = f"""{HEAD}
chain (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] w = {{1, 2, 3, 4}}, float[2] unread = {{1, 2}}>
{{ [one] a = MatMul(x, w)  [two] b = Relu(a)  [three] y = Neg(b)  [dead] c = Abs(b)  [dead2] d = Exp(c) }}"""
X = np.float32([[1, -2], [3, 4]])


def opened(text: str = CHAIN) -> tuple[ir.Model, Editor]:
    model = ir.from_onnx_text(text)
    return model, Editor(model)


def run(model: ir.Model, **feeds: np.ndarray) -> list[np.ndarray]:
    onnx.checker.check_model(ir.to_proto(model))
    return Executor(model).run({"x": X, **feeds})


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def test_names_are_unique_in_the_whole_model() -> None:
    model, edit = opened(f"""{HEAD}
m (float[n, 2] x, bool c) => (float[n, 2] y)
{{ [named] y = If(c) <then_branch = l () => (float[n, 2] p) {{ p = Abs(x) }}, else_branch = r () => (float[n, 2] q) {{ q = Neg(x) }}> }}""")
    assert [edit.unique(name) for name in ("x", "p", "named", "new", "new", "new")] == ["x_1", "p_1", "named_1", "new", "new_1", "new_2"]
    value = edit.initializer("q", np.zeros(1, np.float32))
    inserted = edit.insert(None, "Relu", [value], output="y")
    assert value.name == "q_1" and inserted.name == "y_1" and len(edit.unique("y_1")) == len("y_1_1")


def test_every_change_is_counted() -> None:
    model, edit = opened()
    one, two, three, dead, dead2 = list(model.graph)
    assert edit.version == 0 and not edit.edits
    steps = [
        ("weight", lambda: edit.set_weight(one, 1, np.zeros((2, 2), np.float32))),
        ("initializer", lambda: edit.initializer("k", np.float32(1))),
        ("insert", lambda: edit.insert(two, "Relu", [one.outputs[0]], output="r")),
        ("rewire", lambda: edit.rewire(two, 0, one.outputs[0])),
        ("attribute", lambda: edit.set_attribute(two, "note", 1)),
        ("replace", lambda: edit.replace(dead.outputs[0], two.outputs[0])),
        ("remove", lambda: edit.remove(dead)),
        ("prune", lambda: edit.prune()),
    ]
    for kind, change in steps:
        before, version = edit.edits[kind], edit.version
        change()
        assert edit.edits[kind] > before and edit.version > version, kind


def test_looking_counts_nothing() -> None:
    model, edit = opened()
    edit.prune()
    version = edit.version
    edit.prune()
    edit.unique("a")
    edit.raise_opset(13)
    assert edit.version == version


def test_set_weight_in_place() -> None:
    model, edit = opened()
    edit.set_weight(model.graph[0], 1, np.eye(2))  # float64 in, float32 as before
    assert edit.edits == {"weight": 1}
    weight = ir.constant(model.graph.initializers["w"])
    assert weight is not None and weight.dtype == np.float32
    np.testing.assert_array_equal(run(model)[0], -np.maximum(X, 0))


def test_set_weight_clones_what_others_read() -> None:
    model, edit = opened(SHARED)
    before = run(model)
    edit.set_weight(model.graph[0], 1, np.zeros((2, 2), np.float32))
    y, z = run(model)
    assert not y.any()
    np.testing.assert_array_equal(z, before[1])
    assert sorted(model.graph.initializers) == ["w", "w_1"]


def test_what_was_made_of_a_weight_is_not_shared_after_it_changed() -> None:
    model, edit = opened()
    weight = model.graph.initializers["w"]

    def made(key: Hashable) -> float:
        return float(ir.constant(edit.shared(key, "sum", lambda: np.sum(ir.constant(weight)), "float32")))  # type: ignore[arg-type]

    first, keys = made(weight), [weight, ("sum", weight), (("nested", weight), 8)]
    assert [made(key) for key in keys] == [first] * 3
    other = edit.shared("other", "other", lambda: np.ones(1), "float32")
    edit.rewire(model.graph[1], 0, other)
    edit.set_weight(model.graph[0], 1, np.zeros((2, 2)))
    assert first and [made(key) for key in keys] == [0.0] * 3
    assert edit.shared("other", "other", lambda: np.zeros(1), "float32") is other


def test_set_weight_clones_what_the_model_returns() -> None:
    model, edit = opened(f"""{HEAD}
m (float[n, 2] x) => (float[n, 2] y, float[2, 2] w)
<float[2, 2] w = {{1, 2, 3, 4}}> {{ y = MatMul(x, w) }}""")
    edit.set_weight(model.graph[0], 1, np.zeros((2, 2), np.float32))
    y, w = Executor(model).run({"x": X})
    assert not y.any()
    np.testing.assert_array_equal(w, [[1, 2], [3, 4]])


def test_set_weight_of_another_shape() -> None:
    model, edit = opened()
    edit.set_weight(model.graph[0], 1, np.ones((2, 3), np.float32))
    edit.prune()
    assert list(model.graph.initializers) == ["w"] and ir.shape_of(model.graph.initializers["w"]) == (2, 3)


def test_set_constant_is_for_all_readers() -> None:
    model, edit = opened(SHARED)
    edit.set_constant(model.graph.initializers["w"], np.eye(2))
    np.testing.assert_array_equal(run(model), [X, X])
    edit.set_constant(model.graph.initializers["w"], np.eye(2), "float16")
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT16 and edit.edits == {"weight": 2}


@pytest.mark.parametrize("kind", [np.float16, ml_dtypes.bfloat16])
def test_set_weight_keeps_the_element_type(kind: type) -> None:
    model = ir.from_onnx_text(f"{HEAD}\nm (float16[n, 2] x) => (float16[n, 2] y) {{ y = Identity(x) }}")
    edit = Editor(model)
    node = edit.insert(
        model.graph[0], "MatMul", [model.graph.inputs[0], edit.initializer("w", np.eye(2).astype(kind))], output="a"
    ).producer()
    assert node is not None
    edit.set_weight(node, 1, np.ones((2, 2), np.float32))
    found = ir.constant(model.graph.initializers["w"])
    assert found is not None and found.dtype == kind and (found == 1).all()


def test_narrow_storage() -> None:
    model, edit = opened()
    value = edit.initializer("q", np.int8([-8, 7, 3]), "int4")
    assert value.dtype == ir.DataType.INT4
    found = ir.constant(value)
    assert found is not None and found.astype(np.int8).tolist() == [-8, 7, 3]


@pytest.mark.parametrize(("after", "order"), [(False, ["MatMul", "Tanh", "Relu", "Neg"]), (True, ["MatMul", "Relu", "Tanh", "Neg"])])
def test_insert_beside_a_node(after: bool, order: list[str]) -> None:
    model, edit = opened()
    two = model.graph[1]
    value = edit.insert(two, "Tanh", [model.graph[0].outputs[0]], output="t", like=model.graph.inputs[0], after=after)
    assert ops(model)[:4] == order
    assert ir.shape_of(value) == ("n", 2) and value.dtype == ir.DataType.FLOAT


def test_insert_first() -> None:
    model, edit = opened()
    edit.insert(None, "Neg", [model.graph.inputs[0]], output="first")
    assert ops(model)[0] == "Neg"
    bare = ir.from_onnx_text(f"{HEAD}\nm (float[2] x) => (float[2] x) {{ }}")
    Editor(bare).insert(None, "Neg", [bare.graph.inputs[0]], output="only")
    assert ops(bare) == ["Neg"]


def test_rewire_adds_a_missing_input() -> None:
    model, edit = opened(f"{HEAD}\nm (float[n, 2] x) => (float[n, 2] y) {{ y = Clip(x) }}")
    edit.rewire(model.graph[0], 2, edit.initializer("high", np.float32(2)))
    np.testing.assert_array_equal(run(model)[0], np.minimum(X, 2))


def test_replace_keeps_the_output_name() -> None:
    model, edit = opened(f"""{HEAD}
m (float[n, 2] x) => (float[n, 2] y, float[n, 2] z)
{{ y = Relu(x)  z = Neg(y) }}""")
    relu = model.graph[0]
    new = edit.insert(relu, "Abs", [model.graph.inputs[0]], output="abs", like=relu.outputs[0])
    edit.replace(relu.outputs[0], new)
    edit.prune()
    assert [value.name for value in model.graph.outputs] == ["y", "z"] and ops(model) == ["Abs", "Neg"]
    y, z = run(model)
    np.testing.assert_array_equal(y, np.abs(X))
    np.testing.assert_array_equal(z, -np.abs(X))


def test_replace_output_leaves_inner_readers_alone() -> None:
    model, edit = opened(f"""{HEAD}
m (float[n, 2] x) => (float[n, 2] y, float[n, 2] z)
{{ y = Relu(x)  z = Neg(y) }}""")
    relu = model.graph[0]
    edit.replace_output(relu.outputs[0], edit.insert(relu, "Exp", [relu.outputs[0]], output="e", like=relu.outputs[0], after=True))
    y, z = run(model)
    np.testing.assert_allclose(y, np.exp(np.maximum(X, 0)), rtol=1e-6)
    np.testing.assert_array_equal(z, -np.maximum(X, 0))
    names = [value.name for node in model.graph for value in node.outputs]
    assert len(set(names)) == len(names)


def test_an_output_returned_twice_is_replaced_twice() -> None:
    model = ir.from_onnx_text(SHARED)
    edit = Editor(model)
    model.graph.outputs[1] = model.graph.outputs[0]
    old = model.graph.outputs[0]
    edit.replace_output(old, edit.insert(None, "Relu", [model.graph.inputs[0]], output="r"))
    assert [value.name for value in model.graph.outputs] == ["y", "y"] and old not in model.graph.outputs


def test_a_node_that_is_read_is_not_removed() -> None:
    model, edit = opened()
    with pytest.raises(ValueError, match="still being used"):
        edit.remove(model.graph[0])
    assert not edit.edits and len(ops(model)) == 5


def test_names_are_swapped() -> None:
    model, edit = opened()
    one, two = model.graph[0].outputs[0], model.graph[1].outputs[0]
    edit.swap_names(one, two)
    assert (one.name, two.name) == ("b", "a") and edit.edits == {"rename": 1}
    before = -np.maximum(X @ np.float32([[1, 2], [3, 4]]), 0)
    np.testing.assert_array_equal(run(model)[0], before)


def test_prune_constants_leaves_dead_nodes() -> None:
    model, edit = opened()
    edit.prune_constants()
    assert list(model.graph.initializers) == ["w"] and len(ops(model)) == 5 and edit.edits == {"prune": 1}


# ---- prune ----------------------------------------------------------------------------------------------------------


def test_prune_takes_dead_nodes_and_unread_initializers() -> None:
    model, edit = opened()
    before = run(model)
    edit.prune()
    assert ops(model) == ["MatMul", "Relu", "Neg"] and list(model.graph.initializers) == ["w"]
    assert edit.edits == {"remove": 2, "prune": 1}
    np.testing.assert_array_equal(run(model)[0], before[0])


def test_prune_keeps_what_is_returned_or_half_read() -> None:
    model, edit = opened(f"""{HEAD}
m (float[n, 4] x) => (float[n, 4] y, float[2] k)
<float[2] k = {{1, 2}}, int64[2] parts = {{2, 2}}>
{{ a, b = Split <axis = 1> (x, parts)  y = Concat <axis = 1> (b, b) }}""")
    edit.prune()
    assert ops(model) == ["Split", "Concat"] and sorted(model.graph.initializers) == ["k", "parts"] and not edit.edits


def test_prune_drops_a_dead_branch_with_all_that_only_it_read() -> None:
    model, edit = opened(f"""{HEAD}
m (float[n, 2] x, bool c) => (float[n, 2] y)
<float[2] k = {{1, 2}}>
{{
   only_inside = Exp(x)
   dead = If(c) <
      then_branch = l () => (float[n, 2] p) {{ p = Add(only_inside, k) }},
      else_branch = r () => (float[n, 2] q) {{ q = Neg(x) }}>
   y = Neg(x)
}}""")
    edit.prune()
    assert ops(model) == ["Neg"] and not model.graph.initializers


def test_prune_cleans_up_inside_branches() -> None:
    model, edit = opened(f"""{HEAD}
m (float[n, 2] x, bool c) => (float[n, 2] y)
{{
   unread = Exp(x)
   y = If(c) <
      then_branch = l () => (float[n, 2] p) {{ d = Exp(unread)  p = Abs(x) }},
      else_branch = r () => (float[n, 2] q) {{ q = Neg(x) }}>
}}""")
    edit.prune()
    assert sorted(node.op_type for node in ir.all_nodes(model)) == ["Abs", "If", "Neg"]
    np.testing.assert_array_equal(run(model, c=np.array(True))[0], np.abs(X))


def test_prune_of_a_long_dead_chain_is_linear(monkeypatch: pytest.MonkeyPatch) -> None:
    count = 4000
    steps = "\n".join(f"v{index + 1} = Relu(v{index})" for index in range(count))
    model, edit = opened(f"{HEAD}\nm (float[n] v0) => (float[n] y) {{ y = Neg(v0)\n{steps} }}")
    looked, uses = [0], ir.Value.uses

    def counting(value: ir.Value) -> object:
        looked[0] += 1
        return uses(value)

    monkeypatch.setattr(ir.Value, "uses", counting)
    edit.prune()
    assert ops(model) == ["Neg"] and edit.edits == {"remove": count}
    assert count <= looked[0] < 4 * count


# ---- opset ----------------------------------------------------------------------------------------------------------


def test_raise_opset_converts_operators() -> None:
    model, edit = opened(
        '<ir_version: 8, opset_import: ["" : 17]>\nm (float[n, 2] x) => (float[n] y) { y = ReduceMax <axes = [1], keepdims = 0> (x) }'
    )
    edit.raise_opset(21)
    assert ir.opset(model) == 21 and edit.edits == {"opset": 1}
    assert "axes" not in model.graph[len(ops(model)) - 1].attributes
    np.testing.assert_array_equal(run(model)[0], X.max(1))


def test_raise_opset_never_lowers() -> None:
    model, edit = opened()
    edit.raise_opset(13)
    assert ir.opset(model) == 21 and not edit.edits


def test_an_opset_that_cannot_be_reached_is_an_error() -> None:
    model, edit = opened()
    with pytest.raises((ModelError, ValueError)) as error:
        edit.raise_opset(ir.MAX_OPSET + 5)
    assert isinstance(error.value, ModelError) and "could not be raised from opset 21" in str(error.value)
