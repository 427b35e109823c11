"""The text that `digits_lm`, the small language model, is trained and measured on: this project's own documentation.

`digits_lm.txt` is a frozen copy (READMEs, change log, docstrings), so that documentation may change and the model stays
reproducible. A token is a character: 0 is the line break, 1 to 95 are the printable ASCII characters in their order. Each tenth
block of 2048 characters is held out of training.

As a program:

    python -m graphq.models.digits_lm calib OUT.npz [COUNT]   the model's inputs, from the training blocks
    python -m graphq.models.digits_lm eval OUT.npz            the inputs and `labels`, from the held-out blocks
    python -m graphq.models.digits_lm perplexity MODEL.onnx   of a model on the held-out blocks
    python -m graphq.models.digits_lm write MODEL.onnx TEXT   continue a text, one character at a time, with the cache
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

VOCABULARY = "\n" + "".join(map(chr, range(32, 127)))
LAYERS, HEADS, HEAD_SIZE = 2, 4, 32
CONTEXT = 128
"""Tokens of a training window; the model takes more."""

BLOCK, HELD_OUT = 2048, 10
DEFAULT_CALIBRATION_COUNT = 128

INPUT_NAME = "input_ids"
PARTS = ("key", "value")
PAST_NAMES = tuple(f"past_key_values.{layer}.{part}" for layer in range(LAYERS) for part in PARTS)
PRESENT_NAMES = tuple(f"present.{layer}.{part}" for layer in range(LAYERS) for part in PARTS)


def encode(text: str) -> np.ndarray:
    """Tokens int64 (N,) of `text`; characters outside the vocabulary are an error."""
    try:
        return np.array([VOCABULARY.index(character) for character in text], np.int64)
    except ValueError:
        raise ValueError(f"text has characters that are neither printable ASCII nor line breaks: {text!r}") from None


def decode(tokens: np.ndarray) -> str:
    """The text of tokens (N,)."""
    return "".join(VOCABULARY[token] for token in tokens)


def blocks(split: Split) -> np.ndarray:
    """Tokens int64 (N, 2048) of a split, in the order of the text; each tenth block of the text is of the test split."""
    if split not in get_args(Split):
        raise ValueError(f"unknown split {split!r}; the splits are: {', '.join(get_args(Split))}")
    tokens = _corpus()
    whole = tokens[: len(tokens) // BLOCK * BLOCK].reshape(-1, BLOCK)
    return whole[(np.arange(len(whole)) % HELD_OUT == HELD_OUT - 1) == (split == "test")]


def windows(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and the tokens that follow each of them, both int64 (N, 128): the blocks cut up, so that no window spans two."""
    parts = blocks(split)
    count = (BLOCK - 1) // CONTEXT
    inputs, labels = parts[:, : count * CONTEXT], parts[:, 1 : count * CONTEXT + 1]
    return tuple(np.ascontiguousarray(part.reshape(-1, CONTEXT)) for part in (inputs, labels))  # type: ignore[return-value]


def calibration(count: int = DEFAULT_CALIBRATION_COUNT) -> dict[str, np.ndarray]:
    """All model inputs for `count` windows of the training blocks, evenly spread; the cache is empty."""
    inputs = windows("train")[0]
    if not 1 <= count <= len(inputs):
        raise ValueError(f"calibration count is {count}, but the train split has 1 to {len(inputs)} windows to give")
    return {INPUT_NAME: inputs[np.arange(count) * len(inputs) // count], **empty_past(count)}


def empty_past(batch: int) -> dict[str, np.ndarray]:
    """The cache before the first token: float32 (batch, heads, 0, head size) for each layer's keys and values."""
    return {name: np.zeros((batch, HEADS, 0, HEAD_SIZE), np.float32) for name in PAST_NAMES}


def perplexity(session: onnxruntime.InferenceSession, split: Split = "test", count: int | None = None, batch: int = 16) -> float:
    """Perplexity per character of a session, exp of the mean negative log-likelihood over (the first `count`) windows of a split."""
    inputs, labels = (array[:count] for array in windows(split))
    total = 0.0
    for start in range(0, len(inputs), batch):
        rows = inputs[start : start + batch]
        (logits,) = session.run(["logits"], {INPUT_NAME: rows, **empty_past(len(rows))})
        wide = np.asarray(logits, np.float64)
        chosen = np.take_along_axis(wide, labels[start : start + batch, :, None], 2)[..., 0]
        total += float((np.logaddexp.reduce(wide, axis=2) - chosen).sum())
    return float(np.exp(total / labels.size))


def write(session: onnxruntime.InferenceSession, text: str, count: int = 100) -> str:
    """`text` and the `count` most likely characters after it, one by one: the cache holds what was read before.

    Beyond 128 characters in all, the length of its training windows, the model loses the thread.
    """
    tokens, past = encode(text)[None], empty_past(1)
    found = []
    for _ in range(count):
        logits, *present = session.run(["logits", *PRESENT_NAMES], {INPUT_NAME: tokens, **past})
        past = dict(zip(PAST_NAMES, map(np.asarray, present), strict=True))
        tokens = np.asarray(logits)[:, -1:].argmax(axis=2)
        found.append(int(tokens[0, 0]))
    return text + decode(np.array(found, np.int64))


@functools.cache
def _corpus() -> np.ndarray:
    return encode(Path(__file__).with_suffix(".txt").read_text(encoding="ascii"))


def _session(path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m graphq.models.digits_lm", description="The text of the small language model.")
    commands = parser.add_subparsers(dest="command", required=True)
    calib = commands.add_parser("calib", help="write calibration inputs (training blocks)")
    calib.add_argument("out", type=Path)
    calib.add_argument("count", type=int, nargs="?", default=DEFAULT_CALIBRATION_COUNT)
    commands.add_parser("eval", help="write inputs and labels (held-out blocks)").add_argument("out", type=Path)
    commands.add_parser("perplexity", help="print a model's perplexity on the held-out blocks").add_argument("model", type=Path)
    writer = commands.add_parser("write", help="let a model continue a text")
    writer.add_argument("model", type=Path)
    writer.add_argument("text")
    options = parser.parse_args(arguments)
    try:
        if options.command == "calib":
            np.savez(options.out, **calibration(options.count))  # type: ignore[arg-type]
        elif options.command == "eval":
            inputs, labels = windows("test")
            np.savez(options.out, labels=labels, **{INPUT_NAME: inputs, **empty_past(len(inputs))})  # type: ignore[arg-type]
        elif options.command == "perplexity":
            print(f"{options.model.name}: perplexity {perplexity(_session(options.model)):.3f} on {windows('test')[1].size} characters")
        else:
            print(write(_session(options.model), options.text))
    except ValueError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
