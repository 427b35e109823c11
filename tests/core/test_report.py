"""Reports survive JSON and the inside of a model, say nothing about the machine there, and are refused when they do not fit."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphq import ir, report
from graphq.errors import GraphqError, ModelError, UsageError
from graphq.pipeline import Measurement, PassRecord
from graphq.report import Accuracy, CalibrationFacts, FileFacts, GateResult, Latency, OutputComparison, Report

TINY = """<ir_version: 10, opset_import: ["" : 21]>
tiny (float[n, 2] x) => (float[n, 3] y) <float[2, 3] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }"""


def make(**changes: Any) -> Report:
    record = PassRecord("insert-qdq", {"bits": 8, "exclude": ["a", "b"]}, {"insert": 3}, (Measurement("Conv 'c'", {"sqnr_db": 30.5}),),
                        (("MatMul 'm'", "its weight is not a constant of the graph"),), 0.25)  # fmt: skip
    values: dict[str, Any] = dict(
        graphq="0.1.0", created="2026-01-02T03:04:05+00:00", seed=7, command="graphq convert /home/me/a.onnx -o b.onnx",
        model=FileFacts("/home/me/a.onnx", "ab" * 32, 4000, 20, 900), output=FileFacts("/home/me/b.onnx", "cd" * 32, 1000, 21, 905),
        recipe="passes:\n- insert-qdq\n", recipe_name="int8", target="onnxruntime",
        calibration=CalibrationFacts("npz", "64 samples from /home/me/calib.npz", 64, "ef" * 32),
        passes=(record,), comparison=(OutputComparison("y", 33.25, 0.999, 0.5, 1.0),),
        latency=Latency(1, 2.0, 1.0, 2.0, "onnxruntime 1.31", 2),
        accuracy=Accuracy("top1", 0.99, 0.98, 450), quantized={"Conv": 8}, weight_bytes_before=400, weight_bytes_after=110,
        integer_kernels={"QLinearConv": 8}, gates=(GateResult("min_sqnr_db", 20.0, 33.25, True),), versions={"numpy": "2.4"},
        seconds={"load": 0.5}, notes=("a note",),
    )  # fmt: skip
    return Report(**values | changes)


def test_json_gives_back_an_equal_report() -> None:
    assert Report.from_json(make().to_json()) == make()


def test_numbers_that_json_lacks_survive_in_standard_json() -> None:
    odd = make(comparison=(OutputComparison("y", math.inf, math.nan, -math.inf, None),))
    text = odd.to_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    back = Report.from_json(text).comparison[0]
    assert back.sqnr_db == math.inf and math.isnan(back.cosine) and back.max_abs == -math.inf and back.top1_agreement is None


def test_option_values_of_any_kind_become_json() -> None:
    values = {"path": Path("a/b"), "array": np.arange(2), "number": np.float32(0.5), "names": frozenset({"b", "a"}), "nested": {1: (2,)}}
    record = replace(make().passes[0], options=values)
    found = json.loads(make(passes=(record,)).to_json())["passes"][0]["options"]
    assert found == {"path": "a/b", "array": [0, 1], "number": 0.5, "names": ["a", "b"], "nested": {"1": [2]}}


def test_a_field_of_a_later_version_is_ignored() -> None:
    data = json.loads(make().to_json()) | {"mood": "good"}
    assert Report.from_json(json.dumps(data)) == make()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "not JSON"),
        ("[1]", "states no schema"),
        ('{"schema": 99, "graphq": "9.0"}', "schema 99.*reads schema 1(.|\n)*9.0"),
        ('{"schema": 1}', "required"),
        (make().to_json().replace('"seed": 7', '"seed": "seven"'), "seed.*integer"),
    ],
)
def test_what_is_no_report_is_refused_with_its_place(text: str, words: str) -> None:
    with pytest.raises(GraphqError, match=words) as caught:
        Report.from_json(text, where="here.json")
    assert caught.value.where == "here.json" and caught.value.hint


def test_write_makes_the_folder_and_leaves_one_file(tmp_path: Path) -> None:
    path = report.write(make(), tmp_path / "new" / "folder")
    report.write(make(seed=8), path.parent)
    assert [file.name for file in path.parent.iterdir()] == ["report.json"]
    assert Report.from_json(path.read_text()).seed == 8


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = report.write(make(), tmp_path)

    def fail(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(UsageError, match="No space left"):
        report.write(make(seed=8), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert Report.from_json(path.read_text()).seed == 7


@pytest.mark.parametrize("check", [report.check_folder, lambda folder: report.write(make(), folder)])
def test_a_folder_below_a_file_is_refused(tmp_path: Path, check: Any) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="report cannot be written"):
        check(tmp_path / "file" / "folder")


def test_checking_a_folder_creates_nothing(tmp_path: Path) -> None:
    report.check_folder(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())


def test_the_embedded_report_tells_nothing_about_the_machine(tmp_path: Path) -> None:
    model = ir.from_onnx_text(TINY)
    report.embed(model, make())
    ir.save(model, tmp_path / "m.onnx")
    found = report.read_embedded(ir.load(tmp_path / "m.onnx"))
    assert b"/home" not in (tmp_path / "m.onnx").read_bytes()
    assert (found.model.path, found.output.path, found.output.sha256, found.command) == ("a.onnx", "b.onnx", "", None)
    assert found.latency is None and not found.created and not found.seconds
    assert found.passes == (replace(make().passes[0], seconds=0.0),)
    assert found.comparison == make().comparison


def test_two_runs_embed_the_same() -> None:
    models = [ir.from_onnx_text(TINY) for _ in range(2)]
    for number, model in enumerate(models):
        report.embed(model, make(created=f"2026-01-0{number + 1}T00:00:00+00:00", seconds={"load": float(number)}))
    assert models[0].metadata_props == models[1].metadata_props


def test_a_long_report_is_embedded_without_what_is_said_per_node() -> None:
    model = ir.from_onnx_text(TINY)
    many = tuple(Measurement(f"Conv '{index}'", {"sqnr_db": 1.0}) for index in range(5000))
    report.embed(model, make(passes=(replace(make().passes[0], measurements=many),)))
    assert len(model.metadata_props[report.METADATA_KEY].encode()) <= report.EMBED_LIMIT
    (record,) = report.read_embedded(model).passes
    assert record.measurements == () and record.skipped == make().passes[0].skipped


def test_a_model_without_report_is_refused() -> None:
    with pytest.raises(ModelError, match="no graphq report"):
        report.read_embedded(ir.from_onnx_text(TINY))


def test_file_facts(tmp_path: Path) -> None:
    model = ir.from_onnx_text(TINY)
    ir.save(model, tmp_path / "m.onnx")
    found = report.file_facts(tmp_path / "m.onnx", ir.load(tmp_path / "m.onnx"))
    assert (found.bytes, found.opset, found.parameters) == ((tmp_path / "m.onnx").stat().st_size, 21, 6)
    assert len(found.sha256) == 64
