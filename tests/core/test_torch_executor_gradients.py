"""Gradients of quantizers are those of LSQ, and of operators without backend tests in floats those of finite differences."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")

from graphq import ir, ops_softmax  # noqa: E402
from graphq.editor import Editor  # noqa: E402
from graphq.functions import call  # noqa: E402
from graphq.torch_executor import OPERATORS, TorchExecutor  # noqa: E402

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
F64 = {"device": "cpu", "dtype": torch.float64}


def leaf(values: object) -> torch.Tensor:
    return torch.tensor(np.asarray(values, np.float64), requires_grad=True)


def model(inputs: str, body: str, constants: str = "") -> ir.Model:
    return ir.from_onnx_text(f"{HEAD}\nm ({inputs}) => (float[] y)\n<{constants}> {{ {body} }}")


# ---- straight-through -----------------------------------------------------------------------------------------------


QDQ = "q = QuantizeLinear {attributes}(x, s, z) y = DequantizeLinear {attributes}(q, s, z)"


def fake_quantized(x: torch.Tensor, scale: torch.Tensor, kind: str, zero: object, attributes: str = "") -> torch.Tensor:
    zero_text = ", ".join(map(str, np.ravel(zero)))
    text = f"{kind}[{','.join(map(str, np.shape(zero)))}] z = {{{zero_text}}}".replace("[]", "")
    run = TorchExecutor(model("float[] x, float[] s", QDQ.format(attributes=attributes), text), **F64)
    return run.run({"x": x, "s": scale})[0]


@pytest.mark.parametrize(
    ("kind", "low", "high", "zero"),
    [("int8", -128, 127, 0), ("uint8", 0, 255, 128), ("int8", -128, 127, -37), ("int4", -8, 7, 0), ("uint4", 0, 15, 3),
     ("int16", -(2**15), 2**15 - 1, 5)],
)  # fmt: skip
def test_gradients_of_a_quantizer_are_those_of_lsq(kind: str, low: int, high: int, zero: int) -> None:
    """arXiv 1902.08153, equations 3 and 5, with a zero point: bounds move by it. Some elements lie outside, one exactly on a bound."""
    rng = np.random.default_rng(0)
    x, scale = leaf(rng.normal(size=200) * 0.6 * (high - low)), leaf(0.7)
    with torch.no_grad():
        x[0] = (high - zero) * 0.7
    y = fake_quantized(x, scale, kind, zero)
    weight = torch.tensor(rng.normal(size=200))
    (y * weight).sum().backward()
    v = (x / scale).detach()
    below, above = v < low - zero, v > high - zero
    assert below.any() and above.any()
    inside = ~(below | above)
    slope = torch.where(below, low - zero, torch.where(above, high - zero, torch.round(v) - v))
    assert torch.allclose(y.detach(), torch.clamp(torch.round(v), low - zero, high - zero) * 0.7)
    assert torch.allclose(x.grad, weight * inside)
    assert torch.allclose(scale.grad, (weight * slope).sum())


def test_a_scale_per_channel_or_block_gets_its_own_gradient() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(3, 8)) * 4
    for attributes, shape in (("<axis: int = 0>", (3,)), ("<axis: int = 1, block_size: int = 4>", (3, 2))):
        scale = rng.uniform(0.02, 0.05, shape)
        given = leaf(scale)
        fake_quantized(leaf(x), given, "int8", np.zeros(shape, int), attributes).sum().backward()
        for place in np.ndindex(shape):
            part = x[place] if len(shape) == 1 else x[place[0], 4 * place[1] : 4 * place[1] + 4]
            alone = leaf(scale[place])
            fake_quantized(leaf(part), alone, "int8", 0).sum().backward()
            assert torch.allclose(given.grad[place], alone.grad)


def test_small_floats_pass_gradients_inside_their_range() -> None:
    x, scale = leaf([0.3, -447.0, 900.0, 1e-9]), leaf(1.0)
    run = TorchExecutor(model("float[4] x, float s", QDQ.format(attributes=""), "float8e4m3fn z = {0}"), **F64)
    y = run.run({"x": x, "s": scale})[0]
    y.sum().backward()
    assert y.tolist() == [0.3125, -448.0, 448.0, 0.0]
    assert x.grad.tolist() == [1.0, 1.0, 0.0, 1.0]


def test_codes_may_be_fed_as_floats() -> None:
    """As AdaRound does, which learns between which two codes a weight lies."""
    constants = "int8[2, 2] c = {1, 2, 3, 4}, float s = {0.5}"
    run = TorchExecutor(model("float[2, 2] x", "w = DequantizeLinear(c, s) y = MatMul(x, w)", constants), **F64)
    codes, x = leaf([[1.5, 2], [3, 4]]), torch.ones(2, 2, dtype=torch.float64)
    assert run.run({"x": x})[0].tolist() == [[2, 3], [2, 3]]
    y = run.run({"x": x, "c": codes})[0]
    y.sum().backward()
    assert y.tolist() == [[2.25, 3], [2.25, 3]] and codes.grad.tolist() == [[1, 1], [1, 1]]


def test_rounding_in_the_functions_of_graphq_is_straight_through() -> None:
    """The quantized softmax passes gradients on; a Round of the model itself has none."""
    whole = model("float[2, 6] x", "y = Identity(x)")
    edit = Editor(whole)
    params = edit.initializer("params", np.array([0.02, -2.0, 0.2, -3.6, -0.6], np.float32))
    node = whole.graph[0]
    made = call(edit, ops_softmax.SOFTMAX, node, [whole.graph.inputs[0], params], output="levels", like=node.outputs[0], after=False)
    edit.rewire(node, 0, made)
    x = torch.randn(2, 6, requires_grad=True, generator=torch.Generator().manual_seed(0))
    y = TorchExecutor(whole, device="cpu").run({"x": x})[0]
    assert np.allclose(y.detach(), ops_softmax.sulq_softmax(x.detach().numpy(), params.const_value.numpy()), atol=1e-6)
    (y * torch.arange(12).reshape(2, 6)).sum().backward()
    assert x.grad.abs().min() > 0
    plain = TorchExecutor(model("float[] x", "y = Round(x)"), device="cpu").run({"x": x})[0]
    assert torch.autograd.grad(plain.sum(), x)[0].abs().max() == 0


# ---- finite differences ---------------------------------------------------------------------------------------------

BRANCH = ("c = Greater(t, h) y = If (c) <then_branch = g1 () => (float[] a) { a = Mul(x, x) }, "
          "else_branch = g2 () => (float[] b) { b = Exp(x) }>")  # fmt: skip
SEQUENCE = ("q = SequenceConstruct(x, w, x) r = SequenceInsert(q, w, one) e = SequenceErase(r, zero) a = SequenceAt(e, one) "
            "b = ConcatFromSequence <axis: int = 0>(e) d = Mul(a, w) y = Mul(b, b)")  # fmt: skip


@pytest.mark.parametrize(
    ("shapes", "body"),
    [
        ({"x": (2, 3)}, "y = Cast <to: int = 11>(x)"),
        ({"x": (2, 3), "w": (2, 3)}, "y = CastLike(x, w)"),
        ({"x": (1, 3, 4)}, "y = GlobalLpPool <p: int = 3>(x)"),
        ({"x": (4, 3)}, "y = Trilu <upper: int = 0>(x)"),
        ({"x": (2, 3), "t": ()}, BRANCH),
        ({"x": (2, 3), "w": (2, 3)}, SEQUENCE),
        ({"x": (2, 3)}, "o = Optional(x) g = OptionalGetElement(o) y = Mul(g, x)"),
    ],
    ids=["Cast", "CastLike", "GlobalLpPool", "Trilu", "If", "sequences", "Optional"],
)
@pytest.mark.parametrize("t", [1.0, -1.0])
def test_gradients_are_those_of_finite_differences(shapes: dict[str, tuple[int, ...]], body: str, t: float) -> None:
    inputs = ", ".join(f"float[{', '.join(map(str, shape))}] {name}" for name, shape in shapes.items()).replace("[] ", " ")
    run = TorchExecutor(model(inputs, body, "int64 zero = {0}, int64 one = {1}, float h = {0.5}"), **F64)
    rng = np.random.default_rng(0)
    moved = {name: leaf(rng.uniform(0.5, 1.5, shape)) for name, shape in shapes.items() if name != "t"}

    def function(*tensors: torch.Tensor) -> torch.Tensor:
        return run.run({"t": np.float64(t), **dict(zip(moved, tensors, strict=True))})[0]

    assert torch.autograd.gradcheck(function, list(moved.values()))


def test_every_statistic_of_a_normalization_can_be_trained() -> None:
    """torch's own batch_norm has no gradient with respect to its running statistics."""
    inputs = "float[4, 3, 2] x, float[3] a, float[3] b, float[3] m, float[3] v"
    run = TorchExecutor(model(inputs, "y = BatchNormalization(x, a, b, m, v)"), **F64)
    rng = np.random.default_rng(0)
    values = [leaf(rng.normal(size=(4, 3, 2))), *(leaf(rng.uniform(0.5, 1.5, 3)) for _ in range(4))]
    assert torch.autograd.gradcheck(lambda *given: run.run(dict(zip("xabmv", given, strict=True)))[0], values)


def test_which_operators_have_no_gradient_is_written_down() -> None:
    none = {name for name, entry in OPERATORS.items() if entry.gradient == "none"}
    through = {name for name, entry in OPERATORS.items() if entry.gradient == "through"}
    assert {"ArgMax", "Equal", "Shape", "NonZero", "Round", "Floor"} <= none
    assert through == {"QuantizeLinear", "DynamicQuantizeLinear", "QLinearMatMul", "QLinearConv"}
