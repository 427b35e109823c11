"""Random images with the statistics of photographs: no model is asked and nothing is optimised. What other strategies may start from.

Photographs show objects of all sizes that hide one another. Opaque shapes of random places, colours and sizes, many small ones and few
large ones, one over the other, have many of their statistics: scale invariance, edges, flat parts, a spectrum that falls as the inverse of
the frequency ("dead leaves": Lee, Mumford, Huang, IJCV 41, 2001). Networks learn from such images nearly as from photographs (arXiv
2106.05963). Here leaves are discs and boxes with shading of the same spectrum (Field, J. Opt. Soc. Am. A 4, 2379, 1987).
Number, sizes and colours of leaves were chosen by hand, so that the layers of one ViT see them much as they see photographs.
"""

from __future__ import annotations

import numpy as np

from graphq import ir
from graphq.synthesis.inputs import ImageInput, image_input
from graphq.synthesis.strategy import Arrays, Batch, Maker, Strategy, Task, strategy_options

LEAVES = 300
"""Of an image; of the areas that they cover, the last ones stay whole."""

SMALLEST, LARGEST = 1 / 20, 1 / 2
"""Radius of a leaf as a share of the image's shorter side; how many there are falls with its cube."""

COLOUR, SHADE, LIGHT = 0.08, 0.08, 0.08
"""Standard deviations as shares of the range: what channels of a leaf have for themselves, shading within a leaf, and over the image."""


@strategy_options
class Natural(Strategy):
    """Random images with the statistics of photographs.

    Attributes:
        leaves: Whether there are objects; without them images are clouds, which have the spectrum alone.
    """

    name = "natural"
    steps = 1

    leaves: bool = True

    def evidence(self, model: ir.Model) -> str:
        channels, height, width = image_input(ir.inputs(model)).size
        return f"random images {channels}x{height}x{width}, the model is not asked"

    def prepare(self, task: Task) -> Maker:
        image = image_input(ir.inputs(task.model), task.preprocess)

        def make(batch: Batch) -> Arrays:
            return image.arrays(natural(batch, image, self.leaves))

        return make


def natural(batch: Batch, image: ImageInput, leaves: bool = True) -> np.ndarray:
    """Random images, float32 `[B, C, H, W]` within the image's range."""
    paint = _leaves if leaves else _clouds
    shares = np.stack([paint(batch.generator(sample, 0), image.size) for sample in batch.samples])
    return np.asarray(np.clip(image.low + (image.high - image.low) * shares, image.low, image.high), np.float32)


def _leaves(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Shapes over shapes, as shares of the range `[C, H, W]`."""
    channels, height, width = size
    side = min(height, width)
    smallest = max(SMALLEST, 2 / side)  # two pixels
    shading = np.tile(SHADE * _waves(random, (1, height, width))[0], (2, 2))
    picture = np.empty(size)
    for index in range(LEAVES + 1):
        radius = side / np.sqrt(random.uniform(LARGEST**-2, max(smallest**-2, LARGEST**-2)))
        if index == 0:
            radius = 2.0 * (height + width)  # the ground
        aspect, corner = np.exp(random.uniform(-0.5, 0.5)), random.uniform(0, [height, width])
        rows, columns = (slice(max(0, int(centre - reach)), int(centre + reach) + 1)
                         for centre, reach in zip(corner, (radius * aspect, radius / aspect), strict=True))  # fmt: skip
        y, x = np.ogrid[:height, :width]
        away = np.abs(y[rows] - corner[0]) / (radius * aspect), np.abs(x[:, columns] - corner[1]) / (radius / aspect)
        shape = (away[0] ** 2 + away[1] ** 2 if random.random() < 0.5 else np.maximum(*away)) < 1
        colour = random.uniform() + COLOUR * random.standard_normal((channels, 1, 1)) * (channels > 1)
        part = picture[:, rows, columns]
        top, left = random.integers(0, [height, width])
        leaf = colour + random.uniform(-1, 1) * shading[top : top + part.shape[1], left : left + part.shape[2]]
        np.copyto(part, leaf, where=shape)
    return picture + LIGHT * _waves(random, (1, height, width))


def _clouds(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Noise with the spectrum of photographs, as shares of the range `[C, H, W]`.

    Its mean, standard deviation and what channels have in common are about those of ImageNet's pixels.
    """
    channels, height, width = size
    common, own = _waves(random, (1, height, width)), _waves(random, size)
    pattern = (common + 0.35 * own * (channels > 1)) / np.sqrt(1 + 0.35**2 * (channels > 1))
    return np.asarray(0.46 + 0.1 * random.standard_normal() + 0.23 * np.exp(0.3 * random.standard_normal()) * pattern)


def _waves(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Noise of mean 0 and standard deviation 1 in each channel, amplitudes falling as 1 / frequency."""
    channels, height, width = size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    spectrum = np.fft.rfft2(random.standard_normal(size)) / frequency
    waves = np.fft.irfft2(spectrum, s=(height, width))
    return np.asarray(waves / waves.std(axis=(1, 2), keepdims=True))
