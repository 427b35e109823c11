"""Element types: which torch type holds the numbers of an ONNX type, and how numbers are rounded to narrow ones.

Floats of any width are computed in one type, the executor's. torch has no unsigned integers beyond 8 bits, and none of fewer than 8:
they are held in the next wider signed type.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from graphq.errors import ModelError
from graphq.ir import DataType

WIDE_FLOATS = frozenset({DataType.FLOAT, DataType.FLOAT16, DataType.BFLOAT16, DataType.DOUBLE})

FLOAT_GRIDS = {
    DataType.FLOAT8E4M3FN: (torch.float8_e4m3fn, 448.0),
    DataType.FLOAT8E4M3FNUZ: (torch.float8_e4m3fnuz, 240.0),
    DataType.FLOAT8E5M2: (torch.float8_e5m2, 57344.0),
    DataType.FLOAT8E5M2FNUZ: (torch.float8_e5m2fnuz, 57344.0),
    DataType.FLOAT4E2M1: (None, 6.0),
}
"""Narrow floats: torch's type, if it rounds to it, and the largest number."""

INTEGERS = {
    DataType.INT2: (-2, 1), DataType.UINT2: (0, 3), DataType.INT4: (-8, 7), DataType.UINT4: (0, 15), DataType.INT8: (-128, 127),
    DataType.UINT8: (0, 255), DataType.INT16: (-(2**15), 2**15 - 1), DataType.UINT16: (0, 2**16 - 1),
    DataType.INT32: (-(2**31), 2**31 - 1), DataType.UINT32: (0, 2**32 - 1), DataType.INT64: (-(2**63), 2**63 - 1),
    DataType.UINT64: (0, 2**63 - 1),
}  # fmt: skip
"""Ranges; that of UINT64 ends where its holder does."""

_HOLDERS = {
    DataType.INT2: torch.int8, DataType.UINT2: torch.uint8, DataType.INT4: torch.int8, DataType.UINT4: torch.uint8,
    DataType.INT8: torch.int8, DataType.UINT8: torch.uint8, DataType.INT16: torch.int16, DataType.UINT16: torch.int32,
    DataType.INT32: torch.int32, DataType.UINT32: torch.int64, DataType.INT64: torch.int64, DataType.UINT64: torch.int64,
    DataType.BOOL: torch.bool, DataType.COMPLEX64: torch.complex64, DataType.COMPLEX128: torch.complex128,
}  # fmt: skip

_NUMPY_HOLDERS = {
    "int4": np.int8, "uint4": np.uint8, "int2": np.int8, "uint2": np.uint8, "uint16": np.int32, "uint32": np.int64, "uint64": np.int64,
}  # fmt: skip


def holder(kind: DataType, dtype: torch.dtype) -> torch.dtype:
    """The torch type that holds numbers of the ONNX type `kind`, where floats are computed in `dtype`."""
    return _HOLDERS.get(kind, dtype)


def to_torch(array: np.ndarray, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """A tensor of the numbers in `array`, floats in `dtype`. It shares memory where nothing needs to change.

    Raises:
        ModelError: the array holds texts.
    """
    if array.dtype.kind in "OSU":
        raise ModelError("A value holds texts, which torch has no tensors of.", expected="numbers", hint="cut the model behind it")
    if array.dtype.kind == "f" or array.dtype.name.startswith(("bfloat", "float")):
        narrow = array.dtype.kind != "f" or array.dtype == np.float16
        array, wanted = array.astype(np.float32) if narrow else array, dtype
    else:
        array = array.astype(_NUMPY_HOLDERS.get(array.dtype.name, array.dtype), copy=False)
        wanted = None
    if not array.flags.writeable or not array.flags.c_contiguous:
        array = array.copy()
    return torch.from_numpy(np.asarray(array)).to(device=device, dtype=wanted)


class _RoundThrough(torch.autograd.Function):
    """Round to the nearest integer, ties to even; its gradient is taken to be 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


class _GridThrough(torch.autograd.Function):
    """Round to a narrow float; its gradient is taken to be 1."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, kind: DataType) -> torch.Tensor:
        return _on_grid(x, kind)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


def round_through(x: torch.Tensor) -> torch.Tensor:
    return _RoundThrough.apply(x)


def round_to(x: torch.Tensor, kind: DataType, *, saturate: bool = True) -> torch.Tensor:
    """Numbers of the narrow float type `kind` nearest to `x`, straight-through; beyond its range the largest, with no gradient.

    Without `saturate`, beyond its range is what the type says: infinite or NaN.
    """
    limit = FLOAT_GRIDS[kind][1]
    return _GridThrough.apply(torch.clamp(x, -limit, limit) if saturate else x, kind)


def _on_grid(x: torch.Tensor, kind: DataType) -> torch.Tensor:
    narrow = FLOAT_GRIDS[kind][0]
    if narrow is not None:
        return x.to(narrow).to(x.dtype)
    size = x.abs()
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0)).to(x.dtype)
    return torch.clamp(torch.round(x / step) * step, -6, 6)


def cast(x: torch.Tensor, kind: DataType, dtype: torch.dtype, *, saturate: bool = True) -> torch.Tensor:
    """`x` as numbers of the ONNX type `kind`: integers wrap, floats lose their fraction.

    Raises:
        ModelError: to or from texts.
    """
    if kind in WIDE_FLOATS:
        return x.to(dtype)
    if kind in FLOAT_GRIDS:
        return round_to(x.to(dtype), kind, saturate=saturate)
    if kind == DataType.BOOL:
        return x != 0
    if kind not in _HOLDERS:
        raise ModelError(f"Numbers cannot be cast to {kind.name} on torch.", expected="floats, integers, booleans")
    if kind in (DataType.COMPLEX64, DataType.COMPLEX128):
        return x.to(_HOLDERS[kind])
    low, high = INTEGERS[kind]
    if x.is_floating_point() and kind not in (DataType.INT64, DataType.INT32):
        x = x.to(torch.int64)
    if kind in (DataType.UINT16, DataType.UINT32, DataType.UINT4, DataType.UINT2):
        x = x.to(torch.int64) & high
    elif kind in (DataType.INT4, DataType.INT2):
        x = ((x.to(torch.int64) & (high - low)) ^ -low) + low
    return x.to(_HOLDERS[kind])


