"""Calibration data made from a model alone: strategies by name, the choice among them, and what runs them.

Images are optimised through the model, so that most strategies need torch (the extra `torch`); it is imported when one runs.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from graphq import ir
from graphq.calibration import fixed_batch
from graphq.errors import ModelError, UsageError
from graphq.names import unknown_name
from graphq.pipeline import Progress, no_progress
from graphq.preprocess import Preprocess, declared_preprocess
from graphq.synthesis.resume import Keeper, fingerprint
from graphq.synthesis.strategy import Arrays, Batch, Strategy, Task

STRATEGIES = {
    "tokens": "tokens:Tokens",
    "bn-stats": "bn_stats:BnStats",
    "vit-attention": "vit_attention:VitAttention",
    "clip": "clip:Clip",
    "patch-similarity": "patch_similarity:PatchSimilarity",
    "logits": "logits:Logits",
    "natural": "natural:Natural",
}
"""Module of this package and class, by name."""

AUTO = ("tokens", "bn-stats", "natural")
"""What `auto` tries, in order: the first that finds what it works on.

What draws images to attention or to classes is taken by name only: in the steps that a CPU has time for, it has not done better than the
random images of `natural`, which take none (benchmarks/synthesis.py).
"""

COUNT = 64
"""Samples, if nobody says how many."""

_Done = tuple[dict[str, np.ndarray], dict[str, Any]]
"""Arrays of a batch, and `first`, `last` (losses), `seconds`."""


@dataclass(frozen=True)
class SynthesisFacts:
    """How data was synthesized: a row of the report.

    Attributes:
        strategy: Its name; `why` says what of the model it works on, and why others were not taken if it was chosen here.
        options: Those that differ from the defaults.
        steps: Of optimisation, for each batch of `batch` samples.
        first, last: Losses by name after the first and the last step, mean over all samples.
        seconds: Of optimisation.
        sheet: Name of the contact sheet beside the report, if there is one.
    """

    strategy: str
    why: str
    options: Mapping[str, Any]
    count: int
    steps: int
    batch: int
    seed: int
    seconds: float
    first: Mapping[str, float] = field(default_factory=dict)
    last: Mapping[str, float] = field(default_factory=dict)
    sheet: str | None = None

    @property
    def description(self) -> str:
        """What was done, in one line."""
        steps = f", {self.steps} steps" if self.steps else ""
        return f"synthesis by {self.strategy} ({self.why}){steps}, seed {self.seed}"


class Synthesized(dict[str, np.ndarray]):
    """Arrays `[count, ...]` by input name, and `facts` about how they came to be."""

    def __init__(self, arrays: Arrays, facts: SynthesisFacts) -> None:
        super().__init__(arrays)
        self.facts = facts


def synthesize(model: str | Path | ir.Model, strategy: str = "auto", *, options: Mapping[str, Any] | None = None, count: int = COUNT,
               steps: int | None = None, batch: int | None = None, seed: int = 0, preprocess: str | Path | Preprocess | None = None,
               device: str | None = None, resume: str | Path | None = None, progress: Progress = no_progress) -> Synthesized:  # fmt: skip
    """Make calibration data for `model` from what the model itself knows about its training data.

    Args:
        model: The float model; a file, or one in memory. It is not changed.
        strategy: One of `STRATEGIES`, or `auto`: the first of `AUTO` that finds what it works on.
        options: Of the strategy, by name.
        count: Samples to make, rounded up to the model's batch if that is fixed.
        steps: Steps of optimisation for each batch; the strategy's own number without it.
        batch: Samples that are optimised together; the strategy's own number without it, or the model's if that is fixed.
        seed: Of everything random. The same seed gives the same bytes, on the same machine and versions.
        preprocess: How pixels become inputs (preset, YAML file or value): images keep to values that pixels can have. Without it, and
            where the model does not carry it, they keep to those that standard normal numbers have.
        device: Of torch, `cpu` or `cuda`; None takes a GPU if torch finds one.
        resume: Folder where batches that are done and the state of an interrupted one are kept, and found again; None keeps nothing.
            `graphq.synthesis.resume.clear` removes it.
        progress: Called with what is done, steps done and steps in all.

    Raises:
        ModelError: no strategy, or not this one, finds what it works on.
        UsageError: options, or a `resume` folder, that do not fit; torch is needed and not installed.
    """
    if count < 1 or (steps is not None and steps < 1) or (batch is not None and batch < 1):
        raise UsageError("There is nothing to synthesize.", where=f"count {count}, steps {steps}, batch {batch}", expected="1 or more")
    loaded = model if isinstance(model, ir.Model) else ir.load(Path(model))
    chosen, why = choose(loaded, strategy, options or {})
    declared = declared_preprocess(loaded.metadata_props, preprocess)
    task = Task(loaded, chosen.steps_for(loaded) if steps is None else steps, declared, device)
    size, unit = chosen.batch if batch is None else batch, fixed_batch(ir.inputs(loaded))
    if batch is not None and unit not in (None, batch):
        raise UsageError(f"The model takes exactly {unit} samples at once.", where=f"batch {batch}", expected=f"{unit}, or none given",
                         hint="export the model with a dynamic batch dimension: larger batches are faster")  # fmt: skip
    if unit is not None:
        size, count = unit, math.ceil(count / unit) * unit
    parts = [range(start, min(start + size, count)) for start in range(0, count, size)]
    asked = {"strategy": chosen.name, "options": _changed(chosen), "steps": task.steps, "count": count, "batch": size, "seed": seed,
             "preprocess": declared and declared.to_json()}  # fmt: skip
    with Keeper(resume, "" if resume is None else fingerprint(loaded, **asked)) as keeper:
        done = list(_run(chosen, task, parts, seed, keeper, progress))
    arrays = {name: np.concatenate([made[name] for made, _ in done]) for name in done[0][0]}
    first, last = (_mean(parts, [facts[key] for _, facts in done]) for key in ("first", "last"))
    seconds = sum(facts["seconds"] for _, facts in done)
    return Synthesized(arrays, SynthesisFacts(chosen.name, why, _changed(chosen), count, task.steps if last else 0, size, seed, seconds,
                                              first, last))  # fmt: skip


def choose(model: ir.Model, name: str = "auto", options: Mapping[str, Any] | None = None) -> tuple[Strategy, str]:
    """The strategy of that name with these options, and why it; `auto` is the first of `AUTO` that fits `model`."""
    if name != "auto":
        chosen = make_strategy(name, options or {})
        return chosen, chosen.evidence(model)
    if options:
        raise UsageError("Options belong to a strategy.", where=", ".join(options), expected="the strategy by its name, not auto")
    refusals = list[str]()
    for each in AUTO:
        try:
            one = make_strategy(each, {})
            return one, "; ".join([one.evidence(model), *refusals])
        except ModelError as error:
            refusals.append(f"not {each}: {error.what[:1].lower()}{error.what[1:].rstrip('.')}")
    raise ModelError("Nothing is known about how to synthesize data for this model.", where="; ".join(refusals), hint="give real data")


def make_strategy(name: str, options: Mapping[str, Any]) -> Strategy:
    """The strategy called `name`, with its options."""
    if name not in STRATEGIES:
        raise UsageError(**unknown_name("strategy", name, ("auto", *STRATEGIES)))
    module, _, cls = STRATEGIES[name].partition(":")
    try:
        found = getattr(import_module(f"{__name__}.{module}"), cls)
    except ImportError as error:
        if error.name != "torch":
            raise
        raise UsageError(f"The strategy {name} needs torch, which is not installed.", expected="the Python package torch",
                         hint="pip install graphq[torch]") from error  # fmt: skip
    try:
        strategy: Strategy = found(**options)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False)[0]
        key = ".".join(map(str, first["loc"]))
        if first["type"] == "unexpected_keyword_argument":
            raise UsageError(**unknown_name(f"option of strategy {name}", key, found.__dataclass_fields__)) from error
        known = ", ".join(found.__dataclass_fields__) or "none"
        raise UsageError(f"Strategy {name}: {first['msg']}.", where=f"option {key}", expected=f"options {known}") from error
    return strategy


def _changed(strategy: Strategy) -> dict[str, Any]:
    default = type(strategy)()
    values = {field.name: getattr(strategy, field.name) for field in dataclasses.fields(strategy)}  # type: ignore[arg-type]
    return {name: value for name, value in values.items() if value != getattr(default, name)}


def _run(strategy: Strategy, task: Task, parts: Sequence[range], seed: int, keeper: Keeper, progress: Progress) -> Iterator[_Done]:
    """The batches, one behind the other; those that an earlier run made are read."""
    maker = None
    for index, samples in enumerate(parts):
        done = keeper.finished(index)
        if done is None:
            progress(f"synthesize by {strategy.name}", index * task.steps, len(parts) * task.steps)
            maker = maker or strategy.prepare(task)
            batch = Batch(samples, seed)
            keeper.restore(index, batch)
            batch.watch = partial(_watch, keeper, progress, index, task.steps, len(parts))
            arrays = {name: np.asarray(array) for name, array in maker(batch).items()}
            done = arrays, {"first": batch.first, "last": batch.losses, "seconds": batch.seconds}
            keeper.finish(index, *done)
        yield done


def _watch(keeper: Keeper, progress: Progress, index: int, steps: int, batches: int, batch: Batch) -> None:
    keeper.watch(index, batch)
    losses = ", ".join(f"{name} {value:.4g}" for name, value in batch.losses.items())
    progress(f"synthesize: {losses}", index * steps + batch.step, batches * steps)


def _mean(parts: Sequence[range], rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Losses, mean over all samples."""
    return {name: float(np.average([row[name] for row in rows], weights=[len(part) for part in parts])) for name in rows[0]}
