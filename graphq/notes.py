"""What a user must not overlook in a result, in sentences: the notes of a report."""

from __future__ import annotations

from collections.abc import Iterator

from graphq.calibration import CalibrationSet
from graphq.engines import EngineFacts
from graphq.executor import BATCH
from graphq.recipe import Recipe
from graphq.targets import Target

FEW = 16
"""Calibration samples that raise no doubt."""


def of_engine(built: EngineFacts | None) -> tuple[str, ...]:
    """About the engine that was built, if one was."""
    found = []
    if built is not None and built.capped:
        ends = "; ".join(built.capped)
        found.append(f"The engine takes no more than the calibration data has in {ends}: --shape NAME=fewest:best:mostx... asks for more.")
    if built is not None and built.not_run:
        found.append(f"The engine was built but not run: {built.not_run} The model that it was built from was compared with the original.")
    return tuple(found)


def of_request(data: CalibrationSet, plan: Recipe, target: Target, is_judged: bool = False) -> tuple[str, ...]:
    """About the data, and about what nothing here can measure; `is_judged` says that there is evaluation data."""
    found = list(_data_notes(data))
    if plan.gates.min_speedup is not None and not target.measures_speed:
        found.append(f"Gate min_speedup was not measured: {target.name} does not run here.")
    return (*found, *_random_note(data, plan, is_judged))


def of_segments(plan: Recipe, target: Target) -> tuple[str, ...]:
    """About models that did not run whole."""
    speed = "gate min_speedup was not measured" if plan.gates.min_speedup is not None else "speed was not measured"
    end = f": {speed}" if target.measures_speed else ""
    return (f"The model's weights exceed the memory budget, so that it ran segment by segment{end}.",)


def _data_notes(data: CalibrationSet) -> Iterator[str]:
    """What makes calibration data look as if it were not what the model will see."""
    if data.kind == "random":
        return
    if data.synthesis is not None:
        made = data.synthesis
        losses = ", ".join(f"{name} {made.first[name]:.4g} -> {value:.4g}" for name, value in made.last.items())
        yield (f"Calibration data was SYNTHESIZED in {made.seconds:.0f} s{losses and f' ({losses})'}, that of the "
               "verification too: what the result does on real inputs only real data tells.")
    if len(data) < FEW:
        held = "verified on the same ones" if len(data) // (data.fixed_batch or 1) < 2 else "a few of them for verification"
        yield f"There are only {len(data)} calibration samples, {held}: give {FEW} or more, as different as what the model will see."
    first = next(data.batches(BATCH))
    for name, array in first.items():
        if array.dtype.kind == "f" and array.size > 1 and array.min() == array.max():
            yield f"Input {name!r} is {array.flat[0]:g} throughout the first calibration samples: ranges from it hold for nothing else."


def _random_note(data: CalibrationSet, plan: Recipe, is_judged: bool) -> tuple[str, ...]:
    if data.kind != "random":
        return ()
    use = "ranges and verification" if any(one.needs_data for one in plan.passes) else "verification"
    known = "Of what it does on real inputs only the evaluation data tells" if is_judged else (
        "What the result does on real inputs is not known and may be much worse")  # fmt: skip
    return (f"No calibration data was given: {len(data)} RANDOM inputs of the declared types stood in for it, in {use}. "
            f"{known}; give --calib.",)  # fmt: skip
