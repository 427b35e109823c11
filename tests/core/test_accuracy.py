"""Accuracy: labelled data is read with the same care as calibration data, and top-1 is counted right."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphq import accuracy, ir
from graphq.accuracy import Labelled, open_labelled
from graphq.calibration import open_calibration
from graphq.errors import DataError
from graphq.executor import Executor
from graphq.spec import ModelInput

F32 = np.dtype(np.float32)
INPUTS = (ModelInput("x", F32, ("n", 4)),)
COUNT = 2 * accuracy.IMAGES + 3
X = np.random.default_rng(0).standard_normal((COUNT, 4)).astype(np.float32)
HEAD = '<ir_version: 10, opset_import: ["" : 21]>'


def write(path: Path, **arrays: np.ndarray) -> Path:
    np.savez(path, **arrays)
    return path


def executor(op: str) -> Executor:
    return Executor(ir.from_onnx_text(f"{HEAD}\nm (float[n, 4] x) => (float[n, 4] y) {{ y = {op}(x) }}"))


def test_top1_equals_numpy() -> None:
    labels = np.random.default_rng(1).integers(0, 4, COUNT)
    found = accuracy.compare(executor("Identity"), executor("Neg"), Labelled(open_calibration(X, INPUTS), labels))
    assert found.metric == "top1" and found.samples == COUNT
    assert found.reference == pytest.approx((X.argmax(1) == labels).mean()) and found.result == pytest.approx(
        (X.argmin(1) == labels).mean()
    )
    right = accuracy.compare(executor("Identity"), executor("Neg"), Labelled(open_calibration(X, INPUTS), X.argmax(1)))
    assert (right.reference, right.result) == (1.0, 0.0)


def test_a_fixed_batch_leaves_the_last_samples_out() -> None:
    inputs = (ModelInput("x", F32, (4, 4)),)
    model = ir.from_onnx_text(f"{HEAD}\nm (float[4, 4] x) => (float[4, 4] y) {{ y = Identity(x) }}")
    found = accuracy.compare(Executor(model), Executor(model), Labelled(open_calibration(X, inputs), X.argmax(1)))
    assert found.samples == COUNT // 4 * 4 and found.reference == 1.0


TOKENS = np.random.default_rng(2).standard_normal((COUNT, 5, 7)).astype(np.float32)
TOKEN_INPUTS = (ModelInput("x", F32, ("n", "t", 7)),)


def token_executor(op: str) -> Executor:
    return Executor(ir.from_onnx_text(f"{HEAD}\nm (float[n, t, 7] x) => (float[n, t, 7] y) {{ y = {op}(x) }}"))


def test_perplexity_equals_a_softmax() -> None:
    """Tokens with negative labels count nowhere; the rest gives exp of the mean negative log of softmax."""
    labels = np.random.default_rng(3).integers(0, 7, TOKENS.shape[:2])
    labels[::3, 2:] = -100
    found = accuracy.compare(token_executor("Identity"), token_executor("Neg"), Labelled(open_calibration(TOKENS, TOKEN_INPUTS), labels))
    kept = labels >= 0
    for sign, share, perplexity in ((1, found.reference, found.reference_perplexity), (-1, found.result, found.result_perplexity)):
        scores = sign * TOKENS[kept].astype(np.float64)
        odds = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        assert perplexity == pytest.approx(np.exp(-np.log(odds[np.arange(kept.sum()), labels[kept]]).mean()), rel=1e-9)
        assert share == pytest.approx((scores.argmax(1) == labels[kept]).mean())
    assert (found.samples, found.tokens) == (COUNT, kept.sum())
    assert found.perplexity_ratio == pytest.approx(found.result_perplexity / found.reference_perplexity)  # type: ignore[operator]


def test_large_logits_overflow_nowhere() -> None:
    labels = TOKENS.argmax(2)
    data = open_calibration(1e4 * TOKENS, TOKEN_INPUTS)
    found = accuracy.compare(token_executor("Identity"), token_executor("Neg"), Labelled(data, labels))
    assert found.reference_perplexity == pytest.approx(1.0) and found.result_perplexity == float("inf")


@pytest.mark.parametrize(("shape", "fill", "message"), [
    ((COUNT, 4), 0, rf"{COUNT} samples.*labels \[{COUNT}, 4\], output \[samples, 5, 7\].*labels \[{COUNT}, 5\].*pad labels with -1"),
    ((COUNT, 5), 7, f"tokens that the model does not have.*{COUNT} samples.*0 to 6, or negative"),
    ((COUNT, 5), -100, "no label to judge by"),
])  # fmt: skip
def test_labels_of_tokens_that_do_not_fit(shape: tuple[int, int], fill: int, message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        accuracy.compare(token_executor("Identity"), token_executor("Neg"),
                         Labelled(open_calibration(TOKENS, TOKEN_INPUTS), np.full(shape, fill)))  # fmt: skip


def test_one_label_is_not_judged_by_a_table_of_scores() -> None:
    """`[samples, 5, 7]` are not 35 classes; `[samples, 4, 1, 1]` are 4."""
    with pytest.raises(DataError, match=r"(?s)do not fit.*labels \[\d+\], output \[\d+, 5, 7\]"):
        accuracy.compare(token_executor("Identity"), token_executor("Neg"),
                         Labelled(open_calibration(TOKENS, TOKEN_INPUTS), np.zeros(COUNT, int)))  # fmt: skip
    model = ir.from_onnx_text(f"""{HEAD}
m (float[n, 4] x) => (float[n, 4, 1, 1] y) {{ a = Constant <value_ints = [2, 3]> ()  y = Unsqueeze(x, a) }}""")
    found = accuracy.compare(Executor(model), Executor(model), Labelled(open_calibration(X, INPUTS), X.argmax(1)))
    assert found.reference == 1.0


@pytest.mark.parametrize("wrong", [-1, X.shape[1]])
def test_labels_of_other_classes(wrong: int) -> None:
    labels = X.argmax(1)
    labels[3] = wrong
    with pytest.raises(DataError, match=f"(?s)classes that the model does not have.*0 to {X.shape[1] - 1}"):
        accuracy.compare(executor("Identity"), executor("Neg"), Labelled(open_calibration(X, INPUTS), labels))


@pytest.mark.parametrize("kind", ["int64", "int32", "uint8", "int8"])
def test_labelled_data(tmp_path: Path, kind: Any) -> None:
    labels = X.argmax(1).astype(kind)
    found = open_labelled(write(tmp_path / "e.npz", x=X, labels=labels), INPUTS)
    assert found.labels.dtype == np.int64 and len(found.data) == COUNT and str(tmp_path / "e.npz") in found.data.description
    np.testing.assert_array_equal(found.labels, labels)
    np.testing.assert_array_equal(np.concatenate([batch["x"] for batch in found.data.batches(5)]), X)


def test_pixels_are_preprocessed(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 8, 6, 3), dtype=np.uint8)
    found = open_labelled(write(tmp_path / "e.npz", x=pixels, labels=np.arange(3)), (ModelInput("x", F32, ("n", 3, 8, 6)),), "unit")
    np.testing.assert_allclose(next(found.data.batches(3))["x"], pixels.transpose(0, 3, 1, 2) / 255, rtol=1e-6)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": X}, "has no labels.*'labels'"),
        ({"labels": np.arange(COUNT)}, "no array for input 'x'"),
        ({"x": X, "labels": np.arange(COUNT - 1)}, rf"labels do not fit.*int64\[{COUNT - 1}\].*{COUNT} samples"),
        ({"x": X, "labels": np.zeros((COUNT, 1, 1), int)}, "labels do not fit"),
        ({"x": X, "labels": np.array(3)}, "labels do not fit"),
        ({"x": X, "labels": np.zeros(COUNT)}, "labels do not fit.*float64"),
        ({"x": X, "labels": np.zeros(COUNT, bool)}, "labels do not fit.*bool"),
        ({"x": X[:, :3], "labels": np.arange(COUNT)}, "array for input 'x'"),
        ({"x": X, "labels": np.arange(COUNT), "more": X}, "array 'more' is no input"),
        ({"x": X, "labels": np.array([{}] * COUNT)}, "Python objects"),
    ],
)
def test_data_that_does_not_fit(tmp_path: Path, arrays: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=f"(?s){message}"):
        open_labelled(write(tmp_path / "e.npz", **arrays), INPUTS)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "e.npz"
    with pytest.raises(DataError, match="(?s)no such evaluation data.*e.npz"):
        open_labelled(path, INPUTS)
    whole = write(path, x=X, labels=np.arange(COUNT)).read_bytes()
    for content, message in ((b"", "something else"), (whole[:-50], "truncated or damaged"), (pickle.dumps(1), "a pickle")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=f"(?s)cannot use e.npz.*{message}"):
            open_labelled(path, INPUTS)
    np.save(tmp_path / "e.npy", X)
    (tmp_path / "e.npy").rename(path)
    with pytest.raises(DataError, match="an .npy file"):
        open_labelled(path, INPUTS)
