"""`graphq bench` as users meet it: the table, the JSON, the exit codes."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphq import cli, ir
from graphq.bench_result import BenchResult
from graphq.models import onnx_path

CNN = onnx_path("digits_cnn")
NOPE = "g (float[n, 4] x) => (float[n, 4] y) { y = other.Nope(x) }"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stop:
            cli.main(["bench", *map(str, arguments)])
        return (int(stop.value.code or 0), *capfd.readouterr())

    return call


def test_the_table_the_file_and_the_json(run: Run, tmp_path: Path) -> None:
    arguments = (CNN, "--runtime", "onnxruntime", "--batch", "1,2", "--rounds", 1)
    code, out, err = run(*arguments, "--output", tmp_path / "a.json")
    assert code == 0 and not err
    machine, headings, *rows = out.splitlines()
    assert "cores" in machine and headings.split()[:4] == ["model", "runtime", "batch", "median"] and len(rows) == 2
    assert all(row.startswith("digits_cnn.onnx") and " ms" in row and "MiB" in row and "503.4 kB" in row for row in rows)
    code, out, err = run(tmp_path / "a.json", "--json")  # reading measures nothing
    assert (code, err, json.loads(out)) == (0, "", json.loads((tmp_path / "a.json").read_text()))
    assert len(json.loads(out)["rows"]) == 2


def test_every_run_has_a_table_of_its_own_that_tells_when_and_over_what(run: Run, tmp_path: Path) -> None:
    result = json.loads(BenchResult.to_json(_result("a/m.onnx", "2026-01-02T03:04:05.678+00:00")))
    (tmp_path / "a.json").write_text(json.dumps(result))
    (tmp_path / "b.json").write_text(BenchResult.to_json(_result("b/m.onnx", "2026-02-03T04:05:06.789+00:00")))
    code, out, _ = run(tmp_path / "a.json", tmp_path / "b.json")
    _, *first, _, heading, columns, row = out.splitlines()
    assert code == 0 and first[1] == "Measured 2026-01-02 03:04:05 UTC; speed-up over a/m.onnx" and first[3].startswith("a/m.onnx")
    assert heading == "Measured 2026-02-03 04:05:06 UTC; speed-up over b/m.onnx" and row.startswith("b/m.onnx")  # one name would not do
    assert first[2].startswith("model") and columns.startswith("model")
    assert "Measured" not in run(tmp_path / "a.json")[1]


def _result(model: str, when: str, **changes: Any) -> BenchResult:
    from graphq.bench_result import Row
    from graphq.machine import Machine

    figures = {"median_ms": 1.0, "p95_ms": 2.0, "samples_per_s": 1e3, "peak_mib": 60.0, "speedup": 1.0, "calls": 3, **changes}
    row = Row(when, model, "onnxruntime", "1.0", "CPUExecutionProvider", 1, "x float32[1]", 0, 10, **figures)
    return BenchResult(graphq="0", machine=Machine("a CPU", 2, "", "", "Linux"), rows=(row,))


def test_gpu_memory_and_failures_are_shown(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(_result("m.onnx", "2026", gpu_mib=512.0, median_ms=1234.5).to_json())
    code, out, _ = run(tmp_path / "a.json")
    assert code == 0 and "GPU memory" in out and "512 MiB" in out and "1,234 ms" in out
    (tmp_path / "a.json").write_text(_result("m.onnx", "2026", reason="no such operator").to_json())
    code, out, _ = run(tmp_path / "a.json")
    assert code == 1 and "Not measured: m.onnx on onnxruntime, batch 1: no such operator" in out


def test_exit_code_1_if_nothing_ran_even_beside_earlier_rows(run: Run, tmp_path: Path) -> None:
    (tmp_path / "m.engine").write_bytes(b"engine")
    arguments = (CNN.with_name("digits_vit.onnx"), tmp_path / "m.engine", "--runtime", "tensorrt")
    code, out, _ = run(*arguments, "--json") if not _has_tensorrt() else pytest.skip("TensorRT is installed")
    assert code == 1 and [row["reason"] for row in json.loads(out)["rows"]] == ["tensorrt is not installed (pip install tensorrt)."] * 2
    (tmp_path / "a.json").write_text(out)
    assert run(tmp_path / "a.json")[0] == 1


def test_a_noisy_speedup_is_marked(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(_result("m.onnx", "2026", speedup=8.42, speedup_range=(1.2, 8.4), speedup_of_means=2.4,
                                          rounds=10, noisy=True).to_json())  # fmt: skip
    code, out, _ = run(tmp_path / "a.json")
    assert code == 0 and "8.42*" in out and "* noisy: m.onnx on onnxruntime, batch 1:" in out
    assert "speed-up between 1.20 and 8.40 in most of 10 rounds, 2.40 by samples/s" in out
    code, out, _ = run(tmp_path / "a.json", "--json")
    row = json.loads(out)["rows"][0]
    assert (row["noisy"], row["speedup_range"], row["rounds"]) == (True, [1.2, 8.4], 10)


def test_sizes_of_open_axes_are_shown_once(run: Run, tmp_path: Path) -> None:
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    text = f"{head} g (float[n, past, 4] x, float[n, 4] z) => (float[n, past, 4] y, float[n, 4] w) {{ y = Relu(x) w = Relu(z) }}"
    ir.save(ir.from_onnx_text(text), tmp_path / "text.onnx")
    np.savez(tmp_path / "x.npz", x=np.ones((4, 17, 4), np.float32), z=np.ones((4, 4), np.float32))
    code, out, _ = run(tmp_path / "text.onnx", "--runtime", "onnxruntime", "--rounds", 1, "--batch", "1,4", "--data", tmp_path / "x.npz")
    assert code == 0 and [line for line in out.splitlines() if "Timed" in line] == ["Timed with x float32[N, 17, 4]: text.onnx"]
    assert "Timed" not in run(CNN, "--runtime", "onnxruntime", "--rounds", 1)[1]


def test_exit_code_1_if_one_model_ran_nowhere_and_the_others_are_shown(run: Run, tmp_path: Path) -> None:
    ir.save(ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21, "other" : 1]> {NOPE}'), tmp_path / "nope.onnx")
    code, out, _ = run(tmp_path / "nope.onnx", CNN, "--runtime", "onnxruntime", "--rounds", 1)
    assert code == 1 and "Not measured: nope.onnx on onnxruntime" in out and "\ndigits_cnn.onnx" in out
    ran, failed = (_result(name, "2026", reason=why).rows[0] for name, why in (("a.onnx", None), ("a.onnx", "only 2 samples")))
    (tmp_path / "a.json").write_text(replace(_result("a.onnx", "2026"), rows=(ran, failed)).to_json())
    assert run(tmp_path / "a.json")[0] == 0  # it ran, if not with every batch size


def _has_tensorrt() -> bool:
    from graphq.backends.runners import RUNTIMES

    return RUNTIMES["tensorrt"].is_installed()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((CNN, "--runtime", "onnxrutnime"), "did you mean 'onnxruntime'?"),
        ((CNN, "--batch", "0"), "Write it as 1,8."),
        ((CNN, "--batch", "1;8"), "Write it as 1,8."),
        ((CNN, "--seconds", "0"), "between 0 and 3600"),
        ((CNN, "--seconds", "nan"), "between 0 and 3600"),
        ((CNN, "--rounds", "0"), "--rounds"),
        ((CNN, "--seconds", "1", "--rounds", "1"), "exclude each other"),
        ((CNN, "--threads", "-1"), "--threads"),
        ((CNN, "--output", "out.txt"), ".json"),
        ((CNN, "--bacth", "1"), "--batch"),
        ((), "MODEL"),
    ],
)
def test_wrong_usage_exits_2_and_helps(run: Run, arguments: tuple[object, ...], words: str) -> None:
    code, out, err = run(*arguments)
    assert code == 2 and words in err and "Traceback" not in err and not out


def test_an_output_that_is_read_is_refused(run: Run, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(_result("m.onnx", "2026").to_json())
    code, _, err = run(tmp_path / "a.json", "--output", tmp_path / "a.json")
    assert code == 2 and "overwrite an input" in err
    code, _, err = run(CNN.with_name("missing.onnx"), "--output", tmp_path / "b.json")
    assert code == 1 and "no such model file" in err and not (tmp_path / "b.json").exists()
