"""ir: every unreadable file is refused with its reason, what is written reads back, and a segment runs like the whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from graphq import ir, ir_files, ir_proto
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.executor import Executor, Fetch

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
TEXT = f"""{HEAD}
small (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] w = {{1, 2, 3, 4}}>
{{ a = MatMul(x, w)  y = Relu(a) }}"""
IF_MODEL = f"""{HEAD}
branches (float[n, 2] x, bool c) => (float[n, 2] y)
<float[2] k = {{1, 2}}>
{{
   a = Abs(x)
   b = Neg(x)
   [choice] y = If(c) <
      then_branch = left () => (float[n, 2] p) {{ p = Add(a, k) }},
      else_branch = right () => (float[n, 2] q) {{ r = Add(b, k)  q = Neg(r) }}>
}}"""
BIG = np.arange(4096, dtype=np.float32).reshape(64, 64)


def big_model(**more: np.ndarray) -> ir.Model:
    model = ir.from_onnx_text(f"{HEAD}\nbig (float[n, 64] x) => (float[n, 64] y) {{ y = Relu(x) }}")
    edit = Editor(model)
    edit.rewire(model.graph[0], 0, edit.insert(model.graph[0], "MatMul", [model.graph.inputs[0], edit.initializer("w", BIG)], output="a"))
    return model


def external(folder: Path, location: str = "w.bin", **more: object) -> Path:
    """A model whose weight lies in `location`; the file w.bin has all its 16 KiB."""
    proto = ir.to_proto(big_model())
    tensor = proto.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": 0, "length": BIG.nbytes, **more}.items():
        tensor.external_data.add(key=key, value=str(value))
    (folder / "w.bin").write_bytes(BIG.tobytes())
    (folder / "m.onnx").write_bytes(proto.SerializeToString())
    return folder / "m.onnx"


# ---- refusals -------------------------------------------------------------------------------------------------------


def no_file(path: Path) -> None: ...


def empty(path: Path) -> None:
    path.touch()


def garbage(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 8)


def truncated(path: Path) -> None:
    ir.save(big_model(), path)
    path.write_bytes(path.read_bytes()[:-200])


def no_graph(path: Path) -> None:
    path.write_bytes(onnx.ModelProto(ir_version=10).SerializeToString())


def no_version(path: Path) -> None:
    proto = ir.to_proto(big_model())
    proto.ClearField("ir_version")
    path.write_bytes(proto.SerializeToString())


def future_opset(path: Path) -> None:
    proto = ir.to_proto(big_model())
    proto.opset_import[0].version = ir.MAX_OPSET + 1
    path.write_bytes(proto.SerializeToString())


def folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (no_file, "There is no such model file"),
        (folder, "There is no such model file"),
        (empty, "The model file is empty"),
        (garbage, "not a readable ONNX model"),
        (truncated, "not a readable ONNX model"),
        (no_graph, "it holds no graph"),
        (no_version, "it holds no graph"),
        (future_opset, f"opset {ir.MAX_OPSET + 1}, which is not known here.*opset {ir.MAX_OPSET} at most"),
    ],
)
def test_unreadable_files(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    path = tmp_path / "m.onnx"
    write(path)
    with pytest.raises(ModelError, match=f"(?s){message}") as error:
        ir.load(path)
    assert error.value.where == str(path)


@pytest.mark.parametrize("where", ["initializer", "constant", "subgraph"])
def test_external_data_is_checked_wherever_it_is(tmp_path: Path, where: str) -> None:
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[2], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="absent.bin")
    constant = helper.make_node("Constant", [], ["k"], value=tensor)
    inside = helper.make_graph([constant], "inside", [], [helper.make_tensor_value_info("k", 1, [2])])
    nodes = {"initializer": helper.make_node("Identity", ["t"], ["y"]), "constant": helper.make_node("Constant", [], ["y"], value=tensor),
             "subgraph": helper.make_node("If", ["c"], ["y"], then_branch=inside, else_branch=inside)}  # fmt: skip
    flag, result = helper.make_tensor_value_info("c", 9, []), helper.make_tensor_value_info("y", 1, [2])
    graph = helper.make_graph([nodes[where]], "g", [flag], [result],
                              initializer=[tensor] if where == "initializer" else [])  # fmt: skip
    (tmp_path / "m.onnx").write_bytes(
        helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)]).SerializeToString()
    )
    with pytest.raises(ModelError, match=r"(?s)data file is missing.*tensor 't'.*absent\.bin"):
        ir.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("location", ["../w.bin", "/etc/passwd", "sub/../../w.bin", "", "."])
def test_external_data_outside_the_folder(tmp_path: Path, location: str) -> None:
    (tmp_path / "w.bin").write_bytes(BIG.tobytes())
    (tmp_path / "in").mkdir()
    with pytest.raises(ModelError, match="(?s)outside the model's folder.*tensor 'w'"):
        ir.load(external(tmp_path / "in", location))


def test_external_data_through_a_link_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    path = external(tmp_path / "in", "link.bin")
    (tmp_path / "w.bin").write_bytes(BIG.tobytes())
    (tmp_path / "in" / "link.bin").symlink_to(tmp_path / "w.bin")
    with pytest.raises(ModelError, match="outside the model's folder"):
        ir.load(path)


def test_external_data_cut_off(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=rf"(?s)cut off.*at least {BIG.nbytes + 1} bytes, it has {BIG.nbytes}"):
        ir.load(external(tmp_path, offset=1))


@pytest.mark.parametrize("entries", [{"length": -1}, {"length": 64}, {"length": BIG.nbytes + 1}, {"offset": -8}, {"offset": "x"}])
def test_external_data_with_absurd_numbers(tmp_path: Path, entries: dict[str, object]) -> None:
    with pytest.raises(ModelError, match=f"(?s)makes no sense.*tensor 'w'.*a length of {BIG.nbytes}"):
        ir.load(external(tmp_path, **entries))


@pytest.mark.parametrize("dims", [[64, 65], [1 << 40], [64]])
def test_a_tensor_whose_data_does_not_fit_its_shape(tmp_path: Path, dims: list[int]) -> None:
    proto = ir.to_proto(big_model())
    proto.graph.initializer[0].dims[:] = dims
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=f"(?s)does not fit its shape.*tensor 'w'.*it has {BIG.nbytes}"):
        ir.load(tmp_path / "m.onnx")


def test_external_data_without_a_length_that_is_too_short(tmp_path: Path) -> None:
    path = external(tmp_path)
    proto = onnx.load(path, load_external_data=False)
    del proto.graph.initializer[0].external_data[2]
    path.write_bytes(proto.SerializeToString())
    (tmp_path / "w.bin").write_bytes(BIG.tobytes()[:-4])
    with pytest.raises(ModelError, match="cut off"):
        ir.load(path)


# ---- round trips ----------------------------------------------------------------------------------------------------


def test_external_data_is_read(tmp_path: Path) -> None:
    model = ir.load(external(tmp_path))
    np.testing.assert_array_equal(ir.constant(model.graph.initializers["w"]), BIG)
    ir.save(model, tmp_path / "copy.onnx")  # small enough for one file
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "w.bin", "copy.onnx"}
    onnx.checker.check_model(tmp_path / "copy.onnx")


@pytest.mark.parametrize(
    ("storage", "kind"),
    [("int4", ml_dtypes.int4), ("uint4", ml_dtypes.uint4), ("int2", ml_dtypes.int2), ("uint2", ml_dtypes.uint2), ("int8", np.int8)],
)
def test_narrow_integers_survive_a_file(tmp_path: Path, storage: str, kind: type) -> None:
    model = ir.from_onnx_text('<ir_version: 13, opset_import: ["" : 25]>\nm (float[n] x) => (float[n] y) { y = Relu(x) }')
    low, high = int(ml_dtypes.iinfo(kind).min), int(ml_dtypes.iinfo(kind).max)
    codes = np.arange(low, high + 1).astype(np.int8 if low else np.uint8).repeat(3)[:-1].reshape(1, -1)  # an odd count
    Editor(model).initializer("q", codes, storage)
    ir.save(model, tmp_path / "m.onnx")
    back = ir.load(tmp_path / "m.onnx")
    found = ir.constant(back.graph.initializers["q"])
    assert found is not None and found.dtype == kind
    np.testing.assert_array_equal(found.astype(np.int8), codes.astype(np.int8))
    proto = onnx.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(numpy_helper.to_array(proto.graph.initializer[0]).astype(np.int8), codes.astype(np.int8))


def test_weights_over_the_protobuf_limit_go_beside_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir_files, "PROTOBUF_LIMIT", (1 << 26) + 1000)
    ir.save(big_model(), tmp_path / "m.onnx")
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}
    assert (tmp_path / "m.onnx").stat().st_size < 1000
    back = ir.load(tmp_path / "m.onnx")
    np.testing.assert_array_equal(ir.constant(back.graph.initializers["w"]), BIG)
    feeds = {"x": np.ones((1, 64), np.float32)}
    np.testing.assert_array_equal(Executor(back).run(feeds)[0], Executor(big_model()).run(feeds)[0])


# ---- looking --------------------------------------------------------------------------------------------------------


def test_a_light_proto_shares_the_arrays() -> None:
    model = big_model()
    edit = Editor(model)
    edit.initializer("narrow", np.zeros(9000, np.int8), "int4")
    edit.initializer("short", np.zeros(256, np.float32))
    proto, arrays = ir_proto.light_proto(model)
    assert set(arrays) == {"w"}
    assert np.shares_memory(arrays["w"], ir.constant(model.graph.initializers["w"]))
    assert len(proto.SerializeToString()) < 9000
    np.testing.assert_array_equal(ir.constant(model.graph.initializers["w"]), BIG)  # the model itself is left whole


def test_a_clone_can_be_changed_alone() -> None:
    model = big_model()
    copy = ir.clone(model)
    Editor(copy).set_weight(copy.graph[0], 1, np.zeros_like(BIG))
    np.testing.assert_array_equal(ir.constant(model.graph.initializers["w"]), BIG)
    assert not ir.constant(copy.graph.initializers["w"]).any()  # type: ignore[union-attr]


@pytest.mark.parametrize("flag", [True, False])
def test_a_segment_runs_like_the_whole(flag: bool) -> None:
    model = ir.from_onnx_text(IF_MODEL)
    x = np.float32([[1, -2], [3, 4]])
    a, b, y = Executor(model, [Fetch("a"), Fetch("b"), Fetch("y")]).run({"x": x, "c": np.array(flag)})
    node = ir.values_by_name(model.graph)["y"].producer()
    assert node is not None
    feeds = {"a": a, "b": b, "c": np.array(flag)}
    proto, arrays = ir_proto.segment_proto(model, [node], {name: array.dtype for name, array in feeds.items()})
    assert [entry.name for entry in proto.graph.input] == ["c", "a", "b"] and not arrays
    assert [entry.name for entry in proto.graph.initializer] == ["k"]
    np.testing.assert_array_equal(
        Executor(model, [Fetch("y")], nodes=[node], feeds={n: f.dtype for n, f in feeds.items()}).run(feeds)[0], y
    )


def test_a_segment_shares_large_weights() -> None:
    model = big_model()
    proto, arrays = ir_proto.segment_proto(model, [model.graph[0]], {"x": np.dtype(np.float32)})
    assert np.shares_memory(arrays["w"], ir.constant(model.graph.initializers["w"])) and len(proto.SerializeToString()) < 1000


def test_reads_sees_through_subgraphs() -> None:
    model = ir.from_onnx_text(IF_MODEL)
    choice = model.graph[2]
    assert {value.name for value in ir.reads(choice)} == {"c", "a", "b", "k"}
    assert [value.name for value in ir.reads(model.graph[0])] == ["x"]
    assert sorted(node.op_type for node in ir.nodes_inside(choice)) == ["Add", "Add", "Neg"]
    assert len(list(ir.all_nodes(model))) == 6


def test_reads_of_nested_subgraphs_are_outer_values_only() -> None:
    model = ir.from_onnx_text(f"""{HEAD}
nested (float[2] x, bool c) => (float[2] y)
<int64 trips = {{3}}>
{{
   y = If(c) <
      then_branch = left () => (float[2] p) {{
         p = Loop(trips, c, x) <body = body (int64 i, bool go, float[2] state) => (bool go_on, float[2] next) {{
            go_on = Identity(go)  next = Add(state, x) }}>
      }},
      else_branch = right () => (float[2] q) {{ q = Neg(x) }}>
}}""")
    assert {value.name for value in ir.reads(model.graph[0])} == {"c", "trips", "x"}


def test_inputs_that_are_left_out_at_the_end_are_not_there(tmp_path: Path) -> None:
    """Both forms mean the same; ONNX Runtime crashes on this one. One in the middle stays."""
    nodes = [helper.make_node("LayerNormalization", ["x", "g", ""], ["a"]), helper.make_node("Clip", ["a", "", "high"], ["y"])]
    constants = [numpy_helper.from_array(np.ones(4, np.float32), "g"), numpy_helper.from_array(np.float32(1), "high")]
    sides = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2, 4]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", sides[:1], sides[1:], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), tmp_path / "m.onnx")
    model = ir.load(tmp_path / "m.onnx")
    assert [len(node.inputs) for node in model.graph] == [2, 3]
    (y,) = Executor(model).run({"x": np.arange(8, dtype=np.float32).reshape(2, 4)})
    np.testing.assert_allclose(y[0], [-1.34164, -0.44721, 0.44721, 1], atol=1e-4)


def test_constant() -> None:
    model = ir.from_onnx_text(f"""{HEAD}
m (float[2] x) => (float[2] y)
<float[2] w = {{1, 2}}>
{{ k = Constant <value = float[2] {{3, 4}}> ()  a = Add(x, w)  y = Add(a, k) }}""")
    values = ir.values_by_name(model.graph)
    np.testing.assert_array_equal(ir.constant(values["w"]), [1, 2])
    np.testing.assert_array_equal(ir.constant(values["k"]), [3, 4])
    assert ir.constant(values["x"]) is None and ir.constant(values["a"]) is None and ir.constant(None) is None


def test_shapes_and_descriptions() -> None:
    model = ir.from_onnx_text(f"""{HEAD}
m (float[n, 3, ?] x, float s) => (float[n] y)
{{ [first] a = Clip(x, s)  [second] b = Clip(a, , s)  [third] y = Relu(b) }}""")
    values = ir.values_by_name(model.graph)
    assert ir.shape_of(values["x"]) == ("n", 3, None) and ir.shape_of(values["s"]) == () and ir.shape_of(values["a"]) is None
    assert ir.shape_of(None) is None
    assert ir.describe(model.graph[0]) == "Clip 'first' (nx3x?, scalar)"
    assert ir.describe(model.graph[1]) == "Clip 'second' (?, -, scalar)"
    assert ir.describe(model.graph[2]) == "Relu 'third' (?)"


def test_inputs_leave_initializers_out() -> None:
    model = ir.from_onnx_text(
        f"{HEAD}\nm (float16[n, 2] x, int64[3] i, float[2] w) => (float[2] y)\n<float[2] w = {{1, 2}}> {{ y = Relu(w) }}"
    )
    found = ir.inputs(model)
    assert [(entry.name, entry.dtype, entry.shape) for entry in found] == [("x", np.float16, ("n", 2)), ("i", np.int64, (3,))]


def test_an_input_that_is_no_tensor_is_refused() -> None:
    model = ir.from_onnx_text(f"{HEAD}\nm (seq(float[2]) x) => (int64 y) {{ y = SequenceLength(x) }}")
    with pytest.raises(ModelError, match="(?s)not a tensor.*'x'"):
        ir.inputs(model)


def test_opset() -> None:
    model = ir.from_onnx_text(TEXT)
    assert ir.opset(model) == 21
    del model.opset_imports[""]
    model.opset_imports["ai.onnx"] = 20  # the long name of the default domain
    assert ir.opset(model) == 20
