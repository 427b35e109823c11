"""Arithmetic of `tune`: a strided convolution as an unstrided one over blocks of pixels, and where to cut masked scores."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

NEGLIGIBLE = 45.0
"""`exp(-45)` is 3e-20: what lies so far below the largest score adds nothing to a float32 sum of up to 10^9 terms."""

SMALLEST = 87.0
"""`exp(-87)` is the smallest normal float32; below it ONNX Runtime computes with subnormal numbers, about ten times slower."""

MASKED = -1e3
"""Scores below this are masked: no network learns them."""


def blocks_of(size: int, kernel: int, stride: int, before: int, after: int) -> tuple[int, int, int]:
    """One axis of a strided convolution over blocks of `stride` pixels: kernel, padding before and padding after, in blocks.

    Args:
        size: Pixels, a multiple of `stride`.
        kernel: Taps.
        before, after: Padding in pixels.
    """
    first, last = -before // stride, (kernel - 1 - before) // stride
    outputs = (size + before + after - kernel) // stride + 1
    taps = last - first + 1
    return taps, -first, outputs - 1 + taps + first - size // stride


def block_weight(weight: np.ndarray, stride: int, before: Sequence[int]) -> np.ndarray:
    """`weight: [O, C, H, W]` of a convolution with `stride` and padding `before: (top, left)`, for `SpaceToDepth(x, stride)`.

    SpaceToDepth puts pixel (i, j) of a block into channel `(i * stride + j) * C + c`. Returns `[O, stride * stride * C, H', W']`.
    """
    outputs, channels, *kernel = weight.shape
    lead = [pad % stride and stride - pad % stride for pad in before]
    taps = [-(-(skip + size) // stride) for skip, size in zip(lead, kernel, strict=True)]
    padded = np.zeros((outputs, channels, taps[0] * stride, taps[1] * stride), weight.dtype)
    padded[:, :, lead[0] : lead[0] + kernel[0], lead[1] : lead[1] + kernel[1]] = weight
    blocks = padded.reshape(outputs, channels, taps[0], stride, taps[1], stride).transpose(0, 3, 5, 1, 2, 4)
    return np.ascontiguousarray(blocks.reshape(outputs, stride * stride * channels, *taps))


def floor_for(row_maxima: np.ndarray) -> float | None:
    """The score at which to cut masked ones so that `softmax` stays what it is in float32 and needs no subnormal numbers.

    Args:
        row_maxima: Largest score of each row; rows that are masked throughout do not count.

    Returns:
        The floor; None if no row has an unmasked score, or if the rows lie so far apart that no floor does both.
    """
    seen = row_maxima[row_maxima > MASKED]
    if not seen.size or float(seen.max() - seen.min()) > SMALLEST - NEGLIGIBLE:
        return None
    return float(np.floor(seen.min() - NEGLIGIBLE))
