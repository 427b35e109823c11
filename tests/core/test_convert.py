"""convert, end to end on a trained network: the result is verified before it appears, and nothing else is left behind."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import onnx
import pytest

from graphq import ir, verify
from graphq.backends import files
from graphq.convert import convert
from graphq.errors import DataError, GraphqError, ModelError, RecipeError, TargetError, UsageError, VerifyError
from graphq.executor import Executor
from graphq.gates import Gates
from graphq.inspect import compare_files
from graphq.models import digits, onnx_path
from graphq.passes.normalize import Normalize
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.recipe import Recipe, load_recipe
from graphq.report import read_embedded

CNN = onnx_path("digits_cnn")


def recipe(name: str = "int8", *more: Pass, **gates: Any) -> Recipe:
    """A built-in recipe, without the gate on speed, since tests time nothing."""
    return Recipe(name=name, passes=(*load_recipe(name).passes, *more), gates=Gates(**gates))


@pass_options
class Spoil(Pass):
    """Does one thing wrong, as a faulty pass would."""

    name: ClassVar[str] = "spoil"

    how: Literal["raise", "invalid", "nan", "noise", "rename", "illegal"]

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        node = next(node for node in reversed(list(model.graph)) if node.op_type == "Gemm")
        output = node.outputs[0]
        if self.how == "raise":
            raise RuntimeError("a bug in a pass")
        if self.how == "invalid":
            ctx.edit.set_attribute(node, "bogus", 1)
        elif self.how in ("nan", "noise"):
            bias = ir.constant(node.inputs[2])
            if bias is None:  # it is quantized
                bias = np.zeros(10, np.float32)
            ctx.edit.rewire(node, 2, ctx.edit.initializer("spoilt", np.full_like(bias, np.nan if self.how == "nan" else 1e4)))
        elif self.how == "rename":
            output.name = "other"
            ctx.edit.edits["rename"] += 1
        else:
            scale, zero = ctx.edit.initializer("s", np.float32(1e-3)), ctx.edit.initializer("z", np.int8(5))
            codes = ctx.edit.insert(node, "QuantizeLinear", [node.inputs[0], scale, zero], output="q")
            ctx.edit.rewire(node, 0, ctx.edit.insert(node, "DequantizeLinear", [codes, scale, zero], output="dq"))


@pytest.fixture(scope="module")
def calib() -> dict[str, np.ndarray]:
    return {"input": digits.calibration(16)}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A copy of the model; whatever happens, it has to stay as it is."""
    path = tmp_path / "model.onnx"
    shutil.copy(CNN, path)
    before, changed = path.read_bytes(), path.stat().st_mtime_ns
    yield tmp_path
    assert path.read_bytes() == before and path.stat().st_mtime_ns == changed


def names(folder: Path) -> set[str]:
    return {file.name for file in folder.iterdir()}


# ---- what comes out -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["onnxruntime", "generic", "tensorrt"])
@pytest.mark.parametrize("name", ["int8", "int8-weight-only"])
def test_a_trained_network_becomes_smaller_and_stays_right(folder: Path, calib: dict[str, np.ndarray], name: str, target: str) -> None:
    found = convert(folder / "model.onnx", folder / "out.onnx", recipe=recipe(name), calib=calib, target=target)
    assert names(folder) == {"model.onnx", "out.onnx"}
    onnx.checker.check_model(folder / "out.onnx", full_check=True)
    ratio = (folder / "out.onnx").stat().st_size / (folder / "model.onnx").stat().st_size
    assert ratio < 0.7
    assert found.output.bytes == (folder / "out.onnx").stat().st_size and found.output.path.endswith("out.onnx")
    assert found.output.sha256 == hashlib.sha256((folder / "out.onnx").read_bytes()).hexdigest()
    assert found.comparison[0].sqnr_db > 20 and found.target == target
    assert not found.notes and found.calibration.samples == 16
    images, labels = digits.images("test")
    result = Executor(ir.load(folder / "out.onnx")).run({"input": images[:200]})[0]
    assert (result.argmax(1) == labels[:200]).mean() > 0.9


def test_what_the_report_says_is_so(folder: Path, calib: dict[str, np.ndarray]) -> None:
    found = convert(folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8"), calib=calib, report_dir=folder / "report", seed=3)
    model = ir.load(folder / "out.onnx")
    linear = [node for node in model.graph if node.op_type in ("Conv", "Gemm")]
    kept = [reason for record in found.passes for node, reason in record.skipped if node.startswith(("Conv", "Gemm"))]
    assert found.quantized["Conv"] + found.quantized["Gemm"] == len(linear) - len(kept) >= 8
    assert [record.name for record in found.passes] == [one.name for one in recipe("int8").passes]
    assert found.weight_bytes_before > 3 * found.weight_bytes_after and found.seed == 3
    assert found.latency is not None and sum(found.integer_kernels.values()) > 0
    embedded = read_embedded(model)
    assert embedded is not None and embedded.recipe == found.recipe and embedded.calibration.digest == found.calibration.digest
    assert (folder / "report" / "report.json").is_file()


def test_accuracy_is_measured_where_there_are_labels(folder: Path, calib: dict[str, np.ndarray]) -> None:
    images, labels = digits.images("test")
    np.savez(folder / "eval.npz", input=images[:64], labels=labels[:64])
    found = convert(
        folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8", max_accuracy_drop=20), calib=calib, evaluate=folder / "eval.npz"
    )
    assert found.accuracy is not None and found.accuracy.samples == 64 and found.accuracy.reference > 0.9
    assert [(gate.name, gate.passed) for gate in found.gates] == [("max_accuracy_drop", True), ("max_size_ratio", True)]


def test_without_data_the_report_says_so(folder: Path) -> None:
    found = convert(folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8"))
    assert len(found.notes) == 1 and "RANDOM" in found.notes[0] and "--calib" in found.notes[0]
    assert found.calibration.kind == "random"


@pytest.mark.parametrize("name", ["int8", "int4-weight-only"])
def test_the_same_input_gives_the_same_bytes(folder: Path, calib: dict[str, np.ndarray], name: str) -> None:
    for out in ("one.onnx", "two.onnx"):
        convert(folder / "model.onnx", folder / out, recipe=recipe(name, min_speedup=1e-6), calib=calib)
    assert (folder / "one.onnx").read_bytes() == (folder / "two.onnx").read_bytes()


def test_an_earlier_result_is_replaced(folder: Path, calib: dict[str, np.ndarray]) -> None:
    (folder / "out.onnx").write_text("an earlier result")
    convert(folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8-weight-only"), calib=calib)
    onnx.checker.check_model(folder / "out.onnx")


# ---- what does not come out -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "error", "aside"),
    [("raise", RuntimeError, False), ("invalid", VerifyError, False), ("nan", VerifyError, True), ("rename", VerifyError, False)],
)
def test_a_faulty_pass_leaves_nothing_at_the_asked_path(
    folder: Path, calib: dict[str, np.ndarray], how: Any, error: type[Exception], aside: bool
) -> None:
    (folder / "out.onnx").write_text("an earlier result")
    with pytest.raises(error) as found:
        convert(
            folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8", Spoil(how=how)), calib=calib, report_dir=folder / "report"
        )
    assert (folder / "out.onnx").read_text() == "an earlier result"
    assert names(folder) - {"report"} == {"model.onnx", "out.onnx", *(["out.onnx.failed.onnx"] if aside else [])}
    assert not (folder / "report" / "report.json").exists()
    if how == "invalid":
        assert "pass: spoil, number" in found.value.__notes__[0]


def test_what_the_target_refuses_is_not_written(folder: Path, calib: dict[str, np.ndarray]) -> None:
    with pytest.raises(TargetError, match="(?s)tensorrt cannot run.*zero points"):
        plan = Recipe(name="r", passes=(Normalize(), Spoil(how="illegal")))
        convert(folder / "model.onnx", folder / "out.onnx", recipe=plan, calib=calib, target="tensorrt")
    assert names(folder) == {"model.onnx"}


@pytest.mark.parametrize("gates", [{"min_sqnr_db": 200.0}, {"min_cosine": 1.0}, {"max_size_ratio": 0.01}])
def test_a_missed_gate_keeps_the_result_aside(folder: Path, calib: dict[str, np.ndarray], gates: dict[str, float]) -> None:
    with pytest.raises(VerifyError, match=f"(?s){next(iter(gates))}.*out.onnx.failed.onnx"):
        convert(folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8", **gates), calib=calib)
    assert names(folder) == {"model.onnx", "out.onnx.failed.onnx"}
    onnx.checker.check_model(folder / "out.onnx.failed.onnx")


def test_noise_is_caught_by_a_gate(folder: Path, calib: dict[str, np.ndarray]) -> None:
    with pytest.raises(VerifyError, match="min_sqnr_db is 20"):
        convert(
            folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8-weight-only", Spoil(how="noise"), min_sqnr_db=20), calib=calib
        )


@pytest.mark.parametrize("fails", ["while writing", "while moving"])
def test_a_full_disk_leaves_nothing(folder: Path, calib: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def full(*args: object) -> None:
        if fails == "while writing":
            Path(str(args[1])).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(*((ir, "save") if fails == "while writing" else (files.os, "replace")), full)
    with pytest.raises((OSError, GraphqError)):
        convert(folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8-weight-only"), calib=calib)
    assert names(folder) == {"model.onnx"}


def test_the_result_appears_at_the_end_only(folder: Path, calib: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch) -> None:
    seen, compare = [], verify.compare

    def noting(*args: Any) -> Any:
        seen.append(names(folder))
        return compare(*args)

    monkeypatch.setattr(verify, "compare", noting)
    convert(folder / "model.onnx", folder / "out.onnx", recipe=recipe("int8-weight-only"), calib=calib)
    assert seen and all(entry == {"model.onnx"} for entry in seen)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"model": "absent.onnx"}, ModelError),
        ({"out": "model.onnx"}, UsageError),
        ({"out": "nowhere/out.onnx"}, UsageError),
        ({"calib": {"wrong": np.zeros((4, 1, 32, 32), np.float32)}}, DataError),
        ({"recipe": "int9"}, RecipeError),
        ({"target": "abacus"}, TargetError),
        ({"emit": "engine"}, UsageError),
        ({"evaluate": "absent.npz"}, DataError),
    ],
    ids=["model", "out is model", "out folder", "calib", "recipe", "target", "engine", "evaluate"],
)
def test_wrong_calls_fail_before_any_work(
    folder: Path, calib: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], error: type[GraphqError]
) -> None:
    monkeypatch.setattr(Executor, "__init__", lambda *args, **options: pytest.fail("a model was run"))
    paths = {
        key: folder / value
        for key, value in ({"model": "model.onnx", "out": "out.onnx"} | change).items()
        if key in ("model", "out", "evaluate")
    }
    values: dict[str, Any] = {"recipe": recipe(), "calib": calib} | change | paths
    with pytest.raises(error):
        convert(values.pop("model"), values.pop("out"), **values)
    assert names(folder) == {"model.onnx"}


def test_the_result_remembers_its_preprocessing(folder: Path) -> None:
    """Pixels are enough for whatever is done with it later."""
    text = "g (float[N,3,8,8] x) => (float[] y) { f = Flatten(x) y = MatMul(f, w) }"
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]> {text}')
    weight = np.random.default_rng(0).standard_normal((192, 64)).astype(np.float32)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, folder / "pixels.onnx")
    np.savez(folder / "pixels.npz", x=np.random.default_rng(1).integers(0, 256, (20, 8, 8, 3), np.uint8))
    limits = {"min_speedup": None}
    convert(folder / "pixels.onnx", folder / "out.onnx", calib=folder / "pixels.npz", preprocess="imagenet", limits=limits)
    found, description = compare_files(folder / "out.onnx", folder / "out.onnx", folder / "pixels.npz")
    assert found[0].sqnr_db == float("inf") and "imagenet" in description
