"""What can be learned in some nodes of a model, read off the graph: codes of weights, float weights, biases, steps of activations.

Each is a constant that nobody else reads, so that what is learned here changes nothing elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear, qdq, sparsity, stored
from graphq.editor import Editor
from graphq.passes import _bias, _twins

Skip = Callable[[ir.Node, str], None]

_INSIDE = 0.499
"""How far from a code a weight that it stands for may be, in steps."""

_CODES = {ir.DataType[name] for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2")}


@dataclass(frozen=True)
class Rates:
    """How far a step of Adam moves what is learned: codes in codes, all else as a share of it; 0 keeps it as it is."""

    codes: float = 0.0
    weights: float = 0.0
    steps: float = 0.0
    biases: float = 0.0

    def of(self, one: Learned) -> float:
        if isinstance(one, Codes):
            return self.codes
        if isinstance(one, Floats):
            return self.weights if one.is_weight else self.biases
        return self.steps


@dataclass(frozen=True)
class Codes:
    """A weight that is stored as integers with one DequantizeLinear.

    Attributes:
        value: The codes.
        decoded: The name of what the DequantizeLinear makes.
        place: Where the weight that was rounded to each code lay, float32, within half a step of the code; on it where that is not known,
            as of codes that make up for the errors of others.
        scale, zero: Of each code, float32 arrays that broadcast to its shape.
        low, high: The smallest and the largest code in use.
        pinned: Where the code stays that of 0: in a weight that was pruned, or is N:M sparse, by a half at least.
    """

    value: ir.Value
    decoded: str
    place: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    low: float
    high: float
    pinned: np.ndarray

    @property
    def values(self) -> tuple[ir.Value, ...]:
        return (self.value,)


@dataclass(frozen=True)
class Floats:
    """A float constant: a bias, or a weight that is not quantized, whose zeros stay.

    Attributes:
        value: The constant.
        start: Its array, float32.
        unit: What a change is measured in: the root mean square of `start`.
        is_weight: Whether it is a weight.
    """

    value: ir.Value
    start: np.ndarray
    unit: float
    is_weight: bool

    @property
    def values(self) -> tuple[ir.Value, ...]:
        return (self.value,)


@dataclass(frozen=True)
class Steps:
    """The step of a quantizer of activations, and the ends of the Clip before it, which are multiples of it: float32 of shape []."""

    values: tuple[ir.Value, ...]
    starts: tuple[np.ndarray, ...]


Learned = Codes | Floats | Steps


def find(nodes: Sequence[ir.Node], reference: dict[str, ir.Node], skip: Skip) -> list[Learned]:
    """All that can be learned in `nodes`; `reference` has the float layers by their names."""
    members, found = set(nodes), list[Learned]()
    for node in nodes:
        if node.domain or node.op_type not in linear.LINEAR_OPS:
            continue
        weight = linear.weight_of(node)
        if not stored.is_fixed(weight) or weight is None:
            continue
        one = _floats(weight, is_weight=True) if weight.is_initializer() else _codes(node, weight, reference.get(node.name or ""))
        if isinstance(one, str):
            skip(node, one)
        else:
            found.append(one)
        slot = _bias.find(node)
        bias = None if slot is None else slot[0].inputs[slot[1]]
        if bias is not None and bias.dtype == ir.DataType.FLOAT and isinstance(one := _floats(bias, is_weight=False), Floats):
            found.append(one)
    for node in nodes:
        if node.op_type == "QuantizeLinear" and not node.domain and (steps := _steps(node, members)) is not None:
            found.append(steps)
    return found


def _is_own(value: ir.Value | None) -> bool:
    """Whether `value` is an initializer that one node reads, and the model does not return."""
    return value is not None and value.is_initializer() and len(ir.uses(value)) == 1 and not value.is_graph_output()


def _floats(value: ir.Value, *, is_weight: bool) -> Floats | str:
    if not _is_own(value) or value.dtype != ir.DataType.FLOAT:
        return "others read its weight too" if value.dtype == ir.DataType.FLOAT else f"its weight is {value.dtype}"
    start = ir.constant(value)
    assert start is not None
    unit = float(np.sqrt(np.mean(np.square(start, dtype=np.float64)))) if start.size else 0.0
    return Floats(value, start, unit, is_weight) if unit > 0 else "its weight is 0"


def _codes(node: ir.Node, weight: ir.Value, twin: ir.Node | None) -> Codes | str:
    maker = weight.producer()
    if maker is None or maker.op_type != "DequantizeLinear" or maker.domain or len(ir.uses(weight)) > 1 or not _is_own(maker.inputs[0]):
        return "its weight is no integers of its own with one DequantizeLinear"
    value, scale, zero = (*maker.inputs, None)[:3]
    codes, steps = ir.constant(value), ir.constant(scale)
    if value is None or value.dtype is None or codes is None or steps is None or value.dtype not in _CODES:
        return "its weight is no integers of its own with one DequantizeLinear"
    whole = codes.astype(np.float32)
    middle = np.zeros_like(steps) if zero is None else np.asarray(ir.constant(zero)).astype(np.float32)
    steps, middle = (_spread(part.astype(np.float32), whole.shape, maker) for part in (steps, middle))
    rows = np.moveaxis(whole - middle, linear.out_axis(node), 0)
    pattern = sparsity.pattern(rows)
    is_even = pattern is not None and 2 * pattern[0] <= pattern[1]  # denser patterns are there by chance in few codes
    is_sparse = is_even or sparsity.MARK in node.meta
    pinned, place = (whole == middle) & is_sparse, whole
    original = ir.constant(linear.weight_of(twin)) if twin is not None and _twins.computes_the_same(node, twin) else None
    if original is not None and original.shape == whole.shape:
        away = original / steps + middle - whole
        place = whole + np.where(np.abs(away) <= 0.5, np.clip(away, -_INSIDE, _INSIDE), 0)
    return Codes(value, weight.name or "", place.astype(np.float32), steps, middle, float(whole.min()), float(whole.max()), pinned)


def _spread(part: np.ndarray, shape: tuple[int, ...], maker: ir.Node) -> np.ndarray:
    """Scales or zero points of a DequantizeLinear as an array that broadcasts to `shape`."""
    if part.ndim == 0:
        return part
    axis, size = ir.attribute(maker, "axis", 1) % len(shape), ir.attribute(maker, "block_size", 0)
    if size:
        return np.repeat(part, size, axis).take(np.arange(shape[axis]), axis)
    return part.reshape([-1 if index == axis else 1 for index in range(len(shape))])


def _steps(node: ir.Node, members: set[ir.Node]) -> Steps | None:
    """The step of the quantizer that begins with the QuantizeLinear `node`; None where it may not move.

    It may not where others use it, where it is one of many, or where a layer's integer bias is in units of it.
    """
    scale = node.inputs[1]
    if scale is None or stored.is_fixed(node.inputs[0]) or ir.is_constant(scale) and not scale.is_initializer():
        return None
    users = [use.node for use in ir.uses(scale)]
    array = ir.constant(scale)
    if array is None or array.size != 1 or array.dtype != np.float32 or not members.issuperset(users):
        return None
    readers = [use for user in users if user is not node for use in ir.uses(user.outputs[0])]
    if any(use.node.op_type in linear.LINEAR_OPS and _has_integer_bias(use.node) for use in readers if not use.node.domain):
        return None
    clip = qdq.clip_before(node)
    ends = [] if clip is None else [value for value in clip.inputs[1:] if value is not None]
    values = (scale, *ends)
    return Steps(values, tuple(np.asarray(ir.constant(value)) for value in values)) if all(map(_is_own, ends)) else None


def _has_integer_bias(node: ir.Node) -> bool:
    maker = ir.producer(linear.bias_of(node))
    return maker is not None and maker.op_type == "DequantizeLinear"


def store(edit: Editor, one: Learned, arrays: Sequence[np.ndarray]) -> None:
    """Let the constants of `one` be `arrays`: codes, a float array, or the step and the ends of its Clip."""
    for value, array in zip(one.values, arrays, strict=True):
        before = ir.constant(value)
        assert before is not None
        if not np.array_equal(before.astype(np.float32), array):
            held = array.astype(np.float32 if before.dtype == np.float32 else np.int8 if array.min() < 0 else np.uint8)
            edit.set_constant(value, held)
