"""A linear layer as the matrix product that it is, group by group, and the sums over calibration rows that closed forms need.

Letters: G groups (of a convolution, else 1), D inputs and O outputs of a group, N rows (samples x positions).
X: [G, N, D] rows of what the layer reads; W: [G, O, D]; Y = X Wᵀ + b: [G, N, O]. Convolutions are unfolded (im2col), but only
at the rows that are picked, so that memory does not grow with the kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np

from graphq import ir, linear, massive
from graphq.exclude import is_excluded
from graphq.passes import _bias
from graphq.sweep import SweepStep

ROWS_PER_INPUT = 32
"""Rows to use for each of D inputs: least squares over N rows errs by a share of D / N more on rows that it has not seen."""

ROWS = 4096
"""Rows to use at least, where there are that many; and to hold at once."""

RUNS, FOLDS = 50, 5
"""Rows are divided into so many runs of neighbours, every fifth of which is held out: few samples lie on both sides."""


def candidates(model: ir.Model) -> list[ir.Node]:
    """All nodes whose operator has weights."""
    return [node for node in ir.all_nodes(model) if not node.domain and node.op_type in linear.LINEAR_OPS]


def refusal(model: ir.Model, node: ir.Node, exclude: Sequence[str]) -> str | None:
    """Why `node` is not `Y = X Wᵀ + b` with a constant float W that may be changed; None if it is.

    Args:
        exclude: Patterns (`*`, `?`) of node names or operator types that are left alone.
    """
    maker = ir.producer(linear.weight_of(node))
    if is_excluded(node, exclude):
        return "excluded by the recipe"
    if node.graph is not model.graph:
        return "it lies in a subgraph"
    if maker is not None and maker.op_type == "DequantizeLinear":
        return "its weight is quantized already"
    if node.op_type == "ConvTranspose":
        return "a transposed convolution is no product of rows of its input with its weight"
    return linear.linear_refusal(node)


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
        """Some rows of Y, [G, rows, O], of an output `y`."""
        if self.node.op_type == "Conv":
            sample, *position = np.unravel_index(picked, (y.shape[0], *y.shape[2:]))
            return self._split(np.moveaxis(y, 1, -1)[(sample, *position)])
        return self._split(y.reshape(-1, y.shape[-1])[picked])

    def by_group(self, channels: np.ndarray) -> np.ndarray:
        """Numbers of shape (output channels,) so that they broadcast to Y: [G, 1, O]."""
        return channels.reshape(self._groups, 1, -1)

    def _split(self, rows: np.ndarray) -> np.ndarray:
        """[rows, G * D, ...] as [G, rows, D]."""
        width = int(np.prod(rows.shape[1:])) // self._groups
        return rows.reshape(len(rows), self._groups, width).swapaxes(0, 1)

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
        kernel, sizes = ir.constant_shape(linear.weight_of(node))[2:], shape[2:]
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


@dataclass(frozen=True)
class Sums:
    """Sums over rows of X and of R: [G, N, O], which is what the layer's output lacks of what it should be.

    Attributes:
        count: N, or the sum of the rows' weights.
        gram: XᵀX, float64 [G, D, D].
        total: Σ x, float64 [G, D].
        cross: RᵀX, float64 [G, O, D].
        lack: Σ r, float64 [G, O].
        square: Σ r² over everything.
        power: Σ y² over everything, of the output as it should be.
    """

    count: float
    gram: np.ndarray
    total: np.ndarray
    cross: np.ndarray
    lack: np.ndarray
    square: float
    power: float

    @classmethod
    def none(cls, groups: int, outputs: int, inputs: int) -> Sums:
        gram, cross = np.zeros((groups, inputs, inputs)), np.zeros((groups, outputs, inputs))
        return cls(0, gram, gram[:, 0], cross, cross[..., 0], 0.0, 0.0)

    @classmethod
    def of(cls, x: np.ndarray, r: np.ndarray, y: np.ndarray) -> Sums:
        """Of float32 rows, of which those with a massive output count less (see `graphq.massive`).

        Multiplied in float32, in less than half the time, around the means of the rows, which may be far larger than what varies:
        off by 4e-7 of `sqrt(c_ii c_jj)`, C = `centred_gram`, at most.
        """
        unit = np.sqrt(massive.row_weights(np.square(y).mean((0, 2), dtype=np.float64))).astype(np.float32)[:, None]
        count = float(np.sum(unit.astype(np.float64) ** 2))
        x_mean, r_mean = ((part * unit**2).sum(1, dtype=np.float64).astype(np.float32) / np.float32(count) for part in (x, r))
        x, r, y = (x - x_mean[:, None]) * unit, (r - r_mean[:, None]) * unit, y * unit
        x_rest, r_rest = ((part * unit).sum(1, dtype=np.float64) for part in (x, r))
        x_mean, r_mean = x_mean.astype(np.float64), r_mean.astype(np.float64)

        def product(left: np.ndarray, mean: np.ndarray, rest: np.ndarray) -> np.ndarray:
            """Σ (left + mean)ᵀ(x + x_mean)."""
            around = (left.swapaxes(1, 2) @ x).astype(np.float64)
            return around + _outer(mean, x_rest + count * x_mean) + _outer(rest, x_mean)

        square = sum(float(np.sum(part)) for part in (r.astype(np.float64) ** 2, r_mean * (2 * r_rest + count * r_mean)))
        power = float(np.sum(y.astype(np.float64) ** 2))
        total, lack = x_rest + count * x_mean, r_rest + count * r_mean
        return cls(count, product(x, x_mean, x_rest), total, product(r, r_mean, r_rest), lack, square, power)

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def moved(self, delta: np.ndarray, shift: np.ndarray | float = 0.0) -> Sums:
        """The sums once the weight is W + `delta` [G, O, D] and the bias b + `shift` [G, O]."""
        shift = np.broadcast_to(shift, self.lack.shape)
        made, added = delta @ self.gram, (delta @ self.total[..., None])[..., 0]
        cross = self.cross - made - shift[..., None] * self.total[:, None]
        lack = self.lack - added - self.count * shift
        # Σ (r - a)² = Σ r² - Σ a (r + (r - a)), for what is added, a = X deltaᵀ + shift.
        square = self.square - np.sum(delta * (self.cross + cross)) - np.sum(shift * (self.lack + lack))
        return Sums(self.count, self.gram, self.total, cross, lack, max(float(square), 0.0), self.power)

    @property
    def centred_gram(self) -> np.ndarray:
        """XᵀX with the mean of X taken out, for errors whose mean the bias takes."""
        return self.gram - _outer(self.total, self.total) / (self.count or 1)

    @property
    def mean_lack(self) -> np.ndarray:
        """What the output lacks in the mean, [G, O]; 0 of nothing."""
        return self.lack / (self.count or 1)

    @property
    def error(self) -> float:
        """Σ r² / Σ y²; 0 of nothing."""
        return self.square / max(self.power, 1e-30)


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[G, O] and [G, D] as [G, O, D]."""
    return left[:, :, None] * right[:, None]


def offset(node: ir.Node) -> np.ndarray | None:
    """What the constant bias of `node`, its own or an Add behind it, adds to each output channel; None if it is not that."""
    channels, bias = ir.constant_shape(linear.weight_of(node))[linear.out_axis(node)], linear.bias_of(node)
    if bias is None:
        return np.broadcast_to(_bias.behind(node), (channels,))
    array = ir.constant(bias)
    if array is None or array.size not in (1, channels) or array.size != (array.shape or (1,))[-1]:
        return None
    beta = ir.attribute(node, "beta", 1.0) if node.op_type == "Gemm" else 1.0
    return np.broadcast_to(array.reshape(-1).astype(np.float64) * beta, (channels,))


def pick(count: int, limit: int, seed: int) -> np.ndarray:
    """At most `limit` of `count` rows, ascending: one at a random place in each of `limit` stretches of one length."""
    if count <= limit:
        return np.arange(count)
    places = np.arange(limit) + np.random.default_rng(seed).random(limit)
    return np.minimum((places * (count / limit)).astype(np.int64), count - 1)


def collect(step: SweepStep, twin: ir.Node | None, seed: int) -> tuple[Sums, Sums]:
    """Sums over four fifths of the rows that are picked at a stop of the sweep, and over the rest.

    With `twin`, the stop's node in the reference, R is what the output lacks of the reference's (the node needs an `offset`);
    without, R is what it lacks of what the layer makes of its input before that is quantized.
    """
    layer = Layer(step.node)
    weight, biases = layer.weight().swapaxes(1, 2), _biases(layer, twin)
    ends = np.cumsum([0, *(layer.count(x.shape) for x in step.x_cur)])
    picked = pick(int(ends[-1]), max(ROWS, ROWS_PER_INPUT * weight.shape[1]), seed)
    run = -(-int(ends[-1]) // RUNS)
    is_held = picked // run % FOLDS == FOLDS - 1

    def sums(rows: np.ndarray) -> Sums:
        total = Sums.none(len(weight), weight.shape[2], weight.shape[1])
        for start in range(0, len(rows), ROWS):
            part = rows[start : start + ROWS]
            data = _gather(part, ends, lambda index, mine: layer.rows(step.x_cur[index], mine))
            made = data @ weight
            if biases is None:
                raw = data if step.x_raw is step.x_cur else _gather(part, ends, lambda index, mine: layer.rows(step.x_raw[index], mine))
                wanted = raw @ weight
                total += Sums.of(data, wanted - made, wanted)
            else:
                wanted = _gather(part, ends, lambda index, mine: layer.outputs(step.y_ref[index], mine)) + biases[0]
                total += Sums.of(data, wanted - made - biases[1], wanted)
        return total

    return sums(picked[~is_held]), sums(picked[is_held])


def _gather(rows: np.ndarray, ends: np.ndarray, read: Callable[[int, np.ndarray], np.ndarray]) -> np.ndarray:
    """What `read` makes of the ascending `rows` that lie in each batch, one behind the other along axis 1."""
    batch = np.searchsorted(ends, rows, side="right") - 1
    return np.concatenate([read(index, rows[batch == index] - ends[index]) for index in np.unique(batch)], axis=1)


def _biases(layer: Layer, twin: ir.Node | None) -> tuple[np.ndarray, np.ndarray] | None:
    """What lies behind the output of the twin, and what the layer adds to X Wᵀ, float32 [G, 1, O]."""
    if twin is None:
        return None
    own = offset(layer.node)
    assert own is not None, "the bias must be known"
    behind = np.broadcast_to(_bias.behind(twin), own.shape)
    return layer.by_group(behind.astype(np.float32)), layer.by_group(own.astype(np.float32))
