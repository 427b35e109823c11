"""Convert one model with one tool in this process and print what it took as one line of JSON.

    convert.py TOOL MODEL.onnx OUT.onnx CALIB.npz

Run with the interpreter of the tool's environment. A tool is a row of `TOOLS`; its function imports the tool and
returns the conversion, so that the clock starts after the imports. Stdout carries the JSON only, stderr all else.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Convert = Callable[[str, str, str], str]  # (model, out, calibration npz) -> remark
REPORTED = ("graphq", "nncf", "nvidia-modelopt", "onnxsim", "onnxruntime", "onnx", "numpy", "torch")


@dataclass(frozen=True)
class Tool:
    env: str | None  # requirements peers/<env>.txt, environment .envs/<env>; None: the interpreter that runs peers.py
    load: Callable[[], Convert]
    about: str
    bits: int = 8


def _batches(path: str, size: int = 8) -> Iterator[dict[str, Any]]:
    """Calibration arrays in batches of `size`, dicts by input name."""
    import numpy as np

    with np.load(path) as pack:
        arrays = {name: pack[name] for name in pack.files}
    count = len(next(iter(arrays.values())))
    for start in range(0, count, size):
        yield {name: array[start : start + size] for name, array in arrays.items()}


def load_graphq(target: str = "onnxruntime") -> Convert:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import onnxruntime  # type: ignore[import-untyped, unused-ignore]  # noqa: F401  (graphq imports what it needs late)
    import onnxscript.version_converter  # noqa: F401

    import graphq  # type: ignore[import-not-found, import-untyped, unused-ignore]

    graphq.load_recipe("int8")  # which imports its passes

    def convert(model: str, out: str, calib: str) -> str:
        graphq.convert(model, out, recipe="int8", calib=calib, target=target)
        return ""

    return convert


def load_ort(op_types: tuple[str, ...] = ()) -> Convert:
    from onnxruntime.quantization import (  # type: ignore[import-untyped, unused-ignore]
        CalibrationDataReader,
        QuantType,
        quantize_static,
    )
    from onnxruntime.quantization.shape_inference import quant_pre_process  # type: ignore[import-untyped, unused-ignore]

    class Reader(CalibrationDataReader):  # type: ignore[misc, unused-ignore]
        def __init__(self, path: str) -> None:
            self.batches = _batches(path)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.batches, None)

    def prepare(model: str, out: str) -> str:
        """Shape inference and fusion as ORT's guide asks; its symbolic inference refuses some models."""
        try:
            quant_pre_process(model, out)
            return ""
        except Exception:
            quant_pre_process(model, out, skip_symbolic_shape=True)
            return "without symbolic shapes"

    def convert(model: str, out: str, calib: str) -> str:
        prepared = out + ".prepared.onnx"
        remark = prepare(model, prepared)
        int8 = QuantType.QInt8
        quantize_static(
            prepared,
            out,
            Reader(calib),
            per_channel=True,
            activation_type=int8,
            weight_type=int8,
            op_types_to_quantize=list(op_types) or None,
        )
        return remark

    return convert


def load_nncf(transformer: bool = False) -> Convert:
    import nncf  # type: ignore[import-not-found, unused-ignore]
    import onnx
    import onnxruntime  # noqa: F401

    def convert(model: str, out: str, calib: str) -> str:
        data = nncf.Dataset(list(_batches(calib)))
        model_type = nncf.ModelType.TRANSFORMER if transformer else None
        onnx.save(nncf.quantize(onnx.load(model), data, model_type=model_type), out)
        return ""

    return convert


def load_onnxsim() -> Convert:
    import onnx
    import onnxruntime  # noqa: F401
    import onnxsim  # type: ignore[import-not-found, unused-ignore]

    def convert(model: str, out: str, calib: str) -> str:
        onnx.save(onnxsim.quantize_static(model, list(_batches(calib)), method="minmax"), out)
        return ""

    return convert


def load_modelopt(mode: str = "int8", method: str = "max") -> Convert:
    from modelopt.onnx.quantization import quantize  # type: ignore[import-not-found, unused-ignore]

    def convert(model: str, out: str, calib: str) -> str:
        quantize(
            model,
            quantize_mode=mode,
            calibration_data=next(_batches(calib, sys.maxsize)),
            calibration_method=method,
            calibration_eps=["cpu"],
            high_precision_dtype="fp32",
            output_path=out,
        )
        return ""

    return convert


LINEAR = functools.partial(load_ort, ("MatMul", "Gemm", "Conv"))
TOOLS = {
    "graphq": Tool(None, load_graphq, "graphq.convert, recipe int8"),
    "graphq-rtx": Tool(None, functools.partial(load_graphq, "tensorrt-rtx"), "the same, target tensorrt-rtx"),
    "ort": Tool("ort", load_ort, "quant_pre_process, quantize_static: QDQ, S8S8, per channel, min-max"),
    "ort-linear": Tool("ort", LINEAR, "the same, only MatMul, Gemm and Conv"),
    "nncf": Tool("nncf", load_nncf, "nncf.quantize"),
    "nncf-transformer": Tool("nncf", functools.partial(load_nncf, True), "nncf.quantize, model_type=TRANSFORMER"),
    "onnxsim": Tool("onnxsim", load_onnxsim, "onnxsim.quantize_static, min-max"),
    "modelopt": Tool("modelopt", load_modelopt, "modelopt.onnx quantize: int8, max, CPU, the rest fp32"),
    "modelopt-int4": Tool(
        "modelopt", functools.partial(load_modelopt, "int4", "awq_clip"), "modelopt.onnx quantize: int4, awq_clip, groups of 128", 4
    ),
}


def _versions() -> dict[str, str]:
    found = {}
    for name in REPORTED:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def run(tool: str, model: str, out: str, calib: str) -> dict[str, Any]:
    """The JSON of one conversion: seconds without and of the imports, peak RSS in MB (imports included), versions."""
    result: dict[str, Any] = {"tool": tool, "versions": _versions()}
    start = time.perf_counter()
    try:
        convert = TOOLS[tool].load()
        ready = time.perf_counter()
        result["remark"] = convert(model, out, calib)
    except Exception as error:
        traceback.print_exc()
        return result | {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
    result |= {"import_s": ready - start, "convert_s": time.perf_counter() - ready}
    return result | {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # tools print to stdout
    print(json.dumps(run(*sys.argv[1:5])), file=answer)


if __name__ == "__main__":
    main()
