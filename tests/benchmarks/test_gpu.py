"""`gpu.py` without a GPU: its checks find faults, and a dry run goes through every case to its files. Nothing is timed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from graphq import ops_gemm

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu.py"


@pytest.fixture
def torch() -> Any:
    module = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[kernels])")
    pytest.importorskip("triton", reason="triton is not installed (pip install graphq[kernels])")
    return module


def gpu(*arguments: object) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, str(GPU), *map(str, arguments)], capture_output=True, text=True, timeout=120, env=env)


def test_dry_run_checks_every_kernel_and_times_none(torch: Any, tmp_path: Path) -> None:
    from graphq.kernels import CATALOG

    done = gpu("--dry-run", "--sections", "cases", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["interpreter.json", "interpreter.md", "interpreter.svg"]
    found = json.loads((tmp_path / "interpreter.json").read_text())
    assert found["state"] == "complete" and found["dry_run"] and not found["ceilings"] and not found["out_of_time"]
    assert {row["kernel"] for row in found["cases"]} == {entry.rpartition(":")[2] for entry in CATALOG.values()}
    assert all(row["errors"]["graphq"] < 0.01 and not row["times"] and not row["wrong"] for row in found["cases"])
    assert all(target["met"] is None for target in found["targets"])
    assert "nothing was timed" in (tmp_path / "interpreter.md").read_text()


def test_without_a_gpu_it_refuses_to_time(torch: Any, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is an NVIDIA GPU")
    done = gpu("--out", tmp_path)
    assert done.returncode == 1 and "there is no NVIDIA GPU; --dry-run" in done.stderr and not list(tmp_path.iterdir())


def test_layers_and_rows_are_those_that_were_promised(script: Callable[[str], ModuleType]) -> None:
    cases = script("gpu_shapes").cases()
    assert {case.sizes["m"] for case in cases if "m" in case.sizes} == {1, 16, 256, 4096}
    assert {case.family for case in cases} == {"llm", "vit"}
    order = [case.target for case in cases]
    assert order == sorted(order, reverse=True) and any(order)  # what has a target comes before time runs out


def test_unpacking_is_that_of_the_core(torch: Any, script: Callable[[str], ModuleType]) -> None:
    codes = np.random.default_rng(0).integers(-8, 8, (70, 5))
    found = script("gpu_cases").unpacked(torch.from_numpy(ops_gemm.pack_int4(codes)), 70)
    np.testing.assert_array_equal(found.numpy(), codes.T)


@pytest.mark.parametrize("fault", ["none", "rounded", "noise", "one entry", "nan"])
def test_faults_of_a_product_are_found(torch: Any, script: Callable[[str], ModuleType], fault: str) -> None:
    """In 512 x 512 entries; one of them off by a tenth of the largest is far below the norm that is allowed."""
    reference = torch.randn(512, 512, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = reference.half().double()
    if fault == "rounded":
        found = reference.bfloat16().double()
    if fault == "noise":
        found = found + 0.002 * torch.randn(512, 512, generator=torch.Generator().manual_seed(1))
    if fault == "one entry":
        found[3, 4] += 0.1 * reference.abs().max()
    if fault == "nan":
        found[3, 4] = math.nan
    error, right = script("gpu_cases").close_to(reference, "float16")(found)
    assert right == (fault == "none")
    assert fault != "none" or error < 3e-4


@pytest.mark.parametrize("operator", ["SULQSoftmax", "SULQSoftmaxCodes"])
def test_faults_of_codes_are_found(torch: Any, script: Callable[[str], ModuleType], operator: str) -> None:
    cases, shapes = script("gpu_cases"), script("gpu_shapes")
    sizes = {"batch": 2, "rows": 40, "columns": 64, "depth": 8}
    prepared = cases.prepare(shapes.Case(operator, "vit", "small", "float16", sizes), "cpu")
    form = prepared.contestants[script("roofline").FORM]
    right = form.call(*form.tensors)
    assert form.judge(right)[1]
    off = right.clone()
    off[0, 0, :8] = right.max() * 1.04 if operator == "SULQSoftmax" else 0  # between levels; another code
    assert not form.judge(off)[1]
    assert not form.judge(right.flip(-1))[1]
    assert not form.judge(prepared.contestants["graphq"].tensors[-1])[1]  # what the memory of the result holds before


def test_times_are_medians_over_launches_of_contestants_in_turn(torch: Any, script: Callable[[str], ModuleType],
                                                                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A stand-in for CUDA: a graph takes as long as its calls say, by a clock that only they move."""
    timing, clock, played = script("gpu_timing"), [0.0], []

    class Graph:
        def __init__(self) -> None:
            self.calls: list[float] = []

        def replay(self) -> None:
            played.append(len(self.calls))
            clock[0] += sum(self.calls)

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            self.at = clock[0]

        def elapsed_time(self, end: Any) -> float:
            return float(end.at - self.at) * 1e3

    class Nothing:
        def __init__(self, *_: object, **__: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def wait_stream(self, _: object) -> None: ...

    class Capture(Nothing):
        def __init__(self, graph: Graph, stream: object) -> None:
            recorded[0] = graph

        def __exit__(self, *_: object) -> None:
            recorded[0] = None

    recorded: list[Any] = [None]
    for name, value in {"Stream": Nothing, "stream": Nothing, "current_stream": Nothing, "synchronize": lambda: None, "CUDAGraph": Graph,
                        "graph": Capture, "Event": Event}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "WARM_UP_S", 0.001)

    def call(seconds: float) -> Callable[[], None]:
        return lambda: recorded[0].calls.append(seconds) if recorded[0] else None

    def broken() -> None:
        raise RuntimeError("no such kernel\nand more")

    found, failed = timing.together({"fast": [call(1e-6)] * 3, "broken": [broken], "slow": [call(4e-6)]}, 3e-6, 0.0)
    assert failed == {"broken": "RuntimeError: no such kernel"}
    assert found["fast"].median_s == pytest.approx(1e-6) and found["slow"].p95_s == pytest.approx(4e-6)
    assert (found["fast"].launches, found["fast"].copies, found["fast"].rounds) == (669, 3, 9)
    assert played[-18:] == [669, 667, 667, 669] * 4 + [669, 667]
