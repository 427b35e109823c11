"""A small decoder-only language model with the parts of Llama (https://arxiv.org/abs/2302.13971): RMSNorm, rotary positions, SwiGLU,
no biases. Attention is spelled out, and its keys and values come in and go out, so that decoding repeats no work.

Letters: B batch, T new tokens, P tokens in the cache, D embedding size, H heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from . import digits_lm

HIDDEN_LOGIT = -1e4
"""Added to the score of a key that lies ahead; far below any score, and finite."""


class RmsNorm(nn.Module):
    """Root-mean-square normalization over D, https://arxiv.org/abs/1910.07467; written out, as opset 21 has no operator for it."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * self.weight


class Attention(nn.Module):
    """Causal self-attention, (B, T, D) to (B, T, D), with keys and values (B, H, P, E) of the tokens before."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads, self.size = heads, dim // heads
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim, bias=False) for _ in range(4))

    def forward(self, x: Tensor, waves: tuple[Tensor, Tensor], bias: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            layer(x).reshape(x.shape[0], x.shape[1], self.heads, self.size).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        key = torch.cat([past[0], rotate(key, *waves)], dim=2)
        value = torch.cat([past[1], value], dim=2)
        scores = rotate(query, *waves) @ key.transpose(-2, -1) * self.size**-0.5 + bias
        mixed = scores.softmax(dim=-1) @ value
        return self.out(mixed.transpose(1, 2).reshape(x.shape[0], x.shape[1], -1)), key, value


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotary positions, https://arxiv.org/abs/2104.09864: turn the pairs (i, i + E/2) of (B, H, T, E) by angles (T, E/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)


class Block(nn.Module):
    """Pre-norm transformer block; the feed-forward part is SwiGLU, https://arxiv.org/abs/2002.05202."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = RmsNorm(dim), RmsNorm(dim)
        self.attention = Attention(dim, heads)
        self.gate, self.up = (nn.Linear(dim, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, dim, bias=False)
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor, waves: tuple[Tensor, Tensor], bias: Tensor, past: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        mixed, key, value = self.attention(self.norm1(x), waves, bias, past)
        x = x + self.dropout(mixed)
        normal = self.norm2(x)
        return x + self.dropout(self.down(functional.silu(self.gate(normal)) * self.up(normal))), key, value


class DigitsLm(nn.Module):
    """Tokens int64 (B, T) and each layer's keys and values (B, H, P, E) to logits (B, T, 96) and keys and values (B, H, P + T, E).

    Positions count from the length of the cache.
    """

    def __init__(self, hidden: int = 384) -> None:
        super().__init__()
        dim = digits_lm.HEADS * digits_lm.HEAD_SIZE
        self.embedding = nn.Embedding(len(digits_lm.VOCABULARY), dim)
        self.blocks = nn.ModuleList(Block(dim, digits_lm.HEADS, hidden) for _ in range(digits_lm.LAYERS))
        self.norm = RmsNorm(dim)
        self.head = nn.Linear(dim, len(digits_lm.VOCABULARY), bias=False)
        self.register_buffer("frequency", 1e4 ** -(torch.arange(digits_lm.HEAD_SIZE // 2) * 2 / digits_lm.HEAD_SIZE), persistent=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.05)

    def forward(self, tokens: Tensor, *past: Tensor) -> tuple[Tensor, ...]:
        before = past[0].shape[2]
        places = torch.arange(before + tokens.shape[1])
        own = places[before:]
        angles = own[:, None] * self.frequency
        bias = torch.where(places > own[:, None], HIDDEN_LOGIT, 0.0)
        x, present = self.embedding(tokens), []
        for layer, block in enumerate(self.blocks):
            x, *cache = block(x, (angles.cos(), angles.sin()), bias, past[2 * layer : 2 * layer + 2])
            present += cache
        return self.head(self.norm(x)), *present
