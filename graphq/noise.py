"""How errors are counted: signal over noise in dB, and what a row counts in sums of squares."""

from __future__ import annotations

import math

import numpy as np

LIMIT = 10.0
"""Rows with so many times the median power, and more, count as if they had no more."""


def decibel(power: float, noise: float) -> float:
    """`power` over `noise` in dB; infinite if there is no noise."""
    return math.inf if noise == 0 else 10 * math.log10(max(power, 1e-300) / noise)


def row_weights(power: np.ndarray) -> np.ndarray:
    """What each row (token) counts in a sum of squares, 0 to 1, float64.

    Massive activations, a few rows a thousand times larger than all others (arXiv 2402.17762), would decide everything,
    while the normalizations behind them level them.

    Args:
        power: Mean or sum of the squares of each row. Rows of nothing are not in the median.
    """
    seen = power[(power > 0) & np.isfinite(power)]
    limit = LIMIT * float(np.median(seen)) if seen.size else 1.0
    return np.asarray(limit / np.maximum(power, limit), np.float64)
