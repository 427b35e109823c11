"""The few calls of the CUDA driver that running an engine needs, through ctypes: the driver is there wherever there is a GPU.

Works on the primary context of the first GPU, which is the one that runtimes use. Names are those of the CUDA Driver API.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

from graphq.errors import TargetError

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


class Cuda:
    """The first GPU. What is allocated lives until it is freed, or as long as the process.

    Raises:
        TargetError: there is no driver or no GPU, or a call fails.
    """

    def __init__(self) -> None:
        try:
            self._library: Any = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise TargetError("There is no NVIDIA driver on this machine.", where=str(error), expected="an NVIDIA GPU") from error
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._call("cuInit", ctypes.c_uint(0))
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._call("cuCtxSetCurrent", context)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            raise TargetError(f"The CUDA driver failed in {name}.", where=f"error {code}")

    def used_bytes(self) -> int:
        """Memory of the GPU that is taken, by whomever."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        return total.value - free.value

    def allocate(self, size: int) -> int:
        """Address of `size` bytes on the GPU."""
        address = ctypes.c_uint64()
        self._call("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(max(size, 1)))
        return address.value

    def upload(self, array: np.ndarray) -> int:
        """Address of a copy of `array`, which is contiguous, on the GPU."""
        address = self.allocate(array.nbytes)
        if array.nbytes:
            self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_void_p(array.ctypes.data), ctypes.c_size_t(array.nbytes))
        return address

    def download(self, address: int, array: np.ndarray) -> None:
        """Fill `array`, which is contiguous, from `address` on the GPU."""
        if array.nbytes:
            self._call("cuMemcpyDtoH_v2", ctypes.c_void_p(array.ctypes.data), ctypes.c_uint64(address), ctypes.c_size_t(array.nbytes))

    def free(self, address: int) -> None:
        self._call("cuMemFree_v2", ctypes.c_uint64(address))

    def stream(self) -> ctypes.c_void_p:
        stream = ctypes.c_void_p()
        self._call("cuStreamCreate", ctypes.byref(stream), ctypes.c_uint(1))  # not in step with the default stream
        return stream

    def event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._call("cuEventCreate", ctypes.byref(event), ctypes.c_uint(0))
        return event

    def record(self, event: ctypes.c_void_p, stream: ctypes.c_void_p) -> None:
        self._call("cuEventRecord", event, stream)

    def milliseconds(self, start: ctypes.c_void_p, end: ctypes.c_void_p) -> float:
        """Time between two recorded events, once the GPU has passed the second."""
        elapsed = ctypes.c_float()
        self._call("cuEventSynchronize", end)
        self._call("cuEventElapsedTime", ctypes.byref(elapsed), start, end)
        return elapsed.value
