"""What D4C (arXiv 2511.15411) shows a model of an image in the making: a crop of it, perturbed, and what lies around the crop.

All is differentiable with respect to the images. Letters: B samples, C channels, H and W height and width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

AREA = (0.4, 0.7)
"""Of a crop, as a share of its image."""

Box = tuple[slice, slice]
"""Rows and columns of a crop."""


def random_box(random: np.random.Generator, height: int, width: int) -> Box:
    """A crop of the image's own proportions, anywhere in it, whose area is within `AREA`."""
    scale = np.sqrt(random.uniform(*AREA))
    rows, columns = (max(1, round(float(scale * side))) for side in (height, width))
    top, left = random.integers(height - rows + 1), random.integers(width - columns + 1)
    return slice(int(top), int(top) + rows), slice(int(left), int(left) + columns)


def masks(boxes: list[Box], height: int, width: int) -> Tensor:
    """1 in the crops, 0 around them: float32 [B, 1, H, W]."""
    found = torch.zeros(len(boxes), 1, height, width)
    for index, box in enumerate(boxes):
        found[index, 0][box] = 1
    return found


def backgrounds(images: Tensor, mask: Tensor, noise: Tensor) -> Tensor:
    """What lies around the crops, with a little noise: [B, C, H, W]."""
    return images * (1 - mask) + 0.1 * noise


@dataclass(frozen=True)
class Perturbation:
    """How crops are changed at random; published values.

    Attributes:
        flip: Probability of a mirror image, left to right.
        degrees: Largest rotation, either way.
        scale, shift: Largest change of size, and of place as a share of the crop.
        jitter: Largest change of brightness, contrast and saturation, as a share.
        blur, erase: Probabilities of a 3x3 blur, and of a square that is set to 0; its side is a fifth of the image's.
    """

    flip: float = 0.5
    degrees: float = 15.0
    scale: float = 0.05
    shift: float = 0.05
    jitter: float = 0.4
    blur: float = 0.3
    erase: float = 0.3


CHANCES = 12
"""Random numbers that the perturbation of an image takes."""


def foregrounds(images: Tensor, boxes: list[Box] | None, chances: Tensor | None, low: Tensor, kind: Perturbation) -> Tensor:
    """The crops in the size of the images, [B, C, H, W]; perturbed if there are `chances`, uniform in [0, 1), [B, 12].

    Nothing outside of a crop reaches the result. Without `boxes` the whole images are taken.

    Args:
        low: What black is, for each channel, [C, 1, 1].
    """
    if boxes is None and chances is None:
        return images
    height, width = images.shape[2:]
    whole = [(slice(0, height), slice(0, width))] * len(images)
    found = functional.grid_sample(images, _grid(boxes or whole, chances, images, kind), padding_mode="border", align_corners=False)
    if chances is None:
        return found
    return _erase(_blur(_jitter(found, chances[:, 5:8], low, kind.jitter), chances[:, 8], kind.blur), chances[:, 9:], kind.erase)


def _grid(boxes: list[Box], chances: Tensor | None, images: Tensor, kind: Perturbation) -> Tensor:
    """Where the results come from, [B, H, W, 2] in [-1, 1] of the images: never outside of the centres of a crop's pixels."""
    height, width = images.shape[2:]
    edges = torch.tensor([[(box.start, box.stop) for box in (columns, rows)] for rows, columns in boxes], dtype=images.dtype)
    sides = torch.tensor([width, height], dtype=images.dtype)[:, None]
    edges = (edges / sides * 2 - 1).to(images.device)  # [B, 2, 2]: x and y, start and stop
    half, centre = (edges[..., 1] - edges[..., 0]) / 2, edges.mean(dim=-1)
    matrix = torch.eye(2, 3, device=images.device).expand(len(boxes), 2, 3) if chances is None else _motion(chances, width / height, kind)
    grid = functional.affine_grid(matrix, list(images.shape), align_corners=False)
    pixel = ((1 + 2e-4) / sides[:, 0]).to(images.device)  # a little inside, or rounding may reach for a neighbour
    grid = grid * half[:, None, None] + centre[:, None, None]
    return torch.minimum(torch.maximum(grid, (edges[..., 0] + pixel)[:, None, None]), (edges[..., 1] - pixel)[:, None, None])


def _motion(chances: Tensor, aspect: float, kind: Perturbation) -> Tensor:
    """Flip, rotation, scale and shift from five chances: matrices [B, 2, 3]; `aspect` is width over height, so that pixels stay square."""
    around = chances[:, :5] * 2 - 1
    angle = around[:, 1] * np.deg2rad(kind.degrees)
    size = 1 + around[:, 2] * kind.scale
    cosine, sine = angle.cos() * size, angle.sin() * size
    mirror = torch.where(chances[:, 0] < kind.flip, -1.0, 1.0)
    x = torch.stack([cosine * mirror, -sine / aspect, 2 * kind.shift * around[:, 3]], dim=1)
    y = torch.stack([sine * aspect * mirror, cosine, 2 * kind.shift * around[:, 4]], dim=1)
    return torch.stack([x, y], dim=1)


def _jitter(images: Tensor, chances: Tensor, low: Tensor, strength: float) -> Tensor:
    """Brightness, contrast about the mean, and saturation where there is colour, each times 1 - strength to 1 + strength."""
    bright, contrast, colour = (1 + strength * (chances * 2 - 1)).T[..., None, None, None]
    images = low + (images - low) * bright
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * contrast
    if images.shape[1] == 1:
        return images
    grey = images.mean(dim=1, keepdim=True)
    return grey + (images - grey) * colour


def _blur(images: Tensor, chances: Tensor, probability: float) -> Tensor:
    """Each third of the images, or so, smoothed by (1, 2, 1) / 4 along both axes."""
    padded = functional.pad(images, (1, 1, 1, 1), mode="replicate")
    across = (padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]) / 4
    smooth = (across[:, :, :-2] + 2 * across[:, :, 1:-1] + across[:, :, 2:]) / 4
    return torch.where((chances < probability)[:, None, None, None], smooth, images)


def _erase(images: Tensor, chances: Tensor, probability: float) -> Tensor:
    """A square of a fifth of the image's height and width set to 0, somewhere in it, in some of the images."""
    inside = (chances[:, 0] < probability)[:, None, None]
    for axis, size in ((1, images.shape[2]), (2, images.shape[3])):
        side = max(1, size // 5)
        start = (chances[:, axis] * (size - side + 1)).floor()[:, None]
        place = torch.arange(size, device=images.device)
        within = (place >= start) & (place < start + side)
        inside = inside & (within[:, :, None] if axis == 1 else within[:, None, :])
    return images.masked_fill(inside[:, None], 0.0)
