"""Device code: one folder per kernel, each tested against its numpy reference. Kernels know the core and never a pass."""

CATALOG = {
    "W4A16Gemm": "graphq.kernels.w4a16_gemm.kernel:w4a16_gemm",
    "W8A8Gemm": "graphq.kernels.w8a8_gemm.kernel:w8a8_gemm",
    "W4A8Gemm": "graphq.kernels.w4a8_gemm.kernel:w4a8_gemm",
}
"""Operator of `graphq.ops` -> "module:function" that computes it, imported when asked for."""
