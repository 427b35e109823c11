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
MIN_ACCURACY = 86.0
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
    ("digits_clip", {"input": ["batch", 1, 32, 32], "image_embedding": ["batch", 32]}),
    ("digits_clip_text", {"tokens": ["batch", 48], "text_embedding": ["batch", 32]}),
])  # fmt: skip
def test_interface(name: str, expected: dict[str, list]) -> None:
    graph = onnx.load(onnx_path(name)).graph
    values = (*graph.input, *graph.output)
    assert {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values} == expected


def test_zero_shot_accuracy() -> None:
    """The prompts are no captions of the training; texts that say another digit are of no use."""
    texts = digits_clip.text_embeddings()
    assert digits_clip.accuracy(session("digits_clip"), texts) >= MIN_ACCURACY
    assert digits_clip.accuracy(session("digits_clip"), np.roll(texts, 1, axis=0)) < 10


def test_embeddings_have_length_1_whatever_the_batch() -> None:
    inputs = digits_clip.test_scenes()[0][:5]
    (together,) = session("digits_clip").run(None, {"input": inputs})
    apart = np.concatenate([session("digits_clip").run(None, {"input": image[None]})[0] for image in inputs])
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-5)
    for found in (together, digits_clip.text_embeddings()):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, rtol=0, atol=1e-5)


def test_classifier_is_judged_as_any_other_model(tmp_path: Path) -> None:
    """The programs' files go through `convert` with its evaluation data; the float accuracy is that of the towers."""
    for command, name in (("classifier", "model.onnx"), ("eval", "eval.npz"), ("calib", "calib.npz")):
        digits_clip.main([command, str(tmp_path / name), *(["32"] if command == "calib" else [])])
    report = convert(tmp_path / "model.onnx", tmp_path / "out.onnx", recipe="int8-weight-only", calib=tmp_path / "calib.npz",
                     evaluate=tmp_path / "eval.npz")  # fmt: skip
    assert report.accuracy is not None
    expected = digits_clip.accuracy(session("digits_clip"), digits_clip.text_embeddings())
    assert 100 * report.accuracy.reference == pytest.approx(expected, abs=0.11)
    assert report.accuracy.result > report.accuracy.reference - 0.02


# ---- the data -------------------------------------------------------------------------------------------------------


def test_scenes_show_a_digit_of_the_split_over_scraps_of_half_its_ink() -> None:
    inputs, labels = digits_clip.test_scenes()
    assert inputs.shape == (1000, 1, 32, 32) and inputs.dtype == np.float32 and inputs.min() == -1 and np.bincount(labels).min() > 70
    for image, label in zip(inputs[:10, 0], labels, strict=False):
        seen = image >= 0.25  # scraps end at 0
        assert any(shows(image, seen, one) for size in digits_clip.SIZES for one in digit_images(label, size))


def digit_images(label: int, size: int) -> np.ndarray:
    pixels, labels = digits.images("test", size)
    return pixels[labels == label, 0]


def shows(image: np.ndarray, seen: np.ndarray, one: np.ndarray) -> bool:
    """Whether the ink that is `seen` is that of the digit `one` at some place."""
    ink = one >= 0.25
    if ink.sum() != seen.sum():
        return False
    top, left = (np.argwhere(seen).min(0) - np.argwhere(ink).min(0)).tolist()
    return bool((image[top : top + len(one), left : left + len(one)][ink] == one[ink]).all())


def test_calibration_is_seeded() -> None:
    assert digits_clip.calibration(7).tobytes() == digits_clip.calibration(7).tobytes()
    assert digits_clip.calibration(7).tobytes() != digits_clip.calibration(7, seed=1).tobytes()
    with pytest.raises(ValueError, match="calibration count is 0"):
        digits_clip.calibration(0)


def test_captions_name_their_digit_and_never_as_the_prompts_do() -> None:
    random = np.random.RandomState(0)
    found = [digits_clip.caption(7, random) for _ in range(500)]
    names = {"7", *(names[7] for names in digits_clip.NAMES.values())}
    assert all(len(names.intersection(text.rstrip(".").split())) == 1 for text in found)
    assert {name for text in found for name in names.intersection(text.rstrip(".").split())} == names
    assert len(set(found)) > 300 and not any("photo" in text for text in found)
    assert digits_clip.prompts()[7] == "a photo of a seven."


def test_tokens_are_characters() -> None:
    found = digits_clip.encode(["ab", " z"])
    assert found.shape == (2, 48) and found.dtype == np.int64
    assert ["".join(digits_clip.ALPHABET[token] for token in row).rstrip() for row in found] == ["ab", " z"]
    for text in ("e" * 49, "A"):
        with pytest.raises(ValueError, match="is no caption"):
            digits_clip.encode([text])
