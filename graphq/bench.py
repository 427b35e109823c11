"""How fast models run, on every runtime that is here: latency, throughput, peak memory, size.

What is compared must meet the same conditions, and memory needs a process for each model; both at once goes like this. For one runtime
and one batch size, every model gets a process of its own (`graphq.backends.bench_worker`), which loads and warms it up and then waits.
The processes take turns of a fifth of a second, ABC, CBA, ABC, ..., one computing while the others sleep: whatever else slows the machine
down for a while slows down all models alike. The speed-up is the median over rounds of the ratio of two turns of the same round, so it
never compares times that are far apart. Median and 95th percentile are those of all calls. Where rounds contradict each other, or their
median contradicts the throughput of all calls, the row says that it is noisy. Runtimes and batch sizes follow one another.

Times are one call after the other, so that throughput is that of one stream of calls. Memory is the largest resident set of the process,
the interpreter and the runtime included (about 60 MiB for ONNX Runtime); GPU memory is what loading and warming up took from the device.
TensorRT gets an engine that is built for exactly the shapes that it is timed with, or the engine that was given.
Clocks and power limits are left as they are.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from numbers import Integral, Real
from pathlib import Path
from typing import Any

import numpy as np

from graphq import __version__, ir
from graphq.arrays import open_npz
from graphq.backends.runners import RUNTIMES
from graphq.backends.turns import Worker, WorkerError, take_turns
from graphq.bench_result import BenchResult, Row, Turns, read, require_one_machine, speedup, times
from graphq.calibration import CalibrationSet, from_columns, random_calibration
from graphq.data import open_data
from graphq.engines import ENGINE_SUFFIXES
from graphq.errors import DataError, GraphqError, ModelError, TargetError, UsageError
from graphq.machine import Machine, this_machine
from graphq.names import unknown_name
from graphq.pipeline import Progress, no_progress
from graphq.spec import ModelInput

SECONDS = 2.0
"""For each model on each runtime and batch size, about."""

_RANDOM = 10_000_000
"""Random samples to take a batch of any size from; they are made when they are read."""


def bench(models: Sequence[str | Path] | str | Path, *, runtimes: Sequence[str] = (), data: str | Path | None = None,
          preprocess: str | Path | None = None, batches: Sequence[int] = (), threads: int = 0, seconds: float = SECONDS,
          rounds: int | None = None, seed: int = 0, progress: Progress = no_progress) -> BenchResult:  # fmt: skip
    """Measure `models` side by side.

    Args:
        models: ONNX files; engines (`.engine`, `.plan`, `.trt`); and earlier results (`.json`) to put beside the new ones. Or one of them.
        runtimes: Names of `graphq.backends.runners.RUNTIMES`; by default every one that is installed and has its device.
        data: Inputs as for `graphq.convert`; random ones of the declared shapes without.
        batches: Samples a call; by default the number that the models are fixed to, or one.
        threads: Of a CPU, for each model; 0 leaves it to the runtime.
        seconds: Time for each model on each runtime and batch size, about.
        rounds: Exactly so many turns of each model instead.

    Raises:
        UsageError: no model, an unknown runtime, numbers that cannot be, or results of different machines, before anything is measured.
        ModelError, DataError: a model cannot be read, or the data does not fit it.
    """
    paths = [Path(model) for model in ([models] if isinstance(models, str | Path) else models)]
    if not paths:
        raise UsageError("There is nothing to measure.", where="models", expected="at least one ONNX file, engine or earlier result")
    _require_numbers(batches, threads, seconds, rounds)
    unknown = next((name for name in runtimes if name not in RUNTIMES), None)
    if unknown is not None:
        raise UsageError(**unknown_name("runtime", unknown, RUNTIMES))
    machine = this_machine()
    earlier = {str(path): read(path) for path in paths if path.suffix.lower() == ".json"}
    fresh = [path for path in paths if path.suffix.lower() != ".json"]
    require_one_machine({"this machine": machine} if fresh else {}, earlier)
    subjects = _subjects(fresh, data, preprocess, seed)
    chosen, notes = (runtimes, []) if runtimes else _runtimes_here(machine)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
        one = _Run(Path(folder), machine, threads, seconds, rounds, progress, datetime.now(UTC).isoformat(timespec="milliseconds"))
        sizes = batches or (next((fixed for subject in subjects if (fixed := subject.data.fixed_batch)), 1),)
        for name in dict.fromkeys(chosen) if subjects else ():
            for batch in sizes:
                rows += one.side_by_side(name, batch, subjects)
    old = dict.fromkeys(row for found in earlier.values() for row in found.rows)
    if not fresh and earlier:
        machine = next(iter(earlier.values())).machine
    return BenchResult(graphq=__version__, machine=machine, rows=(*rows, *old), notes=tuple(notes if subjects else ()))


def _require_numbers(batches: Sequence[Any], threads: Any, seconds: Any, rounds: Any) -> None:
    limits: list[tuple[str, Any, int]] = [*(("batches", size, 1) for size in batches), ("threads", threads, 0)]
    for name, value, least in limits if rounds is None else [*limits, ("rounds", rounds, 1)]:
        if not (isinstance(value, Integral) and int(value) >= least):
            raise UsageError("This number cannot be.", where=f"{name}: {value!r}", expected=f"whole numbers from {least}")
    if not (isinstance(seconds, Real) and 0 < float(seconds) < math.inf):
        raise UsageError("This number cannot be.", where=f"seconds: {seconds!r}", expected="a time above 0")


def _runtimes_here(machine: Machine) -> tuple[list[str], list[str]]:
    """Names of those that are installed and have their device, and a note on each that lacks its device."""
    installed = [name for name, runtime in RUNTIMES.items() if runtime.is_installed()]
    idle = [name for name in installed if RUNTIMES[name].needs_gpu and not machine.gpu]
    return [name for name in installed if name not in idle], [f"{name} is installed, but there is no NVIDIA GPU." for name in idle]


# ---- what is measured -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Subject:
    """One model file and what it is fed."""

    path: Path
    bytes: int
    data: CalibrationSet

    @property
    def is_engine(self) -> bool:
        return self.path.suffix.lower() in ENGINE_SUFFIXES

    def feeds(self, batch: int) -> dict[str, np.ndarray]:
        """Arrays of `batch` samples. Raises GraphqError if there are no such."""
        fixed = self.data.fixed_batch
        if fixed not in (None, batch):
            raise DataError(f"The model takes exactly {fixed} samples at once.")
        if len(self.data) < batch:
            raise DataError(f"There are only {len(self.data)} samples of data.")
        return next(self.data.batches(batch, [0]))

    def open_inputs(self, feeds: dict[str, np.ndarray]) -> str:
        """Inputs with open axes besides the batch, at the sizes that the data or graphq chose for them."""
        found = [one.name for one in self.data.inputs if one.shape is None or not all(isinstance(size, int) for size in one.shape[1:])]
        return ", ".join(f"{name} {feeds[name].dtype}[{', '.join(('N', *map(str, feeds[name].shape[1:])))}]" for name in found)


def _subjects(paths: Sequence[Path], data: str | Path | None, preprocess: str | Path | None, seed: int) -> list[_Subject]:
    """The models with their inputs. An engine does not tell its inputs without a GPU: it gets those of the first ONNX model."""
    found: dict[Path, _Subject] = {}
    for path in [path for path in paths if path.suffix.lower() not in ENGINE_SUFFIXES]:
        model = ir.load(path)
        size = path.stat().st_size + sum(file.stat().st_size for file in ir.data_files(model))
        try:
            inputs = ir.inputs(model)
            samples = random_calibration(inputs, _RANDOM, seed) if data is None else open_data(data, model, preprocess, seed)
        except GraphqError as error:
            error.add_note(f"  model: {path}")
            raise
        found[path] = _Subject(path, size, samples)
    shared = next((subject.data for subject in found.values()), None)
    for path in [path for path in paths if path not in found]:
        if not path.is_file():
            raise ModelError("There is no such engine.", where=str(path), hint="check the path")
        shared = shared or _engine_data(path, data)
        found[path] = _Subject(path, path.stat().st_size, shared)
    return [found[path] for path in paths]


def _engine_data(engine: Path, data: str | Path | None) -> CalibrationSet:
    """The arrays of an .npz, as they are."""
    if data is None or Path(data).suffix.lower() != ".npz":
        raise UsageError(
            "It is not known what the engine takes.", where=str(engine), expected="--data FILE.npz with an array for each input",
            hint="or give the ONNX model that it was built from as well",
        )  # fmt: skip
    columns = open_npz(Path(data))
    inputs = [ModelInput(name, column.dtype, (None, *column.shape[1:])) for name, column in columns.items()]
    return from_columns(columns, inputs, "npz", str(data))


@dataclass(frozen=True)
class _Run:
    """What all rows of one run share."""

    folder: Path
    machine: Machine
    threads: int
    seconds: float
    rounds: int | None
    progress: Progress
    started: str

    def side_by_side(self, name: str, batch: int, subjects: Sequence[_Subject]) -> list[Row]:
        """One row for each model, on one runtime with one batch size."""
        rows, workers = list[Row](), dict[int, Worker]()
        with ExitStack() as stack:
            for index, subject in enumerate(subjects):
                row = Row(self.started, str(subject.path), name, "", RUNTIMES[name].provider, batch, "", self.threads, subject.bytes)
                self.progress(f"load on {name}, batch {batch}", index, len(subjects))
                try:
                    self._require_runtime(name)
                    feeds = subject.feeds(batch)
                    row = replace(row, inputs=_describe(feeds), open_inputs=subject.open_inputs(feeds))
                    worker = stack.enter_context(Worker(self._job(subject, name, feeds)))
                    row, workers[index] = replace(row, **worker.start()), worker
                except (GraphqError, WorkerError) as error:
                    row = replace(row, reason=error.what if isinstance(error, GraphqError) else str(error))
                rows.append(row)
            turns, failed = take_turns(workers, self.seconds, self.rounds, f"{name}, batch {batch}", self.progress)
        calls = {index: [turn["ms"] for turn in found] for index, found in turns.items()}
        for index in workers:
            if index in failed:
                rows[index] = replace(rows[index], reason=failed[index])
            else:
                rows[index] = _measured(rows[index], calls[index], calls.get(0), turns[index][-1]["peak_mib"])
        return rows

    def _require_runtime(self, name: str) -> None:
        runtime = RUNTIMES[name]
        if not runtime.is_installed():
            raise TargetError(f"{name} is not installed (pip install {runtime.distribution}).")
        if runtime.needs_gpu and not self.machine.gpu:
            raise TargetError("There is no NVIDIA GPU on this machine.")

    def _job(self, subject: _Subject, name: str, feeds: dict[str, np.ndarray]) -> dict[str, Any]:
        """What a worker is told; builds the engine first where the runtime takes engines and the model is none."""
        path = self.folder / f"{len(list(self.folder.iterdir()))}.npz"
        np.savez(path, *feeds.values())  # under no names: one may be that of a parameter of savez
        job: dict[str, Any] = {"runtime": name, "model": str(subject.path.absolute()), "threads": self.threads}
        job |= {"feeds": str(path), "inputs": list(feeds)}
        if RUNTIMES[name].provider:
            if subject.is_engine:
                raise TargetError("An engine runs on tensorrt or tensorrt-rtx only.")
        elif not subject.is_engine:
            engine = str(path.with_suffix(".engine"))
            with Worker({**job, "engine": engine}) as builder:
                builder.start()
            job["model"] = engine
        return job


def _describe(feeds: dict[str, np.ndarray]) -> str:
    return ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in feeds.items())


def _measured(row: Row, calls: Turns, first: Turns | None, peak_mib: float | None) -> Row:
    found, faster = times(calls), None if first is None else speedup(first, calls)
    row = replace(row, calls=found.calls, median_ms=found.median_ms, p95_ms=found.p95_ms, peak_mib=peak_mib, rounds=len(calls))
    row = replace(row, samples_per_s=row.batch / found.mean_ms * 1e3)
    if faster is None:
        return row
    return replace(row, speedup=faster.median, speedup_range=faster.range, speedup_of_means=faster.of_means, noisy=faster.noisy)
