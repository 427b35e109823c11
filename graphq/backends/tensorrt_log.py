"""What TensorRT says while it works: its log, and its progress."""

from __future__ import annotations

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphq.pipeline import Progress

_NOISE = re.compile(r"Invalid Node - |\[checkMacros\.cpp|\s*$")  # lines around the parser's and builder's own words
_SOURCE_POSITION = re.compile(r"\.? In \S+ at \S+:\d+")
_LOGS: dict[type, Any] = {}


def log_of(trt: Any) -> Any:
    """The logger of the package `trt`, empty. There is one a process: the package keeps the first that it gets, and ignores others.

    It keeps errors, warnings and the `plan` (the lines that describe the layers of an engine), and prints nothing. An exception must
    not leave a callback, since the bindings would print and drop it: the first is kept in `stopped_by`.
    """
    if trt.ILogger not in _LOGS:
        _LOGS[trt.ILogger] = _make_log(trt)
    log = _LOGS[trt.ILogger]
    log.clear()
    return log


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.clear()

        def clear(self) -> None:
            self.errors: list[str] = []
            self.warnings: list[str] = []
            self.plan: list[str] = []
            self.stopped_by: BaseException | None = None

        def log(self, severity: Any, message: str) -> None:
            try:
                if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                    self.errors.append(message)
                elif severity == trt.ILogger.WARNING:
                    self.warnings.append(message)
                elif "LayerType: " in message:
                    self.plan += message.splitlines()
            except BaseException as error:  # Ctrl-C arrives in whatever Python code runs next
                self.stopped_by = self.stopped_by or error

        @contextmanager
        def deferring_interrupts(self) -> Iterator[None]:
            """Let Ctrl-C end up in `stopped_by`: raised inside a callback, it would be printed and dropped by the bindings."""
            if threading.current_thread() is not threading.main_thread():
                yield
                return
            before = signal.signal(signal.SIGINT, self._interrupt)
            try:
                yield
            finally:
                signal.signal(signal.SIGINT, before)

        def _interrupt(self, number: int, frame: object) -> None:
            self.stopped_by = self.stopped_by or KeyboardInterrupt()

        @property
        def last_error(self) -> str:
            told = [text for text in map(words, self.errors) if text] or self.errors
            return told[-1] if told else "it gave no reason"

        @property
        def has_bad_minimum(self) -> bool:
            return any("kMIN values are not self-consistent" in message for message in [*self.errors, *self.warnings])

    return Log()


def make_monitor(trt: Any, progress: Progress, log: Any) -> Any:
    """Reports the builder's outermost phase, and cancels the build once anything has raised."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.phase, self.steps = "", 1

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self.phase, self.steps = phase, steps
                self.tell(0)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self.phase:
                self.tell(step + 1)
            return log.stopped_by is None

        def phase_finish(self, phase: str) -> None:
            if phase == self.phase:
                self.tell(self.steps)

        def tell(self, done: int) -> None:
            try:
                if log.stopped_by is None:
                    progress("build engine", min(done, self.steps), self.steps)
            except BaseException as error:
                log.stopped_by = error

    return Monitor()


def words(text: str) -> str:
    """The first lines of a message that say something, without positions in TensorRT's source."""
    lines = [line.strip() for line in text.splitlines() if not _NOISE.match(line)]
    return _SOURCE_POSITION.sub("", " ".join(lines[:3])).strip()[:400]
