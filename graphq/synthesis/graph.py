"""What strategies look for in a graph: attention over patches, outputs that are classes, statistics of BatchNormalization."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir
from graphq.calibration import fixed_batch
from graphq.errors import ModelError
from graphq.executor import Executor, Fetch
from graphq.synthesis.inputs import image_input

BATCH_NORM = "graphq.batch_norm"
"""Where `normalize` keeps the statistics of a BatchNormalization that it folded, in `node.meta` of the operator before it."""

_PLAIN = frozenset({"Cast", "Dropout", "Identity"})


@dataclass(frozen=True)
class Attention:
    """One layer of attention over patches.

    Attributes:
        weights: Value of the softmax, `[batch, heads, tokens, tokens]`; with one token more than patches, the first is the class token.
        mixed: Value of its product with the values, `[batch, heads, tokens, features]`.
        grid: Rows and columns of patches.
    """

    weights: str
    mixed: str
    heads: int
    grid: tuple[int, int]

    @property
    def patches(self) -> int:
        return self.grid[0] * self.grid[1]


def attentions(model: ir.Model, height: int, width: int) -> list[Attention]:
    """The layers of attention over the patches of an image, in order.

    Raises ModelError if there are none. Those over windows, whose tokens are not all patches of the image, are left out.
    """
    found = []
    softmaxes = [node for node in model.graph if node.op_type == "Softmax" and not node.domain]
    for node, shape in _shapes(model, softmaxes).items():
        product = _reader(node.outputs[0])
        if product is None or len(shape) != 4 or shape[2] != shape[3]:
            continue
        grid = _grid(shape[3], height, width) or _grid(shape[3] - 1, height, width)
        if grid is not None:
            found.append(Attention(node.outputs[0].name or "", product.outputs[0].name or "", shape[1], grid))
    if not found:
        where = f"{len(softmaxes)} Softmax nodes, images of {height}x{width}" if softmaxes else "no Softmax"
        raise ModelError("There is no attention over patches.", where=where, expected="Softmax [batch, heads, tokens, tokens], then MatMul")
    return found


def _shapes(model: ir.Model, nodes: Sequence[ir.Node]) -> dict[ir.Node, tuple[int, ...]]:
    """Shapes of what `nodes` make of an image: exporters leave many open, so that the model runs once."""
    if not nodes:
        return {}
    inputs = ir.inputs(model)
    image = image_input(inputs)
    feeds = image.arrays(np.zeros((fixed_batch(inputs) or 1, *image.size), np.float32))
    arrays = Executor(model, [Fetch(node.outputs[0].name or "") for node in nodes], prepack=False).run(feeds)
    return {node: array.shape for node, array in zip(nodes, arrays, strict=True)}


def _reader(value: ir.Value) -> ir.Node | None:
    """The MatMul whose first operand is `value`, as it is or cast."""
    for use in ir.uses(value):
        if use.node.op_type == "MatMul" and use.idx == 0:
            return use.node  # type: ignore[no-any-return]
        if use.node.op_type in _PLAIN and (found := _reader(use.node.outputs[0])):
            return found
    return None


def _grid(patches: int, height: int, width: int) -> tuple[int, int] | None:
    """Rows and columns of so many square patches of an image, if they tile it."""
    side = math.sqrt(height * width / patches) if patches > 3 else 0.0
    rows, columns = (round(height / side), round(width / side)) if side else (0, 0)
    return (rows, columns) if rows * columns == patches and not (height % rows or width % columns) else None


def class_count(model: ir.Model) -> int:
    """Classes of the model's first output `[batch, classes]`. Raises ModelError if it is not of that shape."""
    shape = ir.shape_of(model.graph.outputs[0]) or ()
    sizes = [dim for dim in shape[1:] if dim != 1]
    if len(sizes) != 1 or not isinstance(sizes[0], int):
        raise ModelError("The first output does not look like classes.", where=f"{model.graph.outputs[0].name!r} {list(shape)}",
                         expected="[batch, classes]")  # fmt: skip
    return sizes[0]


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation `[C]` of the channels of one value over the training data."""

    value: str
    mean: np.ndarray
    deviation: np.ndarray


def batch_norms(model: ir.Model) -> list[Statistics]:
    """What the BatchNormalizations of a model remember, folded ones too where `normalize` kept it; none if there are none."""
    return list(_batch_norms(model))


def _batch_norms(model: ir.Model) -> Iterator[Statistics]:
    for node in model.graph:
        kept = node.meta.get(BATCH_NORM)
        if kept is not None:
            yield Statistics(node.outputs[0].name or "", kept["beta"], np.maximum(np.abs(kept["gamma"]), 1e-6))
        elif node.op_type == "BatchNormalization" and not node.domain:
            mean, variance = (ir.constant(value) for value in node.inputs[3:5])
            if mean is not None and variance is not None:
                deviation = np.sqrt(variance + ir.attribute(node, "epsilon", 1e-5))
                yield Statistics(node.inputs[0].name or "", mean.astype(np.float32), deviation.astype(np.float32))  # type: ignore[union-attr]
