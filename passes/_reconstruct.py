"""Walk a model block by block and learn in each what is there to learn: shared by `reconstruct` and `sos`. torch is loaded by `run`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from graphq import ir, linear, stored
from graphq.errors import ModelError
from graphq.exclude import is_excluded
from graphq.noise import decibel
from graphq.passes import _blocks, _learned
from graphq.passes._learned import Codes, Floats, Learned, Rates
from graphq.pipeline import PassContext
from graphq.sweep import BlockStep

if TYPE_CHECKING:
    from graphq.passes._learned_torch import Plan, Result

T = TypeVar("T")

FOLDS = 5
"""Of so many batches, one is held out."""


@dataclass(frozen=True)
class Settings:
    """What `run` does.

    Attributes:
        plan: For each block; its seconds are those of all blocks together.
        rates: Of what is learned.
        gates: Whether codes are chosen by AdaRound's gates, rather than straight through.
        batch: Samples in a step.
        sums: Residual sums in a block.
        samples: Calibration samples to use, None for all.
        exclude: Patterns of layers that are left alone.
    """

    plan: Plan
    rates: Rates
    gates: bool
    batch: int
    sums: int
    samples: int | None
    exclude: Sequence[str]


def layers(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph with weights."""
    found = [node for node in model.graph if not node.domain and node.op_type in linear.LINEAR_OPS]
    return [node for node in found if stored.is_fixed(linear.weight_of(node))]


def run(model: ir.Model, ctx: PassContext, settings: Settings, floats: ir.Model | None = None) -> None:
    """Learn block by block; a block whose error on batches that were held out does not fall stays as it is.

    Args:
        floats: Has the weights that codes stand for, in layers of the same names: the reference by default.
    """
    twins, known = {node.name or "": node for node in (floats or ctx.reference).graph}, ir.values_by_name(ctx.reference.graph)
    ends = [value for value in _blocks.ends(model.graph, layers(model), settings.sums) if value.name in known]
    started, kept, total = time.monotonic(), list[bool](), settings.plan.steps * len(ends)
    if not any(node.op_type == "DequantizeLinear" for node in model.graph):
        ctx.skipped.append(("the model", "nothing is quantized yet: what quantizes comes first"))
        return
    for index, step in enumerate(ctx.sweep_blocks(ends, settings.batch, settings.samples)):
        nodes = [node for node in step.nodes if not is_excluded(node, settings.exclude)]
        found = [one for one in _learned.find(nodes, twins, ctx.skip) if settings.rates.of(one) > 0]
        if not any(isinstance(one, Codes | Floats) for one in found):
            continue
        left = settings.plan.seconds - (time.monotonic() - started)
        plan = replace(settings.plan, seconds=left / (len(ends) - index), seed=ctx.seed + index)

        def progress(done: int, first: int = index * plan.steps) -> None:
            ctx.progress("learn", first + done, total)

        kept.append(_block(step, found, replace(settings, plan=plan), ctx, progress))
    if kept and not any(kept):
        stepped = any(row.numbers.get("steps") for row in ctx.measurements)
        ctx.nothing_to_do("no block's error on the samples that judge fell" if stepped else "its time was over before a step")


def _block(step: BlockStep, found: Sequence[Learned], settings: Settings, ctx: PassContext, progress: Callable[[int], None]) -> bool:
    """Learn what was `found` in one block; returns whether it is kept."""
    from graphq.passes._learned_torch import Batch, arrays_of, leaf_of, learn
    from graphq.torch_executor import TorchExecutor

    feeds = [{name: arrays[index] for name, arrays in step.x_cur.items()} for index in range(len(step.y_ref))]
    masks: list[np.ndarray | None] = [*step.mask] or [None] * len(feeds)
    train, held = split([Batch.of(feed, [target], mask) for feed, target, mask in zip(feeds, step.y_ref, masks, strict=True)])
    try:
        executor = TorchExecutor(ctx.model, [step.end.name or ""], nodes=step.nodes)
    except ModelError as error:
        ctx.skip(step.nodes[-1], f"its block stays as it is: {error.what} ({error.where})")
        return False
    leaves = [leaf_of(one, settings.rates, executor.device, gates=settings.gates) for one in found]
    result = learn(executor, leaves, train, held, settings.plan, progress)
    if result.is_better:
        for leaf in leaves:
            _learned.store(ctx.edit, leaf.one, arrays_of(leaf))
    ctx.measure(step.end.name or "", **numbers(result))
    return result.is_better


def numbers(result: Result) -> dict[str, float]:
    """What the report tells: before, now, what was gained, and what was found, even if it is not kept."""
    before, after = (decibel(1.0, error) if math.isfinite(error) else -math.inf for error in result.held)
    now = after if result.is_better else before
    return {"sqnr_before_db": before, "sqnr_db": now, "gained_db": now - before, "found_db": after, "steps": result.steps}


def split(batches: Sequence[T]) -> tuple[list[T], list[T]]:
    """What to learn from, and what judges: every fifth batch, or the last of two to four; nothing where there is but one."""
    held = range(FOLDS - 1, len(batches), FOLDS) if len(batches) >= FOLDS else range(max(1, len(batches) - 1), len(batches))
    return [batch for index, batch in enumerate(batches) if index not in held], [batches[index] for index in held]
