"""Model files: read with their external data left on disk, written without holding all weights anew. Part of `graphq.ir`.

Weights inside the .onnx file itself are read with it.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import onnx
import onnx_ir
from onnx_ir import Model

from graphq.errors import ModelError
from graphq.untrusted import check_file, check_names, check_tensors

MAX_OPSET, PROTOBUF_LIMIT = onnx.defs.onnx_opset_version(), 1 << 31
HEAVY = 1024
"""Tensors of more bytes than this are left in their files."""

_DATA_FILES = "graphq.data_files"

Keep = Callable[[Any], Any]
"""Takes a tensor, returns it or the same where it takes no memory."""

_RAW_DATA, _INITIALIZER, _GRAPH = (
    message.DESCRIPTOR.fields_by_name[name].number
    for message, name in ((onnx.TensorProto, "raw_data"), (onnx.GraphProto, "initializer"), (onnx.ModelProto, "graph"))
)


class FileTensor(onnx_ir.ExternalTensor):
    """A tensor in a file, mapped for as long as somebody holds its array: no memory, and no open file, is left of it then."""

    def numpy(self) -> np.ndarray:
        return self._fresh().numpy()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.numpy(), dtype)

    def tobytes(self) -> bytes:
        return self._fresh().tobytes()

    def _fresh(self) -> onnx_ir.ExternalTensor:
        return onnx_ir.ExternalTensor(
            self.location, self.offset, self.length, self.dtype, shape=self.shape, name=self.name or "", base_dir=self.base_dir
        )  # fmt: skip


def in_memory(tensor: Any) -> Any:
    """The tensor as an array of its own: one in a file would be read, and one in a protobuf copied, whenever somebody looks at it."""
    if not isinstance(tensor, onnx_ir.ExternalTensor | onnx_ir.TensorProtoTensor):
        return tensor
    array = np.array(tensor.numpy()) if isinstance(tensor, onnx_ir.ExternalTensor) else tensor.numpy()  # no file stays mapped
    return onnx_ir.Tensor(array, dtype=tensor.dtype, name=tensor.name, doc_string=tensor.doc_string)


def tensors(model: Model) -> Iterator[Any]:
    """Those of all initializers."""
    for graph in model.graphs():
        yield from (value.const_value for value in graph.initializers.values() if value.const_value is not None)


# ---- reading --------------------------------------------------------------------------------------------------------


def load(path: str | os.PathLike[str]) -> Model:
    """Read a model; external data of the main graph stays in its file (see `FileTensor`).

    Raises:
        ModelError: the file is missing, empty, not an ONNX model, of an unknown opset, or its external data is missing,
            too short or outside the model's folder.
    """
    path = Path(path)
    check_file(path)
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf raises several unrelated types
        raise _not_onnx(path, "it does not parse as protobuf") from error
    if not proto.ir_version or not proto.HasField("graph"):
        raise _not_onnx(path, "it holds no graph")
    for entry in proto.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version > MAX_OPSET:
            raise ModelError(
                f"The model uses opset {entry.version}, which is not known here.", where=str(path),
                expected=f"opset {MAX_OPSET} at most", hint="export with a lower opset_version, or update the onnx package",
            )  # fmt: skip
    try:
        check_names(proto.graph, path)
        data_files = check_tensors(proto, path, lambda kind: onnx_ir.DataType(kind).bitwidth)
        model = onnx_ir.from_proto(proto)
    except ModelError:
        raise
    except Exception as error:
        raise _not_onnx(path, f"its graph cannot be read ({error})") from error
    model.meta[_DATA_FILES] = tuple(sorted(data_files))
    folder = str(path.parent.resolve())
    onnx_ir.external_data.set_base_dir(model.graph, folder)
    for graph in model.graphs():
        for value in graph.initializers.values():  # those of subgraphs are few and small, as are constants in attributes
            value.const_value = _opened(value.const_value, graph is model.graph)
    for node in [*model.graph.all_nodes(), *(node for function in model.functions.values() for node in function.all_nodes())]:
        while node.inputs and node.inputs[-1] is None:  # ONNX Runtime 1.31 crashes on a LayerNormalization that leaves its bias out so
            node.resize_inputs(len(node.inputs) - 1)
        for name, entry in list(node.attributes.items()):
            if entry.type == onnx_ir.AttributeType.TENSOR and not entry.is_ref():
                if isinstance(entry.value, onnx_ir.ExternalTensor):
                    entry.value.base_dir = folder  # which those of functions lack
                node.attributes[name] = onnx_ir.convenience.convert_attribute(name, in_memory(entry.value))
    return model


def data_files(model: Model) -> tuple[Path, ...]:
    """The files that held data of `model` beside its own when it was loaded, constants in attributes and functions included."""
    return tuple(model.meta.get(_DATA_FILES, ()))


def _opened(tensor: Any, may_stay: bool) -> Any:
    if not (may_stay and isinstance(tensor, onnx_ir.ExternalTensor)):
        return in_memory(tensor)
    return FileTensor(tensor.location, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=tensor.name or "",
                  doc_string=tensor.doc_string, base_dir=tensor.base_dir)  # fmt: skip


def _not_onnx(path: Path, why: str) -> ModelError:
    return ModelError(
        f"This is not a readable ONNX model: {why}.", where=str(path), expected="an .onnx file as an exporter wrote it",
        hint="check that the download or export finished (the file may be cut off)",
    )  # fmt: skip


# ---- writing --------------------------------------------------------------------------------------------------------


def save(model: Model, path: str | os.PathLike[str]) -> None:
    """Write a model with all its bytes; weights go to `<name>.data` beside it when they do not fit into one file (2 GiB).

    They are copied one by one from where they are.
    """
    path = Path(path)
    if sum(tensor.nbytes for tensor in tensors(model)) > PROTOBUF_LIMIT - (1 << 26):
        return onnx_ir.save(model, path, external_data=f"{path.name}.data")
    copy, heavy = model.clone(), list[Any]()
    for value in copy.graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes > HEAVY and tensor.dtype != onnx_ir.DataType.STRING:
            value.const_value = onnx_ir.ExternalTensor(
                str(len(heavy)), 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name or "",  # type: ignore[arg-type]
                doc_string=tensor.doc_string,
            )  # fmt: skip
            heavy.append(tensor)
        elif tensor is not None:
            value.const_value = in_memory(tensor)
    proto = onnx_ir.to_proto(copy)
    with path.open("wb") as file:
        _write(proto, heavy, file)


def _write(proto: onnx.ModelProto, heavy: list[Any], file: IO[bytes]) -> None:
    """`proto` in the wire format of protobuf, with the bytes of `heavy` in the places of its external references, which count them."""
    heads = []
    for entry in proto.graph.initializer:
        tensor = None
        if entry.data_location == onnx.TensorProto.EXTERNAL:
            tensor = heavy[int(entry.external_data[0].value)]
            entry.ClearField("external_data")
            entry.ClearField("data_location")
        head = entry.SerializeToString(deterministic=True)
        head += b"" if tensor is None else _key(_RAW_DATA, tensor.nbytes)
        size = len(head) + (0 if tensor is None else tensor.nbytes)
        heads.append((_key(_INITIALIZER, size) + head, tensor))
    proto.graph.ClearField("initializer")
    graph = proto.graph.SerializeToString(deterministic=True)
    proto.ClearField("graph")
    total = len(graph) + sum(len(head) + (0 if tensor is None else tensor.nbytes) for head, tensor in heads)
    file.write(proto.SerializeToString(deterministic=True) + _key(_GRAPH, total) + graph)
    for head, tensor in heads:
        file.write(head)
        if tensor is not None:
            tensor.tofile(file)


def _key(field: int, size: int) -> bytes:
    """What stands before `size` bytes of the field: its number, the wire type 2 and the size, as varints."""
    out = bytearray()
    for value in (field << 3 | 2, size):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


@contextmanager
def spilling(beside: Path, is_needed: bool) -> Iterator[Keep]:
    """Gives what keeps tensors in a file beside `beside` until the block ends, and in memory if that is not needed.

    The file has no name, so that nothing is left of it however the process ends. It only grows: each pass that writes all weights anew
    adds their size to it.
    """
    if not is_needed:
        yield lambda tensor: tensor
        return
    with tempfile.TemporaryFile(dir=beside.parent, prefix=f".{beside.name}.") as file:

        def keep(tensor: Any) -> Any:
            if tensor.nbytes <= HEAVY:
                return tensor
            start = file.seek(0, os.SEEK_END)
            tensor.tofile(file)
            file.flush()
            place = f"/dev/fd/{file.fileno()}"
            return FileTensor(place, start, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=tensor.name or "")

        yield keep
