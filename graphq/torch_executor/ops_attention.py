"""Attention and rotary embeddings."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.table import Call, operator


def _heads(x: Tensor, count: int | None) -> Tensor:
    """[N, heads, length, width], also of [N, length, heads * width]."""
    return x if x.ndim == 4 else x.reshape(*x.shape[:2], count or 1, -1).transpose(1, 2)


@operator("Attention")
def attention(call: Call, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, past_k: Tensor | None = None,
              past_v: Tensor | None = None, lengths: Tensor | None = None) -> Any:  # fmt: skip
    flat = q.ndim == 3
    q, k, v = _heads(q, call.get("q_num_heads")), _heads(k, call.get("kv_num_heads")), _heads(v, call.get("kv_num_heads"))
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    present = (k, v)
    if q.shape[1] != k.shape[1]:
        k, v = (one.repeat_interleave(q.shape[1] // k.shape[1], 1) for one in (k, v))
    scale = call.get("scale") or 1 / math.sqrt(q.shape[-1])
    allowed, bias = _masks(call, q, k, mask, 0 if past_k is None else past_k.shape[2], lengths)
    shown = len(call.wanted) > 3 and call.wanted[3]
    scores = None
    if shown or call.get("softcap", 0.0) or allowed is not None:
        y, scores = _by_hand(call, q, k, v, scale, allowed, bias)
    else:
        y = functional.scaled_dot_product_attention(q, k, v, bias, scale=scale)
    if flat:
        y = y.transpose(1, 2).flatten(2)
    return y if len(call.wanted) == 1 else (y, *present, scores)[: len(call.wanted)]


def _masks(call: Call, q: Tensor, k: Tensor, mask: Tensor | None, past: int, lengths: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which keys each query may see, None for all; and what is added to the scores."""
    rows, columns = q.shape[2], k.shape[2]
    keys, bias = torch.arange(columns, device=q.device), None
    allowed = None
    offset = torch.full((1, 1, 1, 1), past, device=q.device)
    if lengths is not None:
        valid = lengths.to(q.device).reshape(-1, 1, 1, 1)
        allowed = keys < valid
        offset = offset if past else valid - rows
    place = torch.arange(rows, device=q.device).reshape(-1, 1) + offset
    left, right = call.get("left_window_size", -1), 0 if call.get("is_causal", 0) else call.get("right_window_size", -1)
    for bound, inside in ((right, keys <= place + right), (left, keys >= place - left)):
        if bound >= 0:
            allowed = inside if allowed is None else allowed & inside
    if mask is not None:
        short = columns - mask.shape[-1]
        if mask.dtype == torch.bool:
            mask = functional.pad(mask, [0, short], value=False) if short else mask
            allowed = mask if allowed is None else allowed & mask
        else:
            bias = functional.pad(mask, [0, short], value=-math.inf) if short else mask
    return allowed, bias


def _by_hand(call: Call, q: Tensor, k: Tensor, v: Tensor, scale: float, allowed: Tensor | None,
             bias: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The result, and the scores at the stage `qk_matmul_output_mode`; a query that may see no key gives zeros."""
    root = math.sqrt(scale)
    stages = [torch.matmul(q * root, (k * root).transpose(2, 3))]
    softcap = call.get("softcap", 0.0)
    stages.append(softcap * torch.tanh(stages[0] / softcap) if softcap else stages[0])
    scores = stages[1] if bias is None else stages[1] + bias
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -math.inf)
    blind = (scores == -math.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(blind, 0), -1).masked_fill(blind, 0)
    stages += [scores, weights]
    return torch.matmul(weights, v), stages[call.get("qk_matmul_output_mode", 0)]


@operator("RotaryEmbedding")
def rotary_embedding(call: Call, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None) -> Tensor:
    flat = x.ndim == 3
    y = x.reshape(*x.shape[:2], call.get("num_heads"), -1) if flat else x.transpose(1, 2)
    width = call.get("rotary_embedding_dim", 0) or y.shape[-1]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    turned, rest = y[..., :width], y[..., width:]
    if call.get("interleaved", 0):
        a, b = turned[..., ::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    y = torch.cat([turned, rest], -1) if rest.shape[-1] else turned
    return y.reshape(x.shape) if flat else y.transpose(1, 2)
