"""untrusted: a graph that reads what nothing makes is refused, and tensors that are not what they claim to be."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest

from graphq import ir
from graphq.convert import convert
from graphq.errors import ModelError, UsageError

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


def saved(path: Path, tensor: onnx.TensorProto, *, inside: str = "initializer") -> Path:
    """A model whose main graph, or whose function, holds `tensor`; written as it is, right or not."""
    constant = onnx.helper.make_node("Constant", [], ["w"], value=tensor)
    proto = onnx.parser.parse_model('<ir_version: 10, opset_import: ["" : 21, "own" : 1]> g (float[N] x) => (float[N] y) { y = own.F(x) }'
                                    '<domain: "own", opset_import: ["" : 21]> F (x) => (y) { y = Neg(x) }')  # fmt: skip
    if inside == "function":
        proto.functions[0].node.append(constant)
    elif inside == "attribute":
        proto.graph.node.append(constant)
    else:
        tensor.name = "w"
        proto.graph.initializer.append(tensor)
    path.write_bytes(proto.SerializeToString())
    return path


def kept_in(location: str) -> onnx.TensorProto:
    tensor = onnx.TensorProto(data_type=1, dims=[4], data_location=1)
    tensor.external_data.add(key="location", value=location)
    return tensor


WRONG = {
    "nothing": onnx.TensorProto(data_type=1, dims=[4, 4]),
    "nothing of much": onnx.TensorProto(data_type=1, dims=[1 << 15, 1 << 13]),
    "too few floats": onnx.TensorProto(data_type=1, dims=[4], float_data=[1, 2]),
    "too many floats": onnx.TensorProto(data_type=1, dims=[1], float_data=[1, 2]),
    "too few bytes in integers": onnx.TensorProto(data_type=3, dims=[4], int32_data=[1]),
    "too few codes of 4 bits": onnx.TensorProto(data_type=22, dims=[4, 4], int32_data=[1]),
    "the field of another type": onnx.TensorProto(data_type=7, dims=[1], int32_data=[1]),
    "half a complex number": onnx.TensorProto(data_type=14, dims=[1], float_data=[1]),
    "too few texts": onnx.TensorProto(data_type=8, dims=[2], string_data=[b"a"]),
    "texts as bytes": onnx.TensorProto(data_type=8, dims=[1], raw_data=b"a"),
}


@pytest.mark.parametrize("inside", ["initializer", "attribute", "function"])
@pytest.mark.parametrize("tensor", WRONG)
def test_data_that_does_not_fit_its_shape(tmp_path: Path, tensor: str, inside: str) -> None:
    with pytest.raises(ModelError, match="does not fit its shape"):
        ir.load(saved(tmp_path / "m.onnx", WRONG[tensor], inside=inside))


def test_a_negative_dimension(tmp_path: Path) -> None:
    for tensor in (onnx.TensorProto(data_type=1, dims=[-2, -2], raw_data=bytes(16)), onnx.TensorProto(data_type=1, dims=[-1])):
        with pytest.raises(ModelError, match="negative dimension"):
            ir.load(saved(tmp_path / "m.onnx", tensor))


@pytest.mark.parametrize("kind", [kind for kind in onnx.TensorProto.DataType.values() if kind not in (0, 8)])
@pytest.mark.parametrize("raw", [False, True], ids=["typed", "raw"])
def test_data_as_onnx_writes_it_is_taken(tmp_path: Path, kind: int, raw: bool) -> None:
    array = np.zeros(5, onnx.helper.tensor_dtype_to_np_dtype(kind))
    data = onnx.numpy_helper.from_array(array).raw_data if raw else list(array)
    tensor = onnx.helper.make_tensor("w", kind, [5], data, raw=raw)
    array = onnx.numpy_helper.to_array(tensor)
    model = ir.load(saved(tmp_path / "m.onnx", tensor))
    assert list(ir.constant(model.graph.initializers["w"])) == list(array)  # type: ignore[arg-type]


def test_texts_are_taken(tmp_path: Path) -> None:
    model = ir.load(saved(tmp_path / "m.onnx", onnx.helper.make_tensor("w", 8, [2], [b"a", b"b"])))
    ir.save(model, tmp_path / "n.onnx")
    assert list(onnx.load(tmp_path / "n.onnx").graph.initializer[0].string_data) == [b"a", b"b"]


def test_sparse_initializers_are_refused(tmp_path: Path) -> None:
    proto = onnx.load(saved(tmp_path / "m.onnx", onnx.numpy_helper.from_array(np.zeros(1, np.float32))))
    values, places = onnx.helper.make_tensor("s", 1, [1], [1.0]), onnx.helper.make_tensor("i", 7, [1], [3])
    proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, places, [4, 4]))
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match="sparse tensors"):
        ir.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("inside", ["initializer", "attribute", "function"])
def test_external_data_stays_in_the_folder(tmp_path: Path, inside: str) -> None:
    """Wherever it is told of; beside the model it is read, from any working directory."""
    folder = tmp_path / "models"
    folder.mkdir()
    (tmp_path / "secret").write_bytes(bytes(16))
    for location in ("../secret", str(tmp_path / "secret")):
        with pytest.raises(ModelError, match="outside the model's folder"):
            ir.load(saved(folder / "m.onnx", kept_in(location), inside=inside))
    (folder / "w.bin").write_bytes(np.arange(4, dtype=np.float32).tobytes())
    model = ir.load(saved(folder / "m.onnx", kept_in("w.bin"), inside=inside))
    found = ir.constant(model.graph.initializers["w"]) if inside == "initializer" else next(
        node.attributes["value"].as_tensor().numpy() for node in ir.all_nodes(model) if node.op_type == "Constant")  # fmt: skip
    assert found is not None and found.tolist() == [0, 1, 2, 3]
    assert ir.data_files(model) == (folder / "w.bin",)
    with pytest.raises(UsageError, match="overwrite an input"):
        convert(folder / "m.onnx", folder / "w.bin", recipe="int8-weight-only")


def test_links_are_not_followed_out_of_the_folder(tmp_path: Path) -> None:
    """The layout of a hub's cache: the message names the cause and the way out."""
    for folder in ("blobs", "snapshot"):
        (tmp_path / folder).mkdir()
    (tmp_path / "blobs" / "1").write_bytes(bytes(16))
    (tmp_path / "snapshot" / "w.bin").symlink_to("../blobs/1")
    with pytest.raises(ModelError, match="outside the model's folder") as error:
        ir.load(saved(tmp_path / "snapshot" / "m.onnx", kept_in("w.bin")))
    assert "cp -rL" in str(error.value)
    (tmp_path / "snapshot" / "w.bin").unlink()
    (tmp_path / "snapshot" / "w.bin").hardlink_to(tmp_path / "blobs" / "1")
    with pytest.raises(ModelError, match="outside the model's folder"):
        ir.load(saved(tmp_path / "snapshot" / "m.onnx", kept_in("w.bin")))
