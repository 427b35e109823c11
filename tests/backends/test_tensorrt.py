"""What TensorRT takes and refuses, asked of the real parser and builder of TensorRT-RTX; no GPU is needed.

Engines are built, never run or even loaded: loading one needs a GPU.
"""

import importlib.util
import signal
import sys
import types
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from graphq import ir, ir_files
from graphq.backends import engine_shapes, tensorrt
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.engines import EngineOptions
from graphq.errors import TargetError, UsageError
from graphq.pipeline import Progress, no_progress
from graphq.targets import get_target

RTX = get_target("tensorrt-rtx")
needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                               reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")  # fmt: skip
MAGIC = b"vtrt"
"""First bytes of an engine of TensorRT-RTX 1.7."""

HEAD = '<ir_version: 10, opset_import: ["" : 21, "graphq" : 1]>'
RELU = f"{HEAD} g (float[n, 4] x) => (float[n, 4] y) {{ [relu] y = Relu(x) }}"
FLOAT_BIAS = "float[4] b = {1, 2, 3, 4}"
INT32_BIAS = "int32[4] bq = {1, 2, 3, 4}, float[4] bs = {0.1, 0.1, 0.1, 0.1}"


def numbers(count: int) -> str:
    return ", ".join(str(index % 7 - 3) for index in range(count))


def conv(storage: str = "int8", zero: int = 0, bias: str = FLOAT_BIAS, weight_zero: int = 0) -> ir.Model:
    """A Conv with Q/DQ on its input and a DQ on its weight, as insert-qdq writes them."""
    bias_node = "[dequantize_b] b = DequantizeLinear<axis = 0>(bq, bs)" if bias == INT32_BIAS else ""
    return ir.from_onnx_text(f"""{HEAD}
        g (float[n, 3, 8, 8] x) => (float[n, 4, 6, 6] y)
        <float s = {{0.1}}, {storage} z = {{{zero}}}, int8[4, 3, 3, 3] w = {{{numbers(108)}}}, float[4] ws = {{0.1, 0.2, 0.3, 0.4}},
         int8[4] wz = {{{", ".join([str(weight_zero)] * 4)}}}, {bias}>
        {{
            [quantize_x] xq = QuantizeLinear(x, s, z)
            [dequantize_x] xd = DequantizeLinear(xq, s, z)
            [dequantize_w] wd = DequantizeLinear<axis = 0>(w, ws, wz)
            {bias_node}
            [conv] y = Conv(xd, wd, b)
        }}""")


def matmul() -> ir.Model:
    return ir.from_onnx_text(f"""{HEAD}
        g (float[n, t, 4] x) => (float[n, t, 6] y)
        <float s = {{0.1}}, int8 z = {{0}}, int8[4, 6] w = {{{numbers(24)}}}, float[6] ws = {{0.1, 0.2, 0.3, 0.4, 0.5, 0.6}}>
        {{
            xq = QuantizeLinear(x, s, z)
            xd = DequantizeLinear(xq, s, z)
            wd = DequantizeLinear<axis = 1>(w, ws)
            [matmul] y = MatMul(xd, wd)
        }}""")


def blocked_int4(folder: Path, storage: int = onnx.TensorProto.INT4) -> ir.Model:
    """x @ w with w [64, 32] in 4 bits, one scale for 32 rows; ONNX text has no 4-bit types."""
    weight = helper.make_tensor("w", storage, [64, 32], [index % 7 for index in range(64 * 32)])
    scale = helper.make_tensor("s", onnx.TensorProto.FLOAT, [2, 32], [0.1] * 64)
    nodes = [helper.make_node("DequantizeLinear", ["w", "s"], ["wd"], name="dequantize_w", axis=0, block_size=32),
             helper.make_node("MatMul", ["x", "wd"], ["y"], name="matmul")]  # fmt: skip
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n", size]) for name, size in (("x", 64), ("y", 32))]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight, scale])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), folder / "int4.onnx")
    return ir.load(folder / "int4.onnx")


def table(order: str) -> ir.Model:
    """An INT8 embedding table, dequantized before or after the lookup."""
    nodes = {"before": "wd = DequantizeLinear(w, s)  y = Gather(wd, ids)", "after": "rows = Gather(w, ids)  y = DequantizeLinear(rows, s)"}
    return ir.from_onnx_text(f"""{HEAD}
        g (int64[n, 5] ids) => (float[n, 5, 4] y) <int8[8, 4] w = {{{numbers(32)}}}, float s = {{0.1}}> {{ {nodes[order]} }}""")


def emit(model: ir.Model, folder: Path, progress: Progress = no_progress, options: EngineOptions = tensorrt.DEFAULT,
         **shapes: tuple[int, ...]) -> bytes:  # fmt: skip
    inputs = ir.inputs(model)
    arrays = {entry.name: np.ones(shapes.get(entry.name, (4, *entry.shape[1:])), entry.dtype) for entry in inputs}
    tensorrt.emit_engine(model, folder / "m.engine", RTX, open_calibration(arrays, inputs), options, progress)
    assert [file.name for file in folder.iterdir() if file.suffix != ".onnx"] == ["m.engine"]
    return (folder / "m.engine").read_bytes()


# ---- what is taken --------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize("model", [conv(), conv("uint8"), table("before")], ids=["int8 Conv", "uint8 with zero point 0", "DQ, then Gather"])
def test_builds(model: ir.Model, tmp_path: Path) -> None:
    assert tensorrt.parse(model, RTX) == []
    assert emit(model, tmp_path).startswith(MAGIC)


@needs_rtx
def test_builds_int8_matmul_with_an_open_length(tmp_path: Path) -> None:
    assert emit(matmul(), tmp_path, x=(4, 9, 4)).startswith(MAGIC)


@needs_rtx
def test_builds_blocked_int4_weights(tmp_path: Path) -> None:
    assert emit(blocked_int4(tmp_path), tmp_path).startswith(MAGIC)


@needs_rtx
def test_builds_a_model_local_function(tmp_path: Path) -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[n, 4] x) => (float[n, 4] y) {{ y = graphq.swish(x) }}
        <domain: "graphq", opset_import: ["" : 21]> swish (a) => (b) {{ c = Sigmoid(a)  b = Mul(a, c) }}""")
    assert emit(model, tmp_path).startswith(MAGIC)


@needs_rtx
def test_a_model_too_large_for_protobuf_goes_through_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[list[str]] = []
    build = tensorrt.build

    def spy(file: Path, *rest: object) -> object:
        saved.append(sorted(part.name for part in file.parent.iterdir()))
        return build(file, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(ir_files, "PROTOBUF_LIMIT", 1 << 26)  # less what a file needs besides weights: every weight is too large
    monkeypatch.setattr(tensorrt, "build", spy)
    assert emit(conv(), tmp_path).startswith(MAGIC)
    assert saved == [["model.onnx", "model.onnx.data"]]


# ---- what is refused ------------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize(
    ("model", "node", "words"),
    [
        (conv(zero=3), "QuantizeLinear 'quantize_x' (nx3x8x8, scalar, scalar)", "Non-zero zero point is not supported"),
        (conv("uint8", zero=128), "QuantizeLinear 'quantize_x' (nx3x8x8, scalar, scalar)", "Non-zero zero point is not supported"),
        (conv(weight_zero=1), "DequantizeLinear 'dequantize_w' (4x3x3x3, 4, 4)", "Non-zero zero point is not supported"),
        (conv(bias=INT32_BIAS), "DequantizeLinear 'dequantize_b' (4, 4)", "has type Int32 but must have type"),
        (ir.from_onnx_text(RELU.replace("Relu", "graphq.Unknown")), "Unknown 'relu' (nx4)", "Plugin not found"),
        (ir.from_onnx_text(RELU.replace("[relu] y = Relu(x)", "a = Relu(x) [det] y = Det(a)")), "Det 'det'", "unsupported node"),
    ],
    ids=["zero point", "uint8 zero point", "weight zero point", "INT32 bias", "unknown domain", "unknown operator"],
)
def test_refused_with_the_node_and_the_parsers_words(model: ir.Model, node: str, words: str, tmp_path: Path) -> None:
    (refusal,) = tensorrt.parse(model, RTX)
    assert refusal.startswith(f"{node}: " if "(" in node else node) and words in refusal and "checkMacros" not in refusal
    with pytest.raises(TargetError) as caught:
        emit(model, tmp_path)
    assert caught.value.where == refusal and caught.value.expected and "--target onnxruntime" in caught.value.hint
    assert not list(tmp_path.iterdir())


@needs_rtx
def test_refusal_inside_a_function_names_the_call() -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[n, 4, 4] x) => (float[n] y) {{ [call] y = graphq.f(x) }}
        <domain: "graphq", opset_import: ["" : 21]> f (a) => (b) {{ c = Exp(a)  b = Det(c) }}""")
    (refusal,) = tensorrt.parse(model, RTX)
    assert refusal == "Det '' in call (f): unsupported node"


@needs_rtx
def test_a_lookup_of_integer_rows_fails_in_the_builder(tmp_path: Path) -> None:
    """The parser takes it: a quantized table has to be dequantized before the Gather."""
    assert tensorrt.parse(table("after"), RTX) == []
    with pytest.raises(TargetError, match="builder of tensorrt-rtx failed") as caught:
        emit(table("after"), tmp_path)
    assert "Quantized constant (w) is only allowed before DQ" in caught.value.where and caught.value.hint
    assert not list(tmp_path.iterdir())


# ---- shapes ---------------------------------------------------------------------------------------------------------

MASKED = f"""{HEAD}
    g (float[batch, seq, 4] x, float[batch, seq, 1] mask, float[1, batch] bias, float[2, 4] fixed) => (float[batch, seq, 2] y)
    {{ a = Mul(x, mask)  t = Transpose(fixed)  b = MatMul(a, t)  c = ReduceMax<keepdims = 1>(bias)  y = Add(b, c) }}"""


@needs_rtx
def test_ranges_of_open_axes(tmp_path: Path) -> None:
    batch, length = engine_shapes.BATCH, (1, 9, 9)
    ir.save(ir.from_onnx_text(MASKED), tmp_path / "m.onnx")
    with tensorrt.Network(tmp_path / "m.onnx", RTX) as network:
        found = engine_shapes.profile(network.inputs, {"x": (1, 9, 4), "mask": (1, 9, 1), "bias": (1, 1)}, {}, 1)
    expected = {"x": (batch, length, (4, 4, 4)), "mask": (batch, length, (1, 1, 1)), "bias": ((1, 1, 1), batch)}
    assert found.shapes == expected and found.capped == ("x axis 1 (seq)", "mask axis 1 (seq)")


@needs_rtx
def test_what_is_asked_for_an_axis_goes_for_its_symbol(tmp_path: Path) -> None:
    asked = {"x": ((2, 4, 64), (1, 16, 128), (4, 4, 4))}
    ir.save(ir.from_onnx_text(MASKED), tmp_path / "m.onnx")
    built = tensorrt.build(tmp_path / "m.onnx", {"x": (1, 9, 4), "mask": (1, 9, 1), "bias": (1, 1)}, RTX, EngineOptions(shapes=asked))
    assert bytes(memoryview(built.engine)[:4]) == MAGIC and not built.profile.capped
    assert built.profile.shapes["mask"] == (*asked["x"][:2], (1, 1, 1))


@needs_rtx
def test_a_fixed_shape_needs_no_profile(tmp_path: Path) -> None:
    assert emit(ir.from_onnx_text(RELU.replace("n, 4", "2, 4")), tmp_path, x=(2, 4)).startswith(MAGIC)


@needs_rtx
def test_an_image_smaller_than_the_kernel_is_left_out_of_the_range(tmp_path: Path) -> None:
    model = ir.from_onnx_text(f"""{HEAD} g (float[n, 1, h, w] x) => (float[n, 1, a, b] y) <float[1, 1, 3, 3] k = {{{numbers(9)}}}>
        {{ y = Conv(x, k) }}""")
    begun: list[int] = []
    emit(model, tmp_path, lambda what, done, total: begun.append(done) if done == 0 else None, x=(4, 1, 16, 16))
    assert len(begun) == 2  # once from size 1, which the builder calls inconsistent, and once from the size of the data


# ---- manners --------------------------------------------------------------------------------------------------------


@needs_rtx
def test_progress_ends_at_the_total_and_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    calls: list[tuple[str, int, int]] = []
    emit(conv(), tmp_path, lambda *call: calls.append(call))
    tensorrt.parse(conv(zero=3), RTX)
    assert calls[0][:2] == ("build engine", 0) and calls[-1][1] == calls[-1][2]
    assert [call[1] for call in calls] == sorted(call[1] for call in calls)
    assert capfd.readouterr() == ("", "")


@needs_rtx
def test_an_interrupted_build_stops_and_leaves_no_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        emit(conv(), tmp_path, interrupt)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "")


@needs_rtx
def test_ctrl_c_in_the_builder_stops_it(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Raised inside a callback it would be printed and dropped by the bindings, and the engine written."""
    def interrupt(what: str, done: int, total: int) -> None:
        signal.raise_signal(signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        emit(conv(), tmp_path, interrupt)
    assert not list(tmp_path.iterdir()) and capfd.readouterr() == ("", "") and signal.getsignal(signal.SIGINT) is before


@needs_rtx
def test_native_objects_are_gone_while_an_error_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A builder that the garbage collector destroys inside a log callback of the next one hangs the process."""
    made: list[tensorrt.Network] = []
    start = tensorrt.Network.__init__
    monkeypatch.setattr(tensorrt.Network, "__init__", lambda self, *rest: (made.append(self), start(self, *rest))[1])
    with pytest.raises(TargetError) as caught:
        emit(conv(zero=3), tmp_path)
    with pytest.raises(TargetError):
        emit(table("after"), tmp_path)
    assert caught.tb and len(made) == 2
    assert [(one.parser, one.definition, one.builder, one.inputs) for one in made] == [(None, None, None, [])] * 2


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt-rtx"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name.replace("-", "_"), None)  # type: ignore[arg-type]
    with pytest.raises(TargetError) as caught:
        tensorrt.parse(ir.from_onnx_text(RELU), get_target(name))
    assert f"pip install {tensorrt.DISTRIBUTIONS[name]}" in caught.value.hint and name.replace("-", "_") in caught.value.expected


def test_tensorrt_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """By contract: its libraries are not here. The bindings raise a TypeError after the logger has heard why."""

    class Logger:
        ERROR, INTERNAL_ERROR, WARNING = "error", "internal", "warning"

    def no_builder(log: Logger) -> None:
        log.log("error", "CUDA initialization failure with error: 35")  # type: ignore[attr-defined]
        raise TypeError("pybind11::init(): factory function returned nullptr")

    fake = types.SimpleNamespace(ILogger=Logger, Builder=no_builder)
    monkeypatch.setitem(sys.modules, "tensorrt", fake)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="cannot start") as caught:
        tensorrt.parse(ir.from_onnx_text(RELU), get_target("tensorrt"))
    assert "CUDA initialization failure" in caught.value.where and "GPU" in caught.value.expected


@needs_rtx
@pytest.mark.parametrize("options", [
    EngineOptions(sparse=True, weight_streaming=True, level=0), EngineOptions(compute_capability=("8.9", "12.0")),
    EngineOptions(shapes={"x": ((1, 4, 64), (1, 2, 2), (4, 4, 4))}),
], ids=["flags", "capability", "shapes"])  # fmt: skip
def test_options_reach_the_builder(options: EngineOptions, tmp_path: Path) -> None:
    assert emit(matmul(), tmp_path, options=options, x=(4, 9, 4)).startswith(MAGIC)


@needs_rtx
@pytest.mark.parametrize("axes", [((1, 4, 64), (1, 2, 2)), ((1, 4, 64), (1, 2, 2), (3, 3, 3)), ((2, 1, 3), (1, 1, 1), (4, 4, 4))],
                         ids=["rank", "a fixed axis", "order"])  # fmt: skip
def test_a_range_that_fits_no_input_is_refused(axes: tuple[tuple[int, int, int], ...], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not fit the model") as caught:
        emit(matmul(), tmp_path, options=EngineOptions(shapes={"x": axes}), x=(4, 9, 4))
    assert "x=?x?x4" in caught.value.expected and not list(tmp_path.iterdir())


@needs_rtx
def test_a_range_for_an_input_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not fit the model"):
        emit(matmul(), tmp_path, options=EngineOptions(shapes={"y": ((1, 1, 1),)}), x=(4, 9, 4))


@needs_rtx
def test_an_unknown_compute_capability_is_refused(tmp_path: Path) -> None:
    """9.0 is not among those of TensorRT-RTX 1.7."""
    with pytest.raises(UsageError, match=r"9\.0") as caught:
        emit(matmul(), tmp_path, options=EngineOptions(compute_capability=("9.0",)), x=(4, 9, 4))
    assert "8.9" in caught.value.expected


@needs_rtx
def test_a_refusal_names_the_pass_that_made_the_node() -> None:
    model = ir.from_onnx_text(RELU)
    edit = Editor(model)
    edit.author = "a-pass"
    relu = model.graph[0]
    broken = edit.insert(relu, "NonMaxSuppression", [relu.inputs[0], relu.inputs[0]], output="boxes", like=relu.inputs[0])
    edit.rewire(relu, 0, broken)
    (refusal,) = tensorrt.parse(model, RTX)
    assert "NonMaxSuppression" in refusal and "made by pass a-pass" in refusal
