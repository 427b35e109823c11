"""One model on one runtime, in a process of its own: `python -m graphq.backends.bench_worker`.

The first line on stdin is a job as JSON. A job with `engine` builds that file; any other loads the model, warms it up and says that
it is ready, then measures one turn for each further line, until stdin ends. Every answer is a line of JSON on stdout, `{"error": ...}`
the last one. Of graphq it imports what the runtime needs and no more, so that its memory is that of the model and its runtime.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from graphq.backends.runners import RUNTIMES, Run, open_runner
from graphq.errors import GraphqError

WARM_UP, SETTLE, TURN = 0.3, 0.06, 0.2
"""Seconds of calls (at least 3, 1 and 1) before the first turn, at the head of each turn, and timed. ONNX Runtime's threads stay awake
for 30 ms after a call: what the model before left running is over when the clock starts, and the caches hold this model again."""


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a runtime prints must not get between the answers

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        job = json.loads(sys.stdin.readline())
        with np.load(job["feeds"]) as arrays:
            feeds = dict(zip(job["inputs"], arrays.values(), strict=True))
        if "engine" in job:
            _build(job, feeds)
            answer(built=True)
        else:
            _measure(job, feeds, answer)
    except Exception as error:
        answer(error=_reason(error))


def _build(job: dict[str, Any], feeds: dict[str, np.ndarray]) -> None:
    """An engine for exactly the shapes that it is timed with."""
    from graphq.backends import tensorrt
    from graphq.engines import EngineOptions
    from graphq.targets import get_target

    shapes = {name: array.shape for name, array in feeds.items()}
    options = EngineOptions(shapes={name: tuple((size, size, size) for size in shape) for name, shape in shapes.items()})
    built = tensorrt.build(Path(job["model"]), shapes, get_target(job["runtime"]), options)
    Path(job["engine"]).write_bytes(built.engine)


def _measure(job: dict[str, Any], feeds: dict[str, np.ndarray], answer: Callable[..., None]) -> None:
    runtime = RUNTIMES[job["runtime"]]
    cuda = None
    if runtime.needs_gpu:
        from graphq.backends.cuda import Cuda

        cuda = Cuda()
    before = cuda.used_bytes() if cuda else 0
    with open_runner(job["runtime"], Path(job["model"]), feeds, job["threads"]) as run:
        _calls(run, WARM_UP, 3)
        gpu = (cuda.used_bytes() - before) / 2**20 if cuda else None
        answer(version=import_module(runtime.module).__version__, gpu_mib=gpu)
        for _ in sys.stdin:
            _calls(run, SETTLE)
            answer(ms=_calls(run, TURN), peak_mib=peak_mib())


def _calls(run: Run, seconds: float, least: int = 1) -> list[float]:
    """Milliseconds of each of at least so many calls, for so many seconds."""
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < least or time.perf_counter() - started < seconds:
        times.append(run())
    return times


def peak_mib() -> float | None:
    """The most memory that this process held at once, in MiB; None where the system does not tell."""
    try:  # not getrusage: on Linux a process inherits its maximum from the one that started it
        found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"))
        return int(found[1]) / 1024 if found else None
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def _reason(error: Exception) -> str:
    if isinstance(error, GraphqError):
        return " ".join(f"{error.what} {error.where}".split())
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


if __name__ == "__main__":
    main()
