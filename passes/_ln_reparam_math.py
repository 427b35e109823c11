"""One scale for all channels of a normalization's output, without loss (RepQ-ViT, arXiv 2212.08254).

y: [N, D] what the normalization returns; s, z: [D] the scale and zero point that suit each of its channels, for unsigned codes.
With `r = s / s̃` and an integer z̃, `y' = (y + s (z - z̃)) / r` has under the one scale s̃ and zero point z̃ the very codes that y has
under s and z, since `y' / s̃ + z̃ = y / s + z`. A fractional z̃, such as the mean of z, would round differently. Which s̃ is taken
changes no code: whatever it is, the weights are multiplied by its inverse, and so are their scales.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphq.quantizers import QParams, Uniform
from graphq.spec import QuantSpec

NARROWEST = 1 / 64
"""No channel is taken to be narrower than this share of the mean: one that hardly moved in calibration may move later."""


@dataclass(frozen=True, eq=False)
class Change:
    """`y' = (y + offset) / ratio`, and the one scale and zero point of its unsigned codes.

    Attributes:
        ratio: `r`, float64 of shape (D,), positive.
        offset: `s (z - z̃)`, float64 of shape (D,).
    """

    ratio: np.ndarray
    offset: np.ndarray
    scale: float
    zero_point: int


def channel_qparams(low: np.ndarray, high: np.ndarray, bits: int, *, headroom: float = 1.0, zero_points: bool = True) -> QParams:
    """Scale and zero point of each channel, for unsigned codes of `bits` bits.

    Args:
        low, high: What was seen of each channel, float64 of shape (D,).
        headroom: How many times as wide the range gets, around its middle.
        zero_points: Whether channels have zero points of their own; else all have the middle code.
    """
    low, high = np.minimum(low, 0.0), np.maximum(high, 0.0)
    width = high - low
    margin = (headroom * np.maximum(width, NARROWEST * width.mean()) - width) / 2
    return Uniform(QuantSpec(bits, signed=False, symmetric=not zero_points)).fit(low - margin, high + margin)


def change(channels: QParams, zero_point: int) -> Change:
    """From `channels` to the one zero point z̃ given, and the mean of their scales."""
    s = channels.scale.astype(np.float64)
    common = float(s.mean())
    return Change(s / common, s * (channels.zero_point - zero_point), common, zero_point)


def common_range(one: Change, bits: int, *, symmetric: bool) -> tuple[float, float]:
    """The range whose quantizer has the scale of `one` (and its zero point, if it is not `symmetric`)."""
    if symmetric:
        largest = ((1 << (bits - 1)) - 1) * one.scale
        return -largest, largest
    return -one.zero_point * one.scale, ((1 << bits) - 1 - one.zero_point) * one.scale
