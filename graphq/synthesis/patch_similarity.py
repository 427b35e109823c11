"""Images for vision transformers whose patches differ: PSAQ-ViT (arXiv 2203.02250), what newer methods are measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from graphq import ir
from graphq.synthesis import labels
from graphq.synthesis.graph import attentions, class_count
from graphq.synthesis.images import Adam, Losses, Start, feed, first_images, optimise
from graphq.synthesis.inputs import image_input
from graphq.synthesis.losses import cross_entropy, similarity_entropy, total_variation
from graphq.synthesis.strategy import Arrays, Batch, Maker, Positive, Strategy, Task, Weight, strategy_options
from graphq.torch_executor import TorchExecutor


@strategy_options
class PatchSimilarity(Strategy):
    """Images with diverse similarities between patches, in every layer of attention, each of one class.

    Attributes:
        entropy: What the entropy of similarities counts, summed over layers.
        start: What images start as: noise, as in the paper, or the random images of `natural`.
        variation: What total variation counts.
        rate: Step size of Adam, as a share of the range of values.
    """

    name = "patch-similarity"
    steps = 500

    entropy: Weight = 1.0
    start: Start = "noise"
    variation: Weight = 50.0
    rate: Positive = 0.05

    def evidence(self, model: ir.Model) -> str:
        layers, classes = attentions(model, *image_input(ir.inputs(model)).size[1:]), class_count(model)
        return f"{len(layers)} layers of attention over patches, {classes} classes"

    def prepare(self, task: Task) -> Maker:
        image = image_input(ir.inputs(task.model), task.preprocess)
        layers, classes = attentions(task.model, *image.size[1:]), class_count(task.model)
        fetches = [task.model.graph.outputs[0].name or "", *(layer.mixed for layer in layers)]
        executor = TorchExecutor(task.model, fetches, device=task.device)
        adam = Adam(self.rate * image.span, betas=(0.5, 0.9))

        def make(batch: Batch) -> Arrays:
            chosen = [[int(batch.generator(sample, 1).integers(classes))] for sample in batch.samples]

            def loss(images: Tensor, step: int) -> Losses:
                found, *mixed = executor.run(feed(images, image))
                target = torch.stack([torch.from_numpy(labels.hard_label(one, classes)) for one in chosen]).to(images.device)
                entropies = [similarity_entropy(part.mean(dim=1)[:, -layer.patches :]) for layer, part in zip(layers, mixed, strict=True)]
                return {
                    "labels": cross_entropy(found.flatten(1), target),
                    "similarity": -self.entropy * torch.stack(entropies).sum(dim=0),
                    "variation": self.variation * total_variation(images, image.span),
                }

            return optimise(batch, lambda: first_images(self.start, batch, image), image, loss, adam, task.steps, executor.device)

        return make
