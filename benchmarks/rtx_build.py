"""Build a model with TensorRT for RTX, without a GPU, and print the verdict as one line of JSON.

    rtx_build.py MODEL.onnx CALIB.npz

The file goes to graphq's own builder as it is: strongly typed, so precision is what the file says. Open axes take the shape of
the calibration arrays, the first of them being the batch (graphq/backends/engine_shapes.py has the ranges).
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from pathlib import Path

import numpy as np

from graphq.backends import tensorrt
from graphq.errors import TargetError
from graphq.targets import get_target

PACKAGE = "tensorrt_rtx_cu13"


def verdict(path: Path, shapes: dict[str, tuple[int, ...]]) -> tuple[bool, str]:
    """Whether an engine is built, and if not, why."""
    try:
        tensorrt.build(path, shapes, get_target("tensorrt-rtx"))
    except TargetError as error:
        return False, f"{error.what.split()[1]}, {error.where}"
    return True, ""


if __name__ == "__main__":
    with np.load(sys.argv[2]) as pack:
        builds, reason = verdict(Path(sys.argv[1]), {name: pack[name].shape for name in pack.files})
    builder = f"TensorRT-RTX {importlib.metadata.version(PACKAGE)} for compute capability 8.0 and later"
    print(json.dumps({"builds": builds, "reason": " ".join(reason.split()), "builder": builder}))
