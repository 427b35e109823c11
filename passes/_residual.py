"""The residual stream of a transformer: values that only sums and choices of tokens connect, who writes into them and who reads them.

All of them can be multiplied by one orthogonal matrix Q (QuaRot, arXiv 2404.00456): writers make `y Q`, and the layers behind the
normalizations, whose gain and bias they take over, undo it. That needs normalizations *in front of* the layers (pre-norm): one that
stands in the stream itself, as in BERT, would have to commute with Q with its gain.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.passes import _bias, _rms, _scaling

_CHOICES = frozenset({"Gather", "Slice"})


class Refused(Exception):
    """Why a stream cannot be rotated."""


@dataclass(frozen=True)
class Norm:
    """A normalization of the stream: the node that divides by the size, where gain and bias stand, what it makes, and who reads that."""

    node: ir.Node
    gain: tuple[ir.Node, int] | None
    bias: tuple[ir.Node, int] | None
    made: tuple[ir.Value, ...]
    layers: tuple[ir.Node, ...]


@dataclass
class Stream:
    """What `find` saw from one value on. `constants` are inputs that hold rows of the stream, tables of embeddings among them."""

    width: int
    values: dict[ir.Value, None] = field(default_factory=dict)
    writers: dict[ir.Node, None] = field(default_factory=dict)
    constants: dict[tuple[ir.Node, int], None] = field(default_factory=dict)
    norms: dict[ir.Node, Norm] = field(default_factory=dict)
    layers: dict[ir.Node, None] = field(default_factory=dict)

    @property
    def keeps_mean(self) -> bool:
        """Whether Q has to keep the mean of a row, which LayerNormalization takes out."""
        return any(norm.node.op_type == "LayerNormalization" for norm in self.norms.values())


def norms(model: ir.Model) -> list[ir.Node]:
    """Nodes of the main graph with which a normalization begins: one of the operators, or the mean of the squares."""
    nodes = [node for node in model.graph if not node.domain]
    return [node for node in nodes if node.op_type in _scaling.NORMALIZATIONS or _rms.mean_square(node) is not None]


def stream_of(norm: ir.Node) -> ir.Value:
    """What the normalization that begins with `norm` reads."""
    value = _rms.mean_square(norm) or norm.inputs[0]
    assert value is not None
    return value


def find(value: ir.Value) -> Stream:
    """The stream that `value` belongs to.

    Raises:
        Refused: something reads or writes it that cannot be rotated.
    """
    shape = ir.shape_of(value)
    if not shape or not isinstance(shape[-1], int):
        raise Refused("the width of the residual stream is not known")
    stream, stack = Stream(shape[-1]), [value]
    while stack:
        one = stack.pop()
        if one in stream.values:
            continue
        if one.is_graph_output() or one.is_graph_input():
            raise Refused(f"the model {'returns' if one.is_graph_output() else 'is given'} a value of the residual stream")
        if (ir.shape_of(one) or (None,))[-1] != stream.width:
            raise Refused(f"the residual stream changes its width at {one.name!r}")
        stream.values[one] = None
        stack += _written(stream, one)
        for use in ir.uses(one):
            stack += _read(stream, one, use.node, use.idx)
    return stream


def rotate(edit: Editor, stream: Stream, q: np.ndarray) -> None:
    """Multiply every value of the stream by Q, float64 [D, D]; what the model computes stays."""
    for norm in stream.norms.values():
        _strip(edit, norm)
    stream = find(next(iter(stream.values)))  # a bias that a layer took over may write into it
    for layer in stream.layers:
        _set_matrix(edit, layer, q.T @ _scaling.matrix(layer))
    for writer in stream.writers:
        _rotate_output(edit, writer, q)
    for node, index in stream.constants:
        array = ir.constant(node.inputs[index])
        assert array is not None
        wide = np.broadcast_to(array, (*array.shape[:-1], stream.width))
        edit.set_weight(node, index, (wide.astype(np.float64) @ q).astype(array.dtype))
    patches = [value for writer in stream.writers if writer.op_type == "Conv" for value in (writer.outputs[0], _reshaped(writer))]
    for value in (*stream.values, *patches, *(made for norm in stream.norms.values() for made in norm.made)):
        if value.producer() is not None and not value.is_graph_output():
            edit.now_makes(value, "rotated")


# ---- who writes and who reads ---------------------------------------------------------------------------------------


def _written(stream: Stream, value: ir.Value) -> list[ir.Value]:
    """Values of the stream that `value` is made of; whatever else makes it is put down."""
    node = value.producer()
    if node is None:
        raise Refused("a constant is the residual stream")
    if not node.domain and node.op_type in ("MatMul", "Gemm") and linear.is_linear(node):
        stream.writers[node] = None
        bias = linear.bias_of(node)
        return [] if bias is None or ir.constant(bias) is not None else [bias]
    if node.op_type == "Transpose" and (conv := _patches(node, stream.width)) is not None:
        stream.writers[conv] = None
        return []
    if node.op_type == "Gather" and ir.constant(node.inputs[0]) is not None and ir.attribute(node, "axis", 0) == 0:
        stream.constants[node, 0] = None
        return []
    if node.op_type == "Expand" and ir.constant(node.inputs[0]) is not None:
        stream.constants[node, 0] = None
        return []
    carried = _carried(node)
    if not carried:
        standing = node.op_type in _scaling.NORMALIZATIONS or _rms_gain_of(node)
        raise Refused("a normalization stands in the residual stream (post-norm)" if standing else f"{node.op_type} writes into it")
    found = []
    for index in carried:
        entry = node.inputs[index]
        if entry is not None and ir.constant(entry) is not None:
            stream.constants[node, index] = None
        elif entry is not None:
            found.append(entry)
    return found


def _read(stream: Stream, value: ir.Value, node: ir.Node, index: int) -> list[ir.Value]:
    """Further values of the stream behind a reader of `value`; layers and normalizations are put down."""
    if node.domain:
        raise Refused(f"{node.op_type} reads it")
    if node.op_type == "Shape":
        return []
    if node.op_type in ("MatMul", "Gemm") and index == linear.data_index(node) and linear.is_linear(node):
        if not ir.attribute(node, "transA", 0):
            stream.layers[node] = None
            return []
    if index in _carried(node):
        return [node.outputs[0]]
    norm = _norm(node, value, index)
    if norm is not None:
        stream.norms[norm.node] = norm
        stream.layers.update(dict.fromkeys(norm.layers))
        return []
    if _rms.is_square(node, value) or _rms.ends_rms(node, value):
        return []
    raise Refused(f"{node.op_type} reads it")


def _carried(node: ir.Node) -> tuple[int, ...]:
    """Inputs of `node` of whose rows its output consists, or is the sum."""
    if node.domain:
        return ()
    rank = len(ir.shape_of(node.outputs[0]) or ())
    if node.op_type == "Add":
        return (0, 1)
    if node.op_type == "Gemm" and linear.is_linear(node):
        return (linear.bias_index(node),)
    if node.op_type == "Identity":
        return (0,)
    if node.op_type == "Concat" and ir.attribute(node, "axis", 0) not in (-1, rank - 1):
        return tuple(range(len(node.inputs)))
    if node.op_type in ("Mul", "Div"):
        sizes = [array.size if (array := ir.constant(entry)) is not None else 0 for entry in node.inputs]
        return tuple(index for index in (0, 1) if sizes[1 - index] == 1 and (index == 0 or node.op_type == "Mul"))
    if node.op_type in _CHOICES and _chooses_rows(node):
        return (0,)
    return ()


def _chooses_rows(node: ir.Node) -> bool:
    """Whether a Gather or Slice takes whole rows of its data."""
    rank = len(ir.shape_of(node.inputs[0]) or ())
    if node.op_type == "Gather":
        return rank > 0 and ir.attribute(node, "axis", 0) % rank != rank - 1
    axes = ir.constant(node.inputs[3]) if len(node.inputs) > 3 else None
    return axes is not None and rank > 0 and all(int(axis) % rank != rank - 1 for axis in axes.reshape(-1))


def _patches(node: ir.Node, width: int) -> ir.Node | None:
    """The convolution whose output channels become the last axis in `node`, a Transpose behind a Reshape."""
    reshape = ir.producer(node.inputs[0])
    conv = ir.producer(reshape.inputs[0]) if reshape is not None and reshape.op_type == "Reshape" else None
    if reshape is None or conv is None or conv.op_type != "Conv" or not linear.is_linear(conv) or ir.attribute(conv, "group", 1) != 1:
        return None
    shape = ir.shape_of(reshape.outputs[0]) or ()
    alone = all(len(ir.uses(one.outputs[0])) == 1 and not one.outputs[0].is_graph_output() for one in (conv, reshape))
    bias = linear.bias_of(conv)
    is_turned = list(ir.attribute(node, "perm", ())) == [0, 2, 1] and shape[1:2] == (width,)
    return conv if alone and is_turned and (bias is None or ir.constant(bias) is not None) else None


def _reshaped(conv: ir.Node) -> ir.Value:
    """What the Reshape behind a convolution that `_patches` found makes."""
    return ir.uses(conv.outputs[0])[0].node.outputs[0]


# ---- normalizations -------------------------------------------------------------------------------------------------


def _norm(node: ir.Node, value: ir.Value, index: int) -> Norm | None:
    """The normalization of `value` that begins with its reader `node`."""
    if node.op_type in _scaling.NORMALIZATIONS and index == 0:
        gain, bias = ((node, slot) if len(node.inputs) > slot and node.inputs[slot] is not None else None for slot in (1, 2))
        _require_last_axis(node)
        return _norm_of(node, gain, bias, node.outputs[0])
    if not _rms.ends_rms(node, value):
        return None
    made = node.outputs[0]
    uses = ir.uses(made)
    slot = _gain(uses[0].node, made) if len(uses) == 1 and not made.is_graph_output() else None
    if slot is None:
        return _norm_of(node, None, None, made)
    return _norm_of(node, slot, None, made, slot[0].outputs[0])


def _norm_of(node: ir.Node, gain: tuple[ir.Node, int] | None, bias: tuple[ir.Node, int] | None, *made: ir.Value) -> Norm:
    """The normalization whose last step makes the last of `made`, with all that reads it."""
    layers, choices = _layers(made[-1])
    return Norm(node, gain, bias, (*made, *choices), layers)


def _require_last_axis(node: ir.Node) -> None:
    rank = len(ir.shape_of(node.inputs[0]) or ())
    if ir.attribute(node, "axis", -1) not in (-1, rank - 1):
        raise Refused(f"{node.op_type} normalizes more than the last axis")


def _gain(node: ir.Node, value: ir.Value) -> tuple[ir.Node, int] | None:
    """Where `node` multiplies the channels of `value` by constants."""
    if node.op_type != "Mul" or node.domain:
        return None
    index = 1 if node.inputs[0] is value else 0
    array = ir.constant(node.inputs[index])
    return (node, index) if array is not None and array.ndim and array.size == array.shape[-1] > 1 else None


def _rms_gain_of(node: ir.Node) -> bool:
    return any(_rms.ends_rms(node, entry) for entry in node.inputs if entry is not None) or any(
        (maker := ir.producer(entry)) is not None and any(_rms.ends_rms(maker, inner) for inner in maker.inputs if inner is not None)
        for entry in node.inputs
    )


def _layers(value: ir.Value) -> tuple[tuple[ir.Node, ...], tuple[ir.Value, ...]]:
    """The layers that read rows of `value`, and the values that consist of some of its rows; nothing else may read it."""
    if value.is_graph_output():
        raise Refused("the model returns what a normalization makes")
    layers, choices = list[ir.Node](), list[ir.Value]()
    for use in ir.uses(value):
        node = use.node
        if node.op_type == "Shape" and not node.domain:
            continue
        if not node.domain and node.op_type in ("MatMul", "Gemm") and use.idx == linear.data_index(node) and linear.is_linear(node):
            if ir.attribute(node, "transA", 0):
                raise Refused("a layer behind a normalization transposes what it reads")
            layers.append(node)
        elif use.idx == 0 and not node.domain and node.op_type in (*_CHOICES, "Identity") and 0 in _carried(node):
            further = _layers(node.outputs[0])
            layers += further[0]
            choices += [node.outputs[0], *further[1]]
        else:
            raise Refused(f"a normalization is read by {node.op_type}, which is no layer with constant weights (post-norm, or a head)")
    return tuple(dict.fromkeys(layers)), tuple(choices)


# ---- what changes ---------------------------------------------------------------------------------------------------


def _strip(edit: Editor, norm: Norm) -> None:
    """Move gain and bias of a normalization into the layers that read it."""
    arrays = [ir.constant(slot[0].inputs[slot[1]]) if slot is not None else None for slot in (norm.gain, norm.bias)]
    gain, bias = (None if array is None else array.reshape(-1).astype(np.float64) for array in arrays)
    for layer in norm.layers:
        matrix = _scaling.matrix(layer).astype(np.float64)
        if bias is not None and bias.any():
            _bias.add(edit, layer, ir.attribute(layer, "alpha", 1.0) * (bias @ matrix))
        if gain is not None:
            _set_matrix(edit, layer, gain[:, None] * matrix)
    for slot, array, rest in ((norm.gain, arrays[0], 1.0), (norm.bias, arrays[1], 0.0)):
        if slot is not None and array is not None:
            edit.set_weight(*slot, np.full(array.shape, rest, array.dtype))


def _set_matrix(edit: Editor, layer: ir.Node, matrix: np.ndarray) -> None:
    stored = matrix.T if linear.in_axis(layer) else matrix
    edit.set_weight(layer, linear.LINEAR_OPS[layer.op_type].weight, stored.astype(np.float32))


def _rotate_output(edit: Editor, writer: ir.Node, q: np.ndarray) -> None:
    """Let the layer make `y Q`. A bias behind it is a constant of the stream."""
    index, axis = linear.LINEAR_OPS[writer.op_type].weight, linear.out_axis(writer)
    weight, bias = ir.constant(linear.weight_of(writer)), ir.constant(linear.bias_of(writer))
    assert weight is not None
    turned = np.moveaxis(np.moveaxis(weight.astype(np.float64), axis, -1) @ q, -1, axis)
    edit.set_weight(writer, index, turned.astype(np.float32))
    if bias is not None:
        wide = np.broadcast_to(bias, (*bias.shape[:-1], len(q))).astype(np.float64)
        edit.set_weight(writer, linear.bias_index(writer), (wide @ q).astype(np.float32))
