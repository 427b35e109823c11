"""What users get wrong: the exit code, a message that says what, where and what to do, no traceback, and nothing written."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from graphq import cli
from graphq.models import onnx_path

WIDTH = 64
WEIGHT_BYTES = 4 * WIDTH * WIDTH
ROWS = ("  where: ", "  expected: ", "  try: ")


def contents(folder: Path) -> dict[Path, bytes | None]:
    """Every path below `folder`, with its bytes if it is a file."""
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


@pytest.fixture
def refused(folder: Path, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Converts with one thing wrong and returns the message, after checking what holds for every refusal."""

    def call(code: int = 1, rows: int = 2, **options: object) -> str:
        model = options.pop("model", folder / "model.onnx")
        values = {"out": folder / "out" / "small.onnx", "recipe": folder / "recipe.yaml", "calib": folder / "calib.npz"} | options
        arguments = [str(part) for name, value in values.items() for part in (f"--{name.replace('_', '-')}", value)]
        before = contents(folder)
        with pytest.raises(SystemExit) as stop:
            cli.main(["convert", str(model), *arguments])
        out, err = capfd.readouterr()
        assert stop.value.code == code, err
        assert not out and "Traceback" not in err and "bug in graphq" not in err
        assert "Error: " in err
        assert code == 2 or sum(row in err for row in ROWS) >= rows, err
        assert contents(folder) == before
        return err

    return call


def test_the_inputs_are_good_when_nothing_is_wrong(folder: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(folder / "model.onnx"), "-o", str(folder / "out" / "small.onnx"), "--recipe", str(folder / "recipe.yaml"),
                  "--calib", str(folder / "calib.npz"), "-q"])  # fmt: skip
    assert not stop.value.code
    assert [path.name for path in (folder / "out").iterdir()] == ["small.onnx"]


# ---- models ---------------------------------------------------------------------------------------------------------


def test_no_model(refused: Callable[..., str], folder: Path) -> None:
    assert "no such model file" in refused(model=folder / "nothing.onnx")


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"hello world " * 100, b"\x00" * 1000, b"PK\x03\x04", b"\xff" * 64])
def test_a_file_that_is_no_model(refused: Callable[..., str], folder: Path, content: bytes) -> None:
    (folder / "other.onnx").write_bytes(content)
    assert "not a readable ONNX model" in refused(model=folder / "other.onnx")


def test_an_empty_model(refused: Callable[..., str], folder: Path) -> None:
    (folder / "empty.onnx").touch()
    assert "is empty" in refused(model=folder / "empty.onnx")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.999])
def test_a_truncated_model(refused: Callable[..., str], folder: Path, share: float) -> None:
    content = onnx_path("digits_cnn").read_bytes()
    (folder / "cut.onnx").write_bytes(content[: int(len(content) * share)])
    assert "cut off" in refused(model=folder / "cut.onnx")


def test_a_folder_as_model(refused: Callable[..., str], folder: Path) -> None:
    assert "model" in refused(model=folder / "out")


def external(folder: Path, location: str, length: int = WEIGHT_BYTES) -> Path:
    """The model with its weight declared to lie at `location`."""
    proto = onnx.load(folder / "model.onnx")
    (tensor,) = (entry for entry in proto.graph.initializer if entry.name == "w")
    for field in ("float_data", "raw_data"):
        tensor.ClearField(field)
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    path = folder / "models" / "external.onnx"
    path.parent.mkdir()
    path.write_bytes(proto.SerializeToString())
    return path


def test_external_data_is_missing(refused: Callable[..., str], folder: Path) -> None:
    message = refused(model=external(folder, "weights.data"))
    assert "external data file is missing" in message and "'w'" in message and "weights.data" in message


def test_external_data_is_cut_off(refused: Callable[..., str], folder: Path) -> None:
    path = external(folder, "weights.data")
    (path.parent / "weights.data").write_bytes(bytes(WEIGHT_BYTES - 1))
    assert "cut off" in refused(model=path)


@pytest.mark.parametrize("absolute", [False, True])
def test_external_data_outside_the_folder(refused: Callable[..., str], folder: Path, absolute: bool) -> None:
    (folder / "secret").write_bytes(bytes(WEIGHT_BYTES))
    path = external(folder, str(folder / "secret") if absolute else "../secret")
    assert "outside the model's folder" in refused(model=path)


def test_external_data_behind_a_link(refused: Callable[..., str], folder: Path) -> None:
    (folder / "secret").write_bytes(bytes(WEIGHT_BYTES))
    path = external(folder, "weights.data")
    (path.parent / "weights.data").symlink_to(folder / "secret")
    assert "outside the model's folder" in refused(model=path)


def test_an_unknown_opset(refused: Callable[..., str], folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    proto.opset_import[0].version = 999
    (folder / "new.onnx").write_bytes(proto.SerializeToString())
    assert "opset 999" in refused(model=folder / "new.onnx")


# ---- data -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"X": np.zeros((8, 4), np.float32)}, ["no array for input 'x'", "'X'"]),
        ({"x": np.zeros((8, 4), np.float32), "masks": np.zeros(8)}, ["'masks' is no input"]),
        ({"x": np.zeros((8, 5), np.float32)}, ["[8, 5]", "samples"]),
        ({"x": np.zeros(4, np.float32)}, ["first axis"]),
        ({"x": np.zeros((8, 4), np.int64)}, ["int64", "float32"]),
        ({"x": np.zeros((8, 4), np.complex64)}, ["complex64"]),
        ({"x": np.zeros((0, 4), np.float32)}, ["no samples"]),
        ({"x": np.array([[np.nan, 1, 2, 3]] * 8, np.float32)}, ["NaN or Inf", "'x'", "sample"]),
        ({"x": np.full((8, 4), np.inf, np.float32)}, ["NaN or Inf"]),
        ({"x": np.array([[object()] * 4])}, ["pickle"]),
    ],
    ids=["name", "extra", "shape", "rank", "integers", "complex", "none", "nan", "inf", "objects"],
)
def test_arrays_that_do_not_fit(refused: Callable[..., str], folder: Path, arrays: dict[str, np.ndarray], words: list[str]) -> None:
    np.savez(folder / "bad.npz", **arrays)  # type: ignore[arg-type]
    message = refused(calib=folder / "bad.npz")
    assert all(word in message for word in words), message


def test_data_that_is_not_there(refused: Callable[..., str], folder: Path) -> None:
    assert "calib.npz" in refused(calib=folder / "calb.npz")


def test_data_of_another_kind(refused: Callable[..., str], folder: Path) -> None:
    assert ".npz" in refused(calib=folder / "recipe.yaml")


def test_an_evaluation_set_without_labels(refused: Callable[..., str], folder: Path) -> None:
    assert "labels" in refused(eval=folder / "calib.npz")


def test_an_evaluation_set_that_is_not_there(refused: Callable[..., str], folder: Path) -> None:
    assert "nothing.npz" in refused(eval=folder / "nothing.npz")


# ---- recipes and targets --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("passes: [normalise]\n", ["line 1", "did you mean 'normalize'?"]),
        ("passes:\n  - normalize\n  - quantize-weights: {bit: 4}\n", ["line 3", "did you mean 'bits'?"]),
        ("passes:\n  - normalize\n  - quantize-weights: {bits: 5}\n", ["line 3", "'bits'", "2, 3, 4 or 8"]),
        ("passes:\n  - quantize-weights: {group_size: -1}\n", ["'group_size'", "greater than or equal to 0"]),
        ("passes:\n  - quantize-weights: {group_size: many}\n", ["'group_size'", "integer"]),
        ("pases: [normalize]\n", ["did you mean 'passes'?"]),
        ("passes: []\n", ["no passes"]),
        ("passes: [normalize\n", ["not valid YAML"]),
        ("", ["recipe"]),
    ],
    ids=["pass", "option", "choice", "range", "type", "key", "empty list", "syntax", "empty"],
)
def test_a_wrong_recipe(refused: Callable[..., str], folder: Path, recipe: str, words: list[str]) -> None:
    (folder / "bad.yaml").write_text(recipe)
    message = refused(recipe=folder / "bad.yaml", rows=1)
    assert all(word in message for word in [*words, "bad.yaml"]), message


def test_a_recipe_file_that_is_not_there(refused: Callable[..., str], folder: Path) -> None:
    assert "no such recipe file" in refused(recipe=folder / "nothing.yaml")


def test_a_pass_that_matches_nothing(refused: Callable[..., str], folder: Path) -> None:
    (folder / "bad.yaml").write_text("passes: [normalize, {quantize-weights: {op_types: [Conv]}}]\n")
    message = refused(recipe=folder / "bad.yaml")
    assert "nothing to quantize" in message and "graphq inspect" in message


def test_an_unknown_target(refused: Callable[..., str]) -> None:
    assert "did you mean 'onnxruntime'?" in refused(code=2, target="onnxrunt")


def test_an_engine_for_a_runtime_without_engines(refused: Callable[..., str]) -> None:
    assert "no engines" in refused(code=2, emit="engine")


def test_a_result_named_after_something_else(refused: Callable[..., str], folder: Path) -> None:
    message = refused(code=2, emit="engine", target="tensorrt-rtx")
    assert "that of an ONNX model" in message and ".engine" in message
    assert "that of an engine" in refused(code=2, out=folder / "out" / "small.engine")


def test_an_engine_without_its_package_is_refused_before_the_model_is_read(
    refused: Callable[..., str], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)  # type: ignore[arg-type]
    message = refused(model=folder / "missing.onnx", emit="engine", target="tensorrt", out=folder / "out" / "m.engine")
    assert "pip install tensorrt" in message


def test_engine_options_without_an_engine(refused: Callable[..., str]) -> None:
    assert "no engine to build" in refused(code=2, engine="sparse", target="tensorrt-rtx")


def test_a_speed_that_cannot_be_measured(refused: Callable[..., str]) -> None:
    assert "graphq bench" in refused(code=2, gate="min_speedup=1.2", target="generic")


def test_an_engine_is_no_model(refused: Callable[..., str], folder: Path) -> None:
    (folder / "m.engine").write_bytes(b"vtrt" + bytes(100))
    assert "TensorRT engine, not an ONNX model" in refused(model=folder / "m.engine")


def test_unknown_preprocessing(refused: Callable[..., str]) -> None:
    assert "imagenet" in refused(preprocess="imagenot")


# ---- outputs --------------------------------------------------------------------------------------------------------


def test_the_output_is_the_input(refused: Callable[..., str], folder: Path) -> None:
    for same in (folder / "model.onnx", folder / "out" / ".." / "model.onnx"):
        assert "overwrite an input" in refused(code=2, out=same)


def test_the_output_is_a_link_to_the_input(refused: Callable[..., str], folder: Path) -> None:
    (folder / "link.onnx").symlink_to(folder / "model.onnx")
    assert "overwrite an input" in refused(code=2, out=folder / "link.onnx")


def test_the_output_is_something_else_that_is_read(refused: Callable[..., str], folder: Path) -> None:
    np.savez(folder / "labelled.npz", x=np.zeros((4, 4), np.float32), labels=np.zeros(4, np.int64))
    for read in ("calib.npz", "recipe.yaml"):
        assert "overwrite an input" in refused(code=2, out=folder / read)
    assert "overwrite an input" in refused(code=2, out=folder / "labelled.npz", eval=folder / "labelled.npz")
    assert "overwrite an input" in refused(code=2, out=folder / "out" / ".." / "calib.npz", calib=folder / "calib.npz")


def test_the_output_is_data_of_the_model(refused: Callable[..., str], folder: Path) -> None:
    proto = onnx.load(folder / "model.onnx")
    for entry in proto.graph.initializer:
        entry.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(entry), entry.name))
    onnx.save_model(proto, folder / "large.onnx", save_as_external_data=True, location="large.bin", size_threshold=0)
    assert "overwrite an input" in refused(code=2, model=folder / "large.onnx", out=folder / "large.bin")


def test_the_output_is_no_file(refused: Callable[..., str], folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    for path in (folder / "pipe", "/dev/null"):
        assert "no regular file" in refused(code=2, out=path)


def test_the_output_is_a_folder(refused: Callable[..., str], folder: Path) -> None:
    assert "is a folder" in refused(code=2, out=folder / "out")


def test_the_output_folder_is_missing(refused: Callable[..., str], folder: Path) -> None:
    assert "does not exist" in refused(code=2, out=folder / "missing" / "small.onnx")


def test_the_output_folder_is_a_file(refused: Callable[..., str], folder: Path) -> None:
    assert "does not exist" in refused(code=2, out=folder / "recipe.yaml" / "small.onnx")


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="needs /proc, a folder that even root cannot write")
def test_the_output_folder_cannot_be_written(refused: Callable[..., str]) -> None:
    assert "cannot be written" in refused(code=2, out="/proc/small.onnx")


def test_the_report_folder_is_below_a_file(refused: Callable[..., str], folder: Path) -> None:
    assert "report cannot be written" in refused(code=2, report=folder / "recipe.yaml" / "report")
