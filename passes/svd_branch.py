"""svd-branch: take what makes a weight hard to round out of it, into a branch of low rank that stays precise beside it.

`W = R + L1 L2`: the layer keeps R, whose entries are smaller, for whatever quantizes it later, and `(x L1) L2` is added to what it
makes. Since errors of activations are multiplied by R too, both sides gain. The model computes the same; outliers of activations are
moved into the weights first (`migrate`, `ln-reparam`). The zeros of a pruned weight are lost: R has none. Main graph only.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.exclude import nothing_to_quantize, require_matches
from graphq.noise import decibel
from graphq.passes import _branch, _dynamic_math, _layer_rows
from graphq.passes import _low_rank_math as math
from graphq.passes._layer_rows import Layer
from graphq.passes._low_rank_math import Seen
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, PerGroup, QuantSpec
from graphq.sweep import SweepStep
from graphq.targets import Target


@pass_options
class SvdBranch(Pass):
    """Splits weights into a part to be quantized and a precise branch of low rank (SVDQuant, arXiv 2411.05007).

    Attributes:
        rank: Columns of the branch: it costs `rank (D + O)` weights beside D x O.
        iterations: How often the branch is fitted anew to what rounding the rest has left over.
        weight_bits: Width that the rest will be quantized to, with zero points.
        group_size: Inputs of a matrix that will share one scale; null for one scale an output channel.
        activation_bits: Width that the activation will be quantized to, with one range a token; null for not at all.
        store: How the branch's weights are stored. The rest makes good what int8 costs, so that it costs nothing.
        min_gain_db: What the output error of a layer must gain on rows that the branch was not fitted to.
        samples: Calibration samples to use, 0 for all.
        exclude: Patterns of node names (or operator types) that get no branch.
    """

    name: ClassVar[str] = "svd-branch"
    needs_data: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] = 16
    iterations: Annotated[int, Field(ge=0, le=100)] = 8
    weight_bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Annotated[int, Field(ge=2)] | None = 64
    activation_bits: Annotated[int, Field(ge=2, le=8)] | None = 4
    store: Literal["int8", "float32"] = "int8"
    min_gain_db: Annotated[float, Field(ge=0)] = 0.5
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        reasons = [self._refusal(model, node) for node in _layer_rows.candidates(model)]
        if not self.allow_no_effect and None not in reasons:
            raise nothing_to_quantize(filter(None, reasons), "at least one Conv, Gemm or MatMul with a constant float32 weight")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        nodes = []
        for node in _layer_rows.candidates(model):
            if reason := self._refusal(model, node):
                ctx.skip(node, reason)
            else:
                nodes.append(node)
        for step in ctx.sweep(nodes, self.samples or None):
            self._split(step, ctx)
        ctx.edit.prune()

    def _refusal(self, model: ir.Model, node: ir.Node) -> str | None:
        return _layer_rows.refusal(model, node, self.exclude) or _branch.refusal(node, self.rank, self.name)

    def _split(self, step: SweepStep, ctx: PassContext) -> None:
        node, layer = step.node, Layer(step.node)
        weight = layer.weight()[0].T.astype(np.float64)
        train, held = self._seen(step, ctx.seed)
        if held is None:
            ctx.skip(node, "a single row of calibration data leaves none to judge a branch by")
            return
        store = _branch.as_int8 if self.store == "int8" else lambda found: found
        found, _ = math.split(weight, self.rank, self.iterations, self._quantize, train, store)
        rest = weight - found[0] @ found[1]
        plain, left = (held.error(part, self._quantize(part)) for part in (weight, rest))
        gain = decibel(plain, left)
        if not gain >= self.min_gain_db:
            ctx.skip(node, f"a branch gains {gain:.1f} dB, less than {self.min_gain_db:g} dB")
            return
        ctx.edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, layer.stored(rest.T[None].astype(np.float32)))
        _branch.insert(ctx, node, found, is_int8=self.store == "int8")
        ctx.measure(node.name or "", gain_db=gain, sqnr_db=decibel(held.power(weight), left))

    def _quantize(self, rest: np.ndarray) -> np.ndarray:
        """R [D, O] rounded to nearest."""
        granularity = PerGroup(0, self.group_size) if self.group_size is not None and self.group_size < len(rest) else PerAxis(1)
        quantizer = Uniform(QuantSpec(self.weight_bits, signed=False, symmetric=False, granularity=granularity))
        floats = rest.astype(np.float32)
        return quantizer.fake_quantize(floats, quantizer.fit_weight(floats))

    def _seen(self, step: SweepStep, seed: int) -> tuple[Seen, Seen | None]:
        """What the layer reads, and what of it is held out, if anything is."""
        sums: dict[bool, Seen] = {}
        for chunk in _layer_rows.chunks(step, seed):
            raw, data = chunk.raw, chunk.data
            if data is raw and self.activation_bits is not None:
                data = _dynamic_math.fake_quantize(raw, self.activation_bits, symmetric=False)
            part = Seen.of(raw[0], data[0])
            sums[chunk.is_held] = sums[chunk.is_held] + part if chunk.is_held in sums else part
        return sums[False], sums.get(True)
