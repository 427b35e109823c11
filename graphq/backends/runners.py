"""Runtimes that run a model, behind one interface.

A runner is a context manager that yields a function; each call of it runs the model once on the same inputs and returns how long
that took, in milliseconds, as exactly as the runtime can tell. Inputs and outputs stay where the runtime computes: on a GPU no copy
from or to the CPU is timed. What has a clock on the GPU (CUDA events) uses it.

ONNX Runtime is what a user gets without options; its TensorRT provider reads its own environment variables, such as
`ORT_TENSORRT_INT8_ENABLE=1`, which quantized models need before TensorRT 11.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from graphq.errors import TargetError

if TYPE_CHECKING:
    import numpy as np

Run = Callable[[], float]
"""Runs the model once; milliseconds that it took."""

CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"


@dataclass(frozen=True)
class Runtime:
    """A way to run models.

    Attributes:
        module: Python module.
        distribution: What brings it.
        provider: Execution provider of ONNX Runtime; empty for a runtime that takes engines.
    """

    module: str
    distribution: str
    provider: str = ""

    @property
    def needs_gpu(self) -> bool:
        return self.provider != CPU

    def is_installed(self) -> bool:
        if find_spec(self.module) is None:
            return False
        return not self.provider or self.provider in import_module(self.module).get_available_providers()


RUNTIMES: Mapping[str, Runtime] = MappingProxyType({
    "onnxruntime": Runtime("onnxruntime", "onnxruntime", CPU),
    "onnxruntime-cuda": Runtime("onnxruntime", "onnxruntime-gpu", CUDA),
    "onnxruntime-tensorrt": Runtime("onnxruntime", "onnxruntime-gpu", TENSORRT),
    "tensorrt": Runtime("tensorrt", "tensorrt"),
    "tensorrt-rtx": Runtime("tensorrt_rtx", "tensorrt-rtx-cu13"),
})  # fmt: skip


def open_runner(name: str, model: Path, feeds: Mapping[str, np.ndarray], threads: int = 0) -> AbstractContextManager[Run]:
    """A runner for `model` on the runtime `name`.

    Args:
        model: An ONNX file; an engine for runtimes that take engines.
        feeds: Array by input name.
        threads: Of a CPU; 0 leaves it to the runtime.
    """
    runtime = RUNTIMES[name]
    if runtime.provider:
        return _onnxruntime(model, feeds, runtime.provider, threads)
    from graphq.backends.engine_runner import engine_runner

    return engine_runner(model, feeds, name)


@contextmanager
def _onnxruntime(model: Path, feeds: Mapping[str, np.ndarray], provider: str, threads: int) -> Iterator[Run]:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    fallbacks = {CPU: [CPU], CUDA: [CUDA, CPU], TENSORRT: [TENSORRT, CUDA, CPU]}
    try:
        session = ort.InferenceSession(str(model), options, providers=fallbacks[provider])
    except Exception as error:  # ORT's own exception types are not public
        raise TargetError("ONNX Runtime cannot load the model.", where=_first_line(error)) from error
    if session.get_providers()[0] != provider:  # it says so on stderr only, and would compute on the CPU
        raise TargetError(f"ONNX Runtime could not start its {provider}.", expected="a GPU, and the CUDA libraries that it was built for")
    call = _on_cpu(session, feeds) if provider == CPU else _on_device(ort, session, feeds, "cuda")

    def run() -> float:
        started = time.perf_counter()
        call()
        return (time.perf_counter() - started) * 1e3

    try:
        run()
    except Exception as error:
        raise TargetError("ONNX Runtime cannot run the model.", where=_first_line(error)) from error
    yield run


def _on_cpu(session: Any, feeds: Mapping[str, np.ndarray]) -> Callable[[], object]:
    read = {entry.name: feeds[entry.name] for entry in session.get_inputs()}
    return lambda: session.run(None, read)


def _on_device(ort: Any, session: Any, feeds: Mapping[str, np.ndarray], device: str) -> Callable[[], object]:
    """A call with inputs and outputs in the memory of `device`; it returns when the device is done."""
    binding = session.io_binding()
    for entry in session.get_inputs():
        binding.bind_ortvalue_input(entry.name, ort.OrtValue.ortvalue_from_numpy(feeds[entry.name], device, 0))
    for entry in session.get_outputs():
        binding.bind_output(entry.name, device)

    def call() -> None:
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()

    return call


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
