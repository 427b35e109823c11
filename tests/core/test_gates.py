"""What a recipe asks for and convert cannot do is refused before any work, or named in the report; never passed in silence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from graphq import ir
from graphq.convert import convert
from graphq.errors import RecipeError, UsageError, VerifyError
from graphq.executor import Executor
from graphq.gates import Gates
from graphq.models import digits, onnx_path
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.passes.quantize_weights import QuantizeWeights
from graphq.pipeline import Pass
from graphq.recipe import Recipe, load_recipe
from graphq.report import Report, read_embedded

CNN = onnx_path("digits_cnn")


@pytest.fixture(scope="module")
def calib() -> dict[str, np.ndarray]:
    return {"input": digits.calibration(16)}


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever runs a model fails the test."""
    monkeypatch.setattr(Executor, "__init__", lambda *args, **options: pytest.fail("a model was run"))


@pytest.mark.usefixtures("idle")
def test_a_limit_on_accuracy_without_labels_is_refused(tmp_path: Path, calib: dict[str, np.ndarray]) -> None:
    plan = replace(load_recipe("int8"), gates=Gates(max_accuracy_drop=1.0))
    with pytest.raises(UsageError, match="max_accuracy_drop") as caught:
        convert(CNN, tmp_path / "out.onnx", recipe=plan, calib=calib)
    assert caught.value.exit_code == 2 and "--eval" in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "generic"])
def test_a_limit_on_speed_that_nothing_measures_is_noted(tmp_path: Path, calib: dict[str, np.ndarray], target: str) -> None:
    plan = replace(load_recipe("int8"), gates=Gates(min_speedup=100.0))
    found = convert(CNN, tmp_path / "out.onnx", recipe=plan, calib=calib, target=target)
    assert found.latency is None and [gate.name for gate in found.gates] == ["max_size_ratio"]
    (note,) = found.notes
    assert "min_speedup" in note and "not measured" in note and target in note


def test_a_measured_limit_on_speed_needs_no_note(tmp_path: Path, calib: dict[str, np.ndarray]) -> None:
    plan = replace(load_recipe("int8"), gates=Gates(min_speedup=1e-6))
    found = convert(CNN, tmp_path / "out.onnx", recipe=plan, calib=calib)
    assert not found.notes and [(gate.name, gate.passed) for gate in found.gates] == [("min_speedup", True), ("max_size_ratio", True)]


def test_doubtful_calibration_is_noted(tmp_path: Path, calib: dict[str, np.ndarray]) -> None:
    free: dict[str, float | None] = {"min_speedup": None, "min_cosine": None}
    few = convert(CNN, tmp_path / "few.onnx", calib={"input": calib["input"][:3]}, limits=free).notes
    assert len(few) == 1 and "only 3 calibration samples" in few[0]
    flat = convert(CNN, tmp_path / "flat.onnx", calib={"input": np.zeros_like(calib["input"])}, limits=free).notes
    assert len(flat) == 1 and "Input 'input' is 0 throughout" in flat[0]
    one = convert(CNN, tmp_path / "one.onnx", calib={"input": calib["input"][:1]}, limits=free).notes
    assert len(one) == 1 and "verified on the same" in one[0]


def test_limits_take_the_place_of_the_recipes(tmp_path: Path, calib: dict[str, np.ndarray]) -> None:
    with pytest.raises(VerifyError, match="min_sqnr_db is 200"):
        convert(CNN, tmp_path / "out.onnx", calib=calib, limits={"min_speedup": None, "min_sqnr_db": 200.0})
    found = convert(CNN, tmp_path / "out.onnx", calib=calib, limits={"min_speedup": None, "max_size_ratio": None})
    assert [gate.name for gate in found.gates] == ["min_cosine"] and "min_speedup" not in found.recipe
    with pytest.raises(RecipeError, match="(?s)min_sped.*min_speedup"):
        convert(CNN, tmp_path / "out.onnx", calib=calib, limits={"min_sped": 1.0})


def test_a_refused_result_has_its_report(tmp_path: Path, calib: dict[str, np.ndarray]) -> None:
    """In the error, in the folder and in the refused file; a later success takes that away."""
    (tmp_path / "out.onnx").write_text("an earlier result")
    for limits in ({"min_sqnr_db": 200.0}, {"max_size_ratio": 0.01}):
        with pytest.raises(VerifyError, match=r"(?s)--gate.*out.onnx is that of an earlier run") as caught:
            convert(CNN, tmp_path / "out.onnx", calib=calib, limits={"min_speedup": None, **limits}, report_dir=tmp_path)
        assert caught.value.what == "The result misses a gate that was asked for."
        found, aside = caught.value.report, tmp_path / "out.onnx.failed.onnx"
        assert found is not None and found.output.path == str(aside) and found.output.bytes == aside.stat().st_size
        assert [gate.name for gate in found.gates if not gate.passed] == list(limits)
        assert Report.from_json((tmp_path / "report.json").read_text()) == found
        assert read_embedded(ir.load(aside)).quantized == found.quantized
    convert(CNN, tmp_path / "out.onnx", calib=calib, limits={"min_speedup": None})
    assert {path.name for path in tmp_path.iterdir()} == {"out.onnx", "report.json"}


@pytest.mark.parametrize("passes", [(InsertQdq(),), (QuantizeWeights(), Normalize()), ()], ids=["alone", "late", "none"])
@pytest.mark.usefixtures("idle")
def test_a_recipe_begins_with_normalize(tmp_path: Path, calib: dict[str, np.ndarray], passes: tuple[Pass, ...]) -> None:
    with pytest.raises(RecipeError, match="normalize"):
        convert(CNN, tmp_path / "out.onnx", recipe=Recipe(name="mine", passes=passes), calib=calib)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("idle")
def test_a_recipe_file_begins_with_normalize(tmp_path: Path, calib: dict[str, np.ndarray]) -> None:
    (tmp_path / "mine.yaml").write_text("passes: [insert-qdq, normalize]\n")
    with pytest.raises(RecipeError, match="normalize"):
        convert(CNN, tmp_path / "out.onnx", recipe=tmp_path / "mine.yaml", calib=calib)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.yaml"]


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["max_perplexity_ratio", "max_accuracy_drop"])
def test_a_limit_without_labels_says_whose_it_is(tmp_path: Path, name: str) -> None:
    passes = (Normalize(), QuantizeWeights())
    with pytest.raises(UsageError, match=rf"(?s)where: --gate {name}\n.*leave the gate out"):
        convert(CNN, tmp_path / "out.onnx", recipe=Recipe(name="mine", passes=passes), limits={name: 1.0})
    with pytest.raises(UsageError, match=rf"(?s)gate {name} of the recipe.*--gate {name}=off"):
        convert(CNN, tmp_path / "out.onnx", recipe=Recipe(name="mine", passes=passes, gates=Gates(**{name: 1.0})))  # type: ignore[arg-type]


def test_evaluation_data_stands_in_for_calibration_data_that_no_pass_reads(tmp_path: Path) -> None:
    inputs, labels = digits.images("test")
    np.savez(tmp_path / "eval.npz", input=inputs[:40], labels=labels[:40])
    found = convert(CNN, tmp_path / "out.onnx", recipe="int8-weight-only", evaluate=tmp_path / "eval.npz", limits={"min_speedup": None})
    assert (found.calibration.kind, found.calibration.used, found.held_out) == ("npz", False, 8) and not found.notes
    found = convert(CNN, tmp_path / "out.onnx", evaluate=tmp_path / "eval.npz", limits={"min_speedup": None})
    assert found.calibration.kind == "random" and any("only the evaluation data tells" in note for note in found.notes)
