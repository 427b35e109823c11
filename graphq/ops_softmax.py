"""Operators of the domain `graphq` for attention weights that are quantized as they are made: contracts, layouts, references, bodies.

    SULQSoftmax (x, params) => (y)                   softmax over the last axis, each weight replaced by its level
    SULQSoftmaxCodes (x, params) => (packed)         the same, as 4-bit codes
    SULQAttentionValue (packed, levels, v) => (y)    the product of weights given as codes with the values

    M     rows: queries
    N     columns: keys, what a row sums over
    D     width of a value, at most `MAX_D`
    x     [.., M, N] float16, bfloat16 or float32; finite or -inf, which masks
    params  [5] float32: shift, center, scale of `LogParams`, then the logarithms `low` and `high` of the outermost levels
    levels  [16] float32: the level of each code, -8 first
    packed  [.., M, ceil(N / 2)] int8, of layout `PACKED`
    v, y  [.., N, D], [.., M, D] of the type of v; the leading axes are those of `packed`

A row that is masked everywhere has weights 0, as in torch's scaled_dot_product_attention, not NaN. All arithmetic is float32.
The quantizer is `graphq.log_quantizers.LogUniform` (SULQ: I&S-ViT, arXiv 2311.10126). `SULQSoftmax` takes 2 to 8 bits and computes
levels by `exp`; `SULQSoftmaxCodes` takes up to 4, and as `levels` is a table, its codes can stand for levels of any kind.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from graphq.errors import UsageError
from graphq.log_quantizers import LogParams, LogUniform
from graphq.operands import Operands

Array = np.ndarray[Any, np.dtype[Any]]

PACKED = "int4-pairs-v1"
"""Two 4-bit two's complement codes a byte along the last axis, the first in the low nibble; an odd N is padded by a masked column.

Neighbours share a byte, because one thread of a softmax holds both. Bytes are int8: TensorRT gives plugins no uint8 tensors."""

MAX_D = 256
"""Widest values: a program of the kernel holds whole rows of the result in registers."""

# ---- bodies ---------------------------------------------------------------------------------------------------------

_WEIGHTS = """
  shift, center, scale, low, high = Split <axis: int = 0, num_outputs: int = 5> (params)
  least = Constant <value = float {-3.4028235e38}> ()
  one = Constant <value = float {1.0}> ()
  last = Constant <value = int64[1] {-1}> ()
  top = ReduceMax (wide, last)
  peak = Max (top, least)
  below = Sub (wide, peak)
  power = Exp (below)
  sum = ReduceSum (power, last)
  total = Max (sum, one)
  weight = Div (power, total)
  shifted = Add (weight, shift)
  log = Log (shifted)
  above = Max (log, low)
  inside = Min (above, high)
  offset = Sub (inside, center)
  ratio = Div (offset, scale)
  code = Round (ratio)"""

SOFTMAX = f"""SULQSoftmax (x, params) => (y) {{
  wide = Cast <to: int = 1> (x){_WEIGHTS}
  steps = Mul (code, scale)
  level = Add (steps, center)
  unshifted = Exp (level)
  kept = Sub (unshifted, shift)
  y = CastLike (kept, x)
}}"""

CODES = f"""SULQSoftmaxCodes (x, params) => (packed) {{
  float_x = Cast <to: int = 1> (x)
  columns = Shape <start: int = -1> (x)
  two = Constant <value = int64[1] {{2}}> ()
  odd = Mod (columns, two)
  first = Constant <value = int64[1] {{0}}> ()
  pads = Concat <axis: int = 0> (first, odd)
  masked = Constant <value = float {{-inf}}> ()
  axis = Constant <value = int64[1] {{-1}}> ()
  wide = Pad (float_x, pads, masked, axis){_WEIGHTS}
  second = Constant <value = int64[1] {{1}}> ()
  end = Constant <value = int64[1] {{9223372036854775807}}> ()
  even_columns = Slice (code, first, end, axis, two)
  odd_columns = Slice (code, second, end, axis, two)
  zero = Constant <value = float {{0.0}}> ()
  sixteen = Constant <value = float {{16.0}}> ()
  negative = Less (even_columns, zero)
  is_negative = Cast <to: int = 1> (negative)
  wrap = Mul (is_negative, sixteen)
  low_nibble = Add (even_columns, wrap)
  high_nibble = Mul (odd_columns, sixteen)
  byte = Add (low_nibble, high_nibble)
  packed = Cast <to: int = 3> (byte)
}}"""

ATTENTION_VALUE = """SULQAttentionValue (packed, levels, v) => (y) {
  byte = Cast <to: int = 1> (packed)
  sixteen = Constant <value = float {16.0}> ()
  eight = Constant <value = float {8.0}> ()
  sixteenth = Div (byte, sixteen)
  odd_code = Floor (sixteenth)
  high_nibble = Mul (odd_code, sixteen)
  low_nibble = Sub (byte, high_nibble)
  wraps = Less (low_nibble, eight)
  plus = Cast <to: int = 1> (wraps)
  plus_sixteen = Mul (plus, sixteen)
  low_raised = Add (low_nibble, plus_sixteen)
  even_index = Sub (low_raised, eight)
  odd_index = Add (odd_code, eight)
  last = Constant <value = int64[1] {-1}> ()
  even_column = Unsqueeze (even_index, last)
  odd_column = Unsqueeze (odd_index, last)
  pairs = Concat <axis: int = -1> (even_column, odd_column)
  lead = Shape <end: int = -1> (packed)
  shape = Concat <axis: int = 0> (lead, last)
  float_index = Reshape (pairs, shape)
  index = Cast <to: int = 7> (float_index)
  padded = Gather (levels, index)
  first = Constant <value = int64[1] {0}> ()
  columns = Shape <start: int = -2, end: int = -1> (v)
  wide = Slice (padded, first, columns, last)
  weight = CastLike (wide, v)
  y = MatMul (weight, v)
}"""


# ---- references -----------------------------------------------------------------------------------------------------


def softmax_params(quantizer: LogUniform, params: LogParams) -> Array:
    """The input `params` of the operators: float32 of shape (5,)."""
    ends = [params.center + np.float32(code) * params.scale for code in (quantizer.spec.qmin, quantizer.spec.qmax)]
    return np.array([params.shift, params.center, params.scale, *ends], np.float32)


def code_levels(quantizer: LogUniform, params: LogParams) -> Array:
    """The input `levels`: float32 of shape (16,), the level of each 4-bit code; codes that `quantizer` does not have repeat its last.

    Raises:
        UsageError: the codes of `quantizer` have more than 4 bits.
    """
    if quantizer.bits > 4:
        raise UsageError(f"Codes of {quantizer.bits} bits do not fit a nibble.", expected="2 to 4 bits")
    codes = np.clip(np.arange(-8, 8, dtype=np.int8), quantizer.spec.qmin, quantizer.spec.qmax)
    return quantizer.dequantize(codes, params).astype(np.float32)


def softmax(x: Array) -> Array:
    """Weights that sum to 1 along the last axis, or to 0 where all is masked: float32, the shape of x."""
    wide = x.astype(np.float32)
    power = np.exp(wide - np.maximum(wide.max(-1, keepdims=True), np.finfo(np.float32).min))
    return power / np.maximum(power.sum(-1, keepdims=True), np.float32(1))


def sulq_softmax(x: Array, params: Array) -> Array:
    """What `SULQSoftmax` computes."""
    quantizer, fitted = _fitted(params)
    return quantizer.fake_quantize(softmax(x), fitted).astype(x.dtype)


def sulq_softmax_codes(x: Array, params: Array) -> Array:
    """What `SULQSoftmaxCodes` computes."""
    quantizer, fitted = _fitted(params)
    pads = [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)]
    return pack_codes(quantizer.quantize(softmax(np.pad(x.astype(np.float32), pads, constant_values=-np.inf)), fitted))


def _fitted(params: Array) -> tuple[LogUniform, LogParams]:
    """The inverse of `softmax_params`."""
    shift, center, scale, low, high = params.astype(np.float32)
    return LogUniform(round(np.log2((high - low) / scale + 1))), LogParams(shift, center, scale)


def sulq_attention_value(packed: Array, levels: Array, v: Array) -> Array:
    """What `SULQAttentionValue` computes, with sums in float32."""
    weight = levels[unpack_codes(packed).astype(np.intp) + 8][..., : v.shape[-2]].astype(v.dtype)
    return (weight.astype(np.float32) @ v.astype(np.float32)).astype(v.dtype)


def pack_codes(codes: Array) -> Array:
    """int8 codes of 4 bits [.., N], N even, as bytes [.., N / 2] of layout `PACKED`."""
    return (codes[..., ::2] & 15) | (codes[..., 1::2] << 4)


def unpack_codes(packed: Array) -> Array:
    """The inverse of `pack_codes`."""
    low, high = (packed << 4) >> 4, packed >> 4
    return np.stack([low, high], -1).reshape(*packed.shape[:-1], 2 * packed.shape[-1])


# ---- the contract ---------------------------------------------------------------------------------------------------


def check(found: Operands) -> tuple[tuple[int, ...], str]:
    """Shape and type of the result, once it is known that the operator is defined.

    Raises:
        UsageError: an operand has a wrong shape or type.
    """
    name, shapes, dtypes, require = found.name, found.shapes, found.dtypes, found.require
    table, size = ("levels", 16) if name == "SULQAttentionValue" else ("params", 5)
    require((dtypes[table], shapes[table]) == ("float32", (size,)), table, f"float32 [{size}]")
    if name == "SULQAttentionValue":
        packed, v = shapes["packed"], shapes["v"]
        require(dtypes["v"] in found.floats and len(v) >= 2, "v", f"{' or '.join(found.floats)} [..., N, D]")
        require(v[-1] <= MAX_D, "v", f"D of at most {MAX_D}")
        fits = len(packed) == len(v) and packed[:-2] == v[:-2] and packed[-1] == (v[-2] + 1) // 2
        require(
            dtypes["packed"] == "int8" and fits, "packed", f"int8 [..., M, ceil(N / 2)] with N = {v[-2]} and leading axes {list(v[:-2])}"
        )
        return (*packed[:-1], v[-1]), dtypes["v"]
    x = shapes["x"]
    require(dtypes["x"] in found.floats and len(x) >= 1 and x[-1] > 0, "x", f"{' or '.join(found.floats)} [..., N] with N of at least 1")
    return ((*x[:-1], (x[-1] + 1) // 2), "int8") if name == "SULQSoftmaxCodes" else (x, dtypes["x"])
