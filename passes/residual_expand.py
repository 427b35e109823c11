"""residual-expand: store a weight as a sum of quantized ones, each of what those before it left over.

Every order of 4 bits divides the error by 14. Later orders may be kept for the output neurons that need them most. Where a layer reads
floats, the orders are summed to one weight when the session loads; where it reads quantized activations, each is a product of its own,
which integer kernels compute. No data needed. Main graph only.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear, qdq
from graphq.editor import Editor
from graphq.exclude import nothing_to_quantize, require_matches
from graphq.noise import decibel
from graphq.passes import _branch, _layer_rows, _residual_math, _weight_formats
from graphq.passes._layer_rows import Layer
from graphq.passes._residual_math import Order
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.quantizers import QParams
from graphq.spec import PerGroup, QuantSpec
from graphq.targets import Target

PAD_OPSET = 18
"""From here on Pad takes axes."""


@pass_options
class ResidualExpand(Pass):
    """Stores weights as sums of quantized residuals, symmetric, so that zeros stay zero (REx, arXiv 2203.14645).

    Attributes:
        bits: Width of a weight in each order, unless its layer asks for another.
        orders: Orders at most; one is rounding to nearest.
        gamma: Share of the output neurons in orders from the second on: those with the largest residuals. 0 is rounding to nearest.
        group_size: One scale for so many consecutive inputs of a matrix; without, and for convolutions, one an output channel.
        exclude: Patterns of node names (or operator types) that stay float.
    """

    name: ClassVar[str] = "residual-expand"

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    orders: Annotated[int, Field(ge=1, le=8)] = 2
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    group_size: Annotated[int, Field(ge=2)] | None = None
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        formats = [self._format(model, node, target) for node in _layer_rows.candidates(model)]
        if not self.allow_no_effect and all(isinstance(reason, str) for reason in formats):
            raise nothing_to_quantize(map(str, formats), "at least one Conv, Gemm or MatMul with a constant float32 weight")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        formats = [self._format(model, node, ctx.target) for node in _layer_rows.candidates(model)]
        opsets = [spec.opset for spec in formats if isinstance(spec, QuantSpec)]
        if opsets:
            ctx.edit.raise_opset(max(PAD_OPSET, *opsets))  # may replace nodes
        for node in _layer_rows.candidates(model):
            spec = self._format(model, node, ctx.target)
            if isinstance(spec, str):
                ctx.skip(node, spec)
            else:
                self._expand(node, _weight_formats.of_rows(spec), ctx)
        ctx.edit.prune()

    def _format(self, model: ir.Model, node: ir.Node, target: Target) -> QuantSpec | str:
        """What each order of the weight of `node` becomes, or why it stays float."""
        if reason := _layer_rows.refusal(model, node, self.exclude):
            return reason
        spec = _weight_formats.storable(self.name, node, self.bits, target)
        return spec if isinstance(spec, str) else _weight_formats.in_groups(node, spec, self.group_size)

    def _expand(self, node: ir.Node, spec: QuantSpec, ctx: PassContext) -> None:
        index, value = linear.LINEAR_OPS[node.op_type].weight, linear.weight_of(node)
        assert value is not None
        shape = ir.constant_shape(value)
        rows = Layer(node).weight().reshape(shape[linear.out_axis(node)], -1)
        found, rest = _residual_math.expand(rows, spec, self.orders, self.gamma)
        if qdq.is_quantized(linear.data_of(node)) and ir.attribute(node, "group", 1) == 1:
            for order in found[1:]:
                _multiply(node, order, spec, rows, ctx)
            _store(node, found[0], spec, ctx)
        else:
            total = _store(node, found[0], spec, ctx)
            for order in found[1:]:
                ctx.edit.rewire(node, index, ctx.edit.initializer(f"{value.name}_residual", _laid_out(node, rows[order.rows], shape)))
                part = _spread(ctx.edit, node, _store(node, order, spec, ctx), order, len(rows), linear.out_axis(node))
                total = ctx.edit.insert(node, "Add", [total, part], output=f"{value.name}_sum", like=value)
            ctx.edit.rewire(node, index, total)
        power, kept = float(np.sum(rows.astype(np.float64) ** 2)), sum(len(order.rows) for order in found) / len(rows)
        ctx.measure(node.name or "", weight_sqnr_db=decibel(power, float(np.sum(rest**2))), bits=spec.bits * kept)


def _multiply(node: ir.Node, order: Order, spec: QuantSpec, rows: np.ndarray, ctx: PassContext) -> None:
    """Add the product of what `node` reads with an order to what it makes."""
    edit, value = ctx.edit, linear.weight_of(node)
    assert value is not None
    weight = edit.initializer(f"{value.name}_residual", _laid_out(node, rows[order.rows], ir.constant_shape(value)))
    attributes = {key: ir.attribute(node, key) for key in node.attributes}
    last = _branch.behind(node)
    made = edit.insert(last, node.op_type, [linear.data_of(node), weight], output=f"{node.outputs[0].name}_residual",
                       attributes=attributes, after=True)  # fmt: skip
    made.type = ir.tensor_type("float32")
    maker = made.producer()
    assert maker is not None
    _store(maker, order, spec, ctx)
    spread = _spread(edit, maker, made, order, len(rows), linear.channel_axis(node), after=True)
    _branch.join(edit, node, spread)


def _store(node: ir.Node, order: Order, spec: QuantSpec, ctx: PassContext) -> ir.Value:
    """Let `node` read the codes of `order` as its weight, dequantized."""
    shape, qparams, grouped = ir.constant_shape(linear.weight_of(node)), order.qparams, isinstance(spec.granularity, PerGroup)
    if grouped:
        qparams = QParams(_laid_out(node, qparams.scale, shape), _laid_out(node, qparams.zero_point, shape))
    own = qdq.spec_for_weight(node, spec, spec.granularity.size if isinstance(spec.granularity, PerGroup) else None)
    codes = _laid_out(node, order.codes, shape)
    qdq.insert_weight(ctx.edit, node, own, qparams, codes, narrow=node.op_type in ctx.target.narrow_weights)
    value = linear.weight_of(node)
    assert value is not None
    return value


def _laid_out(node: ir.Node, rows: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Rows [S, K] as a weight of the layout of `node`, whose own has `shape`."""
    if node.op_type == "Conv":
        return rows.reshape(len(rows), *shape[1:])
    return np.ascontiguousarray(rows.T) if linear.out_axis(node) else rows


def _spread(edit: Editor, anchor: ir.Node, value: ir.Value, order: Order, count: int, axis: int, *, after: bool = False) -> ir.Value:
    """`value`, S long along `axis`, with zeros for the output neurons of `count` that the order is not for."""
    if len(order.rows) == count:
        return value
    places = np.full(count, len(order.rows))
    places[order.rows] = np.arange(len(order.rows))
    pads, axes = (edit.shared((what, *array), what, lambda array=array: np.array(array), "int64")  # type: ignore[misc]
                  for what, array in (("one_more", (0, 1)), ("axis", (axis,))))  # fmt: skip
    name = value.name
    padded = edit.insert(anchor, "Pad", [value, pads, None, axes], output=f"{name}_padded", after=after)
    operands = [padded, edit.initializer(f"{name}_places", places)]
    anchor = padded.producer() if after else anchor  # type: ignore[assignment]
    spread = edit.insert(anchor, "Gather", operands, output=f"{name}_spread", attributes={"axis": axis}, after=after)
    padded.type = spread.type = ir.tensor_type("float32")
    return spread
