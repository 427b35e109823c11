"""W4A16Gemm: `x @ (codes * w_scale) + bias`, weights of 4 bits in groups, activations in float16 or bfloat16.

Two kernels. For few rows of x the weight's bytes are what costs: `_skinny` reads each once, with many in flight. Beyond, tensor cores
are, and `_wide` turns bytes into their operands in registers. Both hold the weight as the left operand, `y^T = W^T x^T`: the left one
may come from registers, so that unpacked weights never go through shared memory.

README.md says why each trick is there. Layout, shapes, reference: `graphq.ops_gemm`.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from math import inf
from typing import TYPE_CHECKING

import triton
import triton.language as tl

from graphq import ops, ops_gemm
from graphq.errors import UsageError

from .._launch import INTERPRETED, Config, Launch, Table, arch_of, pick, prepare, require_rows

if TYPE_CHECKING:
    import torch

# Bytes to 16-bit floats without a conversion: a nibble is put below the byte that makes it 1024 + nibble (float16) or 128 + nibble
# (bfloat16), from which the multiply-add takes 1024 + 8 or 128 + 8. 4 bytes, 8 weights, 11 instructions, all exact.
_UNPACK = """{{
    .reg .b32 low, high, one, offset;
    shr.u32 high, $4, 4;
    and.b32 low, $4, 0x0F0F0F0F;
    and.b32 high, high, 0x0F0F0F0F;
    mov.b32 one, {one};
    mov.b32 offset, {offset};
    prmt.b32 $0, low, {byte}, 0x4140;
    prmt.b32 $1, low, {byte}, 0x4342;
    prmt.b32 $2, high, {byte}, 0x4140;
    prmt.b32 $3, high, {byte}, 0x4342;
    fma.rn.{type}x2 $0, $0, one, offset;
    fma.rn.{type}x2 $1, $1, one, offset;
    fma.rn.{type}x2 $2, $2, one, offset;
    fma.rn.{type}x2 $3, $3, one, offset;
}}"""
_UNPACK_FLOAT16 = tl.constexpr(_UNPACK.format(type="f16", byte="0x64646464", one="0x3C003C00", offset="0xE408E408"))
_UNPACK_BFLOAT16 = tl.constexpr(_UNPACK.format(type="bf16", byte="0x43434343", one="0x3F803F80", offset="0xC308C308"))


@triton.jit
def _codes(packed, dtype: tl.constexpr, ASM: tl.constexpr):  # type: ignore[no-untyped-def]
    """Low and high codes of packed bytes, uint8 of any shape, as two tensors of `dtype`."""
    if ASM and dtype == tl.float16:
        low, high = tl.inline_asm_elementwise(_UNPACK_FLOAT16, "=r,=r,=r,=r,r", [packed], dtype=(tl.float16, tl.float16),
                                              is_pure=True, pack=4)  # fmt: skip
    elif ASM:
        low, high = tl.inline_asm_elementwise(_UNPACK_BFLOAT16, "=r,=r,=r,=r,r", [packed], dtype=(tl.bfloat16, tl.bfloat16),
                                              is_pure=True, pack=4)  # fmt: skip
    else:
        low = ((packed & 15).to(tl.int32) - 8).to(dtype)
        high = ((packed >> 4).to(tl.int32) - 8).to(dtype)
    return low, high


@triton.jit
def _scale_of(row, channel, w_scale_ptr, K, N, G: tl.constexpr):  # type: ignore[no-untyped-def]
    """Scales of `channel` for the groups of `row`, two tensors that broadcast; 0 beyond the last row."""
    return tl.load(w_scale_ptr + row // G * N + channel, mask=channel * 0 + row < K, other=0.0)


@triton.jit
def _skinny(  # type: ignore[no-untyped-def]
    # pointers: x [M, K], weight uint8 [N, 32 * ceil(K / 64)], w_scale [K / G, N], bias [N], out [M, N]
    x_ptr, weight_ptr, w_scale_ptr, bias_ptr, out_ptr,
    # sizes
    M, N, K,
    # strides of x
    stride_xm, stride_xk,
    # group size, 0 for one scale a channel
    G: tl.constexpr,
    # meta-parameters: a program makes BLOCK_N channels of BLOCK_M >= M rows, each of SPLIT warps from every SPLIT-th block of BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    EVEN_K: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr,
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
    acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.float32)
    first = part[:, None] * BLOCK_K  # row of each warp
    if G > 0:  # scales are too narrow for asynchronous copies, and are loaded a step ahead instead
        scale = _scale_of(first, channel[None, :], w_scale_ptr, K, N, G)
        if G % 64 != 0:
            scale_high = _scale_of(first + 32, channel[None, :], w_scale_ptr, K, N, G)
    for start in tl.range(0, tl.cdiv(K, SPLIT * BLOCK_K), num_stages=STAGES):
        first += SPLIT * BLOCK_K
        if G > 0:
            next_scale = _scale_of(first, channel[None, :], w_scale_ptr, K, N, G)
            if G % 64 != 0:
                next_scale_high = _scale_of(first + 32, channel[None, :], w_scale_ptr, K, N, G)
        if EVEN_K:
            packed = tl.load(weight_ptrs)
            x_low = tl.load(x_ptrs, mask=(m < M)[None, None, :], other=0.0)
            x_high = tl.load(x_ptrs + 32 * stride_xk, mask=(m < M)[None, None, :], other=0.0)
        else:
            done = start * SPLIT * BLOCK_K
            packed = tl.load(weight_ptrs, mask=(byte < width - done // 2)[:, None, :], other=0)
            x_low = tl.load(x_ptrs, mask=(row < K - done)[:, :, None] & (m < M)[None, None, :], other=0.0)
            x_high = tl.load(x_ptrs + 32 * stride_xk, mask=(row < K - done - 32)[:, :, None] & (m < M)[None, None, :], other=0.0)
        low, high = _codes(packed, OPERAND, ASM)
        # Sums of a group are scaled, not its weights: there are fewer, and they are float32.
        if G == 0:
            acc = tl.dot(high, x_high.to(OPERAND), tl.dot(low, x_low.to(OPERAND), acc))
        elif G % 64 == 0:
            acc += tl.dot(high, x_high.to(OPERAND), tl.dot(low, x_low.to(OPERAND))) * scale.to(tl.float32)[:, :, None]
            scale = next_scale
        else:
            acc += tl.dot(low, x_low.to(OPERAND)) * scale.to(tl.float32)[:, :, None]
            acc += tl.dot(high, x_high.to(OPERAND)) * scale_high.to(tl.float32)[:, :, None]
            scale, scale_high = next_scale, next_scale_high
        weight_ptrs += SPLIT * HALF
        x_ptrs += SPLIT * BLOCK_K * stride_xk
    y = tl.sum(acc, axis=0)  # over warps, in a fixed order
    if G == 0:
        y *= tl.load(w_scale_ptr + channel).to(tl.float32)[:, None]
    y += tl.load(bias_ptr + channel).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :] * N + n[:, None], y.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _wide(  # type: ignore[no-untyped-def]
    # pointers: x [M, K], weight uint8 [N, 32 * ceil(K / 64)], w_scale [K / G, N], bias [N], out [M, N]
    x_ptr, weight_ptr, w_scale_ptr, bias_ptr, out_ptr,
    # sizes
    M, N, K,
    # strides of x
    stride_xm, stride_xk,
    # group size, 0 for one scale a channel
    G: tl.constexpr,
    # meta-parameters: a program makes BLOCK_N channels of BLOCK_M rows; ORDER rows of programs go over all channels before the next do
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ORDER: tl.constexpr,
    EVEN_K: tl.constexpr, STAGES: tl.constexpr, OPERAND: tl.constexpr, ASM: tl.constexpr,
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
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for start in tl.range(0, tl.cdiv(K, BLOCK_K), num_stages=STAGES):
        first = start * BLOCK_K
        if EVEN_K:
            packed = tl.load(weight_ptrs)
            x_low = tl.load(x_ptrs)
            x_high = tl.load(x_ptrs + 32 * stride_xk)
        else:
            packed = tl.load(weight_ptrs, mask=(byte < width - first // 2)[None, :], other=0)
            x_low = tl.load(x_ptrs, mask=(row < K - first)[:, None], other=0.0)
            x_high = tl.load(x_ptrs + 32 * stride_xk, mask=(row < K - first - 32)[:, None], other=0.0)
        low, high = _codes(packed, OPERAND, ASM)
        if G > 0:
            scale = tl.load(w_scale_ptr + first // G * N + channel)
            low *= scale.to(OPERAND)[:, None]
            if G % 64 != 0:
                scale = tl.load(w_scale_ptr + (first + 32) // G * N + channel, mask=channel * 0 + first + 32 < K, other=0.0)
            high *= scale.to(OPERAND)[:, None]
        acc = tl.dot(low, x_low.to(OPERAND), acc)
        acc = tl.dot(high, x_high.to(OPERAND), acc)
        weight_ptrs += HALF
        x_ptrs += BLOCK_K * stride_xk
    if G == 0:
        acc *= tl.load(w_scale_ptr + channel).to(tl.float32)[:, None]
    acc += tl.load(bias_ptr + channel).to(tl.float32)[:, None]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


_SKINNY = ((8, Config(8, 16, 128, 8, 3, split=True)), (16, Config(16, 16, 128, 8, 3, split=True)))
_WIDE = ((128, Config(64, 64, 128, 4, 4)), (256, Config(64, 128, 64, 4, 4)), (inf, Config(128, 128, 64, 8, 4)))
TABLE: Table = {
    80: (
        (8, Config(8, 32, 128, 8, 3, split=True)), (16, Config(16, 16, 128, 8, 3, split=True)), (32, Config(32, 32, 64, 8, 3, split=True)),
        *_WIDE,
    ),
    86: (*_SKINNY, *_WIDE),
    89: (*_SKINNY, *_WIDE),
    90: (
        (8, Config(8, 32, 128, 8, 4, split=True)), (16, Config(16, 32, 128, 8, 3, split=True)), (32, Config(32, 32, 64, 8, 3, split=True)),
        (128, Config(64, 64, 128, 4, 4)), (256, Config(64, 128, 128, 8, 4)), (inf, Config(128, 128, 64, 8, 4)),
    ),
    120: (*_SKINNY, *_WIDE),
}  # fmt: skip
"""README.md has the reasoning."""


def configs(m: int) -> Iterator[Config]:
    """Configurations worth timing for M rows; not each fits into each GPU."""
    if m <= 32:
        for n, k, warps, stages in product((16, 32, 64), (64, 128), (4, 8), (2, 3, 4)):
            yield Config(max(8, triton.next_power_of_2(m)), n, k, warps, stages, split=True)
    for rows_, n, k, warps, stages in product((16, 32, 64, 128, 256), (64, 128), (64, 128), (4, 8), (3, 4)):
        if 8 <= rows_ * n // (warps * 32) <= 128 and rows_ <= max(64, m):
            yield Config(rows_, n, k, warps, stages)


def launch(sizes: ops_gemm.Sizes, dtype: str, arch: int, config: Config | None = None, strides: tuple[int, int] | None = None) -> Launch:
    """The launch for a product.

    Args:
        dtype: `float16` or `bfloat16`.
        config: Taken from `TABLE` unless given; its `k` becomes 64 where that of the table does not divide groups.
        strides: Of x, in elements; by default x is contiguous.

    Raises:
        UsageError: there is no kernel for `dtype`.
    """
    floats = ops.OPERATORS["W4A16Gemm"].floats
    if dtype not in floats:
        raise UsageError(f"w4a16_gemm has no kernel for {dtype}.", expected=" or ".join(floats), hint="use the function's body")
    config = config or pick(TABLE, arch, sizes.m)
    require_rows(config, sizes.m)
    grouped = sizes.g != sizes.k
    block_k = config.k if not grouped or sizes.g % config.k == 0 else 64
    stride_xm, stride_xk = strides or (sizes.k, 1)
    return Launch(
        function=_skinny if config.split else _wide,
        types=(dtype, "uint8", dtype, dtype, dtype),
        scalars={"M": sizes.m, "N": sizes.n, "K": sizes.k, "stride_xm": stride_xm, "stride_xk": stride_xk},
        constants={
            "G": sizes.g if grouped else 0,
            "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": block_k,
            **({"SPLIT": config.warps} if config.split else {"ORDER": 8}),
            "EVEN_K": sizes.k % (block_k * (config.warps if config.split else 1)) == 0, "STAGES": config.stages,
            # the interpreter has no bfloat16 arithmetic and no assembler
            "OPERAND": tl.float16 if dtype == "float16" else tl.float32 if INTERPRETED else tl.bfloat16, "ASM": not INTERPRETED,
        },
        programs=triton.cdiv(sizes.n, config.n) * triton.cdiv(sizes.m, config.m), warps=config.warps, stages=config.stages,
    )  # fmt: skip


def w4a16_gemm(x: torch.Tensor, weight: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor, out: torch.Tensor,
               config: Config | None = None) -> None:  # fmt: skip
    """Write the product into `out`; operands as in `graphq.ops_gemm`, contiguous but for x; out is T `[..., M, N]`. Allocates nothing.

    Raises:
        UsageError: an operand has a wrong shape, type or layout.
    """
    sizes, view = prepare("W4A16Gemm", out, x=x, weight=weight, w_scale=w_scale, bias=bias)
    launch(sizes, str(x.dtype).rpartition(".")[2], arch_of(x), config, view.stride())(view, weight, w_scale, bias, out)
