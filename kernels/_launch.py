"""What all matrix kernels share: their configurations, and a launch as a value that can be run, compiled ahead of time or embedded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import triton

from graphq import ops, ops_gemm
from graphq.errors import UsageError

if TYPE_CHECKING:
    import torch

ARCHS = (80, 86, 89, 90, 120)
"""Compute capabilities with configurations of their own; others take those of the next lower one."""

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter, on the CPU: the environment said TRITON_INTERPRET=1 when Triton was imported."""


@dataclass(frozen=True)
class Config:
    """How one kernel cuts its product into programs.

    Attributes:
        m, n, k: Rows, channels and reduction length of one step of a program (of one of its warps, if `split`).
        warps: Warps of a program, 32 threads each.
        stages: Steps whose loads are in flight at a time, plus one.
        split: Each warp takes a part of K for itself; they add up at the end.
    """

    m: int
    n: int
    k: int
    warps: int
    stages: int
    split: bool = False

    def __str__(self) -> str:
        return f"{self.m}x{self.n}x{self.k} w{self.warps} s{self.stages}{' split' if self.split else ''}"


Table = Mapping[int, Sequence[tuple[float, Config]]]
"""By compute capability: up to how many rows of x which configuration is taken, in ascending order."""


def pick(table: Table, arch: int, m: int) -> Config:
    """The configuration for M rows on a GPU of compute capability `arch` (90 is 9.0)."""
    known = max((one for one in table if one <= arch), default=min(table))
    return next(config for limit, config in table[known] if m <= limit)


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that is fixed before it runs.

    Attributes:
        function: The kernel; its parameters are the pointers, the `scalars` and the `constants`, in this order.
        types: Element type of each pointer, as `float16` or `int8`.
        scalars: Values of the integers that the kernel takes.
        constants: Values of its compile-time parameters.
        programs: How many run, in a grid of one dimension: `ceil(N / BLOCK_N) * ceil(M / BLOCK_M)`.
    """

    function: Any
    types: tuple[str, ...]
    scalars: Mapping[str, int]
    constants: Mapping[str, Any]
    programs: int
    warps: int
    stages: int

    def __call__(self, *tensors: torch.Tensor) -> None:
        """Run it on the current stream, in the order of its pointers."""
        options = {"num_warps": self.warps, "num_stages": self.stages, "enable_fp_fusion": True}
        self.function[(self.programs,)](*tensors, *self.scalars.values(), **self.constants, **({} if INTERPRETED else options))


def arch_of(tensor: torch.Tensor) -> int:
    """Compute capability of the GPU that holds `tensor`; the interpreter takes the configurations of 9.0."""
    if tensor.is_cuda:
        import torch

        major, minor = torch.cuda.get_device_capability(tensor.device)
        return major * 10 + minor
    return 90


def prepare(name: str, out: torch.Tensor, **operands: torch.Tensor) -> tuple[ops_gemm.Sizes, torch.Tensor]:
    """The sizes of a product and x as `[M, K]`, without a copy, once all tensors are known to be what the kernels of operator `name` take.

    Raises:
        UsageError: a tensor has a wrong shape, type or layout in memory, or lies on another device.
    """
    shape, dtype = ops.check(name, operands)
    require_memory(name, out, shape, f"torch.{dtype}", operands, strided="x")
    x, sizes = operands["x"], ops_gemm.sizes(operands)
    try:
        return sizes, x.view(-1, sizes.k)
    except RuntimeError as error:
        raise UsageError(
            f"{name} takes no x of shape {list(x.shape)} and strides {list(x.stride())}.", expected="rows that are one stride apart",
            hint="call .contiguous() first",
        ) from error  # fmt: skip


def require_memory(name: str, out: torch.Tensor, shape: tuple[int, ...], dtype: str, operands: Mapping[str, torch.Tensor],
                   strided: str = "") -> None:  # fmt: skip
    """Raise UsageError unless `out` has that shape and type, and all tensors but `strided` are contiguous and on one device."""
    if (tuple(out.shape), str(out.dtype)) != (shape, dtype):
        raise UsageError(f"{name} cannot write to {out.dtype} {list(out.shape)}.", expected=f"{dtype} {list(shape)}")
    first, *_ = operands
    for key, tensor in {**operands, "out": out}.items():
        if tensor.device != operands[first].device:
            raise UsageError(f"{name} has {first} on {operands[first].device} and {key} on {tensor.device}.", expected="all on one device")
        if key != strided and not tensor.is_contiguous():
            raise UsageError(f"{name} takes no {key} of strides {list(tensor.stride())}.", hint="call .contiguous() first")


def require_rows(config: Config, m: int) -> None:
    """Raises UsageError if `config` is of the kind that makes all rows at once, and of fewer than M."""
    if config.split and m > config.m:
        raise UsageError(f"The configuration {config} takes at most {config.m} rows, not {m}.")
