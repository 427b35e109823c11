"""Do the passes that say so keep what the model computes? One sample runs before and after a row of them:
4 % of the time that converting ViT-Tiny by `int8` takes with 128 images, 10 % with 16."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphq import ir
from graphq.calibration import CalibrationSet
from graphq.errors import GraphqError, VerifyError
from graphq.executor import Executor
from graphq.noise import decibel

LEAST_DB = 40.0
"""Float32 leaves 80 to 140 dB, half precision and codes of activations that flip less; whatever is forgotten leaves less than 40."""

_SILENT = 1e-12
"""Mean square of noise that is none, whatever the signal: outputs may be zero."""


class Exactness:
    """What a model makes of the first calibration sample, at one version of it (see `Editor.version`).

    Nothing is compared for models with more weights than `memory_budget`, or that ONNX Runtime does not run.
    """

    def __init__(self, data: CalibrationSet, memory_budget: int) -> None:
        self._data, self._budget = data, memory_budget
        self._version, self._made = -1, list[Any]()

    def note(self, model: ir.Model, version: int) -> None:
        """Remember what `model`, at `version`, computes."""
        if version != self._version:
            self._version, self._made = version, self._run(model)

    def require(self, model: ir.Model, version: int, passes: Sequence[str]) -> None:
        """Raises VerifyError, with the names of `passes`, if `model`, at `version`, does not compute what was noted before them."""
        if version == self._version:
            return
        before = self._made
        self.note(model, version)
        found = _changed(before, self._made)
        if found is None or _changed(self._made, self._run(model)) is not None:  # what differs from run to run tells nothing
            return
        index, level = found
        raise VerifyError(
            f"Output {model.graph.outputs[index].name!r} is not what it was before {', '.join(passes)}, which should keep the function.",
            where=f"{level:.1f} dB on one sample", expected=f"{LEAST_DB:g} dB or more",
            hint=f"this is a fault of {'one of them' if passes[1:] else 'the pass'}; take it out of the recipe, and please report it",
        )  # fmt: skip

    def _run(self, model: ir.Model) -> list[Any]:
        if ir.weight_bytes(model) > self._budget:
            return []
        try:
            feeds = next(iter(self._data.batches(1)), None)
            return [] if feeds is None else Executor(model, prepack=False).run(feeds)
        except GraphqError:  # who needs to run it says so
            return []


def _changed(before: Sequence[Any], after: Sequence[Any]) -> tuple[int, float] | None:
    """The first output of floats that is another, and its signal over noise in dB; None if there is none, or nothing to compare."""
    for index, (one, other) in enumerate(zip(before, after, strict=False)):
        if not isinstance(one, np.ndarray) or one.dtype.kind != "f" or not one.size:
            continue
        if one.shape != np.shape(other):
            return index, -np.inf
        known = np.isfinite(one)
        signal, noise = one[known].astype(np.float64), np.asarray(other)[known].astype(np.float64)
        noise = noise - signal
        if not np.isfinite(noise).all():
            return index, -np.inf
        level = decibel(float(np.sum(signal**2)), float(np.sum(noise**2)))
        if level < LEAST_DB and np.sum(noise**2) > _SILENT * noise.size:
            return index, level
    return None
