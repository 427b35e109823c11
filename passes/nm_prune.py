"""nm-prune: N:M sparse weights, such as 2:4, which sparse tensor cores multiply at up to twice the speed.

Layer by layer, each seeing what the pruned layers before it produce, and refitted to what it computed from that itself: fitting
the reference's output instead makes up for the layers before, but with errors of this size it shrinks everything. More data helps
most (benchmarks/sparsity.py measures with 256 samples).
Groups lie along the input channels, for each position of a kernel and each group of a convolution; channels
that fill no group stay dense. Weights are stored dense, with zeros, which symmetric integers keep.
What mixes the inputs of a layer does not (`rotate`, `wush`, `higgs`, `svd-branch`), nor do `channel-repair` and the lower widths of
`digit-planes`: a pass behind this one that undoes the pattern is refused. `rotate`, `wush` and `channel-repair` belong before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear, sparse_kernels, sparsity, stored
from graphq.errors import RecipeError
from graphq.exclude import require_matches
from graphq.executor import decode
from graphq.noise import decibel
from graphq.observers import Moments
from graphq.passes import _bias, _channels, _layer_rows, _masked
from graphq.passes import _nm_math as math
from graphq.passes._layer_rows import Layer
from graphq.passes._nm_math import Pattern
from graphq.passes._round_math import damped
from graphq.passes._sums import Sums
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.sweep import SweepStep
from graphq.targets import Target

ROWS_PER_INPUT = 128
"""Rows for each input of a layer: half of the weights are fitted anew, and errors are large, so more of them pay than for rounding."""

ALPHAS = (0.001, 0.01)
"""Strengths of the ridge to choose from, in units of the mean square of an input."""


@pass_options
class NmPrune(Pass):
    """Makes weights of MatMul, Gemm and Conv layers zero, all but `n` of every `m` along the input channels.

    Attributes:
        n: Weights that are kept of each group.
        m: Weights in a group.
        score: What is kept: the largest weights (`magnitude`), the largest contributions (`wanda`, arXiv 2306.11695), or what
            `sparsegpt` (arXiv 2301.00774) or `alps` (ADMM, arXiv 2406.07831) find while they make up for what goes.
        refit: Whether to refit the weights that are kept, and the bias, to the layer's output: a ridge whose strength is chosen on
            rows that were held out.
        permute: Whether to reorder channels, where all that makes and reads them can be, so that groups keep more.
        exclude: Patterns of node names (or operator types) that stay dense.
        samples: Calibration samples to use, 0 for all.
    """

    name: ClassVar[str] = "nm-prune"
    needs_data: ClassVar[bool] = True

    n: Annotated[int, Field(ge=1, le=31)] = 2
    m: Annotated[int, Field(ge=2, le=32)] = 4
    score: math.Score = "sparsegpt"
    refit: bool = True
    permute: bool = False
    exclude: tuple[str, ...] = ()
    samples: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        if self.n >= self.m:
            raise ValueError(f"n must be less than m, not {self.n} of {self.m}")

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        nodes = []
        for node in _layer_rows.candidates(model):
            reason = _layer_rows.refusal(model, node, self.exclude) or self._refusal(node)
            if reason is None:
                nodes.append(node)
            else:
                ctx.skip(node, reason)
        if self.permute:
            self._permute(nodes, ctx)
        for step in ctx.sweep(nodes, self.samples or None):
            self._prune(step, ctx)
            step.node.meta[sparsity.MARK] = (self.n, self.m)

    def check(self, model: ir.Model) -> None:
        for node in ir.all_nodes(model):
            if node.meta.get(sparsity.MARK) != (self.n, self.m):
                continue
            value = linear.weight_of(node)
            weight = decode(model, value) if value is not None and stored.is_fixed(value) else None
            if weight is None or sparsity.fullest(np.moveaxis(weight, linear.out_axis(node), 0), self.m) > self.n:
                raise RecipeError(
                    f"The {self.n}:{self.m} sparsity of a weight is undone.", where=ir.describe(node),
                    expected=f"passes behind {self.name} that leave its zeros where they are",
                    hint=f"put the pass that is named below before {self.name}, or take one of the two out",
                )  # fmt: skip

    def _refusal(self, node: ir.Node) -> str | None:
        channels, groups = linear.in_channels(node), ir.attribute(node, "group", 1)
        if channels >= self.m:
            return None
        if channels == 1 and groups > 1:
            return "a depthwise convolution sums over one channel"
        return f"its {channels} input channels{' a group' if groups > 1 else ''} do not fill a group of {self.m}"

    def _permute(self, nodes: Sequence[ir.Node], ctx: PassContext) -> None:
        """Reorder the channels that `nodes` read, region by region, for the largest share of contributions that is kept."""
        taps = {node: Moments(linear.data_of(node).name or "", linear.channel_axis(node)) for node in nodes if _is_whole(node)}
        stats, seen = ctx.observe(taps.values()), set[ir.Node]()
        power = {node: stats[tap]["square"] for node, tap in taps.items()}  # before the first edit
        for node in nodes:
            if node in seen:
                continue
            found = _channels.region(node) if node in taps else _ORDERED[node.op_type]
            if isinstance(found, str):
                ctx.note(node, f"its input channels keep their order: {found}")
                continue
            seen.update(found.readers)
            parts = [self._energy(reader, power[reader]) for reader in found.readers if reader in taps]
            before, order, after = math.permutation(np.concatenate(parts), self.n, self.m)
            ctx.measure(node.name or "", kept_before=before, kept=after, layers=len(parts))
            if after > before:
                found.reorder(ctx.edit, order)

    def _energy(self, node: ir.Node, power: np.ndarray) -> np.ndarray:
        """The square of what each weight is scored by, as rows of input channels, float64 [O * kernel positions, channels]; sums to 1."""
        weight = ir.constant(linear.weight_of(node))
        assert weight is not None
        rows = np.moveaxis(weight, linear.in_axis(node), -1).reshape(-1, linear.in_channels(node)).astype(np.float64) ** 2
        energy = rows if self.score == "magnitude" else rows * power
        return np.asarray(energy / max(float(energy.sum()), 1e-300))

    def _prune(self, step: SweepStep, ctx: PassContext) -> None:
        node, layer = step.node, Layer(step.node)
        train, held = _layer_rows.collect(step, ctx.seed, ROWS_PER_INPUT)
        sums, weight = train + held, layer.weight().astype(np.float64)
        shifts = self.refit and _bias.can_shift(node)
        channels = linear.in_channels(node)
        whole, places = channels - channels % self.m, np.arange(weight.shape[2]).reshape(channels, -1)
        order = np.concatenate([places[:whole].T.reshape(-1), places[whole:].T.reshape(-1)])  # those of one kernel position together
        pattern = Pattern(self.n, self.m, whole * places.shape[1])
        found, masks = np.empty(weight.shape), np.empty(weight.shape, bool)
        for group, gram in enumerate(damped(_gram(sums, shifts), sums.count)):
            made = math.prune(weight[group][:, order], gram[np.ix_(order, order)], pattern, self.score)
            found[group][:, order], masks[group][:, order] = made
        numbers = dict[str, float]()
        if self.refit:
            found, numbers["alpha"] = _refit(found, masks, weight, train, held, shifts)
        kept, before = found.astype(np.float32), ir.constant(linear.weight_of(node))
        assert before is not None
        numbers |= sparsity.position_numbers(np.moveaxis(before, linear.out_axis(node), 0), self.n, self.m)
        ctx.edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, layer.stored(kept))
        sums = sums.moved(kept - weight)
        if shifts:
            _bias.shift(ctx.edit, node, sums.mean_lack.reshape(-1))
            sums = sums.moved(np.zeros(weight.shape), sums.mean_lack)
        numbers |= {"zeros": 1 - float(masks.mean()), "dense_channels": channels - whole}
        if ctx.target.sparse is not None:
            obstacle = sparse_kernels.obstacle(node, ctx.target)
            numbers["eligible"] = obstacle is None
            if obstacle is not None:
                ctx.note(node, f"not for {ctx.target.name}'s sparse kernels: {obstacle}")
        ctx.measure(node.name or "", sqnr_db=decibel(sums.power, sums.square), **numbers)


_ORDERED = {"Conv": "each group of the convolution has its own", "Gemm": "its data is transposed, so that rows are channels"}


def _is_whole(node: ir.Node) -> bool:
    return int(ir.attribute(node, "group", 1)) == 1 and not ir.attribute(node, "transA", 0)


def _gram(sums: Sums, shifts: bool) -> np.ndarray:
    """The Gram matrix of the error that is left: around the mean, where the bias takes that."""
    return sums.centred_gram if shifts else sums.gram


def _refit(start: np.ndarray, masks: np.ndarray, weight: np.ndarray, train: Sums, held: Sums, shifts: bool) -> tuple[np.ndarray, float]:
    """The weights of `masks` that serve rows that were held out best, refitted to all rows, and the strength of the ridge.

    The ridge pulls towards the dense weight, not towards 0: `(C_SS + l I) V = (C W + l W)_S`, as if the inputs had some noise of their
    own. Where data says little, a weight that is kept stays what it was. Without rows that were held out, the strongest.
    """

    def fit(sums: Sums, alpha: float, start: np.ndarray) -> np.ndarray:
        gram = _gram(sums, shifts)
        gram = gram + alpha * np.einsum("gdd->", gram) / gram[..., 0].size * np.eye(gram.shape[1])
        return np.stack([_masked.fit(*parts) for parts in zip(start, masks, gram, weight @ gram, strict=True)])

    fits = [start]
    for alpha in ALPHAS:
        fits.append(fit(train, alpha, fits[-1]))
    errors = []
    for found in fits[1:]:
        mean = train.moved(found - weight).mean_lack if shifts else 0.0
        errors.append(held.moved(found - weight, mean).error)
    best = int(np.argmin(errors)) if held.count else len(ALPHAS) - 1
    return fit(train + held, ALPHAS[best], fits[best + 1]), ALPHAS[best]
