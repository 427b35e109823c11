"""Engines of TensorRT and TensorRT-RTX, run and timed by CUDA events through the Python API that both packages share.

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


@contextmanager
def engine_runner(engine: Path, feeds: Mapping[str, np.ndarray], name: str) -> Iterator[Run]:
    """A runner (see `graphq.backends.runners`) for a serialized engine on the first GPU.

    Raises:
        TargetError: there is no GPU, the engine is not for this GPU or this version, or its profile does not admit the feeds.
    """
    cuda, trt = Cuda(), import_module(RUNTIMES[name].module)
    log = log_of(trt)
    runtime = trt.Runtime(log)
    loaded = runtime.deserialize_cuda_engine(engine.read_bytes())
    context = loaded.create_execution_context() if loaded is not None else None
    if context is None:
        raise TargetError(f"{name} cannot load the engine.", where=log.last_error, expected="one that this version wrote for this GPU",
                          hint="build it again on this machine")  # fmt: skip
    kept = _bind(trt, loaded, context, feeds, cuda)
    stream, start, end = cuda.stream(), cuda.event(), cuda.event()

    def run() -> float:
        cuda.record(start, stream)
        if not context.execute_async_v3(stream.value):
            raise TargetError(f"{name} cannot run the engine.", where=log.last_error)
        cuda.record(end, stream)
        return cuda.milliseconds(start, end)

    run()
    yield run
    kept.clear()


def _bind(trt: Any, engine: Any, context: Any, feeds: Mapping[str, np.ndarray], cuda: Cuda) -> list[np.ndarray]:
    """Give every input its array and every output room; the arrays in it must outlive the context."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    kept = []
    for name in [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]:
        array = np.ascontiguousarray(feeds[name], trt.nptype(engine.get_tensor_dtype(name)))
        if not context.set_input_shape(name, array.shape):
            low, _, high = (tuple(shape) for shape in engine.get_tensor_profile_shape(name, 0))
            raise TargetError(f"The engine takes input {name!r} from {low} to {high} only.", where=f"it is {array.shape}",
                              hint="choose another --batch, or build the engine for it")  # fmt: skip
        on_cpu = engine.get_tensor_location(name) == trt.TensorLocation.HOST  # a shape
        kept.append(array)
        context.set_tensor_address(name, array.ctypes.data if on_cpu else cuda.upload(array))
    for name in [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.OUTPUT]:
        shape, item = tuple(context.get_tensor_shape(name)), engine.get_tensor_dtype(name).itemsize
        if min(shape, default=0) < 0:
            raise TargetError(f"The size of output {name!r} depends on the data.", where=str(shape), expected="sizes known in advance")
        if engine.get_tensor_location(name) == trt.TensorLocation.HOST:
            kept.append(np.empty(math.prod(shape) * item, np.uint8))
            context.set_tensor_address(name, kept[-1].ctypes.data)
        else:
            context.set_tensor_address(name, cuda.allocate(math.prod(shape) * item))
    return kept
