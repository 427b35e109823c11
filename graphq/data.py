"""Calibration data for a model, from whatever the caller has."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from graphq import ir
from graphq.calibration import CalibrationSet, open_calibration
from graphq.errors import DataError
from graphq.preprocess import METADATA_KEY, Preprocess

Source = str | Path | Mapping[str, np.ndarray] | Iterable[Any]


def open_data(calib: Source | None, model: ir.Model, preprocess: str | Path | Preprocess | None, seed: int) -> CalibrationSet:
    """Calibration data for `model`, random numbers without any; a model that graphq wrote remembers its preprocessing."""
    stored = model.metadata_props.get(METADATA_KEY)
    chosen = preprocess if preprocess is not None or stored is None else Preprocess.from_json(stored)
    data = open_calibration("random" if calib is None else calib, ir.inputs(model), preprocess=chosen, seed=seed)
    if not len(data):
        raise DataError("There are no calibration samples.", where=data.source)
    return data
