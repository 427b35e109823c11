"""Which layers are for kernels of 2:4 sparse weights: one row for each rule."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import sparse_kernels
from graphq.targets import get_target


def sparse(*shape: int, axis: int, kept: int = 2) -> np.ndarray:
    rows = np.ones((*(size for index, size in enumerate(shape) if index != axis), shape[axis]), np.float32)
    rows[..., np.arange(shape[axis]) % 4 >= kept] = 0
    return np.ascontiguousarray(np.moveaxis(rows, -1, axis))


CASES: dict[str, tuple[str, str, np.ndarray, str | None]] = {
    "MatMul": ("4, 16", "MatMul(x, w)", sparse(16, 8, axis=0), None),
    "Gemm": ("16", "Gemm(x, w)", sparse(16, 8, axis=0), None),
    "transposed Gemm": ("16", "Gemm <transB = 1> (x, w)", sparse(8, 16, axis=1), None),
    "Conv": ("16, 4, 4", "Conv(x, w)", sparse(8, 16, 3, 3, axis=1), None),
    "more zeros": ("4, 16", "MatMul(x, w)", sparse(16, 8, axis=0, kept=1), None),
    "fewer zeros": ("4, 16", "MatMul(x, w)", sparse(16, 8, axis=0, kept=3), "more than two of four"),
    "along the outputs": ("4, 16", "MatMul(x, w)", sparse(16, 16, axis=1), "more than two of four"),
    "outputs": ("4, 16", "MatMul(x, w)", sparse(16, 12, axis=0), "12 outputs and 16 inputs are not multiples of 8 and 16"),
    "inputs": ("8, 4, 4", "Conv(x, w)", sparse(8, 8, 3, 3, axis=1), "8 outputs and 8 inputs are not multiples"),
    "groups": ("32, 4, 4", "Conv <group = 2> (x, w)", sparse(8, 16, 3, 3, axis=1), "grouped"),
}


@pytest.mark.parametrize("case", CASES)
def test_rules(case: str) -> None:
    dims, body, weight, reason = CASES[case]
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\ng (float[N, {dims}] x) => (float[] y) {{ y = {body} }}')
    proto.graph.initializer.append(numpy_helper.from_array(weight, "w"))
    node = next(iter(onnx_ir.from_proto(proto).graph))
    for target in ("tensorrt", "tensorrt-rtx"):
        found = sparse_kernels.obstacle(node, get_target(target))
        assert found is None if reason is None else found is not None and reason in found
    assert sparse_kernels.obstacle(node, get_target("onnxruntime")) == "onnxruntime has none"
