"""sos: learn weights for quantized activations first, then store them with few bits and learn their codes (I&S-ViT, arXiv 2311.10126).

Three stages, each of which starts where the one before it ended, make a path to a low error that one jump does not find; this pass is
the first and the last of them:
1. the float weights of each block are fitted to the float model, behind the quantizers of activations;
2. the quantizers of what normalizations write become one for all channels: that is `ln-reparam`, which changes nothing that is
   computed, and so may stand before this pass, where stage 1 has the gain of a quantizer for each channel already;
3. the weights are rounded, as `round` does, and the codes fitted, as `reconstruct` does.
Instead of `round`, behind what quantizes activations. Needs torch (extra `torch`), on a GPU if there is one.
"""

from __future__ import annotations

import math
import time
from typing import Annotated, ClassVar

from pydantic import Field

from graphq import ir
from graphq.passes import _reconstruct
from graphq.passes._learned import Rates
from graphq.passes._reconstruct import Settings
from graphq.passes._rounding import Algorithm, Rounding
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class Sos(Pass):
    """Stores the weights of layers with quantized inputs with few bits, in three stages (smooth optimization strategy).

    Attributes:
        bits: Width of a weight, unless its layer asks for another.
        group_size: One scale for so many consecutive inputs of a matrix; without, and for convolutions, one an output channel.
        symmetric: Whether zero points are 0; by default only where the target takes no others.
        algorithm: How weights are rounded between the stages: see `round`.
        steps: Steps of Adam for each block, in each of the two stages.
        budget_s: Seconds that learning may take, half of it in each stage; what it does then depends on the machine.
        drop: Share of the elements of activations that pass their quantizers unchanged while it learns (QDrop).
        weight_rate: Of float weights, as a share of their root mean square a step.
        rate: Of codes, in codes a step.
        step_rate: Of the steps of activations, as a share of each (LSQ); I&S-ViT keeps them.
        bias_rate: Of biases, as a share of their root mean square; I&S-ViT keeps them.
        sums: Residual sums that a block ends with the last of.
        batch: Samples in a step.
        samples: Calibration samples to use, 0 for all. Every fifth batch judges, or the last of two to four; a single one does both.
        exclude: Patterns of node names (or operator types) that stay as they are.
    """

    name: ClassVar[str] = "sos"
    needs_data: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Annotated[int, Field(ge=2)] | None = None
    symmetric: bool | None = None
    algorithm: Algorithm = "greedy"
    steps: Annotated[int, Field(ge=1)] = 200
    budget_s: Annotated[float, Field(gt=0)] | None = None
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    weight_rate: Annotated[float, Field(ge=0)] = 0.002
    rate: Annotated[float, Field(ge=0)] = 0.01
    step_rate: Annotated[float, Field(ge=0)] = 0.001
    bias_rate: Annotated[float, Field(ge=0)] = 0.001
    sums: Annotated[int, Field(ge=1)] = 1
    batch: Annotated[int, Field(ge=1)] = 16
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        import graphq.torch_executor  # noqa: F401 (says so if torch is missing)

        self._rounding.precheck(model, target)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        started = time.monotonic()
        _reconstruct.run(model, ctx, self._settings(0.5))
        learned = ir.clone(model)
        self._rounding.apply(model, ctx)
        _reconstruct.run(model, ctx, self._settings(1.0, time.monotonic() - started), floats=learned)

    @property
    def _rounding(self) -> Rounding:
        """Without repair, and without a correction of biases: both would undo what stage 1 has learned."""
        return Rounding(
            self.name, self.bits, self.algorithm, self.group_size, self.symmetric, "mse", "quantized", self.exclude, self.samples,
            repair=False, correct_bias=False,
        )  # fmt: skip

    def _settings(self, share: float, passed: float = 0.0) -> Settings:
        """How to learn until `share` of the budget is used, of which `passed` seconds have been."""
        from graphq.passes._learned_torch import Plan

        rates = Rates(self.rate, self.weight_rate, self.step_rate, self.bias_rate)
        plan = Plan(self.steps, math.inf if self.budget_s is None else share * self.budget_s - passed, self.drop)
        return Settings(plan, rates, False, self.batch, self.sums, self.samples or None, self.exclude)
