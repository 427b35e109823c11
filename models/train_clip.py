"""Train `digits_clip`, export its towers, and check the ONNX files: `python -m graphq.models.train_clip`. See `train.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from . import digits, digits_clip
from .digits_clip_net import DigitsClip
from .train import augment, check, export

EPOCHS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 60, 64, 2e-3, 0.05
CAPTIONS = 2
"""Of each digit in a batch."""
SEED = 0


def train(epochs: int = EPOCHS) -> DigitsClip:
    """Both towers, trained on augmented images and random captions of them by AdamW under a one-cycle learning rate, in eval mode."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of sums, hence the result, depends on it
    model = DigitsClip().train()
    inputs, labels = (torch.from_numpy(array) for array in digits.images("train"))
    captions = torch.stack([torch.from_numpy(digits_clip.encode(digits_clip.captions(digit))) for digit in range(digits.CLASS_COUNT)])
    texts = torch.arange(digits.CLASS_COUNT).repeat(CAPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, epochs=epochs, steps_per_epoch=-(-len(labels) // BATCH), pct_start=0.2
    )
    for epoch in range(epochs):
        total = 0.0
        for rows in torch.randperm(len(labels)).split(BATCH):
            chosen = captions[texts, torch.randint(captions.shape[1], texts.shape)]
            loss = contrast(model(augment(inputs[rows]), chosen), labels[rows], texts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            total += loss.item() * len(rows)
        print(f"epoch {epoch + 1}/{epochs}: loss {total / len(labels):.4f}", flush=True)
    return model.eval()


def contrast(logits: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """CLIP's symmetric loss of logits (N, M) of images against captions, given their digits (N,) and (M,).

    All captions of an image's digit are right, equally so (UniCL, https://arxiv.org/abs/2204.03610): with ten digits, many captions of
    a batch describe many images. A caption without an image has no part in the second direction.
    """
    same = (images[:, None] == texts).float()
    used = same.sum(dim=0) > 0
    to_text, to_image = same / same.sum(dim=1, keepdim=True), same.T[used] / same.T[used].sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, to_text) + functional.cross_entropy(logits.T[used], to_image)) / 2


def main(arguments: list[str] | None = None) -> None:
    """Command line of this module; see its docstring."""
    parser = argparse.ArgumentParser(prog="python -m graphq.models.train_clip", description="Train and export digits_clip.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="folder for digits_clip.onnx and digits_clip_text.onnx")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    options = parser.parse_args(arguments)
    model = train(options.epochs)
    image, text = (options.out / f"{name}.onnx" for name in ("digits_clip", "digits_clip_text"))
    tokens = digits_clip.encode(digits_clip.prompts())
    export(model.image, image, output=digits_clip.IMAGE_NAME)
    export(model.text, text, name=digits_clip.TOKEN_NAME, example=torch.from_numpy(tokens), output=digits_clip.TEXT_NAME)
    session = check(model.image, image, digits.images("test")[0])
    check(model.text, text, tokens)
    print(f"{image.name}: {digits_clip.accuracy(session, digits_clip.text_embeddings(path=text)):.2f} % zero-shot on the test split")


if __name__ == "__main__":
    main()
