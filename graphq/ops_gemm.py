"""Operators of the domain `graphq` for matrix products with packed weights: contracts, layouts, references, bodies.

Notation, in all docstrings:

    M       rows of x, all its leading axes together
    K       reduction size
    N       output channels
    G       group size: weights along K that share a scale, K / S for a scale of S rows; G = K is one scale a channel
    T       float16, bfloat16, or but for W4A16Gemm float32

| operator | x | x_scale | weight | w_scale |
|---|---|---|---|---|
| W4A16Gemm | T `[..., M, K]` | | `int4-halves-v1` | T `[K / G, N]` |
| W8A8Gemm | int8 `[..., M, K]` | float32 `[]` or `[..., M, 1]` | `int8-rows-v1` | float32 `[N]` |
| W4A8Gemm | int8 `[..., M, K]` | float32 `[]` or `[..., M, 1]` | `int4-halves-v1` | float32 `[K / G, N]` |

Weights are those of codes `[K, N]`; each operator also takes a bias, T `[N]`, as its last input, and returns T `[..., M, N]`.
There are no attributes: sizes follow from shapes, so that one function serves all nodes of a model. A layer without a bias has one
of zeros. Codes are symmetric: there are no zero points.

Packed layouts. Both keep the reduction axis innermost, because that is how tensor cores take 8-bit operands (of `[K, N]` they would
have to be transposed in registers), and so that 16 consecutive bytes belong to one channel.

- `int8-rows-v1`: int8 `[N, K]`, the transposed codes.
- `int4-halves-v1`: uint8 `[N, 32 * ceil(K / 64)]`. Byte `32 b + i` of a channel holds the code of row `64 b + i` in its low
  nibble and that of row `64 b + 32 + i` in its high one, `i < 32`, each plus 8; K is padded with zeros to a multiple of 64.
  Unpacking a byte thus never interleaves: low and high nibbles are two runs of 32 rows, each within one group if 32 divides G.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphq.errors import UsageError
from graphq.operands import Operands

Array = np.ndarray[Any, np.dtype[Any]]

ROWS, HALVES = "int8-rows-v1", "int4-halves-v1"
"""Packed layouts, see above."""
RUN = 32
"""Rows of a weight in consecutive nibbles of `int4-halves-v1`; groups are multiples of it."""
OFFSET = 8
"""What `int4-halves-v1` adds to a code, so that nibbles are not negative."""
MAX_K = (2**31 - 1) // 128**2
"""Longest sum of products of two int8 that an int32 holds, whatever the values."""

# ---- packed layouts -------------------------------------------------------------------------------------------------


def pack_int4(codes: Array) -> Array:
    """`int4-halves-v1` of codes `[K, N]`, integers in [-8, 7]: uint8 `[N, 32 * ceil(K / 64)]`.

    Raises:
        UsageError: a code does not fit into 4 bits.
    """
    if codes.size and not -OFFSET <= int(codes.min()) <= int(codes.max()) < OFFSET:
        raise UsageError(
            f"Codes from {codes.min()} to {codes.max()} do not fit into 4 bits.", expected="symmetric codes, -8 to 7, without a zero point"
        )
    k, n = codes.shape
    nibbles = np.full((n, packed_width(k) * 2), OFFSET, np.uint8)
    nibbles[:, :k] = codes.T + OFFSET
    low, high = np.moveaxis(nibbles.reshape(n, -1, 2, RUN), 2, 0)
    return (low | high << 4).reshape(n, -1)


def unpack_int4(packed: Array, k: int) -> Array:
    """The codes `[K, N]`, int8, of which `packed` is the `int4-halves-v1`."""
    runs = packed.reshape(len(packed), -1, 1, RUN)
    nibbles = np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)
    return np.ascontiguousarray(nibbles[:, :k].T.astype(np.int8) - OFFSET)


def packed_width(k: int) -> int:
    """Bytes of a channel of K codes in `int4-halves-v1`."""
    return RUN * -(-k // (2 * RUN))


def pack_int8(codes: Array) -> Array:
    """`int8-rows-v1` of codes `[K, N]`: int8 `[N, K]`."""
    return np.ascontiguousarray(codes.T.astype(np.int8))


def unpack_int8(packed: Array) -> Array:
    """The codes `[K, N]`, int8, of which `packed` is the `int8-rows-v1`."""
    return np.ascontiguousarray(packed.T)


# ---- references -----------------------------------------------------------------------------------------------------


def w4a16_gemm(x: Array, weight: Array, w_scale: Array, bias: Array) -> Array:
    """`x @ (codes * w_scale) + bias`: weights are rounded to T once dequantized, sums are float32, the result is rounded to T."""
    codes = unpack_int4(weight, x.shape[-1])
    dequantized = codes.astype(w_scale.dtype) * np.repeat(w_scale, len(codes) // len(w_scale), axis=0)
    y = np.matmul(x.astype(np.float32), dequantized.astype(np.float32)) + bias.astype(np.float32)
    return np.asarray(y.astype(x.dtype))


def w8a8_gemm(x: Array, weight: Array, x_scale: Array, w_scale: Array, bias: Array) -> Array:
    """`(x @ codes) * (x_scale * w_scale) + bias`: the sums are exact, what follows is float32, the result is rounded to T."""
    sums = _exact_matmul(x, unpack_int8(weight))
    y = sums.astype(np.float32) * (x_scale * w_scale) + bias.astype(np.float32)
    return np.asarray(y.astype(bias.dtype))


def w4a8_gemm(x: Array, weight: Array, x_scale: Array, w_scale: Array, bias: Array) -> Array:
    """`x_scale * sum over groups of (x @ codes) * w_scale + bias`: exact within a group, float32 beyond, the result is rounded to T."""
    codes = unpack_int4(weight, x.shape[-1])
    groups = zip(np.split(x, len(w_scale), axis=-1), np.split(codes, len(w_scale)), w_scale, strict=True)
    y = sum(_exact_matmul(part, rows).astype(np.float32) * scale for part, rows, scale in groups) * x_scale
    return np.asarray((y + bias.astype(np.float32)).astype(bias.dtype))


def _exact_matmul(x: Array, codes: Array) -> Array:
    """int32; computed as float64, which holds such sums exactly and has a fast product."""
    return np.matmul(x.astype(np.float64), codes.astype(np.float64)).astype(np.int32)


# ---- bodies ---------------------------------------------------------------------------------------------------------

_UNPACK = f"""
  fifteen = Constant <value = uint8 {{15}}> ()
  four = Constant <value = uint8 {{4}}> ()
  runs = Constant <value = int64[3] {{0, -1, {RUN}}}> ()
  rows = Constant <value = int64[2] {{0, -1}}> ()
  first = Constant <value = int64[1] {{0}}> ()
  axis = Constant <value = int64[1] {{1}}> ()
  rest = Constant <value = int64[1] {{-1}}> ()
  low = BitwiseAnd (weight, fifteen)
  high = BitShift <direction = "RIGHT"> (weight, four)
  low_runs = Reshape (low, runs)
  high_runs = Reshape (high, runs)
  both = Concat <axis = 2> (low_runs, high_runs)
  padded = Reshape (both, rows)
  k = Shape <start = -1> (x)
  nibbles = Slice (padded, first, k, axis)
  offset = Constant <value = float {{{OFFSET}}}> ()
  unsigned = Cast <to = 1> (nibbles)
  codes = Sub (unsigned, offset)
  groups = Shape <start = 0, end = 1> (w_scale)
  n = Shape <start = 0, end = 1> (weight)
  grouped_shape = Concat <axis = 0> (n, groups, rest)
  grouped = Reshape (codes, grouped_shape)
  typed = CastLike (grouped, w_scale)
  turned = Transpose (w_scale)
  scales = Unsqueeze (turned, rest)
  scaled = Mul (typed, scales)
  dequantized_rows = Reshape (scaled, rows)
  dequantized = Transpose (dequantized_rows)"""

W4A16 = f"""W4A16Gemm (x, weight, w_scale, bias) => (y) {{{_UNPACK}
  product = MatMul (x, dequantized)
  y = Add (product, bias)
}}"""

_RESCALE = """
  rescaled = Mul (product, x_scale)
  bias_float = Cast <to = 1> (bias)
  shifted = Add (rescaled, bias_float)
  y = CastLike (shifted, bias)
}"""

W8A8 = f"""W8A8Gemm (x, weight, x_scale, w_scale, bias) => (y) {{
  codes = Transpose (weight)
  sums = MatMulInteger (x, codes)
  sums_float = Cast <to = 1> (sums)
  product = Mul (sums_float, w_scale){_RESCALE}"""

W4A8 = f"""W4A8Gemm (x, weight, x_scale, w_scale, bias) => (y) {{{_UNPACK}
  x_float = Cast <to = 1> (x)
  product = MatMul (x_float, dequantized){_RESCALE}"""

# ---- the contract ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sizes:
    """M, K, N and G of one product."""

    m: int
    k: int
    n: int
    g: int


def sizes(operands: Mapping[str, Any]) -> Sizes:
    """Of a product whose operands `graphq.ops.check` has passed."""
    *leading, k = operands["x"].shape
    scale = operands["w_scale"].shape
    groups = scale[0] if len(scale) == 2 else 1
    return Sizes(math.prod(leading), k, operands["bias"].shape[0], k // groups)


def check(found: Operands) -> tuple[tuple[int, ...], str]:
    """Shape and type of the result, once it is known that the product is defined.

    Raises:
        UsageError: an operand has a wrong shape or type.
    """
    shapes, dtypes, require = found.shapes, found.dtypes, found.require
    integer, by_row = "x_scale" in shapes, found.name == "W8A8Gemm"
    require(dtypes["x"] in (("int8",) if integer else found.floats), "x", "int8" if integer else " or ".join(found.floats))
    require(len(shapes["x"]) >= 2 and shapes["x"][-1] > 0, "x", "[..., M, K]")
    *leading, k = shapes["x"]
    require(not integer or k <= MAX_K, "x", f"at most {MAX_K} columns, else int32 sums overflow")
    floats = found.floats if integer else (dtypes["x"],)
    require(dtypes["bias"] in floats and len(shapes["bias"]) == 1 and shapes["bias"][0] > 0, "bias", f"{' or '.join(floats)} [N]")
    (n,) = shapes["bias"]
    stored, width, columns = ("int8", "K", k) if by_row else ("uint8", f"{RUN} * ceil(K / {2 * RUN})", packed_width(k))
    require((dtypes["weight"], shapes["weight"]) == (stored, (n, columns)), "weight", f"{stored} [N, {width}] = {[n, columns]}")
    groups = shapes["w_scale"][0] if len(shapes["w_scale"]) == 2 else 1
    scale_type, scale_shape = "float32" if integer else dtypes["x"], "[N]" if by_row else "[K / G, N]"
    fits = shapes["w_scale"] == ((n,) if by_row else (groups, n)) and groups > 0
    require(dtypes["w_scale"] == scale_type and fits, "w_scale", f"{scale_type} {scale_shape} with N = {n}")
    require(groups == 1 or k % (groups * RUN) == 0, "w_scale", f"one row, or as many as make groups of a multiple of {RUN} of K = {k}")
    if integer:
        require(dtypes["x_scale"] == "float32" and shapes["x_scale"] in ((), (*leading, 1)), "x_scale", f"float32 [] or {[*leading, 1]}")
    return (*leading, n), dtypes["bias"]
