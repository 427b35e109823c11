"""Models in memory go in and come out as what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

import graphq
from graphq import graphs
from graphq.errors import UsageError
from graphq.models import digits, onnx_path

gs = pytest.importorskip("onnx_graphsurgeon", reason="onnx-graphsurgeon is not installed (pip install graphq[graphsurgeon])")

CALIB = {"input": digits.calibration(16)}


def test_a_proto_comes_back_as_one(tmp_path: Path) -> None:
    """With the same bytes in it as by way of files, but for paths and times in the report."""
    proto = onnx.load(onnx_path("digits_cnn"))
    before = proto.SerializeToString()
    made, report = graphq.convert_graph(proto, recipe="int8-weight-only", calib=CALIB)
    graphq.convert(onnx_path("digits_cnn"), tmp_path / "m.onnx", recipe="int8-weight-only", calib=CALIB)
    assert isinstance(made, onnx.ModelProto) and proto.SerializeToString() == before
    assert made.graph == onnx.load(tmp_path / "m.onnx").graph and report.quantized


def test_a_graph_of_graphsurgeon_comes_back_as_one() -> None:
    graph = gs.import_onnx(onnx.load(onnx_path("digits_vit")))
    nodes = len(graph.nodes)
    made, report = graphq.convert_graph(graph, recipe="int8", calib=CALIB, target="tensorrt-rtx")
    assert isinstance(made, gs.Graph) and len(graph.nodes) == nodes
    assert sum(node.op == "QuantizeLinear" for node in made.nodes) > 10
    inside = {int(codes.dtype == np.int8) for codes in made.tensors().values() if isinstance(codes, gs.Constant)}
    assert inside == {0, 1} and sum(report.quantized.values()) > 20


def test_a_model_too_large_for_protobuf_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "LIMIT", 1000)
    proto = onnx.load(onnx_path("digits_cnn"))
    before = proto.SerializeToString()
    made, _ = graphq.convert_graph(proto, recipe="int8-weight-only", calib=CALIB)
    assert proto.SerializeToString() == before and onnx.checker.check_model(made) is None


@pytest.mark.parametrize("graph", ["model.onnx", Path("model.onnx"), None])
def test_something_else_is_refused(graph: object) -> None:
    with pytest.raises(UsageError, match="is not a graph"):
        graphq.convert_graph(graph)


def test_an_engine_is_refused() -> None:
    with pytest.raises(UsageError, match="no engine"):
        graphq.convert_graph(onnx.load(onnx_path("digits_cnn")), emit="engine", target="tensorrt-rtx")
