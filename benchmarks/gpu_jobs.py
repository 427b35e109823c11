"""Parts of `gpu.py` that get a process of their own, because they may take it down: PTX through CUDA's driver, and TensorRT-RTX.

    gpu_jobs.py plugins             every kernel's PTX as plugins embed it: compiled, launched where there is a GPU, compared
    gpu_jobs.py engine MODEL.onnx   an engine of the model: built, loaded, run where there is a GPU, compared with ONNX Runtime
    gpu_jobs.py warm OPERATOR ...   compile configurations into Triton's cache, for `--tune`; reads them from stdin

Each prints one line of JSON.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_ARCH = 90
"""Compiled for where there is no GPU."""
TOLERANCE = {"float16": 2.0**-9, "bfloat16": 2.0**-6, "float32": 2.0**-18}
OTHER_CODES = 1e-3
DTYPES = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float32": np.float32, "int8": np.int8, "uint8": np.uint8}


# ---- PTX of the plugins ---------------------------------------------------------------------------------------------


def driver() -> ModuleType:
    """The launcher that the tests use: `tests/kernels/driver.py`."""
    spec = importlib.util.spec_from_file_location("driver", ROOT / "tests" / "kernels" / "driver.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def launches(arch: int) -> dict[str, tuple[Any, dict[str, np.ndarray], tuple[int, ...]]]:
    """By operator: a launch as its plugin makes it for a fixed shape, operands, shape of the result."""
    from graphq import ops_gemm, ops_softmax
    from graphq.kernels.sulq_softmax.kernel import attention_launch, softmax_launch
    from graphq.kernels.w4a8_gemm.kernel import launch as w4a8_launch
    from graphq.kernels.w4a16_gemm.kernel import launch as w4a16_launch
    from graphq.kernels.w8a8_gemm.kernel import launch as w8a8_launch
    from graphq.log_quantizers import LogUniform

    rng, half = np.random.default_rng(0), np.float16
    m, k, n, g = 40, 1024, 264, 128
    quantizer = LogUniform(4)
    fitted = quantizer.fit(np.geomspace(1e-3, 1, 100, dtype=np.float32))
    bias, packed = rng.standard_normal(n).astype(half), rng.integers(0, 256, (n, ops_gemm.packed_width(k)), dtype=np.uint8)
    scale = rng.uniform(0.5, 1.5, (k // g, n)).astype(np.float32) / np.float32(8 * np.sqrt(k))
    codes, rows = rng.integers(-128, 128, (n, k), dtype=np.int8), rng.integers(-128, 128, (m, k), dtype=np.int8)
    x_scale, x = np.float32(1 / 64).reshape(()), rng.standard_normal((m, k)).astype(half)
    scores, params = 3 * rng.standard_normal((6, 197, 197)).astype(half), ops_softmax.softmax_params(quantizer, fitted)
    levels, v = ops_softmax.code_levels(quantizer, fitted), rng.standard_normal((6, 197, 64)).astype(half)
    nibbles = rng.integers(-128, 128, (6, 197, 99), dtype=np.int8)
    grouped, whole = ops_gemm.Sizes(m, k, n, g), ops_gemm.Sizes(m, k, n, k)
    return {
        "W4A16Gemm": (w4a16_launch(grouped, "float16", arch),
                      {"x": x, "weight": packed, "w_scale": scale.astype(half), "bias": bias}, (m, n)),
        "W8A8Gemm": (w8a8_launch(whole, "float16", arch),
                     {"x": rows, "weight": codes, "x_scale": x_scale, "w_scale": scale[0] / 16, "bias": bias}, (m, n)),
        "W4A8Gemm": (w4a8_launch(grouped, "float16", arch),
                     {"x": rows, "weight": packed, "x_scale": x_scale, "w_scale": scale, "bias": bias}, (m, n)),
        "SULQSoftmax": (softmax_launch(6 * 197, 197, "float16", False), {"x": scores, "params": params}, scores.shape),
        "SULQSoftmaxCodes": (softmax_launch(6 * 197, 197, "float16", True), {"x": scores, "params": params}, nibbles.shape),
        "SULQAttentionValue": (attention_launch(6, 197, 197, 64, "float16"), {"packed": nibbles, "levels": levels, "v": v}, v.shape),
    }  # fmt: skip


def plugins() -> list[dict[str, Any]]:
    """One record of each operator: what its PTX is, whether it ran, how far its result is from the numpy reference."""
    from graphq import ops

    cuda = driver().library()
    arch, records = driver().arch(cuda) if cuda else DEFAULT_ARCH, []
    for name, (launch, operands, shape) in launches(arch).items():
        record: dict[str, Any] = {"operator": name, "arch": arch, "launched": cuda is not None}
        contract = ops.OPERATORS[name]
        try:
            built = as_plugin(launch, arch)
            record |= {"ptx_bytes": len(built.ptx), "programs": built.grid, "threads": built.block, "shared_bytes": built.shared}
            if cuda:
                out = np.full(shape, 85, DTYPES[launch.types[-1]])
                found = driver().launch(cuda, built, list(operands.values()), out)
                record |= compared(name, launch.types[-1], found, contract.reference(**operands))
        except Exception as error:  # one that fails must not hide the others
            record["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        records.append(record)
    return records


def as_plugin(launch: Any, arch: int) -> SimpleNamespace:
    """What an engine of fixed shapes holds, in the form that the driver's launcher takes."""
    from graphq.kernels._compile import compile_launch
    from graphq.kernels._plugin import arranged

    made = compile_launch(launch, arch)
    return SimpleNamespace(name=made.name, ptx=arranged(made, len(launch.types)), scalars=[launch.scalars[key] for key in made.scalars],
                           grid=launch.programs, block=made.threads, shared=made.shared_bytes)  # fmt: skip


def compared(name: str, dtype: str, found: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    """Largest error as a share of the largest entry, or how many codes differ; and whether that is rounding."""
    from graphq.ops_softmax import unpack_codes

    if name == "SULQSoftmaxCodes":
        apart = np.abs(unpack_codes(found).astype(int) - unpack_codes(expected))
        return {"other_codes": float(apart.mean()), "agrees": bool(apart.max() <= 1 and apart.mean() <= OTHER_CODES)}
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64)) / np.abs(expected.astype(np.float64)).max()
    off = float(np.mean(~(error <= TOLERANCE[dtype])))
    return {"largest_error": float(error.max()), "off": off, "agrees": off <= (OTHER_CODES if name == "SULQSoftmax" else 0)}


# ---- TensorRT-RTX ---------------------------------------------------------------------------------------------------


def engine(path: str) -> dict[str, Any]:
    """How far an engine of the model comes on this machine, step by step, with the error that stopped it."""
    record: dict[str, Any] = {"package": importlib.metadata.version("tensorrt-rtx-cu13"), "model": Path(path).name, "done": []}
    try:
        _engine(Path(path), record)
    except Exception as error:
        record["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:600]
    return record


def _engine(path: Path, record: dict[str, Any]) -> None:
    import onnxruntime as ort

    from graphq.backends import tensorrt
    from graphq.backends.engine_runner import EngineExecutor
    from graphq.targets import get_target

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {one.name: rng.random([size if isinstance(size, int) else 1 for size in one.shape], np.float32) for one in session.get_inputs()}
    started = time.perf_counter()
    built = tensorrt.build(path, {name: feed.shape for name, feed in feeds.items()}, get_target("tensorrt-rtx"))
    record["build_s"] = time.perf_counter() - started
    record["done"].append("built")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.engine"
        file.write_bytes(built.engine)
        executor = EngineExecutor(file, "tensorrt-rtx")
    record["done"].append("loaded")
    found = executor.run(feeds)
    record["done"].append("ran")
    expected = session.run(executor.outputs, feeds)
    scale = max(float(np.abs(array).max()) for array in expected)
    record["difference"] = max(float(np.abs(ours - array).max()) for ours, array in zip(found, expected, strict=True)) / scale


# ---- Triton's cache -------------------------------------------------------------------------------------------------


def warm() -> int:
    """Compile launches for the GPU at hand, as many at a time as there are cores; they end in Triton's cache on disk.

    Reads (operator, M, K, N, G, type, index of the configuration) from stdin.
    """
    import os
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    wanted = json.load(sys.stdin)
    with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        return sum(pool.map(warm_one, wanted, chunksize=4))


def warm_one(wanted: tuple[str, int, int, int, int, str, int]) -> int:
    """1 if it compiled."""
    import torch

    from graphq import ops_gemm
    from graphq.kernels import CATALOG

    operator, m, k, n, g, dtype, index = wanted
    module = importlib.import_module(CATALOG[operator].partition(":")[0])
    major, minor = torch.cuda.get_device_capability()
    try:
        config = list(module.configs(m))[index]
        launch = module.launch(ops_gemm.Sizes(m, k, n, g), dtype, major * 10 + minor, config)
        launch.function.warmup(*(getattr(torch, kind) for kind in launch.types), *launch.scalars.values(), grid=(1,), **launch.constants,
                               num_warps=launch.warps, num_stages=launch.stages, enable_fp_fusion=True)  # fmt: skip
    except Exception:  # does not fit: who times it finds out why
        return 0
    return 1


if __name__ == "__main__":
    job, arguments = sys.argv[1], sys.argv[2:]
    print(json.dumps({"plugins": plugins, "engine": engine, "warm": warm}[job](*arguments)))  # type: ignore[operator]
