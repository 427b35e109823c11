"""W8A8Gemm: `(x @ codes) * (x_scale * w_scale) + bias`, int8 by int8 into int32, rescaled to floats before it is written.

Two kernels: for few rows of x the weight's bytes are what costs, and `_skinny` reads each once, with many in flight; beyond, tensor
cores are, which `_wide` keeps busy.

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

from .._launch import Config, Launch, Table, arch_of, pick, prepare, require_rows

if TYPE_CHECKING:
    import torch


@triton.jit
def _skinny(  # type: ignore[no-untyped-def]
    # pointers: x int8 [M, K], weight int8 [N, K], x_scale [M or 1], w_scale [N], bias [N], out [M, N]
    x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr,
    # sizes
    M, N, K,
    # strides of x, and that of x_scale: 1, or 0 for one scale for all rows
    stride_xm, stride_xk, stride_sm,
    # meta-parameters: a program makes BLOCK_N channels of BLOCK_M >= M rows, each of SPLIT warps from every SPLIT-th block of BLOCK_K
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT: tl.constexpr,
    DOTS: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    m = tl.arange(0, BLOCK_M)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = n % N  # beyond the last, channels are computed again and not stored
    k = tl.arange(0, SPLIT)[:, None] * BLOCK_K + tl.arange(0, BLOCK_K // DOTS)[None, :]
    weight_ptrs = weight_ptr + channel.to(tl.int64)[None, :, None] * K + k[:, None, :]
    x_ptrs = x_ptr + m[None, None, :] * stride_xm + k[:, :, None] * stride_xk
    acc = tl.zeros((SPLIT, BLOCK_N, BLOCK_M), tl.int32)
    for start in tl.range(0, K, SPLIT * BLOCK_K, num_stages=STAGES):
        for part in tl.static_range(DOTS):
            at = part * (BLOCK_K // DOTS)
            if EVEN_K:
                codes = tl.load(weight_ptrs + at)
                x = tl.load(x_ptrs + at * stride_xk, mask=(m < M)[None, None, :], other=0)
            else:
                codes = tl.load(weight_ptrs + at, mask=(k < K - start - at)[:, None, :], other=0)
                x = tl.load(x_ptrs + at * stride_xk, mask=(k < K - start - at)[:, :, None] & (m < M)[None, None, :], other=0)
            acc = tl.dot(codes, x, acc, out_dtype=tl.int32)
        weight_ptrs += SPLIT * BLOCK_K
        x_ptrs += SPLIT * BLOCK_K * stride_xk
    y = tl.sum(acc, axis=0).to(tl.float32)
    x_scale = tl.load(x_scale_ptr + m * stride_sm, mask=m < M, other=0.0)
    y = y * (x_scale[None, :] * tl.load(w_scale_ptr + channel)[:, None]) + tl.load(bias_ptr + channel).to(tl.float32)[:, None]
    tl.store(out_ptr + m[None, :] * N + n[:, None], y.to(out_ptr.dtype.element_ty), mask=(n < N)[:, None] & (m < M)[None, :])


@triton.jit
def _wide(  # type: ignore[no-untyped-def]
    # pointers: x int8 [M, K], weight int8 [N, K], x_scale [M or 1], w_scale [N], bias [N], out [M, N]
    x_ptr, weight_ptr, x_scale_ptr, w_scale_ptr, bias_ptr, out_ptr,
    # sizes
    M, N, K,
    # strides of x, and that of x_scale: 1, or 0 for one scale for all rows
    stride_xm, stride_xk, stride_sm,
    # meta-parameters: a program makes BLOCK_N channels of BLOCK_M rows; ORDER rows of programs go over all channels before the next do
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, ORDER: tl.constexpr,
    DOTS: tl.constexpr, EVEN_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tile_m, tile_n = tl.swizzle2d(tl.program_id(0) // tiles_n, tl.program_id(0) % tiles_n, tiles_m, tiles_n, ORDER)
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row, channel = m % M, n % N  # beyond the last, rows and channels are computed again and not stored
    k = tl.arange(0, BLOCK_K // DOTS)
    x_ptrs = x_ptr + row.to(tl.int64)[:, None] * stride_xm + k[None, :] * stride_xk
    weight_ptrs = weight_ptr + channel.to(tl.int64)[None, :] * K + k[:, None]
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.int32)
    for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
        for part in tl.static_range(DOTS):
            at = part * (BLOCK_K // DOTS)
            if EVEN_K:
                x = tl.load(x_ptrs + at * stride_xk)
                codes = tl.load(weight_ptrs + at)
            else:
                x = tl.load(x_ptrs + at * stride_xk, mask=(k < K - start - at)[None, :], other=0)
                codes = tl.load(weight_ptrs + at, mask=(k < K - start - at)[:, None], other=0)
            acc = tl.dot(x, codes, acc, out_dtype=tl.int32)
        x_ptrs += BLOCK_K * stride_xk
        weight_ptrs += BLOCK_K
    scale = tl.load(x_scale_ptr + row * stride_sm)[:, None] * tl.load(w_scale_ptr + channel)[None, :]
    y = acc.to(tl.float32) * scale + tl.load(bias_ptr + channel).to(tl.float32)[None, :]
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


_SKINNY = ((8, Config(8, 16, 128, 8, 3, split=True)), (16, Config(16, 16, 128, 8, 3, split=True)))
_WIDE = ((128, Config(64, 64, 128, 4, 4)), (256, Config(64, 128, 128, 4, 3)), (inf, Config(128, 128, 128, 8, 3)))
TABLE: Table = {
    80: (*_SKINNY, *_WIDE[:2], (512, Config(128, 128, 128, 8, 3)), (inf, Config(128, 256, 128, 8, 3))),
    86: (*_SKINNY, *_WIDE),
    89: (*_SKINNY, *_WIDE),
    90: (
        (8, Config(8, 16, 128, 8, 4, split=True)), (16, Config(16, 16, 128, 8, 4, split=True)),
        (128, Config(64, 64, 128, 4, 4)), (256, Config(64, 128, 128, 4, 4)), (512, Config(128, 128, 128, 8, 4)),
        (inf, Config(128, 256, 128, 8, 4)),
    ),
    120: (*_SKINNY, *_WIDE),
}  # fmt: skip
"""README.md has the reasoning."""


def configs(m: int) -> Iterator[Config]:
    """Configurations worth timing for M rows; not each fits into each GPU."""
    if m <= 32:
        for n, k, warps, stages in product((16, 32, 64), (64, 128), (4, 8), (2, 3, 4)):
            yield Config(max(8, triton.next_power_of_2(m)), n, k, warps, stages, split=True)
    for rows_, n, k, warps, stages in product((32, 64, 128, 256), (64, 128, 256), (64, 128), (4, 8), (3, 4)):
        if 16 <= rows_ * n // (warps * 32) <= 128 and rows_ <= max(64, m):
            yield Config(rows_, n, k, warps, stages)


def launch(sizes: ops_gemm.Sizes, dtype: str, arch: int, config: Config | None = None, strides: tuple[int, int] | None = None,
           scale_per_row: bool = False) -> Launch:  # fmt: skip
    """The launch for a product.

    Args:
        dtype: Of bias and result.
        config: Taken from `TABLE` unless given.
        strides: Of x, in elements; by default x is contiguous.
        scale_per_row: Whether each row of x has a scale of its own.
    """
    config = config or pick(TABLE, arch, sizes.m)
    require_rows(config, sizes.m)
    stride_xm, stride_xk = strides or (sizes.k, 1)
    return Launch(
        function=_skinny if config.split else _wide,
        types=("int8", "int8", "float32", "float32", dtype, dtype),
        scalars={"M": sizes.m, "N": sizes.n, "K": sizes.k, "stride_xm": stride_xm, "stride_xk": stride_xk, "stride_sm": int(scale_per_row)},
        constants={
            "BLOCK_M": config.m, "BLOCK_N": config.n, "BLOCK_K": config.k,
            **({"SPLIT": config.warps} if config.split else {"ORDER": 8}),
            # Triton prefetches the operands of a loop's only dot on 8.x, which takes int8 apart, byte by byte; of two it does not.
            "DOTS": 1 if arch >= 90 else 2,
            "EVEN_K": sizes.k % (config.k * (config.warps if config.split else 1)) == 0, "STAGES": config.stages,
        },
        programs=triton.cdiv(sizes.n, config.n) * triton.cdiv(sizes.m, config.m), warps=config.warps, stages=config.stages,
    )  # fmt: skip


def w8a8_gemm(x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, w_scale: torch.Tensor, bias: torch.Tensor, out: torch.Tensor,
              config: Config | None = None) -> None:  # fmt: skip
    """Write the product into `out`; operands as in `graphq.ops_gemm`, contiguous but for x; out is T `[..., M, N]`. Allocates nothing.

    Raises:
        UsageError: an operand has a wrong shape, type or layout.
    """
    sizes, view = prepare("W8A8Gemm", out, x=x, weight=weight, x_scale=x_scale, w_scale=w_scale, bias=bias)
    run = launch(sizes, str(bias.dtype).rpartition(".")[2], arch_of(x), config, view.stride(), x_scale.numel() > 1)
    run(view, weight, x_scale, w_scale, bias, out)
