"""What synthesized images are judged by, as functions of torch tensors: one value for each sample, `[B]`.

Letters: B samples, C channels, H heads, P patches, D features, K classes, M points.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

POINTS = 20
"""At which a density is looked at."""

BANDWIDTH = 0.05
"""Of the kernel, on a scale where cosines lie between -1 and 1."""


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Of class distributions `target` `[B, K]` and the softmax of `logits` `[B, K]`, in nats."""
    return -(target * logits.log_softmax(dim=1)).sum(dim=1)


def total_variation(images: Tensor, span: float) -> Tensor:
    """Root of the mean square of differences between neighbours, right and below, as a share of the range `span` of values.

    Images are `[B, C, height, width]`. The Euclidean norm that papers use is this times the root of the number of neighbours.
    """
    right, below = (images.diff(dim=axis).square().mean(dim=(1, 2, 3)) for axis in (3, 2))
    return ((right + below) / 2 + 1e-12).sqrt() / span


def attention_distance(attention: Tensor, prior: Tensor) -> Tensor:
    """How far attention over patches is from what it is to be, both `[B, H, P]`.

    Mean over heads and patches of squared differences (attention priors alignment of SPDFQ, arXiv 2412.16553), of weights that are
    brought to mean 1 over the patches: it does not depend on how many there are, or on what goes to the class token.
    """
    patches = attention.shape[-1]
    share, goal = (patches * part / part.sum(dim=2, keepdim=True) for part in (attention, prior))
    return (share - goal).square().mean(dim=(1, 2))


def patch_attention(attention: Tensor, patches: int) -> Tensor:
    """Attention `[B, H, T, T]` to `[B, H, P]`: what the class token, before the patches, gives them; without one the mean over patches."""
    extra = attention.shape[-1] - patches
    rows = attention[:, :, 0] if extra else attention.mean(dim=2)
    return rows[:, :, extra:]


def similarity_entropy(features: Tensor) -> Tensor:
    """Differential entropy of the cosine similarities between patches, from features `[B, P, D]` (PSAQ-ViT, arXiv 2203.02250), in nats.

    The density is that of a Gaussian kernel, at `POINTS` points around the similarities of each sample: as far as the kernel reaches, so
    that patches which are all alike have the least entropy. Noise makes such; photographs, with foreground and background, diverse ones.
    """
    directions = torch.nn.functional.normalize(features, dim=2)
    patches = features.shape[1]
    upper = torch.triu_indices(patches, patches, 1, device=features.device)
    cosines = (directions @ directions.transpose(1, 2))[:, upper[0], upper[1]]
    low, high = cosines.detach().amin(dim=1) - 3 * BANDWIDTH, cosines.detach().amax(dim=1) + 3 * BANDWIDTH
    places = torch.linspace(0, 1, POINTS, device=features.device, dtype=features.dtype)
    points = low[:, None] + (high - low)[:, None] * places
    density = torch.stack([kernel(cosines, points[:, index]) for index in range(POINTS)], dim=1)
    return torch.trapezoid(-density * density.clamp_min(1e-12).log(), points, dim=1)


def kernel(samples: Tensor, point: Tensor) -> Tensor:
    """Density at one point a sample `[B]` of `samples` `[B, M]`, by a Gaussian kernel."""
    distances = (samples - point[:, None]) / BANDWIDTH
    return torch.exp(-0.5 * distances.square()).mean(dim=1) / (BANDWIDTH * math.sqrt(2 * math.pi))


def statistics_distance(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """How far mean and standard deviation over batch and places are from those of the training data, `mean` and `deviation` `[C]`.

    Mean over channels of `((m - mean) / deviation)^2 + (s / deviation - 1)^2`, of values `[B, C, ...]`: the sum of ZeroQ (arXiv
    2001.00281), in units of each channel, so that layers count alike. A scalar, as it belongs to the batch.
    """
    axes = [axis for axis in range(values.ndim) if axis != 1]
    found = values.mean(dim=axes)
    spread = (values.var(dim=axes, unbiased=False) + 1e-12).sqrt()
    return (((found - mean) / deviation).square() + (spread / deviation - 1).square()).mean()
