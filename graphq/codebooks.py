"""Weights as codes of a table of points: grids that are finer where weights are dense, such as NF4, FP4 or those of HIGGS.

`w ≈ points[code] * scale`: one code stands for `p` neighbours along the axis that is summed over, one scale for a group of them.
In the graph a weight is a call of `graphq.LookupWeight`, whose body is standard operators; ONNX Runtime evaluates it once, at load.

Letters: a weight as rows [O, K] (outputs, inputs), L points of p numbers, groups of g inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from graphq import functions, ir, linear
from graphq.editor import Editor
from graphq.quantizers import MIN_SCALE

LOOKUP = """LookupWeight (codes, first, points, scale) => (weight) {
  one = Constant<value = float {1.0}> ()
  numbers = DequantizeLinear (codes, one)
  whole = Ceil (numbers)
  none = Constant<value = int8 {0}> ()
  narrow = QuantizeLinear (whole, one, none)
  exact = Cast<to = 1> (narrow)
  places = Sub (exact, first)
  index = Cast<to = 6> (places)
  units = Gather (points, index)
  counts = Shape<end = 2> (scale)
  rest = Constant<value = int64[1] {-1}> ()
  grouped = Concat<axis = 0> (counts, rest)
  groups = Reshape (units, grouped)
  scaled = Mul (groups, scale)
  weight = Flatten<axis = 1> (scaled)
}"""
"""codes: signed integers [O, K / p], of which `first` is the lowest; points: [L, p]; scale: [O, K / g, 1]; weight: [O, K]. TensorRT reads
4-bit constants only through a DequantizeLinear without a zero point. ONNX Runtime never evaluates a lone DequantizeLinear at load, but one
with an operator and a QuantizeLinear behind it: hence Ceil, of whole numbers."""

_STORAGE = {2: "int2", 4: "int4", 8: "int8"}
_TILE = 1 << 16  # Weights whose distances to all points are computed at once.


@dataclass(frozen=True, eq=False)
class Codebook:
    """A table of points.

    Attributes:
        points: Float32 [L, p], 2 to 256 of them; for p = 1 in ascending order.
    """

    points: np.ndarray

    def __post_init__(self) -> None:
        points = self.points
        if points.dtype != np.float32 or points.ndim != 2 or not 2 <= len(points) <= 256 or not np.isfinite(points).all():
            raise ValueError("points must be a finite float32 array [2 to 256, p]")
        if points.shape[1] == 1 and (np.diff(points[:, 0]) <= 0).any():
            raise ValueError("points of one number must be in ascending order")

    @property
    def size(self) -> int:
        """p, the weights that one code stands for."""
        return self.points.shape[1]

    @property
    def storage(self) -> str:
        """The ONNX type of a code."""
        return _STORAGE[min(bits for bits in _STORAGE if len(self.points) <= 1 << bits)]

    def quantize(self, units: np.ndarray) -> np.ndarray:
        """Places in the table of the nearest points, int64 [..., K / p], of float32 `units` [..., K]: weights over their scale."""
        if self.size == 1:
            middles = (self.points[1:, 0] + self.points[:-1, 0]) / 2
            return np.searchsorted(middles, units)
        flat = units.reshape(-1, self.size)
        found, power = np.empty(len(flat), np.int64), np.square(self.points).sum(1) / 2
        for start in range(0, len(flat), _TILE):
            found[start : start + _TILE] = (flat[start : start + _TILE] @ self.points.T - power).argmax(1)
        return found.reshape(*units.shape[:-1], -1)

    def dequantize(self, places: np.ndarray) -> np.ndarray:
        """Units, float32 [..., K], of `places` [..., K / p]."""
        return self.points[places].reshape(*places.shape[:-1], -1)


def nf4() -> Codebook:
    """NormalFloat: 16 quantiles of a normal distribution, from -1 to 1, with 0 among them (QLoRA, arXiv 2305.14314)."""
    outermost = 1 - (1 / 32 + 1 / 30) / 2  # the paper's mean of the outermost quantiles of 16 and 15 levels
    below, above = (np.linspace(0.5, outermost, count)[1:] for count in (8, 9))
    quantiles = [NormalDist().inv_cdf(float(share)) for share in (*(1 - below), 0.5, *above)]
    return Codebook(np.sort(np.array(quantiles, np.float32) / np.float32(max(quantiles)))[:, None])


def fp4() -> Codebook:
    """The 15 values of a 4-bit float E2M1, from -6 to 6 (arXiv 2310.10537)."""
    half = [0.5, 1, 1.5, 2, 3, 4, 6]
    return Codebook(np.array([*(-value for value in half[::-1]), 0, *half], np.float32)[:, None])


def widest(rows: np.ndarray, book: Codebook, group_size: int) -> np.ndarray:
    """Scales [O, K / g] with which the largest magnitude of each group of float32 `rows` [O, K] is that of the outermost point."""
    largest = np.abs(rows.reshape(len(rows), -1, group_size)).max(2)
    scale = largest / np.abs(book.points).max()
    return np.where(scale >= MIN_SCALE, scale, np.float32(1)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class Coded:
    """A weight as rows: places in `book` [O, K / p] and float32 scales [O, K / g]."""

    book: Codebook
    places: np.ndarray
    scale: np.ndarray

    def decode(self) -> np.ndarray:
        """The weight that is stored, float32 [O, K]."""
        units = self.book.dequantize(self.places)
        return (units.reshape(*self.scale.shape, -1) * self.scale[..., None]).reshape(units.shape)


def encode(rows: np.ndarray, book: Codebook, scale: np.ndarray) -> Coded:
    """The nearest codes of float32 `rows` [O, K] under `scale` [O, K / g], which is positive."""
    groups = rows.reshape(*scale.shape, -1) / scale[..., None]
    return Coded(book, book.quantize(groups.reshape(rows.shape)), scale)


def insert(edit: Editor, node: ir.Node, coded: Coded) -> ir.Value:
    """Let the weight of a linear `node` be `coded`, whose rows are its outputs; the value that stands for it is returned.

    Behind the function, rows are given the shape of a convolution's kernel, and transposed for a weight whose inputs come first. Needs
    opset 21, or 25 for tables of up to 4 points.
    """
    index = linear.LINEAR_OPS[node.op_type].weight
    value = node.inputs[index]
    assert value is not None, "a linear node has a weight"
    shape, name, book = ir.constant_shape(value), value.name or "weight", coded.book
    first = {"int2": -2, "int4": -8, "int8": -128}[book.storage]
    codes = edit.initializer(f"{name}_codes", (coded.places + first).astype(np.int8), book.storage)
    lowest = edit.shared((LOOKUP, first), f"codes_from_{-first}", lambda: np.asarray(first, np.float32), "float32")
    points = edit.shared((LOOKUP, book.points.tobytes()), "points", lambda: book.points, "float32")
    scale = edit.initializer(f"{name}_scale", coded.scale[..., None].astype(np.float32))
    weight = functions.call(edit, LOOKUP, node, [codes, lowest, points, scale], output=f"{name}_decoded", like=value, after=False)
    weight.shape = ir.Shape([len(coded.places), coded.places.shape[1] * book.size])
    is_turned = linear.in_axis(node) == 0
    if len(shape) > 2:
        kernel = (shape[1], shape[0], *shape[2:]) if is_turned else shape
        dims = edit.initializer(f"{name}_shape", np.asarray(kernel, np.int64))
        weight = edit.insert(node, "Reshape", [weight, dims], output=f"{name}_kernel", like=value)
        weight.shape = ir.Shape(kernel)
    if is_turned:
        order = [1, 0, *range(2, len(shape))]
        weight = edit.insert(node, "Transpose", [weight], output=f"{name}_turned", attributes={"perm": order}, like=value)
        weight.shape = ir.Shape(shape)
    edit.rewire(node, index, weight)
    return weight
