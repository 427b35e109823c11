"""Calibration data for a model, from whatever the caller has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from graphq import ir
from graphq.calibration import CalibrationSet, open_calibration
from graphq.errors import DataError
from graphq.pipeline import Progress, no_progress
from graphq.preprocess import Preprocess, declared_preprocess

Source = str | Path | Mapping[str, np.ndarray] | Iterable[Any]


SYNTH = "synth"
"""The source that means: made from the model itself."""


def open_data(calib: Source | None, model: ir.Model, preprocess: str | Path | Preprocess | None, seed: int,
              progress: Progress = no_progress) -> CalibrationSet:  # fmt: skip
    """Calibration data for `model`, random numbers without any; a model that graphq wrote remembers its preprocessing."""
    chosen = declared_preprocess(model.metadata_props, preprocess)
    if isinstance(calib, str | Path) and str(calib) == SYNTH:
        return _synthesized(model, chosen, seed, progress)
    data = open_calibration("random" if calib is None else calib, ir.inputs(model), preprocess=chosen, seed=seed)
    if not len(data):
        raise DataError("There are no calibration samples.", where=data.source)
    return data


def _synthesized(model: ir.Model, preprocess: Preprocess | None, seed: int, progress: Progress) -> CalibrationSet:
    from graphq.synthesis import synthesize

    made = synthesize(model, seed=seed, preprocess=preprocess, progress=progress)
    data = open_calibration(made, ir.inputs(model))
    return replace(data, kind="synthesized", source=made.facts.description, preprocess=preprocess, synthesis=made.facts)
