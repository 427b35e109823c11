"""Losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from graphq.torch_executor.table import Call, operator

_NEVER = -(2**31)
"""A class that no label has: nothing is left out."""


def _loss(call: Call, scores: Tensor, labels: Tensor, weight: Tensor | None) -> Tensor:
    """Of log-probabilities [N, classes, ...]."""
    left_out = call.get("ignore_index", _NEVER)
    return functional.nll_loss(scores, labels.to(torch.int64), weight, ignore_index=left_out, reduction=call.get("reduction", "mean"))


@operator("NegativeLogLikelihoodLoss")
def negative_log_likelihood_loss(call: Call, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Tensor:
    return _loss(call, scores, labels, weight)


@operator("SoftmaxCrossEntropyLoss")
def softmax_cross_entropy_loss(call: Call, scores: Tensor, labels: Tensor, weight: Tensor | None = None) -> Any:
    logs = torch.log_softmax(scores, 1)
    loss = _loss(call, logs, labels, weight)
    return loss if len(call.wanted) == 1 else (loss, logs)
