"""Executor: views equal numpy on the whole tensor, a segment equals the whole run, and QDQ numbers are those of the ONNX semantics."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import ir
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.executor import SAMPLE_SIZE, Executor, Fetch, sample_step

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
RNG = np.random.default_rng(0)


def identity(shape: str, kind: str = "float") -> ir.Model:
    """x is an input, y what a node makes of it, w a constant."""
    return ir.from_onnx_text(f"{HEAD}\nm ({kind}[{shape}] x) => ({kind}[{shape}] y)\n<float[3] w = {{3, 1, 2}}> {{ y = Identity(x) }}")


def view(model: ir.Model, x: np.ndarray, kind: str, value: str = "y") -> np.ndarray:
    return Executor(model, [Fetch(value, kind)]).run({"x": x})[0]  # type: ignore[arg-type]


def span(x: np.ndarray) -> list[float]:
    """Minimum and maximum, both extended to 0 as the view is."""
    return [x.min(initial=0), x.max(initial=0)]


def weighted(**weights: tuple[np.ndarray, str]) -> ir.Model:
    """A model without nodes: `x` [n, 8] and constants to build on."""
    model = ir.from_onnx_text('<ir_version: 13, opset_import: ["" : 25]>\nm (float[n, 8] x) => (float[n, 6] y) { y = Neg(x) }')
    for name, (array, storage) in weights.items():
        Editor(model).initializer(name, array, storage)
    return model


# ---- views ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["x", "y"])
@pytest.mark.parametrize("shape", [(2,), (3, 5), (2, 3, 4, 5), (1, 1)])
def test_extrema_equal_numpy(shape: tuple[int, ...], value: str) -> None:
    x = RNG.standard_normal(shape).astype(np.float32)
    model = identity(", ".join(["n", *map(str, shape[1:])]))
    found = view(model, x, "extrema", value)
    assert found.dtype == np.float32 and found.tolist() == span(x)


@pytest.mark.parametrize(
    "op", ["Relu(x)", "Clip(x, zero, six)", "Clip(x, one)", "Sigmoid(x)", "Clip(x, minus, six)", "Clip(x, , six)", "Neg(x)"]
)
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 5), (2, 3, 4, 5), (2, 3, 2, 2, 2), (0, 3, 4, 5)])
def test_extrema_behind_activations(op: str, shape: tuple[int, ...]) -> None:
    """Those that are never negative are pooled instead of reduced."""
    dims = ", ".join(["n", *map(str, shape[1:])])
    model = ir.from_onnx_text(f"{HEAD}\nm (float[{dims}] x) => (float[{dims}] y)\n"
                              f"<float zero = {{0}}, float one = {{1}}, float six = {{6}}, float minus = {{-1}}>\n"
                              f"{{ a = {op}  y = Neg(a) }}")  # fmt: skip
    edit_shape(model)
    x = (4 * RNG.standard_normal(shape)).astype(np.float32)
    assert view(model, x, "extrema", "a").tolist() == span(Executor(model, [Fetch("a")]).run({"x": x})[0])


def edit_shape(model: ir.Model) -> None:
    """What shape inference would do: the first node's output is like its input."""
    model.graph[0].outputs[0].shape, model.graph[0].outputs[0].type = model.graph.inputs[0].shape, model.graph.inputs[0].type


@pytest.mark.parametrize("view_kind", ["whole", "extrema", "sample"])
def test_constants_can_be_looked_at(view_kind: str) -> None:
    found = view(identity("n"), np.zeros(1, np.float32), view_kind, "w")
    assert found.reshape(-1).tolist() == ([0, 3] if view_kind == "extrema" else [3, 1, 2])


@pytest.mark.parametrize("view_kind", ["extrema", "sample"])
def test_scalars(view_kind: str) -> None:
    model = ir.from_onnx_text(f"{HEAD}\nm (float[n] x) => (float y) {{ y = ReduceSum <keepdims = 0> (x) }}")
    found = view(model, np.float32([1, 2]), view_kind)
    assert found.reshape(-1).tolist() == ([0, 3] if view_kind == "extrema" else [3])


@pytest.mark.parametrize("shape", [(5,), (3, 7), (2, 64, 16, 16), (2, 3, 128, 128), (2, 4096, 6), (1, 8192), (2, 32, 33, 35)])
def test_a_sample_is_a_stride_of_each_row(shape: tuple[int, ...]) -> None:
    x = RNG.permutation(math.prod(shape)).reshape(shape).astype(np.float32)
    model = identity(", ".join(["n", *map(str, shape[1:])]))
    step = sample_step(ir.shape_of(model.graph.outputs[0]))
    found = view(model, x, "sample")
    np.testing.assert_array_equal(found, x.reshape(len(x), -1)[:, ::step])
    np.testing.assert_array_equal(found, view(model, x, "sample"))
    assert found.shape[1] <= max(SAMPLE_SIZE * 2, 1) and found.shape[1] >= min(math.prod(shape[1:]), SAMPLE_SIZE // 4)


@pytest.mark.parametrize(
    "shape", [("n", 64, 56, 56), ("n", 56, 56, 64), ("n", 197, 768), ("n", 96, 112, 112), (1, 1024, 7, 7), ("n", 12, 197, 197)]
)
def test_a_sample_takes_every_index_of_every_axis(shape: tuple[int | str, ...]) -> None:
    dims = [dim for dim in shape[1:] if isinstance(dim, int)]
    step = sample_step(shape)
    taken = np.unravel_index(np.arange(0, math.prod(dims), step), dims)
    assert step > 1
    assert [len(np.unique(axis)) for axis in taken] == dims


def test_a_sample_of_unknown_dimensions() -> None:
    model = ir.from_onnx_text(f"{HEAD}\nm (float[n, c, h] x) => (float[n, c, h] y) {{ y = Relu(x) }}")
    x = RNG.random((2, 96, 200), np.float32)
    found = view(model, x, "sample")
    np.testing.assert_array_equal(found, x.reshape(2, -1)[:, :: sample_step(("n", "c", "h"))])


def test_a_sample_of_a_value_without_a_shape() -> None:
    model = ir.from_onnx_text(f"{HEAD}\nm (float[n, 4] x) => (float[n, 4] y) {{ a = Relu(x)  y = Neg(a) }}")
    x = RNG.random((2, 4), np.float32)
    assert sorted(view(model, x, "sample", "a").reshape(-1)) == sorted(x.reshape(-1))


@pytest.mark.parametrize(("shape", "dims"), [("n, 0", (2, 0)), ("n, 3", (0, 3)), ("n, 0, 4", (2, 0, 4)), ("n, 3, 4", (0, 3, 4))])
def test_tensors_of_no_elements(shape: str, dims: tuple[int, ...]) -> None:
    x = np.zeros(dims, np.float32)
    model = identity(shape)
    assert view(model, x, "whole").shape == dims
    assert view(model, x, "extrema").tolist() == [0, 0]
    assert view(model, x, "sample").size == 0


@pytest.mark.parametrize(("kind", "dtype"), [("int64", np.int64), ("int32", np.int32), ("bool", np.bool_), ("float16", np.float16),
                                             ("double", np.float64),
                                             ("uint8", np.uint8)])  # fmt: skip
def test_other_element_types_pass_through(kind: str, dtype: type) -> None:
    x = RNG.integers(0, 2, (2, 3)).astype(dtype)
    found = view(identity("n, 3", kind), x, "whole")
    assert found.dtype == dtype
    np.testing.assert_array_equal(found, x)


def test_views_beside_each_other_in_the_asked_order() -> None:
    x = RNG.standard_normal((2, 3)).astype(np.float32)
    fetches = [Fetch("y", "extrema"), Fetch("x"), Fetch("y"), Fetch("y", "sample"), Fetch("w"), Fetch("x", "extrema")]
    extrema, whole_x, y, sample, w, low_high = Executor(identity("n, 3"), fetches).run({"x": x})
    assert extrema.tolist() == low_high.tolist() == span(x)
    for found in (whole_x, y, sample):
        np.testing.assert_array_equal(found, x)
    assert w.tolist() == [3, 1, 2]


def test_the_same_value_twice_is_an_error() -> None:
    with pytest.raises(ValueError, match="fetched twice"):
        Executor(identity("n"), [Fetch("y"), Fetch("y")])


def test_dynamic_axes_take_any_size() -> None:
    executor = Executor(ir.from_onnx_text(f"{HEAD}\nm (float[n, s] x) => (float[n, s] y) {{ y = Neg(x) }}"))
    for shape in ((1, 1), (3, 7), (2, 100)):
        x = RNG.random(shape, np.float32)
        np.testing.assert_array_equal(executor.run({"x": x})[0], -x)


def test_streams_follow_the_batches() -> None:
    batches = [{"x": np.full(2, index, np.float32)} for index in range(3)]
    assert [found[0].tolist() for found in Executor(identity("n")).stream(batches)] == [[0, 0], [1, 1], [2, 2]]


# ---- weights, segments, errors --------------------------------------------------------------------------------------


def test_the_session_sees_weights_of_every_size_and_type() -> None:
    for array in (RNG.standard_normal((8, 64)).astype(np.float32), RNG.standard_normal((8, 2)).astype(np.float32),
                  np.asfortranarray(RNG.standard_normal((8, 64)).astype(np.float32))):  # fmt: skip
        model = weighted(w=(array, "float32"))
        model.graph.outputs[0] = Editor(model).insert(None, "MatMul", [model.graph.inputs[0], model.graph.initializers["w"]], output="a")
        x = RNG.standard_normal((3, 8)).astype(np.float32)
        np.testing.assert_allclose(Executor(model).run({"x": x})[0], x @ array, rtol=1e-5, atol=1e-5)


SEGMENTED = f"""{HEAD}
m (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] w = {{1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}}, float[4] b = {{1, -1, 2, -2}}>
{{ a = MatMul(x, w)  c = Relu(x)  d = Add(a, c)  e = Add(d, b)  y = Mul(e, a) }}"""


@pytest.mark.parametrize("cut", range(1, 5))
def test_two_segments_equal_one_run(cut: int) -> None:
    model = ir.from_onnx_text(SEGMENTED)
    x = RNG.standard_normal((3, 4)).astype(np.float32)
    nodes = list(model.graph)
    names = [node.outputs[0].name or "" for node in nodes]
    whole = dict(zip(names, Executor(model, [Fetch(name) for name in names]).run({"x": x}), strict=True))
    kinds = {name: np.dtype(np.float32) for name in ["x", *names]}
    first = dict(
        zip(names, Executor(model, [Fetch(name) for name in names[:cut]], nodes=nodes[:cut], feeds=kinds).run({"x": x}), strict=False)
    )
    second = Executor(model, [Fetch(name) for name in names[cut:]], nodes=nodes[cut:], feeds=kinds).run({"x": x, **first})
    for name, found in [*first.items(), *zip(names[cut:], second, strict=True)]:
        np.testing.assert_array_equal(found, whole[name], err_msg=name)


def test_a_segment_shares_its_feeds_by_view() -> None:
    model = ir.from_onnx_text(SEGMENTED)
    d = RNG.standard_normal((3, 4)).astype(np.float32)
    found = Executor(model, [Fetch("d", "extrema"), Fetch("e")], nodes=[model.graph[3]], feeds={"d": d.dtype}).run({"d": d})
    assert found[0].tolist() == span(d)
    np.testing.assert_array_equal(found[1], d + np.float32([1, -1, 2, -2]))


def test_missing_and_wrong_feeds_are_named() -> None:
    executor = Executor(identity("n, 3"))
    with pytest.raises(ModelError, match="(?s)Input 'x' was not fed.*x"):
        executor.run({"z": np.zeros((1, 3), np.float32)})
    with pytest.raises(ModelError, match=r"(?s)x float32\[1, 4\]"):
        executor.run({"x": np.zeros((1, 4), np.float32)})
    with pytest.raises(ModelError, match=r"(?s)x float64\[1, 3\]"):
        executor.run({"x": np.zeros((1, 3))})
    assert executor.run({"x": np.ones((1, 3), np.float32), "more": np.zeros(1)})[0].tolist() == [[1, 1, 1]]


def test_a_model_that_cannot_be_loaded() -> None:
    unknown = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["" : 21, "custom" : 1]>\nm (float[n] x) => (float[n] y) { y = custom.Thing(x) }'
    )
    with pytest.raises(ModelError, match="(?s)cannot load the model.*Thing"):
        Executor(unknown)


def test_a_fetch_of_nothing() -> None:
    with pytest.raises(ModelError, match="absent"):
        Executor(identity("n"), [Fetch("absent")])


# ---- exact semantics ------------------------------------------------------------------------------------------------


def quantized_matmul(storage: str, block: int | None, axis: int | None, activation: bool) -> ir.Model:
    """MatMul of x [n, 8] (through a QDQ pair if `activation`) with an 8 x 6 weight behind a DequantizeLinear."""
    kinds = {"int4": ml_dtypes.int4, "uint4": ml_dtypes.uint4, "int2": ml_dtypes.int2, "int8": np.int8, "uint8": np.uint8}
    info = ml_dtypes.iinfo(kinds[storage])
    codes = np.random.default_rng(5).integers(info.min, int(info.max) + 1, (8, 6)).astype(np.int16)
    shape = () if axis is None else (6,) if block is None else (8 // block, 6)
    scale = np.random.default_rng(6).uniform(0.01, 0.1, shape).astype(np.float32)
    zero = np.random.default_rng(7).integers(info.min, int(info.max) + 1, shape)
    model = weighted(
        q=(codes, storage), s=(scale, "float32"), z=(zero, storage), xs=(np.float32(0.02), "float32"), xz=(np.uint8(100), "uint8")
    )
    edit, values, anchor = Editor(model), model.graph.initializers, model.graph[0]
    attributes = {} if axis is None else {"axis": 0 if block else 1, **({"block_size": block} if block else {})}
    weight = edit.insert(anchor, "DequantizeLinear", [values["q"], values["s"], values["z"]], output="w", attributes=attributes)
    data = model.graph.inputs[0]
    if activation:
        codes_x = edit.insert(anchor, "QuantizeLinear", [data, values["xs"], values["xz"]], output="xq")
        data = edit.insert(anchor, "DequantizeLinear", [codes_x, values["xs"], values["xz"]], output="xd")
    edit.replace(model.graph.outputs[0], edit.insert(anchor, "MatMul", [data, weight], output="product", like=model.graph.outputs[0]))
    edit.prune()
    return model


@pytest.mark.parametrize("activation", [False, True])
@pytest.mark.parametrize(("block", "axis"), [(None, None), (None, 1), (4, 0)])
@pytest.mark.parametrize("storage", ["int4", "uint4", "int2", "int8", "uint8"])
def test_qdq_numbers_are_those_of_the_semantics(storage: str, block: int | None, axis: int | None, activation: bool) -> None:
    """METHODS.md 1.2: by default ORT makes MatMulNBits with int8 activations of some of these, 2 % off."""
    model = quantized_matmul(storage, block, axis, activation)
    x = RNG.standard_normal((5, 8)).astype(np.float32)
    names = ["w", "xd"] if activation else ["w"]
    found = dict(zip(names, Executor(model, [Fetch(name) for name in names]).run({"x": x}), strict=True))
    expected = dict(zip(names, ReferenceEvaluator(_with_outputs(model, names)).run(None, {"x": x}), strict=True))
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)
    product = Executor(model).run({"x": x})[0]
    exact = (expected["xd"] if activation else x).astype(np.float64) @ expected["w"].astype(np.float64)
    np.testing.assert_allclose(product, exact, rtol=2e-6, atol=2e-6)


def _with_outputs(model: ir.Model, names: list[str]) -> object:
    from onnx import helper

    proto = ir.to_proto(model)
    proto.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in names)
    del proto.graph.output[0]
    return proto


@pytest.mark.parametrize("sizes", [(64, 32)])
def test_a_large_blocked_int4_matmul_keeps_float_activations(sizes: tuple[int, int]) -> None:
    """Large enough for MatMulNBits to take it: block 32, and rows that int8 activations would round."""
    depth, width = sizes
    model = ir.from_onnx_text(f"{HEAD}\nm (float[n, {depth}] x) => (float[n, {width}] y) {{ y = Neg(x) }}")
    edit = Editor(model)
    codes = RNG.integers(-8, 8, (depth, width)).astype(np.int8)
    scale = RNG.uniform(0.01, 0.1, (depth // 32, width)).astype(np.float32)
    inputs = [edit.initializer("q", codes, "int4"), edit.initializer("s", scale)]
    weight = edit.insert(None, "DequantizeLinear", inputs, output="w", attributes={"axis": 0, "block_size": 32})
    edit.replace(model.graph.outputs[0], edit.insert(model.graph[0], "MatMul", [model.graph.inputs[0], weight], output="p",
                                                     like=model.graph.outputs[0], after=True))  # fmt: skip
    edit.prune()
    x = (RNG.standard_normal((4, depth)) * np.geomspace(1e-3, 1e3, depth)).astype(np.float32)
    exact = x.astype(np.float64) @ (codes * np.repeat(scale.astype(np.float64), 32, 0))
    error = np.abs(Executor(model).run({"x": x})[0] - exact).max() / np.abs(exact).max()
    assert error < 1e-6


LARGE = np.arange(64 * 64, dtype=np.float32).reshape(64, 64)


@pytest.mark.parametrize("place", ["nobody", "a dead node", "a node behind the fetch", "a branch", "the output", "two nodes"])
def test_large_weights_may_be_read_by(place: str) -> None:
    """Sessions share weights over 1 KiB by name, and ONNX Runtime must still know the name by then."""
    bodies = {
        "nobody": "y = Neg(x)",
        "a dead node": "d = MatMul(x, w)  y = Neg(x)",
        "a node behind the fetch": "y = Neg(x)  z = MatMul(y, w)",
        "a branch": "y = If(c) <then_branch = l () => (float[n, 64] p) { p = MatMul(x, w) }, "
        "else_branch = r () => (float[n, 64] q) { q = Neg(x) }>",
        "the output": "y = Neg(x)",
        "two nodes": "d = MatMul(x, w)  e = MatMul(d, w)  y = Sub(e, e)",
    }
    outputs = "float[n, 64] y, float[64, 64] w" if place == "the output" else "float[n, 64] y"
    model = ir.from_onnx_text(f"{HEAD}\nm (float[n, 64] x, bool c) => ({outputs})\n"
                              f"<float[64, 64] w = {{{', '.join(map(str, range(4096)))}}}>\n"
                              f"{{ {bodies[place]} }}")  # fmt: skip
    x = RNG.standard_normal((2, 64)).astype(np.float32)
    for fetches in (None, [Fetch("y"), Fetch("w", "extrema")], [Fetch("y", "extrema"), Fetch("w")]):
        found = Executor(model, fetches).run({"x": x, "c": np.array(True)})
        expected = x @ LARGE if place == "a branch" else x - x if place == "two nodes" else -x
        wanted = span(expected) if fetches and fetches[0].view == "extrema" else expected
        np.testing.assert_allclose(found[0], wanted, rtol=1e-4, atol=1e-2)
        if len(found) > 1:
            np.testing.assert_array_equal(found[1], [0, 4095] if fetches and fetches[1].view == "extrema" else LARGE)
