"""What `graphq inspect --sparsity` prints."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

from graphq.console import Column, counts, say, shape, share, table

if TYPE_CHECKING:
    from graphq.sparsity import LayerZeros, Zeros

NOTABLE = 0.01
"""Share of zeros from which a layer without a pattern is listed."""

KERNELS = 5
"""Kernels that are listed: those that would keep most at one of their positions."""


def show(found: Zeros) -> None:
    patterns = Counter(f"layers {_pattern(layer)}" for layer in found.layers if layer.pattern)
    say(f"zeros: {share(found.share)} of {found.weights:,} weights in {len(found.layers)} layers; {counts(patterns) or 'no N:M pattern'}")
    sparse = [layer for layer in found.layers if layer.pattern or layer.zeros >= NOTABLE]
    right: Column = ("zeros", "right")
    if sparse:
        table(("layer", "operator", "weight", right, "pattern"), [
            (layer.name, layer.op_type, shape(layer.shape), share(layer.zeros), _pattern(layer) or "-") for layer in sparse
        ])  # fmt: skip
    kernels = sorted((layer for layer in found.layers if layer.positions), key=lambda layer: min(layer.positions))
    if kernels:
        table(("kernel", "sparsity of its positions if half of the weights went, in %", "less than half"), [
            (layer.name, _rows([f"{100 * one:3.0f}" for one in layer.positions], layer, " "),
             _rows([".#"[one] for one in layer.spatial_mask], layer, "")) for layer in kernels[:KERNELS]
        ])  # fmt: skip
    if len(kernels) > KERNELS:
        say(f"and {len(kernels) - KERNELS} more; --json has all")


def _pattern(layer: LayerZeros) -> str:
    return ":".join(map(str, layer.pattern or ()))


def _rows(cells: list[str], layer: LayerZeros, between: str) -> str:
    """Cells of a kernel, the rows of its last axis apart."""
    width = layer.shape[-1]
    return " / ".join(between.join(cells[start : start + width]) for start in range(0, math.prod(layer.shape[2:]), width))
