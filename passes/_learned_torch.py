"""Gradient descent on what `_learned` finds, for the output of some nodes. Needs torch.

AdaRound: arXiv 2004.10568; BRECQ: arXiv 2102.05426; QDrop: arXiv 2203.05740; LSQ: arXiv 1902.08153; SOS: I&S-ViT, arXiv 2311.10126.
All that moves is measured in units of its own, codes or shares of what it was, so that one rate serves layers of any size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from graphq.noise import row_weights
from graphq.passes._learned import Codes, Floats, Learned
from graphq.torch_executor import TorchExecutor

Feeds = Mapping[str, np.ndarray]

WARM_UP = 0.2
"""Share of the steps without a penalty."""


@dataclass(frozen=True)
class Plan:
    """How to learn.

    Attributes:
        steps: Steps of Adam.
        seconds: When to stop at the latest; the rates and the penalty follow the clock if that comes first.
        rates: Of codes, float weights, steps of activations and biases; 0 keeps them as they are.
        soft: Whether codes are chosen by AdaRound's gates between two neighbours, or follow a float weight straight through.
        penalty: What gates between two codes cost, in units of the error at the start.
        drop: See `TorchExecutor`.
        seed: Of the order of batches.
    """

    steps: int
    seconds: float
    rates: Mapping[str, float]
    soft: bool = False
    penalty: float = 1.0
    drop: float = 0.0
    seed: int = 0


@dataclass(frozen=True)
class Batch:
    """What the nodes read, and what they should make of it; `weights` broadcasts to that and says what each row counts."""

    feeds: Feeds
    target: np.ndarray
    weights: np.ndarray

    @classmethod
    def of(cls, feeds: Feeds, target: np.ndarray) -> Batch:
        """Rows with massive activations count less (see `graphq.noise`). Channels are on axis 1 of images, on the last of all else."""
        axis = 1 if target.ndim == 4 else -1
        power = np.mean(np.square(target, dtype=np.float64), axis=axis, keepdims=True)
        return cls(feeds, target, row_weights(power).astype(np.float32))

    def sums(self, made: Tensor) -> tuple[Tensor, float]:
        """Squared error, and the power of what should be."""
        target, weights = (torch.as_tensor(np.array(part), device=made.device, dtype=made.dtype) for part in (self.target, self.weights))
        return (weights * (made - target) ** 2).sum(), float((weights * target**2).sum())


class _Leaf:
    """What is learned of one entry: a tensor, the rate it moves with, and what is fed for it."""

    def __init__(self, one: Learned, plan: Plan, device: torch.device) -> None:
        self.one, self.soft = one, plan.soft and isinstance(one, Codes)
        kind = "codes" if isinstance(one, Codes) else "steps" if not isinstance(one, Floats) else "floats" if one.is_weight else "biases"
        self.rate = plan.rates[kind]

        def constant(array: np.ndarray | float) -> Tensor:
            return torch.tensor(np.asarray(array), dtype=torch.float32, device=device)

        if isinstance(one, Codes):
            self.scale, self.zero, self.pinned = constant(one.scale), constant(one.zero), torch.tensor(one.pinned, device=device)
            start = constant(one.place)
            self.base = start.floor().clamp(one.low, max(one.low, one.high - 1))
            if self.soft:
                start = -torch.log(1.2 / ((start - self.base).clamp(0, 1) + 0.1) - 1)
        elif isinstance(one, Floats):
            self.base = constant(one.start)
            self.pinned = (self.base == 0) & one.is_weight
            start = torch.zeros_like(self.base)
        else:
            arrays = [value.const_value.numpy() for value in one.values]  # type: ignore[union-attr]
            self.starts = [constant(array) for array in arrays]
            start = torch.zeros((), device=device)
        self.tensor = start.clone().requires_grad_(self.rate > 0)

    def gates(self) -> Tensor:
        return (1.2 * torch.sigmoid(self.tensor) - 0.1).clamp(0, 1)

    def codes(self, *, hard: bool) -> Tensor:
        one = self.one
        assert isinstance(one, Codes)
        if self.soft:
            gates = self.gates()
            made = self.base + ((gates >= 0.5).to(gates.dtype) if hard else gates)
        else:
            place = self.tensor.clamp(one.low, one.high)
            made = place + (place.round() - place).detach()
        return torch.where(self.pinned, self.zero, made)

    def values(self, *, hard: bool) -> list[Tensor]:
        """What the constants of the entry are now."""
        if isinstance(self.one, Codes):
            return [self.codes(hard=hard)]
        if isinstance(self.one, Floats):
            return [torch.where(self.pinned, 0.0, self.base + self.one.unit * self.tensor)]
        return [start * self.tensor.exp() for start in self.starts]

    def feeds(self, *, hard: bool) -> dict[str, Tensor]:
        if isinstance(self.one, Codes):
            return {self.one.decoded: (self.codes(hard=hard) - self.zero) * self.scale}
        names = [self.one.value] if isinstance(self.one, Floats) else self.one.values
        return {value.name or "": tensor for value, tensor in zip(names, self.values(hard=hard), strict=True)}


@dataclass(frozen=True)
class Result:
    """What became of the error, squared over power, on batches that were learned from and on those held out; and the arrays learned."""

    train: tuple[float, float]
    held: tuple[float, float]
    arrays: list[list[np.ndarray]]
    steps: int


def learn(executor: TorchExecutor, found: Sequence[Learned], train: Sequence[Batch], held: Sequence[Batch], plan: Plan,
          progress: Callable[[int], None]) -> Result:  # fmt: skip
    """Learn what was `found` from the batches `train`, for the least error of the executor's first fetch.

    Where nothing is held out, the batches that it learns from judge as well.
    """
    leaves = [_Leaf(one, plan, executor.device) for one in found]
    before = [_error(executor, leaves, batches) for batches in (train, held or train)]
    taken = _descend(executor, leaves, train, plan, max(before[0], 1e-12), progress)
    after = [_error(executor, leaves, batches) for batches in (train, held or train)]
    with torch.no_grad():
        arrays = [[tensor.cpu().numpy() for tensor in leaf.values(hard=True)] for leaf in leaves]
    return Result((before[0], after[0]), (before[1], after[1]), arrays, taken)


def _descend(executor: TorchExecutor, leaves: Sequence[_Leaf], train: Sequence[Batch], plan: Plan, unit: float,
             progress: Callable[[int], None]) -> int:  # fmt: skip
    """Take the steps; returns how many."""
    moving = [leaf for leaf in leaves if leaf.rate > 0]
    optimizer = torch.optim.Adam([{"params": [leaf.tensor], "lr": leaf.rate, "base": leaf.rate} for leaf in moving])
    gates = [leaf for leaf in moving if leaf.soft]
    count = sum(leaf.tensor.numel() for leaf in gates)
    random, order, started = np.random.default_rng(plan.seed), list[int](), time.monotonic()
    executor.drop = plan.drop
    for step in range(plan.steps):
        passed = max(step / plan.steps, (time.monotonic() - started) / plan.seconds if math.isfinite(plan.seconds) else 0.0)
        if passed >= 1:
            return step
        order = order or list(random.permutation(len(train)))
        batch = train[order.pop()]
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * 0.5 * (1 + math.cos(math.pi * passed))
        noise, power = batch.sums(_run(executor, leaves, batch, hard=False))
        loss = noise / max(power, 1e-30) / unit
        if gates and passed >= WARM_UP:
            beta = 20 - 18 * (passed - WARM_UP) / (1 - WARM_UP)
            loss = loss + plan.penalty * sum((1 - (2 * leaf.gates() - 1).abs() ** beta).sum() for leaf in gates) / count
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress(step)
    return plan.steps


def _run(executor: TorchExecutor, leaves: Sequence[_Leaf], batch: Batch, *, hard: bool) -> Tensor:
    feeds: dict[str, Tensor | np.ndarray] = dict(batch.feeds)
    for leaf in leaves:
        feeds.update(leaf.feeds(hard=hard))
    return executor.run(feeds)[0]


@torch.no_grad()
def _error(executor: TorchExecutor, leaves: Sequence[_Leaf], batches: Sequence[Batch]) -> float:
    """Squared error over power, as the model will be."""
    executor.drop, noise, power = 0.0, 0.0, 0.0
    for batch in batches:
        lost, whole = batch.sums(_run(executor, leaves, batch, hard=True))
        noise, power = noise + float(lost), power + whole
    return noise / max(power, 1e-30)
