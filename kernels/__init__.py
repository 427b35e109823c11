"""Device code: one folder per kernel, each tested against its numpy reference. Kernels know the core and never a pass."""

from __future__ import annotations

import importlib
from functools import cache

CATALOG = {
    "W4A16Gemm": "graphq.kernels.w4a16_gemm.kernel:w4a16_gemm",
    "W8A8Gemm": "graphq.kernels.w8a8_gemm.kernel:w8a8_gemm",
    "W4A8Gemm": "graphq.kernels.w4a8_gemm.kernel:w4a8_gemm",
    "SULQSoftmax": "graphq.kernels.sulq_softmax.kernel:sulq_softmax",
    "SULQSoftmaxCodes": "graphq.kernels.sulq_softmax.kernel:sulq_softmax_codes",
    "SULQAttentionValue": "graphq.kernels.sulq_softmax.kernel:sulq_attention_value",
}
"""Operator of `graphq.ops` -> "module:function" that computes it, imported when asked for."""

PLUGINS = ("sulq_softmax", "w4a16_gemm", "w4a8_gemm", "w8a8_gemm")
"""Folders with a module `plugin`."""


def register_plugins(arch: int | None = None) -> None:
    """Register the plugins of all kernels in TensorRT, for engines that are built in this process; needs torch, Triton and TensorRT.

    Args:
        arch: Compute capability that kernels are compiled for, 90 for 9.0; that of the current GPU unless given.

    Raises:
        UsageError: there is no GPU, and `arch` is not given.
    """
    if arch is None:
        arch = importlib.import_module(f"{__name__}._plugin").device_arch()
    _register(arch)


@cache
def _register(arch: int) -> None:
    """TensorRT takes a name once."""
    for folder in PLUGINS:
        importlib.import_module(f"{__name__}.{folder}.plugin").register(arch)
