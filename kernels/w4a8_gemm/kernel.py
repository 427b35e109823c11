"""W4A8Gemm: `x_scale * sum over groups of (x @ codes) * w_scale + bias`, int8 by int4 into an int32 of each group, floats beyond.

Two kernels: for few rows of x the weight's bytes are what costs, and `_skinny` reads each once, with many in flight; beyond, tensor
cores are, and `_wide` turns bytes into their operands in registers. Both hold the weight as the left operand, which may come from there.

README.md says why each trick is there. Layout, shapes, reference: `graphq.ops_gemm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import inf
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from graphq import ops_gemm

from .._launch import INTERPRETED, Config, Launch, Table, arch_of, pick, prepare, require_rows

if TYPE_CHECKING:
    import torch

# 16 times each code, as int8: a nibble stays, or is put, in the upper half of its byte, whose upper bit is turned, since 8 was added.
_UNPACK = tl.constexpr("""{
    .reg .b32 low;
    shl.b32 low, $2, 4;
    lop3.b32 $1, $2, 0xF0F0F0F0, 0x80808080, 0x6A;
    lop3.b32 $0, low, 0xF0F0F0F0, 0x80808080, 0x6A;
}""")


@triton.jit
def _codes(packed, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Low and high codes of packed bytes, uint8 of any shape, as two tensors of int8, each times 16."""
    if ASM:
        low, high = tl.inline_asm_elementwise(_UNPACK, "=r,=r,r", [packed], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
    else:
        low = ((packed << 4) ^ 0x80).to(tl.int8, bitcast=True)
        high = ((packed & 0xF0) ^ 0x80).to(tl.int8, bitcast=True)
    return low, high


@triton.jit
def _skinny(  # type: ignore[no-untyped-def]
    # pointers: x int8 [M, K], weight uint8 [N, 32 * ceil(K / 64)], x_scale [M or 1], w_scale [K / G, N], bias [N], out [M, N]
    x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr,
    # sizes
    M, N, K,
    # strides of x, and that of x_scale: 1, or 0 for one scale for all rows
    stride_xm, stride_xk, stride_sm,
    # group size, 0 for one scale a channel
    G: tl.constexpr,
    # meta-parameters: a program makes BLOCK_N channels of BLOCK_M >= M rows, each of SPLIT warps from every SPLIT-th block of BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_K // 2
    width = tl.cdiv(K, 64) * 32
    part = tl.arange(0, SPLIT)
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = n % N  # beyond the last, channels are computed again and not stored
    byte = part[:, None] * HALF + tl.arange(0, HALF)[None, :]
    row = byte // 32 * 64 + byte % 32  # of the low nibble
    weight_ptrs = weight_ptr + channel.to(tl.int64)[None, :, None] * width + byte[:, None, :]
    x_ptrs = x_ptr + m[None, None, :] * stride_xm + row[:, :, None] * stride_xk
    acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.int32 if G == 0 else tl.float32)
    for start in tl.range(0, tl.cdiv(K, SPLIT * BLOCK_K), num_stages=STAGES):
        first = (start * SPLIT + part) * BLOCK_K  # row of each warp
        if EVEN_K:
            packed = tl.load(weight_ptrs)
            x_low = tl.load(x_ptrs, mask=(m < M)[None, None, :], other=0)
            x_high = tl.load(x_ptrs + 32 * stride_xk, mask=(m < M)[None, None, :], other=0)
        else:
            done = start * SPLIT * BLOCK_K
            packed = tl.load(weight_ptrs, mask=(byte < width - done // 2)[:, None, :], other=0)
            x_low = tl.load(x_ptrs, mask=(row < K - done)[:, :, None] & (m < M)[None, None, :], other=0)
            x_high = tl.load(x_ptrs + 32 * stride_xk, mask=(row < K - done - 32)[:, :, None] & (m < M)[None, None, :], other=0)
        low, high = _codes(packed, ASM)
        if G == 0:
            acc = tl.dot(low, x_low, acc, out_dtype=tl.int32)
            acc = tl.dot(high, x_high, acc, out_dtype=tl.int32)
        elif G % 64 == 0:
            scale = tl.load(w_scale_ptr + (first // G)[:, None] * N + channel[None, :], mask=(first < K)[:, None], other=0.0)
            sums = tl.dot(low, x_low, out_dtype=tl.int32)
            acc += tl.dot(high, x_high, sums, out_dtype=tl.int32).to(tl.float32) * scale[:, :, None]
        else:
            scale = tl.load(w_scale_ptr + (first // G)[:, None] * N + channel[None, :], mask=(first < K)[:, None], other=0.0)
            acc += tl.dot(low, x_low, out_dtype=tl.int32).to(tl.float32) * scale[:, :, None]
            scale = tl.load(w_scale_ptr + ((first + 32) // G)[:, None] * N + channel[None, :], mask=(first + 32 < K)[:, None], other=0.0)
            acc += tl.dot(high, x_high, out_dtype=tl.int32).to(tl.float32) * scale[:, :, None]
        weight_ptrs += SPLIT * HALF
        x_ptrs += SPLIT * BLOCK_K * stride_xk
    y = tl.sum(acc, axis=0).to(tl.float32)  # over warps, in a fixed order
    if G == 0:
        y *= tl.load(w_scale_ptr + channel)[:, None]
    x_scale = tl.load(x_scale_ptr + m * stride_sm, mask=m < M, other=0.0) / 16
    y = y * x_scale[None, :] + tl.load(bias_ptr + channel).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :] * N + n[:, None], y.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _wide(  # type: ignore[no-untyped-def]
    # pointers: x int8 [M, K], weight uint8 [N, 32 * ceil(K / 64)], x_scale [M or 1], w_scale [K / G, N], bias [N], out [M, N]
    x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr,
    # sizes
    M, N, K,
    # strides of x, and that of x_scale: 1, or 0 for one scale for all rows
    stride_xm, stride_xk, stride_sm,
    # group size, 0 for one scale a channel
    G: tl.constexpr,
    # meta-parameters: a program makes BLOCK_N channels of BLOCK_M rows; ORDER rows of programs go over all channels before the next do
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ORDER: tl.constexpr,
    EVEN_K: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    HALF: tl.constexpr = BLOCK_K // 2
    width = tl.cdiv(K, 64) * 32
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tiles_m, tiles_n, ORDER)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = n % N  # beyond the last, rows and channels are computed again and not stored
    byte = tl.arange(0, HALF)
    row = byte // 32 * 64 + byte % 32  # of the low nibble
    weight_ptrs = weight_ptr + channel.to(tl.int64)[:, None] * width + byte[None, :]
    x_ptrs = x_ptr + (m % M).to(tl.int64)[None, :] * stride_xm + row[:, None] * stride_xk
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.int32 if G == 0 else tl.float32)
    for start in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        first = start * BLOCK_K
        if EVEN_K:
            packed = tl.load(weight_ptrs)
            x_low = tl.load(x_ptrs)
            x_high = tl.load(x_ptrs + 32 * stride_xk)
        else:
            packed = tl.load(weight_ptrs, mask=(byte < width - first // 2)[None, :], other=0)
            x_low = tl.load(x_ptrs, mask=(row < K - first)[:, None], other=0)
            x_high = tl.load(x_ptrs + 32 * stride_xk, mask=(row < K - first - 32)[:, None], other=0)
        low, high = _codes(packed, ASM)
        if G == 0:
            acc = tl.dot(low, x_low, acc, out_dtype=tl.int32)
            acc = tl.dot(high, x_high, acc, out_dtype=tl.int32)
        elif G % 64 == 0:
            scale = tl.load(w_scale_ptr + first // G * N + channel)
            sums = tl.dot(low, x_low, out_dtype=tl.int32)
            acc += tl.dot(high, x_high, sums, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        else:
            scale = tl.load(w_scale_ptr + first // G * N + channel)
            acc += tl.dot(low, x_low, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
            scale = tl.load(w_scale_ptr + (first + 32) // G * N + channel, mask=channel * 0 + first + 32 < K, other=0.0)
            acc += tl.dot(high, x_high, out_dtype=tl.int32).to(tl.float32) * scale[:, None]
        weight_ptrs += HALF
        x_ptrs += BLOCK_K * stride_xk
    y = acc.to(tl.float32)
    if G == 0:
        y *= tl.load(w_scale_ptr + channel)[:, None]
    y = y * (tl.load(x_scale_ptr + m % M * stride_sm) / 16)[None, :] + tl.load(bias_ptr + channel).to(tl.float32)[:, None]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, tl.trans(y).to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


_SKINNY = ((8, Config(8, 16, 128, 8, 3, split=True)), (16, Config(16, 16, 128, 8, 3, split=True)))
_WIDE = ((128, Config(64, 64, 128, 4, 4)), (256, Config(128, 64, 128, 8, 3)), (inf, Config(128, 128, 128, 8, 3)))
TABLE: Table = {
    80: ((8, Config(8, 32, 128, 8, 4, split=True)), (16, Config(16, 32, 128, 8, 3, split=True)), *_WIDE),
    86: (*_SKINNY, *_WIDE),
    89: (*_SKINNY, *_WIDE),
    90: (
        (8, Config(8, 32, 128, 8, 4, split=True)), (16, Config(16, 32, 128, 8, 4, split=True)),
        (128, Config(64, 64, 128, 4, 4)), (256, Config(64, 128, 128, 8, 4)), (inf, Config(128, 128, 128, 8, 4)),
    ),
    120: (*_SKINNY, *_WIDE),
}  # fmt: skip
"""README.md has the reasoning."""


def configs(m: int) -> Iterator[Config]:
    """Configurations worth timing for M rows; not each fits into each GPU."""
    if m <= 32:
        for n, k, warps, stages in product((16, 32, 64), (64, 128), (4, 8), (2, 3, 4)):
            yield Config(max(8, triton.next_power_of_2(m)), n, k, warps, stages, split=True)
    for rows_, n, k, warps, stages in product((32, 64, 128, 256), (64, 128), (64, 128), (4, 8), (3, 4)):
        if 16 <= rows_ * n // (warps * 32) <= 128 and rows_ <= max(64, m):
            yield Config(rows_, n, k, warps, stages)


def launch(sizes: ops_gemm.Sizes, dtype: str, arch: int, config: Config | None = None, strides: tuple[int, int] | None = None,
           scale_per_row: bool = False) -> Launch:  # fmt: skip
    """The launch for a product.

    Args:
        dtype: Of bias and result.
        config: Taken from `TABLE` unless given; its `k` becomes 64 where that of the table does not divide groups.
        strides: Of x, in elements; by default x is contiguous.
        scale_per_row: Whether each row of x has a scale of its own.
    """
    config = config or pick(TABLE, arch, sizes.m)
    require_rows(config, sizes.m)
    grouped = sizes.g != sizes.k
    block_k = config.k if not grouped or sizes.g % config.k == 0 else 64
    stride_xm, stride_xk = strides or (sizes.k, 1)
    return Launch(
        function=_skinny if config.split else _wide,
        types=("int8", "uint8", "float32", "float32", dtype, dtype),
        scalars={"M": sizes.m, "N": sizes.n, "K": sizes.k, "stride_xm": stride_xm, "stride_xk": stride_xk, "stride_sm": int(scale_per_row)},
        constants={
            "G": sizes.g if grouped else 0,
            "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": block_k,
            **({"SPLIT": config.warps} if config.split else {"ORDER": 8}),
            "EVEN_K": sizes.k % (block_k * (config.warps if config.split else 1)) == 0, "STAGES": config.stages, "ASM": not INTERPRETED,
        },
        programs=triton.cdiv(sizes.n, config.n) * triton.cdiv(sizes.m, config.m), warps=config.warps, stages=config.stages,
    )  # fmt: skip


def w4a8_gemm(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor, out: torch.Tensor,
              config: Config | None = None) -> None:  # fmt: skip
    """Write the product into `out`; operands as in `graphq.ops_gemm`, contiguous but for x; out is T `[..., M, N]`. Allocates nothing.

    Raises:
        UsageError: an operand has a wrong shape, type or layout.
    """
    sizes, view = prepare("W4A8Gemm", out, x=x, weight=weight, x_scale=x_scale, w_scale=w_scale, bias=bias)
    run = launch(sizes, str(bias.dtype).rpartition(".")[2], arch_of(x), config, view.stride(), x_scale.numel() > 1)
    run(view, weight, x_scale, w_scale, bias, out)
