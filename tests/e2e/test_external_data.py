"""Models whose weights lie in files of their own: the result stands alone, and nothing of the input is changed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import numpy_helper, parser

from graphq.convert import convert
from graphq.gates import Gates
from graphq.recipe import load_recipe

X = np.random.default_rng(0).standard_normal((32, 64)).astype(np.float32)
PLAIN = """g (float[N, 64] x) => (float[N, 64] y) {
    a = MatMul(x, w1) b = Add(a, b1) r = Gelu(b) c = MatMul(r, w2) d = Mul(c, k) y = Add(d, b2) }"""
BRANCH = """g (float[N, 64] x) => (float[N, 64] y) {
    a = MatMul(x, w1) b = Add(a, b1) m = ReduceMax <keepdims = 0> (b) c = Less(m, k)
    e = If(c) < then_branch = left () => (float[N, 64] p) { p = Add(b, b2) },
                else_branch = right () => (float[N, 64] q) { q = Mul(b, b2) }>
    y = MatMul(e, w2) }"""


def build(text: str, opset: int) -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    proto = parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}]>\n{text}')
    shapes = {"w1": (64, 64), "b1": (64,), "w2": (64, 64), "b2": (64,), "k": ()}
    arrays = {name: (rng.standard_normal(shape) / 4).astype(np.float32) for name, shape in shapes.items()}
    proto.graph.initializer.extend(numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items())
    return proto


def large_only(proto: onnx.ModelProto, path: Path) -> None:
    onnx.save(proto, path, save_as_external_data=True, location="in.data")


def everything(proto: onnx.ModelProto, path: Path) -> None:
    onnx.save(proto, path, save_as_external_data=True, location="in.data", size_threshold=0)


def a_file_each(proto: onnx.ModelProto, path: Path) -> None:
    onnx.save(proto, path, save_as_external_data=True, all_tensors_to_one_file=False, size_threshold=0)


def by_onnx_ir(proto: onnx.ModelProto, path: Path) -> None:
    onnx_ir.save(onnx_ir.from_proto(proto), path, external_data="in.data", size_threshold_bytes=0)


def constants(proto: onnx.ModelProto, path: Path) -> None:
    """Weights as attributes of Constant nodes, in a file like the others."""
    nodes = [onnx.helper.make_node("Constant", [], [tensor.name], value=tensor) for tensor in proto.graph.initializer]
    del proto.graph.initializer[:]
    for node in reversed(nodes):
        proto.graph.node.insert(0, node)
    onnx.save(proto, path, save_as_external_data=True, location="in.data", size_threshold=0, convert_attribute=True)


def run(path: Path) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, {"x": X})[0].astype(np.float64)


@pytest.mark.parametrize("recipe", ["int8", "int8-weight-only"])
@pytest.mark.parametrize("opset", [17, 21])
@pytest.mark.parametrize("write", [large_only, everything, a_file_each, by_onnx_ir, constants])
@pytest.mark.parametrize("text", [PLAIN, BRANCH], ids=["plain", "branch"])
def test_the_result_needs_nothing_of_the_input(
    tmp_path: Path, text: str, write: Callable[[onnx.ModelProto, Path], None], opset: int, recipe: str
) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    before.mkdir()
    after.mkdir()
    write(build(text.replace("Gelu", "Gelu" if opset > 19 else "Tanh"), opset), before / "in.onnx")
    files = {file.name: file.read_bytes() for file in before.iterdir()}
    assert len(files) >= 2
    reference = run(before / "in.onnx")
    plan = replace(load_recipe(recipe), gates=Gates(max_size_ratio=100))
    convert(before / "in.onnx", after / "out.onnx", recipe=plan, calib={"x": X})
    assert {file.name: file.read_bytes() for file in before.iterdir()} == files
    assert [file.name for file in after.iterdir()] == ["out.onnx"]
    shutil.rmtree(before)
    moved = shutil.move(after / "out.onnx", tmp_path / "moved.onnx")
    proto = onnx.load(moved, load_external_data=False)
    assert all(tensor.data_location != onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)
    assert np.sum(reference**2) > 100 * np.sum((reference - run(moved)) ** 2)
