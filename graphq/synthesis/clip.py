"""Images for the image tower of a dual encoder from what texts say: D4C, arXiv 2511.15411.

The texts arrive as embeddings, so that no tokenizer is needed. The images grow from noise, in three parts that can be left out:

- semantic injection: each image has a text, and its embedding is to be closest to that text's (InfoNCE);
- structural contrast: only a fixed random crop of the image, enlarged, has the text; the surroundings of all crops in the batch are
  further candidates, which it must not resemble. An image so has an object somewhere, and something else around it;
- perturbation: the crop is mirrored, turned, scaled, shifted, coloured, blurred and partly erased, at random in each step.

Measured on models/digits_clip, three seeds (benchmarks/results/clip.md): perturbation gains most, 4.3 points of W4A4 zero-shot accuracy
and 2.1 dB of W4A8 embeddings without structure, 0.4 points and 3.5 dB with it. Structure gains 2.2 points of W4A4 only where nothing is
perturbed, and costs 1.7 where it is; texts do no better than random directions there. `structure: false` was best, as good as real images
at W4A4. All is left on as published, for CLIP itself and its photographs.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from graphq import ir
from graphq.arrays import open_npz
from graphq.errors import DataError, ModelError, UsageError
from graphq.synthesis.images import Adam, Losses, feed, noise, optimise
from graphq.synthesis.inputs import ImageInput, image_input
from graphq.synthesis.losses import total_variation
from graphq.synthesis.strategy import Arrays, Batch, Maker, Positive, Strategy, Task, Weight, strategy_options
from graphq.synthesis.views import CHANCES, Box, Perturbation, backgrounds, foregrounds, masks, random_box
from graphq.torch_executor import TorchExecutor

TEXT_NAME = "text_embedding"
"""Array [texts, size] of the .npz file with embeddings of texts."""

TEMPERATURE = 0.1


@strategy_options
class Clip(Strategy):
    """Images that a dual encoder finds close to given texts.

    Attributes:
        text: An .npz file with the embeddings of texts, `text_embedding` [texts, size], such as one for each class that the model will
            have to tell apart.
        semantic: Whether images are drawn to the texts; without it, to as many random directions.
        structure: Whether a crop alone is drawn there, and what lies around all crops is a counterexample.
        perturb: Whether crops are perturbed at random.
        flip: Probability of mirror images among perturbations: 0 where left and right matter, as in writing.
        variation: What total variation counts.
        rate: Step size of Adam, as a share of the range of values.
    """

    name = "clip"
    steps = 1000
    batch = 16

    text: Path | None = None
    semantic: bool = True
    structure: bool = True
    perturb: bool = True
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    variation: Weight = 3.0
    rate: Positive = 0.05

    def evidence(self, model: ir.Model) -> str:
        texts = self.texts()
        image_input(ir.inputs(model))
        value = model.graph.outputs[0]
        shape = ir.shape_of(value)
        if shape is None or len(shape) != 2 or shape[1] not in (texts.shape[1], None):
            raise ModelError("The first output is no embedding of images that fits the texts.", where=f"output {value.name} {shape}",
                             expected=f"[images, {texts.shape[1]}]: the image tower alone, and texts through its text tower")  # fmt: skip
        return f"{len(texts)} texts, embeddings of {texts.shape[1]} numbers"

    def texts(self) -> np.ndarray:
        """The embeddings of texts, float32 [texts, size], of length 1."""
        if self.text is None:
            raise UsageError("The strategy clip has no texts.", expected=f"an .npz file with the array {TEXT_NAME} [texts, size]",
                             hint="make embeddings of prompts with the model's text tower, and give --option text=FILE.npz")  # fmt: skip
        if not self.text.is_file():
            raise DataError("There is no such file of text embeddings.", where=str(self.text))
        column = open_npz(self.text).get(TEXT_NAME)
        if column is None or len(column.shape) != 2 or column.dtype.kind != "f" or min(column.shape) < 1:
            raise DataError("The file holds no text embeddings.", where=str(self.text), expected=f"{TEXT_NAME} [texts, size], floats")
        found = np.asarray(next(column.stream([(0, column.shape[0])])), np.float32)
        return found / np.linalg.norm(found, axis=1, keepdims=True).clip(1e-12)

    def prepare(self, task: Task) -> Maker:
        texts, image = self.texts(), image_input(ir.inputs(task.model), task.preprocess)
        executor = TorchExecutor(task.model, [task.model.graph.outputs[0].name or ""], device=task.device)
        adam = Adam(self.rate * image.span)

        def make(batch: Batch) -> Arrays:
            directions = texts
            if not self.semantic:
                directions = np.random.default_rng(batch.seed).standard_normal(texts.shape, np.float32)
            scene = Scene.of(batch, image, self, directions, executor.device)

            def loss(images: Tensor, step: int) -> Losses:
                views = scene.views(images, step)
                parts = [executor.run(feed(view, image))[0] for view in views]
                variation = self.variation * total_variation(images, image.span)
                return {"contrast": info_nce(parts[0], scene.texts, scene.labels, *parts[1:]), "variation": variation}

            return optimise(batch, lambda: noise(batch, image.size, 0), image, loss, adam, task.steps, executor.device)

        return make


@dataclass(frozen=True)
class Scene:
    """What is fixed for the images of a batch: their texts [texts, size], which of them is whose (labels [B]), crops, and their masks."""

    batch: Batch
    options: Clip
    low: Tensor
    texts: Tensor
    labels: Tensor
    boxes: list[Box] | None
    mask: Tensor | None

    @classmethod
    def of(cls, batch: Batch, image: ImageInput, options: Clip, texts: np.ndarray, device: torch.device) -> Scene:
        labels = assign(batch.samples, len(texts), batch.seed)
        boxes, mask = None, None
        if options.structure:
            boxes = [random_box(batch.generator(sample, 1), *image.size[1:]) for sample in batch.samples]
            mask = masks(boxes, *image.size[1:]).to(device)
        low, directions, wanted = (torch.from_numpy(array).to(device) for array in (image.low, texts, labels))
        return cls(batch, options, low, directions, wanted, boxes, mask)

    def views(self, images: Tensor, step: int) -> list[Tensor]:
        """What the model sees in a step: foregrounds [B, C, H, W] and, where there is structure, backgrounds [B, C, H, W]."""
        chances = None
        if self.options.perturb:
            rows = [self.batch.generator(sample, 2, step).random(CHANCES, np.float32) for sample in self.batch.samples]
            chances = torch.from_numpy(np.stack(rows)).to(images.device)
        found = [foregrounds(images, self.boxes, chances, self.low, Perturbation(flip=self.options.flip))]
        if self.mask is not None:
            size = images.shape[1:]
            noises = torch.from_numpy(noise(self.batch, (size[0], size[1], size[2]), 3, step)).to(images.device)
            found.append(backgrounds(images, self.mask, noises))
        return found


def assign(samples: range, texts: int, seed: int) -> np.ndarray:
    """Which text each sample gets, int64: all of them in random order, again and again, so that none is left out."""
    order = np.random.default_rng(seed).permutation(texts)
    return np.asarray(order[np.arange(samples.start, samples.stop) % texts], np.int64)


def info_nce(embeddings: Tensor, texts: Tensor, labels: Tensor, others: Tensor | None = None) -> Tensor:
    """Cross-entropy of cosines over the temperature, [B]: embeddings [B, size] against texts [T, size], of which `labels` [B] are right,
    and against `others` [N, size], of which none is."""
    candidates = texts if others is None else torch.cat([texts, others])
    cosines = functional.normalize(embeddings) @ functional.normalize(candidates).T
    return functional.cross_entropy(cosines / TEMPERATURE, labels, reduction="none")
