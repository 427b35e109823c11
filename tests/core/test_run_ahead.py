"""run_ahead: several batches at a time, in order, and no more of them than are asked for."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial

import pytest

from graphq.errors import ModelError
from graphq.executor import WORKERS, run_ahead


def test_results_come_in_the_order_of_the_jobs() -> None:
    """Whoever is done first."""

    def job(index: int) -> int:
        time.sleep(0.02 if index % 2 == 0 else 0)
        return index

    assert list(run_ahead(partial(job, index) for index in range(12))) == list(range(12))


def test_a_job_that_fails_ends_the_run() -> None:
    """With its own error, once it is due; what has not been drawn by then never starts."""
    drawn = list[int]()

    def job(index: int) -> int:
        if index == 3:
            raise ModelError("the third")
        return index

    def jobs() -> Iterator[Callable[[], int]]:
        for index in range(50):
            drawn.append(index)
            yield partial(job, index)

    got = list[int]()
    with pytest.raises(ModelError, match="the third"):
        for result in run_ahead(jobs()):
            got.append(result)
    assert got == [0, 1, 2] and len(drawn) <= 4 + WORKERS


def test_whoever_stops_asking_stops_the_jobs() -> None:
    drawn = list[int]()

    def jobs() -> Iterator[Callable[[], int]]:
        for index in range(50):
            drawn.append(index)
            yield partial(int, index)

    results = run_ahead(jobs())
    assert next(results) == 0
    results.close()  # type: ignore[attr-defined]
    assert len(drawn) <= 1 + WORKERS
