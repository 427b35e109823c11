"""reconstruct: learn the codes of weights, the steps of activations and the biases of a quantized model, block by block.

Each block is fitted, by gradient descent, to what the float model computes, from what the blocks before it now make of the data.
It stands behind whatever quantizes: `round`, `quantize-weights`, `insert-qdq`. Needs torch (extra `torch`), on a GPU if there is one.
"""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from graphq import ir
from graphq.exclude import require_matches
from graphq.passes import _reconstruct
from graphq.passes._learned import Rates
from graphq.passes._reconstruct import Settings
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class Reconstruct(Pass):
    """Fits the blocks of a quantized model to the float model.

    Attributes:
        steps: Steps of Adam for each block.
        budget_s: Seconds that the pass may take, shared out among the blocks; what it does then depends on the machine.
        rounding: How codes are learned: `through`, as a float weight that is rounded, straight through; or `gates` between the two codes
            around each weight, as AdaRound does (BRECQ).
        drop: Share of the elements of activations that pass their quantizers unchanged while it learns (QDrop).
        rate: Of codes, in codes a step.
        step_rate: Of the steps of activations, as a share of each (LSQ).
        bias_rate: Of biases, as a share of their root mean square.
        sums: Residual sums that a block ends with the last of.
        batch: Samples in a step.
        samples: Calibration samples to use, 0 for all. Every fifth batch judges, or the last of two to four; a single one does both.
        exclude: Patterns of node names (or operator types) that stay as they are.
    """

    name: ClassVar[str] = "reconstruct"
    needs_data: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False

    steps: Annotated[int, Field(ge=1)] = 300
    budget_s: Annotated[float, Field(gt=0)] | None = None
    rounding: Literal["through", "gates"] = "through"
    drop: Annotated[float, Field(ge=0, lt=1)] = 0.5
    rate: Annotated[float, Field(ge=0)] = 0.01
    step_rate: Annotated[float, Field(ge=0)] = 0.001
    bias_rate: Annotated[float, Field(ge=0)] = 0.001
    sums: Annotated[int, Field(ge=1)] = 1
    batch: Annotated[int, Field(ge=1)] = 16
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        import graphq.torch_executor  # noqa: F401 (says so if torch is missing)

        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        from graphq.passes._learned_torch import Plan

        plan = Plan(self.steps, self.budget_s or math.inf, self.drop)
        rates = Rates(self.rate, 0.0, self.step_rate, self.bias_rate)
        settings = Settings(plan, rates, self.rounding == "gates", self.batch, self.sums, self.samples or None, self.exclude)
        _reconstruct.run(model, ctx, settings)
