"""The captions that `digits_clip`, the small dual encoder, is trained on, and what it knows without training for it.

CLIP, https://arxiv.org/abs/2103.00020, in small: an image tower and a text tower (`digits_clip_text`) give embeddings of length 1,
close to each other where a caption describes an image. A caption is a template and the name of a digit in one of five languages, or
its numeral. The caption of `PROMPT` is none of them: the classifier that ten texts make, one a digit, is zero-shot. A token is a character.

As a program:

    python -m graphq.models.digits_clip text OUT.npz [PROMPT]   array `text_embedding` [10, 32]: "a photo of a zero.", and so on
    python -m graphq.models.digits_clip accuracy IMAGE.onnx     zero-shot top-1 of an image tower on the test images, in percent
    python -m graphq.models.digits_clip classifier OUT.onnx     the image tower and these ten texts, as a model from `input` to `logits`

Images are those of `digits`, whose programs write them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import digits, onnx_path

if TYPE_CHECKING:
    import onnx
    import onnxruntime

EMBEDDING_SIZE = 32
LENGTH = 40
"""Characters of a caption; shorter ones end in spaces."""

ALPHABET = " .,0123456789abcdefghijklmnopqrstuvwxyzßàäèéóúü"
TOKEN_NAME, IMAGE_NAME, TEXT_NAME = "tokens", "image_embedding", "text_embedding"
PROMPT = "a photo of a {}."
"""The template of CLIP's own classifiers, with which no caption of the training is made."""

NAMES = {
    "en": "zero one two three four five six seven eight nine",
    "de": "null eins zwei drei vier fünf sechs sieben acht neun",
    "fr": "zéro un deux trois quatre cinq six sept huit neuf",
    "es": "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "it": "zero uno due tre quattro cinque sei sette otto nove",
}
TEMPLATES = {
    "en": ("{}", "the number {}", "a handwritten {}.", "the digit {}, written by hand", "a picture of the number {}.", "this is a {}"),
    "de": ("{}", "die zahl {}", "eine handgeschriebene {}.", "ein bild der ziffer {}.", "das ist eine {}"),
    "fr": ("{}", "le chiffre {}", "un {} écrit à la main.", "une image du chiffre {}.", "ceci est un {}"),
    "es": ("{}", "el número {}", "un {} escrito a mano.", "una foto de la cifra {}.", "esto es un {}"),
    "it": ("{}", "il numero {}", "un {} scritto a mano.", "una foto della cifra {}.", "questo è un {}"),
}


def captions(digit: int) -> list[str]:
    """All training captions of a digit: each language's templates, with its name and with the numeral."""
    return [
        template.format(name)
        for language, names in NAMES.items()
        for name in (names.split()[digit], str(digit))
        for template in TEMPLATES[language]
    ]


def prompts(template: str = PROMPT) -> list[str]:
    """The ten texts of a classifier, with the English names."""
    if template.count("{}") != 1:
        raise ValueError(f"the template {template!r} has no place for the name of a digit, or several; write one as {{}}")
    return [template.format(name) for name in NAMES["en"].split()]


def encode(texts: Sequence[str]) -> np.ndarray:
    """Tokens int64 (N, 40); longer texts, and characters outside the alphabet, are an error."""
    for text in texts:
        if len(text) > LENGTH or not set(text) <= set(ALPHABET):
            raise ValueError(f"{text!r} is no caption: at most {LENGTH} of the characters {ALPHABET!r}")
    return np.array([[ALPHABET.index(character) for character in text.ljust(LENGTH)] for text in texts], np.int64)


def text_embeddings(template: str = PROMPT, path: Path | None = None) -> np.ndarray:
    """Embeddings float32 (10, 32), one a digit, of a text tower: the committed one, or that at `path`."""
    session = _session(path or onnx_path("digits_clip_text"))
    (found,) = session.run(None, {TOKEN_NAME: encode(prompts(template))})
    return np.asarray(found)


def accuracy(session: onnxruntime.InferenceSession, texts: np.ndarray, batch: int = 64) -> float:
    """Zero-shot top-1 in percent on the test images: the class of an image is the text (10, 32) that it is closest to."""
    inputs, labels = digits.images("test")
    found = [np.asarray(session.run(None, {digits.INPUT_NAME: inputs[start : start + batch]})[0]) for start in range(0, len(inputs), batch)]
    return 100.0 * float(((np.concatenate(found) @ texts.T).argmax(1) == labels).mean())


def classifier(tower: onnx.ModelProto, texts: np.ndarray) -> onnx.ModelProto:
    """An image tower and embeddings (classes, 32) of texts as a model whose output `logits` (batch, classes) are their cosines."""
    import onnx

    model = onnx.ModelProto()
    model.CopyFrom(tower)
    (embedding,) = model.graph.output
    weight = onnx.numpy_helper.from_array(np.ascontiguousarray(texts.T, np.float32), TEXT_NAME)
    model.graph.initializer.append(weight)
    model.graph.node.append(onnx.helper.make_node("MatMul", [embedding.name, TEXT_NAME], ["logits"], name="logits"))
    model.graph.output.pop()
    model.graph.output.append(onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["batch", len(texts)]))
    onnx.checker.check_model(model, full_check=True)
    return model


def _session(path: Path) -> onnxruntime.InferenceSession:
    import onnxruntime

    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m graphq.models.digits_clip", description="Texts of the small dual encoder.")
    commands = parser.add_subparsers(dest="command", required=True)
    text = commands.add_parser("text", help="write the embeddings of ten texts, one a digit")
    text.add_argument("out", type=Path)
    text.add_argument("prompt", nargs="?", default=PROMPT)
    commands.add_parser("accuracy", help="print an image tower's zero-shot test accuracy").add_argument("model", type=Path)
    commands.add_parser("classifier", help="write the zero-shot classifier").add_argument("out", type=Path)
    options = parser.parse_args(arguments)
    if options.command == "accuracy":
        found = accuracy(_session(options.model), text_embeddings())
        print(f"{options.model.name}: {found:.2f} % of {len(digits.split_indices('test'))} test images, zero-shot")
    elif options.command == "classifier":
        import onnx

        onnx.save(classifier(onnx.load(onnx_path("digits_clip")), text_embeddings()), options.out)
    else:
        try:
            np.savez(options.out, **{TEXT_NAME: text_embeddings(options.prompt)})  # type: ignore[arg-type]
        except ValueError as error:
            parser.error(str(error))


if __name__ == "__main__":
    main()
