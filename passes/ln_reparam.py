"""ln-reparam: let one quantizer for all channels of a normalization's output be as good as one for each.

Scale and zero point of each channel go into the gain and shift of the normalization, and back out of the weights and biases of the
layers that read it, so that the float model computes the same. Where others read it too, a Mul and an Add before the layers take
them instead. The middle zero point suits runtimes that know none. Main graph only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.editor import Editor
from graphq.errors import TargetError
from graphq.observers import ChannelRange, Range, range_stat
from graphq.passes import _bias, _scaling
from graphq.passes import _ln_reparam_math as math
from graphq.passes._ln_reparam_math import Change
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

NORMS = ("LayerNormalization", "RMSNormalization")


@pass_options
class LnReparam(Pass):
    """Evens out scale and zero point of a normalization's channels before its output is quantized (RepQ-ViT, arXiv 2212.08254).

    Where nothing can take a shift (RMSNormalization, or a layer without bias), only scales are evened out.

    Attributes:
        bits: Width that the output will be quantized to.
        symmetric: Whether the common zero point is the middle code, rather than the mean of the channels', rounded.
        headroom: How many times as wide as in calibration a channel's range gets. By default 1.1 from 7 bits on, where what unseen
            data clips costs more than wider steps, and 1 below.
        branch: Whether to write a Mul and an Add where not only layers read the output.
    """

    name: ClassVar[str] = "ln-reparam"
    needs_data: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=8)] = 8
    symmetric: bool = True
    headroom: Annotated[float, Field(ge=1, le=2)] | None = None
    branch: bool = True

    def precheck(self, model: ir.Model, target: Target) -> None:
        if not self.allow_no_effect and not any(node.op_type in NORMS and _layers(node) for node in model.graph if not node.domain):
            raise TargetError(
                "No LayerNormalization or RMSNormalization stands before a layer with weights.", where=f"pass {self.name}",
                expected="a transformer, its normalizations single operators (RMSNorm as Pow, ReduceMean, Sqrt, Div is not known)",
                hint="take the recipe int8 for other models",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        norms = dict(self._norms(model, ctx))
        observers = {node: ChannelRange(node.outputs[0].name or "", -1) for node in norms}
        stats = ctx.observe(observers.values())
        ranges: dict[str, tuple[float, float]] = {}
        for node, layers in norms.items():
            low, high = (stats[observers[node]][end] for end in ("low", "high"))
            if not (np.isfinite(low) & np.isfinite(high)).all():
                ctx.skip(node, "a channel of its output has no finite value on calibration data")
                continue
            folds = _fold_refusal(node) is None
            shifts = all(map(_bias.can_shift, layers)) and not (folds and node.op_type == "RMSNormalization")
            one = self._change(low, high, shifts)
            value = _fold(ctx.edit, node, one) if folds else _branch(ctx.edit, node, layers, one)
            for layer in layers:
                _undo(ctx.edit, layer, one)
            ranges[value.name or ""] = math.common_range(one, self.bits, symmetric=ctx.target.activation.symmetric)
            ctx.measure(node.name or "", widest=one.ratio.max(), narrowest=one.ratio.min(), shifted=shifts, folded=folds)
        for name, (least, most) in ranges.items():
            ctx.assume(Range(name), range_stat(least, most, 1, 0))

    def _norms(self, model: ir.Model, ctx: PassContext) -> Iterator[tuple[ir.Node, list[ir.Node]]]:
        """Normalizations with the layers that read them; others are skipped with the reason."""
        for node in model.graph:
            if node.domain or node.op_type not in NORMS:
                continue
            layers = _layers(node)
            reason = "no layer with constant weights reads its output" if not layers else None if self.branch else _fold_refusal(node)
            if reason is None:
                yield node, layers
            else:
                ctx.skip(node, reason)

    def _change(self, low: np.ndarray, high: np.ndarray, shifts: bool) -> Change:
        headroom = self.headroom or (1.1 if self.bits >= 7 else 1.0)
        channels = math.channel_qparams(low, high, self.bits, headroom=headroom, zero_points=shifts)
        middle = 1 << (self.bits - 1)
        return math.change(channels, middle if self.symmetric else int(np.rint(channels.zero_point.mean())))


def _layers(node: ir.Node) -> list[ir.Node]:
    """MatMul and Gemm nodes that multiply the channels of the output of `node` by the rows of a constant weight."""
    uses = [use for use in ir.uses(node.outputs[0]) if _is_layer(use.node) and use.idx == linear.data_index(use.node)]
    return list(dict.fromkeys(use.node for use in uses if use.node.graph is node.graph))


def _is_layer(node: ir.Node) -> bool:
    return node.op_type in ("MatMul", "Gemm") and linear.is_linear(node) and not ir.attribute(node, "transA", 0)


def _fold_refusal(node: ir.Node) -> str | None:
    """Why the gain and shift of `node` cannot take a factor and an offset of its output; None if they can."""
    value, layers = node.outputs[0], _layers(node)
    if value.is_graph_output():
        return "the model returns its output"
    if len(ir.uses(value)) > len(layers):
        return "not only layers with constant weights read its output"
    channels = (len(_scaling.matrix(layers[0])),)
    constants = [ir.constant(entry) for entry in node.inputs[1:] if entry is not None]
    if any(array is None or array.shape != channels for array in constants):
        return "its gain and shift are not constants for each channel"
    return None


def _fold(edit: Editor, node: ir.Node, one: Change) -> ir.Value:
    """Let `node` return `(y + offset) / ratio` instead of y."""
    gain, shift, *_ = (ir.constant(entry) for entry in (*node.inputs[1:], None))
    assert gain is not None, "see _fold_refusal"
    edit.set_weight(node, 1, gain / one.ratio)
    if shift is not None:
        edit.set_weight(node, 2, (shift + one.offset) / one.ratio)
    elif one.offset.any():
        edit.rewire(node, 2, edit.initializer(f"{node.name}_shift", (one.offset / one.ratio).astype(np.float32)))
    edit.now_makes(node.outputs[0], "reparameterized")
    return node.outputs[0]


def _branch(edit: Editor, node: ir.Node, layers: list[ir.Node], one: Change) -> ir.Value:
    """Let `layers` read `(y + offset) / ratio` instead of y; other readers keep y."""
    value = node.outputs[0]
    for op_type, array in (("Mul", 1 / one.ratio), ("Add", one.offset / one.ratio)):
        if op_type == "Mul" or array.any():
            operands = [value, edit.initializer(f"{node.name}_{op_type.lower()}", array.astype(np.float32))]
            value = edit.insert(value.producer(), op_type, operands, output=f"{node.outputs[0].name}_evened", like=value, after=True)
    for layer in layers:
        edit.rewire(layer, linear.data_index(layer), value)
    return value


def _undo(edit: Editor, layer: ir.Node, one: Change) -> None:
    """Let `layer`, which reads `(y + offset) / ratio` from now on, compute what it computed from y."""
    if one.offset.any():
        _bias.shift(edit, layer, -ir.attribute(layer, "alpha", 1.0) * (one.offset @ _scaling.matrix(layer)))
    _scaling.multiply(edit, layer, one.ratio)
