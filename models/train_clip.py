"""Train `digits_clip`, export its towers, and check the ONNX files: `python -m graphq.models.train_clip`. See `train.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import digits, digits_clip
from .digits_clip_net import DigitsClip
from .train import augment, check, export

STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 2500, 32, 1.5e-3, 0.05
CAPTIONS = 2
"""Of each digit in a batch."""

PLAIN = 0.15
"""Share of the steps, the first ones, that see digits alone, as large as the image: in scenes, learning does not find a beginning."""

SEED = 0


def train(steps: int = STEPS) -> DigitsClip:
    """Both towers, trained on random images and captions of them by AdamW under a one-cycle learning rate, in eval mode."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of sums, hence the result, depends on it
    random = np.random.RandomState(SEED)
    model = DigitsClip().train()
    plain = digits.images("train")
    texts = np.tile(np.arange(digits.CLASS_COUNT), CAPTIONS)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.1)
    total = 0.0
    for step in range(steps):
        if step < steps * PLAIN:
            rows = random.randint(len(plain[1]), size=BATCH)
            inputs, labels = plain[0][rows], plain[1][rows]
        else:
            inputs, labels = digits_clip.scenes("train", BATCH, random)
        tokens = digits_clip.encode([digits_clip.caption(digit, random) for digit in texts])
        logits = model(augment(torch.from_numpy(inputs)), torch.from_numpy(tokens))
        loss = contrast(logits, torch.from_numpy(labels), torch.from_numpy(texts))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 50 == 49:
            print(f"step {step + 1}/{steps}: loss {total / 50:.4f}", flush=True)
            total = 0.0
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
    parser.add_argument("--steps", type=int, default=STEPS)
    options = parser.parse_args(arguments)
    model = train(options.steps)
    image, text = (options.out / f"{name}.onnx" for name in ("digits_clip", "digits_clip_text"))
    tokens = digits_clip.encode(digits_clip.prompts())
    export(model.image, image, output=digits_clip.IMAGE_NAME)
    export(model.text, text, name=digits_clip.TOKEN_NAME, example=torch.from_numpy(tokens), output=digits_clip.TEXT_NAME)
    check(model.image, image, digits_clip.test_scenes()[0])
    check(model.text, text, tokens)
    digits_clip.print_accuracy(image, text)


if __name__ == "__main__":
    main()
