"""awq: scale input channels of weights before they are rounded, so that what meets large activations is rounded more finely.

For layers whose weights alone will be quantized (`round` or `quantize-weights` behind it, with the same bits and groups). The factor
disappears into the normalization before the layer, or into the layer behind the attention or Relu that it reads; elsewhere it
costs one element-wise Mul, and has to gain more. It helps rounding to nearest; GPTQ
behind it gains nothing from it (benchmarks/weights.py, a small Llama, groups of 32, perplexity 5.971 as it is: 6.219 to nearest with
min-max ranges, 6.113 with awq; 6.063 by GPTQ, 6.068 with awq before it).
A normalization whose output is also the residual (post-norm, as in MiniLM) takes no factor: the residual would need a Mul instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear, precision
from graphq.exclude import require_matches
from graphq.executor import run_ahead
from graphq.noise import decibel
from graphq.passes import _awq_math as math
from graphq.passes import _layer_rows, _scaling
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.precision import Bits
from graphq.spec import QuantSpec
from graphq.sweep import SweepStep
from graphq.targets import Target

HELD = 4
"""Every fourth row is kept from the search; what is found has to gain on those."""


@dataclass(frozen=True)
class _Found:
    """What a search found for one activation: the scale, its exponent, and what it gains on rows that the search has not seen."""

    s: np.ndarray
    rho: float
    gain_db: float


@pass_options
class Awq(Pass):
    """Finds a scale for each input channel by a search over one exponent (AWQ, arXiv 2306.00978), on the error of the output.

    All layers that read one activation share its scale and are judged together, with the quantizer that the options describe. By default
    that is the one of `round`; what is best for it serves others too (channels of sizes over 2.2 decades, groups of 32: 1.2 dB
    with NF4 behind it, 1.6 dB with 4-bit integers).

    Attributes:
        bits: Width that weights will be quantized to, unless their layer asks for another.
        group_size: So many consecutive inputs will share a scale; without, and where there are not more, one an output channel.
        symmetric: Whether zero points will be 0; by default only where the target takes no others.
        scales: Whether a scale will cover the whole range of its weights, or the part with the least squared error.
        points: Exponents to try.
        min_gain_db: What the output error must gain for a factor that folds into what is before it.
        min_gain_mul_db: The same for a factor that costs a Mul of its own.
        rows: Rows of activations to search on, at most.
        samples: Calibration samples to use, 0 for all.
        exclude: Patterns of node names (or operator types) that are left alone.
    """

    name: ClassVar[str] = "awq"
    needs_data: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Annotated[int, Field(ge=2)] | None = None
    symmetric: bool | None = None
    scales: Literal["min-max", "mse"] = "mse"
    points: Annotated[int, Field(ge=2, le=100)] = math.POINTS
    min_gain_db: Annotated[float, Field(ge=0)] = 0.1
    min_gain_mul_db: Annotated[float, Field(ge=0)] = 1.0
    rows: Annotated[int, Field(ge=16)] = 1024
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        edges = self._edges(model, ctx)
        if not edges:
            return
        steps = ctx.sweep([nodes[0] for nodes in edges.values()], self.samples or None)
        jobs = (partial(self._search, edges[linear.data_of(step.node)], self._rows(step, ctx), ctx.target) for step in steps)
        for (value, nodes), found in zip(edges.items(), list(run_ahead(jobs)), strict=True):
            folds = _scaling.can_fold(value, nodes, exclude=self.exclude)
            least = self.min_gain_db if folds else self.min_gain_mul_db
            if found.rho == 0 or found.gain_db < least:
                costs = "" if folds else " for a Mul of its own"
                ctx.skip(nodes[0], f"scaling what it reads gains {found.gain_db:.2f} dB, less than the {least:g} asked{costs}")
                continue
            for node in nodes:
                _scaling.multiply(ctx.edit, node, found.s)
            _scaling.divide(ctx.edit, value, nodes, found.s, exclude=self.exclude)
            ctx.measure(value.name or "", gain_db=found.gain_db, rho=found.rho, folded=folds)

    def _search(self, nodes: list[ir.Node], rows: np.ndarray, target: Target) -> _Found:
        """The best scale for what `nodes` read; changes nothing, so that several searches run at a time."""
        weights = [math.sample(_scaling.matrix(node).T) for node in nodes]
        is_held = np.arange(len(rows)) % HELD == HELD - 1
        specs = [self._spec(node, weight.shape[1], target) for node, weight in zip(nodes, weights, strict=True)]
        layer = math.Layer(rows[~is_held], weights, specs, self.scales == "mse")
        s, rho = math.best(layer, np.abs(layer.x).mean(0, dtype=np.float64), self.points)
        gain = decibel(*(layer.noise(factor, rows[is_held]) for factor in (np.ones_like(s), s))) if rho else 0.0
        return _Found(s, rho, gain)

    def _rows(self, step: SweepStep, ctx: PassContext) -> np.ndarray:
        return np.ascontiguousarray(_layer_rows.some(step, self.rows, ctx.seed)[0])

    def _spec(self, node: ir.Node, inputs: int, target: Target) -> QuantSpec:
        """How the rows of the weight of `node` will be quantized."""
        symmetric = target.symmetric_only if self.symmetric is None else self.symmetric
        bits = self._bits(node)
        assert bits is not None, "a layer that stays float is not searched"
        size = self.group_size if self.group_size is not None and self.group_size < inputs else None
        return math.rows_of(QuantSpec(bits, signed=symmetric, symmetric=symmetric), size)

    def _bits(self, node: ir.Node) -> int | None:
        return precision.asked(node, Bits(self.bits, None)).weight

    def _edges(self, model: ir.Model, ctx: PassContext) -> dict[ir.Value, list[ir.Node]]:
        """Layers by the activation that they share."""
        nodes = [node for node in _layer_rows.candidates(model) if node.op_type in ("MatMul", "Gemm")]
        return _layer_rows.by_input(nodes, lambda node: self._refusal(model, node), ctx.skip)

    def _refusal(self, model: ir.Model, node: ir.Node) -> str | None:
        if reason := _layer_rows.refusal(model, node, self.exclude):
            return reason
        if self._bits(node) is None:
            return "a float weight was asked for it"
        if ir.attribute(node, "transA", 0):
            return "its data is transposed, so that rows are channels"
        return None
