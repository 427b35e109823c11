"""round: store weights as integers that are rounded for what their layer computes, not each weight for itself.

Layer by layer, each seeing what the rounded layers before it produce. With `repair`, the weight is first refitted as `aqer` does,
from the same sums. See `_round_math` for the algorithms.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from graphq import ir
from graphq.passes._rounding import Algorithm, Layers, Repair, Rounding, Scales
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class Round(Pass):
    """Stores the weights of linear layers with few bits, rounded with calibration data; biases stay float.

    Attributes:
        bits: Width of a weight, unless its layer asks for another (see `graphq.precision`).
        algorithm: Round to nearest, GPTQ (arXiv 2210.17323), Wqer (arXiv 2407.06794), GPTQ or AdaRound (arXiv 2004.10568) improved
            by greedy steps: `greedy` and `adaround`. The last takes ten times as long and no weight further than one code away, so
            that it is behind where inputs are strongly correlated.
        group_size: One scale for so many consecutive inputs of a matrix; without, and for convolutions, one an output channel.
        symmetric: Whether zero points are 0; by default only where the target takes no others.
        scales: Whether a scale covers the whole range of its weights, or the part of it with the least squared error.
        layers: Layers whose activation is quantized, or all.
        exclude: Patterns of node names (or operator types) that stay float.
        samples: Calibration samples to use, 0 for all.
        repair: Whether to refit each weight before it is rounded, where that lowers the error after it: to what its layer makes of its
            input before that is quantized, or, with `reference`, to the layer's output in the float model, which makes up for the
            layers before it too (as in GPTAQ, arXiv 2504.02692) and wants more data: the fit has more to learn.
        correct_bias: Whether to take the mean error of each output channel out of the bias.
    """

    name: ClassVar[str] = "round"
    needs_data: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    algorithm: Algorithm = "greedy"
    group_size: Annotated[int, Field(ge=2)] | None = None
    symmetric: bool | None = None
    scales: Scales = "mse"
    layers: Layers = "quantized"
    exclude: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=0)] = 0
    repair: Repair = False
    correct_bias: bool = True

    def precheck(self, model: ir.Model, target: Target) -> None:
        self._how.precheck(model, target)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        self._how.apply(model, ctx)

    @property
    def _how(self) -> Rounding:
        return Rounding(
            self.name, self.bits, self.algorithm, self.group_size, self.symmetric, self.scales, self.layers, self.exclude, self.samples,
            self.repair, self.correct_bias,
        )  # fmt: skip
