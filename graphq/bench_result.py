"""What measuring gave, as data: rows of one machine, how they are written and read back, and how times become figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphq import report
from graphq.errors import UsageError
from graphq.machine import Machine

SCHEMA = 1
"""Version of the layout. A field that older readers may ignore does not raise it; anything else does."""

Turns = Sequence[Sequence[float]]
"""Milliseconds of each call, turn by turn."""


@dataclass(frozen=True)
class Row:
    """One model on one runtime with one batch size. Where `reason` says why it did not run, what is measured is None.

    Attributes:
        run: When the run began that the row belongs to, ISO 8601; a speed-up holds within its run.
        inputs: Their types and shapes.
        open_inputs: Those of them with open axes besides the batch, with the sizes that were timed and N for the batch.
        threads: Asked for; 0 left it to the runtime.
        calls: How many were timed.
        samples_per_s: Samples over the time of all calls.
        peak_mib, gpu_mib: Memory of the process, and of the GPU.
        bytes: Of the file, external data included.
        speedup: Over the first model of the run, on the same runtime and batch size.
        speedup_range: Between which two four fifths of the rounds lie, each with its own ratio.
        speedup_of_means: The ratio of samples/s.
        rounds: How many there were.
        noisy: The speed-up is not to be trusted: see `Speedup.noisy`.
    """

    run: str
    model: str
    runtime: str
    version: str
    provider: str
    batch: int
    inputs: str
    threads: int
    bytes: int
    calls: int = 0
    median_ms: float | None = None
    p95_ms: float | None = None
    samples_per_s: float | None = None
    peak_mib: float | None = None
    gpu_mib: float | None = None
    speedup: float | None = None
    speedup_range: tuple[float, float] | None = None
    speedup_of_means: float | None = None
    rounds: int = 0
    noisy: bool = False
    open_inputs: str = ""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchResult:
    """Rows of one machine: those just measured first, then those of earlier results.

    Attributes:
        notes: What was left out.
    """

    schema: int = SCHEMA
    graphq: str
    machine: Machine
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        return json.dumps(report.plain(self), indent=2, ensure_ascii=False, allow_nan=False)


# ---- figures --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Times:
    """Figures over all calls of a model: how many, their median, 95th percentile (linear between calls) and mean."""

    calls: int
    median_ms: float
    p95_ms: float
    mean_ms: float


def times(turns: Turns) -> Times:
    """Figures of at least one call."""
    calls = np.concatenate([np.asarray(turn, np.float64) for turn in turns])
    median, p95 = np.percentile(calls, (50, 95))
    return Times(len(calls), float(median), float(p95), float(calls.mean()))


NOISY = 1.5
"""Factor between two answers to the same question from which on neither is to be trusted."""


@dataclass(frozen=True)
class Speedup:
    """How many times faster one model is than another: of each round the ratio of the medians of their turns.

    Attributes:
        median: Of the rounds.
        range: 10th and 90th percentile of the rounds.
        of_means: The ratio of the means of all calls, which is that of samples/s.
    """

    median: float
    range: tuple[float, float]
    of_means: float

    @property
    def noisy(self) -> bool:
        """Rounds contradict each other, or their median contradicts samples/s, by a factor of `NOISY`."""
        return any(max(pair) > NOISY * min(pair) for pair in (self.range, (self.median, self.of_means)))


def speedup(first: Turns, other: Turns) -> Speedup:
    """That of `other` over `first`, which have the same rounds."""
    ratios = [np.median(a) / np.median(b) for a, b in zip(first, other, strict=True)]
    low, median, high = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    return Speedup(median, (low, high), times(first).mean_ms / times(other).mean_ms)


# ---- results of earlier runs ----------------------------------------------------------------------------------------


def read(path: str | Path) -> BenchResult:
    """Read what `graphq bench --output` wrote. Fields that are not known here are ignored."""
    from pydantic import TypeAdapter, ValidationError

    expected = "a model, or a result that graphq bench --output wrote"
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("schema") != SCHEMA or "machine" not in found:
            raise UsageError("This is no result of graphq bench.", where=str(path), expected=f"{expected} (schema {SCHEMA})")
        return TypeAdapter(BenchResult).validate_python(found)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        raise UsageError("This is no result of graphq bench.", where=f"{path}: {why}", expected=expected) from error
    except (OSError, ValueError) as error:
        raise UsageError("The result cannot be read.", where=f"{path}: {error}", expected=expected) from error


def require_one_machine(here: Mapping[str, Machine], earlier: Mapping[str, BenchResult]) -> None:
    """Raises UsageError that names the first two of different machines, and in what they differ."""
    machines = [*here.items(), *((name, result.machine) for name, result in earlier.items())]
    for name, machine in machines[1:]:
        first, reference = machines[0]
        if different := reference.differences(machine):
            raise UsageError(
                f"These results come from different machines: not the same {', '.join(different)}.",
                where=f"{first}: {reference}\n         {name}: {machine}", expected="times of one machine",
                hint="measure all models on the same machine",
            )  # fmt: skip
