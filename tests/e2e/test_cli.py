"""The command line as users meet it: what each command prints and writes, and its exit code. Faults are in test_bad_input.py."""

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import graphq
from graphq import cli, cli_options, console
from graphq.models import digits, onnx_path
from graphq.report import CalibrationFacts, FileFacts, Report
from graphq.targets import TARGETS

CNN = onnx_path("digits_cnn")
RECIPE = "passes: [normalize, quantize-weights]\n"


Run = Callable[..., Any]
"""The fixture `run`."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """calib.npz, eval.npz, a recipe without gates on speed, and a model converted with all of them."""
    folder = tmp_path_factory.mktemp("data")
    inputs, labels = digits.images("test")
    np.savez(folder / "calib.npz", input=digits.calibration(16))
    np.savez(folder / "eval.npz", input=inputs[:32], labels=labels[:32])
    (folder / "plain.yaml").write_text(RECIPE)
    with pytest.raises(SystemExit) as stop:
        cli.main([
            "convert", str(CNN), "-o", str(folder / "small.onnx"), "--recipe", str(folder / "plain.yaml"), "--quiet",
            "--calib", str(folder / "calib.npz"), "--eval", str(folder / "eval.npz"), "--report", str(folder / "report"),
        ])  # fmt: skip
    assert not stop.value.code
    return folder


def test_convert_prints_a_summary_and_writes_a_valid_model(run: Run, data: Path, tmp_path: Path) -> None:
    before = CNN.read_bytes()
    out = tmp_path / "small.onnx"
    ended = run("convert", CNN, "-o", out, "--recipe", data / "plain.yaml", "--calib", data / "calib.npz", "--report", tmp_path / "report")
    assert ended.code == 0 and not ended.err
    written = str(tmp_path / "report" / "report.json")
    for words in ("times smaller", "logits", "dB", "quantized: 8 Conv, 1 Gemm", "verified on 16 samples", "on 4 samples", written):
        assert words in ended.out
    onnx.checker.check_model(onnx.load(out), full_check=True)
    assert out.stat().st_size < len(before) / 3 and CNN.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"small.onnx", "report"}


def test_convert_reports_accuracy_before_and_after(data: Path) -> None:
    found = Report.from_json((data / "report" / "report.json").read_text()).accuracy
    assert found is not None and found.samples == 32 and found.reference > 0.9 and found.result > 0.9


def test_convert_json_is_the_report_and_nothing_else(run: Run, data: Path, tmp_path: Path) -> None:
    arguments = ("--recipe", data / "plain.yaml", "--calib", data / "calib.npz", "--seed", 3)
    ended = run("convert", CNN, "-o", tmp_path / "a.onnx", *arguments, "--json")
    found = Report.from_json(ended.out)
    assert found.to_json() + "\n" == ended.out
    assert (found.seed, found.calibration.samples, found.recipe_name) == (3, 16, "plain")
    assert found.command is not None and found.command.startswith("graphq convert ")
    assert found.output.bytes == (tmp_path / "a.onnx").stat().st_size


def test_convert_without_data_says_so_loudly(run: Run, data: Path, tmp_path: Path) -> None:
    arguments = ("convert", CNN, "-o", tmp_path / "a.onnx", "--recipe", data / "plain.yaml")
    assert "Note: " in (ended := run(*arguments)).out and "RANDOM" in ended.out
    assert "RANDOM" in run(*arguments, "--json").err


def test_quiet_prints_nothing(run: Run, data: Path, tmp_path: Path) -> None:
    assert run("convert", CNN, "-o", tmp_path / "a.onnx", "--recipe", data / "plain.yaml", "--quiet") == (0, "", "")


def test_a_missed_gate_exits_3_and_keeps_the_result_aside(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "strict.yaml").write_text(RECIPE + "gates: {min_sqnr_db: 200}\n")
    ended = run("convert", CNN, "-o", tmp_path / "a.onnx", "--recipe", tmp_path / "strict.yaml", "--calib", data / "calib.npz")
    assert ended.code == 3 and "min_sqnr_db" in ended.err and "a.onnx.failed.onnx" in ended.err
    assert "gate min_sqnr_db 200" in ended.out and "MISSED" in ended.out and "quantized:" in ended.out
    assert not (tmp_path / "a.onnx").exists() and (tmp_path / "a.onnx.failed.onnx").exists()


def test_gates_can_be_given(run: Run, data: Path, tmp_path: Path) -> None:
    arguments = ("convert", CNN, "-o", tmp_path / "a.onnx", "--recipe", data / "plain.yaml", "--calib", data / "calib.npz")
    ended = run(*arguments, "--gate", "min_sqnr_db=200", "--gate", "max_size_ratio=off", "--json")
    assert ended.code == 3 and [gate["name"] for gate in json.loads(ended.out)["gates"]] == ["min_sqnr_db"]
    assert run(*arguments, "--gate", "min_sqnr_db=1").code == 0
    wrongs = {"min_sqnr_db": "min_speedup=1.2", "min_sqnr_db=much": "min_speedup=1.2", "min_cosine=2": "less than or equal to 1"}
    for wrong, word in wrongs.items():
        ended = run(*arguments, "--gate", wrong)
        assert ended.code in (1, 2) and word in ended.err and not ended.out


def test_a_shown_recipe_can_be_used(run: Run, data: Path, tmp_path: Path) -> None:
    shown = run("recipes", "show", "int8-weight-only")
    (tmp_path / "mine.yaml").write_text(shown.out)
    ended = run("convert", CNN, "-o", tmp_path / "a.onnx", "--recipe", tmp_path / "mine.yaml", "--calib", data / "calib.npz")
    assert (shown.code, ended.code) == (0, 0) and "mine for onnxruntime" in ended.out


def test_report_reads_what_convert_left(run: Run, data: Path) -> None:
    for source in (data / "small.onnx", data / "report", data / "report" / "report.json"):
        ended = run("report", source)
        assert ended.code == 0, source
        for words in (f"made by graphq {graphq.__version__}", "quantize-weights", "top1 on 32 samples", "numpy"):
            assert words in ended.out
    assert Report.from_json(run("report", data / "small.onnx", "--json").out).quantized == {"Conv": 8, "Gemm": 1}


def test_compare(run: Run, data: Path) -> None:
    ended = run("compare", CNN, data / "small.onnx", "--data", data / "calib.npz")
    assert ended.code == 0 and "logits" in ended.out and "100.00 %" in ended.out and "RANDOM" not in ended.out
    (found,) = json.loads(run("compare", CNN, data / "small.onnx", "--data", data / "calib.npz", "--json").out)["comparison"]
    assert found["name"] == "logits" and 20 < found["sqnr_db"] < 100
    assert "RANDOM" in run("compare", CNN, CNN).out
    assert "mean" in run("compare", CNN, data / "small.onnx", "--layers").out


def test_what_was_left_alone_is_said_by_pass_with_reasons(run: Run, data: Path, tmp_path: Path) -> None:
    (tmp_path / "some.yaml").write_text("passes: [normalize, {quantize-weights: {exclude: [node_conv2d, node_linear]}}]\n")
    ended = run("convert", CNN, "-o", tmp_path / "a.onnx", "--recipe", tmp_path / "some.yaml", "--calib", data / "calib.npz")
    assert "quantized: 7 Conv" in ended.out and "quantize-weights left 2 alone:" in ended.out
    assert "2 x excluded by the recipe: Conv 'node_conv2d'" in ended.out


def test_inspect(run: Run, data: Path) -> None:
    ended = run("inspect", CNN)
    assert ended.code == 0
    for words in ("opset 20", "[batch, 1, 32, 32]", "8 Conv", "can be quantized: 8 Conv, 1 Gemm", "tensorrt-rtx", "int8-weight-only"):
        assert words in ended.out
    assert "integer kernels on this CPU: none" in run("inspect", CNN, "--kernels").out
    found = json.loads(run("inspect", data / "small.onnx", "--kernels", "--json").out)
    assert found["model"]["already_quantized"] and len(found["kernels"]["floating"]) == 8  # the Gemm multiplies codes


def test_recipes_and_their_schema(run: Run) -> None:
    assert "int8" in run("recipes").out
    assert json.loads(run("recipes", "schema").out)["properties"]["passes"]["type"] == "array"


def test_passes_and_their_options(run: Run) -> None:
    assert "quantize-weights" in run("passes").out
    shown = run("passes", "show", "quantize-weights").out
    assert "2 | 3 | 4 | 8" in shown and "Width of an integer weight" in shown


def test_version_is_that_of_the_distribution(run: Run) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    assert run("--version").out.split() == ["graphq", project["version"]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convrt", "a.onnx"], "Did you mean 'convert'?"),
        (["recipes", "shwo"], "Did you mean 'show'?"),
        (["convert", "a.onnx", "-o", "b.onnx", "--clib", "c.npz"], "--calib"),
        (["convert", "a.onnx", "-o", "b.onnx", "--target", "tensorrt-rxt"], "did you mean 'tensorrt-rtx'?"),
        (["convert", "a.onnx", "-o", "b.onnx", "--emit", "enigne"], "did you mean 'engine'?"),
        (["convert", "a.onnx", "-o", "b.onnx", "--seed", "-1"], "--seed"),
        (["convert", "a.onnx", "-o", "b.onnx", "--memory-budget", "2XB"], "512MB"),
        (["convert", "a.onnx"], "--out"),
        (["compare", "a.onnx"], "B"),
    ],
)
def test_wrong_usage_exits_2_and_helps(run: Run, arguments: list[str], words: str) -> None:
    ended = run(*arguments)
    assert ended.code == 2 and words in ended.err and "Traceback" not in ended.err and not ended.out


def test_targets_of_the_command_line_are_those_that_exist() -> None:
    assert set(cli_options.TARGET_NAMES) == set(TARGETS)


@pytest.mark.parametrize(
    ("text", "count"), [("512MB", 512 << 20), ("2 GiB", 2 << 30), ("1.5g", 3 << 29), ("1048576", 1 << 20), ("4096kb", 4 << 20)]
)
def test_sizes(text: str, count: int) -> None:
    assert cli_options.parse_size(text) == count


@pytest.mark.parametrize("text", ["", "MB", "-2GB", "2XB", "10", "1e9", "2GB extra"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(Exception, match="is not a size"):
        cli_options.parse_size(text)


def test_an_unexpected_error_is_called_a_bug(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> None:
        raise KeyError("oops")

    monkeypatch.setattr("graphq.inspect.inspect", fail)
    ended = run("inspect", CNN)
    assert ended.code == 1 and "this is a bug in graphq: KeyError: 'oops'" in ended.err and "--debug" in ended.err
    assert "Traceback" not in ended.err and "Traceback" in run("inspect", CNN, "--debug").err


def test_names_from_a_model_cannot_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    facts = FileFacts("\x1b[2Jevil[red].onnx", "", 10, 20, 3)
    console.summary(Report(graphq="0", created="", seed=0, command=None, model=facts, output=facts, recipe="", recipe_name="r", target="t",
                           calibration=CalibrationFacts("npz", "d", 1, ""), passes=(), comparison=(), notes=("\x9b31m",)))  # fmt: skip
    out = capfd.readouterr().out
    assert "\x1b" not in out and "\x9b" not in out and "evil[red].onnx" in out


def test_progress_is_shown_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    for terminal in (False, True):
        monkeypatch.setattr("sys.stderr.isatty", lambda terminal=terminal: terminal, raising=False)
        with console.progress_bar() as progress:
            progress("calibrate", 3, 8)
            progress("verify", 8, 8)
        out, err = capfd.readouterr()
        assert not out and ("verify" in err) == terminal


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)


def test_the_module_runs_like_the_command() -> None:
    ended = fresh("import runpy, sys; sys.argv = ['graphq', '--version']; runpy.run_module('graphq', run_name='__main__')")
    assert ended.returncode == 0 and ended.stdout.startswith("graphq ")


def test_the_public_names_are_there_and_convert_is_the_function() -> None:
    code = """
import graphq, sys
assert "numpy" not in sys.modules and "onnx" not in sys.modules
assert set(graphq.__all__) <= set(dir(graphq))
import graphq.convert
assert all(getattr(graphq, name) for name in graphq.__all__)
assert callable(graphq.convert) and issubclass(graphq.ModelError, graphq.GraphqError)
from graphq import convert
assert callable(convert)
try:
    graphq.nothing
except AttributeError as error:
    print(error)
"""
    ended = fresh(code)
    assert ended.returncode == 0, ended.stderr
    assert "nothing" in ended.stdout
