"""The small language model: legal, good, the same with its cache as without, and its text is the one that it was trained on."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from graphq.convert import convert
from graphq.errors import UsageError, VerifyError
from graphq.models import digits_lm, onnx_path
from graphq.report import Report

MODEL = onnx_path("digits_lm")
MAX_PERPLEXITY = 3.8
MAX_SIZE_BYTES = 2_000_000
TEXT_SHA256 = "3cdd716ac65f4b3b366c3ca3eab96b866b99c204bccdaaf2891e67a92fc7e51e"


@cache
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


def run(tokens: np.ndarray, past: dict[str, np.ndarray]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits, and the cache for the next call."""
    logits, *present = session().run(["logits", *digits_lm.PRESENT_NAMES], {"input_ids": tokens, **past})
    return logits, dict(zip(digits_lm.PAST_NAMES, present, strict=True))


def test_file_is_legal_small_and_self_contained() -> None:
    model = onnx.load(MODEL, load_external_data=False)
    onnx.checker.check_model(model, full_check=True)
    assert MODEL.stat().st_size <= MAX_SIZE_BYTES and model.ir_version <= 10
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 21)]
    assert all(weight.data_location == onnx.TensorProto.DEFAULT for weight in model.graph.initializer)
    assert not model.metadata_props and not any(node.metadata_props or node.doc_string for node in model.graph.node)
    assert not [trace for trace in (b"stack_trace", b".py", b"/home", b"/root", b"/work") if trace in MODEL.read_bytes()]


def test_interface_has_a_cache_for_each_layer() -> None:
    graph = onnx.load(MODEL).graph
    values = (*graph.input, *graph.output)
    shapes = {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}
    assert shapes == {
        "input_ids": ["batch", "sequence"], "logits": ["batch", "sequence", 96],
        **{name: ["batch", 4, "past", 32] for name in digits_lm.PAST_NAMES},
        **{name: ["batch", 4, "past+sequence", 32] for name in digits_lm.PRESENT_NAMES},
    }  # fmt: skip
    assert graph.output[0].name == "logits"


def test_perplexity() -> None:
    """Of one character; the frequencies of characters alone give more than 20."""
    assert 1 < digits_lm.perplexity(session()) <= MAX_PERPLEXITY
    labels = digits_lm.windows("test")[1]
    counts = np.bincount(digits_lm.blocks("train").ravel(), minlength=96) + 1
    assert np.exp(-np.log(counts / counts.sum())[labels].mean()) > 20


@pytest.mark.parametrize("parts", [(1,) * 24, (23, 1), (1, 23), (7, 9, 8)])
def test_decoding_with_the_cache_gives_the_logits_of_one_pass(parts: tuple[int, ...]) -> None:
    tokens = digits_lm.windows("test")[0][:3, :24]
    whole, _ = run(tokens, digits_lm.empty_past(3))
    found, past, start = [], digits_lm.empty_past(3), 0
    for count in parts:
        logits, past = run(tokens[:, start : start + count], past)
        found.append(logits)
        start += count
    np.testing.assert_allclose(np.concatenate(found, axis=1), whole, rtol=0, atol=1e-4)
    assert {array.shape for array in past.values()} == {(3, 4, 24, 32)}


def test_no_token_sees_those_after_it() -> None:
    tokens = digits_lm.windows("test")[0][:1].repeat(2, axis=0)
    tokens[1, 64:] = (tokens[1, 64:] + 1) % 96
    logits, _ = run(tokens, digits_lm.empty_past(2))
    np.testing.assert_allclose(logits[0, :64], logits[1, :64], rtol=0, atol=1e-4)
    assert np.abs(logits[0, 64:] - logits[1, 64:]).max() > 1


def test_writing_continues_a_text() -> None:
    """Each character is the most likely one after all before it, which a pass without the cache confirms."""
    text = digits_lm.write(session(), "The model ", 12)
    assert text.startswith("The model ") and len(text) == 22
    logits, _ = run(digits_lm.encode(text)[None, :-1], digits_lm.empty_past(1))
    assert digits_lm.decode(logits[0].argmax(1))[9:] == text[10:]


# ---- the text -------------------------------------------------------------------------------------------------------


def test_text_is_the_one_the_model_was_trained_on() -> None:
    """Frozen: other text, or another split, would leak training text into the measured perplexity."""
    text = (Path(digits_lm.__file__).parent / "digits_lm.txt").read_bytes()
    assert hashlib.sha256(text).hexdigest() == TEXT_SHA256
    train, test = digits_lm.blocks("train"), digits_lm.blocks("test")
    assert train.shape == (95, 2048) and test.shape == (10, 2048)
    whole = digits_lm.encode(text.decode("ascii"))
    np.testing.assert_array_equal(test[0], whole[9 * 2048 : 10 * 2048])
    np.testing.assert_array_equal(train[9], whole[10 * 2048 : 11 * 2048])


def test_tokens_are_characters() -> None:
    text = "\n ~Aa0"
    assert digits_lm.encode(text).tolist() == [0, 1, 95, 34, 66, 17] and digits_lm.decode(digits_lm.encode(text)) == text
    with pytest.raises(ValueError, match="neither printable ASCII"):
        digits_lm.encode("é")


def test_labels_are_the_tokens_that_follow() -> None:
    inputs, labels = digits_lm.windows("test")
    assert inputs.shape == labels.shape == (150, 128) and inputs.dtype == labels.dtype == np.int64
    np.testing.assert_array_equal(inputs[:, 1:], labels[:, :-1])
    with pytest.raises(ValueError, match="unknown split 'val'; the splits are: train, test"):
        digits_lm.windows("val")  # type: ignore[arg-type]


def test_programs_write_the_inputs_of_the_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    digits_lm.main(["calib", str(tmp_path / "calib.npz"), "5"])
    digits_lm.main(["eval", str(tmp_path / "eval.npz")])
    with np.load(tmp_path / "calib.npz") as calib, np.load(tmp_path / "eval.npz") as evaluation:
        assert set(calib.files) == {"input_ids", *digits_lm.PAST_NAMES} == set(evaluation.files) - {"labels"}
        assert calib["input_ids"].shape == (5, 128) and calib[digits_lm.PAST_NAMES[0]].shape == (5, 4, 0, 32)
        assert {row.tobytes() for row in calib["input_ids"]} <= {row.tobytes() for row in digits_lm.windows("train")[0]}
        np.testing.assert_array_equal(evaluation["labels"], digits_lm.windows("test")[1])
    for count in ("0", "1426"):
        with pytest.raises(SystemExit):
            digits_lm.main(["calib", str(tmp_path / "other.npz"), count])
        assert f"calibration count is {count}" in capsys.readouterr().err
    digits_lm.main(["perplexity", str(MODEL)])
    assert capsys.readouterr().out.startswith("digits_lm.onnx: perplexity 3.")


# ---- conversions of it ----------------------------------------------------------------------------------------------

WINDOWS = 32
"""Of the test split: enough to tell recipes apart, and quick."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    digits_lm.main(["calib", str(folder / "calib.npz"), "8"])
    digits_lm.main(["eval", str(folder / "all.npz")])
    with np.load(folder / "all.npz") as arrays:
        np.savez(folder / "eval.npz", **{name: array[:WINDOWS] for name, array in arrays.items()})
    return folder


def converted(folder: Path, recipe: str, **limits: float | None) -> Report:
    return convert(MODEL, folder / "out.onnx", recipe=recipe, calib=folder / "calib.npz", evaluate=folder / "eval.npz",
                   limits={"min_speedup": None, **limits})  # fmt: skip


@pytest.mark.parametrize(("recipe", "ratio"), [
    ("int8", 1.01), ("int8-weight-only", 1.005), ("int4-weight-only", 1.05), ("w4a16-gptq", 1.05), ("nested-8-6-4-2", 1.005),
])  # fmt: skip
def test_recipes_keep_perplexity(data: Path, recipe: str, ratio: float) -> None:
    """With a cache of length 0 among the calibration inputs. The report tells what the file itself shows."""
    found = converted(data, recipe).accuracy
    assert found is not None and (found.samples, found.tokens) == (WINDOWS, 128 * WINDOWS)
    own = digits_lm.perplexity(onnxruntime.InferenceSession(data / "out.onnx", providers=["CPUExecutionProvider"]), count=WINDOWS)
    assert found.result_perplexity == pytest.approx(own, rel=1e-3)
    assert found.reference_perplexity == pytest.approx(digits_lm.perplexity(session(), count=WINDOWS), rel=1e-4)
    assert found.perplexity_ratio is not None and found.perplexity_ratio <= ratio


def test_a_gate_on_perplexity(data: Path) -> None:
    (gate,) = [gate for gate in converted(data, "int8-weight-only", max_perplexity_ratio=1.01).gates if "perplexity" in gate.name]
    assert gate.passed and gate.value == pytest.approx(1, abs=0.01)
    with pytest.raises(VerifyError, match=r"max_perplexity_ratio is 1\.001, measured 1\.0"):
        converted(data, "int4-weight-only", max_perplexity_ratio=1.001)
    with pytest.raises(UsageError, match="(?s)max_perplexity_ratio.*labels"):
        convert(MODEL, data / "out.onnx", recipe="int8-weight-only", limits={"max_perplexity_ratio": 1.1})
    with np.load(data / "eval.npz") as arrays:
        np.savez(data / "classes.npz", **{**arrays, "labels": np.zeros(WINDOWS, np.int64)})
    with pytest.raises(UsageError, match=r"(?s)loss of perplexity is limited.*labels \[samples, tokens\]"):
        convert(MODEL, data / "out.onnx", recipe="int8-weight-only", evaluate=data / "classes.npz", limits={"max_perplexity_ratio": 1.1})


def test_the_command_line_shows_perplexity(data: Path, capsys: pytest.CaptureFixture) -> None:
    from graphq import cli

    with pytest.raises(SystemExit) as stop:
        cli.main(["convert", str(MODEL), "-o", str(data / "shown.onnx"), "--recipe", "int8-weight-only", "--eval", str(data / "eval.npz")])
    out = capsys.readouterr().out
    assert not stop.value.code and f"next-token top1 on {128 * WINDOWS} tokens" in out and "perplexity" in out and "times" in out
