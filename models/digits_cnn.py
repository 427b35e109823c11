"""A small CNN for 32x32 digits with the parts that CNN methods are about: BatchNorm behind every convolution,
a residual addition, depthwise-separable convolutions with ReLU6, a global mean.

Letters: B batch, C channels.
"""

from __future__ import annotations

from torch import Tensor, nn


def conv_norm(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution without bias, padded to keep the size at stride 1, then BatchNorm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs))


class Residual(nn.Module):
    """Two 3x3 convolutions around an identity, (B, C, H, W) to (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv_norm(channels, channels, 3)
        self.conv2 = conv_norm(channels, channels, 3)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.conv2(self.relu(self.conv1(x))))


class Separable(nn.Module):
    """Depthwise 3x3 and pointwise convolution, each with ReLU6: MobileNets, https://arxiv.org/abs/1704.04861."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.depthwise = conv_norm(inputs, inputs, 3, stride, groups=inputs)
        self.pointwise = conv_norm(inputs, outputs, 1)
        self.relu6 = nn.ReLU6()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu6(self.pointwise(self.relu6(self.depthwise(x))))


class DigitsCnn(nn.Module):
    """Images (B, 1, 32, 32) in [-1, 1] to logits (B, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            conv_norm(1, 32, 3),
            nn.ReLU(),
            conv_norm(32, 64, 3, stride=2),
            nn.ReLU(),
            Residual(64),
            Separable(64, 128, stride=2),
            Separable(128, 128, stride=1),
        )
        self.head = nn.Linear(128, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))
