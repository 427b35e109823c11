"""Fourier transforms; complex numbers are pairs in the last axis."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.table import Call, numbers_of, operator


def _complex(x: Tensor) -> Tensor:
    return torch.complex(x[..., 0], x[..., 1] if x.shape[-1] == 2 else torch.zeros_like(x[..., 0]))


@operator("DFT", numbers=(1, 2))
def dft(call: Call, x: Tensor, length: Tensor | None = None, axis: Tensor | None = None) -> Tensor:
    place = numbers_of(axis)[0] if axis is not None else call.get("axis", 1 if call.opset < 20 else -2)
    place = place + x.ndim if place < 0 else place
    size = numbers_of(length)[0] if length is not None else None
    inverse, half = bool(call.get("inverse", 0)), bool(call.get("onesided", 0))
    if inverse and half:
        return torch.fft.irfft(_complex(x), size if size is not None else 2 * (x.shape[place] - 1), place).unsqueeze(-1)
    y = (torch.fft.ifft if inverse else torch.fft.fft)(_complex(x), size, place)
    return torch.view_as_real(y.narrow(place, 0, y.shape[place] // 2 + 1) if half else y)


@operator("STFT", numbers=(1, 3))
def stft(call: Call, x: Tensor, step: Tensor, window: Tensor | None = None, length: Tensor | None = None) -> Tensor:
    size = numbers_of(length)[0] if length is not None else window.shape[0] if window is not None else x.shape[1]
    frames = _complex(x).unfold(1, size, numbers_of(step)[0])
    if window is not None:
        before = (size - window.shape[0]) // 2
        frames = frames * functional.pad(window, [before, size - window.shape[0] - before])
    y = torch.fft.fft(frames)
    return torch.view_as_real(y[..., : size // 2 + 1] if call.get("onesided", 1) else y)
