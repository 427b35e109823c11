"""The data the model zoo is trained and measured on: scikit-learn's bundled digits, 1797 real handwritten 8x8 images.

Images are upscaled to 32x32 (bilinear, half-pixel centres, clamped at the border) and mapped from ink 0..16 to
`ink / 8 - 1`, so that -1 is paper and +1 is full ink. All of that is exact in float32 (the weights are multiples of
1/64), hence the arrays are the same, bit for bit, on every machine.

As a program:

    python -m graphq.models.digits calib OUT.npz [COUNT]   array `input`, from the train split
    python -m graphq.models.digits eval OUT.npz            arrays `input` and `labels`, the test split
    python -m graphq.models.digits accuracy MODEL.onnx     top-1 of a model on the test split, in percent
"""

from __future__ import annotations

import argparse
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

if TYPE_CHECKING:
    import onnxruntime

Split = Literal["train", "test"]

IMAGE_SIZE = 32
CLASS_COUNT = 10
INPUT_NAME = "input"
TEST_SHARE = 0.25
SPLIT_SEED = 1797
DEFAULT_CALIBRATION_COUNT = 128


def images(split: Split, size: int = IMAGE_SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Images float32 (N, 1, size, size) in [-1, 1] and labels int64 (N,) of a split, in a fixed shuffled order."""
    pixels, labels = _raw()
    rows = split_indices(split)
    return _prepare(pixels[rows], size), labels[rows]


def calibration(count: int = DEFAULT_CALIBRATION_COUNT) -> np.ndarray:
    """The first `count` images of the train split, float32 (count, 1, 32, 32); labels are never needed here."""
    rows = split_indices("train")
    if not 1 <= count <= len(rows):
        raise ValueError(f"calibration count is {count}, but the train split has 1 to {len(rows)} images to give")
    return _prepare(_raw()[0][rows[:count]])


def split_indices(split: Split) -> np.ndarray:
    """Rows of the original data set that form a split, int64 (N,): a quarter of each class is the test split.

    The order is a seeded shuffle, so that any prefix is a fair sample. `RandomState` is used because numpy promises
    that its stream never changes, which it does not for `default_rng`.
    """
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; the splits are: {', '.join(get_args(Split))}")
    labels = _raw()[1]
    random = np.random.RandomState(SPLIT_SEED)
    parts = []
    for label in range(CLASS_COUNT):
        rows = random.permutation(np.flatnonzero(labels == label))
        cut = round(len(rows) * TEST_SHARE)
        parts.append(rows[:cut] if split == "test" else rows[cut:])
    return random.permutation(np.concatenate(parts))


def accuracy(session: onnxruntime.InferenceSession, split: Split = "test", batch: int = 64) -> float:
    """Top-1 accuracy in percent of a session that maps `input` (N, 1, 32, 32) to logits (N, 10), its first output."""
    inputs, labels = images(split)
    hits = 0
    for start in range(0, len(labels), batch):
        (logits, *_) = session.run(None, {INPUT_NAME: inputs[start : start + batch]})
        hits += int((np.asarray(logits).argmax(axis=1) == labels[start : start + batch]).sum())
    return 100.0 * hits / len(labels)


@functools.cache
def _raw() -> tuple[np.ndarray, np.ndarray]:
    """Ink float32 (1797, 8, 8) in 0..16 and labels int64 (1797,)."""
    from sklearn.datasets import load_digits  # reads a file inside the package: no download

    data = load_digits()
    return data.images.astype(np.float32), data.target.astype(np.int64)


def _prepare(pixels: np.ndarray, size: int = IMAGE_SIZE) -> np.ndarray:
    """Ink float32 (N, 8, 8) in 0..16 to model inputs float32 (N, 1, size, size) in [-1, 1]."""
    weights = _upscale_weights(pixels.shape[-1], size)
    upscaled = weights @ pixels @ weights.T
    return np.ascontiguousarray(upscaled[:, None] / 8 - 1, dtype=np.float32)


def _upscale_weights(size: int, target: int) -> np.ndarray:
    """Bilinear interpolation as a matrix, float32 (target, size); its rows sum to 1."""
    centres = (np.arange(target) + 0.5) * size / target - 0.5
    columns = [np.interp(centres, np.arange(size), unit) for unit in np.eye(size)]
    return np.stack(columns, axis=1).astype(np.float32)


def _print_accuracy(path: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    print(f"{path.name}: {accuracy(session):.2f} % of {len(split_indices('test'))} test images")


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m graphq.models.digits", description="The digits data set.")
    commands = parser.add_subparsers(dest="command", required=True)
    calib = commands.add_parser("calib", help="write calibration inputs (train split)")
    calib.add_argument("out", type=Path)
    calib.add_argument("count", type=int, nargs="?", default=DEFAULT_CALIBRATION_COUNT)
    commands.add_parser("eval", help="write inputs and labels of the test split").add_argument("out", type=Path)
    commands.add_parser("accuracy", help="print a model's test accuracy").add_argument("model", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "accuracy":
        _print_accuracy(options.model)
    elif options.command == "eval":
        inputs, labels = images("test")
        np.savez(options.out, input=inputs, labels=labels)
    else:
        try:
            np.savez(options.out, input=calibration(options.count))
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
