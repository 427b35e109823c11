"""`graphq sensitivity` as users meet it: the table, the JSON, the recipe that convert runs, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphq.models import digits, onnx_path
from graphq.recipe import load_recipe

CNN = onnx_path("digits_cnn")


Run = Callable[..., Any]
"""The fixture `run`."""


@pytest.fixture
def calib(tmp_path: Path) -> Path:
    np.savez(tmp_path / "calib.npz", input=digits.calibration(32))
    return tmp_path / "calib.npz"


def test_the_table_names_every_layer_worst_first(run: Run, calib: Path) -> None:
    before = CNN.read_bytes()
    ended = run("sensitivity", CNN, "--calib", calib, "--bits", "8,4", "--samples", 8)
    assert ended.code == 0 and not ended.err and CNN.read_bytes() == before
    rows = [line.split() for line in ended.out.splitlines() if line.startswith("node_")]
    assert len(rows) == 9 and {row[0] for row in rows} >= {"node_linear", "node_conv2d"}
    outputs = [float(row[2]) for row in rows]
    assert outputs == sorted(outputs)
    for words in ("for onnxruntime", "samples 24 to 31 of 32", "8 bits", "4 bits", "inherited", "identical", "%"):
        assert words in ended.out
    assert "6 bits" not in ended.out and "RANDOM" not in ended.out


def test_json_is_alone_on_stdout(run: Run, calib: Path, tmp_path: Path) -> None:
    written = ("--write-recipe", tmp_path / "mine.yaml", "--keep-float", 1)
    found = json.loads(run("sensitivity", CNN, "--calib", calib, "--json", *written).out)
    assert found["bits"] == [8, 6, 4] and found["target"] == "onnxruntime" and not found["random"] and len(found["layers"]) == 9
    worst = found["layers"][0]
    assert set(worst) == {
        "name",
        "given_name",
        "op_type",
        "output_db",
        "both_db",
        "weight_db",
        "activation_db",
        "inherited_db",
        "total_db",
        "work",
        "size",
    }
    assert set(worst["both_db"]) == {"8", "6", "4"}
    assert sum(layer["inherited_db"] == "inf" for layer in found["layers"]) == 1
    again = run("sensitivity", CNN, "--calib", calib, "--json")
    assert json.loads(again.out) == found and not again.err


def test_without_data_it_says_so(run: Run) -> None:
    assert "RANDOM" in run("sensitivity", CNN, "--bits", 8).out
    assert json.loads(run("sensitivity", CNN, "--bits", 8, "--json", "--seed", 1).out)["random"] is True


def test_convert_runs_the_recipe_and_keeps_these_layers_float(run: Run, calib: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "mine.yaml", tmp_path / "small.onnx"
    ended = run("sensitivity", CNN, "--calib", calib, "--bits", 8, "--write-recipe", recipe, "--keep-float", 2)
    worst = [line.split()[0] for line in ended.out.splitlines() if line.startswith("node_")][:2]
    assert ended.code == 0 and f"{recipe}: the recipe int8 with 2 layers left float" in ended.out
    recipe.write_text(recipe.read_text().replace("min_speedup", "max_size_ratio"))  # speed depends on the machine
    assert run("convert", CNN, "-o", out, "--calib", calib, "--recipe", recipe).code == 0
    kept = {node.name for node in onnx.load(out).graph.node if node.op_type in ("Conv", "Gemm") and "dequantized" not in node.input[1]}
    assert set(worst) <= kept and len(kept) < 9


def test_a_limit_in_decibel_chooses_the_layers(run: Run, calib: Path, tmp_path: Path) -> None:
    found = json.loads(run("sensitivity", CNN, "--calib", calib, "--json").out)["layers"]
    limit = (found[3]["output_db"] + found[4]["output_db"]) / 2
    run("sensitivity", CNN, "--calib", calib, "--write-recipe", tmp_path / "mine.yaml", "--min-sqnr", limit)
    (quantizer,) = [one for one in load_recipe(tmp_path / "mine.yaml").passes if one.name == "insert-qdq"]
    assert quantizer.exclude == tuple(layer["name"] for layer in found[:4])  # type: ignore[attr-defined]


def test_none_is_a_choice_and_all_is_not(run: Run, calib: Path, tmp_path: Path) -> None:
    arguments = ("sensitivity", CNN, "--calib", calib, "--bits", 8, "--write-recipe", tmp_path / "mine.yaml")
    assert run(*arguments, "--keep-float", 0).code == 0
    assert load_recipe(tmp_path / "mine.yaml").passes == load_recipe("int8").passes
    ended = run(*arguments, "--keep-float", 9)
    assert ended.code == 2 and "Nothing would be quantized" in ended.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--write-recipe", "a.yaml"], "either --keep-float or --min-sqnr"),
        (["--write-recipe", "a.yaml", "--keep-float", "1", "--min-sqnr", "30"], "either --keep-float or --min-sqnr"),
        (["--keep-float", "1"], "--write-recipe with either"),
        (["--write-recipe", CNN, "--keep-float", "1"], "a .yaml file"),
        (["--write-recipe", "no/such/folder/a.yaml", "--keep-float", "1"], "a folder that exists"),
        (["--keep-float", "-1"], "--keep-float"),
        (["--bits", "8,x"], "Write it as 8,6,4"),
        (["--bits", "9"], "widths from 4 to 8"),
        (["--bits", ""], "widths from 4 to 8"),
        (["--samples", "0"], "--samples"),
        (["--target", "onnxruntim"], "did you mean 'onnxruntime'?"),
        (["--clib", "c.npz"], "--calib"),
    ],
)
def test_wrong_usage_exits_2_before_anything_is_measured(run: Run, arguments: list[str], words: str) -> None:
    before = CNN.read_bytes()
    ended = run("sensitivity", CNN, *arguments)
    assert ended.code == 2 and words in ended.err and "Traceback" not in ended.err and not ended.out and CNN.read_bytes() == before


def test_a_recipe_is_not_written_over_what_is_read(run: Run, calib: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("layout: nchw\nmean: [0.5]\nstd: [0.25]\n")
    text = mine.read_text()
    ended = run("sensitivity", CNN, "--calib", calib, "--preprocess", mine, "--bits", 8, "--write-recipe", mine, "--keep-float", 1)
    assert ended.code == 2 and "overwrite an input" in ended.err and mine.read_text() == text
    assert sorted(file.name for file in tmp_path.iterdir()) == ["calib.npz", "mine.yaml"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.onnx"], "There is no such model file"),
        ([CNN, "--calib", "none.npz"], "the calibration data does not exist"),
        ([CNN, "--calib", CNN], "unknown kind of calibration data"),
    ],
)
def test_wrong_files_exit_1(run: Run, arguments: list[object], words: str) -> None:
    ended = run("sensitivity", *arguments)
    assert ended.code == 1 and words in ended.err and "Traceback" not in ended.err and not ended.out


def test_a_model_without_layers_exits_1_with_the_reason(run: Run, tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4] x) => (float[n, 4] y) { y = Tanh(x) }'),
              tmp_path / "tanh.onnx")  # fmt: skip
    ended = run("sensitivity", tmp_path / "tanh.onnx")
    assert ended.code == 1 and "There is no layer to quantize" in ended.err and "graphq inspect" in ended.err


def test_a_typo_of_the_command_is_told(run: Run) -> None:
    assert "Did you mean 'sensitivity'?" in run("sensitvity", CNN).err
