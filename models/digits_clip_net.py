"""The two towers of `digits_clip`, made of the vision transformer's blocks. CLIP, https://arxiv.org/abs/2103.00020.

Letters: B batch, T characters, D width, E embedding size.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from .digits_clip import ALPHABET, EMBEDDING_SIZE, LENGTH
from .digits_vit import Block, DigitsVit


def unit(x: Tensor) -> Tensor:
    """Rows (B, E) of length 1."""
    return x / x.square().sum(dim=-1, keepdim=True).sqrt()


class ImageTower(DigitsVit):
    """Images (B, 1, 32, 32) in [-1, 1] to embeddings (B, E) of length 1."""

    def __init__(self) -> None:
        super().__init__(dim=48, depth=3, heads=3, outputs=EMBEDDING_SIZE)

    def forward(self, x: Tensor) -> Tensor:
        return unit(super().forward(x))


class TextTower(nn.Module):
    """Characters int64 (B, T) to embeddings (B, E) of length 1; every character sees all others, the mean is read out."""

    def __init__(self, dim: int = 48, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(len(ALPHABET), dim)
        self.position = nn.Parameter(torch.zeros(1, LENGTH, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio=4) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, EMBEDDING_SIZE)
        nn.init.normal_(self.position, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        return unit(self.head(self.norm(self.blocks(self.embedding(tokens) + self.position)).mean(dim=1)))


class DigitsClip(nn.Module):
    """Both towers, and the learned scale of their cosines; to train, each tower is exported for itself."""

    def __init__(self) -> None:
        super().__init__()
        self.image, self.text = ImageTower(), TextTower()
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        for module in self.modules():
            # Smaller weights make all images alike, and all texts, from where a contrast finds no way out.
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, images: Tensor, tokens: Tensor) -> Tensor:
        """Logits (B, B) of each image against each caption."""
        return self.log_scale.exp() * self.image(images) @ self.text(tokens).T
