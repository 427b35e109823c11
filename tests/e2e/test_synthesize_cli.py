"""`graphq synthesize` and `--calib synth` as users meet them: what is written, what is said, what goes on after a stop, what is refused."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from graphq import console, convert
from graphq.cli_synthesize import STRATEGY_NAMES
from graphq.models import onnx_path
from graphq.synthesis import STRATEGIES, synthesize

CNN, LM = onnx_path("digits_cnn"), onnx_path("digits_lm")
torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")


Run = Callable[..., Any]
"""The fixture `run`."""


def test_the_command_line_knows_the_strategies() -> None:
    assert STRATEGY_NAMES == ("auto", *STRATEGIES)


def test_data_and_sheet_are_written_and_the_choice_is_told(run: Run, tmp_path: Path) -> None:
    out, sheet = tmp_path / "calib.npz", tmp_path / "sheet.png"
    ended = run("synthesize", CNN, "-o", out, "--count", 3, "--steps", 2, "--preprocess", "inception", "--sheet", sheet)
    assert ended.code == 0 and ended.err.startswith("bn-stats: the statistics of 8 BatchNormalization; not tokens: ")
    for words in ("3 samples from synthesis by bn-stats", "2 steps, seed 0", "statistics", "first step", "sheet.png"):
        assert words in ended.out
    with np.load(out) as pack:
        assert pack.files == ["input"] and pack["input"].shape == (3, 1, 32, 32) and pack["input"].dtype == np.float32
        expected = synthesize(CNN, count=3, steps=2, preprocess="inception")
        assert pack["input"].tobytes() == expected["input"].tobytes()
    assert sheet.read_bytes().startswith(b"\x89PNG") and sorted(path.name for path in tmp_path.iterdir()) == ["calib.npz", "sheet.png"]
    converted = run("convert", CNN, "-o", tmp_path / "small.onnx", "--calib", out, "--recipe", "int8", "--gate", "min_speedup=off", "-q")
    assert converted.code == 0, converted.err


def test_json_is_alone_on_stdout(run: Run, tmp_path: Path) -> None:
    ended = run("synthesize", CNN, "-o", tmp_path / "c.npz", "--strategy", "logits", "--option", "soft_labels=false", "--count", 2,
                "--steps", 2, "--seed", 3, "--json", "-q")  # fmt: skip
    found = json.loads(ended.out)
    assert ended.code == 0 and not ended.err and found["strategy"] == "logits" and found["options"] == {"soft_labels": False}
    assert (found["count"], found["steps"], found["seed"]) == (2, 2, 3) and set(found["last"]) == {"labels", "variation"}


def test_the_same_command_goes_on_after_a_stop(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["synthesize", CNN, "--strategy", "logits", "--count", 4, "--batch", 2, "--steps", 4]
    assert run(*command, "-o", tmp_path / "whole.npz").code == 0
    said = []

    @contextlib.contextmanager
    def bar(enabled: bool = True) -> Iterator[Callable[[str, int, int], None]]:
        def show(what: str, done: int, total: int) -> None:
            said.append((what, done, total))
            if done == 6 and len(said) < 9:
                raise KeyboardInterrupt

        yield show

    monkeypatch.setattr(console, "progress_bar", bar)
    stopped = run(*command, "-o", tmp_path / "calib.npz")
    assert stopped.code == 130 and not (tmp_path / "calib.npz").exists() and (tmp_path / "calib.npz.part").is_dir()
    assert said[-1][0].startswith("synthesize: labels ") and said[-1][1:] == (6, 8)
    refused = run(*command, "--seed", 1, "-o", tmp_path / "calib.npz")
    assert refused.code == 2 and "another one" in refused.err and "calib.npz.part" in refused.err
    count = len(said)
    assert run(*command, "-o", tmp_path / "calib.npz").code == 0
    assert [done for _, done, _ in said[count:]][-2:] == [7, 8]
    assert (tmp_path / "calib.npz").read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not (tmp_path / "calib.npz.part").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((CNN, "-o", "c.txt"), 2, ("--out c.txt", ".npz")),
        ((CNN, "-o", "c.npz", "--sheet", "c.jpg"), 2, ("--sheet c.jpg", ".png")),
        ((CNN, "-o", "missing/c.npz"), 2, ("missing", "does not exist")),
        ((CNN, "-o", "c.npz", "--strategy", "bnstats"), 2, ("bn-stats",)),
        ((CNN, "-o", "c.npz", "--strategy", "logits", "--option", "speed=1"), 2, ("called 'speed'", "rate")),
        ((CNN, "-o", "c.npz", "--option", "rate"), 2, ("NAME=VALUE",)),
        ((CNN, "-o", "c.npz", "--strategy", "vit-attention"), 1, ("no attention over patches",)),
        ((CNN, "-o", "c.npz", "--preprocess", "imagnet"), 1, ("imagenet",)),
        ((LM, "-o", "c.npz", "--sheet", "c.png"), 1, ("images",)),
        (("none.onnx", "-o", "c.npz"), 1, ("none.onnx",)),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[object, ...], code: int, words: tuple[str, ...]
) -> None:
    monkeypatch.chdir(tmp_path)
    ended = run("synthesize", *arguments)
    assert ended.code == code and all(word in ended.err for word in words), ended.err
    assert "Traceback" not in ended.err and not list(tmp_path.iterdir())


def test_without_torch_the_extra_is_named(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.startswith(("graphq.synthesis.", "graphq.torch_executor"))]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torch", None)
    ended = run("synthesize", CNN, "-o", tmp_path / "c.npz")
    assert ended.code == 2 and "graphq[torch]" in ended.err and "Traceback" not in ended.err


# ---- --calib synth --------------------------------------------------------------------------------------------------


def test_convert_synthesizes_and_says_so(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphq.synthesis.bn_stats import BnStats

    monkeypatch.setattr(BnStats, "steps", 2)
    monkeypatch.chdir(tmp_path)
    ended = run("convert", CNN, "-o", "small.onnx", "--calib", "synth", "--preprocess", "inception", "--gate", "min_speedup=off",
                "--report", "report")  # fmt: skip
    assert ended.code == 0, ended.err
    assert "64 samples from synthesis by bn-stats" in ended.out and "was SYNTHESIZED in" in ended.out and "RANDOM" not in ended.out
    made = json.loads(Path("report/report.json").read_text())["calibration"]
    assert made["kind"] == "synthesized" and made["used"] and made["synthesis"]["strategy"] == "bn-stats"
    assert made["synthesis"]["seconds"] > 0 and set(made["synthesis"]["last"]) == {"statistics"}
    assert (Path("report") / made["synthesis"]["sheet"]).read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "small.onnx"]  # nothing is kept elsewhere
    again = run("report", "small.onnx", "--json")
    kept = json.loads(again.out)["calibration"]["synthesis"]
    assert kept["strategy"] == "bn-stats" and kept["seconds"] == 0 and kept["sheet"] is None
    run("convert", CNN, "-o", "again.onnx", "--calib", "synth", "--preprocess", "inception", "--gate", "min_speedup=off", "-q")
    feed = {"input": np.ones((1, 1, 32, 32), np.float32)}
    assert np.array_equal(*(ort.InferenceSession(name).run(None, feed)[0] for name in ("small.onnx", "again.onnx")))


def test_convert_from_python_synthesizes_tokens_without_a_sheet(tmp_path: Path) -> None:
    found = convert(LM, tmp_path / "small.onnx", recipe="int8-weight-only", calib="synth", report_dir=tmp_path / "report")
    made = found.calibration.synthesis
    assert made is not None and made.strategy == "tokens" and made.sheet is None
    assert [path.name for path in (tmp_path / "report").iterdir()] == ["report.json"]
