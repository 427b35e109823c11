"""A linear layer as the matrix product that it is, group by group, and its rows at a stop of the sweep.

Letters: G groups (of a convolution, else 1), D inputs and O outputs of a group, N rows (samples x positions).
X: [G, N, D] rows of what the layer reads; W: [G, O, D]; Y = X Wᵀ + b: [G, N, O]. Convolutions are unfolded (im2col), but only
at the rows that are picked, so that memory does not grow with the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from graphq import ir, linear
from graphq.exclude import is_excluded
from graphq.passes._sums import Sums
from graphq.sweep import Batches, SweepStep

ROWS_PER_INPUT = 32
"""Rows to use for each of D inputs: least squares over N rows errs by a share of D / N more on rows that it has not seen."""

ROWS = 4096
"""Rows to use at least, where there are that many; and to hold at once."""

RUNS, FOLDS = 50, 5
"""Rows are divided into so many runs of neighbours, every fifth of which is held out: few samples lie on both sides.
Who judges by what is held out has nothing to go by if there is one row only."""


def candidates(model: ir.Model) -> list[ir.Node]:
    """All nodes whose operator has weights."""
    return [node for node in ir.all_nodes(model) if not node.domain and node.op_type in linear.LINEAR_OPS]


def refusal(model: ir.Model, node: ir.Node, exclude: Sequence[str]) -> str | None:
    """Why `node` is not `Y = X Wᵀ + b` with a constant float W that may be changed; None if it is.

    Args:
        exclude: Patterns (`*`, `?`) of node names or operator types that are left alone.
    """
    if is_excluded(node, exclude):
        return "excluded by the recipe"
    if node.graph is not model.graph:
        return "it lies in a subgraph"
    if node.op_type == "ConvTranspose":
        return "a transposed convolution is no product of rows of its input with its weight"
    return linear.linear_refusal(node)


Edges = dict[ir.Value, list[ir.Node]]
"""Values, each with the layers of which it is the data."""


def by_input(nodes: Iterable[ir.Node], refusal: Callable[[ir.Node], str | None],
             skip: Callable[[ir.Node, str], None] = lambda node, reason: None) -> Edges:  # fmt: skip
    """`nodes` by what they read; those for which `refusal` has a reason go to `skip` with it."""
    found: Edges = {}
    for node in nodes:
        if reason := refusal(node):
            skip(node, reason)
        else:
            found.setdefault(linear.data_of(node), []).append(node)
    return found


@dataclass(frozen=True)
class Layer:
    """A Conv, Gemm or MatMul that `refusal` takes. `alpha` of a Gemm counts as a factor of X, so that W is what is stored."""

    node: ir.Node

    def weight(self) -> np.ndarray:
        """W, float32 [G, O, D]."""
        weight = ir.constant(linear.weight_of(self.node))
        assert weight is not None
        rows = np.moveaxis(weight, linear.out_axis(self.node), 0)
        return rows.reshape(self._groups, len(rows) // self._groups, -1)

    def stored(self, matrix: np.ndarray) -> np.ndarray:
        """An array [G, O, D] in the shape of the node's weight; for a Gemm or MatMul also [1, O, K], K numbers an output."""
        if self.node.op_type == "Conv":
            return matrix.reshape(ir.constant_shape(linear.weight_of(self.node)))
        return matrix[0] if linear.out_axis(self.node) == 0 else matrix[0].T

    def count(self, shape: tuple[int, ...]) -> int:
        """Rows of an input of `shape`."""
        if self.node.op_type == "Conv":
            return int(shape[0] * np.prod(_Window.of(self.node, shape).positions))
        if self.node.op_type == "Gemm":
            return shape[1] if self._is_transposed else shape[0]
        return int(np.prod(shape[:-1]))

    def rows(self, x: np.ndarray, picked: np.ndarray) -> np.ndarray:
        """Some rows of X, [G, rows, D], of an input `x`."""
        if self.node.op_type == "Conv":
            return self._split(_patches(self.node, x, picked))
        if self.node.op_type == "Gemm":
            x = x.T if self._is_transposed else x
            return x[None, picked] * np.float32(ir.attribute(self.node, "alpha", 1.0))
        return x.reshape(1, -1, x.shape[-1])[:, picked]

    def outputs(self, y: np.ndarray, picked: np.ndarray) -> np.ndarray:
        """The same rows of an output `y`, [G, rows, O]."""
        if self.node.op_type == "Conv":
            y = np.moveaxis(y, 1, -1)
        rows = y.reshape(-1, y.shape[-1])[picked]
        return self._split(rows) if self.node.op_type == "Conv" else rows[None]

    def _split(self, rows: np.ndarray) -> np.ndarray:
        """[rows, G * D, ...] as [G, rows, D]."""
        width = int(np.prod(rows.shape[1:])) // self._groups
        return rows.reshape(len(rows), self._groups, width).swapaxes(0, 1)

    @property
    def inputs(self) -> int:
        """D."""
        shape = [size for size in ir.shape_of(linear.weight_of(self.node)) or () if isinstance(size, int)]
        return int(np.prod(shape)) // shape[linear.out_axis(self.node)]

    @property
    def _groups(self) -> int:
        return int(ir.attribute(self.node, "group", 1)) if self.node.op_type == "Conv" else 1

    @property
    def _is_transposed(self) -> bool:
        return bool(ir.attribute(self.node, "transA", 0))


@dataclass(frozen=True)
class _Window:
    """How the kernel of a Conv moves over its input: a number, or a pair of pads, for each spatial axis."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    pads: tuple[tuple[int, int], ...]
    positions: tuple[int, ...]

    @classmethod
    def of(cls, node: ir.Node, shape: tuple[int, ...]) -> _Window:
        kernel, sizes = tuple(size for size in ir.shape_of(linear.weight_of(node)) or () if isinstance(size, int))[2:], shape[2:]
        ones, none = (1,) * len(kernel), (0,) * (2 * len(kernel))
        strides, dilations = (tuple(ir.attribute(node, name, ones)) for name in ("strides", "dilations"))
        reaches = [(size - 1) * dilation + 1 for size, dilation in zip(kernel, dilations, strict=True)]
        ends, auto = tuple(ir.attribute(node, "pads", none)), ir.attribute(node, "auto_pad", "NOTSET")
        if auto.startswith("SAME"):
            axes = zip(sizes, strides, reaches, strict=True)
            missing = [max(0, (-(-size // stride) - 1) * stride + reach - size) for size, stride, reach in axes]
            halves = [(total // 2, total - total // 2) for total in missing]
            first, last = zip(*(half if auto == "SAME_UPPER" else half[::-1] for half in halves), strict=True)
            ends = (*first, *last)
        pads = tuple(zip(ends[: len(kernel)], ends[len(kernel) :], strict=True))
        spans = zip(sizes, pads, reaches, strides, strict=True)
        positions = tuple((size + sum(pad) - reach) // stride + 1 for size, pad, reach, stride in spans)
        return cls(kernel, strides, dilations, pads, positions)


def _patches(node: ir.Node, x: np.ndarray, picked: np.ndarray) -> np.ndarray:
    """What the kernel of a Conv covers at some of its positions: [rows, channels, *kernel]."""
    window = _Window.of(node, x.shape)
    padded = np.pad(x, [(0, 0), (0, 0), *window.pads])
    sample, *corner = np.unravel_index(picked, (x.shape[0], *window.positions))
    rank = len(window.kernel)
    index = [sample.reshape(-1, *(1,) * rank)]
    for axis in range(rank):
        reached = corner[axis][:, None] * window.strides[axis] + np.arange(window.kernel[axis]) * window.dilations[axis]
        index.append(reached.reshape(-1, *(1,) * axis, window.kernel[axis], *(1,) * (rank - 1 - axis)))
    return np.moveaxis(np.moveaxis(padded, 1, -1)[tuple(index)], -1, 1)


def pick(count: int, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of `count` rows, ascending: one at a random place in each of `limit` stretches of one length."""
    if count <= limit:
        return np.arange(count)
    places = np.arange(limit) + np.random.default_rng(seed).random(limit)
    return np.minimum((places * (count / limit)).astype(np.int64), count - 1)


def some(step: SweepStep, limit: int, seed: int) -> np.ndarray:
    """At most `limit` rows of X at a stop of the sweep, [G, N, D]; none of padding."""
    layer = Layer(step.node)
    places, ends = _places(step)
    return _gather(places[pick(len(places), limit, seed)], ends, lambda index, mine: layer.rows(step.x_cur[index], mine))


@dataclass(frozen=True)
class Chunk:
    """Some of the rows that are picked at a stop of the sweep.

    Attributes:
        is_held: Whether they are held out.
        rows: Which of all rows of all batches, ascending.
        ends: Where each batch ends among these.
    """

    is_held: bool
    rows: np.ndarray
    ends: np.ndarray
    _step: SweepStep

    @cached_property
    def data(self) -> np.ndarray:
        """Rows of X, behind the quantizer of what the layer reads."""
        return self._inputs(self._step.x_cur)

    @property
    def raw(self) -> np.ndarray:
        """The same before that quantizer; `data` itself if there is none."""
        return self.data if self._step.x_raw is self._step.x_cur else self._inputs(self._step.x_raw)

    def _inputs(self, x: Batches) -> np.ndarray:
        layer = Layer(self._step.node)
        return _gather(self.rows, self.ends, lambda index, mine: layer.rows(x[index], mine))

    def outputs(self, y: Batches) -> np.ndarray:
        """The same rows of an output of the layer, [G, rows, O]."""
        layer = Layer(self._step.node)
        return _gather(self.rows, self.ends, lambda index, mine: layer.outputs(y[index], mine))


def chunks(step: SweepStep, seed: int, per_input: int = ROWS_PER_INPUT) -> Iterator[Chunk]:
    """Rows that are picked at a stop of the sweep, up to `ROWS` at a time, none of padding."""
    layer = Layer(step.node)
    places, ends = _places(step)
    picked = pick(len(places), max(ROWS, per_input * layer.inputs), seed)
    run = -(-len(places) // RUNS)
    is_held = picked // run % FOLDS == FOLDS - 1
    is_held[-1:] |= len(picked) > 1 and not is_held.any()  # of two to four rows the last, of one none
    for held in (False, True):
        rows = places[picked[is_held == held]]
        for start in range(0, len(rows), ROWS):
            yield Chunk(held, rows[start : start + ROWS], ends, step)


def collect(step: SweepStep, seed: int, per_input: int = ROWS_PER_INPUT, *, reference: bool = False) -> tuple[Sums, Sums]:
    """Sums over four fifths of the rows that are picked at a stop of the sweep, `per_input` for each of D inputs, and over the rest.

    R is what the layer's output lacks of what the layer makes of its input before that is quantized, or of its output in the
    reference, which has not seen the changes to the layers before it either.
    """
    weight = Layer(step.node).weight().swapaxes(1, 2)
    outputs = (step.y_ref, step.y_cur()) if reference else None
    sums = [Sums.none(len(weight), weight.shape[2], weight.shape[1]) for _ in range(2)]
    for chunk in chunks(step, seed, per_input):
        made, raw = chunk.data @ weight, chunk.raw
        if outputs:
            lack = chunk.outputs(outputs[0]) - chunk.outputs(outputs[1])
        else:
            lack = np.zeros_like(made) if raw is chunk.data else raw @ weight - made
        sums[chunk.is_held] += Sums.of(chunk.data, lack, made + lack)
    return sums[0], sums[1]


def _places(step: SweepStep) -> tuple[np.ndarray, np.ndarray]:
    """The rows of all batches that are no padding, ascending, and where each batch ends.

    A product has one row a token if it has as many rows as the mask has numbers: no attention reads what it makes of padding, and
    no pooling should, so that it must not take part in fits either.
    """
    layer = Layer(step.node)
    counts = [layer.count(x.shape) for x in step.x_cur]
    ends = np.cumsum([0, *counts])
    if step.node.op_type == "Conv" or [mask.size for mask in step.mask if mask.dtype.kind in "biu"] != counts:
        return np.arange(ends[-1]), ends
    return np.flatnonzero(np.concatenate([mask.reshape(-1) for mask in step.mask])), ends


def _gather(rows: np.ndarray, ends: np.ndarray, read: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """What `read` makes of the ascending `rows` that lie in each batch, one behind the other along axis 1."""
    batch = np.searchsorted(ends, rows, side="right") - 1
    return np.concatenate([read(index, rows[batch == index] - ends[index]) for index in np.unique(batch)], axis=1)
