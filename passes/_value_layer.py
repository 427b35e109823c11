"""Which linear layer the channels of a value come from, through activations and attention that pass their scale on.

Attention mixes tokens, never the channels of its values: what scales a channel of `A V W` may as well scale the layer that makes V.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphq import ir, linear
from graphq.editor import Editor
from graphq.passes import _bias

_MOVES = frozenset({"Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
_UNKNOWN = 2
"""Stands for a dimension that is not known: more than one, so that a mixture of channels shows."""


@dataclass(frozen=True)
class Source:
    """Channel j of the value scales with output channel `channels[j]` of `layer`; `channels`: int64 [D], each once.

    `path` are the nodes between, in the order of the graph.
    """

    layer: ir.Node
    channels: np.ndarray
    path: tuple[ir.Node, ...]

    def divide(self, edit: Editor, k: np.ndarray) -> None:
        """Let the layer make the value divided by `k`, float32 of shape (D,), positive."""
        factor = np.empty_like(k)
        factor[self.channels] = k
        layer, slot = self.layer, _bias.find(self.layer)
        weight = ir.constant(linear.weight_of(layer))
        assert weight is not None
        along = [1] * weight.ndim
        along[linear.out_axis(layer)] = len(factor)
        edit.set_weight(layer, linear.LINEAR_OPS[layer.op_type].weight, weight / factor.reshape(along))
        if slot is not None:
            holder, index = slot
            old = ir.constant(holder.inputs[index])
            assert old is not None
            edit.set_weight(holder, index, (old / factor).astype(old.dtype))
        for node in (layer, *self.path):
            edit.now_makes(node.outputs[0], "scaled")


def source(value: ir.Value) -> Source | None:
    """The layer behind `value` (whoever reads that); None where something between reads or mixes its channels."""
    found = trace(value)
    if found is None:
        return None
    layer, path = found
    slot = _bias.find(layer)
    if (linear.bias_of(layer) is not None and slot is None) or (slot is not None and slot[0].op_type == "DequantizeLinear"):
        return None
    labels = channel_labels(layer, path)
    if labels is None:
        return None
    rows, width = labels.reshape(-1, labels.shape[-1]), ir.constant_shape(linear.weight_of(layer))[linear.out_axis(layer)]
    if rows.shape[1] != width or (rows != rows[0]).any() or len(np.unique(rows[0])) != width:
        return None
    return Source(layer, rows[0], tuple(path))


def trace(value: ir.Value) -> tuple[ir.Node, list[ir.Node]] | None:
    """The layer behind `value`, and what lies between in the order of the graph; None if that is more than passing channels on."""
    path, node = list[ir.Node](), ir.producer(value)
    while node is not None and not _is_layer(node):
        step = _step(node)
        if step is None or len(ir.uses(step)) != 1 or step.is_graph_output():
            return None
        path.append(node)
        node = ir.producer(step)
    return None if node is None else (node, path[::-1])


def channel_labels(layer: ir.Node, path: Sequence[ir.Node]) -> np.ndarray | None:
    """The output channel of `layer` that each element behind `path` comes from; None where that cannot be told."""
    shape = ir.shape_of(layer.outputs[0])
    if shape is None:
        return None
    width = ir.constant_shape(linear.weight_of(layer))[linear.out_axis(layer)]
    sizes = [dim if isinstance(dim, int) else _UNKNOWN for dim in shape[:-1]]
    labels = np.broadcast_to(np.arange(width, dtype=np.int32), [*sizes, width])
    try:
        for node in path:
            labels = _follow(node, labels)
    except (ValueError, IndexError):
        return None
    return labels


def mixed_alike(source: Source) -> np.ndarray | None:
    """A number for each output channel of the layer, int64: channels of one number are mixed by one attention, or by none.

    None where that cannot be told. Whatever mixes channels of one number, and nothing else, changes places with the path.
    """
    width = ir.constant_shape(linear.weight_of(source.layer))[linear.out_axis(source.layer)]
    groups = np.zeros(width, np.int64)
    for index, node in enumerate(source.path):
        labels = channel_labels(source.layer, source.path[:index]) if node.op_type == "MatMul" else None
        if labels is None:
            if node.op_type == "MatMul":
                return None
            continue
        heads, own = np.unique(labels[..., 0, :].reshape(-1, labels.shape[-1]), axis=0), np.full(width, -1)
        if len(np.unique(heads)) != heads.size:
            return None
        own[heads] = np.arange(len(heads))[:, None]
        _, groups = np.unique(np.stack([groups, own]), axis=1, return_inverse=True)
    return groups.reshape(-1)


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm") and not node.domain and linear.is_linear(node)


def _step(node: ir.Node) -> ir.Value | None:
    """The input whose scale `node` passes on."""
    if node.domain:
        return None
    if node.op_type in _MOVES or node.op_type == "Relu":
        return node.inputs[0]
    if node.op_type in ("Mul", "Div") and _is_number(node.inputs[1]):
        return node.inputs[0]
    if node.op_type == "MatMul":  # of attention and values
        return node.inputs[1] if ir.constant(node.inputs[1]) is None else None
    for value in node.inputs if node.op_type == "Add" else ():
        maker = ir.producer(value)
        slot = _bias.find(maker) if maker is not None and _is_layer(maker) else None
        if slot is not None and slot[0] is node:
            return value
    return None


def _is_number(value: ir.Value | None) -> bool:
    array = ir.constant(value)
    return array is not None and array.size == 1


def _follow(node: ir.Node, labels: np.ndarray) -> np.ndarray:
    """What becomes of the labels of channels in `node`. Raises ValueError if it cannot be told."""
    constants = [ir.constant(value) for value in node.inputs[1:]]
    if node.op_type == "Transpose":
        return labels.transpose(ir.attribute(node, "perm", range(labels.ndim)[::-1]))
    if node.op_type == "MatMul":
        if labels.ndim < 2 or (labels != labels[..., :1, :]).any():
            raise ValueError("the rows that attention mixes are not of one channel")
        shape = ir.shape_of(node.outputs[0])
        tokens = shape[-2] if shape is not None and isinstance(shape[-2], int) else labels.shape[-2]
        return np.repeat(labels[..., :1, :], tokens, axis=-2)
    if node.op_type not in ("Reshape", "Squeeze", "Unsqueeze"):
        return labels
    if not constants or constants[0] is None:
        if node.op_type != "Reshape":
            raise ValueError("the axes are not constant")
        return labels.reshape(_sizes(node))
    sizes = [int(size) for size in constants[0].reshape(-1)]
    if node.op_type == "Squeeze":
        return np.squeeze(labels, tuple(sizes))
    if node.op_type == "Unsqueeze":
        return np.expand_dims(labels, tuple(sizes))
    if not ir.attribute(node, "allowzero", 0):
        sizes = [labels.shape[index] if size == 0 else size for index, size in enumerate(sizes)]
    return labels.reshape(sizes)


def _sizes(node: ir.Node) -> list[int]:
    """What is known of the shape that a Reshape makes: of axes without a size, those that its input has too."""
    before, after = ir.shape_of(node.inputs[0]), ir.shape_of(node.outputs[0])
    named = {size for size in before or () if isinstance(size, str)}
    if after is None or any(not isinstance(size, int) and size not in named for size in after):
        raise ValueError("the shape is not known")
    return [size if isinstance(size, int) else _UNKNOWN for size in after]
