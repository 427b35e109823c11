"""The data of `digits_clip`, the small dual encoder: images of two handwritten digits side by side, and captions that name them.

CLIP, https://arxiv.org/abs/2103.00020, in small: an image tower and a text tower (`digits_clip_text`) give embeddings of length 1, close
to each other where a caption describes an image. Digits are those of `digits`, in half the size. A caption names the left and the right one
in English, German or French, by words or numerals; a token is a character.

The hundred prompts "a photo of a four and a two." make a zero-shot classifier: no caption of the training begins so, and a fifth of the
pairs is never seen in training.

As a program:

    python -m graphq.models.digits_clip calib OUT.npz [COUNT]     array `input`, from digits of the train split
    python -m graphq.models.digits_clip eval OUT.npz              arrays `input` and `labels` 0 to 99, from digits of the test split
    python -m graphq.models.digits_clip text OUT.npz              array `text_embedding` [100, 64] of the prompts
    python -m graphq.models.digits_clip accuracy IMAGE.onnx       zero-shot top-1 of an image tower on the test images, in percent
    python -m graphq.models.digits_clip classifier OUT.onnx       the image tower and the prompts' embeddings, from `input` to `logits`
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import digits, onnx_path

if TYPE_CHECKING:
    import onnx
    import onnxruntime

EMBEDDING_SIZE = 64
PAIRS = 100
"""Classes: the left digit times ten, plus the right one."""

LENGTH = 42
"""Characters of a caption; shorter ones end in spaces."""

ALPHABET = " .,:0123456789abcdefghijklmnopqrstuvwxyzàäéôüß"
TOKEN_NAME, IMAGE_NAME, TEXT_NAME = "tokens", "image_embedding", "text_embedding"
PROMPT = "a photo of a {} and a {}."
SIDE = 16
"""Pixels of a digit, either way."""

EACH = 5
"""Test images of each pair."""

NAMES = {
    "en": "zero one two three four five six seven eight nine".split(),
    "de": "null eins zwei drei vier fünf sechs sieben acht neun".split(),
    "fr": "zéro un deux trois quatre cinq six sept huit neuf".split(),
}
PARTS = {
    "en": ("|this is |here is |a picture: ", "{} {}|a {} and a {}|{} and {}|a {} next to a {}|{}, then {}"),
    "de": ("|das ist |man sieht |bild: ", "{} {}|eine {} und eine {}|{} und {}|eine {} neben einer {}|{}, dann {}"),
    "fr": ("|voici |on voit |une image: ", "{} {}|un {} et un {}|{} et {}|un {} à côté d un {}|{}, puis {}"),
}
"""What a caption may begin with, and how it names the digits, each a choice; a full stop may follow."""


def is_trained(pair: int) -> bool:
    """Whether images and captions of a pair are part of the training; a fifth of the pairs are not, two of each left digit."""
    left, right = divmod(pair, 10)
    return (left * 3 + right) % 5 != 0


def caption(pair: int, random: np.random.RandomState) -> str:
    """A random caption of the training."""
    language = random.choice(sorted(PARTS))
    starts, forms = (part.split("|") for part in PARTS[language])
    names = [str(digit) if random.rand() < 0.25 else NAMES[language][digit] for digit in divmod(pair, 10)]
    return random.choice(starts) + random.choice(forms).format(*names) + random.choice(["", "."])


def prompts(template: str = PROMPT) -> list[str]:
    """The texts of the classifier, one a pair, with English names."""
    return [template.format(*(NAMES["en"][digit] for digit in divmod(pair, 10))) for pair in range(PAIRS)]


def encode(texts: Sequence[str]) -> np.ndarray:
    """Tokens int64 (N, 42); longer texts, and characters outside the alphabet, are an error."""
    for text in texts:
        if len(text) > LENGTH or not set(text) <= set(ALPHABET):
            raise ValueError(f"{text!r} is no caption: at most {LENGTH} of the characters {ALPHABET!r}")
    return np.array([[ALPHABET.index(character) for character in text.ljust(LENGTH)] for text in texts], np.int64)


def images(split: digits.Split, pairs: np.ndarray, random: np.random.RandomState) -> np.ndarray:
    """An image float32 (N, 1, 32, 32) in [-1, 1] of each of `pairs` (N,), of random digits of a split, each anywhere in its half."""
    pixels, rows = _digits(split)
    found = np.full((len(pairs), 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE), -1, np.float32)
    for image, pair in zip(found[:, 0], pairs, strict=True):
        for half, digit in enumerate(divmod(int(pair), 10)):
            top = random.randint(digits.IMAGE_SIZE - SIDE + 1)
            image[top : top + SIDE, half * SIDE : (half + 1) * SIDE] = pixels[random.choice(rows[digit])]
    return found


def test_images() -> tuple[np.ndarray, np.ndarray]:
    """500 images and their pairs int64 (500,), five of each pair, always the same."""
    random = np.random.RandomState(digits.SPLIT_SEED)
    pairs = random.permutation(np.repeat(np.arange(PAIRS), EACH))
    return images("test", pairs, random), pairs


def calibration(count: int = digits.DEFAULT_CALIBRATION_COUNT, seed: int = 0) -> np.ndarray:
    """Images of random pairs that are trained, float32 (count, 1, 32, 32)."""
    if count < 1:
        raise ValueError(f"calibration count is {count}, but it takes 1 or more")
    random = np.random.RandomState(seed)
    return images("train", random.choice([pair for pair in range(PAIRS) if is_trained(pair)], count), random)


def text_embeddings(path: Path | None = None) -> np.ndarray:
    """Embeddings float32 (100, 64) of the prompts by a text tower: the committed one, or that at `path`."""
    (found,) = _session(path or onnx_path("digits_clip_text")).run(None, {TOKEN_NAME: encode(prompts())})
    return np.asarray(found)


def accuracy(session: onnxruntime.InferenceSession, texts: np.ndarray, *, unseen: bool = False, batch: int = 64) -> float:
    """Zero-shot top-1 in percent on the test images, perhaps those of pairs that the training left out alone.

    The pair of an image is that of the prompt, of `texts` (100, 64), that its embedding is closest to.
    """
    inputs, labels = test_images()
    if unseen:
        chosen = np.array([not is_trained(pair) for pair in labels])
        inputs, labels = inputs[chosen], labels[chosen]
    found = [np.asarray(session.run(None, {digits.INPUT_NAME: inputs[start : start + batch]})[0]) for start in range(0, len(inputs), batch)]
    return 100.0 * float(((np.concatenate(found) @ texts.T).argmax(1) == labels).mean())


def classifier(tower: onnx.ModelProto, texts: np.ndarray) -> onnx.ModelProto:
    """An image tower and embeddings (classes, 64) of texts as a model whose output `logits` (batch, classes) are their cosines."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(tower)
    (embedding,) = model.graph.output
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.ascontiguousarray(texts.T, np.float32), TEXT_NAME))
    model.graph.node.append(onnx.helper.make_node("MatMul", [embedding.name, TEXT_NAME], ["logits"], name="logits"))
    model.graph.output.pop()
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", len(texts)]))
    onnx.checker.check_model(model, full_check=True)
    return model


@functools.cache
def _digits(split: digits.Split) -> tuple[np.ndarray, list[np.ndarray]]:
    """Pixels float32 (N, 16, 16) in [-1, 1] of all digits of a split, and the rows of each digit."""
    inputs, labels = digits.images(split, SIDE)
    return inputs[:, 0], [np.flatnonzero(labels == digit) for digit in range(digits.CLASS_COUNT)]


def _session(path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m graphq.models.digits_clip", description="The data of the small dual encoder.")
    commands = parser.add_subparsers(dest="command", required=True)
    calib = commands.add_parser("calib", help="write calibration images (train split)")
    calib.add_argument("out", type=Path)
    calib.add_argument("count", type=int, nargs="?", default=digits.DEFAULT_CALIBRATION_COUNT)
    commands.add_parser("eval", help="write images and labels (test split)").add_argument("out", type=Path)
    commands.add_parser("text", help="write the embeddings of the prompts").add_argument("out", type=Path)
    commands.add_parser("accuracy", help="print an image tower's zero-shot test accuracy").add_argument("model", type=Path)
    commands.add_parser("classifier", help="write the zero-shot classifier").add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "calib":
        try:
            np.savez(options.out, **{digits.INPUT_NAME: calibration(options.count)})  # type: ignore[arg-type]
        except ValueError as error:
            parser.error(str(error))
    elif options.command == "eval":
        inputs, labels = test_images()
        np.savez(options.out, labels=labels, **{digits.INPUT_NAME: inputs})  # type: ignore[arg-type]
    elif options.command == "text":
        np.savez(options.out, **{TEXT_NAME: text_embeddings()})  # type: ignore[arg-type]
    elif options.command == "accuracy":
        print_accuracy(options.model)
    else:
        import onnx

        onnx.save(classifier(onnx.load(onnx_path("digits_clip")), text_embeddings()), options.out)


def print_accuracy(path: Path, text: Path | None = None) -> None:
    """Print the zero-shot accuracy of an image tower, with a text tower or the committed one."""
    session, texts = _session(path), text_embeddings(text)
    found, unseen = (accuracy(session, texts, unseen=part) for part in (False, True))
    print(f"{path.name}: {found:.1f} % of {PAIRS * EACH} test images zero-shot, {unseen:.1f} % of those of pairs that training left out")


if __name__ == "__main__":
    main()
