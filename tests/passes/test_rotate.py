"""rotate: exact in floats wherever it rotates, gone where weights take it, and refused with a reason where a stream cannot be."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from graphq import ir, linear
from graphq.calibration import CalibrationSet, random_calibration
from graphq.errors import RecipeError
from graphq.executor import Executor, Fetch
from graphq.models import onnx_path
from graphq.passes.normalize import Normalize
from graphq.passes.rotate import Rotate
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "rotate"
D, F, V, H = 16, 24, 11, 4

ATTENTION = """
    q0 = MatMul(n1, wq) qr = Reshape(q0, heads) qt = Transpose<perm = [0, 2, 1, 3]>(qr)
    k0 = MatMul(n1, wk) kr = Reshape(k0, heads) kt = Transpose<perm = [0, 2, 3, 1]>(kr)
    v0 = MatMul(n1, wv) vr = Reshape(v0, heads) vt = Transpose<perm = [0, 2, 1, 3]>(vr)
    scores = MatMul(qt, kt) a = Softmax<axis = -1>(scores) o0 = MatMul(a, vt)
    ot = Transpose<perm = [0, 2, 1, 3]>(o0) o1 = Reshape(ot, whole) [out] o2 = MatMul(o1, wo)"""
LN1, LN2, LN3 = (f"n{i} = LayerNormalization<axis = -1>(x{i}, g{i}, b{i})" for i in (1, 2, 3))


def rms(i: int, ending: str = "v{i} = Reciprocal(t{i}) u{i} = Mul(x{i}, v{i})") -> str:
    text = "s{i} = Mul(x{i}, x{i}) m{i} = ReduceMean(s{i}, last) e{i} = Add(m{i}, eps) t{i} = Sqrt(e{i}) " + ending
    return text.replace("{i}", str(i)) + f" n{i} = Mul(u{i}, g{i})"


def block(norms: tuple[str, str, str], mlp: str, ending: str = "logits = MatMul(n3, head)", x1: str = "x1 = Gather(table, ids)") -> str:
    return f"{x1} {norms[0]} {ATTENTION} x2 = Add(x1, o2) {norms[1]} {mlp} x3 = Add(x2, f2) {norms[2]} {ending}"


GELU = "f0 = MatMul(n2, w1) fb = Add(f0, c1) f1 = Gelu(fb) f2b = MatMul(f1, w2) f2 = Add(f2b, c2)"
SWIGLU = "f0 = MatMul(n2, w1) fs = Sigmoid(f0) fa = Mul(f0, fs) fu = MatMul(n2, w3) f1 = Mul(fa, fu) f2 = MatMul(f1, w2)"
LAST = "x3 = Add(x2, f2)"
POSITIONS = "x0 = Gather(table, ids) x1 = Add(x0, pos)"
IDS = "int64[N, 5] ids"
MODELS: dict[str, tuple[str, str]] = {
    "GPT": (IDS, block((LN1, LN2, LN3), GELU, x1=POSITIONS)),
    "Llama": (IDS, block((rms(1), rms(2), rms(3)), SWIGLU)),
    "Llama, divided": (IDS, block((rms(1, "u1 = Div(x1, t1)"), rms(2, "u2 = Div(x2, t2)"), rms(3, "u3 = Div(x3, t3)")), SWIGLU)),
    "ViT": (
        "float[N, 3, 4, 4] image",
        block(
            (LN1, LN2, LN3), GELU, "one = Gather<axis = 1>(n3, first) logits = Gemm(one, head, headb)",
            "k = Conv<strides = [2, 2]>(image, kernel, kb) r = Reshape(k, channels) t = Transpose<perm = [0, 2, 1]>(r) "
            "n = Shape<end = 1>(image) ones = Constant<value_ints = [1, 1]>() size = Concat<axis = 0>(n, ones) c = Expand(token, size) "
            "z = Concat<axis = 1>(c, t) x1 = Add(z, pos)",
        ),
    ),
}  # fmt: skip
REFUSED: dict[str, tuple[str, str, str]] = {
    "post-norm": (IDS, block((LN1, LN2, LN3), GELU).replace(LAST, "x3 = Add(n2, f2)"), "post-norm"),
    "the model returns it": (IDS, block((LN1, LN2, LN3), GELU, "logits = Identity(x3)"), "the model returns"),
    "no layer behind a norm": (IDS, block((LN1, LN2, LN3), GELU, "logits = Softmax(n3)"), "read by Softmax"),
    "an activation of the stream": (IDS, block((LN1, LN2, LN3), GELU).replace(LAST, "xa = Relu(x2) x3 = Add(xa, f2)"), "Relu"),
    "a scale for each channel": (IDS, block((LN1, LN2, LN3), GELU).replace(LAST, "xa = Mul(f2, g1) x3 = Add(x2, xa)"), "Mul"),
    "an input of the model": ("float[N, 5, 16] x1", block((LN1, LN2, LN3), GELU, x1=""), "the model is given"),
}  # fmt: skip
SHAPES: dict[str, tuple[int, ...]] = {
    "table": (V, D), "pos": (1, 5, D), "token": (1, 1, D), "wq": (D, D), "wk": (D, D), "wv": (D, D), "wo": (D, D), "w1": (D, F),
    "w3": (D, F), "c1": (F,), "w2": (F, D), "c2": (D,), "head": (D, 7), "headb": (7,), "kernel": (D, 3, 2, 2), "kb": (D,),
    **{f"g{i}": (D,) for i in (1, 2, 3)}, **{f"b{i}": (D,) for i in (1, 2, 3)},
}  # fmt: skip
OTHERS = {
    "heads": np.array([0, 0, H, D // H]), "whole": np.array([0, 0, D]), "channels": np.array([0, D, 4]), "first": np.array(0),
    "last": np.array([-1]), "eps": np.array(1e-5, np.float32),
}  # fmt: skip


def build(inputs: str, body: str, seed: int = 0) -> ir.Model:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> g ({inputs}) => (float[] logits) {{ {body} }}')
    used, rng = {name for node in proto.graph.node for name in node.input}, np.random.default_rng(seed)
    weights = {name: (rng.standard_t(5, shape) / np.sqrt(shape[0])).astype(np.float32) for name, shape in SHAPES.items()}
    weights |= {f"g{i}": np.exp(rng.standard_normal(D)).astype(np.float32) for i in (1, 2, 3)}
    arrays = {**weights, **OTHERS}
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in arrays.items() if name in used)
    return ir.onnx_ir.from_proto(onnx.shape_inference.infer_shapes(proto, data_prop=True))


def feeds(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    rng, (value,) = np.random.default_rng(seed), model.graph.inputs
    shape = [3, *[dim for dim in ir.shape_of(value) or () if isinstance(dim, int)]]
    return {value.name or "": rng.integers(0, V, shape) if value.name == "ids" else rng.standard_normal(shape).astype(np.float32)}


def apply(model: ir.Model, *passes: Pass, data: CalibrationSet | None = None) -> PassRecord:
    data = random_calibration(ir.inputs(model), 4) if data is None else data
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    return run_passes(passes, ctx, verify_graph)[0]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", MODELS)
def test_the_function_stays_and_nothing_is_added(case: str, seed: int) -> None:
    """Stream and values: 1e-5 in float32, in both engines, with other weights and no node more, but biases for layers without any."""
    model = build(*MODELS[case], seed)
    data, count = feeds(model), len(model.graph)
    (before,), wq = Executor(model).run(data), ir.constant(model.graph.initializers["wq"])
    record = apply(model, Rotate(online=False, seed=seed))
    assert len(model.graph) == count + (0 if "Llama" in case else 3 + (case == "GPT")) and not record.skipped
    assert record.edits.get("insert", 0) == len(model.graph) - count
    assert not np.allclose(ir.constant(model.graph.initializers["wq"]), wq, atol=0.1)  # type: ignore[arg-type]
    places = {entry.where: entry.numbers for entry in record.measurements}
    assert places["o1"] == {"folded": 1.0, "block": D / H} and {numbers["block"] for numbers in places.values()} == {D, D / H}
    for after in (Executor(model).run(data)[0], ReferenceEvaluator(ir.to_proto(model)).run(None, data)[0]):
        np.testing.assert_allclose(after, before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("options", [{}, {"residual": False}, {"values": False}, {"block": 4}, {"residual": False, "values": False}])
@pytest.mark.parametrize("case", MODELS)
def test_rotations_at_run_time(case: str, options: dict[str, Any]) -> None:
    model = build(*MODELS[case])
    data = feeds(model)
    (before,) = Executor(model).run(data)
    record = apply(model, Rotate(**options))
    assert record.edits["insert"] > 0
    np.testing.assert_allclose(Executor(model).run(data)[0], before, atol=1e-5 * np.abs(before).max())


@pytest.mark.parametrize("case", REFUSED)
def test_streams_that_cannot_be_rotated(case: str) -> None:
    """The reason is reported, and the rest is still rotated exactly."""
    inputs, body, reason = REFUSED[case]
    model = build(inputs, body)
    data = feeds(model)
    (before,) = Executor(model).run(data)
    record = apply(model, Rotate(online=False))
    assert record.skipped and all("residual stream is not rotated" in text for _, text in record.skipped)
    assert any(reason in text for _, text in record.skipped), record.skipped
    np.testing.assert_allclose(Executor(model).run(data)[0], before, atol=1e-5 * np.abs(before).max())


RMS = "s = Mul(h, h) m = ReduceMean(s, last) e = Add(m, eps) t = Sqrt(e) n = Div(h, t)"
AWKWARD = {
    "a bias that is computed": "h0 = MatMul(x, wq) r = Relu(x) h = Gemm(r, wk, h0) n = LayerNormalization<axis = -1>(h, g1, b1)"
    " y = MatMul(n, head)",
    "a residual that a Gemm adds": "h = MatMul(x, wq) n = LayerNormalization<axis = -1>(h, g1, b1) r = Relu(x) k = Gemm(r, wk, h)"
    " n2 = LayerNormalization<axis = -1>(k, g2, b2) y = MatMul(n2, head)",
    "a layer that takes over a bias and writes": "h = MatMul(x, wq) n = LayerNormalization<axis = -1>(h, g1, b1) u = MatMul(n, wk)"
    " k = Add(h, u) n2 = LayerNormalization<axis = -1>(k, g2, b2) y = MatMul(n2, head)",
    "an eps for each channel": f"h = MatMul(x, wq) {RMS.replace('eps', 'g1')} y = MatMul(n, head)",
}


@pytest.mark.parametrize("case", AWKWARD)
def test_awkward_streams(case: str) -> None:
    """Rotated exactly, or not at all."""
    body = AWKWARD[case]
    model = build("float[N, 16] x", body.replace("y = MatMul", "logits = MatMul"))
    data = {"x": np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)}
    (before,) = Executor(model).run(data)
    record = apply(model, Rotate(online=False, allow_no_effect=True))
    assert bool(record.measurements) == (case != "an eps for each channel")
    np.testing.assert_allclose(Executor(model).run(data)[0], before, atol=1e-5 * np.abs(before).max())


def test_what_becomes_something_else_gets_another_name() -> None:
    """No value of the rotated model differs from that of its name in the float model, but for what lacks a bias that moved behind it."""
    model = build(*MODELS["ViT"])
    data, reference = feeds(model), ir.clone(model)
    apply(model, Rotate(online=False))
    kept, known = ({node.outputs[0].name or "" for node in one.graph} for one in (model, reference))
    names = sorted(kept & known - {"f0", "q0", "k0"})
    assert "one" not in names
    fetches = [Fetch(name) for name in names]
    for name, *both in zip(names, *(Executor(one, fetches).run(data) for one in (reference, model)), strict=True):
        np.testing.assert_allclose(both[1], both[0], atol=1e-5 * max(np.abs(both[0]).max(), 1e-3), err_msg=name)


def test_a_stream_with_an_excluded_layer_stays() -> None:
    model = build(*MODELS["GPT"])
    record = apply(model, Rotate(online=False, values=True, exclude=("out",), allow_no_effect=True))
    assert not record.edits and any("excluded" in text for _, text in record.skipped)


def test_bad_patterns_and_blocks() -> None:
    with pytest.raises(RecipeError, match="matches no node"):
        apply(build(*MODELS["GPT"]), Rotate(exclude=("nobody",)))
    record = apply(build(*MODELS["GPT"]), Rotate(residual=False, values=False, block=5, allow_no_effect=True))
    assert not record.edits and "not a multiple" in record.skipped[0][1]


@pytest.mark.parametrize("seed", range(3))
def test_outliers_are_spread(seed: int) -> None:
    """A channel of the stream thirty times as large as the others: the largest number of an embedding, over its size, halves."""
    model = build(*MODELS["Llama"], seed)
    table = np.array(ir.constant(model.graph.initializers["table"]))
    table[:, 3] *= 30
    model.graph.initializers["table"].const_value = ir.make_tensor(table, "float32", "table")
    apply(model, Rotate(online=False, seed=seed))
    rotated = ir.constant(model.graph.initializers["table"])
    assert rotated is not None
    peaks = [np.median(np.abs(rows).max(1) / np.sqrt(np.mean(rows**2, axis=1))) for rows in (table, rotated)]
    assert peaks[1] < peaks[0] / 2


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "aidreams260k_llama", "minilm_l6_stsb"])
def test_real_models(name: str, assets: ModuleType) -> None:
    """The outputs stay to 1e-5; BERT's stream, which normalizations stand in, is refused."""
    model = ir.load(assets.MODELS / f"{name}.onnx")
    data = {key: array[:2] for key, array in assets.calibration(name, 2).items()}
    apply(model, Normalize())
    (before,) = Executor(model).run(data)
    record = apply(model, Rotate())
    np.testing.assert_allclose(Executor(model).run(data)[0], before, atol=1e-5 * np.abs(before).max())
    assert bool(record.skipped) == (name == "minilm_l6_stsb")


def test_the_vit_of_the_project() -> None:
    model = ir.load(onnx_path("digits_vit"))
    apply(model, Normalize())
    data = {"input": np.random.default_rng(0).random((4, *ir.inputs(model)[0].shape[1:])).astype(np.float32)}  # type: ignore[index]
    (before,) = Executor(model).run(data)
    record = apply(model, Rotate(online=False))
    assert not record.skipped and record.measurements
    np.testing.assert_allclose(Executor(model).run(data)[0], before, atol=1e-5 * np.abs(before).max())


def dump(model: ir.Model) -> str:
    rows = [f"{name}: {value.dtype}{list(value.shape or ())}" for name, value in model.graph.initializers.items()]
    for node in model.graph:
        rows.append(f"{node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})")
    return "\n".join([*rows, ""])


@pytest.mark.parametrize(("case", "options"), [("Llama", {"block": 8}), ("ViT", {})])
def test_golden(case: str, options: dict[str, Any]) -> None:
    """`GRAPHQ_GOLDEN=write` writes the files anew."""
    path, model = GOLDEN / f"{case.lower()}.txt", build(*MODELS[case])
    before = dump(model)
    apply(model, Rotate(**options))
    text = f"{before}----\n{dump(model)}"
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8") == text
    assert all(linear.is_linear(node) for node in model.graph if node.op_type == "Gemm")
