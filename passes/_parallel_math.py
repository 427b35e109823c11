"""One convolution for the sum of several of the same input: float64, numpy only.

Along an axis, the taps of a kernel read the positions `first, first + dilation, ..., last` of the input, relative to where the
output's position times the stride lies: `first` is minus the padding in front. Kernels add up where their taps meet
(RepVGG, arXiv 2101.03697, section 3.3). Letters: O outputs, I inputs of a group, K kernel positions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Taps:
    """What a kernel reads along one axis; a single tap has dilation 0.

    Attributes:
        slack: Padding behind, less `last`: with the stride it decides how many outputs there are.
    """

    first: int
    last: int
    dilation: int
    slack: int

    @classmethod
    def of(cls, size: int, dilation: int, before: int, after: int) -> Taps:
        """Of `size` taps and the padding on both sides."""
        last = (size - 1) * dilation - before
        return cls(-before, last, dilation if size > 1 else 0, after - last)

    @property
    def size(self) -> int:
        return (self.last - self.first) // (self.dilation or 1) + 1

    @property
    def pads(self) -> tuple[int, int]:
        return -self.first, self.slack + self.last


@dataclass(frozen=True)
class Kernel:
    """A convolution: weight [O, I, *K], bias [O], taps and stride of each axis. A matrix product has no axes."""

    weight: np.ndarray
    bias: np.ndarray
    taps: tuple[Taps, ...] = ()
    strides: tuple[int, ...] = ()
    groups: int = 1

    def scaled(self, scale: np.ndarray, shift: np.ndarray) -> Kernel:
        """With its outputs `y` turned into `scale * y + shift`, both [O]."""
        weight = self.weight * scale.reshape(-1, *(1,) * (self.weight.ndim - 1))
        return Kernel(weight, scale * self.bias + shift, self.taps, self.strides, self.groups)


def identity(channels: int, groups: int, axes: int) -> Kernel:
    """The convolution that gives what it reads."""
    weight = np.zeros((channels, channels // groups))
    weight[np.arange(channels), np.arange(channels) % (channels // groups)] = 1.0
    taps = (Taps(0, 0, 0, 0),) * axes
    return Kernel(weight.reshape(*weight.shape, *(1,) * axes), np.zeros(channels), taps, (1,) * axes, groups)


def conflict(kernels: Sequence[Kernel]) -> str | None:
    """Why the sum of `kernels` is no kernel, or one that is slower than they are together; None if it is one."""
    one = kernels[0]
    if any(kernel.strides != one.strides for kernel in kernels):
        return "its strides are others"
    if any(kernel.groups != one.groups or kernel.weight.shape[:2] != one.weight.shape[:2] for kernel in kernels):
        return "its groups or channels are others"
    whole = _whole(kernels)
    if whole is None:
        return "its kernel lies at other positions of the input"
    taps = math.prod(axis.size for axis in whole)
    if taps > sum(kernel.weight[0, 0].size for kernel in kernels):
        return f"one kernel would have more positions, {taps}, than all have together"
    return None


def merged(kernels: Sequence[Kernel]) -> Kernel:
    """The sum of `kernels` that have no conflict."""
    whole = _whole(kernels)
    assert whole is not None
    weight = np.sum([_placed(kernel, whole) for kernel in kernels], axis=0)
    bias = np.sum([kernel.bias for kernel in kernels], axis=0)
    return Kernel(weight, bias, whole, kernels[0].strides, kernels[0].groups)


def _whole(kernels: Sequence[Kernel]) -> tuple[Taps, ...] | None:
    """Of each axis, the shortest row of taps that holds those of all kernels; None where there is none."""
    covers = [_cover(axis) for axis in zip(*(kernel.taps for kernel in kernels), strict=True)]
    found = tuple(axis for axis in covers if axis is not None)
    return found if len(found) == len(covers) else None


def _cover(taps: Sequence[Taps]) -> Taps | None:
    first, last = min(one.first for one in taps), max(one.last for one in taps)
    steps, slacks = {one.dilation for one in taps} - {0}, {one.slack for one in taps}
    if len(steps) > 1 or len(slacks) > 1:
        return None
    step = max(steps, default=last - first)  # single taps may lie as far apart as they like
    if step and any((one.first - first) % step for one in taps):
        return None
    return Taps(first, last, step, slacks.pop())


def _placed(kernel: Kernel, whole: Sequence[Taps]) -> np.ndarray:
    """The weight of `kernel` among the taps `whole`, zero where it has none."""
    found = np.zeros((*kernel.weight.shape[:2], *(axis.size for axis in whole)))
    starts = [(own.first - axis.first) // (axis.dilation or 1) for own, axis in zip(kernel.taps, whole, strict=True)]
    index = tuple(slice(start, start + own.size) for start, own in zip(starts, kernel.taps, strict=True))
    found[:, :, *index] = kernel.weight
    return found


def per_channel(array: np.ndarray, channels: int, axis: int, rank: int) -> np.ndarray | None:
    """The number that `array` is for each channel where it is broadcast to `rank` axes, channels on `axis`: float64 [channels].

    None if it differs along other axes, or adds some.
    """
    shape = (1,) * (rank - array.ndim) + array.shape
    if len(shape) > rank or any(size != 1 for index, size in enumerate(shape) if index != axis % rank):
        return None
    if shape[axis % rank] not in (1, channels):
        return None
    return np.broadcast_to(array.astype(np.float64).reshape(-1), (channels,))
