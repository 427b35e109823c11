"""Top-1 accuracy of two models on labelled samples, and perplexity where every token has a label."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path

import numpy as np

from graphq.arrays import open_npz
from graphq.calibration import CalibrationSet, from_columns
from graphq.errors import DataError
from graphq.executor import BATCH
from graphq.preprocess import Preprocess, resolve_preprocess
from graphq.report import Accuracy
from graphq.spec import ModelInput
from graphq.verify import Streaming

IMAGES = 16
"""Samples that run at once if each has one label; those with a label for every token are `BATCH`, as their outputs are large."""


@dataclass(frozen=True)
class Labelled:
    """Samples and their labels int64: the class of each, (samples,), or of each of its tokens, (samples, tokens).

    Tokens whose label is negative (-100, by custom) are not judged.
    """

    data: CalibrationSet
    labels: np.ndarray


def open_labelled(path: str | Path, inputs: Sequence[ModelInput], preprocess: str | Path | Preprocess | None = None) -> Labelled:
    """Read an .npz with one array per model input and `labels`; those of a language model are the tokens that follow.

    Raises:
        DataError: it has no `labels`, or their number or type does not fit.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("There is no such evaluation data.", where=str(path), expected="an .npz with an array per model input and 'labels'")
    columns = open_npz(path)
    labels = columns.pop("labels", None)
    if labels is None:
        raise DataError("The evaluation data has no labels.", where=str(path), expected="an array called 'labels' beside the inputs")
    chosen = None if preprocess is None else resolve_preprocess(preprocess)
    data = from_columns(columns, inputs, "npz", str(path), chosen, (path,))
    if labels.dtype.kind not in "iu" or len(labels.shape) not in (1, 2) or labels.shape[0] != len(data):
        raise DataError("The labels do not fit.", where=f"{path}: labels {labels.dtype}{list(labels.shape)}",
                        expected=f"integers, one for each of {len(data)} samples, or for each of their tokens")  # fmt: skip
    return Labelled(data, np.asarray(next(labels.stream([(0, len(data))])), np.int64))


def compare(reference: Streaming, result: Streaming, labelled: Labelled) -> Accuracy:
    """Top-1 of both on the first output, `[samples, classes]` (or `[samples, classes, 1, 1]`).

    With labels of tokens it is `[samples, tokens, vocabulary]`, and perplexity is measured too: exp of the mean negative
    log-likelihood of all labels that are not negative.
    """
    of_tokens = labelled.labels.ndim == 2
    right, losses = np.zeros(2), np.zeros(2)
    start = judged = 0
    one, two, three = tee(labelled.data.batches(BATCH if of_tokens else IMAGES), 3)
    for batch, *outputs in zip(one, reference.stream(two), result.stream(three), strict=True):
        count = len(next(iter(batch.values())))
        labels = labelled.labels[start : start + count]
        start += count
        for index, arrays in enumerate(outputs):
            try:
                _require_length(labelled.labels, arrays[0])
                hits, loss = (_judge_tokens if of_tokens else _judge_samples)(arrays[0], labels)
            except DataError as error:
                where = f"{labelled.data.description}; {error.where}"
                raise DataError(error.what, where=where, expected=error.expected, hint=error.hint) from None
            right[index] += hits
            losses[index] += loss
        judged += int((labels >= 0).sum())
    if not judged:
        raise DataError("There is no label to judge by.", where=labelled.data.description, expected="at least one that is not negative")
    before, after = (float(share) for share in right / judged)
    if not of_tokens:
        return Accuracy("top1", before, after, start)
    with np.errstate(over="ignore"):
        first, second = (float(mean) for mean in np.exp(losses / judged))
    return Accuracy("next-token top1", before, after, start, judged, first, second)


def _require_length(labels: np.ndarray, output: np.ndarray) -> None:
    """Refuse labels of more or fewer tokens than the model has outputs for."""
    if labels.ndim == 2 and output.ndim == 3 and output.shape[1] != labels.shape[1]:
        raise DataError(
            "The labels are of another length than the model's first output.",
            where=f"labels {list(labels.shape)}, output [samples, {output.shape[1]}, {output.shape[2]}]",
            expected=f"labels [{len(labels)}, {output.shape[1]}]: for each token of the inputs the one that follows",
            hint="pad labels with -1, which is not judged: the last token of a text has none that follows",
        )  # fmt: skip


def _judge_samples(scores: np.ndarray, labels: np.ndarray) -> tuple[int, float]:
    """How many of `labels` (samples,) have the largest score."""
    if scores.ndim < 2 or len(scores) != len(labels) or math.prod(scores.shape[2:]) != 1:
        raise _misfit(labels, scores, "scores [samples, classes], perhaps [samples, classes, 1, 1], for labels [samples]")
    _check_classes(labels, scores.shape[1], ignore_negative=False)
    return int((scores.reshape(len(labels), -1).argmax(1) == labels).sum()), 0.0


def _judge_tokens(logits: np.ndarray, labels: np.ndarray) -> tuple[int, float]:
    """How many of `labels` (samples, tokens) have the largest logit, and the sum of their negative log-likelihoods in nats."""
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise _misfit(labels, logits, "logits [samples, tokens, vocabulary] for labels [samples, tokens]")
    _check_classes(labels, logits.shape[2], ignore_negative=True)
    hits, loss = 0, 0.0
    for scores, wanted in zip(logits, labels, strict=True):  # one sample at a time: a vocabulary in float64 is large
        kept = wanted >= 0
        chosen, rows = wanted[kept], scores[kept].astype(np.float64)
        hits += int((rows.argmax(1) == chosen).sum())
        loss += float((np.logaddexp.reduce(rows, axis=1) - rows[np.arange(len(chosen)), chosen]).sum())
    return hits, loss


def _misfit(labels: np.ndarray, output: np.ndarray, expected: str) -> DataError:
    shapes = f"labels {list(labels.shape)}, output {list(output.shape)}"
    return DataError("The labels do not fit the model's first output.", where=shapes, expected=expected)


def _check_classes(labels: np.ndarray, classes: int, *, ignore_negative: bool) -> None:
    if labels.size and (labels.max() >= classes or (labels.min() < 0 and not ignore_negative)):
        what, also = ("tokens", ", or negative for those that are not judged") if ignore_negative else ("classes", "")
        raise DataError(f"Labels name {what} that the model does not have.", where=f"labels {labels.min()} to {labels.max()}",
                        expected=f"0 to {classes - 1}{also}", hint=f"number the {what} as the model does")  # fmt: skip
