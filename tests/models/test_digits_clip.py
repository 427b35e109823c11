"""The small dual encoder: legal towers, good without training for its prompts, and data that is what it claims to be."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from graphq.convert import convert
from graphq.models import digits, digits_clip, onnx_path

TOWERS = ["digits_clip", "digits_clip_text"]
MIN_ACCURACY, MIN_UNSEEN = 85.0, 70.0
MAX_SIZE_BYTES = 2_000_000


@cache
def session(name: str) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(onnx_path(name), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("name", TOWERS)
def test_file_is_legal_small_and_self_contained(name: str) -> None:
    model, path = onnx.load(onnx_path(name), load_external_data=False), onnx_path(name)
    onnx.checker.check_model(model, full_check=True)
    assert path.stat().st_size <= MAX_SIZE_BYTES and model.ir_version <= 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert all(weight.data_location == onnx.TensorProto.DEFAULT for weight in model.graph.initializer)
    assert not model.metadata_props and not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not [trace for trace in (b"stack_trace", b".py", b"/home", b"/root", b"/work") if trace in path.read_bytes()]


@pytest.mark.parametrize(("name", "expected"), [
    ("digits_clip", {"input": ["batch", 1, 32, 32], "image_embedding": ["batch", 64]}),
    ("digits_clip_text", {"tokens": ["batch", 42], "text_embedding": ["batch", 64]}),
])  # fmt: skip
def test_interface(name: str, expected: dict[str, list]) -> None:
    graph = onnx.load(onnx_path(name)).graph
    values = (*graph.input, *graph.output)
    assert {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values} == expected


def test_zero_shot_accuracy() -> None:
    """Of all pairs, and of those that no image and no caption of the training shows; a guess is right once in a hundred."""
    texts = digits_clip.text_embeddings()
    assert digits_clip.accuracy(session("digits_clip"), texts) >= MIN_ACCURACY
    assert digits_clip.accuracy(session("digits_clip"), texts, unseen=True) >= MIN_UNSEEN
    wrong_order = texts.reshape(10, 10, -1).transpose(1, 0, 2).reshape(100, -1)
    assert digits_clip.accuracy(session("digits_clip"), wrong_order) < 20  # pairs of equal digits stay right


def test_embeddings_have_length_1_whatever_the_batch() -> None:
    inputs = digits_clip.test_images()[0][:5]
    (together,) = session("digits_clip").run(None, {"input": inputs})
    apart = np.concatenate([session("digits_clip").run(None, {"input": image[None]})[0] for image in inputs])
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-5)
    for found in (together, digits_clip.text_embeddings()):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-5)


def test_classifier_is_judged_as_any_other_model(tmp_path: Path) -> None:
    """The programs' files go through `convert` with its evaluation data, and the float accuracy is that of the towers."""
    for command, name in (("classifier", "model.onnx"), ("eval", "eval.npz"), ("calib", "calib.npz")):
        digits_clip.main([command, str(tmp_path / name), *(["32"] if command == "calib" else [])])
    report = convert(tmp_path / "model.onnx", tmp_path / "out.onnx", recipe="int8-weight-only", calib=tmp_path / "calib.npz",
                     evaluate=tmp_path / "eval.npz")  # fmt: skip
    assert report.accuracy is not None
    expected = digits_clip.accuracy(session("digits_clip"), digits_clip.text_embeddings())
    assert 100 * report.accuracy.reference == pytest.approx(expected, abs=0.21)
    assert report.accuracy.result > report.accuracy.reference - 0.02


# ---- the data -------------------------------------------------------------------------------------------------------


def test_images_show_a_digit_of_the_split_in_each_half() -> None:
    inputs, labels = digits_clip.test_images()
    assert inputs.shape == (500, 1, 32, 32) and inputs.dtype == np.float32 and np.bincount(labels).tolist() == [5] * 100
    pixels, digit = digits.images("test", digits_clip.SIDE)
    for image, pair in zip(inputs[:20, 0], labels, strict=False):
        for half, wanted in ((image[:, :16], pair // 10), (image[:, 16:], pair % 10)):
            rows = [np.flatnonzero([(half[top : top + 16] == one).all() for one in pixels[:, 0]]) for top in range(17)]
            assert wanted in digit[np.concatenate(rows)]


def test_calibration_is_seeded_and_leaves_out_what_training_does() -> None:
    assert digits_clip.calibration(7).tobytes() == digits_clip.calibration(9)[:7].tobytes()
    assert digits_clip.calibration(7).tobytes() != digits_clip.calibration(7, seed=1).tobytes()
    left_out = np.array([not digits_clip.is_trained(pair) for pair in range(100)]).reshape(10, 10)
    assert (left_out.sum(0) == 2).all() and (left_out.sum(1) == 2).all()
    with pytest.raises(ValueError, match="calibration count is 0"):
        digits_clip.calibration(0)


def test_captions_name_both_digits_in_order_and_never_as_the_prompts_do() -> None:
    random = np.random.RandomState(0)
    found = [digits_clip.caption(72, random) for _ in range(500)]
    names = {name for names in digits_clip.NAMES.values() for name in (names[7], names[2], "7", "2")}
    for text in found:
        named = [word for word in text.replace(",", " ").rstrip(".").split() if word in names]
        assert len(named) == 2 and named[0] in {"7", "seven", "sieben", "sept"} and named[1] in {"2", "two", "zwei", "deux"}
    assert len(set(found)) > 100 and not any("photo" in text for text in found)
    assert digits_clip.prompts()[72] == "a photo of a seven and a two."


def test_tokens_are_characters() -> None:
    found = digits_clip.encode(["ab", " z"])
    assert found.shape == (2, 42) and found.dtype == np.int64
    assert ["".join(digits_clip.ALPHABET[token] for token in row).rstrip() for row in found] == ["ab", " z"]
    for text in ("é" * 43, "A"):
        with pytest.raises(ValueError, match="is no caption"):
            digits_clip.encode([text])
