"""What is stopped in the middle leaves nothing half written."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

INTERRUPTED = """
import contextlib, os, signal, sys
from pathlib import Path
from graphq import cli, console, ir

def stop():
    os.kill(os.getpid(), {number})

@contextlib.contextmanager
def bar(enabled=True):
    yield lambda what, done, total: stop() if what == {stage!r} else None

def save_half(model, path):
    Path(path).write_bytes(b"half")
    stop()

console.progress_bar = bar
if {stage!r} == "write":
    ir.save = save_half
cli.main(sys.argv[1:])
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("stage", ["calibrate", "verify", "write"])
def test_signals_leave_nothing_half_written(folder: Path, stage: str, number: signal.Signals) -> None:
    """The signal is a real one; where it strikes is chosen, so that the test does not depend on how fast the machine is."""
    (folder / "recipe.yaml").write_text("passes: [normalize, insert-qdq]\n")
    (folder / "out" / "small.onnx").write_bytes(b"the result of an earlier run")
    arguments = ["convert", "model.onnx", "-o", "out/small.onnx", "--recipe", "recipe.yaml", "--calib", "calib.npz", "--report", "report"]
    before = sorted((path, path.is_file() and path.read_bytes()) for path in folder.rglob("*"))
    script = INTERRUPTED.format(stage=stage, number=int(number))
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert done.returncode == 128 + number, done.stderr
    assert ("Interrupted" in done.stderr) == (number == signal.SIGINT) and "Traceback" not in done.stderr and not done.stdout
    assert sorted((path, path.is_file() and path.read_bytes()) for path in folder.rglob("*")) == before
