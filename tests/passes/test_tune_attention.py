"""tune, attention-bias: the model computes the same without the Adds of keys and values; look-alikes keep theirs."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from graphq import ir
from graphq.editor import Editor
from graphq.passes._tune_attention import attention_bias
from graphq.verify import verify_graph

T, C, H, D = 5, 12, 3, 4
RNG = np.random.default_rng(0)
CONSTANTS: dict[str, np.ndarray] = {
    **{f"w{part}": RNG.standard_normal((C, C)).astype(np.float32) / 2 for part in "qkvo"},
    **{f"b{part}": RNG.standard_normal(C).astype(np.float32) for part in "qkvo"},
    "heads": np.array([0, 0, H, D]), "back": np.array([0, 0, C]), "flat": np.array([-1, C]), "turned": np.array([C, -1]),
    "half": np.array(0.5, np.float32), "two": np.array([2], np.float32),
    "mask": np.where(np.arange(T) < 3, 0, -1e4).astype(np.float32), "slope": RNG.standard_normal((1, T)).astype(np.float32),
}  # fmt: skip


def projection(part: str, perm: str = "0,2,1,3") -> str:
    text = "m_ = MatMul(x, w_) a_ = Add(m_, b_) r_ = Reshape(a_, heads) t_ = Transpose<perm=[{perm}]>(r_) "
    return text.replace("_", part).replace("{perm}", perm)


Q, K, V, KEYS = projection("q"), projection("k"), projection("v"), projection("k", "0,2,3,1")
LAST = " ot = Transpose<perm=[0,2,1,3]>(o) ob = Reshape(ot, back) mo = MatMul(ob, wo) y = Add(mo, bo)"
PLAIN = "s = MatMul(tq, tk) p = Softmax<axis=-1>(s) o = MatMul(p, tv)" + LAST
BOTH = {
    "plain": Q + KEYS + V + PLAIN,
    "transposed twice": Q + K + V + "kt = Transpose<perm=[0,1,3,2]>(tk) s = MatMul(tq, kt) p = Softmax<axis=3>(s) o = MatMul(p, tv)" + LAST,
    "scores are scaled": Q + KEYS + V + "s = MatMul(tq, tk) d = Div(s, two) p = Softmax(d) o = MatMul(p, tv)" + LAST,
    "scaled, with a mask": Q + KEYS + V + "s = MatMul(tq, tk) d = Mul(half, s) e = Add(mask, d) p = Softmax(e) o = MatMul(p, tv)" + LAST,
    "keys are scaled": Q + KEYS + V + "n = Mul(tk, half) s = MatMul(tq, n) p = Softmax(s) o = MatMul(p, tv)" + LAST,
    "the last is a Gemm": Q + KEYS + V + PLAIN.replace("ob = Reshape(ot, back) mo = MatMul(ob, wo) y = Add(mo, bo)",
                                                         "ob = Reshape(ot, flat) y = Gemm(ob, wo, bo)"),
}  # fmt: skip
KEYS_ONLY = {
    "no bias behind": BOTH["plain"].replace("mo = MatMul(ob, wo) y = Add(mo, bo)", "y = MatMul(ob, wo)"),
    "values pass a Relu": BOTH["plain"].replace("MatMul(p, tv)", "MatMul(p, u)").replace(" o =", " u = Relu(tv) o ="),
    "values are scaled": BOTH["plain"].replace("MatMul(p, tv)", "MatMul(p, u)").replace(" o =", " u = Mul(tv, half) o ="),
    "attention is changed": BOTH["plain"].replace("MatMul(p, tv)", "MatMul(u, tv)").replace(" o =", " u = Mul(p, half) o ="),
    "attention is read twice": BOTH["plain"].replace("MatMul(p, tv)", "MatMul(u, tv)").replace(" o =", " n = Neg(p) u = Add(p, n) o ="),
}
KEYS_ONLY |= {
    "the Gemm behind is scaled": BOTH["the last is a Gemm"].replace("Gemm(", "Gemm<alpha = 0.5>("),
    "the Gemm behind is transposed": BOTH["the last is a Gemm"].replace("Gemm(", "Gemm<transA = 1>(").replace("flat)", "turned)"),
}
VALUES_ONLY = {
    "keys pass a Relu": BOTH["plain"].replace("MatMul(tq, tk)", "MatMul(tq, u)").replace(" s =", " u = Relu(tk) s ="),
    "keys differ by position": BOTH["plain"].replace("MatMul(tq, tk)", "MatMul(tq, u)").replace(" s =", " u = Mul(tk, slope) s ="),
    "keys are read twice": BOTH["plain"].replace("MatMul(tq, tk)", "MatMul(n, tk)")
    .replace(" s =", " c = ReduceMean(tk) n = Add(tq, c) s ="),
    "scores are cut": BOTH["plain"].replace("Softmax<axis=-1>(s)", "Softmax(u)").replace(" p =", " u = Relu(s) p ="),
}
NONE = {
    "softmax over queries": BOTH["plain"].replace("axis=-1", "axis=2"),
    "queries and keys swapped": Q.replace("0,2,1,3", "0,2,3,1") + K + V
    + "s = MatMul(tk, tq) p = Softmax<axis=2>(s) o = MatMul(p, tv)" + LAST,
    "the biases are no constants": BOTH["plain"].replace("Add(mk, bk)", "Add(mk, x)").replace("Add(mv, bv)", "Add(mv, x)"),
}  # fmt: skip

def rewrite(body: str, also: str = "") -> tuple[ir.Model, ir.Model]:
    """The model before and after; `also` is an inner value that it returns, too."""
    ends = f"(float[] y, float[] {also})" if also else "(float[] y)"
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g (float[N,{T},{C}] x) => {ends} {{ {body} }}')
    used = {name for node in proto.graph.node for name in node.input}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in CONSTANTS.items() if name in used)
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    model = ir.onnx_ir.from_proto(ir.onnx.shape_inference.infer_shapes(proto))
    after = ir.clone(model)
    edit = Editor(after)
    for node in list(after.graph):
        attention_bias(edit, node)
    verify_graph(after)
    return model, after


def added(model: ir.Model) -> set[str]:
    """The biases that are still added."""
    return {value.name or "" for node in model.graph if node.op_type == "Add" for value in node.inputs if value is not None} & {"bk", "bv"}


CASES = [(body, left) for group, left in ((BOTH, set[str]()), (KEYS_ONLY, {"bv"}), (VALUES_ONLY, {"bk"})) for body in group.values()]
NAMES = [*BOTH, *KEYS_ONLY, *VALUES_ONLY]


@pytest.mark.parametrize(("body", "left"), CASES, ids=NAMES)
def test_the_function_stays_without_the_adds(body: str, left: set[str]) -> None:
    before, after = rewrite(body)
    assert added(before) == {"bk", "bv"} and added(after) == left
    x = RNG.standard_normal((2, T, C)).astype(np.float32)
    old, new = (ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0] for model in (before, after))
    np.testing.assert_allclose(new, old, atol=2e-6 * np.abs(old).max())


@pytest.mark.parametrize(("value", "left"), [("ob", {"bv"}), ("tk", {"bk"}), ("s", {"bk"}), ("tv", {"bv"}), ("p", set())])
def test_what_the_model_returns_keeps_its_value(value: str, left: set[str]) -> None:
    before, after = rewrite(BOTH["plain"], also=value)
    assert added(after) == left and [out.name for out in after.graph.outputs] == ["y", value]
    x = RNG.standard_normal((2, T, C)).astype(np.float32)
    for old, new in zip(*(ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x}) for model in (before, after)), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-6 * np.abs(old).max())


@pytest.mark.parametrize("body", NONE.values(), ids=NONE)
def test_look_alikes_are_left_alone(body: str) -> None:
    before, after = rewrite(body)
    assert ir.to_proto(after).SerializeToString() == ir.to_proto(before).SerializeToString()
