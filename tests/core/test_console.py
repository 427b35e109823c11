"""What the summary says once, and what errors tell to do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphq import console, convert, ir
from graphq.errors import ModelError, TargetError
from graphq.executor import Executor
from graphq.models import onnx_path

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def test_passes_that_left_the_same_alone_are_told_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = convert(onnx_path("digits_vit"), tmp_path / "a.onnx", recipe="int8-weight-only", limits={"min_speedup": None})
    one = next(record for record in found.passes if record.skipped)
    console.summary(replace(found, passes=(one, replace(one, name="other"), replace(one, name="third", skipped=one.skipped[:2]))))
    out = capsys.readouterr().out
    assert f"{one.name}, other left {len(one.skipped)} alone:" in out and "third left 2 alone:" in out and out.count("alone:") == 2


def test_a_model_in_half_precision_is_pointed_to_recipes_for_it(tmp_path: Path) -> None:
    model = onnx.parser.parse_model(f"{HEAD} m (float16[n, 8] x) => (float16[n, 8] y) {{ y = MatMul(x, w) }}")
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ones((8, 8), np.float16), "w"))
    onnx.save(model, tmp_path / "half.onnx")
    with pytest.raises(TargetError, match="(?s)FLOAT16.*try:.*fp16"):
        convert(tmp_path / "half.onnx", tmp_path / "a.onnx", recipe="int8-weight-only")


def test_a_sequence_that_is_too_long_is_suspected() -> None:
    model = ir.from_onnx_text(f"{HEAD} m (float[n, t, 2] x) => (float[n, t, 2] y) <float[3, 1] p = {{0, 0, 0}}> {{ y = Add(x, p) }}")
    with pytest.raises(ModelError, match="(?s)try:.*shorter sequences"):
        Executor(model).run({"x": np.zeros((1, 4, 2), np.float32)})
