"""Images for classifiers of which nothing is left but weights: a network whose BatchNormalization was folded before it was exported.

The statistics of its layers cannot be had from folded weights: `W' = W gamma / sigma` and `b' = beta - mu gamma / sigma` mix them. What is
known is that photographs make confident predictions of some classes, and what photographs look like: images start as those of `natural`,
are drawn to soft labels, and stay smooth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphq import ir
from graphq.synthesis import labels
from graphq.synthesis.graph import class_count
from graphq.synthesis.images import Adam, Losses, Start, feed, first_images, optimise
from graphq.synthesis.inputs import image_input
from graphq.synthesis.losses import cross_entropy, total_variation
from graphq.synthesis.strategy import Arrays, Batch, Maker, Positive, Strategy, Task, Weight, strategy_options
from graphq.torch_executor import TorchExecutor


@strategy_options
class Logits(Strategy):
    """Smooth images of random classes.

    Attributes:
        soft_labels: Whether logits are drawn to random ones with a large class, instead of to one class alone.
        start: What images start as, the random images of `natural` or noise.
        variation: What total variation counts.
        rate: Step size of Adam, as a share of the range of values.
    """

    name = "logits"
    steps = 200

    soft_labels: bool = True
    start: Start = "natural"
    variation: Weight = 50.0
    rate: Positive = 0.02

    def evidence(self, model: ir.Model) -> str:
        channels, height, width = image_input(ir.inputs(model)).size
        return f"images {channels}x{height}x{width}, {class_count(model)} classes"

    def prepare(self, task: Task) -> Maker:
        image, classes = image_input(ir.inputs(task.model), task.preprocess), class_count(task.model)
        executor = TorchExecutor(task.model, [task.model.graph.outputs[0].name or ""], device=task.device)
        adam = Adam(self.rate * image.span)

        def make(batch: Batch) -> Arrays:
            targets = []
            for random in (batch.generator(sample, 1) for sample in batch.samples):
                shown = [int(random.integers(classes))]
                targets.append(labels.soft_label(random, shown, classes) if self.soft_labels else labels.hard_label(shown, classes))

            def loss(images: Tensor, step: int) -> Losses:
                (found,) = executor.run(feed(images, image))
                target = torch.stack([torch.from_numpy(one) for one in targets]).to(images.device)
                variation = self.variation * total_variation(images, image.span)
                return {"labels": cross_entropy(found.flatten(1), target), "variation": variation}

            return optimise(batch, lambda: first_images(self.start, batch, image), image, loss, adam, task.steps, executor.device)

        return make
