"""Runners: ONNX Runtime's for real; that of engines against stand-ins for the driver and for TensorRT, and names against the real package.

No GPU is needed, so what a GPU would do is not shown here.
"""

import ctypes
import importlib.util
import sys
import types
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphq import ir
from graphq.backends import cuda, engine_check, runners
from graphq.backends.engine_runner import engine_runner
from graphq.calibration import open_calibration
from graphq.engines import EngineFacts
from graphq.errors import TargetError, VerifyError
from graphq.models import onnx_path
from graphq.targets import get_target

CNN = onnx_path("digits_cnn")
FEEDS = {"x": np.arange(6, dtype=np.float32).reshape(2, 3)}


# ---- ONNX Runtime ---------------------------------------------------------------------------------------------------


def test_a_runner_runs_when_it_is_called() -> None:
    with runners.open_runner("onnxruntime", CNN, {"input": np.ones((2, 1, 32, 32), np.float32)}, threads=1) as run:
        assert run() > 0 and run() > 0


def test_faults_are_target_errors(tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"nothing")
    with pytest.raises(TargetError, match="cannot load"), runners.open_runner("onnxruntime", tmp_path / "bad.onnx", {}):
        pass
    with pytest.raises(TargetError, match="cannot run"), runners.open_runner("onnxruntime", CNN, {"input": np.ones((1, 7), np.float32)}):
        pass


@pytest.mark.filterwarnings("ignore:Specified provider")
def test_a_provider_that_does_not_start_is_no_measurement() -> None:
    import onnxruntime

    if runners.CUDA in onnxruntime.get_available_providers():
        pytest.skip("the CUDA provider is installed")
    with pytest.raises(TargetError, match="could not start its CUDAExecutionProvider"), runners.open_runner("onnxruntime-cuda", CNN, {}):
        pass


def test_inputs_and_outputs_bound_to_a_device_give_the_same_as_a_plain_call() -> None:
    """On the CPU, whose provider takes bindings as well; a GPU differs in the name of the device only."""
    import onnxruntime

    session, feeds = onnxruntime.InferenceSession(str(CNN)), {"input": np.random.default_rng(0).random((2, 1, 32, 32), np.float32)}
    bound: list[Any] = []
    make = session.io_binding
    session.io_binding = lambda: bound.append(make()) or bound[-1]
    runners._on_device(onnxruntime, session, feeds, "cpu")()
    assert np.array_equal(bound[0].copy_outputs_to_cpu()[0], session.run(None, feeds)[0])


# ---- engines --------------------------------------------------------------------------------------------------------


class FakeDriver:
    """libcuda with the CPU's memory: allocates, copies, counts events. Every call is noted by name."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.memory: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            return int(getattr(self, f"do_{name}", lambda *rest: 0)(*arguments))

        return call

    def do_cuMemAlloc_v2(self, address: Any, size: Any) -> int:
        self.memory.append(ctypes.create_string_buffer(size.value))
        address._obj.value = ctypes.addressof(self.memory[-1])
        return 0

    def do_cuMemcpyHtoD_v2(self, to: Any, source: Any, size: Any) -> int:
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def do_cuMemcpyDtoH_v2(self, to: Any, source: Any, size: Any) -> int:
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def do_cuStreamCreate(self, stream: Any, flags: Any) -> int:
        stream._obj.value = 77
        return 0

    def do_cuMemGetInfo_v2(self, free: Any, total: Any) -> int:
        free._obj.value, total._obj.value = 10, 100
        return 0

    def do_cuEventElapsedTime(self, elapsed: Any, start: Any, end: Any) -> int:
        elapsed._obj.value = 1.5
        return 0


class FakeContext:
    """Doubles `x` into `y`, from and to the addresses it was given; `takes` tells whether it accepts the shape of `x`."""

    def __init__(self, driver: FakeDriver, takes: bool) -> None:
        self.driver, self.takes, self.shapes, self.addresses = driver, takes, {}, {}  # type: ignore[var-annotated]

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return self.takes

    def set_tensor_address(self, name: str, address: int) -> None:
        self.addresses[name] = address

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return self.shapes["x"]

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 77
        self.driver.calls.append("execute")
        count = int(np.prod(self.shapes["x"]))
        x, y = ((ctypes.c_float * count).from_address(self.addresses[name]) for name in "xy")
        y[:] = [2 * value for value in x]
        return True


def fake_tensorrt(driver: FakeDriver, context: FakeContext | None) -> Any:
    modes = {"x": "input", "y": "output"}
    engine = types.SimpleNamespace(
        num_io_tensors=2, get_tensor_name=lambda index: "yx"[index], get_tensor_mode=modes.__getitem__,
        get_tensor_dtype=lambda name: types.SimpleNamespace(itemsize=4), get_tensor_location=lambda name: "device",
        get_tensor_profile_shape=lambda name, profile: [(1, 3), (1, 3), (1, 3)], create_execution_context=lambda: context,
    )  # fmt: skip

    class Logger:
        ERROR, INTERNAL_ERROR, WARNING = "error", "internal", "warning"

    def make_runtime(log: Any) -> Any:
        log.log("error", "the engine is from another version")
        log.log("warning", "never mind")
        return types.SimpleNamespace(deserialize_cuda_engine=lambda data: engine if context is not None and data == b"engine" else None)

    return types.SimpleNamespace(
        ILogger=Logger, Runtime=make_runtime, nptype=lambda dtype: np.float32,
        TensorIOMode=types.SimpleNamespace(INPUT="input", OUTPUT="output"),
        TensorLocation=types.SimpleNamespace(HOST="host", DEVICE="device"),
    )  # fmt: skip


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    found = FakeDriver()
    monkeypatch.setattr(cuda.ctypes, "CDLL", lambda name: found)
    return found


def test_an_engine_gets_its_inputs_and_is_timed_between_two_events(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = FakeContext(driver, takes=True)
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(driver, context))
    (tmp_path / "m.engine").write_bytes(b"engine")
    with runners.open_runner("tensorrt", tmp_path / "m.engine", FEEDS) as run:
        driver.calls.clear()
        assert run() == 1.5
        assert driver.calls == ["cuEventRecord", "execute", "cuEventRecord", "cuEventSynchronize", "cuEventElapsedTime"]
        assert list((ctypes.c_float * 6).from_address(context.addresses["y"])) == [0, 2, 4, 6, 8, 10]
    assert driver.calls.count("cuMemFree_v2") == 2


@pytest.mark.parametrize(("factor", "limit", "holds"), [
    (2, 50.0, True), (1.9, 50.0, False), (1.9, 20.0, True), (2.6, 5.0, True), (-2, 5.0, False),
])  # fmt: skip
def test_an_engine_is_compared_with_its_model(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, limit: float, holds: bool
) -> None:
    """The engine doubles its input. A model that multiplies by another factor is not what it was built from, beyond the tolerance."""
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(driver, FakeContext(driver, takes=True)))
    (tmp_path / "m.engine").write_bytes(b"engine")
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]> g (float[n, 3] x) => (float[n, 3] y)
        <float factor = {{{factor}}}> {{ y = Mul(x, factor) }}""")
    data = open_calibration({"x": FEEDS["x"]}, ir.inputs(model))
    facts = EngineFacts(1, (), (), None)
    if holds:
        found = engine_check.run(tmp_path / "m.engine", facts, model, get_target("tensorrt"), data, limit)
        with np.errstate(divide="ignore"):
            assert found.sqnr_db["y"] == pytest.approx(20 * np.log10(factor / np.abs(2 - np.float64(factor))), abs=0.1)
        assert not found.not_run
    else:
        with pytest.raises(VerifyError, match="does not compute what its model does"):
            engine_check.run(tmp_path / "m.engine", facts, model, get_target("tensorrt"), data, limit)


def test_an_engine_that_cannot_be_run_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libnothing-of-the-kind.so.1")
    model = ir.from_onnx_text('<ir_version: 10, opset_import: ["" : 21]> g (float[n, 3] x) => (float[n, 3] y) { y = Relu(x) }')
    data = open_calibration({"x": FEEDS["x"]}, ir.inputs(model))
    found = engine_check.run(tmp_path / "m.engine", EngineFacts(1, (), (), None), model, get_target("tensorrt"), data, 30.0)
    assert "no NVIDIA driver" in found.not_run and not found.sqnr_db


@pytest.mark.parametrize(("takes", "words"), [(True, "cannot load the engine"), (False, r"from \(1, 3\) to \(1, 3\) only")])
def test_engines_that_do_not_fit_are_refused(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, takes: bool, words: str
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", fake_tensorrt(driver, None if takes else FakeContext(driver, takes)))
    (tmp_path / "m.engine").write_bytes(b"engine")
    with pytest.raises(TargetError, match=words) as caught, engine_runner(tmp_path / "m.engine", FEEDS, "tensorrt"):
        pass
    assert caught.value.where == ("the engine is from another version" if takes else "it is (2, 3)")


def test_failures_of_the_driver_name_the_call(driver: FakeDriver) -> None:
    assert cuda.Cuda().used_bytes() == 90
    driver.do_cuInit = lambda flags: 100  # type: ignore[attr-defined]
    with pytest.raises(TargetError, match="cuInit") as caught:
        cuda.Cuda()
    assert caught.value.where == "error 100"


def test_without_a_driver_there_is_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libnothing-of-the-kind.so.1")
    with pytest.raises(TargetError, match="no NVIDIA driver") as caught:
        cuda.Cuda()
    assert "libnothing" in caught.value.where and "GPU" in caught.value.expected


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                    reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")  # fmt: skip
def test_the_names_exist_in_the_real_package() -> None:
    trt = import_module("tensorrt_rtx")
    used = {
        trt.Runtime: ["deserialize_cuda_engine"],
        trt.ICudaEngine: ["create_execution_context", "get_tensor_dtype", "get_tensor_location", "get_tensor_mode", "get_tensor_name",
                          "get_tensor_profile_shape", "num_io_tensors"],
        trt.IExecutionContext: ["execute_async_v3", "get_tensor_shape", "set_input_shape", "set_tensor_address"],
    }  # fmt: skip
    assert not [f"{one.__name__}.{name}" for one, names in used.items() for name in names if not hasattr(one, name)]
    assert trt.TensorIOMode.INPUT != trt.TensorIOMode.OUTPUT and trt.TensorLocation.HOST != trt.TensorLocation.DEVICE
    assert trt.float16.itemsize == 2 and trt.nptype(trt.int64) == np.int64


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                    reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")  # fmt: skip
def test_a_worker_builds_a_real_engine_and_says_what_is_refused(tmp_path: Path) -> None:
    from graphq.backends.turns import Worker, WorkerError

    np.savez(tmp_path / "x.npz", x=np.ones((1, 4, 4), np.float32))
    head = '<ir_version: 10, opset_import: ["" : 21]> g (float[n, 4, 4] x)'
    ir.save(ir.from_onnx_text(f"{head} => (float[n, 4, 4] y) {{ y = Relu(x) }}"), tmp_path / "relu.onnx")
    ir.save(ir.from_onnx_text(f"{head} => (float[n] y) {{ y = Det(x) }}"), tmp_path / "det.onnx")
    job = {"runtime": "tensorrt-rtx", "feeds": str(tmp_path / "x.npz"), "inputs": ["x"], "engine": str(tmp_path / "m.engine")}
    with Worker({**job, "model": str(tmp_path / "relu.onnx")}) as worker:
        assert worker.start() == {"built": True}
    assert (tmp_path / "m.engine").read_bytes().startswith(b"vtrt")
    with Worker({**job, "model": str(tmp_path / "det.onnx")}) as worker, pytest.raises(WorkerError, match="parser of tensorrt-rtx.*Det"):
        worker.start()
