"""Bits asked for on a node: read back after a file, refused when they make no sense, not an edit of the computation."""

from pathlib import Path

import pytest

from graphq import ir, precision
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.precision import Bits

TEXT = '<ir_version: 10, opset_import: ["" : 21]> g (float[1,2] x) => (float[1,2] y) { y = Relu(x) }'
DEFAULT = Bits(8, 8)


@pytest.mark.parametrize("bits", [Bits(4, 8), Bits(None, 6), Bits(3, None), Bits(None, None)])
def test_asked_bits_survive_a_file(bits: Bits, tmp_path: Path) -> None:
    model = ir.from_onnx_text(TEXT)
    precision.ask(Editor(model), next(iter(model.graph)), bits)
    ir.save(model, tmp_path / "m.onnx")
    assert precision.asked(next(iter(ir.load(tmp_path / "m.onnx").graph)), DEFAULT) == bits


def test_a_node_nobody_asked_for_gets_the_default() -> None:
    assert precision.asked(next(iter(ir.from_onnx_text(TEXT).graph)), DEFAULT) == DEFAULT


def test_asking_is_counted_but_keeps_statistics_valid() -> None:
    model = ir.from_onnx_text(TEXT)
    edit = Editor(model)
    precision.ask(edit, next(iter(model.graph)), DEFAULT)
    assert edit.edits["annotate"] == 1 and edit.version == 0


@pytest.mark.parametrize("text", ["", "w4", "wx a8", "4 8 8"])
def test_an_entry_of_somebody_else_is_refused(text: str) -> None:
    node = next(iter(ir.from_onnx_text(TEXT).graph))
    node.metadata_props[precision.KEY] = text
    with pytest.raises(ModelError, match="cannot be read"):
        precision.asked(node, DEFAULT)
