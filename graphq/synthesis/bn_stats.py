"""Images with the statistics that BatchNormalization remembers of the training data: ZeroQ (arXiv 2001.00281)."""

from __future__ import annotations

import torch
from torch import Tensor

from graphq import ir
from graphq.errors import ModelError
from graphq.synthesis.graph import batch_norms
from graphq.synthesis.images import Adam, Losses, Start, feed, first_images, optimise
from graphq.synthesis.inputs import image_input
from graphq.synthesis.losses import statistics_distance, total_variation
from graphq.synthesis.strategy import Arrays, Batch, Maker, Positive, Strategy, Task, Weight, strategy_options
from graphq.torch_executor import TorchExecutor


@strategy_options
class BnStats(Strategy):
    """Images whose activations have the means and standard deviations that BatchNormalization remembers, over the batch.

    Attributes:
        start: What images start as: noise, as in ZeroQ, or the random images of `natural`, from which far more is kept: on `digits_cnn`
            (recipe int8) 41 dB of the logits against 34 dB from noise and 35 dB for noise itself (benchmarks/synthesis.py, 50 steps).
        variation: What total variation counts, for each image; the distance of statistics counts 1 for each layer.
        rate: Step size of Adam, as a share of the range of values.
    """

    name = "bn-stats"
    steps = 300

    start: Start = "natural"
    variation: Weight = 0.0
    rate: Positive = 0.02

    def evidence(self, model: ir.Model) -> str:
        image_input(ir.inputs(model))
        found = batch_norms(model)
        if not found:
            raise ModelError("There is no BatchNormalization.", hint="export the model before its BatchNormalization is folded")
        return f"the statistics of {len(found)} BatchNormalization"

    def prepare(self, task: Task) -> Maker:
        image, layers = image_input(ir.inputs(task.model), task.preprocess), batch_norms(task.model)
        executor = TorchExecutor(task.model, [layer.value for layer in layers], device=task.device)
        goals = [[torch.from_numpy(part).to(executor.device) for part in (layer.mean, layer.deviation)] for layer in layers]
        adam = Adam(self.rate * image.span)

        def make(batch: Batch) -> Arrays:
            def loss(images: Tensor, step: int) -> Losses:
                values = executor.run(feed(images, image))
                distances = [statistics_distance(value, *goal) for value, goal in zip(values, goals, strict=True)]
                losses = {"statistics": torch.stack(distances).sum().expand(len(images)) / len(images)}
                return losses | ({"variation": self.variation * total_variation(images, image.span)} if self.variation else {})

            return optimise(batch, lambda: first_images(self.start, batch, image), image, loss, adam, task.steps, executor.device)

        return make
