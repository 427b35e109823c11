"""The committed models are legal, self-contained and accurate; the data set is what it claims to be."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from graphq.models import digits, onnx_path

CLASSIFIERS = ["digits_cnn", "digits_vit"]
MIN_ACCURACY = 97.0
MAX_SIZE_BYTES = 2_000_000
TRAIN_HEAD = [1092, 693, 325, 74, 793]
TEST_HEAD = [1071, 1527, 1039, 1105, 259]


def session_of(name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(onnx_path(name), providers=["CPUExecutionProvider"])


def op_types(name: str) -> list[str]:
    return [node.op_type for node in onnx.load(onnx_path(name)).graph.node]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_file_is_legal_small_and_self_contained(name: str) -> None:
    model = onnx.load(onnx_path(name), load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert onnx_path(name).stat().st_size <= MAX_SIZE_BYTES
    assert model.ir_version <= 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert all(weight.data_location == onnx.TensorProto.DEFAULT for weight in model.graph.initializer)


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_interface_is_input_to_logits_with_dynamic_batch(name: str) -> None:
    graph = onnx.load(onnx_path(name)).graph
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in (*graph.input, *graph.output)
    }
    assert shapes == {"input": ["batch", 1, 32, 32], "logits": ["batch", 10]}


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_file_holds_no_trace_of_the_build_machine(name: str) -> None:
    model = onnx.load(onnx_path(name))
    assert not model.metadata_props and not model.doc_string
    assert not any(node.metadata_props or node.doc_string for node in model.graph.node)
    content = onnx_path(name).read_bytes()
    assert not [trace for trace in (b"stack_trace", b".py", b"/home", b"/root", b"/work") if trace in content]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_accuracy(name: str) -> None:
    assert digits.accuracy(session_of(name)) >= MIN_ACCURACY


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_result_does_not_depend_on_the_batch_size(name: str) -> None:
    session = session_of(name)
    inputs = digits.images("test")[0][:5]
    (together,) = session.run(None, {"input": inputs})
    apart = np.concatenate([session.run(None, {"input": image[None]})[0] for image in inputs])
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-4)


def test_cnn_keeps_its_batch_norms() -> None:
    types = op_types("digits_cnn")
    assert types.count("BatchNormalization") == types.count("Conv") == 8
    depthwise = [
        attribute.i
        for node in onnx.load(onnx_path("digits_cnn")).graph.node
        for attribute in node.attribute
        if attribute.name == "group" and attribute.i > 1
    ]
    assert depthwise == [64, 128]


def test_vit_shows_its_attention() -> None:
    graph = onnx.load(onnx_path("digits_vit")).graph
    softmax_outputs = {node.output[0] for node in graph.node if node.op_type == "Softmax"}
    readers = [node.op_type for node in graph.node if softmax_outputs.intersection(node.input)]
    assert readers == ["MatMul"] * 4
    assert op_types("digits_vit").count("Gelu") == 4


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match="digits_clip, digits_clip_text, digits_cnn, digits_lm, digits_vit"):
        onnx_path("digits_mlp")


def test_images_have_the_documented_form() -> None:
    inputs, labels = digits.images("test")
    assert inputs.dtype == np.float32 and inputs.shape == (len(labels), 1, 32, 32)
    assert labels.dtype == np.int64
    assert inputs.min() == -1.0 and 0.9 < inputs.max() <= 1.0
    assert inputs.flags.c_contiguous


def test_upscaling_is_bilinear() -> None:
    """Half-pixel centres at factor 4: the first two samples clamp, then steps of a quarter, centred between pixels."""
    weights = digits._upscale_weights(2, 8)
    np.testing.assert_array_equal(weights[:, 1], [0, 0, 0.125, 0.375, 0.625, 0.875, 1, 1])
    np.testing.assert_array_equal(weights.sum(axis=1), 1)


def test_split_is_disjoint_and_complete() -> None:
    rows = np.concatenate([digits.split_indices("train"), digits.split_indices("test")])
    np.testing.assert_array_equal(np.sort(rows), np.arange(1797))


def test_split_is_stratified() -> None:
    train, test = (np.bincount(digits.images(split)[1], minlength=10) for split in ("train", "test"))
    assert np.abs(test - (train + test) * 0.25).max() <= 0.5


def test_split_is_the_one_the_models_were_trained_on() -> None:
    """Frozen values: another split would leak training images into the measured accuracy."""
    np.testing.assert_array_equal(digits.split_indices("train"), digits.split_indices("train"))
    assert digits.split_indices("train")[:5].tolist() == TRAIN_HEAD
    assert digits.split_indices("test")[:5].tolist() == TEST_HEAD


def test_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown split 'val'; the splits are: train, test"):
        digits.images("val")  # type: ignore[arg-type]


def test_calib_program_writes_the_head_of_the_train_split(tmp_path: Path) -> None:
    out = tmp_path / "calib.npz"
    digits.main(["calib", str(out), "17"])
    with np.load(out) as arrays:
        assert arrays.files == ["input"]
        np.testing.assert_array_equal(arrays["input"], digits.images("train")[0][:17])


def test_calib_program_writes_128_images_unless_told(tmp_path: Path) -> None:
    out = tmp_path / "calib.npz"
    digits.main(["calib", str(out)])
    with np.load(out) as arrays:
        assert arrays["input"].shape == (128, 1, 32, 32) and arrays["input"].dtype == np.float32


@pytest.mark.parametrize("count", ["0", "1798"])
def test_calib_program_refuses_an_impossible_count(count: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        digits.main(["calib", str(tmp_path / "calib.npz"), count])
    assert f"calibration count is {count}" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_eval_program_writes_the_test_split(tmp_path: Path) -> None:
    out = tmp_path / "eval.npz"
    digits.main(["eval", str(out)])
    inputs, labels = digits.images("test")
    with np.load(out) as arrays:
        assert sorted(arrays.files) == ["input", "labels"]
        np.testing.assert_array_equal(arrays["input"], inputs)
        np.testing.assert_array_equal(arrays["labels"], labels)


def test_accuracy_program_prints_percent(capsys: pytest.CaptureFixture) -> None:
    digits.main(["accuracy", str(onnx_path("digits_cnn"))])
    assert capsys.readouterr().out.startswith("digits_cnn.onnx: 9")
