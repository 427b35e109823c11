"""Where quantizers go, and why each node that stays float does: read off the graph and the target's table, no data involved."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.passes import _placement
from graphq.passes._placement import Placement
from graphq.targets import TARGETS, get_target

RNG = np.random.default_rng(0)
SYMMETRIC = ["generic", "tensorrt", "tensorrt-rtx"]


def floats(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def build(text: str, **weights: np.ndarray) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21, "other" : 1]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def place(model: ir.Model, target: str = "onnxruntime", exclude: Sequence[str] = (), keep_float: Sequence[str] = ()) -> Placement:
    kept = {node: "too bad" for node in model.graph if node.name in keep_float}
    return _placement.place(model, get_target(target), exclude=exclude, keep_float=kept)


def anchors(plan: Placement) -> list[str | None]:
    return [node.name for node in plan.anchors]


def readers(plan: Placement) -> dict[str | None, list[tuple[str | None, int]]]:
    return {value.name: [(node.name, index) for node, index in entries] for value, entries in plan.readers.items()}


def names(values: set[ir.Value] | list[ir.Value]) -> set[str | None]:
    return {value.name for value in values}


def reasons(plan: Placement) -> dict[str | None, str]:
    return {node.name: reason for node, reason in plan.skipped}


# ---- what is refused ------------------------------------------------------------------------------------------------

IMAGE = "float[N, 4, 8, 8] x"
GUARDS: dict[str, tuple[str, dict[str, np.ndarray], str]] = {
    "second operand is dynamic": ("g (float[N, 4] x) => (float[N, N] y) { t = Transpose(x) [it] y = MatMul(x, t) }", {}, "not a constant"),
    "weight is an input": ("g (float[N, 4] x, float[4, 4] w) => (float[N, 4] y) { [it] y = MatMul(x, w) }", {}, "not a constant"),
    "weight is the first operand": ("g (float[4, N] x) => (float[4, N] y) { [it] y = MatMul(w, x) }", {"w": floats(4, 4)},
                                    "not a float32 activation"),
    "vector": ("g (float[N, 4] x) => (float[N] y) { [it] y = MatMul(x, w) }", {"w": floats(4)}, "vector"),
    "stack of matrices": ("g (float[2, N, 4] x) => (float[2, N, 4] y) { [it] y = MatMul(x, w) }", {"w": floats(2, 4, 4)}, "stack"),
    "empty weight": ("g (float[N, 0] x) => (float[N, 4] y) { [it] y = MatMul(x, w) }", {"w": floats(0, 4)}, "empty"),
    "float16": ("g (float16[N, 4] x) => (float16[N, 4] y) { [it] y = MatMul(x, w) }", {"w": floats(4, 4).astype(np.float16)},
                "not a float32 activation"),
    "double": ("g (double[N, 4] x) => (double[N, 4] y) { [it] y = MatMul(x, w) }", {"w": floats(4, 4).astype(np.float64)},
               "not a float32 activation"),
    "integers": ("g (int32[N, 4] x) => (int32[N, 4] y) { [it] y = MatMul(x, w) }", {"w": np.ones((4, 4), np.int32)},
                 "not a float32 activation"),
    "constant data": ("g (float[N, 4] x) => (float[N, 4] y) { [it] c = MatMul(k, w) y = Add(x, c) }",
                      {"k": floats(1, 4), "w": floats(4, 4)},
                      "not a float32 activation"),
    "quantized already": ("""g (float[N, 4] x) => (float[N, 4] y)
        { q = QuantizeLinear(x, s, z) d = DequantizeLinear(q, s, z) [it] y = MatMul(d, w) }""",
                          {"w": floats(4, 4), "s": np.float32(0.1), "z": np.uint8(3)}, "quantized already"),
    "quantized weight": ("g (float[N, 4] x) => (float[N, 4] y) { w = DequantizeLinear(q, s) [it] y = MatMul(x, w) }",
                         {"q": np.ones((4, 4), np.int8), "s": np.float32(0.1)}, "quantized already"),
    "no kernel": (f"g ({IMAGE}) => (float[N, 4, 8, 8] y) {{ [it] y = ConvTranspose(x, w) }}", {"w": floats(4, 4, 1, 1)},
                  "no integer kernel"),
}  # fmt: skip


@pytest.mark.parametrize("case", GUARDS)
@pytest.mark.parametrize("target", TARGETS)
def test_refusals(case: str, target: str) -> None:
    text, weights, reason = GUARDS[case]
    plan = place(build(text, **weights), target)
    assert not plan.anchors and not plan.readers and not plan.whole and not plan.groups
    assert list(reasons(plan)) == ["it"] and reason in reasons(plan)["it"]


TWO = f"""g ({IMAGE}) => (float[N, 4, 8, 8] y) {{
    [stem_conv] a = Conv(x, w) [head_conv] b = Conv(a, w) [sum] s = Add(a, b) [last] y = Conv(s, w) }}"""


@pytest.mark.parametrize(
    ("exclude", "left"),
    [
        ((), ["stem_conv", "head_conv", "last"]),
        (("stem_*",), ["head_conv", "last"]),
        (("*_conv",), ["last"]),
        (("Conv",), []),
        (("nothing",), 3),
    ],
)
def test_excluded_by_pattern(exclude: tuple[str, ...], left: list[str] | int) -> None:
    plan = place(build(TWO, w=floats(4, 4, 1, 1)), exclude=exclude)
    assert (len(plan.anchors) if isinstance(left, int) else anchors(plan)) == left
    assert all(reason == "excluded by the recipe" for reason in reasons(plan).values()) and len(plan.anchors) + len(plan.skipped) == 3


@pytest.mark.parametrize("exclude", ["Add", "sum", "su?"])
def test_operators_between_are_excluded_too(exclude: str) -> None:
    model = build(TWO, w=floats(4, 4, 1, 1))
    assert "s" in names(place(model).whole)
    plan = place(model, exclude=[exclude])
    assert "s" not in names(plan.whole) and readers(plan)["s"] == [("last", 0)]  # rounded for the convolution alone


def test_kept_float_with_its_reason() -> None:
    plan = place(build(TWO, w=floats(4, 4, 1, 1)), keep_float=["head_conv"])
    assert anchors(plan) == ["stem_conv", "last"] and reasons(plan) == {"head_conv": "too bad"}
    assert "b" not in readers(plan) and "s" not in names(plan.whole)


def test_operators_of_other_domains_are_nobodys_business() -> None:
    plan = place(build("g (float[N, 4] x) => (float[N, 4] y) { y = other.MatMul(x, w) }", w=floats(4, 4)))
    assert plan == Placement()


# ---- what is quantized ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_value_that_two_layers_read_is_quantized_once(target: str) -> None:
    plan = place(
        build("g (float[N, 4] x) => (float[N, 4] y) { [q] a = MatMul(x, w) [k] b = MatMul(x, w) y = Mul(a, b) }", w=floats(4, 4)), target
    )
    assert readers(plan) == {"x": [("q", 0), ("k", 0)]} and not plan.whole


def test_float_readers_of_a_layers_input_keep_reading_floats() -> None:
    plan = place(build("g (float[N, 4] x) => (float[N, 4] y) { [fc] a = MatMul(x, w) y = Add(a, x) }", w=floats(4, 4)))
    assert readers(plan) == {"x": [("fc", 0)]}


RESIDUAL_CONV = (
    f"g ({IMAGE}) => (float[N, 4, 8, 8] y) {{ [a] a = Conv(x, w) r = Relu(a) [b] b = Conv(r, w) [sum] s = Add(b, r) [c] y = Conv(s, w) }}"
)
RESIDUAL_MATMUL = (
    "g (float[N, 4] x) => (float[N, 4] y) { [a] a = MatMul(x, w) [b] b = MatMul(a, w) [sum] s = Add(b, a) [c] y = MatMul(s, w) }"
)


def test_residual_add_is_integer_behind_convolutions() -> None:
    plan = place(build(RESIDUAL_CONV, w=floats(4, 4, 1, 1)))
    assert names(plan.whole) == {"r", "b", "s", "y"}
    assert readers(plan) == {"r": [("b", 0), ("sum", 1)], "b": [("sum", 0)], "s": [("c", 0)], "y": [], "x": [("a", 0)]}
    assert not plan.groups and not plan.derived


def test_residual_add_stays_float_behind_matmuls() -> None:
    plan = place(build(RESIDUAL_MATMUL, w=floats(4, 4)))
    assert not plan.whole and readers(plan) == {"x": [("a", 0)], "a": [("b", 0)], "s": [("c", 0)]}


@pytest.mark.parametrize("target", SYMMETRIC)
@pytest.mark.parametrize("text", [RESIDUAL_CONV, TWO])
def test_other_targets_quantize_inputs_only(target: str, text: str) -> None:
    plan = place(build(text, w=floats(4, 4, 1, 1)), target)
    assert len(plan.anchors) == 3 and not plan.whole and not plan.groups
    assert all(node in plan.anchors and index == 0 for entries in plan.readers.values() for node, index in entries)


BRANCHES = f"""g ({IMAGE}) => (float[N, 4, 2, 2] y) {{
    [a] a = Conv(x, w) [b] b = Conv(x, w)
    [pool] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a)
    [pool2] o = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (b)
    [join] c = Concat <axis = 1> (p, o)
    [last] y = Conv <strides = [2, 2]> (c, v) }}"""


def test_concat_and_max_pool_share_one_scale() -> None:
    plan = place(build(BRANCHES, w=floats(4, 4, 1, 1), v=floats(4, 8, 1, 1)))
    assert [names(group) for group in plan.groups] == [{"a", "b", "p", "o", "c"}]
    assert names(plan.derived) == {"p", "o", "c"}
    assert {value.name: names(group) for value, group in _placement.tied(plan) if value.name in "xpy"} == {
        "x": {"x"}, "p": {"a", "b", "p", "o", "c"}, "y": {"y"}}  # fmt: skip


FUSED = "[first] a = Conv(x, w)  r = {} [second] y = Conv(r, w)"
CLIP = "Clip(a, low, high)"


@pytest.mark.parametrize("activation", ["Relu(a)", CLIP])
def test_fused_activations_move_the_quantizer_behind_them(activation: str) -> None:
    limits = {"low": np.float32(0), "high": np.float32(6)} if activation == CLIP else {}
    model = build(f"g ({IMAGE}) => (float[N, 4, 8, 8] y) {{ {FUSED.format(activation)} }}", w=floats(4, 4, 1, 1), **limits)
    assert list(readers(place(model))) == ["r", "y", "x"]


@pytest.mark.parametrize(
    ("body", "outputs", "whole"),
    [
        ("[f] a = Conv(x, w) r = Tanh(a) [s] y = Conv(r, w)", "y", {"y"}),  # not fused, and read by floats alone
        ("[f] a = Conv(x, w) r = Relu(a) t = Neg(a) [s] y = Conv(r, w)", "y, t", {"y"}),  # somebody else reads before it
        ("[f] a = Conv(x, w) r = Relu(a) [s] y = Conv(r, w)", "y, a", {"y", "a"}),  # the caller reads before it
    ],
)
def test_what_is_not_fused(body: str, outputs: str, whole: set[str]) -> None:
    declared = ", ".join(f"float[N, 4, 8, 8] {name}" for name in outputs.split(", "))
    plan = place(build(f"g ({IMAGE}) => ({declared}) {{ {body} }}", w=floats(4, 4, 1, 1)))
    assert "r" not in names(plan.whole) and whole <= names(plan.whole)


BROKEN = {
    "constant operand": "[mid] m = Concat <axis = 1> (a, k) [next] y = Conv(m, v)",
    "two outputs": "[mid] m, i = MaxPool <kernel_shape = [1, 1]> (a) "
    "n = Cast <to = 1> (i) o = Concat <axis = 1> (m, n) [next] y = Conv(o, v)",
    "float operand": "[mid] m = Concat <axis = 1> (a, x) [next] y = Conv(m, v)",
    "read by floats": "[mid] m = MaxPool <kernel_shape = [1, 1]> (a) y = Softmax(m)",
    "dynamic shape": "h = Shape(x) t = Identity(h) [mid] m = Reshape(a, t) o = Concat <axis = 1> (m, m) [next] y = Conv(o, v)",
    "no row": "[mid] m = Softmax(a) o = Concat <axis = 1> (m, m) [next] y = Conv(o, v)",
}


@pytest.mark.parametrize("case", BROKEN)
def test_integers_do_not_flow(case: str) -> None:
    """The operator between two layers reads something that is not quantized, or nothing quantized reads it."""
    model = build(f"g ({IMAGE}) => (float[N, M, 8, 8] y) {{ [first] a = Conv(x, w) {BROKEN[case]} }}",
                  w=floats(4, 4, 1, 1), v=floats(4, 8, 1, 1), k=np.zeros((1, 4, 8, 8), np.float32))  # fmt: skip
    plan = place(model)
    assert "m" not in names(plan.whole) and not plan.groups


def patches(channels: int, outputs: int) -> ir.Model:
    """A patch embedding in front of a transformer block whose MatMuls do `outputs` times as much work."""
    body = "[embed] a = Conv <strides = [8, 8]> (x, w) r = Reshape(a, to) t = Transpose <perm = [0, 2, 1]> (r) n = LayerNormalization(t, g)"
    return build(f"g (float[N, 1, 32, 32] x) => (float[N, 16, {outputs}] y) {{ {body} [up] u = MatMul(n, v) s = Softmax(u) y = Neg(s) }}",
                 w=floats(channels, 1, 8, 8), v=floats(channels, outputs), g=floats(channels),
                 to=np.array([0, channels, -1]))  # fmt: skip


def test_patch_embedding_is_not_rounded_for_float_readers() -> None:
    plan = place(patches(8, 2000))
    assert anchors(plan) == ["up"] and "which only float nodes read" in reasons(plan)["embed"]
    assert readers(plan) == {"n": [("up", 0)]}


def test_a_large_first_layer_is_worth_its_rounding() -> None:
    plan = place(patches(8, 100))
    assert anchors(plan) == ["embed", "up"] and "a" in names(plan.whole)


@pytest.mark.parametrize("target", SYMMETRIC)
def test_where_outputs_are_not_rounded_the_patch_embedding_is_quantized(target: str) -> None:
    assert anchors(place(patches(8, 2000), target)) == ["embed", "up"]


IF_MODEL = f"""g ({IMAGE}, bool pick) => (float[N, 4, 8, 8] y) {{
    [outer] a = Conv(x, w)
    [choice] y = If(pick) <
        then_branch = left () => (float[N, 4, 8, 8] p) {{ [inner] p = Conv(a, w) }},
        else_branch = right () => (float[N, 4, 8, 8] q) {{ q = Relu(a) }}> }}"""


def test_subgraphs_are_left_alone() -> None:
    """Their layers stay float, an activation inside is not taken for a fused one, and what they read outside is found."""
    plan = place(build(IF_MODEL, w=floats(4, 4, 1, 1)))
    assert anchors(plan) == ["outer"] and names(plan.whole) == {"a"}
    assert sorted(node.op_type for node, _ in plan.readers[next(iter(plan.whole))]) == ["Conv", "Relu"]


def test_what_no_rule_names_stays_float() -> None:
    """Attention with a huge mask, a positional table and index arithmetic: only the layers' inputs are quantized."""
    model = build("""g (int64[N, 6] ids, float[N, 6, 6] mask) => (float[N, 6, 8] y) {
        length = Shape <start = 1> (ids) pos = Range(zero, six, one) p = Gather(table, pos) e = Gather(words, ids)
        h = Add(e, p) n = LayerNormalization(h, g)
        [q] q = MatMul(n, w) [k] k = MatMul(n, w) [v] v = MatMul(n, w)
        t = Transpose <perm = [0, 2, 1]> (k) [scores] s = MatMul(q, t)
        m = Mul(mask, huge) z = Add(s, m) r = Softmax(z) [mix] c = MatMul(r, v) [out] o = MatMul(c, w) y = Add(o, h) }""",
                  w=floats(8, 8), g=floats(8), table=floats(16, 8), words=floats(50, 8), huge=np.float32(-3e38),
                  zero=np.int64(0), six=np.int64(6), one=np.int64(1))  # fmt: skip
    plan = place(model)
    assert readers(plan) == {"n": [("q", 0), ("k", 0), ("v", 0)], "c": [("out", 0)]}
    assert set(reasons(plan)) == {"scores", "mix"} and not plan.whole


BETWEEN = {
    "HardSwish": ("s = HardSwish(b)", True),
    "SiLU": ("t = Sigmoid(b) s = Mul(b, t)", True),
    "GELU in pieces": ("e = Erf(b) f = Add(e, e) s = Mul(b, f)", True),
    "a normalization": ("s = LayerNormalization<axis=1>(b, g)", False),
    "too long a chain": ("t = Tanh(b) u = Tanh(t) v = Tanh(u) o = Tanh(v) s = Tanh(o)", False),
    "one that the model returns": ("s = HardSwish(b) y = Neg(b)", False),
}


@pytest.mark.parametrize("case", BETWEEN)
def test_a_small_layer_is_quantized_if_only_activations_lie_behind_it(case: str) -> None:
    """Left float, a depthwise convolution would cut the integer part of the model in two."""
    between, expected = BETWEEN[case]
    ends = "(float[] z, float[] y)" if "y =" in between else "(float[] z)"
    text = f"a = Conv(x, w) [it] b = Conv<group=128, pads=[1,1,1,1]>(a, d) {between} z = Conv(s, w)"
    norm = {"g": floats(128, 8, 8)} if "Norm" in between else {}
    model = build(f"g (float[N, 128, 8, 8] x) => {ends} {{ {text} }}", **norm, w=floats(128, 128, 1, 1), d=floats(128, 1, 3, 3))
    plan = place(model)
    assert ("it" in anchors(plan)) == expected
    assert expected or "round its output" in reasons(plan)["it"]
