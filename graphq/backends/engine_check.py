"""Run an engine beside the model that it was built from, where there is a GPU to run it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from graphq import ir, verify
from graphq.calibration import CalibrationSet
from graphq.engines import EngineFacts
from graphq.errors import TargetError, VerifyError
from graphq.executor import Executor, Fetch
from graphq.targets import Target

CLOSE_DB = 30.0
"""As close to the model as any precision comes, half floats and other orders of sums included."""

SLACK_DB = 3.0
"""An engine may be as far from the model as that is from the original, and this much more: codes on a boundary fall to either side."""


def run(engine: Path, facts: EngineFacts, model: ir.Model, target: Target, data: CalibrationSet, model_db: float) -> EngineFacts:
    """`facts` with how close `engine` comes to `model` on `data`, or why it was not run.

    Args:
        model_db: How close `model` comes to the original.

    Raises:
        VerifyError: it computes something else.
    """
    from graphq.backends.engine_runner import EngineExecutor

    try:
        executor = EngineExecutor(engine, target.name)
        reference = Executor(model, [Fetch(name) for name in executor.outputs])
        found = verify.compare(reference, executor, data, executor.outputs)
    except TargetError as error:
        return replace(facts, not_run=error.what)
    limit = min(CLOSE_DB, model_db) - SLACK_DB
    for output in found:
        if output.sqnr_db < limit:
            raise VerifyError(
                "The engine does not compute what its model does.", where=f"output {output.name!r}: {output.sqnr_db:.1f} dB",
                expected=f"at least {limit:.1f} dB of the model that it was built from",
                hint=f"this is a fault of {target.name} or of graphq; please report it with the model",
            )  # fmt: skip
    return replace(facts, sqnr_db={output.name: output.sqnr_db for output in found})
