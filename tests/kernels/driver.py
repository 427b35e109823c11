"""Launches PTX through CUDA's driver, as TensorRT does: pointers to inputs, scalars, a pointer to the output, and nothing else."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

MAX_DYNAMIC_SHARED_BYTES = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: without it a launch may have 48 KiB."""


def library() -> Any:
    """CUDA's driver with a GPU, or None."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count = ctypes.c_int()
    return cuda if cuda.cuInit(0) == 0 and cuda.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value else None


def arch(cuda: Any) -> int:
    """Compute capability of the first GPU, 90 for 9.0."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    call(cuda.cuDeviceGetAttribute, ctypes.byref(major), 75, 0)
    call(cuda.cuDeviceGetAttribute, ctypes.byref(minor), 76, 0)
    return major.value * 10 + minor.value


def call(function: Any, *arguments: Any) -> None:
    code = function(*arguments)
    assert code == 0, f"{function.__name__} returned {code}"


def launch(cuda: Any, built: Any, inputs: Sequence[np.ndarray], out: np.ndarray) -> np.ndarray:
    """What the kernel `built` (of test_plugins.py) makes of `inputs`, in an array like `out`, whose content the memory has before."""
    context, module, function = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
    call(cuda.cuDevicePrimaryCtxRetain, ctypes.byref(context), 0)
    call(cuda.cuCtxSetCurrent, context)
    call(cuda.cuModuleLoadData, ctypes.byref(module), built.ptx.encode())
    call(cuda.cuModuleGetFunction, ctypes.byref(function), module, built.name.encode())
    call(cuda.cuFuncSetAttribute, function, MAX_DYNAMIC_SHARED_BYTES, built.shared)
    memory = [_copied(cuda, array) for array in (*inputs, out)]
    arguments = [*memory[:-1], *map(ctypes.c_int32, built.scalars), memory[-1]]
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(one) for one in arguments))
    call(cuda.cuLaunchKernel, function, built.grid, 1, 1, built.block, 1, 1, built.shared, None, pointers, None)
    call(cuda.cuCtxSynchronize)
    result = np.empty_like(out)
    call(cuda.cuMemcpyDtoH_v2, result.ctypes.data_as(ctypes.c_void_p), memory[-1], ctypes.c_size_t(result.nbytes))
    for one in memory:
        call(cuda.cuMemFree_v2, one)
    call(cuda.cuModuleUnload, module)
    call(cuda.cuDevicePrimaryCtxRelease_v2, 0)
    return result


def _copied(cuda: Any, array: np.ndarray) -> ctypes.c_uint64:
    """Address of a copy in the GPU's memory."""
    address, data = ctypes.c_uint64(), np.ascontiguousarray(array)
    call(cuda.cuMemAlloc_v2, ctypes.byref(address), ctypes.c_size_t(max(data.nbytes, 1)))
    call(cuda.cuMemcpyHtoD_v2, address, data.ctypes.data_as(ctypes.c_void_p), ctypes.c_size_t(data.nbytes))
    return address
