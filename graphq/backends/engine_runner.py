"""Engines of TensorRT and TensorRT-RTX, run on the first GPU and timed by CUDA events, through the Python API of both packages.

Written against the documented API (`deserialize_cuda_engine`, named tensors, `execute_async_v3`); the names are checked against
TensorRT-RTX 1.7 and the order of calls against a stand-in, but no engine has been run with it on a GPU yet.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from graphq.backends.cuda import Cuda
from graphq.backends.runners import RUNTIMES, Run
from graphq.backends.tensorrt_log import log_of
from graphq.errors import TargetError

Feeds = Mapping[str, np.ndarray]


class EngineExecutor:
    """A serialized engine, loaded on the first GPU; runs as `graphq.executor.Executor` does.

    Raises:
        TargetError: there is no GPU, or the engine is not for this GPU or this version.
    """

    def __init__(self, engine: Path, name: str) -> None:
        self.name, self.cuda, self.trt = name, Cuda(), import_module(RUNTIMES[name].module)
        self.log = log_of(self.trt)
        self._runtime = self.trt.Runtime(self.log)
        self.engine: Any = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        self.context: Any = self.engine.create_execution_context() if self.engine is not None else None
        if self.context is None:
            raise TargetError(
                f"{name} cannot load the engine.", where=self.log.last_error, expected="one that this version wrote for this GPU",
                hint="build it again on this machine",
            )  # fmt: skip
        self.stream, self.start, self.end = self.cuda.stream(), self.cuda.event(), self.cuda.event()
        names = [self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)]
        is_input = {tensor: self.engine.get_tensor_mode(tensor) == self.trt.TensorIOMode.INPUT for tensor in names}
        self.inputs, self.outputs = ([tensor for tensor in names if is_input[tensor] == kind] for kind in (True, False))

    def run(self, feeds: Feeds) -> list[np.ndarray]:
        """The outputs for `feeds`, in the order of the engine.

        Raises:
            TargetError: its profile does not admit the feeds, or it fails.
        """
        with self.bound(feeds) as arrays:
            self.execute()
            return arrays()

    def execute(self) -> float:
        """Run once on what is bound; milliseconds between two events around it."""
        self.cuda.record(self.start, self.stream)
        if not self.context.execute_async_v3(self.stream.value):
            raise TargetError(f"{self.name} cannot run the engine.", where=self.log.last_error)
        self.cuda.record(self.end, self.stream)
        return self.cuda.milliseconds(self.start, self.end)

    @contextmanager
    def bound(self, feeds: Feeds) -> Iterator[Any]:
        """Give every input its array and every output room; yields a function that reads the outputs."""
        taken: list[int] = []
        kept = [self._bind_input(name, feeds[name], taken) for name in self.inputs]  # shapes on the CPU must outlive the run
        made = {name: self._bind_output(name, taken) for name in self.outputs}

        def arrays() -> list[np.ndarray]:
            for array, address in made.values():
                if address:
                    self.cuda.download(address, array)
            return [array for array, _ in made.values()]

        yield arrays
        kept.clear()
        for address in taken:
            self.cuda.free(address)

    def _bind_input(self, name: str, array: np.ndarray, taken: list[int]) -> np.ndarray:
        array = np.ascontiguousarray(array, self.trt.nptype(self.engine.get_tensor_dtype(name)))
        if not self.context.set_input_shape(name, array.shape):
            low, _, high = (tuple(shape) for shape in self.engine.get_tensor_profile_shape(name, 0))
            raise TargetError(f"The engine takes input {name!r} from {low} to {high} only.", where=f"it is {array.shape}",
                              hint="choose another --batch, or build the engine for it")  # fmt: skip
        if not self._is_on_cpu(name):
            taken.append(self.cuda.upload(array))
        self.context.set_tensor_address(name, array.ctypes.data if self._is_on_cpu(name) else taken[-1])
        return array

    def _bind_output(self, name: str, taken: list[int]) -> tuple[np.ndarray, int]:
        """Room for output `name`, and its address on the GPU; 0 if it comes out on the CPU."""
        shape = tuple(self.context.get_tensor_shape(name))
        if min(shape, default=0) < 0:
            raise TargetError(f"The size of output {name!r} depends on the data.", where=str(shape), expected="sizes known in advance")
        array, address = np.empty(shape, self.trt.nptype(self.engine.get_tensor_dtype(name))), 0
        if not self._is_on_cpu(name):
            address = self.cuda.allocate(math.prod(shape) * array.itemsize)
            taken.append(address)
        self.context.set_tensor_address(name, address or array.ctypes.data)
        return array, address

    def _is_on_cpu(self, name: str) -> bool:
        return bool(self.engine.get_tensor_location(name) == self.trt.TensorLocation.HOST)


@contextmanager
def engine_runner(engine: Path, feeds: Feeds, name: str) -> Iterator[Run]:
    """A runner (see `graphq.backends.runners`) for a serialized engine on the first GPU.

    Raises:
        TargetError: as `EngineExecutor`.
    """
    executor = EngineExecutor(engine, name)
    with executor.bound(feeds):
        executor.execute()
        yield executor.execute
