"""Models with more weights than the memory budget: the same result as any other, and nothing left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, parser

from graphq import ir, ir_files, segments
from graphq.calibration import open_calibration
from graphq.convert import convert
from graphq.editor import Editor
from graphq.errors import GraphqError
from graphq.recipe import load_recipe
from graphq.report import Report
from graphq.sweep import sweep

WIDTH, ROWS, LAYERS = 64, 1024, 6
TINY_BUDGET = 64 << 10


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A table and some layers, their weights in a file beside the model."""
    rng, names = np.random.default_rng(0), [f"h{index}" for index in range(LAYERS + 1)]
    body = [f"m{index} = MatMul({names[index]}, w{index}) {names[index + 1]} = Tanh(m{index})" for index in range(LAYERS)]
    text = f"m (int64[N, 8] ids) => (float[N, 8, {WIDTH}] y) {{ h0 = Gather(table, ids) {' '.join(body)} y = Add({names[-1]}, h1) }}"
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{text}')
    shapes = {"table": (ROWS, WIDTH)} | {f"w{index}": (WIDTH, WIDTH) for index in range(LAYERS)}
    for name, shape in shapes.items():
        proto.graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) / 8).astype(np.float32), name))
    folder = tmp_path / "source"
    folder.mkdir()
    onnx.save(proto, folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return folder / "m.onnx"


def converted(source: Path, out: Path, recipe: str, budget: int) -> Report:
    out.parent.mkdir(exist_ok=True)
    return convert(source, out, recipe=recipe, memory_budget=budget)


@pytest.mark.parametrize("recipe", ["int4-weight-only", "int8-weight-only", "w4a16-gptq"])
def test_the_result_is_the_same_as_without_a_budget(tmp_path: Path, source: Path, recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit by bit, comparison included (it is written into the file)."""
    monkeypatch.setattr(segments, "SEGMENT", 4 * WIDTH * WIDTH)
    plain = converted(source, tmp_path / "plain" / "out.onnx", recipe, 2 << 30)
    small = converted(source, tmp_path / "small" / "out.onnx", recipe, TINY_BUDGET)
    assert plain.latency is not None and small.latency is None
    assert any("segment by segment: speed was not measured" in note for note in small.notes)
    assert not any("segment by segment" in note for note in plain.notes)
    assert (plain.comparison, plain.integer_kernels, plain.quantized) == (small.comparison, small.integer_kernels, small.quantized)
    assert [file.name for file in (tmp_path / "small").iterdir()] == ["out.onnx"]
    assert (tmp_path / "plain" / "out.onnx").read_bytes() == (tmp_path / "small" / "out.onnx").read_bytes()


def test_results_too_large_for_one_file_get_data_of_their_own_name(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ir_files, "PROTOBUF_LIMIT", 1 << 26)
    for folder, budget in (("plain", 2 << 30), ("small", TINY_BUDGET)):
        converted(source, tmp_path / folder / "out.onnx", "int4-weight-only", budget)
        assert {file.name for file in (tmp_path / folder).iterdir()} == {"out.onnx", "out.onnx.data"}
        entries = {entry.value for tensor in onnx.load(tmp_path / folder / "out.onnx", load_external_data=False).graph.initializer
                   for entry in tensor.external_data if entry.key == "location"}  # fmt: skip
        assert entries == {"out.onnx.data"}
    assert (tmp_path / "plain" / "out.onnx.data").read_bytes() == (tmp_path / "small" / "out.onnx.data").read_bytes()


def spilled(folder: Path) -> bool:
    """Whether this process holds a nameless file in `folder`."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("there is no /proc/self/fd here")
    links = [file.readlink() for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return any(link.is_relative_to(folder) and link.name.endswith("(deleted)") for link in links)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("where", ["graphq.qdq.insert_weight", "graphq.segments.Segments._session", "graphq.ir.save"])
def test_an_interrupt_leaves_nothing_behind(
    tmp_path: Path, source: Path, where: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))

    def interrupted(*args: object, **options: object) -> object:
        assert where != "graphq.segments.Segments._session" or spilled(tmp_path / "out"), "weights were spilled"
        raise error

    monkeypatch.setattr(where, interrupted)
    with pytest.raises(error):
        converted(source, tmp_path / "out" / "out.onnx", "int4-weight-only", TINY_BUDGET)
    assert not list((tmp_path / "out").iterdir()) and not list(temporary.iterdir())


def test_a_refused_result_is_whole(tmp_path: Path, source: Path) -> None:
    """It is read after what was spilled is gone."""
    (tmp_path / "out").mkdir()
    plan = load_recipe("int4-weight-only").with_gates({"min_cosine": 1.0})
    with pytest.raises(GraphqError, match="misses a gate"):
        convert(source, tmp_path / "out" / "out.onnx", recipe=plan, memory_budget=TINY_BUDGET)
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["out.onnx.failed.onnx"]
    onnx.checker.check_model(tmp_path / "out" / "out.onnx.failed.onnx", full_check=True)


def test_a_speed_gate_is_named_where_nothing_measures_it(tmp_path: Path, source: Path) -> None:
    plan = replace(load_recipe("int4-weight-only"), gates=load_recipe("int4-weight-only").with_gates({"min_speedup": 1.0}).gates)
    found = convert(source, tmp_path / "out.onnx", recipe=plan, memory_budget=TINY_BUDGET)
    assert any("gate min_speedup was not measured" in note for note in found.notes)
    assert "min_speedup" not in {gate.name for gate in found.gates}


def test_spilled_tensors_read_back_as_they_were(tmp_path: Path) -> None:
    model = ir.from_onnx_text('<ir_version: 13, opset_import: ["" : 25]>\nm (float[n] x) => (float[n] y) { y = Relu(x) }')
    rng = np.random.default_rng(0)
    arrays = {"int4": rng.integers(-8, 8, (61, 67), np.int8), "uint4": rng.integers(0, 16, (61, 67), np.uint8),
              "int8": rng.integers(-128, 128, (61, 67), np.int8), "float32": rng.standard_normal((61, 67)).astype(np.float32)}  # fmt: skip
    with ir.spilling(tmp_path / "m.onnx", True) as keep:
        edit = Editor(model, keep)
        values = {storage: edit.initializer(f"{storage}_codes", array, storage) for storage, array in arrays.items()}
        for storage, value in values.items():
            assert isinstance(value.const_value, ir_files.FileTensor)
            np.testing.assert_array_equal(ir.constant(value).astype(arrays[storage].dtype), arrays[storage])  # type: ignore[union-attr]
        ir.save(model, tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]
    back = ir.load(tmp_path / "m.onnx")
    for storage, array in arrays.items():
        found = ir.constant(back.graph.initializers[f"{storage}_codes"])
        np.testing.assert_array_equal(found.astype(array.dtype), array)  # type: ignore[union-attr]


def mapped(source: Path) -> int:
    """How often this process maps the weights of `source`."""
    if not Path("/proc/self/maps").exists():
        pytest.skip("there is no /proc/self/maps here")
    return Path("/proc/self/maps").read_text().count(f"{source.parent}/m.data")


def test_weights_in_files_are_mapped_only_while_they_are_read(source: Path) -> None:
    model = ir.load(source)
    assert mapped(source) == 0
    arrays = [ir.constant(value) for value in model.graph.initializers.values()]
    assert mapped(source) > 0 and all(array is not None for array in arrays)
    del arrays
    assert mapped(source) == 0


def test_a_sweep_gives_weights_back_at_every_stop(source: Path) -> None:
    model, reference = ir.load(source), ir.load(source)
    for node in [*model.graph, *reference.graph]:
        node.name = node.outputs[0].name
    ids = np.random.default_rng(0).integers(0, ROWS, (8, 8))
    stops = [node for node in model.graph if node.op_type == "MatMul"]
    count = 0
    for step in sweep(model, reference, stops, open_calibration({"ids": ids}, ir.inputs(model))):
        np.testing.assert_allclose(step.y_ref[0], step.y_cur()[0], atol=1e-5)
        assert mapped(source) == 0
        count += 1
    assert count == LAYERS


def test_the_report_of_a_model_in_pieces_can_be_read(tmp_path: Path, source: Path) -> None:
    convert(source, tmp_path / "out.onnx", recipe="int4-weight-only", memory_budget=TINY_BUDGET, report_dir=tmp_path / "report")
    data = json.loads((tmp_path / "report" / "report.json").read_text())
    assert data["latency"] is None and data["integer_kernels"] and data["comparison"]


def test_an_evaluation_opens_each_segment_once(tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of its batches."""
    opened, session = list[object](), segments.Segments._session

    def counted(*arguments: object) -> object:
        opened.append(arguments)
        return session(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(segments.Segments, "_session", counted)
    counts = []
    for samples in (4, 32):
        opened.clear()
        rng = np.random.default_rng(0)
        np.savez(tmp_path / "eval.npz", ids=rng.integers(0, ROWS, (samples, 8)), labels=rng.integers(0, WIDTH, (samples, 8)))
        done = convert(source, tmp_path / "out.onnx", recipe="int8-weight-only", memory_budget=TINY_BUDGET, evaluate=tmp_path / "eval.npz")
        assert done.accuracy is not None and done.accuracy.samples == samples
        counts.append(len(opened))
    assert counts[0] == counts[1]
