"""What a strategy of synthesis is and what it gets; `graphq.synthesis` finds strategies by name and runs them.

A new one is a module with a subclass of `Strategy` and a line in `graphq.synthesis.STRATEGIES`. Those that optimise images share
`graphq.synthesis.images`.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import numpy as np
from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass as options

from graphq import ir
from graphq.preprocess import Preprocess

Arrays = Mapping[str, np.ndarray]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Options: what has to be more than 0, and what a loss counts."""

strategy_options = options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
"""Decorates a strategy: a frozen dataclass whose fields are its options, checked by pydantic."""


@dataclass(frozen=True)
class Task:
    """What is asked of a strategy.

    Attributes:
        steps: Of optimisation, for each batch.
        preprocess: Declared preprocessing of images: values stay within what pixels can become.
        device: Of torch; None takes a GPU if torch finds one.
    """

    model: ir.Model
    steps: int
    preprocess: Preprocess | None = None
    device: str | None = None


def _nobody(batch: Batch) -> None:
    """Watches nothing."""


@dataclass
class Batch:
    """Samples that are made together, and how far they are.

    Attributes:
        samples: Their numbers among all that are made; what a sample becomes hangs on its number and the seed.
        step: Steps that are done: more than 0 where an interrupted run goes on.
        losses: By name, mean over the samples, after that step; `first` after the first.
        seconds: That it took.
        state: Gives what is needed to go on after that step, as arrays. None before the first.
    """

    samples: range
    seed: int
    step: int = 0
    losses: Mapping[str, float] = field(default_factory=dict)
    first: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    state: Callable[[], Arrays] | None = None
    watch: Callable[[Batch], None] = _nobody

    def __post_init__(self) -> None:
        self._clock = time.monotonic()

    def generator(self, sample: int, *keys: int) -> np.random.Generator:
        """Random numbers of one sample for one purpose or step: the same whoever asked for others before, in whatever batch."""
        return np.random.default_rng((self.seed, sample, *keys))

    def finish_step(self, losses: Mapping[str, float], state: Callable[[], Arrays]) -> None:
        """Count a step. What `state` returns must never change after: an interrupted run goes on from there."""
        now, seconds = time.monotonic(), self.seconds + time.monotonic() - self._clock
        # At once, so that an interrupt finds the step before or this one, but no mixture.
        self.__dict__.update(step=self.step + 1, losses=losses, first=self.first or losses, state=state, seconds=seconds, _clock=now)
        self.watch(self)


Maker = Callable[[Batch], Arrays]


class Strategy(ABC):
    """One way to make calibration data from a model alone. Subclasses are decorated with `strategy_options`."""

    name: ClassVar[str]
    """Kebab-case; the key in `graphq.synthesis.STRATEGIES`."""
    steps: ClassVar[int]
    """Steps for a batch, if nobody says how many."""
    batch: ClassVar[int] = 32
    """Samples that are made together."""

    @abstractmethod
    def evidence(self, model: ir.Model) -> str:
        """What of `model` it works on, such as `12 attention layers`. Raises ModelError if the model has nothing of that kind."""

    def steps_for(self, model: ir.Model) -> int:
        """Steps for a batch, where the model has a say in that."""
        return self.steps

    @abstractmethod
    def prepare(self, task: Task) -> Maker:
        """What makes a batch: an array `[len(batch.samples), ...]` for each input of the model, from `batch.state` on if there is one.

        It calls `batch.finish_step` after each of `task.steps` steps. A sample may depend on the others of its batch only through
        statistics over the batch that the method is about.
        """
