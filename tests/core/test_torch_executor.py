"""The torch executor: its numbers are those of ONNX Runtime, what is fed wins, and what cannot run is refused by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")

from graphq import ir  # noqa: E402
from graphq.calibration import open_calibration  # noqa: E402
from graphq.errors import ModelError, UsageError  # noqa: E402
from graphq.executor import Executor, Fetch  # noqa: E402
from graphq.models import digits  # noqa: E402
from graphq.passes.block_float import BlockFloat  # noqa: E402
from graphq.passes.dynamic_activations import DynamicActivations  # noqa: E402
from graphq.passes.insert_qdq import InsertQdq  # noqa: E402
from graphq.passes.normalize import Normalize  # noqa: E402
from graphq.passes.quantize_weights import QuantizeWeights  # noqa: E402
from graphq.passes.sulq_softmax import SulqSoftmax  # noqa: E402
from graphq.pipeline import PassContext, run_passes  # noqa: E402
from graphq.targets import get_target  # noqa: E402
from graphq.torch_executor import TorchExecutor  # noqa: E402
from graphq.verify import verify_graph  # noqa: E402

ROOT = Path(__file__).parents[2]
ZOO = ["digits_cnn", "digits_vit", "digits_lm"]
HEAD = '<ir_version: 10, opset_import: ["" : 21, "local" : 1]>'
MLP = """m (float[n, 4] x) => (float[n, 2] y)
<float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, float[3, 2] v = {1, -1, 2, -2, 3, -3}, float two = {2}>
{ scaled = Mul(w, two) h = MatMul(x, scaled) r = Relu(h) y = MatMul(r, v) }"""


def text(body: str) -> ir.Model:
    return ir.from_onnx_text(f"{HEAD}\n{body}")


def on_cpu(model: ir.Model, *args: object, **options: object) -> TorchExecutor:
    return TorchExecutor(model, *args, device="cpu", **options)  # type: ignore[arg-type]


def feeds_of(model: ir.Model) -> dict[str, np.ndarray]:
    """Random ones, two samples; every open axis but the first is 3 long, those of a cache included."""
    rng, found = np.random.default_rng(0), {}
    for entry in ir.inputs(model):
        shape = [size if isinstance(size, int) else 2 if axis == 0 else 3 for axis, size in enumerate(entry.shape or ())]
        is_float = entry.dtype.kind == "f"
        found[entry.name] = rng.standard_normal(shape).astype(entry.dtype) if is_float else rng.integers(0, 9, shape)
    return found


def error(found: torch.Tensor, expected: np.ndarray) -> float:
    """The largest, relative to the largest element."""
    assert tuple(found.shape) == expected.shape
    return float(np.abs(found.numpy() - expected).max() / np.abs(expected).max())


# ---- against ONNX Runtime -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZOO)
def test_the_zoo_as_in_onnx_runtime(name: str) -> None:
    model = ir.load(ROOT / "models" / f"{name}.onnx")
    feeds = feeds_of(model)
    found, expected = on_cpu(model).run(feeds), Executor(model).run(feeds)
    assert max(error(one, other) for one, other in zip(found, expected, strict=True)) < 1e-5


PASSES = {
    "int8": (InsertQdq(error_samples=0, correct_bias=False),),
    "4-bit": (SulqSoftmax(samples=4), DynamicActivations(bits=4, symmetric=False),
              InsertQdq(activation_bits=4, error_samples=0, attention=True)),
    "int4 in groups": (QuantizeWeights(bits=4, group_size=32),),
    "fp8": (InsertQdq(format="fp8", error_samples=0),),
    "nvfp4": (BlockFloat(format="nvfp4"),),
}  # fmt: skip


@pytest.mark.parametrize("passes", PASSES)
def test_what_graphq_quantizes(passes: str) -> None:
    """As in ONNX Runtime, but where rounding puts an activation to the next code, on fewer than one in a thousand."""
    model = ir.load(ROOT / "models" / "digits_vit.onnx")
    calib = open_calibration({"input": digits.images("train")[0][:4]}, ir.inputs(model))
    ctx = PassContext(model=ir.clone(model), reference=model, calib=calib, held_out=calib, target=get_target("generic"))
    run_passes((Normalize(), *PASSES[passes]), ctx, verify_graph)
    quantized = [node.outputs[0].name or "" for node in ctx.model.graph if node.op_type == "DequantizeLinear"
                 and getattr(ir.producer(node.inputs[0]), "op_type", "") == "QuantizeLinear"]  # fmt: skip
    names, x = [*quantized, "logits"], {"input": digits.images("test")[0][:4]}
    found = on_cpu(ctx.model, names).run(x)
    expected = Executor(ctx.model, [Fetch(name) for name in names]).run(x)
    moved = sum(int((~np.isclose(*pair, rtol=1e-4, atol=1e-5)).sum()) for pair in zip(found[:-1], expected[:-1], strict=True))
    assert bool(quantized) == (passes != "int4 in groups") and moved <= 1e-3 * sum(array.size for array in expected[:-1])
    assert error(found[-1], expected[-1]) < (0.05 if moved else 1e-5)


OLD = {
    "axes as attributes": (13, "[2, 3, 4, 4]", "a = ReduceMean <axes = [1], keepdims = 0> (x) y = ReduceL2 <axes = [-1]> (a)"),
    "softmax of the rest": (12, "[2, 3, 4]", "y = Softmax <axis: int = 1> (x)"),
    "squeezed by attribute": (12, "[2, 1, 4]", "a = Squeeze <axes: ints = [1]> (x) y = Unsqueeze <axes: ints = [0, 3]> (a)"),
    "split by attribute": (12, "[2, 6]", "a, b = Split <axis: int = 1, split: ints = [2, 4]> (x) y = Concat <axis: int = 1> (b, a)"),
    "split evenly": (13, "[2, 6]", "a, b = Split <axis: int = 1> (x) y = Sub (a, b)"),
    "group by group": (18, "[2, 4, 3]", "y = GroupNormalization <num_groups: int = 2> (x, two, two)"),
    "channel by channel": (21, "[2, 4, 3]", "y = GroupNormalization <num_groups: int = 2> (x, four, four)"),
    "resized by scales": (13, "[1, 2, 3, 5]", "y = Resize <mode: string = \"linear\"> (x, , scales)"),
    "pooled to the end": (13, "[1, 2, 7, 7]", "y = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)"),
    "averaged to the end": (19, "[1, 2, 6, 6]", "y = AveragePool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)"),
    "quantized along an axis":
        (13, "[2, 4]", "q = QuantizeLinear <axis = 1> (x, four, zeros) y = DequantizeLinear <axis = 1> (q, four, zeros)"),
}  # fmt: skip
"""What had another form, or another meaning, in older operator sets: operator set, shape, nodes."""


@pytest.mark.parametrize("case", OLD)
def test_operators_are_those_of_the_models_operator_set(case: str) -> None:
    opset, shape, body = OLD[case]
    constants = "float[2] two = {1, 2}, float[4] four = {1, 0.5, 2, 0.1}, float[4] scales = {1, 1, 2, 1.5}, uint8[4] zeros = {0, 7, 128, 9}"
    head = f'<ir_version: 8, opset_import: ["" : {opset}]>'
    model = ir.from_onnx_text(f"{head}\nm (float{shape} x) => (float[] y) <{constants}> {{ {body} }}")
    x = {"x": np.random.default_rng(0).standard_normal([int(one) for one in shape[1:-1].split(",")]).astype(np.float32)}
    model.graph.outputs[0].shape = None
    assert error(on_cpu(model).run(x)[0], Executor(model).run(x)[0]) < 1e-6


def test_operators_of_a_set_too_old_are_refused() -> None:
    model = ir.from_onnx_text('<ir_version: 3, opset_import: ["" : 6]>\nm (float[2] x) => (float[2] y) { y = Clip <max: float = 1.0> (x) }')
    with pytest.raises(ModelError, match="Clip"):
        on_cpu(model)


@pytest.mark.parametrize("name", ZOO)
def test_shapes_are_computed_on_the_cpu_whatever_the_device(name: str) -> None:
    """The device `meta` holds shapes alone: reading a number from it fails, and so does mixing its tensors with those of the CPU."""
    model = ir.load(ROOT / "models" / f"{name}.onnx")
    feeds = feeds_of(model)
    found, expected = TorchExecutor(model, device="meta").run(feeds), on_cpu(model).run(feeds)
    assert [one.shape for one in found] == [one.shape for one in expected] and {one.device.type for one in found} == {"meta"}


def test_half_precision_is_computed_as_asked() -> None:
    model = text("m (float16[2] x) => (float16[2] y) { a = Mul(x, x) y = Div(a, x) }")
    x = np.array([3000, -5000], np.float16)
    assert on_cpu(model).run({"x": x})[0].tolist() == [3000, -5000]  # float16 itself would overflow
    assert on_cpu(model, dtype=torch.float16).run({"x": x})[0].isinf().all()
    assert on_cpu(model, dtype=torch.bfloat16).run({"x": x})[0].dtype == torch.bfloat16


def test_subgraphs_read_what_surrounds_them() -> None:
    model = text("""m (float[2] x, int64 steps) => (float[2] y, float[k, 2] trace) <float[2] w = {0.5, 2}>
    { on = Constant <value = bool {1}> ()
      y, trace = Loop (steps, on, x) <body = b (int64 i, bool going, float[2] state) => (bool still, float[2] next, float[2] seen)
      { still = Identity(going) next = Mul(state, w) seen = Add(next, x) }> }""")
    x, w = torch.tensor([1.0, 1.0], requires_grad=True), torch.tensor([3.0, 3.0], requires_grad=True)
    run = on_cpu(model)
    y, trace = run.run({"x": x, "steps": np.int64(2)})
    assert y.tolist() == [0.25, 4] and trace.tolist() == [[1.5, 3], [1.25, 5]]
    y, _ = run.run({"x": x, "steps": np.int64(2), "w": w})
    y.sum().backward()
    assert y.tolist() == [9, 9] and w.grad.tolist() == [6, 6] and x.grad.tolist() == [9, 9]


def test_local_functions_run_by_their_bodies() -> None:
    model = ir.from_onnx_text(f"""{HEAD}
m (float[2] x) => (float[2] y) {{ a = local.Twice <by: float = 3.0> (x) y = local.Twice (a) }}
<domain: "local", opset_import: ["" : 21]> Twice <by: float = 2.0> (x) => (y)
{{ factor = Constant <value_float: float = @by> () y = Mul(x, factor) }}""")
    assert on_cpu(model).run({"x": np.ones(2, np.float32)})[0].tolist() == [6, 6]


# ---- what is fed ----------------------------------------------------------------------------------------------------


def test_a_fed_weight_wins_and_gets_a_gradient() -> None:
    run, x = on_cpu(text(MLP)), torch.ones(1, 4)
    w = torch.full((4, 3), 0.5, requires_grad=True)
    assert run.run({"x": x})[0].tolist() == [[2 * (22 + 2 * 26 + 3 * 30), -2 * (22 + 2 * 26 + 3 * 30)]]
    y = run.run({"x": x, "w": w})[0]
    y[0, 0].backward()
    assert y.tolist() == [[24, -24]] and torch.equal(w.grad, torch.tensor([[2.0, 4.0, 6.0]] * 4))
    assert run.run({"x": x})[0].tolist() != y.tolist()


def test_a_fed_activation_is_not_computed() -> None:
    run = on_cpu(text(MLP))
    h = torch.tensor([[1.0, -1.0, 2.0]], requires_grad=True)
    y = run.run({"h": h})[0]  # x is not needed
    y[0, 0].backward()
    assert y.tolist() == [[7, -7]] and h.grad.tolist() == [[1, 0, 3]]


def test_any_value_can_be_fetched() -> None:
    names = ["x", "r", "w", "scaled", "y"]
    found = on_cpu(text(MLP), names).run({"x": np.ones((1, 4), np.float32)})
    assert [tuple(one.shape) for one in found] == [(1, 4), (1, 3), (4, 3), (4, 3), (1, 2)]
    assert torch.equal(found[3], 2 * found[2])


def test_constants_are_computed_once() -> None:
    run = on_cpu(text(MLP), ["scaled", "y"])
    x = np.ones((1, 4), np.float32)
    first, second = run.run({"x": x}), run.run({"x": 2 * x})
    assert first[0] is second[0] and second[1].tolist() == (2 * first[1]).tolist()


def test_nodes_of_a_segment() -> None:
    model = text(MLP)
    nodes = [node for node in model.graph if node.op_type in ("Relu", "MatMul")]
    run = on_cpu(model, ["y"], nodes=nodes[1:])
    assert run.run({"h": np.ones((1, 3), np.float32)})[0].tolist() == [[6, -6]]
    with pytest.raises(ModelError, match=r"not fed: h"):
        run.run({"x": np.ones((1, 4), np.float32)})


def test_nodes_may_stand_in_any_order() -> None:
    model = text(MLP)
    last = next(node for node in model.graph if node.outputs[0].name == "scaled")
    model.graph.remove(last)
    model.graph.append(last)
    assert on_cpu(model).run({"x": np.ones((1, 4), np.float32)})[0].shape == (1, 2)


# ---- QDrop ----------------------------------------------------------------------------------------------------------


QDQ = """m (float[n] x) => (float[n] y, float[3] weight) <float s = {0.5}, int8 z = {0}, float[3] w = {0.3, 0.4, 0.7}>
{ q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) p = QuantizeLinear(w, s, z) weight = DequantizeLinear(p, s, z) }"""


def test_dropped_quantizers_pass_activations_alone() -> None:
    x = torch.full((4000,), 0.3)
    runs = [on_cpu(text(QDQ), drop=0.25) for _ in range(2)]
    first, again = (run.run({"x": x}) for run in runs)
    assert torch.equal(first[0], again[0]) and not torch.equal(first[0], runs[0].run({"x": x})[0])
    assert set(first[0].tolist()) == {0.5, x[0].item()}
    assert abs((first[0] != 0.5).float().mean().item() - 0.25) < 0.03  # 4.4 standard deviations
    assert first[1].tolist() == [0.5, 0.5, 0.5]
    runs[0].drop = 0.0
    assert runs[0].run({"x": x})[0].unique().tolist() == [0.5]


EDGES = {
    "one element a channel": ("float[2, 3, 1, 1] x", "y = InstanceNormalization(x, s, s)"),
    "one element a group": ("float[1, 3, 1] x", "y = GroupNormalization <num_groups = 3> (x, s, s)"),
    "backward from before the start": ("float[4] x", "y = Slice(x, b, e, a, d)"),
}


@pytest.mark.parametrize("case", EDGES)
def test_edges_as_onnx_runtime_has_them(case: str) -> None:
    inputs, body = EDGES[case]
    constants = "<float[3] s = {1, 2, 3}, int64[1] b = {-100}, int64[1] e = {-200}, int64[1] a = {0}, int64[1] d = {-1}>"
    model = text(f"m ({inputs}) => (float[] y) {constants} {{ {body} }}")
    shape = tuple(ir.inputs(model)[0].shape)
    x = np.arange(1, 1 + np.prod(shape), dtype=np.float32).reshape(shape)
    (made,), (wanted,) = on_cpu(model).run({"x": x}), Executor(model).run({"x": x})
    np.testing.assert_allclose(made.numpy(), wanted, atol=1e-6)
    assert made.shape == wanted.shape


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("m (float[2] x) => (float[2] y) { y = local.Odd(x) }", r"operator local\.Odd cannot run on torch(.|\n)*Odd"),
        ("m (float[2] x) => (float[2] y) { y = RandomNormalLike(x) }", r"ai\.onnx\.RandomNormalLike(.|\n)*where: RandomNormalLike"),
    ],
)
def test_a_missing_operator_is_named_when_the_executor_is_made(body: str, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        on_cpu(text(body))


def test_a_missing_operator_does_not_matter_behind_what_is_fetched() -> None:
    model = text("m (float[2] x) => (float[2] y) { h = Neg(x) y = local.Odd(h) }")
    assert on_cpu(model, ["h"]).run({"x": np.ones(2, np.float32)})[0].tolist() == [-1, -1]


def test_unknown_fetches_and_wrong_shapes_are_refused() -> None:
    with pytest.raises(ModelError, match="no value 'nothing'"):
        on_cpu(text(MLP), ["nothing"])
    with pytest.raises(ModelError, match=r"where: MatMul .*nx4"):
        on_cpu(text(MLP)).run({"x": np.ones((1, 5), np.float32)})
    with pytest.raises(ModelError, match="holds texts"):
        on_cpu(text("m (string[1] x) => (string[1] y) { y = Identity(x) }")).run({"x": np.array(["a"])})


@pytest.mark.parametrize(("device", "reason"), [("gpu", "no device 'gpu'"), ("cuda", "finds no GPU")])
def test_devices_that_are_not_there(device: str, reason: str) -> None:
    if device == "cuda" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(UsageError, match=reason):
        TorchExecutor(text(MLP), device=device)
