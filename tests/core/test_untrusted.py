"""untrusted: a graph that reads what nothing makes is refused; what tensors claim is tested with `ir.load`."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from graphq import ir
from graphq.errors import ModelError

UNDEFINED = {
    "main graph": "g (float[2] x) => (float[2] y) { y = Add(x, nope) }",
    "subgraph": "g (bool c, float[2] x) => (float[2] y) { y = If(c) <then_branch = t () => (float[2] p) { p = Add(x, nope) }, "
                "else_branch = e () => (float[2] q) { q = Neg(x) }> }",
}  # fmt: skip


@pytest.mark.parametrize("where", UNDEFINED)
def test_a_name_that_nothing_makes(tmp_path: Path, where: str, caplog: pytest.LogCaptureFixture) -> None:
    head = '<ir_version: 10, opset_import: ["" : 21]>'
    onnx.save(onnx.parser.parse_model(f"{head} {UNDEFINED[where]}"), tmp_path / "m.onnx")
    with pytest.raises(ModelError, match="not valid ONNX: nothing makes 'nope'"):
        ir.load(tmp_path / "m.onnx")
    onnx.save(onnx.parser.parse_model(f"{head} {UNDEFINED[where].replace('nope', 'x')}"), tmp_path / "m.onnx")
    assert ir.load(tmp_path / "m.onnx").graph.num_nodes() == 1 and not caplog.records
