"""digit-planes: exact planes, nested widths near direct ones, one file for all widths, the same numbers in both runtimes."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime as ort
import pytest
from onnx import numpy_helper, parser
from onnx.reference import ReferenceEvaluator

import graphq
from graphq import cli, ir, linear, planes, stored
from graphq.calibration import random_calibration
from graphq.errors import ModelError, TargetError, UsageError
from graphq.executor import decode
from graphq.models import digits, onnx_path
from graphq.passes.digit_planes import DigitPlanes
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.quantizers import Uniform
from graphq.spec import ModelInput, PerAxis, PerGroup, QuantSpec
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

GOLDEN = Path(__file__).parent / "golden" / "digit_planes" / "shared.txt"
RNG = np.random.default_rng(0)
CODES = np.arange(256, dtype=np.uint8)

CONV = "m (float[n, 3, 6, 6] x) => (float[n, 4, 4, 4] y) { y = Conv (x, w) }"
GEMM = "m (float[n, 8] x) => (float[n, 6] y) { y = Gemm <transB = 1> (x, w) }"
MATMUL = "m (float[n, 8] x) => (float[n, 6] y) { y = MatMul (x, w) }"
LAYERS = {CONV: (4, 3, 3, 3), GEMM: (6, 8), MATMUL: (8, 6)}


def build(text: str, **weights: np.ndarray) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    proto.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in weights.items())
    return proto


def convert(proto: onnx.ModelProto, target: str = "onnxruntime", **options: Any) -> tuple[ir.Model, PassRecord]:
    model = onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))
    none = random_calibration([ModelInput("x", np.dtype(np.float32), (None, 1))], 1)  # it reads none
    ctx = PassContext(model=model, reference=ir.clone(model), calib=none, held_out=none, target=get_target(target))
    record = run_passes([Normalize(), DigitPlanes(**options)], ctx, verify_graph)[-1]
    require_legal(model, ctx.target)
    return model, record


def layer(text: str, seed: int = 0) -> tuple[onnx.ModelProto, np.ndarray]:
    weight = np.random.default_rng(seed).standard_t(4, LAYERS[text]).astype(np.float32)
    return build(text, w=weight), weight


def decoded(model: ir.Model, bits: int) -> np.ndarray:
    """The float weight of the one layer when `bits` are read."""
    model = ir.clone(model)
    model.graph.initializers[planes.BITS].const_value = ir.make_tensor(np.float32(bits), "float32", planes.BITS)  # type: ignore[arg-type]
    (node,) = [node for node in model.graph if node.op_type in linear.LINEAR_OPS]
    value = linear.weight_of(node)
    assert value is not None
    return decode(model, value)


def expected(weight: np.ndarray, spec: QuantSpec, bits: int) -> np.ndarray:
    """What `bits` of the 8-bit codes of `weight` stand for, written as the definition: the mean of all codes that begin alike."""
    quantizer = Uniform(spec)
    qparams = quantizer.fit_weight(weight)
    codes = quantizer.quantize(weight, qparams)
    heads = np.arange(256) >> (8 - bits)
    means = np.array([np.mean(np.flatnonzero(heads == head)) for head in heads], np.float32)
    axes = {PerAxis(0): (slice(None),) + (None,) * (weight.ndim - 1), PerAxis(1): (None, slice(None))}
    index = axes[spec.granularity]  # type: ignore[index]
    return (means[codes] - qparams.zero_point[index].astype(np.float32)) * qparams.scale[index]


# ---- the format -----------------------------------------------------------------------------------------------------


def test_planes_are_the_codes() -> None:
    digits_ = planes.split(CODES)
    assert all(plane.max() == 3 for plane in digits_)
    np.testing.assert_array_equal(sum(plane.astype(int) * 4 ** (3 - index) for index, plane in enumerate(digits_)), CODES)


@pytest.mark.parametrize("bits", range(1, 9))
def test_nested_codes_are_the_means_of_what_they_replace(bits: int) -> None:
    found = planes.nested(CODES, bits)
    assert found.dtype == np.float32 and len(np.unique(found)) == 1 << bits
    for start in CODES >> (8 - bits):
        same = CODES[CODES >> (8 - bits) == start]
        assert (found[same] == same.mean()).all()


@pytest.mark.parametrize("text", LAYERS)
@pytest.mark.parametrize("bits", [8, 6, 4, 2, 5, 1])
def test_weights_are_read_as_the_format_says(text: str, bits: int) -> None:
    """Bit by bit: all of it is exact in float32 but the last product, which is rounded once."""
    proto, weight = layer(text)
    model, _ = convert(proto)
    axis = 1 if text == MATMUL else 0
    spec = QuantSpec(8, signed=False, symmetric=False, granularity=PerAxis(axis))
    np.testing.assert_array_equal(decoded(model, bits), expected(weight, spec, bits))
    if bits == 8:
        np.testing.assert_array_equal(decoded(model, bits), Uniform(spec).fake_quantize(weight, Uniform(spec).fit_weight(weight)))


def test_both_runtimes_agree_with_numpy() -> None:
    """At the file's 8 bits and at each width selected from it: 1e-5 of the largest output."""
    for text in LAYERS:
        proto, weight = layer(text)
        model, _ = convert(proto)
        x = RNG.standard_normal((2, 3, 6, 6) if text == CONV else (2, 8)).astype(np.float32)
        for bits in (8, 6, 4, 2):
            planes.select(model, bits)
            result = ir.to_proto(model)
            spec = QuantSpec(8, signed=False, symmetric=False, granularity=PerAxis(int(text == MATMUL)))
            wanted = ReferenceEvaluator(build(text, w=expected(weight, spec, bits))).run(None, {"x": x})[0]
            for found in (session(result).run(None, {"x": x})[0], ReferenceEvaluator(result).run(None, {"x": x})[0]):
                np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def session(proto: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_weights_are_floats_once_a_session_is_loaded(tmp_path: Path) -> None:
    """ONNX Runtime folds the planes: nothing is decoded at every run."""
    model, _ = convert(layer(MATMUL)[0])
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert [node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node] == ["MatMul"]


# ---- accuracy -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("tails", [4, 1000])
def test_nested_is_near_direct_and_errors_grow_as_bits_go(seed: int, tails: int, sqnr: Callable[[np.ndarray, np.ndarray], float]) -> None:
    """Outputs for correlated, heavy-tailed inputs: 6 nested bits are at most 0.3 dB behind a quantizer of 6, 4 likewise."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_t(tails, (64, 96)).astype(np.float32)
    x = rng.standard_t(4, (256, 64)).astype(np.float32) @ rng.standard_normal((64, 64)).astype(np.float32)
    model, record = convert(build("m (float[n, 64] x) => (float[n, 96] y) { y = MatMul (x, w) }", w=weight))
    found = {bits: sqnr(x @ weight, x @ decoded(model, bits)) for bits in range(1, 9)}
    assert list(found.values()) == sorted(found.values())
    for bits in (8, 6, 4):
        spec = QuantSpec(bits, signed=False, symmetric=False, granularity=PerAxis(1))
        direct = Uniform(spec).fake_quantize(weight, Uniform(spec).fit_weight(weight))
        assert found[bits] >= sqnr(x @ weight, x @ direct) - 0.3
    (entry,) = record.measurements
    for bits in (8, 6, 4, 2):
        assert entry.numbers[f"weight_sqnr_{bits}_bits_db"] == pytest.approx(sqnr(weight, decoded(model, bits)), abs=1e-3)


@pytest.mark.parametrize("text", [GEMM, MATMUL])
def test_groups(text: str) -> None:
    proto, weight = layer(text)
    model, _ = convert(proto, group_size=4)
    spec = QuantSpec(8, signed=False, symmetric=False, granularity=PerGroup(int(text == GEMM), 4))
    np.testing.assert_array_equal(decoded(model, 8), Uniform(spec).fake_quantize(weight, Uniform(spec).fit_weight(weight)))
    planes.select(model, 4)
    assert decoded(model, 4).shape == weight.shape
    ungrouped, _ = convert(proto, group_size=3)  # 8 is no multiple of it
    np.testing.assert_array_equal(decoded(ungrouped, 8), decoded(convert(proto)[0], 8))


# ---- the graph ------------------------------------------------------------------------------------------------------

SHARED = """m (float[n, 8] x) => (float[n, 8] y) {
   hidden = MatMul (x, w)
   again = MatMul (hidden, w)
   y = Gemm <transB = 1> (again, w)
}"""


def test_golden() -> None:
    """A weight that three layers read, one of them along the other axis. `GRAPHQ_GOLDEN=write` writes it anew."""
    model, _ = convert(build(SHARED, w=(np.arange(64, dtype=np.float32).reshape(8, 8) - 20) / 8))
    planes.select(model, 6)
    rows = [f"{name}: {value.dtype}{list(ir.shape_of(value) or ())}" for name, value in model.graph.initializers.items()]
    for node in model.graph:
        rows.append(f"{node.outputs[0].name} = {node.op_type}({', '.join(value.name or '' for value in node.inputs if value)})")
    text = "\n".join([f"opset {ir.opset(model)}", *rows, *(function.name for function in model.functions.values()), ""])
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text, encoding="utf-8")
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_the_weights_are_known_to_be_stored() -> None:
    """Other passes leave them alone, and say why."""
    model, _ = convert(layer(CONV)[0])
    (node,) = [node for node in model.graph if node.op_type == "Conv"]
    assert linear.linear_refusal(node) == "it is quantized already" and stored.is_stored(linear.weight_of(node))


def test_what_is_refused() -> None:
    dynamic = "m (float[n, 8] x, float[8, 6] v) => (float[n, 6] y, float[n, 6] z) { y = MatMul (x, w)\n z = MatMul (x, v) }"
    model, record = convert(build(dynamic, w=layer(MATMUL)[1]))
    assert [reason for _, reason in record.skipped] == ["its weight is not a constant of the graph"]
    _, record = convert(build(f"{MATMUL[:-2]}\n z = MatMul (y, v) }}".replace("float[n, 6] y", "float[n, 6] z"), w=layer(MATMUL)[1],
                              v=np.ones((6, 6), np.float32)), exclude=("z",))  # fmt: skip
    assert [reason for _, reason in record.skipped] == ["excluded by the recipe"]
    with pytest.raises(TargetError, match="(?s)does not take uint2"):
        convert(layer(MATMUL)[0], "tensorrt")
    with pytest.raises(graphq.GraphqError, match="(?s)at least one Conv"):
        convert(build("m (float[n, 8] x, float[8, 6] w) => (float[n, 6] y) { y = MatMul (x, w) }"))


# ---- the file -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nested")
    calib, limits = {"input": digits.calibration(16)}, {"min_speedup": None}
    graphq.convert(onnx_path("digits_vit"), folder / "nested.onnx", recipe="nested-8-6-4-2", calib=calib, limits=limits)
    graphq.convert(onnx_path("digits_vit"), folder / "int8.onnx", recipe="int8-weight-only", calib=calib, limits=limits)
    return folder


def test_one_file_of_all_widths_is_hardly_larger_than_one_of_8_bits(vit: Path) -> None:
    assert (vit / "nested.onnx").stat().st_size <= 1.05 * (vit / "int8.onnx").stat().st_size


def test_selected_files_shrink_and_agree_with_the_whole(vit: Path, capsys: pytest.CaptureFixture) -> None:
    """The planes that are left out change the size and nothing else: the same scalar in the whole file gives the same logits."""
    images = digits.images("test")[0][:32]
    whole, sizes = onnx.load(vit / "nested.onnx"), [(vit / "nested.onnx").stat().st_size]
    for bits in (6, 4, 2):
        with pytest.raises(SystemExit) as stop:
            cli.main(["planes", str(vit / "nested.onnx"), "--bits", str(bits), "-o", str(vit / f"{bits}.onnx")])
        assert not stop.value.code and f"{bits} bits a weight" in capsys.readouterr().out
        sizes.append((vit / f"{bits}.onnx").stat().st_size)
        (entry,) = [entry for entry in whole.graph.initializer if entry.name == planes.BITS]
        entry.CopyFrom(numpy_helper.from_array(np.float32(bits), planes.BITS))
        (first,) = session(whole).run(None, {"input": images})
        (second,) = session(onnx.load(vit / f"{bits}.onnx")).run(None, {"input": images})
        (third,) = session(graphq.select_bits(vit / "nested.onnx", bits)).run(None, {"input": images})
        np.testing.assert_array_equal(first, second)
        np.testing.assert_array_equal(first, third)
    weights = 4 * 455_000 / 16  # of a plane, about
    assert all(0.9 * weights < before - after < 1.1 * weights for before, after in zip(sizes, sizes[1:], strict=False))


def test_accuracy_of_each_width(vit: Path) -> None:
    """Weights of 6 bits lose nothing here, of 4 a point at most."""
    found = {bits: digits.accuracy(session(graphq.select_bits(vit / "nested.onnx", bits))) for bits in (8, 6, 4)}
    assert min(found[8], found[6]) >= 98.8 and found[4] >= 98.0


def test_a_report_tells_what_was_left_out(vit: Path, tmp_path: Path) -> None:
    onnx.save(graphq.select_bits(vit / "nested.onnx", 4), tmp_path / "4.onnx")
    from graphq.report import read_embedded

    before, after = (read_embedded(ir.load(file)) for file in (vit / "nested.onnx", tmp_path / "4.onnx"))
    assert "4 bits were kept" in after.notes[0] and len(after.notes) == len(before.notes) + 1
    assert before.comparison and not (after.comparison or after.accuracy or after.gates or after.held_out)
    assert after.weight_bytes_before == before.weight_bytes_before and after.weight_bytes_after < 0.7 * before.weight_bytes_after


def test_what_cannot_be_selected(vit: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(ModelError, match="(?s)not stored in planes.*nested-8-6-4-2"):
        graphq.select_bits(onnx_path("digits_vit"), 4)
    onnx.save(graphq.select_bits(vit / "nested.onnx", 4), tmp_path / "4.onnx")
    with pytest.raises(UsageError, match="(?s)in 6 bits.*1 to 4"):
        graphq.select_bits(tmp_path / "4.onnx", 6)
    before = (vit / "nested.onnx").read_bytes()
    with pytest.raises(SystemExit):
        cli.main(["planes", str(vit / "nested.onnx"), "--bits", "4", "-o", str(vit / "nested.onnx")])
    assert "overwrite an input" in capsys.readouterr().err and (vit / "nested.onnx").read_bytes() == before


def test_weights_beside_the_file_are_taken_into_the_model(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(96, 64)).astype(np.float32)
    model, _ = convert(build("m (float[n, 96] x) => (float[n, 64] y) { y = MatMul (x, w) }", w=weight))
    inside = tmp_path / "inside.onnx"
    ir.save(model, inside)
    onnx.save(onnx.load(inside), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    first, second = (graphq.select_bits(file, 4) for file in (inside, tmp_path / "m.onnx"))
    x = np.ones((2, 96), np.float32)
    assert not any(entry.data_location == onnx.TensorProto.EXTERNAL for entry in second.graph.initializer)
    np.testing.assert_array_equal(session(first).run(None, {"x": x})[0], session(second).run(None, {"x": x})[0])


def test_more_than_one_protobuf_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ir.save(convert(layer(MATMUL)[0])[0], tmp_path / "m.onnx")
    monkeypatch.setattr(planes, "PROTOBUF_LIMIT", (1 << 26) + 1)
    with pytest.raises(ModelError, match="(?s)one protobuf.*4 bits.*graphq planes"):
        graphq.select_bits(tmp_path / "m.onnx", 4)


@pytest.mark.parametrize("named", ["value", "weight"])
def test_a_value_of_the_users_with_the_name_of_the_number(named: str) -> None:
    text, weights = "m (float[n, 8] x) => (float[n, 6] y) { h = MatMul (x, w)  y = Add (h, c) }", {"c": np.full(6, 3, np.float32)}
    proto = build(text.replace(*(("h", planes.BITS) if named == "value" else ("c)", f"{planes.BITS})"))), w=layer(MATMUL)[1],
                  **({planes.BITS: weights["c"]} if named == "weight" else weights))  # fmt: skip
    model, _ = convert(proto)
    planes.select(model, 4)
    plain, x = convert(layer(MATMUL)[0])[0], np.ones((2, 8), np.float32)
    planes.select(plain, 4)
    found, product = (session(ir.to_proto(one)).run(None, {"x": x})[0] for one in (model, plain))
    np.testing.assert_array_equal(found, product + 3)


def test_odd_widths_keep_the_planes_of_the_next_even_one() -> None:
    proto, _ = layer(MATMUL)
    whole = convert(proto)[0]
    model, wanted = ir.clone(whole), {bits: decoded(whole, bits) for bits in (5, 6)}
    planes.select(model, 5)
    np.testing.assert_array_equal(decoded(model, 5), wanted[5])
    planes.select(model, 6)
    np.testing.assert_array_equal(decoded(model, 6), wanted[6])
