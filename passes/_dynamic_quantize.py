"""One step for each token, computed where the model runs: local functions, and layers that read what these make of an activation."""

from __future__ import annotations

from collections.abc import Sequence

from graphq import functions, ir, linear
from graphq.passes._dynamic_math import levels
from graphq.pipeline import PassContext

DYNAMIC_QUANTIZE = """
DynamicQuantize (x, levels) => (y) {
  axis = Constant <value = int64[1] {-1}> ()
  least = Constant <value = float {1.1754943508222875e-38}> ()
  magnitude = Abs (x)
  largest = ReduceMax (magnitude, axis)
  step = Div (largest, levels)
  scale = Max (step, least)
  ratio = Div (x, scale)
  code = Round (ratio)
  y = Mul (code, scale)
}"""
"""`round(x / s) s` with `s = max|row| / levels`, no smaller than `quantizers.MIN_SCALE`: see `_dynamic_math.fake_quantize`."""

DYNAMIC_QUANTIZE_ASYMMETRIC = """
DynamicQuantizeAsymmetric (x, levels) => (y) {
  axis = Constant <value = int64[1] {-1}> ()
  least = Constant <value = float {1.1754943508222875e-38}> ()
  nothing = Constant <value = float {0}> ()
  smallest = ReduceMin (x, axis)
  largest = ReduceMax (x, axis)
  low = Min (smallest, nothing)
  high = Max (largest, nothing)
  width = Sub (high, low)
  step = Div (width, levels)
  scale = Max (step, least)
  offset = Div (low, scale)
  zero = Round (offset)
  ratio = Div (x, scale)
  whole = Round (ratio)
  code = Sub (whole, zero)
  kept = Clip (code, nothing, levels)
  moved = Add (kept, zero)
  y = Mul (moved, scale)
}"""
"""The same with a zero point, which here is negative."""


def quantize(ctx: PassContext, value: ir.Value, nodes: Sequence[ir.Node], bits: int, *, symmetric: bool = True) -> None:
    """Let `nodes`, all of which read `value`, read it with one step for each row, and one zero point if it is not `symmetric`."""
    body = DYNAMIC_QUANTIZE if symmetric else DYNAMIC_QUANTIZE_ASYMMETRIC
    replace(ctx, value, nodes, body, [step_count(ctx, bits, symmetric=symmetric)])


def replace(ctx: PassContext, value: ir.Value, nodes: Sequence[ir.Node], body: str, operands: Sequence[ir.Value]) -> None:
    """Let `nodes`, all of which read `value`, read what the local function `body` makes of it and of `operands`."""
    result = functions.call(ctx.edit, body, value.producer(), [value, *operands], output=f"{value.name}_dynamic", like=value)
    for node in nodes:
        ctx.edit.rewire(node, linear.data_index(node), result)


def step_count(ctx: PassContext, bits: int, *, symmetric: bool = True) -> ir.Value:
    """The constant `levels(bits)`, stored once."""
    count = levels(bits, symmetric=symmetric)
    return ctx.edit.shared(("levels", float(count)), f"levels_{count:g}", lambda: count, "float32")
