"""Massive activations: a few rows (tokens) a thousand times larger than all others (arXiv 2402.17762).

In a plain sum of squares they decide everything, while the normalizations behind them level them.
"""

from __future__ import annotations

import numpy as np

LIMIT = 10.0
"""Rows with so many times the median power, and more, count as if they had no more."""


def row_weights(power: np.ndarray) -> np.ndarray:
    """What each row counts, 0 to 1, float64; `power`: mean or sum of the squares of each row. Rows of nothing are not in the median."""
    seen = power[(power > 0) & np.isfinite(power)]
    limit = LIMIT * float(np.median(seen)) if seen.size else 1.0
    return np.asarray(limit / np.maximum(power, limit), np.float64)
