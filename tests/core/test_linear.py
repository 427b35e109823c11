"""linear: each row of the table against what the operator computes, and each reason why a node is not linear."""

from __future__ import annotations

import numpy as np
import pytest

from graphq import ir, linear
from graphq.editor import Editor
from graphq.executor import Executor

RNG = np.random.default_rng(0)
CASES = {
    "MatMul": ("MatMul", {}, "n, 8", (8, 8), None),
    "Gemm": ("Gemm", {}, "n, 8", (8, 8), (8,)),
    "Gemm transB": ("Gemm", {"transB": 1}, "n, 8", (8, 8), (8,)),
    "Conv": ("Conv", {}, "n, 8, 5, 5", (8, 8, 3, 3), (8,)),
    "grouped Conv": ("Conv", {"group": 2}, "n, 8, 5, 5", (8, 4, 3, 3), (8,)),
    "ConvTranspose": ("ConvTranspose", {}, "n, 8, 5, 5", (8, 8, 3, 3), (8,)),
}


def layer(
    op: str, attributes: dict[str, int], shape: str, weight: tuple[int, ...], bias: tuple[int, ...] | None
) -> tuple[ir.Model, ir.Node]:
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]>\nm (float[{shape}] x) => (float y) {{ y = Neg(x) }}')
    edit = Editor(model)
    values = [model.graph.inputs[0], edit.initializer("w", RNG.standard_normal(weight).astype(np.float32))]
    values += [] if bias is None else [edit.initializer("b", RNG.standard_normal(bias).astype(np.float32))]
    node = edit.insert(None, op, values, output="a", attributes=attributes).producer()
    assert node is not None
    model.graph.outputs[0] = node.outputs[0]
    return model, node


def outputs(model: ir.Model) -> np.ndarray:
    shape = [3, *(dim for dim in ir.shape_of(model.graph.inputs[0]) or () if isinstance(dim, int))]
    return Executor(model).run({"x": np.random.default_rng(1).standard_normal(shape).astype(np.float32)})[0]


def index(axis: int, at: int, rank: int) -> tuple[object, ...]:
    return tuple(at if position == axis % rank else slice(None) for position in range(rank))


@pytest.mark.parametrize("case", CASES)
def test_out_axis_and_channel_axis(case: str) -> None:
    """Changing index 3 of the weight's output axis changes index 3 of the output's channel axis, and nothing else."""
    model, node = layer(*CASES[case])  # type: ignore[arg-type]
    assert linear.is_linear(node)
    before = outputs(model)
    weight = ir.constant(linear.weight_of(node))
    assert weight is not None
    changed = weight.copy()
    changed[index(linear.out_axis(node), 3, weight.ndim)] += 1
    Editor(model).set_weight(node, 1, changed)
    moved = outputs(model) != before
    axis = linear.channel_axis(node)
    assert moved[index(axis, 3, moved.ndim)].any()
    assert not np.delete(moved, 3, axis).any()


@pytest.mark.parametrize("case", [case for case in CASES if "grouped" not in case])
def test_in_axis(case: str) -> None:
    """Where the weight's input axis is zero at index 3, channel 3 of the input does not matter."""
    model, node = layer(*CASES[case])  # type: ignore[arg-type]
    weight = ir.constant(linear.weight_of(node))
    assert weight is not None
    changed = weight.copy()
    changed[index(linear.in_axis(node), 3, weight.ndim)] = 0
    Editor(model).set_weight(node, 1, changed)
    shape = [2, *(dim for dim in ir.shape_of(model.graph.inputs[0]) or () if isinstance(dim, int))]
    x = RNG.standard_normal(shape).astype(np.float32)
    other = x.copy()
    other[:, 3] += 5
    np.testing.assert_array_equal(Executor(model).run({"x": x})[0], Executor(model).run({"x": other})[0])
    other[:, 2] += 5
    assert not np.array_equal(Executor(model).run({"x": x})[0], Executor(model).run({"x": other})[0])


@pytest.mark.parametrize("case", CASES)
def test_bias(case: str) -> None:
    model, node = layer(*CASES[case])  # type: ignore[arg-type]
    bias = linear.bias_of(node)
    if CASES[case][4] is None:
        assert bias is None
        return
    before = outputs(model)
    assert bias is not None and bias.name == "b"
    Editor(model).set_weight(node, linear.LINEAR_OPS[node.op_type].bias or 0, ir.constant(bias) + np.float32(1))  # type: ignore[operator]
    np.testing.assert_allclose(outputs(model), before + 1, rtol=1e-4, atol=1e-4)


def test_an_absent_bias() -> None:
    for case in ("Conv", "Gemm", "ConvTranspose"):
        op, attributes, shape, weight, _ = CASES[case]
        _, node = layer(op, attributes, shape, weight, None)  # type: ignore[arg-type]
        assert linear.bias_of(node) is None and linear.is_linear(node)


TEXT = """<ir_version: 10, opset_import: ["" : 21, "other" : 1]>
m (float[2, 2] x, float[2, 2] dynamic) => (float[2, 2] y)
<float[2, 2] w = {1, 2, 3, 4}, float[2] vector = {1, 2}, float[1, 2, 2] stack = {1, 2, 3, 4}, float16[2, 2] half = {1, 2, 3, 4},
 int64[2, 2] whole = {1, 2, 3, 4}, float[2, 0] empty = {}>
{ y = OP }"""


@pytest.mark.parametrize(
    ("op", "reason"),
    [
        ("MatMul(x, w)", None),
        ("Gemm(x, w)", None),
        ("Relu(x)", "not an operator with weights"),
        ("other.MatMul(x, w)", "not an operator with weights"),
        ("MatMul(x, dynamic)", "its weight is not a constant of the graph"),
        ("MatMul(w, x)", "its weight is not a constant of the graph"),
        ("MatMul(x)", "its weight is not a constant of the graph"),
        ("MatMul(x, half)", "its weight is FLOAT16, not float32"),
        ("MatMul(x, whole)", "its weight is INT64, not float32"),
        ("MatMul(x, vector)", "its weight is a vector"),
        ("MatMul(x, stack)", "its weight is a stack of matrices"),
        ("MatMul(x, empty)", "its weight is empty"),
    ],
)
def test_refusals(op: str, reason: str | None) -> None:
    node = ir.from_onnx_text(TEXT.replace("OP", op)).graph[0]
    assert linear.linear_refusal(node) == reason and linear.is_linear(node) == (reason is None)


@pytest.mark.parametrize(
    ("op", "shape", "weight", "expected"),
    [
        ("MatMul", ("n", 5, 8), (8, 4), 5 * 32), ("MatMul", (5, "n", 8), (8, 4), 5 * 32), ("Gemm", ("5*n", 8), (8, 4), 5 * 32),
        ("Gemm", ("n", 8), (8, 4), 32), ("Gemm", ("n + 3", 8), (8, 4), 32), ("Conv", ("n", 3, 9, 9), (4, 3, 3, 3), 49 * 108),
        ("Conv", (2, 3, None, 9), (4, 3, 3, 3), 2 * 7 * 108), ("MatMul", (None, 8), (8, 4), 32),
    ],
)  # fmt: skip
def test_multiply_adds_do_not_depend_on_where_the_batch_is(
    op: str, shape: tuple[int | str | None, ...], weight: tuple[int, ...], expected: float
) -> None:
    _, node = layer(op, {}, "n, 8", weight, None)
    height = [None if dim is None else int(dim) - 2 for dim in shape[2:]] if op == "Conv" else [weight[-1]]
    node.outputs[0].shape = ir.Shape([*(shape[:1] if op == "Conv" else shape[:-1]), *([weight[0]] if op == "Conv" else []), *height])
    assert linear.multiply_adds(node) == expected
