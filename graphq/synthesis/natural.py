"""Random images with the spectrum of photographs: no model is asked and nothing is optimised. What other strategies may start from.

The amplitude of photographs falls as the inverse of the spatial frequency (Field, J. Opt. Soc. Am. A 4, 2379, 1987), and their channels
are alike. Such clouds have smooth parts and slopes, as photographs have, and no objects.
"""

from __future__ import annotations

import numpy as np

from graphq import ir
from graphq.synthesis.inputs import ImageInput, image_input
from graphq.synthesis.strategy import Arrays, Batch, Maker, Strategy, Task, strategy_options

MEAN, SPREAD = 0.46, 0.23
"""Of pixels of photographs, as shares of their range: the means over channels of what ImageNet's preprocessing subtracts and divides by."""

COLOUR = 0.35
"""Standard deviation of what a channel has for itself, over that of what all have in common."""


@strategy_options
class Natural(Strategy):
    """Clouds: random images with the spectrum of photographs."""

    name = "natural"
    steps = 1

    def evidence(self, model: ir.Model) -> str:
        channels, height, width = image_input(ir.inputs(model)).size
        return f"images {channels}x{height}x{width}"

    def prepare(self, task: Task) -> Maker:
        image = image_input(ir.inputs(task.model), task.preprocess)

        def make(batch: Batch) -> Arrays:
            return image.arrays(clouds(batch, image))

        return make


def clouds(batch: Batch, image: ImageInput, *keys: int) -> np.ndarray:
    """Random images with amplitudes 1 / frequency, float32 `[B, C, H, W]` within the image's range."""
    return np.stack([_cloud(batch.generator(sample, *keys), image) for sample in batch.samples])


def _cloud(random: np.random.Generator, image: ImageInput) -> np.ndarray:
    channels, height, width = image.size
    common, own = _waves(random, (1, height, width)), _waves(random, image.size)
    pattern = (common + COLOUR * own * (channels > 1)) / np.sqrt(1 + COLOUR**2 * (channels > 1))
    brightness, contrast = MEAN + 0.1 * random.standard_normal(), SPREAD * np.exp(0.3 * random.standard_normal())
    values = image.low + (image.high - image.low) * (brightness + contrast * pattern)
    return np.asarray(np.clip(values, image.low, image.high), np.float32)


def _waves(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1 in each channel, amplitudes falling as 1 / frequency."""
    channels, height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(random.standard_normal(size)) / frequency
    waves = np.fft.irfft2(spectrum, s=(height, width))
    return np.asarray(waves / waves.std(axis=(1, 2), keepdims=True))
