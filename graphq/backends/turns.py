"""Processes that each measure one model and take turns, so that only one computes at a time (see `graphq.bench`)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import IO, Any, Self

from graphq.pipeline import Progress

MIN_ROUNDS = 3
"""Rounds at least, however long they take."""


class WorkerError(Exception):
    """Why a worker gave up, in one line."""


class Worker:
    """A process that measures one model, or builds one engine; it ends with the `with` block."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._stderr: IO[bytes] = tempfile.TemporaryFile()
        # -P: no module in the user's folder gets in the way of one that the worker imports
        command = [sys.executable, "-P", "-m", "graphq.backends.bench_worker"]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._stderr, text=True)
        self._job = json.dumps(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.kill()
        self._process.communicate()
        self._stderr.close()

    def start(self) -> dict[str, Any]:
        return self._ask(self._job)

    def turn(self) -> dict[str, Any]:
        return self._ask("turn")

    def _ask(self, line: str) -> dict[str, Any]:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
            answered = self._process.stdout.readline()
        except OSError:
            answered = ""
        if not answered:
            code = self._process.wait()
            self._stderr.seek(0)
            said = self._stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            raise WorkerError(": ".join([f"its process ended with {f'signal {-code}' if code < 0 else f'code {code}'}", *said]))
        answer: dict[str, Any] = json.loads(answered)
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer


def take_turns(workers: Mapping[int, Worker], seconds: float, rounds: int | None, what: str, progress: Progress,
               ) -> tuple[dict[int, list[dict[str, Any]]], dict[int, str]]:  # fmt: skip
    """Let `workers` measure one after the other, in turn forwards and backwards: `rounds` times, or for `seconds` each.

    Returns:
        The answers of those that went through to the end, by key, and why each of the others gave up.
    """
    turns: dict[int, list[dict[str, Any]]] = {key: [] for key in workers}
    failed: dict[int, str] = {}
    started, done = time.perf_counter(), 0
    while turns:
        spent = (time.perf_counter() - started) / (seconds * len(turns)) if seconds else 1.0
        share = done / rounds if rounds else min(spent, done / MIN_ROUNDS)
        progress(what, min(int(100 * share), 100), 100)
        if share >= 1:
            break
        for key in list(turns) if done % 2 == 0 else list(reversed(turns)):
            try:
                turns[key].append(workers[key].turn())
            except WorkerError as error:
                failed[key] = str(error)
                del turns[key]
        done += 1
    return turns, failed
