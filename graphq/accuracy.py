"""Top-1 accuracy of two models on labelled samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from graphq.arrays import open_npz
from graphq.calibration import CalibrationSet, from_columns
from graphq.errors import DataError
from graphq.executor import Executor
from graphq.preprocess import Preprocess, resolve_preprocess
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
    if not path.is_file():
        raise DataError("There is no such evaluation data.", where=str(path), expected="an .npz with an array per model input and 'labels'")
    columns = open_npz(path)
    labels = columns.pop("labels", None)
    if labels is None:
        raise DataError("The evaluation data has no labels.", where=str(path), expected="an array called 'labels' beside the inputs")
    chosen = None if preprocess is None else resolve_preprocess(preprocess)
    data = from_columns(columns, inputs, "npz", str(path), chosen, (path,))
    if labels.dtype.kind not in "iu" or labels.shape != (len(data),):
        raise DataError("The labels do not fit.", where=f"{path}: labels {labels.dtype}{list(labels.shape)}",
                        expected=f"integers, one for each of {len(data)} samples")  # fmt: skip
    return Labelled(data, np.asarray(next(labels.stream([(0, len(data))])), np.int64))


def compare(reference: Executor, result: Executor, labelled: Labelled) -> Accuracy:
    """Top-1 of both on the first output, `[samples, classes]` (or `[samples, classes, 1, 1]`)."""
    right = np.zeros(2)
    start = 0
    for batch in labelled.data.batches(BATCH):
        count = len(next(iter(batch.values())))
        wanted = labelled.labels[start : start + count]
        start += count
        for index, executor in enumerate((reference, result)):
            scores = executor.run(batch)[0]
            classes = scores.size // max(count, 1)
            if ((wanted < 0) | (wanted >= classes)).any():
                raise DataError("Labels name classes that the model does not have.", where=f"labels {wanted.min()} to {wanted.max()}",
                                expected=f"0 to {classes - 1}", hint="number the classes as the model does")  # fmt: skip
            right[index] += int((scores.reshape(count, -1).argmax(1) == wanted).sum())
    return Accuracy("top1", right[0] / max(start, 1), right[1] / max(start, 1), start)
