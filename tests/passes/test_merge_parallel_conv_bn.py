"""merge-parallel-conv-bn: branches of the same input become one operator that computes the same; and which stay as they are."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir, linear
from graphq.calibration import random_calibration
from graphq.errors import RecipeError
from graphq.executor import Executor
from graphq.passes.merge_parallel_conv_bn import MergeParallelConvBn
from graphq.passes.normalize import BATCH_NORM, Normalize
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "merge_parallel_conv_bn"
CHANNELS = 8


def build(body: str, *, x: str = "N, 8, 9, 9", y: str = "N, C, H, W", seed: int = 0, **shapes: tuple[int, ...]) -> onnx.ModelProto:
    """A model of x with random weights: `v_...` are variances."""
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[{x}] x) => (float[{y}] y) {{ {body} }}')
    rng = np.random.default_rng(seed)
    for name, shape in shapes.items():
        array = rng.uniform(0.5, 2, shape) if name.startswith("v_") else rng.normal(size=shape)
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return proto


def norm(name: str, source: str, result: str) -> str:
    return f"[{name}] {result} = BatchNormalization({source}, g_{name}, b_{name}, m_{name}, v_{name})\n"


def norm_weights(*names: str) -> dict[str, tuple[int, ...]]:
    return {f"{kind}_{name}": (CHANNELS,) for name in names for kind in "gbmv"}


def merge(proto: onnx.ModelProto, *others: Pass, **options: Any) -> tuple[ir.Model, PassRecord]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    data = random_calibration(ir.inputs(model), 1)
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    record = run_passes([*others, MergeParallelConvBn(**options)], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return model, record


def outputs(model: ir.Model | onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    model = onnx_ir.from_proto(model) if isinstance(model, onnx.ModelProto) else model
    return Executor(model, threads=1).run({"x": x})[0].astype(np.float64)


def same(proto: onnx.ModelProto, *others: Pass, shape: tuple[int, ...] = (2, 8, 9, 9), **options: Any) -> tuple[ir.Model, PassRecord]:
    """Merge, and require outputs within 1e-6 of the largest."""
    model, record = merge(proto, *others, **options)
    x = np.random.default_rng(7).standard_normal(shape).astype(np.float32)
    before = outputs(proto, x)
    np.testing.assert_allclose(outputs(model, x), before, rtol=0, atol=1e-6 * np.abs(before).max())
    return model, record


def ops(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def kernel(model: ir.Model, name: str) -> np.ndarray:
    node = next(node for node in model.graph if node.name == name)
    return np.asarray(ir.constant(linear.weight_of(node)))


def dump(model: ir.Model) -> str:
    rows = [f"{name}: {np.asarray(ir.constant(value)).round(3).tolist()}" for name, value in model.graph.initializers.items()]
    rows += [
        f"[{node.name}] {node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)}) "
        f"{ {name: entry.value for name, entry in node.attributes.items()} or ''}".rstrip() for node in model.graph
    ]  # fmt: skip
    return "\n".join([*rows, ""])


@pytest.mark.parametrize("normalized", [True, False])
def test_golden(normalized: bool) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of the file anew. BatchNormalizations may be folded already, or not."""
    path = GOLDEN / "repvgg.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = merge(parser.parse_model(before), *([Normalize()] if normalized else []))
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{dump(model)}", encoding="utf-8")
    else:
        assert dump(model) == expected


# ---- what is merged -------------------------------------------------------------------------------------------------


def repvgg(stride: int = 1, groups: int = 1, identity: bool = True) -> onnx.ModelProto:
    """A block as it is trained: 3x3 and 1x1 convolutions and the input, each normalized, in sum."""
    start = "s = Relu(x)\n" + norm("zero", "s", "i")
    steps = f"""{start if identity else "s = Relu(x)"}
    [dense] a = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [{stride}, {stride}], group = {groups}>(s, w3)
    {norm("three", "a", "an")}
    [point] b = Conv<kernel_shape = [1, 1], strides = [{stride}, {stride}], group = {groups}>(s, w1)
    {norm("one", "b", "bn")}
    sum = Add(an, bn)
    {"total = Add(sum, i)" if identity else "total = Identity(sum)"}
    y = Relu(total)"""
    inside = CHANNELS // groups
    names = ("zero", "three", "one") if identity else ("three", "one")
    return build(steps, w3=(CHANNELS, inside, 3, 3), w1=(CHANNELS, inside, 1, 1), **norm_weights(*names))


@pytest.mark.parametrize("before", [[Normalize()], []])
@pytest.mark.parametrize(("stride", "groups", "identity"), [(1, 1, True), (2, 1, False), (1, 8, True), (1, 4, True), (2, 8, False)])
def test_repvgg_becomes_one_convolution(stride: int, groups: int, identity: bool, before: list[Pass]) -> None:
    proto = repvgg(stride, groups, identity)
    model, record = same(proto, *before)
    rest = Counter({"Relu": 2, "Conv": 1}) + Counter({"Identity": int(not before and not identity)})
    assert ops(model) == rest and kernel(model, "dense").shape == (8, 8 // groups, 3, 3)
    (found,) = record.measurements
    assert found.where == "dense" and found.numbers["branches"] == 2 + identity and not record.skipped
    assert BATCH_NORM not in next(node for node in model.graph if node.name == "dense").meta  # it described one branch


def test_repvgg_as_torch_exports_it() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")

    class Block(torch.nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.dense, self.point = (torch.nn.Conv2d(8, 8, size, padding=size // 2, bias=False) for size in (3, 1))
            self.norms = torch.nn.ModuleList(torch.nn.BatchNorm2d(8) for _ in range(3))

        def forward(self, x: Any) -> Any:
            return torch.relu(self.norms[0](self.dense(x)) + self.norms[1](self.point(x)) + self.norms[2](x))

    torch.manual_seed(0)
    net = torch.nn.Sequential(Block(), Block())
    net.train()(torch.randn(64, 8, 9, 9))  # running statistics of its own
    program = torch.onnx.export(net.eval(), (torch.randn(2, 8, 9, 9),), dynamo=True, input_names=["x"], output_names=["y"])
    model, _ = same(program.model_proto, Normalize())
    assert ops(model) == {"Conv": 2, "Relu": 2}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8)])
def test_spre_keeps_its_pattern(n: int, m: int, seed: int) -> None:
    """Two 3x3 branches under one N:M mask, the second also under a spatial mask (a plus), each normalized: METHODS.md M3."""
    body = (
        "[main] a = Conv<pads = [1, 1, 1, 1]>(x, w)\n" + norm("one", "a", "an")
        + "[extra] b = Conv<pads = [1, 1, 1, 1]>(x, e)\n" + norm("two", "b", "bn") + "y = Add(an, bn)"
    )  # fmt: skip
    proto = build(body, seed=seed, w=(8, 8, 3, 3), e=(8, 8, 3, 3), **norm_weights("one", "two"))
    rng = np.random.default_rng(seed)
    mask = np.argsort(rng.random((8, 8 // m, m, 3, 3)), axis=2) < n
    spatial = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], bool)
    for tensor in [tensor for tensor in proto.graph.initializer if tensor.name in "we"]:
        array = numpy_helper.to_array(tensor) * mask.reshape(8, 8, 3, 3) * (spatial if tensor.name == "e" else True)
        tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float32), tensor.name))
    model, record = same(proto, Normalize())
    found = kernel(model, "main").reshape(8, 8 // m, m, 3, 3)
    assert ops(model) == {"Conv": 1}
    assert ((found != 0).sum(2) <= n).all() and ((found != 0) == mask).all()
    assert record.measurements[0].numbers["zeros"] == pytest.approx(1 - n / m)


def test_sums_of_many_with_constants() -> None:
    """A chain of sums, a Sum of several, scalars and vectors, and a factor behind a branch."""
    body = """
    [one] a = Conv<pads = [1, 1, 1, 1]>(x, w)
    [two] b = Conv<pads = [1, 1, 1, 1]>(x, v, c)
    scaled = Mul(b, factor)
    moved = Add(scalar, scaled)
    [three] d = Conv(x, p)
    s = Sum(a, moved, d, vector)
    y = Add(x, s)"""
    shapes = {"w": (8, 8, 3, 3), "v": (8, 8, 3, 3), "c": (8,), "p": (8, 8, 1, 1)}
    proto = build(body, **shapes, factor=(1, 8, 1, 1), scalar=(), vector=(8, 1, 1))
    model, record = same(proto)
    assert ops(model) == {"Conv": 1} and record.measurements[0].numbers["branches"] == 4


def test_what_else_is_in_the_sum_stays() -> None:
    """Two pairs of branches, of different values, something that is no branch, and a constant of many numbers."""
    body = """
    h = Relu(x)
    [one] a = Conv(x, w)  [two] b = Conv(h, v)  [three] c = Conv(h, p)  [four] d = Conv(x, q)
    r = Sigmoid(h)
    s = Add(a, b)  t = Add(s, r)  u = Add(t, image)  z = Add(c, u)
    y = Add(z, d)"""
    proto = build(body, **{name: (8, 8, 1, 1) for name in "wvpq"}, image=(9, 9))
    model, _ = same(proto)
    assert ops(model) == {"Relu": 1, "Sigmoid": 1, "Conv": 2, "Add": 3}
    assert all(value.shape is not None for node in model.graph for value in node.outputs)


def test_sums_in_branches() -> None:
    body = """
    [one] a = Conv(x, w)  [two] b = Conv(x, v)
    s = Add(a, b)  t = Mul(s, factor)
    [three] c = Conv(x, p)
    y = Add(t, c)"""
    proto = build(body, **{name: (8, 8, 1, 1) for name in "wvp"}, factor=(8, 1, 1))
    assert ops(same(proto)[0]) == {"Conv": 1}


@pytest.mark.parametrize("auto", ["SAME_UPPER", "SAME_LOWER", "VALID"])
def test_padding_by_name(auto: str) -> None:
    proto = build(f'[a] p = Conv<auto_pad = "{auto}">(x, w) [b] q = Conv<auto_pad = "{auto}">(x, v) y = Add(p, q)',
                  w=(8, 8, 2, 2), v=(8, 8, 2, 2))  # fmt: skip
    assert ops(same(proto)[0]) == {"Conv": 1}


@pytest.mark.parametrize("rank", [2, 3])
def test_matrices(rank: int) -> None:
    """Products of the same rows, transposed or not, with factors and biases of every form."""
    gemm = "[g] b = Gemm<transB = 1, alpha = 0.5, beta = 2.0>(x, v, c)\n" if rank == 2 else "[g] b = MatMul(x, v)\n"
    body = "[m] a = MatMul(x, w)\n" + gemm + "s = Add(a, b) t = Add(bias, s) y = Add(t, x)"
    proto = build(body, x="N, 8" if rank == 2 else "N, T, 8", y="N, K" if rank == 2 else "N, T, K", w=(8, 8), v=(8, 8), bias=(8,),
                  **({"c": (8,)} if rank == 2 else {}))  # fmt: skip
    model, record = same(proto, shape=(5, 8) if rank == 2 else (2, 5, 8))
    assert ops(model)["Gemm"] + ops(model)["MatMul"] == 1 and record.measurements[0].numbers["branches"] == 3
    assert ops(model)["Add"] == (1 if "MatMul" in ops(model) else 0)


def test_shared_weights_stay_as_they_are_for_others() -> None:
    proto = build("[a] p = Conv(x, w) [b] q = Conv(x, w) s = Add(p, q) r = Relu(s) [c] y = Conv(r, w)", w=(8, 8, 1, 1))
    model, _ = same(proto)
    np.testing.assert_array_equal(kernel(model, "c"), numpy_helper.to_array(proto.graph.initializer[0]))


def test_inside_a_subgraph() -> None:
    body = """
    on = ReduceSum<keepdims = 0>(x)
    flag = Greater(on, on)
    y = If<then_branch = t () => (float[N, 8, 9, 9] then_out) { then_out = Relu(x) },
           else_branch = e () => (float[N, 8, 9, 9] else_out) { p = Conv(x, w) q = Conv(x, v) else_out = Add(p, q) }>(flag)"""
    proto = build(body, y="N, 8, 9, 9", w=(8, 8, 1, 1), v=(8, 8, 1, 1))
    model, _ = same(proto)
    assert sum(node.op_type == "Conv" for node in model.graph.all_nodes()) == 1


# ---- what stays -----------------------------------------------------------------------------------------------------


PLAIN = {"w": (8, 8, 1, 1), "v": (8, 8, 1, 1)}
REFUSED = {
    "read elsewhere": ("[a] p = Conv(x, w) [b] q = Conv(x, v) s = Add(p, q) r = Relu(q) y = Add(s, r)", PLAIN),
    "strides": ("h = Tile(x, r) [a] p = Conv<strides = [2, 2]>(x, w) [b] q = Conv<strides = [9, 9]>(x, v) y = Add(p, q)", PLAIN),
    "groups": ("[a] p = Conv(x, w) [b] q = Conv<group = 8>(x, v) y = Add(p, q)", PLAIN | {"v": (8, 1, 1, 1)}),
    "not a constant": ("[a] p = Conv(x, w) d = Mul(v, v) [b] q = Conv(x, d) y = Add(p, q)", PLAIN),
    "bias is not a constant": ("c = ReduceMax(x, axes) d = Mul(k, k) [a] p = Conv(x, w) [b] q = Conv(x, v, d) y = Add(p, q)",
                               PLAIN | {"k": (8,)}),
    "one number a channel": ("[a] p = Conv(x, w) [b] q = Conv(x, v) r = Mul(q, k) y = Add(p, r)", PLAIN | {"k": (9, 9)}),
    "other positions": ("[a] p = Conv<pads = [1, 1, 1, 1]>(x, w) [b] q = Conv<dilations = [2, 2], pads = [2, 2, 2, 2]>(x, v) y = Add(p, q)",
                        {"w": (8, 8, 3, 3), "v": (8, 8, 3, 3)}),
    "more positions": ("[a] p = Conv<pads = [0, 2, 0, 2]>(x, w) [b] q = Conv<pads = [2, 0, 2, 0]>(x, v) y = Add(p, q)",
                       {"w": (8, 8, 1, 5), "v": (8, 8, 5, 1)}),
    "size of its input": ('[a] p = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, w) '
                          '[b] q = Conv<auto_pad = "SAME_UPPER", strides = [2, 2]>(x, v) y = Add(p, q)', PLAIN),
}  # fmt: skip


@pytest.mark.parametrize("reason", REFUSED)
def test_refusals(reason: str) -> None:
    body, shapes = REFUSED[reason]
    body = body.replace("h = Tile(x, r) ", "").replace("c = ReduceMax(x, axes) ", "")
    proto = build(body, **shapes)
    model, record = merge(proto, allow_no_effect=True)
    assert any(reason in text for _, text in record.skipped) and not record.edits
    assert ops(model)["Conv"] == 2


KEPT = {
    "of different inputs": ("h = Relu(x) p = Conv(x, w) q = Conv(h, v) y = Add(p, q)", PLAIN),
    "a layer and its bias": ("p = Conv(x, w) y = Add(p, k)", {"w": (8, 8, 1, 1), "k": (8, 1, 1)}),
    "no layer": ("p = Mul(x, k) q = Mul(x, c) y = Add(p, q)", {"k": (8, 1, 1), "c": (8, 1, 1)}),
    "other channels": ("p = Conv(x, w) y = Add(p, x)", {"w": (1, 8, 1, 1)}),
}


@pytest.mark.parametrize("case", KEPT)
def test_sums_that_are_none_of_its_business(case: str) -> None:
    body, shapes = KEPT[case]
    proto = build(body, **shapes)
    model, record = merge(proto, allow_no_effect=True)
    assert not record.edits and not record.skipped
    assert ops(model) == Counter(node.op_type for node in proto.graph.node)


def test_identity_branches_may_stay() -> None:
    model, _ = same(repvgg(), Normalize(), identity=False)
    assert ops(model) == {"Relu": 2, "Conv": 1, "BatchNormalization": 1, "Add": 1}


def test_nothing_to_merge_is_an_error() -> None:
    with pytest.raises(RecipeError, match="changed nothing"):
        merge(build("y = Conv(x, w)", w=(8, 8, 1, 1)))


def test_it_gives_the_same_bytes_twice() -> None:
    first, second = (ir.to_proto(merge(repvgg())[0]).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second
