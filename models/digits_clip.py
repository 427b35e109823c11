"""The data of `digits_clip`, the small dual encoder: scenes with a handwritten digit somewhere, and captions that say which.

CLIP, https://arxiv.org/abs/2103.00020, in small: an image tower and a text tower (`digits_clip_text`) give embeddings of length 1, close
to each other where a caption describes an image. A scene is a digit of `digits`, large or small, over scraps of others in half their ink.
A caption names it in one of five languages, or by its numeral; a token is a character. The prompts "a photo of a seven." make a zero-shot
classifier: no caption of the training has that form.

As a program:

    python -m graphq.models.digits_clip calib OUT.npz [COUNT]     array `input`, from digits of the train split
    python -m graphq.models.digits_clip eval OUT.npz              arrays `input` and `labels`, from digits of the test split
    python -m graphq.models.digits_clip text OUT.npz              array `text_embedding` [10, 32] of the prompts
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

EMBEDDING_SIZE = 32
LENGTH = 48
"""Characters of a caption; shorter ones end in spaces."""

ALPHABET = " .:'0123456789abcdefghijklmnopqrstuvwxyzßàäèéíóúü"
TOKEN_NAME, IMAGE_NAME, TEXT_NAME = "tokens", "image_embedding", "text_embedding"
PROMPT = "a photo of a {}."
SIZES = (12, 16, 20, 24)
"""Pixels of a digit, either way."""

SCRAPS, SCRAP_SIZE = 6, 6
TEST_COUNT = 1000

NAMES = {
    "en": "zero one two three four five six seven eight nine".split(),
    "de": "null eins zwei drei vier fünf sechs sieben acht neun".split(),
    "fr": "zéro un deux trois quatre cinq six sept huit neuf".split(),
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve".split(),
    "it": "zero uno due tre quattro cinque sei sette otto nove".split(),
}
PARTS = {
    "en": ("|a picture of |an image of |this is |here is ", "{}|a {}|the digit {}|the number {}|a handwritten {}|the written digit {}"),
    "de": ("|ein bild: |das hier ist |man sieht ", "{}|eine {}|die ziffer {}|die zahl {}|eine handgeschriebene {}"),
    "fr": ("|une image: |voici |ceci est ", "{}|un {}|le chiffre {}|le nombre {}|un {} écrit à la main"),
    "es": ("|una imagen: |esto es |aquí hay ", "{}|un {}|la cifra {}|el número {}|un {} escrito a mano"),
    "it": ("|un'immagine: |questo è |ecco ", "{}|un {}|la cifra {}|il numero {}|un {} scritto a mano"),
}
"""What a caption may begin with, and how it names the digit, each a choice; a full stop may follow."""


def caption(digit: int, random: np.random.RandomState) -> str:
    """A random caption of the training; up to five spaces stand before it, as what counts is what it says, not where."""
    language = random.choice(sorted(PARTS))
    start, form = (random.choice(part.split("|")) for part in PARTS[language])
    name = NAMES[language][digit] if random.rand() < 0.5 else str(digit)
    return " " * random.randint(6) + start + form.format(name) + random.choice(["", "."])


def prompts() -> list[str]:
    """The texts of the classifier, one a digit, with English names."""
    return [PROMPT.format(name) for name in NAMES["en"]]


def encode(texts: Sequence[str]) -> np.ndarray:
    """Tokens int64 (N, 48); longer texts, and characters outside the alphabet, are an error."""
    for text in texts:
        if len(text) > LENGTH or not set(text) <= set(ALPHABET):
            raise ValueError(f"{text!r} is no caption: at most {LENGTH} of the characters {ALPHABET!r}")
    return np.array([[ALPHABET.index(character) for character in text.ljust(LENGTH)] for text in texts], np.int64)


def scenes(split: digits.Split, count: int, random: np.random.RandomState) -> tuple[np.ndarray, np.ndarray]:
    """Random scenes float32 (count, 1, 32, 32) in [-1, 1] of the digits of a split, and which digit each shows, int64 (count,)."""
    labels = digits.images(split)[1]
    rows = random.randint(len(labels), size=count)
    found = np.full((count, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE), -1, np.float32)
    for image, row in zip(found[:, 0], rows, strict=True):
        for other in random.randint(len(labels), size=SCRAPS):
            scrap = _place(random, _digits(split, SIZES[1])[other], (SCRAP_SIZE, SCRAP_SIZE))
            _place(random, image, scrap.shape)[:] = (scrap - 1) / 2
        size = random.choice(SIZES)
        part = _place(random, image, (size, size))
        np.maximum(part, _digits(split, size)[row], out=part)
    return found, labels[rows]


def test_scenes() -> tuple[np.ndarray, np.ndarray]:
    """1000 scenes and their digits int64 (1000,) from the test split, always the same."""
    return scenes("test", TEST_COUNT, np.random.RandomState(digits.SPLIT_SEED))


def calibration(count: int = digits.DEFAULT_CALIBRATION_COUNT, seed: int = 0) -> np.ndarray:
    """Scenes from the train split, float32 (count, 1, 32, 32)."""
    if count < 1:
        raise ValueError(f"calibration count is {count}, but it takes 1 or more")
    return scenes("train", count, np.random.RandomState(seed))[0]


def _place(random: np.random.RandomState, image: np.ndarray, size: tuple[int, ...]) -> np.ndarray:
    """A random part of an image."""
    top, left = (random.randint(whole - part + 1) for whole, part in zip(image.shape, size, strict=True))
    return image[top : top + size[0], left : left + size[1]]


def text_embeddings(path: Path | None = None) -> np.ndarray:
    """Embeddings float32 (10, 32) of the prompts by a text tower: the committed one, or that at `path`."""
    (found,) = _session(path or onnx_path("digits_clip_text")).run(None, {TOKEN_NAME: encode(prompts())})
    return np.asarray(found)


def accuracy(session: onnxruntime.InferenceSession, texts: np.ndarray, batch: int = 64) -> float:
    """Zero-shot top-1 in percent on the test scenes: a scene shows what the prompt closest to it says, of `texts` (10, 32)."""
    inputs, labels = test_scenes()
    found = [np.asarray(session.run(None, {digits.INPUT_NAME: inputs[start : start + batch]})[0]) for start in range(0, len(inputs), batch)]
    return 100.0 * float(((np.concatenate(found) @ texts.T).argmax(1) == labels).mean())


def classifier(tower: onnx.ModelProto, texts: np.ndarray) -> onnx.ModelProto:
    """An image tower and embeddings (classes, 32) of texts as a model whose output `logits` (batch, classes) are their cosines."""
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
def _digits(split: digits.Split, size: int) -> np.ndarray:
    return digits.images(split, size)[0][:, 0]


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
        inputs, labels = test_scenes()
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
    print(f"{path.name}: {accuracy(_session(path), text_embeddings(text)):.1f} % of {TEST_COUNT} test scenes, zero-shot")


if __name__ == "__main__":
    main()
