"""lorc: a branch of low rank beside each quantized layer, for what quantization took from its output.

The branch comes after whatever quantized the weights, and reads the activation before any quantizer. It is fitted to the float layer's
output: to the error of the weight, seen through what the layer reads, and to that of the activation where that helps on held-out rows.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir, linear, stored
from graphq.exclude import is_excluded, require_matches
from graphq.executor import decode
from graphq.noise import decibel
from graphq.passes import _bias, _branch, _layer_rows, _twins
from graphq.passes import _low_rank_math as math
from graphq.passes._sums import Sums
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.sweep import SweepStep
from graphq.targets import Target


@pass_options
class Lorc(Pass):
    """Adds branches of low rank that make good what quantized weights lack (LoRC: ZeroQuant-V2, arXiv 2303.08302), activation-weighted.

    Attributes:
        rank: Columns of a branch: it costs `rank (D + O)` weights beside D x O.
        store: How the branch's weights are stored.
        min_gain_db: What the output error of a layer must gain on rows that the branch was not fitted to.
        samples: Calibration samples to use, 0 for all.
        exclude: Patterns of node names (or operator types) that get no branch.
    """

    name: ClassVar[str] = "lorc"
    needs_data: ClassVar[bool] = True

    rank: Annotated[int, Field(ge=1)] = 16
    store: Literal["int8", "float32"] = "int8"
    min_gain_db: Annotated[float, Field(ge=0)] = 0.5
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        twins, nodes = {node.name: node for node in ctx.reference.graph}, []
        for node in _layer_rows.candidates(model):
            if reason := self._refusal(model, node, twins.get(node.name)):
                ctx.skip(node, reason)
            else:
                nodes.append(node)
        for step in ctx.sweep(nodes, self.samples or None):
            self._compensate(step, twins[step.node.name], ctx)
        ctx.edit.prune()

    def _refusal(self, model: ir.Model, node: ir.Node, twin: ir.Node | None) -> str | None:
        if is_excluded(node, self.exclude):
            return "excluded by the recipe"
        if node.graph is not model.graph:
            return "it lies in a subgraph"
        weight = linear.weight_of(node)
        if weight is None or not stored.is_stored(weight):
            return "its weight is not quantized"
        if reason := _branch.refusal(node, self.rank, self.name):
            return reason
        if twin is None or not linear.is_linear(twin):
            return "the float model has no such layer"
        if not _twins.computes_the_same(node, twin) or _sizes(node) != _sizes(twin):
            return "the float model has no layer that computes the same from the same"
        return None if _bias.is_one_a_channel(node) and _bias.is_one_a_channel(twin) else "its bias differs from row to row"

    def _compensate(self, step: SweepStep, twin: ir.Node, ctx: PassContext) -> None:
        node, takes_mean = step.node, _bias.can_shift(step.node)
        wanted, weight = _rows(ctx.reference, twin), _rows(ctx.model, node)
        lack = _bias.added(ctx.reference, twin) - _bias.added(ctx.model, node)
        train, held = (Sums.none(1, *weight.shape) for _ in range(2))
        for chunk in _layer_rows.chunks(step, ctx.seed):
            raw, data = chunk.raw, chunk.data
            output = raw @ wanted.T
            sums = Sums.of(raw, (output - data @ weight.T + lack).astype(np.float32), output)
            train, held = (train, held + sums) if chunk.is_held else (train + sums, held)
        if not held.count:
            ctx.skip(node, "a single row of calibration data leaves none to judge a branch by")
            return
        error = (wanted - weight).astype(np.float64)
        plain = held.moved(np.zeros((1, *weight.shape)), train.mean_lack if takes_mean else 0.0).error
        errors = {with_data: self._moved(train, held, error, takes_mean, with_data).error for with_data in (False, True)}
        best = min(errors, key=errors.__getitem__)
        gain = decibel(plain, errors[best])
        if not gain >= self.min_gain_db:
            ctx.skip(node, f"a branch gains {gain:.1f} dB, less than {self.min_gain_db:g} dB")
            return
        sums = train + held
        factors = self._factors(sums, error, takes_mean, best)
        _branch.insert(ctx, node, factors, is_int8=self.store == "int8")
        if takes_mean:
            _bias.shift(ctx.edit, node, sums.moved((factors[0] @ factors[1]).T[None]).mean_lack.reshape(-1))
        ctx.measure(node.name or "", gain_db=gain, sqnr_db=decibel(1.0, errors[best]))

    def _moved(self, train: Sums, held: Sums, error: np.ndarray, takes_mean: bool, with_data: bool) -> Sums:
        """What is held out, with the branch that was fitted to the rest."""
        left, right = self._factors(train, error, takes_mean, with_data)
        delta = (left @ right).T[None]
        return held.moved(delta, train.moved(delta).mean_lack if takes_mean else 0.0)

    def _factors(self, sums: Sums, error: np.ndarray, takes_mean: bool, with_data: bool) -> math.Factors:
        found = math.compensation(error, sums, self.rank, takes_mean=takes_mean, with_data=with_data)
        return _branch.as_int8(found) if self.store == "int8" else found


def _sizes(node: ir.Node) -> list[int | str | None]:
    """Of the weight of `node`, those of the outputs first: quantizers turn the weights of some Gemms."""
    sizes = list(ir.shape_of(linear.weight_of(node)) or ())
    return [sizes.pop(linear.out_axis(node)), *sizes]


def _rows(model: ir.Model, node: ir.Node) -> np.ndarray:
    """The weight of `node`, which may be stored as codes, as float32 [O, D]."""
    value = linear.weight_of(node)
    assert value is not None
    rows = np.moveaxis(decode(model, value), linear.out_axis(node), 0)
    return rows.reshape(len(rows), -1)
