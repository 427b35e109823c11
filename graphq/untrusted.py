"""What a model file claims about its tensors, checked before anybody believes it: model files are untrusted input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path

import onnx

from graphq.errors import ModelError

_ENGINES = (b"ftrt", b"vtrt")
"""First bytes of the engines of TensorRT and TensorRT-RTX."""


def check_file(path: Path) -> None:
    """Refuse what is no file, is empty, or is an engine. Raises ModelError."""
    if not path.is_file():
        raise ModelError("There is no such model file.", where=str(path), expected="an ONNX file, not a folder", hint="check the path")
    if path.stat().st_size == 0:
        raise ModelError("The model file is empty.", where=str(path), expected="an ONNX model", hint="export the model again")
    with path.open("rb") as file:
        start = file.read(4)
    if start in _ENGINES:
        raise ModelError(
            "This is a TensorRT engine, not an ONNX model.", where=str(path), expected="an ONNX file",
            hint="`graphq bench` runs engines; what was done to one is in the folder that `--report` named",
        )  # fmt: skip


def _proto_tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in graph.node:
        for entry in node.attribute:
            yield from [entry.t, *entry.tensors]
            for subgraph in [entry.g, *entry.graphs]:
                yield from _proto_tensors(subgraph)


def check_names(graph: onnx.GraphProto, path: Path, outer: frozenset[str] = frozenset()) -> None:
    """Refuse a graph that reads what nothing makes; `outer` are the names of the graphs around it. Raises ModelError."""
    known = outer.union(
        (entry.name for entry in (*graph.input, *graph.initializer)), (entry.values.name for entry in graph.sparse_initializer),
        (name for node in graph.node for name in node.output),
    )  # fmt: skip
    for node in graph.node:
        for name in node.input:
            if name and name not in known:
                raise ModelError(
                    f"The model is not valid ONNX: nothing makes {name!r}.", where=f"{path}: input of {node.op_type} {node.name!r}",
                    expected="an input, a constant or the output of another node", hint="export the model again",
                )  # fmt: skip
        for entry in node.attribute:
            for inner in (entry.g, *entry.graphs):
                check_names(inner, path, known)


def check_tensors(proto: onnx.ModelProto, path: Path, bits: Callable[[int], int]) -> None:
    """Refuse tensors that declare more than there is, before anybody allocates it, and data outside the model's folder.

    Args:
        bits: Width of an element, by the number of its type.

    Raises:
        ModelError: with the tensor at fault.
    """
    folder = path.parent.resolve()
    for tensor in _proto_tensors(proto.graph):
        where = f"tensor {tensor.name!r} of {path}"
        declared = math.ceil(math.prod(tensor.dims) * bits(tensor.data_type) / 8) if tensor.data_type else 0
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            _check_external(tensor, folder, where, declared)
        elif tensor.HasField("raw_data") and len(tensor.raw_data) != declared:
            expected = f"{declared} bytes, it has {len(tensor.raw_data)}"
            raise ModelError("A tensor's data does not fit its shape.", where=where, expected=expected, hint="export the model again")


def _check_external(tensor: onnx.TensorProto, folder: Path, where: str, declared: int) -> None:
    entry = {item.key: item.value for item in tensor.external_data}
    file = (folder / entry.get("location", "")).resolve()
    if not file.is_relative_to(folder) or file == folder:
        raise ModelError(
            "External data lies outside the model's folder.", where=where, expected=f"a file in {folder}",
            hint="move the data file beside the model; graphq does not follow paths out of the folder",
        )  # fmt: skip
    if not file.is_file():
        raise ModelError("The model's external data file is missing.", where=where, expected=str(file),
                         hint="copy the data file beside the model")  # fmt: skip
    offset, length = (entry.get(key) or default for key, default in (("offset", "0"), ("length", str(declared))))
    if not (offset.isdecimal() and length.isdecimal() and int(length) == declared):
        raise ModelError(
            "The place of a tensor in its external data file makes no sense.", where=f"{where}: offset {offset}, length {length}",
            expected=f"numbers, and a length of {declared}, as its shape says", hint="export the model again",
        )  # fmt: skip
    if file.stat().st_size < int(offset) + declared:
        raise ModelError("The model's external data file is cut off.", where=where,
                         expected=f"{file.name} of at least {int(offset) + declared} bytes, it has {file.stat().st_size}",
                         hint="copy the data file again")  # fmt: skip
