"""RMSNormalization written in operators of its own: x over the root of the mean of x squared."""

from __future__ import annotations

from graphq import ir

_SQUARE = frozenset({"Mul", "Pow"})


def is_square(node: ir.Node, value: ir.Value) -> bool:
    """Whether `node` squares `value` for a mean over the last axis."""
    if node.domain or node.op_type not in _SQUARE or node.inputs[0] is not value:
        return False
    power = ir.constant(node.inputs[1])
    squares = node.inputs[1] is value if node.op_type == "Mul" else power is not None and power.size == 1 and power.item() == 2
    return squares and all(mean_square(use.node) is value for use in ir.uses(node.outputs[0]))


def mean_square(node: ir.Node) -> ir.Value | None:
    """x, where `node` is the mean of x² over the last axis, which it keeps."""
    square = ir.producer(node.inputs[0]) if node.op_type == "ReduceMean" and not node.domain else None
    if square is None or square.domain or square.op_type not in _SQUARE or not ir.attribute(node, "keepdims", 1):
        return None
    value, axes, rank = square.inputs[0], ir.constant(node.inputs[1]) if len(node.inputs) > 1 else None, 0
    rank = len(ir.shape_of(value) or ())
    power = ir.constant(square.inputs[1])
    squares = square.inputs[1] is value if square.op_type == "Mul" else power is not None and power.size == 1 and power.item() == 2
    over_last = axes is not None and axes.size == 1 and int(axes.reshape(-1)[0]) in (-1, rank - 1)
    return value if squares and over_last and rank else None


def ends_rms(node: ir.Node, value: ir.Value) -> bool:
    """Whether `node` divides `value` by the root of the mean of its squares, which is written in operators of its own."""
    if node.domain or node.op_type not in ("Mul", "Div") or (node.op_type == "Div" and node.inputs[0] is not value):
        return False
    size = node.inputs[1] if node.inputs[0] is value else node.inputs[0]
    inverts = node.op_type == "Div"
    maker = ir.producer(size)
    while maker is not None and not maker.domain and mean_square(maker) is None:
        if maker.op_type == "Reciprocal" or (maker.op_type == "Div" and _is_number(maker.inputs[0], 1.0)):
            inverts, size = True, maker.inputs[-1]
        elif maker.op_type == "Pow" and _is_number(maker.inputs[1], -0.5):
            inverts, size = True, maker.inputs[0]
        elif maker.op_type == "Sqrt":
            size = maker.inputs[0]
        elif maker.op_type in ("Add", "Pow") and any(_is_one_number(entry) for entry in maker.inputs):
            size = maker.inputs[1 if _is_one_number(maker.inputs[0]) else 0]
        else:
            return False
        maker = ir.producer(size)
    return inverts and maker is not None and not maker.domain and mean_square(maker) is value


def _is_one_number(value: ir.Value | None) -> bool:
    """Whether `value` is a constant that is the same for all channels."""
    array = ir.constant(value)
    return array is not None and array.size == 1


def _is_number(value: ir.Value | None, number: float) -> bool:
    array = ir.constant(value)
    return array is not None and array.size == 1 and float(array.item()) == number
