"""Build a model with TensorRT for RTX, without a GPU, and print the verdict as one line of JSON.

    rtx_build.py MODEL.onnx CALIB.npz

The network is strongly typed, so precision is what the file says. Dynamic axes take the shape of the calibration
arrays, the first of them being the batch, 1 to 8.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import numpy as np
import tensorrt_rtx as trt  # type: ignore[import-untyped, unused-ignore]

TARGET = trt.ComputeCapability.SM89
PREAMBLE = re.compile(r".*API Usage Error \((\S+: )?|Assertion failed: \S+ ", re.DOTALL)  # before the parser's cause


class Log(trt.ILogger):  # type: ignore[misc]
    """Keeps the error messages; the builder has no other way to say why it failed."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
            self.errors.append(message)


def add_profile(builder: Any, config: Any, network: Any, shapes: dict[str, tuple[int, ...]]) -> None:
    profile = builder.create_optimization_profile()
    for i in range(network.num_inputs):
        tensor = network.get_input(i)
        tail = shapes[tensor.name][1:]
        profile.set_shape(tensor.name, (1, *tail), (8, *tail), (8, *tail))
    config.add_optimization_profile(profile)


def build(path: str, shapes: dict[str, tuple[int, ...]]) -> tuple[bool, str]:
    log = Log()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(TARGET, 0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(path):
        error = parser.get_error(0)
        cause = PREAMBLE.sub("", error.desc()).split(". ")[0]
        return False, f"parser, {error.node_operator()} {error.node_name()}: {cause}"
    add_profile(builder, config, network, shapes)
    if builder.build_serialized_network(network, config) is None:
        return False, f"builder: {log.errors[0] if log.errors else 'no message'}"
    return True, ""


if __name__ == "__main__":
    with np.load(sys.argv[2]) as pack:
        builds, reason = build(sys.argv[1], {name: pack[name].shape for name in pack.files})
    builder = f"TensorRT-RTX {trt.__version__} for {TARGET.name}"
    print(json.dumps({"builds": builds, "reason": " ".join(reason.split()), "builder": builder}))
