"""Train `digits_clip`, export its towers, and check the ONNX files: `python -m graphq.models.train_clip`. See `train.py`."""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import digits_clip
from .digits_clip_net import DigitsClip
from .train import augment, check, export

STEPS, BATCH, LEARNING_RATE, WEIGHT_DECAY = 2000, 64, 2e-3, 0.05
TWINS = 0.1
"""Share of the steps, the first ones, that see pairs of equal digits alone: without them, learning takes long to begin."""

SEED = 0


def train(steps: int = STEPS) -> DigitsClip:
    """Both towers, trained on random images and captions of them by AdamW under a one-cycle learning rate, in eval mode."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)  # the order of sums, hence the result, depends on it
    random = np.random.RandomState(SEED)
    model = DigitsClip().train()
    trained = [pair for pair in range(digits_clip.PAIRS) if digits_clip.is_trained(pair)]
    twins = [pair for pair in trained if pair % 11 == 0]
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    total = 0.0
    for step in range(steps):
        pairs = random.choice(twins if step < steps * TWINS else trained, BATCH)
        images = augment(torch.from_numpy(digits_clip.images("train", pairs, random)))
        tokens = torch.from_numpy(digits_clip.encode([digits_clip.caption(pair, random) for pair in pairs]))
        loss = contrast(model(images, tokens), torch.from_numpy(pairs))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}: loss {total / 100:.4f}", flush=True)
            total = 0.0
    return model.eval()


def contrast(logits: Tensor, pairs: Tensor) -> Tensor:
    """CLIP's symmetric loss of logits (B, B) of images against captions; all captions of an image's pair (B,) are right, equally so.

    UniCL, https://arxiv.org/abs/2204.03610: a few captions in a batch describe several images.
    """
    same = (pairs[:, None] == pairs).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (functional.cross_entropy(logits, target) + functional.cross_entropy(logits.T, target)) / 2


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
    check(model.image, image, digits_clip.test_images()[0])
    check(model.text, text, tokens)
    digits_clip.print_accuracy(image, text)


if __name__ == "__main__":
    main()
