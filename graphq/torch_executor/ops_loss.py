"""Losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphq.torch_executor.table import Call, operator


def _loss(call: Call, scores: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    """Of log-probabilities [N, classes, ...]; labels `ignore_index`, which may be no class, count nothing."""
    labels, left_out = labels.to(torch.int64), call.get("ignore_index")
    counted = torch.ones_like(labels, dtype=scores.dtype) if left_out is None else (labels != left_out).to(scores.dtype)
    labels = labels if left_out is None else torch.where(labels == left_out, 0, labels)
    if weight is not None:
        counted = counted * weight[labels]
    losses = -scores.gather(1, labels.unsqueeze(1)).squeeze(1) * counted
    how = call.get("reduction", "mean")
    return losses if how == "none" else losses.sum() if how == "sum" else losses.sum() / counted.sum()


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood_loss(call: Call, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    return _loss(call, scores, labels, weight)


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(call: Call, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Any:
    logs = torch.log_softmax(scores, 1)
    loss = _loss(call, logs, labels, weight)
    return loss if len(call.wanted) == 1 else (loss, logs)
