"""A parallel branch of low rank beside a linear layer: `y + (x left) right`, with x as it is before any quantizer.

Its two layers ask for floats (see `graphq.precision`), so that nobody quantizes what they read. A convolution's branch is a
convolution of r channels with the same window, and one of 1 x 1 behind it.
"""

from __future__ import annotations

import numpy as np

from graphq import ir, linear, precision, qdq
from graphq.editor import Editor, made_by
from graphq.passes import _bias
from graphq.passes._low_rank_math import Factors
from graphq.pipeline import PassContext
from graphq.precision import Bits
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, QuantSpec

_INT8 = QuantSpec(8, granularity=PerAxis(1))
_WINDOW = ("auto_pad", "dilations", "pads", "strides")


def refusal(node: ir.Node, rank: int, author: str) -> str | None:
    """Why `node`, a linear layer of the main graph, gets no branch of that rank from the pass `author`; None if it may."""
    if precision.asked(node, Bits(4, 4)) == Bits(None, None):
        return "float was asked for it"
    if any(use.node.op_type == "Add" and made_by(use.node) == author for use in ir.uses(behind(node).outputs[0])):
        return f"{author} gave it a branch already"
    if node.op_type == "Gemm" and ir.attribute(node, "transA", 0):
        return "its data is transposed, so that rows are channels"
    if node.op_type == "ConvTranspose" or ir.attribute(node, "group", 1) != 1:
        return "a branch of low rank is for one product of all channels"
    shape = [size for size in ir.shape_of(linear.weight_of(node)) or () if isinstance(size, int)]
    outputs = shape[linear.out_axis(node)]
    inputs = int(np.prod(shape)) // outputs
    if 2 * rank * (inputs + outputs) > inputs * outputs:
        return f"a branch of rank {rank} has more than half of its {inputs} x {outputs} weights"
    return None


def as_int8(factors: Factors) -> Factors:
    """What factors are once they are stored as int8, with a scale for each column."""
    quantizer = Uniform(_INT8)
    left, right = (quantizer.fake_quantize(part, quantizer.fit_weight(part)) for part in (part.astype(np.float32) for part in factors))
    return left, right


def insert(ctx: PassContext, node: ir.Node, factors: Factors, *, is_int8: bool) -> None:
    """Add `x left right` to what `node` makes, behind its bias if an Add holds that; left [D, r], right [r, O].

    Args:
        is_int8: Whether the factors, which `as_int8` made, are stored as such.
    """
    edit, source, name = ctx.edit, qdq.before_quantizer(linear.data_of(node)), node.outputs[0].name
    assert source is not None
    left, right = (np.asarray(part, np.float32) for part in factors)
    if node.op_type == "Gemm":
        right = right * np.float32(ir.attribute(node, "alpha", 1.0))
    operator, window = "MatMul", {}
    if node.op_type == "Conv":
        kernel = ir.shape_of(linear.weight_of(node)) or ()
        operator, window = "Conv", {key: ir.attribute(node, key) for key in _WINDOW if key in node.attributes}
        left, right = left.T.reshape(len(right), *kernel[1:]), right.T.reshape(*right.T.shape, *(1,) * (len(kernel) - 2))  # type: ignore[arg-type]
    anchor, value = behind(node), source
    for part, what, attributes in ((left, "left", window), (right, "right", {})):
        constant = edit.initializer(f"{name}_{what}", part)
        value = edit.insert(anchor, operator, [value, constant], output=f"{name}_branch_{what}", attributes=attributes, after=True)
        value.type = ir.tensor_type("float32")
        anchor = value.producer()  # type: ignore[assignment]
        precision.ask(edit, anchor, Bits(None, None))
        if is_int8:
            qdq.insert_weight(edit, anchor, qdq.spec_for_weight(anchor, _INT8))
    value.shape = behind(node).outputs[0].shape
    join(edit, node, value)


def behind(node: ir.Node) -> ir.Node:
    """The node behind which a branch of `node` joins it: the Add that holds its bias, if there is one."""
    slot = _bias.find(node)
    return node if slot is None or slot[0].op_type != "Add" else slot[0]


def join(edit: Editor, node: ir.Node, value: ir.Value) -> None:
    """Add `value` to what `node` makes, with its bias; the sum has the name of what was made."""
    made, maker = behind(node).outputs[0], value.producer()
    readers = [(use.node, use.idx) for use in made.uses()]
    if node.outputs[0] is not made and "_rest" not in str(node.outputs[0].name):
        edit.now_makes(node.outputs[0], "rest")
    total = edit.insert(maker, "Add", [made, value], output=f"{made.name}_with_branch", like=made, after=True)
    for reader, index in readers:
        edit.rewire(reader, index, total)
    if made.is_graph_output():
        edit.replace_output(made, total)
        edit.now_makes(made, "rest")
    else:
        whole = made.name
        edit.now_makes(made, "rest")
        total.name = whole
