"""Passes and what runs them: each pass edits the model through `ctx.edit` and reads statistics through `ctx`.

After every pass the graph is verified; the first failure stops the run, so that the guilty pass is always the last one.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as options

from graphq import ir
from graphq.calibration import CalibrationSet
from graphq.editor import Editor
from graphq.errors import GraphqError, RecipeError
from graphq.exactness import Exactness
from graphq.executor import BATCH, THREADS, WORKERS, Executor, Feeds, Fetch, run_ahead, sample_size, sample_step
from graphq.observers import Observer, Stat
from graphq.recipe import changed_options
from graphq.targets import Target

if TYPE_CHECKING:
    from graphq.sweep import BlockStep, SweepStep

pass_options = options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
"""Decorates a pass: a frozen dataclass whose fields are its recipe options, checked by pydantic."""

Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all); behind a colon, how it goes."""


def no_progress(what: str, done: int, total: int) -> None:
    """The progress that nobody watches."""


@dataclass(frozen=True)
class Measurement:
    """Numbers about one place in the graph, for the report. The unit is in the key: `sqnr_db`, `latency_ms`."""

    where: str
    numbers: Mapping[str, float]


@dataclass(frozen=True)
class PassRecord:
    """What one pass did: a row of the report, written by `run_passes`."""

    name: str
    options: Mapping[str, Any]
    edits: Mapping[str, int]
    measurements: tuple[Measurement, ...]
    skipped: tuple[tuple[str, str], ...]
    seconds: float
    notes: tuple[tuple[str, str], ...] = ()


@dataclass
class PassContext:
    """Everything that a pass may touch besides the model.

    Attributes:
        edit: The only way to change the graph.
        reference: The float model as the passes that keep its function left it.
        calib: Samples for statistics.
        held_out: Samples that no statistic has seen.
        target: What the runtime can express and what it fuses.
        memory_budget: Bytes that a sweep may hold before it spills to disk.
        keep: What new constants go through, such as to disk (see `ir.spilling`).
    """

    model: ir.Model
    reference: ir.Model
    calib: CalibrationSet
    held_out: CalibrationSet
    target: Target
    seed: int = 0
    memory_budget: int = 2 << 30
    progress: Progress = no_progress
    keep: ir.Keep = lambda tensor: tensor
    edit: Editor = field(init=False)
    measurements: list[Measurement] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    is_idle: bool = False
    _stats: dict[Observer, tuple[int, Stat]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.edit = Editor(self.model, self.keep)

    def rebase(self) -> None:
        """Let the model as it is now be the reference; what is known of the model stays known."""
        self.reference = ir.clone(self.model)
        self._stats = {observer: entry for observer, entry in self._stats.items() if {tap.source for tap in observer.taps} == {"current"}}

    def measure(self, where: str, **numbers: float) -> None:
        """Put numbers into the report."""
        self.measurements.append(Measurement(where, {key: float(value) for key, value in numbers.items()}))

    def skip(self, node: ir.Node, reason: str) -> None:
        """Refuse a node: its reason ends in the report."""
        self.skipped.append((ir.describe(node), reason))

    def note(self, node: ir.Node, what: str) -> None:
        """Say something about a node that was changed: it ends in the report."""
        self.notes.append((ir.describe(node), what))

    def nothing_to_do(self, reason: str) -> None:
        """The model is what the pass would make of it: that nothing changes is no error then, and the reason ends in the report."""
        self.skipped.append(("the model", reason))
        self.is_idle = True

    def observe(self, observers: Iterable[Observer]) -> Mapping[Observer, Stat]:
        """Statistics over the calibration set, in one run of each model that is tapped.

        Results are kept until the model they were taken from is edited (the reference never is).
        """
        wanted = list(dict.fromkeys(observers))
        missing = [observer for observer in wanted if not self._is_valid(observer)]
        for source, model in (("reference", self.reference), ("current", self.model)):
            group = [observer for observer in missing if {tap.source for tap in observer.taps} == {source}]
            if group:
                version = self.edit.version
                stats = fold(model, group, self.calib, self.progress)
                self._stats.update({observer: (version, stat) for observer, stat in stats.items()})
        return {observer: self._stats[observer][1] for observer in wanted}

    def assume(self, observer: Observer, stat: Stat) -> None:
        """Put in a statistic of the model as it is now that follows from others, so that nothing has to run for it."""
        self._stats[observer] = (self.edit.version, stat)

    def _is_valid(self, observer: Observer) -> bool:
        if observer not in self._stats:
            return False
        return self._stats[observer][0] == self.edit.version or all(tap.source == "reference" for tap in observer.taps)

    def sweep(self, nodes: Sequence[ir.Node], samples: int | None = None) -> Iterator[SweepStep]:
        """Walk both models once and stop at each of `nodes`, in topological order (see `graphq.sweep`)."""
        from graphq.sweep import sweep

        calib = self.calib if samples is None else self.calib.take(samples)
        return sweep(self.model, self.reference, nodes, calib, memory_budget=self.memory_budget, progress=self.progress)

    def sweep_blocks(self, ends: Sequence[ir.Value], batch: int, samples: int | None = None) -> Iterator[BlockStep]:
        """Walk both models once and stop before each block of nodes that one of `ends` needs (see `graphq.sweep`)."""
        from graphq.sweep import sweep_blocks

        calib = self.calib if samples is None else self.calib.take(samples)
        return sweep_blocks(self.model, self.reference, ends, calib, batch=batch, memory_budget=self.memory_budget)


WHOLE = 24 << 20
"""Elements of whole tensors that lie in memory at a time, at most (but at least one sample a batch)."""

SAMPLED_BATCHES = 8
"""Batches, spread over the calibration set, from which a large tensor is subsampled: about 130,000 elements of it."""


def fold(model: ir.Model, observers: Sequence[Observer], data: CalibrationSet, progress: Progress = no_progress) -> dict[Observer, Stat]:
    """Run `data` through `model` once and let each observer (all of one source) fold what it taps.

    The session holds the whole model, whatever the memory budget.

    Subsamples of large tensors come from some of the batches only: a convolution's output has to be copied out of the
    runtime's blocked layout for them. Extrema see every batch.
    """
    fetches = list(dict.fromkeys(Fetch(tap.value, tap.view) for observer in observers for tap in observer.taps))
    values = ir.values_by_name(model.graph)
    cheap = [fetch for fetch in fetches if fetch.view != "sample" or sample_step(ir.shape_of(values.get(fetch.value))) == 1]
    whole = sum(sample_size(ir.shape_of(values.get(fetch.value))) for fetch in fetches if fetch.view == "whole")
    size = data.fixed_batch or (min(BATCH, max(1, WHOLE // ((WORKERS + 1) * whole))) if whole else BATCH)
    every = max(1, len(data) // (size * SAMPLED_BATCHES)) if len(cheap) < len(fetches) else 1
    starts, stats, done = range(0, len(data), size), {observer: observer.init() for observer in observers}, 0
    rest = [start for index, start in enumerate(starts) if index % every]
    for chosen, firsts in ((fetches, starts[::every]), (cheap, rest)):  # one session after the other: each holds its own memory
        if not chosen or not firsts:
            continue
        executor = Executor(model, chosen, threads=THREADS)
        for parts in run_ahead(partial(_fold_batch, executor, observers, batch) for batch in data.batches(size, firsts)):
            for observer, part in zip(observers, parts, strict=True):
                stats[observer] = observer.merge(stats[observer], part)
            done += size
            progress("calibrate", min(done, len(data)), len(data))
        del executor
    return stats


def _fold_batch(executor: Executor, observers: Sequence[Observer], batch: Feeds) -> list[Stat]:
    """What each observer makes of one batch; of nothing, where the executor does not fetch what it taps."""
    arrays = dict(zip(executor.fetches, executor.run(batch), strict=True))
    taps = [[arrays.get(Fetch(tap.value, tap.view), _NOTHING) for tap in observer.taps] for observer in observers]
    return [observer.update(observer.init(), *found) for observer, found in zip(observers, taps, strict=True)]


_NOTHING = np.zeros(0, np.float32)


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class Pass(ABC):
    """One transformation. Subclasses are decorated with `pass_options`; their fields are the options of the recipe.

    Attributes:
        allow_no_effect: Without it, a pass that changes nothing is an error.
    """

    name: ClassVar[str]
    """Kebab-case; the key in recipes and in the catalog."""
    idle_is_fine: ClassVar[bool] = False
    """Whether changing nothing means that there was nothing to do (normalize), rather than that nothing matched."""

    keeps_function: ClassVar[bool] = False
    """Whether the model computes the same after it: such passes at the head of a recipe change the reference too. One sample checks it."""
    needs_data: ClassVar[bool] = False
    """Whether it reads calibration data."""
    needs_weights: ClassVar[bool] = True
    """Whether it is for nodes with constant float32 weights, so that a model without them is not for it."""

    allow_no_effect: bool = False

    @abstractmethod
    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        """Change `model` through `ctx.edit`; put refusals into `ctx.skip`, numbers into `ctx.measure`."""

    def precheck(self, model: ir.Model, target: Target) -> None:  # noqa: B027 (optional)
        """Refuse before any calibration what `target` cannot express (TargetError) or options that fit nothing (RecipeError)."""

    def check(self, model: ir.Model) -> None:  # noqa: B027 (optional)
        """What holds after this pass, and has to after those behind it: a GraphqError says what they undid."""


def run_passes(passes: Sequence[Pass], ctx: PassContext, verify: Callable[[ir.Model], None],
               require_legal: Callable[[ir.Model], None] = lambda model: None) -> list[PassRecord]:  # fmt: skip
    """Apply `passes` in order, verify after each, and return one record a pass.

    The reference is the model as the passes that keep the function left it. Before the first that reads data or changes the
    function, all that are left may refuse the target, and `require_legal` the model: nothing has been calibrated then.

    Raises:
        RecipeError: a pass changed nothing and neither it nor the recipe allows that.
        TargetError: a pass cannot write for the target.
        VerifyError: the graph is not valid after a pass, or computes something else after passes that keep the function.
        GraphqError: a pass undid what one before it had made sure of (`Pass.check`).
    """
    records, exact, stale, asked = [], True, False, 0
    exactness, row = Exactness(ctx.calib, ctx.memory_budget), list[str]()
    for index, one in enumerate(passes):
        ctx.progress(one.name, index, len(passes))
        # What only rewrites floats may make the rest possible; before anything else, all that are left are asked.
        end = index + 1 if one.keeps_function and not one.needs_data else len(passes)
        for later in passes[asked:end]:
            later.precheck(ctx.model, ctx.target)
        if asked < end == len(passes):
            require_legal(ctx.model)
        asked = max(asked, end)
        exact = exact and one.keeps_function
        if stale and not exact:
            ctx.rebase()
            stale = False
        ctx.measurements, ctx.skipped, ctx.notes, ctx.is_idle, ctx.edit.author = [], [], [], False, one.name
        before, started = ctx.edit.edits.copy(), time.perf_counter()
        try:
            if one.keeps_function and not row:
                exactness.note(ctx.model, ctx.edit.version)
            row = [*row, one.name] if one.keeps_function else []
            one.apply(ctx.model, ctx)
            edits = dict(ctx.edit.edits - before)
            if edits:
                verify(ctx.model)
                for done in passes[: index + 1]:
                    done.check(ctx.model)
            if row and not any(later.keeps_function for later in passes[index + 1 : index + 2]):  # once a row: it costs two runs
                exactness.require(ctx.model, ctx.edit.version, row)
        except GraphqError as error:
            error.add_note(f"  pass: {one.name}, number {index + 1} of {len(passes)}")
            raise
        has_effect = bool(edits.keys() - {"opset"})  # a newer opset alone serves nobody
        if not (has_effect or one.idle_is_fine or one.allow_no_effect or ctx.is_idle):
            raise RecipeError(
                f"Pass {one.name!r} changed nothing.", where=f"number {index + 1} of {len(passes)}",
                expected="at least one node that it applies to",
                hint=f"{_reasons(ctx.skipped)}take the pass out of the recipe, or set allow_no_effect: true",
            )  # fmt: skip
        stale = stale or (exact and bool(edits))
        seconds = time.perf_counter() - started
        measured, skipped, notes = tuple(ctx.measurements), tuple(ctx.skipped), tuple(ctx.notes)
        records.append(PassRecord(one.name, changed_options(one), edits, measured, skipped, seconds, notes))
    if stale:
        ctx.rebase()
    return records


def _reasons(skipped: Sequence[tuple[str, str]]) -> str:
    if not skipped:
        return ""
    counts: dict[str, int] = {}
    for _, reason in skipped:
        counts[reason] = counts.get(reason, 0) + 1
    return "nodes were skipped because: " + "; ".join(f"{reason} ({count})" for reason, count in counts.items()) + "; "
