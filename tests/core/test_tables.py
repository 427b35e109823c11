"""Embedding tables in what users are told: which are quantized, which stay float and why, and what they weigh."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from graphq import console, convert
from graphq.inspect import inspect
from graphq.models import onnx_path

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
m (int64[n, t] ids) => (float[n, t, 64] y) { e = Gather(large, ids)  s = Gather(small, ids)  h = Add(e, s)  y = MatMul(h, w) }"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    model, rng = onnx.parser.parse_model(MODEL), np.random.default_rng(0)
    for name, shape in {"large": (2048, 64), "small": (512, 64), "w": (64, 64)}.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32), name))
    onnx.save(model, tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize("recipe", ["int8-weight-only", "int4-weight-only"])
def test_tables_count_among_what_is_quantized(path: Path, target: str, recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = convert(path, path.with_name("out.onnx"), recipe=recipe, target=target)
    assert found.quantized == {"Gather (8-bit table)": 1, "MatMul": 1}
    assert found.weight_bytes_before == 4 * (2048 + 64) * 64 and 2048 * 64 < found.weight_bytes_after < (2048 + 64 + 16) * 64
    (skipped,) = [entry for one in found.passes for entry in one.skipped]
    assert "512 rows" in skipped[1] and "1024" in skipped[1]
    before, after = ({node.name: node for node in inspect(file).linear} for file in (path, path.with_name("out.onnx")))
    assert [(before[name].refusal is None, after[name].storage) for name in ("e", "s")] == [(True, "int8"), (False, None)]
    assert "512 rows" in str(before["s"].refusal) and before["e"].weight_shape == (2048, 64)
    console.inspection(inspect(path))
    assert "can be quantized: 1 Gather, 1 MatMul (80.49 % of the parameters)" in capsys.readouterr().out


def test_products_that_decode_a_weight_are_not_quantized_layers(tmp_path: Path) -> None:
    found = convert(onnx_path("digits_lm"), tmp_path / "out.onnx", recipe="w3a16-higgs")
    layers = [node for node in inspect(onnx_path("digits_lm")).linear if node.refusal is None]
    assert found.quantized == {"MatMul": 15} and len(layers) == 15
    assert found.weight_bytes_before == 4 * sum(int(np.prod(node.weight_shape or ())) for node in layers)
