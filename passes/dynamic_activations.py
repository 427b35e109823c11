"""dynamic-activations: quantize what layers read with a scale for each token, found at run time.

No range has to be known beforehand, so no data is needed, nothing is clipped, and an outlier costs its own row alone. It
changes activations only: `quantize-weights` or `round` see to the weights, before or after it. Main graph only.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from graphq import ir
from graphq.exclude import require_matches
from graphq.passes import _dynamic_quantize, _token_layers
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target


@pass_options
class DynamicActivations(Pass):
    """Quantizes the activations that MatMul and Gemm layers read, with one scale a token (ZeroQuant, arXiv 2206.01861).

    Attributes:
        bits: Width of an activation, for layers that do not ask for another.
        symmetric: Without, a token gets a zero point too: what lies mostly on one side of 0, as behind a Gelu, then gets nearly twice as
            many levels.
        exclude: Patterns of node names (or operator types) whose input stays float.
    """

    name: ClassVar[str] = "dynamic-activations"

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    symmetric: bool = True
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        for (value, bits), nodes in _token_layers.find(model, ctx, self.exclude, self.bits).items():
            _dynamic_quantize.quantize(ctx, value, nodes, bits, symmetric=self.symmetric)
