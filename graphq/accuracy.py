"""Top-1 accuracy of two models on labelled samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphq.calibration import CalibrationSet, open_calibration
from graphq.errors import DataError
from graphq.executor import Executor
from graphq.preprocess import Preprocess
from graphq.report import Accuracy
from graphq.spec import ModelInput

BATCH = 16


@dataclass(frozen=True)
class Labelled:
    """Samples and their classes, `labels` int64 of shape (samples,)."""

    data: CalibrationSet
    labels: np.ndarray


def open_labelled(path: str | Path, inputs: Sequence[ModelInput], preprocess: str | Path | Preprocess | None = None) -> Labelled:
    """Read an .npz with one array per model input and `labels`.

    Raises:
        DataError: it has no `labels`, or their number or type does not fit.
    """
    path = Path(path)
    columns = dict(open_npz_columns(path))
    labels = columns.pop("labels", None)
    if labels is None:
        raise DataError("The evaluation data has no labels.", where=str(path), expected="an array called 'labels' beside the inputs")
    data = open_calibration(columns, inputs, preprocess=preprocess)
    if labels.dtype.kind not in "iu" or labels.shape != (len(data),):
        raise DataError("The labels do not fit.", where=f"{path}: labels {labels.dtype}{list(labels.shape)}", expected=f"integers, one for each of {len(data)} samples")
    return Labelled(data, labels.astype(np.int64))


def open_npz_columns(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as pack:
            return {name: pack[name] for name in pack.files}
    except (OSError, ValueError, EOFError) as error:
        raise DataError("The evaluation data cannot be read.", where=str(path), expected="an .npz with one array per model input and 'labels'") from error


def compare(reference: Executor, result: Executor, labelled: Labelled) -> Accuracy:
    """Top-1 of both on the first output, whose last axis is the classes."""
    right = np.zeros(2)
    start = 0
    for batch in labelled.data.batches(BATCH):
        count = len(next(iter(batch.values())))
        wanted = labelled.labels[start : start + count]
        start += count
        for index, executor in enumerate((reference, result)):
            scores = executor.run(batch)[0]
            right[index] += int((scores.reshape(count, -1).argmax(1) == wanted).sum())
    return Accuracy("top1", right[0] / max(start, 1), right[1] / max(start, 1), start)
