"""wush: the block transform of what layers read that makes rounding both activations and weights cost the least; the model stays.

In closed form from the second moments of a layer's input and its weights. It runs with the model, as one small product for each
block of channels, except where it disappears into the layer behind the attention that it reads.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir
from graphq.exclude import require_matches
from graphq.observers import BlockGram
from graphq.passes import _block_transform, _scaling
from graphq.passes import _block_transform_math as math
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

LEAST = 4
"""Channels of a block, below which there is nothing to spread."""


@pass_options
class Wush(Pass):
    """Transforms what MatMul and Gemm layers read, block by block, for quantization (WUSH, arXiv 2512.00956).

    Attributes:
        block: Channels of a block, at most: the largest order of a Hadamard matrix that divides those of a layer is taken.
        floor: Least strength of a direction, in units of the mean: what is hardly read shall not be made arbitrarily small.
        damping: Added to the second moments, in units of their mean.
        exclude: Patterns of node names (or operator types) that are left alone.
    """

    name: ClassVar[str] = "wush"
    needs_data: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    block: Annotated[int, Field(ge=LEAST)] = 32
    floor: Annotated[float, Field(gt=0)] = 0.01
    damping: Annotated[float, Field(gt=0)] = 1e-3
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        observers = dict[ir.Value, BlockGram]()
        layers = dict[ir.Value, list[ir.Node]]()
        for value, nodes in _block_transform.edges(model, ctx.skip, self.exclude).items():
            block = math.best_block(len(_scaling.matrix(nodes[0])), self.block, LEAST)
            if block is not None:
                layers[value], observers[value] = nodes, BlockGram(value.name or "", block)
            else:
                ctx.skip(nodes[0], f"its inputs cannot be divided into blocks of {LEAST} to {self.block}")
        stats = ctx.observe(observers.values())
        for value, nodes in layers.items():
            stat = stats[observers[value]]
            weight = np.concatenate([_scaling.matrix(node).astype(np.float64) for node in nodes], axis=1)
            transform = math.wush(stat["gram"] / max(int(stat["count"]), 1), weight, floor=self.floor, damping=self.damping)
            ctx.measure(value.name or "", folded=_block_transform.folds(value, nodes, transform, self.exclude), block=transform.block)
            _block_transform.apply(ctx.edit, value, nodes, transform, self.exclude)
        ctx.edit.prune()
