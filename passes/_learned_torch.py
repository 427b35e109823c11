"""Gradient descent on what `_learned` finds, for the outputs of some nodes. Needs torch.

AdaRound: arXiv 2004.10568; BRECQ: arXiv 2102.05426; QDrop: arXiv 2203.05740; LSQ: arXiv 1902.08153; SOS: I&S-ViT, arXiv 2311.10126.
All that moves is measured in units of its own, codes or shares of what it was, so that one rate serves layers of any size.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from graphq.noise import row_weights
from graphq.passes._learned import Codes, Floats, Learned, Rates, Steps

if TYPE_CHECKING:
    from graphq.torch_executor import TorchExecutor

WARM_UP = 0.2
"""Share of the steps without a penalty on gates."""


# ---- what is learned ------------------------------------------------------------------------------------------------


class Leaf(ABC):
    """What is learned of one entry.

    Attributes:
        one: The entry.
        tensors: What moves.
        rate: How far a step of Adam moves it.
    """

    one: Learned
    tensors: list[Tensor]
    rate: float

    @abstractmethod
    def values(self, *, hard: bool) -> list[Tensor]:
        """What the constants of the entry are now; `hard` as they will be stored."""

    def feeds(self, *, hard: bool) -> dict[str, Tensor]:
        """What is fed to an executor, by the names of values."""
        return {value.name or "": tensor for value, tensor in zip(self.one.values, self.values(hard=hard), strict=True)}

    def penalty(self, beta: float) -> Tensor | float:
        """What it costs that codes are not chosen yet."""
        return 0.0


class _CodesLeaf(Leaf):
    """Codes that follow a float weight, which is rounded straight through."""

    def __init__(self, one: Codes, rate: float, device: torch.device) -> None:
        self.one, self.codes, self.rate = one, one, rate
        self.scale, self.zero, place = (_constant(part, device) for part in (one.scale, one.zero, one.place))
        self.pinned = torch.tensor(one.pinned, device=device)
        self.tensors = [self.start(place)]

    def start(self, place: Tensor) -> Tensor:
        return place

    def made(self, *, hard: bool) -> Tensor:
        place = self.tensors[0].clamp(self.codes.low, self.codes.high)
        return place + (place.round() - place).detach()

    def values(self, *, hard: bool) -> list[Tensor]:
        return [torch.where(self.pinned, self.zero, self.made(hard=hard))]

    def feeds(self, *, hard: bool) -> dict[str, Tensor]:
        return {self.codes.decoded: (self.values(hard=hard)[0] - self.zero) * self.scale}


class _GatesLeaf(_CodesLeaf):
    """AdaRound: for each weight a gate between the codes below and above it."""

    def start(self, place: Tensor) -> Tensor:
        self.base = place.floor().clamp(self.codes.low, max(self.codes.low, self.codes.high - 1))
        return -torch.log(1.2 / ((place - self.base).clamp(0, 1) + 0.1) - 1)

    def gates(self) -> Tensor:
        return (1.2 * torch.sigmoid(self.tensors[0]) - 0.1).clamp(0, 1)

    def made(self, *, hard: bool) -> Tensor:
        gates = self.gates()
        return (self.base + ((gates >= 0.5).to(gates.dtype) if hard else gates)).clamp(max=self.codes.high)

    def penalty(self, beta: float) -> Tensor | float:
        return (1 - (2 * self.gates() - 1).abs() ** beta).mean()


class FloatsLeaf(Leaf):
    """A float constant, the zeros of which stay if it is a weight."""

    def __init__(self, one: Floats, rate: float, device: torch.device) -> None:
        self.one, self.unit, self.rate = one, one.unit, rate
        self.base = _constant(one.start, device)
        self.mask = (self.base != 0) | (not one.is_weight)
        self.tensors = [torch.zeros_like(self.base)]

    def values(self, *, hard: bool) -> list[Tensor]:
        return [self.base + self.unit * self.mask * self.tensors[0]]


class _StepsLeaf(Leaf):
    """The logarithm of what the step of a quantizer is multiplied by."""

    def __init__(self, one: Steps, rate: float, device: torch.device) -> None:
        self.one, self.rate = one, rate
        self.starts = [_constant(array, device) for array in one.starts]
        self.tensors = [torch.zeros((), device=device)]

    def values(self, *, hard: bool) -> list[Tensor]:
        return [start * self.tensors[0].exp() for start in self.starts]


def leaf_of(one: Learned, rates: Rates, device: torch.device, *, gates: bool = False) -> Leaf:
    if isinstance(one, Codes):
        return (_GatesLeaf if gates else _CodesLeaf)(one, rates.of(one), device)
    return (FloatsLeaf if isinstance(one, Floats) else _StepsLeaf)(one, rates.of(one), device)  # type: ignore[arg-type]


def _constant(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.tensor(array, dtype=torch.float32, device=device)


# ---- what it is learned from ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """What the nodes read, and what they should make of it.

    Attributes:
        targets: One array for each fetch, and what its rows count, an array that broadcasts to it.
    """

    feeds: Mapping[str, np.ndarray]
    targets: Sequence[tuple[np.ndarray, np.ndarray]]

    @classmethod
    def of(cls, feeds: Mapping[str, np.ndarray], targets: Sequence[np.ndarray], mask: np.ndarray | None = None) -> Batch:
        """Rows with massive activations count less (see `graphq.noise`), those of tokens that `mask` [B, T] calls padding nothing.

        Channels are on axis 1 of images, on the last of all else.
        """
        found = []
        for target in targets:
            power = np.mean(np.square(target, dtype=np.float64), axis=1 if target.ndim == 4 else -1, keepdims=True)
            weights = row_weights(power)
            if mask is not None and mask.shape == target.shape[:-1]:
                weights = weights * (mask[..., None] != 0)
            found.append((target, weights.astype(np.float32)))
        return cls(feeds, found)

    def error(self, made: Sequence[Tensor]) -> Tensor:
        """Squared error over the power of what should be, mean over the fetches."""
        total = torch.zeros((), device=made[0].device)
        for one, parts in zip(made, self.targets, strict=True):
            target, weights = (torch.tensor(part, dtype=one.dtype, device=one.device) for part in parts)
            total = total + (weights * (one - target) ** 2).sum() / (weights * target**2).sum().clamp(min=1e-30)
        return total / len(made)


# ---- learning -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to learn.

    Attributes:
        steps: Steps of Adam.
        seconds: When to stop at the latest: the rates, and the penalty on gates, follow the clock if that is ahead of the steps.
        drop: See `TorchExecutor`.
        penalty: What gates between two codes cost, in units of the error at the start.
        seed: Of the order of the batches.
    """

    steps: int
    seconds: float = math.inf
    drop: float = 0.0
    penalty: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """The error before and after on what was learned from, and on what was held out; and how many steps were taken."""

    train: tuple[float, float]
    held: tuple[float, float]
    steps: int

    @property
    def is_better(self) -> bool:
        return self.held[1] < self.held[0]  # NaN is not


def learn(executor: TorchExecutor, leaves: Sequence[Leaf], train: Sequence[Batch], held: Sequence[Batch], plan: Plan,
          progress: Callable[[int], None]) -> Result:  # fmt: skip
    """Move `leaves` for the least error of what `executor` fetches on the batches `train`.

    Where nothing is held out, what is learned from judges as well.
    """
    before = [_mean_error(executor, leaves, batches) for batches in (train, held or train)]
    taken = _descend(executor, leaves, train, plan, max(before[0], 1e-12), progress)
    after = [_mean_error(executor, leaves, batches) for batches in (train, held or train)]
    return Result((before[0], after[0]), (before[1], after[1]), taken)


def arrays_of(leaf: Leaf) -> list[np.ndarray]:
    """What the constants of its entry are, as they will be stored."""
    with torch.no_grad():
        return [tensor.cpu().numpy() for tensor in leaf.values(hard=True)]


def _descend(executor: TorchExecutor, leaves: Sequence[Leaf], train: Sequence[Batch], plan: Plan, unit: float,
             progress: Callable[[int], None]) -> int:  # fmt: skip
    """Take the steps; returns how many."""
    moving = [leaf for leaf in leaves if leaf.rate > 0]
    for leaf in moving:
        leaf.tensors = [tensor.clone().requires_grad_() for tensor in leaf.tensors]
    optimizer = torch.optim.Adam([{"params": leaf.tensors, "lr": leaf.rate, "base": leaf.rate} for leaf in moving])
    executor.drop, batches, started = plan.drop, _shuffled(train, plan.seed), time.monotonic()
    for step in range(plan.steps):
        passed = max(step / plan.steps, (time.monotonic() - started) / max(plan.seconds, 1e-9))
        if passed >= 1:
            return step
        for group in optimizer.param_groups:
            group["lr"] = group["base"] * 0.5 * (1 + math.cos(math.pi * passed))
        batch = next(batches)
        loss = batch.error(_made(executor, leaves, batch, hard=False)) / unit
        if passed >= WARM_UP:
            beta = 20 - 18 * (passed - WARM_UP) / (1 - WARM_UP)
            loss = loss + plan.penalty * sum(leaf.penalty(beta) for leaf in leaves)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        progress(int(passed * plan.steps))
    return plan.steps


def _shuffled(batches: Sequence[Batch], seed: int) -> Iterator[Batch]:
    """All of `batches`, each time in another order, without end."""
    random = np.random.default_rng(seed)
    while True:
        for index in random.permutation(len(batches)):
            yield batches[index]


def _made(executor: TorchExecutor, leaves: Sequence[Leaf], batch: Batch, *, hard: bool) -> list[Tensor]:
    feeds: dict[str, Tensor | np.ndarray] = dict(batch.feeds)
    for leaf in leaves:
        feeds.update(leaf.feeds(hard=hard))
    return executor.run(feeds)


@torch.no_grad()
def _mean_error(executor: TorchExecutor, leaves: Sequence[Leaf], batches: Sequence[Batch]) -> float:
    """Over batches, as the model will be."""
    executor.drop = 0.0
    return float(np.mean([float(batch.error(_made(executor, leaves, batch, hard=True))) for batch in batches]))
