"""Walk a model block by block and learn in each what is there to learn: shared by `reconstruct` and `sos`. torch is loaded by `run`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from graphq import ir, linear, stored
from graphq.exclude import is_excluded
from graphq.noise import decibel
from graphq.passes import _blocks, _learned
from graphq.passes._learned import Codes, Floats, Learned
from graphq.pipeline import PassContext
from graphq.sweep import BlockStep

if TYPE_CHECKING:
    from graphq.passes._learned_torch import Batch, Plan

FOLDS = 5
"""Of so many batches, one is held out."""


@dataclass(frozen=True)
class Settings:
    """What `run` does: see `passes.reconstruct.Reconstruct` for most of it, and `_learned_torch.Plan` for `plan`.

    Attributes:
        plan: For each block; its seconds are those of all blocks together.
        batch: Samples in a step.
        sums: Residual sums in a block.
        samples: Calibration samples to use, None for all.
        exclude: Patterns of layers that are left alone.
    """

    plan: Plan
    batch: int
    sums: int
    samples: int | None
    exclude: Sequence[str]


def layers(model: ir.Model) -> list[ir.Node]:
    """The nodes of the main graph with weights."""
    return [node for node in model.graph if not node.domain and node.op_type in linear.LINEAR_OPS and stored.is_fixed(linear.weight_of(node))]


def run(model: ir.Model, ctx: PassContext, settings: Settings, is_wanted: Callable[[Learned], bool] = lambda one: True) -> None:
    """Learn block by block; a block whose error on batches that were held out does not fall stays as it is."""
    twins = {node.name or "": node for node in ctx.reference.graph}
    known = ir.values_by_name(ctx.reference.graph)
    ends = [value for value in _blocks.ends(model.graph, layers(model), settings.sums) if value.name in known]
    started, kept, seen = time.monotonic(), 0, 0
    skipped = set[str]()

    def skip(node: ir.Node, reason: str) -> None:
        skipped.add(node.name or "")
        ctx.skip(node, reason)

    for index, step in enumerate(ctx.sweep_blocks(ends, settings.batch, settings.samples)):
        nodes = [node for node in step.nodes if not is_excluded(node, settings.exclude)]
        found = [one for one in _learned.find(nodes, twins, skip) if is_wanted(one)]
        if not any(isinstance(one, Codes | Floats) for one in found):
            continue
        left = settings.plan.seconds - (time.monotonic() - started)
        plan = replace(settings.plan, seconds=max(left, 0.0) / (len(ends) - index), seed=ctx.seed + index)
        total = settings.plan.steps * len(ends)
        seen += 1
        kept += _block(step, found, plan, ctx, lambda done, index=index: ctx.progress("learn", index * plan.steps + done, total))  # type: ignore[misc]
    if seen and not kept:
        ctx.nothing_to_do("no block's error on samples that were held out fell")


def _block(step: BlockStep, found: Sequence[Learned], plan: Plan, ctx: PassContext, progress: Callable[[int], None]) -> bool:
    """Learn what was `found` in one block; returns whether it is kept."""
    from graphq.passes._learned_torch import Batch, learn
    from graphq.torch_executor import TorchExecutor

    batches = [Batch.of({name: arrays[index] for name, arrays in step.x_cur.items()}, target) for index, target in enumerate(step.y_ref)]
    held = batches[FOLDS - 1 :: FOLDS] or batches[1:][-1:]
    train = [batch for batch in batches if not any(batch is one for one in held)]
    executor = TorchExecutor(ctx.model, [step.end.name or ""], nodes=step.nodes)
    result = learn(executor, found, train, held, plan, progress)
    is_better = math.isfinite(result.held[1]) and result.held[1] < result.held[0]
    if is_better:
        for one, arrays in zip(found, result.arrays, strict=True):
            _learned.store(ctx.edit, one, arrays)
    before, after = (decibel(1.0, error) for error in result.held)
    ctx.measure(step.end.name or "", sqnr_before_db=before, sqnr_db=after if is_better else before, gained_db=after - before if is_better else 0.0,
                learned_db=decibel(result.train[0], result.train[1]), is_kept=is_better, steps=result.steps)  # fmt: skip
    return is_better
