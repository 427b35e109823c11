"""What a model file claims about its tensors, checked before anybody believes it: model files are untrusted input."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
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


def _proto_tensors(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.TensorProto]:
    """The tensors in attributes of `nodes`, and in the graphs there."""
    for node in nodes:
        for entry in node.attribute:
            if entry.HasField("t"):
                yield entry.t
            yield from entry.tensors
            for subgraph in ([entry.g] if entry.HasField("g") else []) + list(entry.graphs):
                yield from [*subgraph.initializer, *_proto_tensors(subgraph.node)]


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


def check_tensors(proto: onnx.ModelProto, path: Path, bits: Callable[[int], int]) -> set[Path]:
    """Refuse tensors that declare more, or less, than there is, before anybody allocates it, and data outside the model's folder.

    Args:
        bits: Width of an element, by the number of its type.

    Returns:
        The files that hold external data.

    Raises:
        ModelError: with the tensor at fault.
    """
    if proto.graph.sparse_initializer:
        names = ", ".join(repr(entry.values.name) for entry in proto.graph.sparse_initializer)
        raise ModelError("The model stores weights as sparse tensors, which graphq does not read.", where=f"{names} of {path}",
                         expected="dense initializers", hint="export the model without sparse initializers")  # fmt: skip
    folder, files = path.parent.resolve(), set[Path]()
    inside = (tensor for function in proto.functions for tensor in _proto_tensors(function.node))
    for tensor in (*proto.graph.initializer, *_proto_tensors(proto.graph.node), *inside):
        where = f"tensor {tensor.name!r} of {path}"
        if any(dim < 0 for dim in tensor.dims):
            raise ModelError("A tensor's shape has a negative dimension.", where=f"{where}: {list(tensor.dims)}",
                             hint="export the model again")  # fmt: skip
        size, is_text = math.prod(tensor.dims), tensor.data_type == onnx.TensorProto.STRING
        width = 0 if is_text else bits(tensor.data_type)
        declared = math.ceil(size * width / 8)
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            files.add(_check_external(tensor, folder, where, declared))
            continue
        if tensor.HasField("raw_data"):
            wanted, found, unit = declared, len(tensor.raw_data), "bytes"
        else:
            field, wanted = _field(tensor.data_type, size, width)
            found, unit = len(getattr(tensor, field)), f"entries of {field}"
        if found != wanted:
            raise ModelError("A tensor's data does not fit its shape.", where=where, expected=f"{wanted} {unit}, it has {found}",
                             hint="export the model again")  # fmt: skip
    return files


def _field(kind: int, size: int, width: int) -> tuple[str, int]:
    """Where a tensor of type `kind`, with `size` elements of `width` bits, has its data if not raw, and how many entries."""
    types = onnx.TensorProto
    if kind in (types.COMPLEX64, types.COMPLEX128):
        return "float_data" if kind == types.COMPLEX64 else "double_data", 2 * size
    if kind in (types.UINT32, types.UINT64):
        return "uint64_data", size
    if kind in (types.FLOAT, types.DOUBLE, types.INT64, types.STRING):
        return f"{types.DataType.Name(kind).lower()}_data", size
    return "int32_data", math.ceil(size * width / 8) if width in (2, 4) else size


def _check_external(tensor: onnx.TensorProto, folder: Path, where: str, declared: int) -> Path:
    entry = {item.key: item.value for item in tensor.external_data}
    named = folder / entry.get("location", "")
    file = named.resolve()
    if named.is_symlink() and not file.is_relative_to(folder) or file.is_file() and file.stat().st_nlink > 1:
        raise ModelError(
            "External data lies outside the model's folder.", where=f"{where}: {named} is a link, as in the cache of a hub",
            expected="the file itself", hint="copy the folder with `cp -rL`; graphq does not follow links out of it",
        )  # fmt: skip
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
    return file
