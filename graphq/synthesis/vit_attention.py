"""Images for vision transformers that attend to things: SPDFQ, published as SARDFQ (arXiv 2412.16553).

Noise spreads attention evenly, photographs gather it on what they show. Three parts, each of which can be left out:

- priors: the attention of each head in the deeper half of the layers is drawn to a random mixture of Gaussians over the patches;
- soft_labels: the logits are drawn to random ones with a few large classes, instead of to one class alone;
- regions: one to four parts of each image, enlarged to the whole, are optimised as images of their own, each to a class of its own;
  what the image as a whole is drawn to has the classes of its parts.

Quantizers can do more with such images than with noise (tests/core/test_synthesis.py), but they take long to make. `auto` does not take
them: against random ones with the statistics of photographs (`natural`, which `start: natural` begins with) no gain has been measured.

With `regions`, steps alternate between the whole image and its parts, one after the other; a step costs the same with or without them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphq import ir
from graphq.synthesis import labels
from graphq.synthesis.graph import Attention, attentions, class_count
from graphq.synthesis.images import Adam, Losses, Start, feed, first_images, optimise
from graphq.synthesis.inputs import image_input
from graphq.synthesis.losses import attention_distance, cross_entropy, patch_attention, total_variation
from graphq.synthesis.strategy import Arrays, Batch, Maker, Positive, Strategy, Task, Weight, strategy_options
from graphq.torch_executor import TorchExecutor

Box = tuple[int, int, int, int]


@strategy_options
class VitAttention(Strategy):
    """Images that gather attention.

    Attributes:
        priors, soft_labels, regions: The parts of the method.
        attention: What the distance of attention counts; 1 makes it of the order of the logits' cross-entropy.
        start: What images start as: noise, as in the paper, or the random images of `natural`.
        variation: What total variation counts.
        rate: Step size of Adam, as a share of the range of values.
    """

    name = "vit-attention"
    steps = 500

    priors: bool = True
    soft_labels: bool = True
    regions: bool = True
    attention: Weight = 1.0
    start: Start = "noise"
    variation: Weight = 50.0
    rate: Positive = 0.05

    def evidence(self, model: ir.Model) -> str:
        layers, classes = _layers(model), class_count(model)
        rows, columns = layers[0].grid
        return f"{len(layers)} layers of attention over {rows}x{columns} patches, {classes} classes"

    def prepare(self, task: Task) -> Maker:
        image, layers = image_input(ir.inputs(task.model), task.preprocess), _layers(task.model)
        depths = range(len(layers) // 2, len(layers)) if self.priors else range(0)
        logits = task.model.graph.outputs[0].name or ""
        executor = TorchExecutor(task.model, [logits, *(layers[depth].weights for depth in depths)], device=task.device)
        adam = Adam(self.rate * image.span)
        classes = class_count(task.model)

        def make(batch: Batch) -> Arrays:
            goals = [self._goals(batch.generator(sample, 1), image.size[1:], classes, layers[0], len(depths)) for sample in batch.samples]

            def loss(images: Tensor, step: int) -> Losses:
                views = [active(step, len(goal)) for goal in goals]
                chosen = [goal[view] for goal, view in zip(goals, views, strict=True)]
                shown = show(images, [one.box for one in chosen])
                found, *weights = executor.run(feed(shown, image))
                target = _stack([one.label for one in chosen], images)
                losses = {"labels": cross_entropy(found.flatten(1), target)}
                if weights:
                    prior = _stack([one.prior for one in chosen], images)  # [B, layers, H, P]
                    losses["attention"] = self.attention * torch.stack([
                        (depth + 1) / len(layers) * attention_distance(patch_attention(part, layers[depth].patches), prior[:, index])
                        for index, (depth, part) in enumerate(zip(depths, weights, strict=True))
                    ]).sum(dim=0)  # fmt: skip
                losses["variation"] = self.variation * total_variation(shown, image.span)
                return losses

            return optimise(batch, lambda: first_images(self.start, batch, image), image, loss, adam, task.steps, executor.device)

        return make

    def _goals(self, random: np.random.Generator, size: tuple[int, int], classes: int, layer: Attention, depths: int) -> list[Goal]:
        """What the whole of an image, and then each of its parts, is to show."""
        boxes: list[Box | None] = list(labels.regions(random, *size)) if self.regions else [None]
        shown = [int(random.integers(classes)) for _ in boxes]
        views = [(None, shown), *((box, [one]) for box, one in zip(boxes, shown, strict=True) if box is not None)]
        label = (lambda kinds: labels.soft_label(random, kinds, classes)) if self.soft_labels else (
            lambda kinds: labels.hard_label(kinds, classes))  # fmt: skip
        return [Goal(box, label(kinds), _priors(random, layer, depths)) for box, kinds in views]


@dataclass(frozen=True)
class Goal:
    """What a view of an image is to be: the part it shows (None: all), class shares `[K]`, attention `[layers, H, P]`."""

    box: Box | None
    label: np.ndarray
    prior: np.ndarray


def active(step: int, views: int) -> int:
    """The view that a step works on: the whole (0) every other step, its parts in turn in between."""
    return 0 if views == 1 or step % 2 == 0 else 1 + step // 2 % (views - 1)


def show(images: Tensor, boxes: list[Box | None]) -> Tensor:
    """Of each image `[B, C, H, W]` the part in its box, enlarged to the whole size; pixels outside get no gradient."""
    size = images.shape[2:]
    views = [image[None] if box is None else torch.nn.functional.interpolate(
        image[None, :, box[0] : box[2], box[1] : box[3]], size=size, mode="bilinear", align_corners=False)
        for image, box in zip(images, boxes, strict=True)]  # fmt: skip
    return torch.cat(views)


def _layers(model: ir.Model) -> list[Attention]:
    """Those with as many heads and patches as the first."""
    found = attentions(model, *image_input(ir.inputs(model)).size[1:])
    return [one for one in found if (one.heads, one.grid) == (found[0].heads, found[0].grid)]


def _priors(random: np.random.Generator, layer: Attention, depths: int) -> np.ndarray:
    maps = [labels.attention_prior(random, *layer.grid) for _ in range(depths * layer.heads)]
    return np.stack(maps).reshape(depths, layer.heads, layer.patches) if maps else np.zeros((0, layer.heads, layer.patches), np.float32)


def _stack(arrays: list[np.ndarray], like: Tensor) -> Tensor:
    return torch.from_numpy(np.stack(arrays)).to(like.device)
