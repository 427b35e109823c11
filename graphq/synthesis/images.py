"""Images that are optimised through a model: the loop that all strategies share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from graphq.synthesis.inputs import ImageInput
from graphq.synthesis.natural import natural
from graphq.synthesis.strategy import Arrays, Batch

Start = Literal["noise", "natural"]
"""What images start as: standard normal noise, or the random images of the strategy `natural`."""


def noise(batch: Batch, size: tuple[int, int, int], *keys: int) -> np.ndarray:
    """Standard normal numbers, float32 `[B, *size]`, each sample its own."""
    return np.stack([batch.generator(sample, *keys).standard_normal(size, np.float32) for sample in batch.samples])


def first_images(start: Start, batch: Batch, image: ImageInput) -> np.ndarray:
    """Images to begin with, float32 `[B, C, H, W]`, each sample its own."""
    return natural(batch, image) if start == "natural" else noise(batch, image.size, 0)


def feed(images: Tensor, image: ImageInput) -> dict[str, Tensor]:
    """Images `[B, C, H, W]` as the model takes them."""
    return {image.name: images if image.layout == "NCHW" else images.permute(0, 2, 3, 1)}


@dataclass(frozen=True)
class Adam:
    """Adam (arXiv 1412.6980) on images, as a function: an interrupted run finds whole steps only.

    Attributes:
        rate: Step size, in units of the images' values.
        betas: Decay of the means of gradients and of their squares.
        cosine: Whether the step size goes down to 0 along a cosine.
    """

    rate: float
    betas: tuple[float, float] = (0.9, 0.999)
    cosine: bool = True

    def step(self, step: int, steps: int, gradient: Tensor, images: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, ...]:
        """Images and moments after step number `step`, counted from 0, of `steps`; all of one shape."""
        one, two = self.betas
        first, second = one * first + (1 - one) * gradient, two * second + (1 - two) * gradient.square()
        root = (second / (1 - two ** (step + 1))).sqrt_().add_(1e-12)
        rate = self.rate * (0.5 + 0.5 * np.cos(np.pi * step / steps) if self.cosine else 1.0)
        return images - rate / (1 - one ** (step + 1)) * first / root, first, second


Losses = Mapping[str, Tensor]
"""By name, one value for each sample, `[B]`, weighted: their sum is what a step lowers. The sample's share of a statistic over the batch
counts as its own."""


def optimise(batch: Batch, start: Callable[[], np.ndarray], image: ImageInput, loss: Callable[[Tensor, int], Losses], adam: Adam,
             steps: int, device: torch.device) -> dict[str, np.ndarray]:  # fmt: skip
    """Lower `loss(images, step)` from `start()`, or from where an interrupted run stopped, in `steps` steps.

    Losses are summed over samples, and Adam knows no neighbours: a sample moves as it would alone.
    """
    found = batch.state() if batch.state is not None else {"images": start()}
    low, high = (torch.from_numpy(part).to(device) for part in (image.low, image.high))
    images = _limit(torch.from_numpy(np.ascontiguousarray(found["images"])).to(device), low, high)
    moments = [torch.from_numpy(found[name]).to(device) if name in found else torch.zeros_like(images) for name in ("first", "second")]
    for step in range(batch.step, steps):
        leaf = images.detach().requires_grad_()
        losses = loss(leaf, step)
        (gradient,) = torch.autograd.grad(torch.stack([value.sum() for value in losses.values()]).sum(), leaf)
        images, *moments = adam.step(step, steps, gradient, images, *moments)
        images = _limit(images, low, high)
        means = {name: float(value.detach().mean()) for name, value in losses.items()}
        batch.finish_step(means, partial(_arrays, images, *moments))
    return image.arrays(images.cpu().numpy())


def _limit(images: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.minimum(torch.maximum(images, low), high)


def _arrays(images: Tensor, first: Tensor, second: Tensor) -> Arrays:
    return {name: part.cpu().numpy() for name, part in (("images", images), ("first", first), ("second", second))}
