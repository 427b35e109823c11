"""tune, split-projection: the parts are those that were cut out, whatever the exporter wrote, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from graphq import ir
from graphq.editor import Editor
from graphq.exclude import given_name, is_excluded
from graphq.passes._tune_split import split_projection
from graphq.verify import verify_graph

T, C, H, D = 5, 12, 2, 3
RNG = np.random.default_rng(0)
CONSTANTS: dict[str, np.ndarray] = {
    "w": RNG.standard_normal((C, 3 * H * D)).astype(np.float32), "wt": RNG.standard_normal((3 * H * D, C)).astype(np.float32),
    "b": RNG.standard_normal(3 * H * D).astype(np.float32), "one": np.array([1]), "ones": np.array([1, 1, 1]),
    **{f"i{index}": np.array([index]) for index in range(5)}, **{f"g{index}": np.array(index) for index in range(3)},
    "first": np.array([-1, T, 3, H, D]), "middle": np.array([-1, T, H, 3, D]), "last": np.array([0, 0, H, D, 3]),
    "flat": np.array([-1, 3, H, D]), "wide": np.array([-1, T, 3 * H, D]), "back": np.array([-1]),
}  # fmt: skip
LAYER = "m = MatMul(x, w) v = Add(b, m) "
SLICES = "".join(f" s{i} = Slice(t, i{i}, i{i + 1}, i{{axis}}) {o} = Squeeze(s{i}, i{{axis}})" for i, o in enumerate("qkz"))
FORMS = {
    "torch": LAYER + "r = Reshape(v, first) t = Transpose<perm=[2,0,3,1,4]>(r)" + SLICES.format(axis=0),
    "timm": LAYER + "r = Reshape(v, first) t = Transpose<perm=[2,0,3,1,4]>(r) q = Gather(t, g0) k = Gather(t, g1) z = Gather(t, g2)",
    "split": LAYER + "r = Reshape(v, first) t = Transpose<perm=[2,0,3,1,4]>(r) q, k, z = Split<axis=0, num_outputs=3>(t)",
    "no bias, no transpose": "v = MatMul(x, w) t = Reshape(v, first)" + SLICES.format(axis=2),
    "parts inside heads": LAYER + "t = Reshape(v, middle)" + SLICES.format(axis=3),
    "parts last": LAYER + "t = Reshape(v, last) q = Gather<axis=-1>(t, g0) k = Gather<axis=4>(t, g1) z = Gather<axis=4>(t, g2)",
    "one part used": LAYER + "t = Reshape(v, first) q = Gather<axis=2>(t, g2) k = Relu(q) z = Neg(q)",
}
OTHERS = {
    "two parts at once": LAYER + "t = Reshape(v, first) q = Slice(t, i0, i2, i2) k = Neg(q) z = Abs(q)",
    "another reader": LAYER + "t = Reshape(v, first) q = Gather<axis=2>(t, g0) k = Gather<axis=2>(t, g1) z = Relu(t)",
    "cut along heads": LAYER + "t = Reshape(v, first) q = Gather<axis=3>(t, g0) k = Gather<axis=2>(t, g1) z = Neg(k)",
    "cut along tokens": LAYER + "t = Reshape(v, first) q = Gather<axis=1>(t, g0) k = Gather<axis=1>(t, g1) z = Neg(k)",
    "the sum is returned": "m = MatMul(x, w) z = Add(m, b) t = Reshape(z, first) q = Gather<axis=2>(t, g0) k = Neg(q)",
    "no part at all": LAYER + "r = Reshape(v, wide) t = Transpose<perm=[0,2,1,3]>(r) q = Relu(t) k = Neg(t) z = Abs(t)",
    "a Reshape alone": LAYER + "r = Reshape(v, wide) q = Relu(r) k = Neg(q) z = Neg(k)",
    "a part that is not there": LAYER + "t = Reshape(v, first) q = Slice(t, i3, i4, i2) k = Neg(q) z = Neg(k)",
    "backwards": LAYER + "t = Reshape(v, first) q = Slice(t, i0, i1, i2, back) k = Neg(q) z = Neg(k)",
    "one part returned twice": LAYER + "t = Reshape(v, first) q = Gather<axis=2>(t, g0) k = Gather<axis=2>(t, g0) z = Neg(q)",
    "the bias is no constant": "m = MatMul(x, w) u = Relu(b) v = Add(m, u) t = Reshape(v, first) q = Gather<axis=2>(t, g0)"
    " k = Neg(q) z = Neg(k)",
}


def split(body: str, declared: str = f"float[N,{T},{C}] x") -> tuple[ir.Model, ir.Model, bool]:
    """The model before and after, pruned and checked, and whether anything was changed."""
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    proto = parser.parse_model(f"{head} g ({declared}) => (float[] q, float[] k, float[] z) {{ {body} }}")
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    model = ir.onnx_ir.from_proto(ir.onnx.shape_inference.infer_shapes(proto))
    after = ir.clone(model)
    edit = Editor(after)
    split_projection(edit, after.graph[0])
    changed = bool(edit.edits)
    edit.prune()
    verify_graph(after)
    return model, after, changed


def outputs(model: ir.Model, x: np.ndarray) -> list[Any]:
    return list(ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x}))


@pytest.mark.parametrize("form", FORMS)
def test_every_part_gets_a_product_of_its_own(form: str) -> None:
    before, after, _ = split(FORMS[form])
    x = RNG.standard_normal((2, T, C)).astype(np.float32)
    for old, new in zip(outputs(before, x), outputs(after, x), strict=True):
        assert old.shape == new.shape
        np.testing.assert_allclose(new, old, atol=1e-6)
    layers = [node for node in after.graph if node.op_type == "MatMul"]
    assert len(layers) == (1 if form == "one part used" else 3)
    assert {ir.constant_shape(node.inputs[1]) for node in layers} == {(C, H * D)}
    assert {ir.shape_of(node.outputs[0]) for node in layers} == {("N", T, H * D)}
    assert not {"Slice", "Split", "Gather"} & {node.op_type for node in after.graph}


@pytest.mark.parametrize("bias", ["", ", b"])
def test_a_gemm_is_cut_along_its_own_axis(bias: str) -> None:
    parts = " ".join(f"{out} = Gather<axis=1>(t, g{index})" for index, out in enumerate("qkz"))
    body = f"v = Gemm<transB=1>(x, wt{bias}) t = Reshape(v, flat) {parts}"
    before, after, _ = split(body, f"float[N,{C}] x")
    x = RNG.standard_normal((4, C)).astype(np.float32)
    for old, new in zip(outputs(before, x), outputs(after, x), strict=True):
        np.testing.assert_allclose(new, old, atol=1e-6)
    assert [node.op_type for node in after.graph].count("Gemm") == 3


@pytest.mark.parametrize("case", OTHERS)
def test_everything_else_stays(case: str) -> None:
    before, after, changed = split(OTHERS[case])
    assert not changed and [node.name for node in after.graph] == [node.name for node in before.graph]


def test_parts_remember_what_they_are_parts_of() -> None:
    """So that patterns of names that a user knows still fit, and what was asked for the layer holds for its parts."""
    proto, after, _ = split("[qkv] v = MatMul(x, w) t = Reshape(v, first)" + SLICES.format(axis=2))
    parts = [node for node in after.graph if node.op_type == "MatMul"]
    assert [given_name(node) for node in parts] == ["qkv"] * 3 and len({node.name for node in parts}) == 3
    assert all(is_excluded(node, ["qk*"]) and is_excluded(node, [node.name or ""]) for node in parts)
    assert not any(is_excluded(node, ["q", "Conv"]) for node in parts) and is_excluded(parts[0], ["MatMul"])


def test_one_weight_of_several_layers_is_cut_once() -> None:
    body = (
        "a = MatMul(x, w) r = Reshape(a, first) q = Gather<axis=2>(r, g0) m = MatMul(u, w) t = Reshape(m, first) k = Gather<axis=2>(t, g0)"
    )
    proto = parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,{T},{C}] x, float[N,{T},{C}] u) => (float[] q, float[] k) {{ {body} }}'
    )
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used)
    model = ir.onnx_ir.from_proto(ir.onnx.shape_inference.infer_shapes(proto))
    edit = Editor(model)
    for node in list(model.graph):
        split_projection(edit, node)
    edit.prune()
    weights = [node.inputs[1] for node in model.graph if node.op_type == "MatMul"]
    assert len(weights) == 2 and len(set(weights)) == 1 and ir.constant_shape(weights[0]) == (C, H * D)
