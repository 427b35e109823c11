"""spre-finetune: train a sparse model to compute what the dense one does, with a second branch beside each of its convolutions.

An N:M pattern leaves equally many weights at each position of a kernel, where training without one keeps more at the centre. SpRe
(arXiv 2306.05612) gives each convolution a branch at the positions that would keep more, which is merged into the weight at the end:
the branch shares the zeros, so that the pattern stays. SpRe trains with labels from the start; here a pruned model is distilled from
the dense one, on calibration data. It stands right behind `nm-prune`. Needs torch (extra `torch`), on a GPU if there is one.

What helps is the distillation. The branch gains what a higher rate gains without it: weights of two branches move twice as far in a
step. On digits_cnn at 1:4, of 99.3 % top-1, magnitude leaves 26.7 and 100 steps make 93.0 of that, 95.6 with the branch, and 97.0
without it at twice the rate; behind the refit in closed form, which alone has 98.6, all 99.3 are back (benchmarks/reconstruction.py,
means of three seeds).
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear, sparsity
from graphq.errors import ModelError
from graphq.exclude import is_excluded, require_matches
from graphq.executor import Executor, Fetch
from graphq.passes import _blocks, _learned, _reconstruct
from graphq.passes._learned import Floats, Rates
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.sweep import MASK
from graphq.targets import Target


@pass_options
class SpreFinetune(Pass):
    """Trains the weights that an N:M pattern has left, all layers at once, towards what the dense model computes.

    Attributes:
        branch: Whether convolutions get the second branch.
        steps: Steps of Adam.
        budget_s: Seconds that it may take at most; what it does then depends on the machine.
        rate: Of weights, as a share of their root mean square a step; of the gains of branches, as a share of them.
        bias_rate: Of biases, as a share of their root mean square.
        features: Whether what blocks end with is distilled as well as the outputs.
        batch: Samples in a step.
        samples: Calibration samples to use, 0 for all. Every fifth batch judges, or the last of two to four; a single one does both.
        exclude: Patterns of node names (or operator types) that stay as they are.
    """

    name: ClassVar[str] = "spre-finetune"
    needs_data: ClassVar[bool] = True

    branch: bool = True
    steps: Annotated[int, Field(ge=1)] = 200
    budget_s: Annotated[float, Field(gt=0)] | None = None
    rate: Annotated[float, Field(ge=0)] = 0.02
    bias_rate: Annotated[float, Field(ge=0)] = 0.01
    features: bool = True
    batch: Annotated[int, Field(ge=1)] = 16
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        import graphq.torch_executor  # noqa: F401 (says so if torch is missing)

        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        from graphq.passes._learned_torch import Batch, Leaf, Plan, arrays_of, leaf_of, learn
        from graphq.passes._spre_torch import BranchLeaf
        from graphq.torch_executor import TorchExecutor

        rates = Rates(weights=self.rate, biases=self.bias_rate)
        nodes = [node for node in model.graph if not is_excluded(node, self.exclude)]
        found = [one for one in _learned.find(nodes, {}, ctx.skip) if rates.of(one) > 0]
        if not any(isinstance(one, Floats) and one.is_weight and _pattern(one) for one in found):
            return  # no effect: there is no sparse weight
        fetches = self._fetches(model, ctx)
        if not fetches:
            raise ModelError("There is nothing to distil from.", expected="a float output, or a residual sum that the dense model has too",
                             hint="set features: true, or cut what turns the output into integers off the model")  # fmt: skip
        executor, reference = TorchExecutor(model, fetches), Executor(ctx.reference, [Fetch(name) for name in fetches])
        data = ctx.calib.take(self.samples) if self.samples else ctx.calib
        train, held = _reconstruct.split([Batch.of(batch, reference.run(batch), batch.get(MASK)) for batch in data.batches(self.batch)])
        leaves = list[Leaf]()
        for one in found:
            spatial = self._spatial(one, ctx) if isinstance(one, Floats) and one.is_weight else None
            leaves.append(leaf_of(one, rates, executor.device) if spatial is None else BranchLeaf(one, spatial, self.rate, executor.device))  # type: ignore[arg-type]
        plan = Plan(self.steps, self.budget_s or math.inf, seed=ctx.seed)
        result = learn(executor, leaves, train, held, plan, lambda step: ctx.progress("learn", step, self.steps))
        ctx.measure("the model", branches=sum(isinstance(leaf, BranchLeaf) for leaf in leaves), **_reconstruct.numbers(result))
        if not result.is_better:
            reason = "its error on the samples that judge did not fall" if result.steps else "its time was over before a step"
            ctx.nothing_to_do(reason)
            return
        for leaf in leaves:
            _learned.store(ctx.edit, leaf.one, [leaf.merged()] if isinstance(leaf, BranchLeaf) else arrays_of(leaf))

    def _fetches(self, model: ir.Model, ctx: PassContext) -> list[str]:
        """The float outputs, and what blocks end with as far as the reference has it."""
        known = ir.values_by_name(ctx.reference.graph)
        ends = _blocks.ends(model.graph, _reconstruct.layers(model)) if self.features else []
        outputs = [value for value in model.graph.outputs if ir.is_float(value)]
        return list(dict.fromkeys(value.name or "" for value in (*ends, *outputs) if value.name in known))

    def _spatial(self, one: Floats, ctx: PassContext) -> np.ndarray | None:
        """Where the branch has weights, [O, I, *K]: at the positions that would keep more than their share of the dense weight."""
        reader = ir.uses(one.value)[0].node
        pattern = _pattern(one)
        if not self.branch or reader.op_type != "Conv" or one.start[0, 0].size < 2 or pattern is None:
            return None
        twins = {node.name: node for node in ctx.reference.graph}
        dense = ir.constant(linear.weight_of(twins[reader.name])) if reader.name in twins else None
        if dense is None or dense.shape != one.start.shape:
            return None
        rate = 1 - pattern[0] / pattern[1]
        return np.broadcast_to(sparsity.position_sparsity(dense, rate) < rate - 1e-9, dense.shape)


def _pattern(one: Floats) -> tuple[int, int] | None:
    reader = ir.uses(one.value)[0].node
    return sparsity.pattern(np.moveaxis(one.start, linear.out_axis(reader), 0))
