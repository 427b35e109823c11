"""Measuring side by side: figures from given times, who computes when, what a result holds, and what is refused. Nothing is timed."""

import importlib.util
import json
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import graphq
from graphq import ir
from graphq.backends.turns import MIN_ROUNDS, Worker, WorkerError, take_turns
from graphq.bench_result import NOISY, BenchResult, Times, read, speedup, times
from graphq.errors import DataError, ModelError, UsageError
from graphq.machine import Machine, this_machine
from graphq.models import onnx_path
from graphq.pipeline import no_progress

MODULE = import_module("graphq.bench")  # the attribute of graphq is the function
CNN = onnx_path("digits_cnn")
HEAD = '<ir_version: 10, opset_import: ["" : 21, "other" : 1]>'
HERE = Machine("a CPU", 2, "", "", "Linux 6 x86_64")


def saved(folder: Path, name: str, text: str) -> Path:
    ir.save(ir.from_onnx_text(f"{HEAD} {text}"), folder / name)
    return folder / name


def relu(folder: Path, batch: str = "n", name: str = "relu.onnx") -> Path:
    """Four columns of `x`."""
    return saved(folder, name, f"g (float[{batch}, 4] x) => (float[{batch}, 4] y) {{ y = Relu(x) }}")


def run(*models: Path, **options: Any) -> BenchResult:
    return graphq.bench(models, **{"runtimes": ["onnxruntime"], "rounds": 1, **options})


@pytest.fixture
def no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if anything is measured."""

    def refuse(job: object) -> None:
        raise AssertionError(f"measured {job}")

    monkeypatch.setattr(MODULE, "Worker", refuse)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MODULE, "this_machine", lambda: HERE)


# ---- figures --------------------------------------------------------------------------------------------------------


def test_median_and_95th_percentile_are_those_of_all_calls() -> None:
    found = times([[4.0, 2.0], [3.0, 1.0, 100.0]])
    assert (found.calls, found.median_ms, found.mean_ms) == (5, 3.0, 22.0)
    assert found.p95_ms == pytest.approx(4 + 0.8 * 96)  # 0.95 of the way from the first to the last of 1, 2, 3, 4, 100


@pytest.mark.parametrize("seed", range(5))
def test_the_95th_percentile_is_never_below_the_median(seed: int) -> None:
    generator = np.random.default_rng(seed)
    found = times([generator.exponential(size=size).tolist() for size in generator.integers(1, 9, 4)])
    assert found.median_ms <= found.p95_ms


def test_one_call_is_its_own_median_and_percentile() -> None:
    assert times([[2.5]]) == Times(1, 2.5, 2.5, 2.5)


def test_a_speedup_compares_turns_of_the_same_round_only() -> None:
    first, other = [[1.0, 1.0], [10.0], [100.0]], [[2.0], [20.0, 20.0, 20.0], [200.0]]
    assert speedup(first, other).median == 0.5  # while the machine became slower; pooled medians would say 0.05
    assert times(first).median_ms / times(other).median_ms < 0.3
    same = speedup(first, first)
    assert (same.median, same.range, same.of_means, same.noisy) == (1.0, (1.0, 1.0), 1.0, False)


def test_a_speedup_is_noisy_if_rounds_contradict_each_other() -> None:
    first = [[1.0 + index / 10] for index in range(11)]  # 1.0 to 2.0
    found = speedup(first, [[1.0]] * 11)
    assert found.median == 1.5 and found.range == pytest.approx((1.1, 1.9)) and found.noisy
    steady = speedup([[2.0]] * 10 + [[20.0]], [[1.0]] * 10 + [[10.0]])  # slower together
    assert steady.range == (2.0, 2.0) and not steady.noisy
    assert not speedup([[2.0]] * 10 + [[2.8]], [[1.0]] * 11).noisy  # one round in eleven


def test_a_speedup_is_noisy_if_it_contradicts_the_throughput() -> None:
    found = speedup([[8.0, 8.0, 8.0]] * 5, [[1.0, 1.0, 7.0]] * 5)  # 8 times by medians, 24 / 9 by means
    assert found.median == 8.0 and found.range == (8.0, 8.0) and found.of_means == pytest.approx(24 / 9) and found.noisy
    assert 8.0 > NOISY * found.of_means


# ---- turns ----------------------------------------------------------------------------------------------------------


class FakeWorker:
    """Notes in `log` when its turn comes, and gives up at the turn `dies`."""

    def __init__(self, name: str, log: list[str], dies: int = -1) -> None:
        self.name, self.log, self.dies, self.turns = name, log, dies, 0

    def turn(self) -> dict[str, Any]:
        self.log.append(self.name)
        self.turns += 1
        if self.turns - 1 == self.dies:
            raise WorkerError("out of order")
        return {"ms": [float(self.turns)]}


def turns_of(workers: Mapping[int, FakeWorker], seconds: float = 1.0, rounds: int | None = None) -> Any:
    return take_turns(workers, seconds, rounds, "test", no_progress)  # type: ignore[arg-type]


def test_models_take_turns_forwards_and_backwards() -> None:
    log: list[str] = []
    found, failed = turns_of({index: FakeWorker(name, log) for index, name in enumerate("abc")}, rounds=3)
    assert "".join(log) == "abc" + "cba" + "abc" and not failed
    assert found == {index: [{"ms": [1.0]}, {"ms": [2.0]}, {"ms": [3.0]}] for index in range(3)}


def test_who_gives_up_leaves_the_others_their_turns() -> None:
    log: list[str] = []
    found, failed = turns_of({0: FakeWorker("a", log, dies=1), 1: FakeWorker("b", log)}, rounds=3)
    assert failed == {0: "out of order"} and set(found) == {1} and len(found[1]) == 3
    assert "".join(log) == "ab" + "ba" + "b"


def test_there_are_some_rounds_however_short_the_time() -> None:
    found, _ = turns_of({0: FakeWorker("a", [])}, seconds=1e-9)
    assert len(found[0]) == MIN_ROUNDS
    assert turns_of({}) == ({}, {})


def test_a_worker_that_dies_says_how(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=np.ones((1, 4), np.float32))
    job = {"runtime": "onnxruntime", "model": str(relu(tmp_path)), "feeds": str(tmp_path / "x.npz"), "inputs": ["x"], "threads": 0}
    with Worker(job) as worker:
        assert worker.start()["version"]
        worker._process.kill()
        with pytest.raises(WorkerError, match="ended with"):
            worker.turn()
    with Worker({**job, "feeds": str(tmp_path / "nothing")}) as worker, pytest.raises(WorkerError, match="FileNotFoundError.*nothing"):
        worker.start()


# ---- results --------------------------------------------------------------------------------------------------------


def test_a_result_has_a_row_for_each_model_and_batch_and_is_read_back(tmp_path: Path) -> None:
    ballast = np.ones(40_000_000, np.float32)  # of this process, which must not show in the memory of its children
    small = relu(tmp_path)
    seen: list[str] = []
    found = run(CNN, small, batches=(3, 1), threads=1, progress=lambda what, done, total: seen.append(what))
    assert [(row.model, row.batch) for row in found.rows] == [(str(path), batch) for batch in (3, 1) for path in (CNN, small)]
    for row in found.rows:
        assert (row.runtime, row.provider, row.reason, row.threads) == ("onnxruntime", "CPUExecutionProvider", None, 1)
        assert row.version.count(".") >= 2 and row.calls >= 1 and row.bytes == Path(row.model).stat().st_size
        assert row.median_ms and row.p95_ms and 0 < row.median_ms <= row.p95_ms and row.samples_per_s and row.gpu_mib is None
        assert row.peak_mib is None or 10 < row.peak_mib < ballast.nbytes / 2**20
    assert [(row.speedup, row.speedup_range, row.noisy, row.rounds) for row in found.rows[::2]] == [(1.0, (1.0, 1.0), False, 1)] * 2
    assert all((row.speedup or 0) > 0 for row in found.rows)
    assert found.rows[0].inputs == "input float32[3, 1, 32, 32]"
    assert set(seen) == {*(f"load on onnxruntime, batch {batch}" for batch in (3, 1)), *(f"onnxruntime, batch {batch}" for batch in (3, 1))}
    (tmp_path / "found.json").write_text(found.to_json())
    assert read(tmp_path / "found.json") == found


def test_a_model_that_fails_is_a_row_with_the_reason(tmp_path: Path) -> None:
    unknown = saved(tmp_path, "unknown.onnx", "g (float[n, 4] x) => (float[n, 4] y) { y = other.Nope(x) }")
    fails = saved(tmp_path, "fails.onnx", "g (float[n, 4] x) => (float[a, b] y) <int64[2] s = {3, 7}> { y = Reshape(x, s) }")
    found = run(unknown, fails, relu(tmp_path))
    assert [row.median_ms is None for row in found.rows] == [True, True, False]
    assert "cannot load" in (found.rows[0].reason or "") and "Nope" in (found.rows[0].reason or "")
    assert "cannot run" in (found.rows[1].reason or "") and "Reshape" in (found.rows[1].reason or "")
    assert found.rows[2].speedup is None  # there is no time of the first model


def test_batches_that_cannot_be_fed_are_rows_with_the_reason(tmp_path: Path) -> None:
    np.savez(tmp_path / "two.npz", x=np.ones((2, 4), np.float32))
    found = run(relu(tmp_path), relu(tmp_path, "3", "fixed.onnx"), batches=(2, 3), data=tmp_path / "two.npz")
    reasons = [row.reason or "" for row in found.rows]
    assert not reasons[0] and "exactly 3" in reasons[1] and "only 2 samples" in reasons[2] and "only 2 samples" in reasons[3]


def test_without_a_batch_size_it_is_the_fixed_one(tmp_path: Path) -> None:
    assert [(row.batch, row.reason) for row in run(relu(tmp_path), relu(tmp_path, "3", "fixed.onnx")).rows] == [(3, None)] * 2


def test_inputs_may_have_any_name(tmp_path: Path) -> None:
    found = run(saved(tmp_path, "m.onnx", "g (float[n, 4] file, float[n, 4] args) => (float[n, 4] y) { y = Sub(file, args) }"))
    assert (found.rows[0].inputs, found.rows[0].reason) == ("file float32[1, 4], args float32[1, 4]", None)


def test_size_counts_external_data(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model(f"{HEAD} g (float[n, 4] x) => (float[n, 500] y) {{ y = MatMul(x, w) }}")
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((4, 500), np.float32), "w"))
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (row,) = run(tmp_path / "m.onnx").rows
    assert row.bytes == (tmp_path / "m.onnx").stat().st_size + 8000 and row.reason is None


@pytest.mark.usefixtures("no_gpu", "no_workers")
def test_without_a_gpu_its_runtimes_say_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(MODULE.RUNTIMES["tensorrt-rtx"].__class__, "is_installed", lambda self: self.module == "tensorrt_rtx")
    found = run(relu(tmp_path), runtimes=["tensorrt-rtx", "tensorrt"])
    without_gpu, without_package = (row.reason for row in found.rows)
    assert without_gpu == "There is no NVIDIA GPU on this machine."
    assert without_package == "tensorrt is not installed (pip install tensorrt)."
    found = run(relu(tmp_path), runtimes=())
    assert not found.rows and found.notes == ("tensorrt-rtx is installed, but there is no NVIDIA GPU.",)


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                    reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")  # fmt: skip
def test_an_engine_is_built_and_then_needs_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as it goes without a GPU: the real builder makes the engine, the process that is to run it finds no driver."""
    if this_machine().gpu:
        pytest.skip("there is a GPU")
    monkeypatch.setattr(MODULE, "this_machine", lambda: replace(HERE, gpu="NVIDIA Pretence", driver="1"))
    det = saved(tmp_path, "det.onnx", "g (float[n, 4, 4] x) => (float[n] y) { y = Det(x) }")
    ran, refused = run(relu(tmp_path), det, runtimes=["tensorrt-rtx"], batches=(64,)).rows
    assert (ran.reason or "").startswith("There is no NVIDIA driver on this machine.") and ran.inputs == "x float32[64, 4]"
    assert (refused.reason or "").startswith("The parser of tensorrt-rtx refuses this model. Det")


# ---- results of earlier runs ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def earlier(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("earlier")
    (folder / "earlier.json").write_text(run(relu(folder, name="old.onnx")).to_json())
    return folder / "earlier.json"


def test_earlier_results_stand_behind_the_new_ones_once(earlier: Path, tmp_path: Path) -> None:
    found = run(earlier, relu(tmp_path), earlier)
    assert [Path(row.model).name for row in found.rows] == ["relu.onnx", "old.onnx"]
    assert found.rows[1] == read(earlier).rows[0] and found.rows[0].run != found.rows[1].run
    assert found.rows[0].speedup == 1.0  # never against another run


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize("fact", ["cpu", "cores", "gpu", "driver", "os"])
def test_results_of_another_machine_are_refused(earlier: Path, tmp_path: Path, fact: str) -> None:
    result = read(earlier)
    other = replace(result, machine=replace(result.machine, **{fact: 999 if fact == "cores" else "Another 999"}))
    (tmp_path / "other.json").write_text(other.to_json())
    for model, first in ((relu(tmp_path), "this machine"), (earlier, str(earlier))):
        with pytest.raises(UsageError, match=f"different machines: not the same {fact}") as caught:
            run(model, tmp_path / "other.json")
        assert first in caught.value.where and "other.json" in caught.value.where


@pytest.mark.usefixtures("no_gpu")
def test_results_of_another_machine_can_be_looked_at_there_alone(earlier: Path) -> None:
    assert run(earlier).machine == read(earlier).machine != HERE


@pytest.mark.parametrize("change", [{"schema": 2}, {"machine": None}, {"rows": [{"model": "m"}]}, {"graphq": None}])
def test_what_is_no_result_is_refused(earlier: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "bad.json").write_text(json.dumps(json.loads(earlier.read_text()) | change))
    with pytest.raises(UsageError, match="no result of graphq bench"):
        run(tmp_path / "bad.json")


@pytest.mark.parametrize("text", ["", "[1", "[]", "\xff"])
def test_what_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UsageError, match=r"bad\.json"):
        run(tmp_path / "bad.json")


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_workers")
def test_calls_that_cannot_work_are_refused_before_anything_is_measured(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no runtime called 'onnxrutnime'") as caught:
        run(CNN, runtimes=["onnxrutnime"])
    assert caught.value.hint == "did you mean 'onnxruntime'?" and "tensorrt-rtx" in caught.value.expected
    with pytest.raises(ModelError, match="no such model file"):
        run(CNN, tmp_path / "missing.onnx")
    with pytest.raises(ModelError, match="no such engine"):
        run(CNN, tmp_path / "missing.engine")
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32))
    with pytest.raises(DataError) as wrong:
        run(relu(tmp_path), CNN, data=tmp_path / "x.npz")
    assert wrong.value.__notes__ == [f"  model: {CNN}"]


@pytest.mark.usefixtures("no_workers")
@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"batches": [0]}, "batches: 0"), ({"batches": [1, 2.5]}, "batches: 2.5"), ({"batches": "8"}, "batches: '8'"),
        ({"threads": -1}, "threads: -1"), ({"rounds": 0}, "rounds: 0"), ({"seconds": 0}, "seconds: 0"),
        ({"seconds": float("nan")}, "seconds: nan"),
    ],
)  # fmt: skip
def test_numbers_that_cannot_be_are_refused(options: dict[str, Any], where: str) -> None:
    with pytest.raises(UsageError, match="number cannot be") as caught:
        run(CNN, **options)
    assert caught.value.where == where


def test_one_model_needs_no_list_and_no_model_is_refused(tmp_path: Path) -> None:
    for one in (relu(tmp_path), str(relu(tmp_path))):
        assert [row.reason for row in graphq.bench(one, runtimes=["onnxruntime"], rounds=1).rows] == [None]
    with pytest.raises(UsageError, match="nothing to measure"):
        graphq.bench([])


@pytest.mark.usefixtures("no_gpu", "no_workers")
def test_an_engine_gets_the_inputs_of_a_model_or_of_a_file(tmp_path: Path) -> None:
    engine = tmp_path / "m.engine"
    engine.write_bytes(b"engine")
    with pytest.raises(UsageError, match="not known what the engine takes"):
        run(engine)
    np.savez(tmp_path / "x.npz", x=np.ones((2, 4), np.float32))
    (row,) = run(engine, data=tmp_path / "x.npz", batches=(2,)).rows
    assert (row.inputs, row.reason, row.bytes) == ("x float32[2, 4]", "An engine runs on tensorrt or tensorrt-rtx only.", 6)
