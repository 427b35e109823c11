"""Softmax with weights quantized by their logarithm, and the product of such weights with the values. Contract: `graphq.ops_softmax`.

One read, one write: a row stays in registers from its scores to its codes.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import triton
import triton.language as tl
from triton.language.extra import libdevice

from graphq.errors import UsageError
from graphq.operands import dtype_name
from graphq.ops import check
from graphq.ops_softmax import MAX_D

from .._launch import INTERPRETED, Launch, require_memory

if TYPE_CHECKING:
    import torch

ONE_BLOCK = 16384
"""Columns that a row may have to stay in the registers of one program: 16 a thread with 32 warps."""
LONG_BLOCK = 4096
"""Columns of a step through longer rows."""

_INTERPRETED = tl.constexpr(INTERPRETED)
_LOG2_E = tl.constexpr(1.4426950408889634)
_LEAST = tl.constexpr(-3.4028235e38)
_ROUND = tl.constexpr(12582912.0)
"""1.5 * 2^23: adding it to a float of less than 2^22 rounds that half to even and leaves the integer in the low bits."""


@triton.jit
def _log2(x):  # type: ignore[no-untyped-def]
    # The hardware's logarithm is one instruction, good to 2^-22; tl.log2 becomes 25. The interpreter knows tl.log2 alone.
    return tl.log2(x) if _INTERPRETED else libdevice.fast_log2f(x)


@triton.jit
def _rounded(weight, params):  # type: ignore[no-untyped-def]
    """The code of each weight, plus `_ROUND`."""
    shift, center, scale = tl.load(params), tl.load(params + 1), tl.load(params + 2)
    low, high = tl.load(params + 3), tl.load(params + 4)
    per_octave = 1 / (_LOG2_E * scale)
    code = _log2(weight + shift) * per_octave - center / scale
    return tl.minimum(tl.maximum(code, (low - center) / scale), (high - center) / scale) + _ROUND


@triton.jit
def _store(rounded, params, y, rows, columns, width, row, start, PACK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Write codes from column `start` on, as levels, or as nibbles."""
    BLOCK: tl.constexpr = rounded.shape[1]
    to = row.to(tl.int64)[:, None] * width
    if PACK:
        nibble = rounded.to(tl.int32, bitcast=True) & 15
        low, high = tl.split(tl.reshape(nibble, [nibble.shape[0], BLOCK // 2, 2]))
        byte = start // 2 + tl.arange(0, BLOCK // 2)
        tl.store(y + to + byte[None, :], (low | (high << 4)).to(tl.int8), mask=(row < rows)[:, None] & (byte < width)[None, :])
    else:
        shift, center, scale = tl.load(params), tl.load(params + 1), tl.load(params + 2)
        level = tl.exp2((rounded - _ROUND) * (scale * _LOG2_E) + center * _LOG2_E) - shift
        column = start + tl.arange(0, BLOCK)
        tl.store(y + to + column[None, :], level.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (column < columns)[None, :])


@triton.jit
def _scores(x, rows, columns, row, start, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scores from column `start` on, in octaves; -inf outside."""
    column = start + tl.arange(0, BLOCK)
    at = row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(x + at, mask=inside, other=float("-inf")).to(tl.float32) * _LOG2_E


@triton.jit
def softmax_rows(  # type: ignore[no-untyped-def]
    x, params, y,  # [rows, columns], [5], [rows, width]: like x, or int8 if PACK, of half the columns
    rows, columns, width,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """Whole rows in one block; short rows share a program, so that it has work for all its threads."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    score = _scores(x, rows, columns, row, 0, BLOCK_COLUMNS)
    peak = tl.maximum(tl.max(score, axis=1), _LEAST)
    power = tl.exp2(score - peak[:, None])
    weight = power * (1 / tl.maximum(tl.sum(power, axis=1), 1.0))[:, None]
    _store(_rounded(weight, params), params, y, rows, columns, width, row, 0, PACK)


@triton.jit
def softmax_long(  # type: ignore[no-untyped-def]
    x, params, y,  # as above
    rows, columns, width,
    BLOCK_COLUMNS: tl.constexpr, PACK: tl.constexpr,
):  # fmt: skip
    """One row a program in blocks: the first round finds peak and sum online (arXiv 1805.02867), the second reads the row again."""
    row = tl.program_id(0) + tl.arange(0, 1)
    peak = tl.full([1], _LEAST, tl.float32)
    total = tl.zeros([1], tl.float32)
    for start in range(0, columns, BLOCK_COLUMNS):
        score = _scores(x, rows, columns, row, start, BLOCK_COLUMNS)
        higher = tl.maximum(tl.max(score, axis=1), peak)
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(score - higher[:, None]), axis=1)
        peak = higher
    share = 1 / tl.maximum(total, 1.0)
    for start in range(0, columns, BLOCK_COLUMNS):
        score = _scores(x, rows, columns, row, start, BLOCK_COLUMNS)
        weight = tl.exp2(score - peak[:, None]) * share[:, None]
        _store(_rounded(weight, params), params, y, rows, columns, width, row, start, PACK)


@triton.jit
def attention_value(  # type: ignore[no-untyped-def]
    packed, levels, v, y,  # [batch, rows, width] int8, [16] float32, [batch, columns, depth], [batch, rows, depth]
    rows, columns, width, depth,
    BLOCK_ROWS: tl.constexpr, BLOCK_BYTES: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """A block of rows of one batch entry. Low and high nibbles meet the even and the odd rows of v in two products, so that
    no code moves to another thread."""
    blocks = tl.cdiv(rows, BLOCK_ROWS)
    batch = (tl.program_id(0) // blocks).to(tl.int64)
    row = tl.program_id(0) % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_DEPTH)
    codes = packed + (batch * rows + row.to(tl.int64)[:, None]) * width
    values = v + batch * columns * depth + lane[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_DEPTH], tl.float32)
    for start in range(0, width, BLOCK_BYTES):
        byte = start + tl.arange(0, BLOCK_BYTES)
        pair = tl.load(codes + byte[None, :], mask=(row < rows)[:, None] & (byte < width)[None, :], other=0).to(tl.int32)
        for odd in tl.static_range(2):
            weight = tl.load(levels + (((pair >> (4 * odd)) & 15) ^ 8)).to(v.dtype.element_ty)
            key = 2 * byte + odd
            some = tl.load(values + key[:, None] * depth, mask=(key < columns)[:, None] & (lane < depth)[None, :], other=0.0)
            if _INTERPRETED:  # multiplies the bits of bfloat16 as integers; as float32 the products are the same
                weight, some = weight.to(tl.float32), some.to(tl.float32)
            total = tl.dot(weight, some, total, input_precision="ieee")
    to = (batch * rows + row.to(tl.int64)[:, None]) * depth + lane[None, :]
    tl.store(y + to, total.to(y.dtype.element_ty), mask=(row < rows)[:, None] & (lane < depth)[None, :])


def softmax_launch(rows: int, columns: int, dtype: str, packed: bool) -> Launch:
    """The launch for that many rows of `dtype`: 16 elements a thread, at least four warps, so short rows come in groups."""
    block = max(2, triton.next_power_of_2(columns))
    scalars = {"rows": rows, "columns": columns, "width": (columns + 1) // 2 if packed else columns}
    types = (dtype, "float32", "int8" if packed else dtype)
    if block > ONE_BLOCK:
        return Launch(softmax_long, types, scalars, {"BLOCK_COLUMNS": LONG_BLOCK, "PACK": packed}, rows, warps=8, stages=1)
    group = max(1, 2048 // block)
    constants = {"BLOCK_ROWS": group, "BLOCK_COLUMNS": block, "PACK": packed}
    return Launch(softmax_rows, types, scalars, constants, triton.cdiv(rows, group), warps=max(4, block // 512), stages=1)


def attention_launch(batch: int, rows: int, columns: int, depth: int, dtype: str) -> Launch:
    """The launch for products of `rows` rows of codes with values of width `depth` and type `dtype`.

    Raises:
        UsageError: values are wider than `MAX_D`.
    """
    if depth > MAX_D:
        raise UsageError(f"Values of width {depth} are too wide for one block.", expected=f"D of at most {MAX_D}")
    group = min(64, max(16, triton.next_power_of_2(rows)))
    constants = {"BLOCK_ROWS": group, "BLOCK_BYTES": 16, "BLOCK_DEPTH": max(16, triton.next_power_of_2(depth))}
    scalars = {"rows": rows, "columns": columns, "width": (columns + 1) // 2, "depth": depth}
    types = ("int8", "float32", dtype, dtype)
    return Launch(attention_value, types, scalars, constants, batch * triton.cdiv(rows, group), warps=4 if depth <= 64 else 8, stages=2)


def sulq_softmax(x: torch.Tensor, params: torch.Tensor, out: torch.Tensor) -> None:
    """Write what `SULQSoftmax` computes into `out`; all contiguous. Allocates nothing.

    Raises:
        UsageError: an operand has a wrong shape, type or layout.
    """
    _softmax("SULQSoftmax", x, params, out)


def sulq_softmax_codes(x: torch.Tensor, params: torch.Tensor, out: torch.Tensor) -> None:
    """Write what `SULQSoftmaxCodes` computes into `out`, int8 [.., ceil(N / 2)]; all contiguous. Allocates nothing.

    Raises:
        UsageError: an operand has a wrong shape, type or layout.
    """
    _softmax("SULQSoftmaxCodes", x, params, out)


def _softmax(name: str, x: torch.Tensor, params: torch.Tensor, out: torch.Tensor) -> None:
    operands = {"x": x, "params": params}
    shape, dtype = check(name, operands)
    require_memory(name, out, shape, f"torch.{dtype}", operands)
    if out.numel():
        columns = x.shape[-1]
        softmax_launch(x.numel() // columns, columns, dtype_name(x), packed=name == "SULQSoftmaxCodes")(x, params, out)


def sulq_attention_value(packed: torch.Tensor, levels: torch.Tensor, v: torch.Tensor, out: torch.Tensor) -> None:
    """Write what `SULQAttentionValue` computes into `out`, [.., M, D] like v; all contiguous, D at most `MAX_D`. Allocates nothing.

    Raises:
        UsageError: an operand has a wrong shape, type or layout.
    """
    operands = {"packed": packed, "levels": levels, "v": v}
    shape, dtype = check("SULQAttentionValue", operands)
    require_memory("SULQAttentionValue", out, shape, f"torch.{dtype}", operands)
    launch = attention_launch(math.prod(shape[:-2]), shape[-2], v.shape[-2], shape[-1], dtype)
    if out.numel():
        launch(packed, levels, v, out)
