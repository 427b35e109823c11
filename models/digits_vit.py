"""A small plain vision transformer for 32x32 digits: An Image is Worth 16x16 Words, https://arxiv.org/abs/2010.11929.

Attention is spelled out as MatMul, Softmax, MatMul, so that the ONNX graph shows the post-softmax activations
which quantizers of vision transformers are about.

Letters: B batch, T tokens (64 patches and the class token), D embedding size, H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Attention(nn.Module):
    """Multi-head self-attention, (B, T, D) to (B, T, D); one linear layer yields queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = dim // heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        tokens, dim = x.shape[1:]
        qkv = self.qkv(x).reshape(-1, tokens, 3, self.heads, self.head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * self.head_dim**-0.5) @ key.transpose(-2, -1)
        mixed = scores.softmax(dim=-1) @ value
        return self.proj(mixed.transpose(1, 2).reshape(-1, tokens, dim))


class Block(nn.Module):
    """Pre-norm transformer block, (B, T, D) to (B, T, D)."""

    def __init__(self, dim: int, heads: int, mlp_ratio: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, mlp_ratio * dim), nn.GELU(), nn.Linear(mlp_ratio * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def position_waves(side: int, dim: int) -> Tensor:
    """Sine and cosine waves of the row and column of each patch, (1, side * side, D): where learning starts from.

    Small random positions would drown in the patch embeddings, and 1347 images are too few to dig them out.
    """
    frequency = 10.0 ** -torch.linspace(0, 1, dim // 4)
    angle = torch.arange(side)[:, None] * frequency
    waves = torch.cat([angle.sin(), angle.cos()], dim=1)
    rows = waves[:, None, :].expand(side, side, dim // 2)
    columns = waves[None, :, :].expand(side, side, dim // 2)
    return torch.cat([rows, columns], dim=2).reshape(1, side * side, dim)


class DigitsVit(nn.Module):
    """Images (B, 1, 32, 32) in [-1, 1] to logits (B, outputs); the class token is read out."""

    def __init__(self, dim: int = 96, depth: int = 4, heads: int = 3, patch: int = 4, mlp_ratio: int = 4, outputs: int = 10) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv2d(1, dim, kernel_size=patch, stride=patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, dim))
        self.position = nn.Parameter(torch.cat([torch.zeros(1, 1, dim), position_waves(32 // patch, dim)], dim=1))
        self.blocks = nn.Sequential(*(Block(dim, heads, mlp_ratio) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, outputs)
        self._initialise()

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.class_token, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patch_embedding(x).flatten(2).transpose(1, 2)
        class_token = self.class_token.expand(x.shape[0], -1, -1)
        tokens = torch.cat([class_token, patches], dim=1) + self.position
        return self.head(self.norm(self.blocks(tokens))[:, 0])
