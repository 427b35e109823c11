"""normalize: the same outputs from the canonical form; names, constants, dead nodes and functions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.errors import ModelError
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, PassRecord

GOLDEN = Path(__file__).parent / "golden" / "normalize"
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
def test_golden(case: str, normalize: Normalized) -> None:
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


def test_names_are_unique_over_all_graphs_and_the_interface_keeps_its_own(same: Normalized) -> None:
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


def test_nameless_nodes_are_called_after_their_output(same: Normalized) -> None:
    model, _ = same(build("g (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"), {"x": floats(2)})
    assert [node.name for node in model.graph] == ["h", "y"]


def test_a_name_given_to_a_node_is_not_given_again_by_the_editor(make_context: MakeContext) -> None:
    model = onnx_ir.from_proto(build("g (float[2] x) => (float[2] y) { h = Relu(x) y = Neg(h) }"))
    for node in model.graph:
        node.name = "n"
    ctx = make_context(model)
    Normalize().apply(model, ctx)
    assert [node.name for node in model.graph] == ["n", "n_1"]
    assert ctx.edit.unique("n") == "n_2"


def test_a_canonical_model_is_left_alone_and_that_is_fine(normalize: Normalized) -> None:
    proto = build("g (float[2,3] x) => (float[2,4] y) { [n] y = MatMul(x, w) }", w=floats(3, 4))
    first, _ = normalize(proto)
    _, record = normalize(ir.to_proto(first))
    assert record.edits == {}


def test_initializers_listed_as_inputs_become_constants(same: Normalized) -> None:
    proto = build("g (float[N,3] x, float[3,4] w, float[4] b) => (float[N,4] y) { y = Gemm(x, w, b) }", ir_version=3, opset=9,
                  w=floats(3, 4), b=floats(4))  # fmt: skip
    x = floats(2, 3)
    feeds = {"x": x} | {entry.name: numpy_helper.to_array(entry) for entry in proto.graph.initializer}
    model, _ = same(proto, feeds)
    assert [value.name for value in model.graph.inputs] == ["x"] and model.ir_version == 10
    assert ir.constant(model.graph.node(0).inputs[1]) is not None


@pytest.mark.parametrize("attribute", ["value_float = 2.0", "value = float {2.0}", "value_floats = [2.0, 3.0]"])
def test_constants_become_initializers(attribute: str, same: Normalized) -> None:
    model, _ = same(build(f"g (float[2] x) => (float[2] y) {{ c = Constant <{attribute}> () y = Mul(x, c) }}"), {"x": floats(2)})
    assert ops(model) == ["Mul"] and "c" in model.graph.initializers


def test_a_returned_constant_stays_a_node(same: Normalized) -> None:
    model, _ = same(build("g (float[2] x) => (float[1] c, float[2] y) { c = Constant <value_floats = [2.0]> () y = Mul(x, c) }"),
                    {"x": floats(2)})  # fmt: skip
    assert ops(model) == ["Constant", "Mul"]


def test_constants_in_subgraphs_are_lifted_too(same: Normalized) -> None:
    proto = build(
        """g (float[N,4] x, bool c) => (float[N,4] y) {
            y = If (c) <then_branch = one () => (float[N,4] t) { k = Constant <value_float = 2.0> () t = Mul(x, k) },
                        else_branch = two () => (float[N,4] t) { k = Constant <value_float = 3.0> () t = Mul(x, k) }>
        }"""
    )
    for flag in (True, False):
        model, _ = same(proto, {"x": floats(2, 4), "c": np.array(flag)})
    assert "Constant" not in ops(model)


def test_identity_and_idle_dropout_go(same: Normalized) -> None:
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
def test_identities_that_give_a_name_stay(text: str, kept: str, same: Normalized) -> None:
    model, _ = same(build(text), {"x": floats(2)})
    assert {"Identity", "Dropout"} & set(ops(model)), kept


def test_identity_of_an_outer_value_stays_in_a_branch(same: Normalized) -> None:
    proto = build(
        """g (float[2] x, bool c) => (float[2] y, float[2] a) {
            a = Neg(x)
            y = If (c) <then_branch = one () => (float[2] t) { t = Identity(a) }, else_branch = two () => (float[2] u) { u = Relu(a) }>
        }"""
    )
    for flag in (True, False):
        same(proto, {"x": floats(2), "c": np.array(flag)})


def test_training_dropout_stays(same: Normalized) -> None:
    proto = build("g (float[2] x) => (float[2] y) { y = Dropout(x, ratio, mode) }", ratio=np.float32(0), mode=np.array(True))
    model, _ = same(proto, {"x": floats(2)})
    assert ops(model) == ["Dropout"]


def test_dead_branches_go_with_what_only_they_read(same: Normalized) -> None:
    proto = build(
        """g (float[2] x, bool c) => (float[2] y) {
            y = Relu(x) a = Neg(x) b = Mul(a, w)
            d = If (c) <then_branch = one () => (float[2] t) { t = Neg(b) }, else_branch = two () => (float[2] u) { u = Abs(b) }>
        }""",
        w=floats(2),
    )
    model, _ = same(proto, {"x": floats(2), "c": np.array(True)})
    assert ops(model) == ["Relu"] and not model.graph.initializers


def test_optional_inputs_that_are_left_out_stay_so(same: Normalized) -> None:
    proto = build('g (float[1,1,4] x) => (float[1,1,2] y) { y = Clip(h, "", high) h = MatMul(x, w) }', w=floats(4, 2), high=np.float32(0.5))
    proto.graph.node.insert(0, proto.graph.node.pop(1))
    model, _ = same(proto, {"x": floats(1, 1, 4)})
    assert [value and value.name for value in list(model.graph)[1].inputs] == ["h", None, "high"]


def test_functions_are_inlined(same: Normalized) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N,3] x) => (float[N,4] y) { h = local.dense(x, w) y = Relu(h) }
        <domain: "local", opset_import: ["" : 21]> dense (a, b) => (c) { d = Identity(b) c = MatMul(a, d) }"""
    proto = parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(floats(3, 4), "w"))
    model, _ = same(proto, {"x": floats(2, 3)})
    assert ops(model) == ["MatMul", "Relu"] and not model.functions


def test_a_function_that_cannot_be_inlined_is_refused(normalize: Normalized) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[N,3] x) => (float[N,3] y) { y = local.twice(x) }
        <domain: "local", opset_import: ["" : 18]> twice (a) => (c) { c = Add(a, a) }"""
    with pytest.raises(ModelError, match="cannot be inlined: Opset mismatch") as caught:
        normalize(parser.parse_model(text))
    assert caught.value.hint


def test_emitted_functions_of_graphq_stay(same: Normalized) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21, "graphq" : 1]>
        g (float[N,3] x) => (float[N,3] y) { y = graphq.twice(x) }
        <domain: "graphq", opset_import: ["" : 21]> twice (a) => (c) { c = Add(a, a) }"""
    model, _ = same(parser.parse_model(text), {"x": floats(2, 3)})
    assert ops(model) == ["twice"] and len(model.functions) == 1
