"""Models in memory, as other libraries hold them: `onnx.ModelProto`, and the `Graph` of onnx-graphsurgeon."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, TypeVar

import onnx

from graphq.convert import convert
from graphq.errors import UsageError
from graphq.report import Report

Graph = TypeVar("Graph")

LIMIT = (1 << 31) - (1 << 20)
"""Bytes that protobuf holds, less what the rest of a model may take."""


def convert_graph(graph: Graph, **options: Any) -> tuple[Graph, Report]:
    """`graphq.convert` for a model in memory, which stays as it is.

    Args:
        graph: An `onnx.ModelProto` with its weights inside, or an `onnx_graphsurgeon.Graph`.
        options: Those of `graphq.convert`, except `model` and `out`; what it builds is a model, not an engine.

    Returns:
        The compressed model, of the type of `graph`, and the report.

    Raises:
        UsageError: `graph` is something else, or an engine is asked for.
        GraphqError: as `graphq.convert`; paths in messages are temporary.
    """
    if options.get("emit", "onnx") != "onnx":
        raise UsageError("A graph in memory has no engine.", where="emit", expected="graphq.convert with a path to write to")
    with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
        source, result = Path(folder) / "model.onnx", Path(folder) / "result.onnx"
        _save(_proto(graph), source)
        report = convert(source, result, **options)
        made = onnx.load(result)
    return (made if isinstance(graph, onnx.ModelProto) else _surgeon(graph).import_onnx(made)), report  # type: ignore[return-value]


def _proto(graph: Any) -> onnx.ModelProto:
    if isinstance(graph, onnx.ModelProto):
        return graph
    surgeon = _surgeon(graph)
    if surgeon is None:
        raise UsageError(
            f"A {type(graph).__name__} is not a graph.", expected="an onnx.ModelProto or an onnx_graphsurgeon.Graph",
            hint="give a path to graphq.convert",
        )  # fmt: skip
    made = surgeon.export_onnx(graph)
    assert isinstance(made, onnx.ModelProto)
    return made


def _surgeon(graph: Any) -> Any:
    """The module onnx_graphsurgeon if `graph` is one of its graphs; whoever has one has imported it."""
    if type(graph).__module__.partition(".")[0] != "onnx_graphsurgeon":
        return None
    import onnx_graphsurgeon

    return onnx_graphsurgeon


def _save(proto: onnx.ModelProto, path: Path) -> None:
    if proto.ByteSize() > LIMIT:  # saving moves the weights out of what is saved
        copy = onnx.ModelProto()
        copy.CopyFrom(proto)
        onnx.save(copy, path, save_as_external_data=True)
    else:
        onnx.save(proto, path)
