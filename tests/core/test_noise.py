"""noise: what a few huge rows count, and that it changes nothing without them."""

from __future__ import annotations

import numpy as np

from graphq import noise


def test_only_rows_far_above_the_median_count_less() -> None:
    power = np.array([1.0, 2, 3, 20, 21, 3000])
    np.testing.assert_allclose(noise.row_weights(np.array([1.0, 2, 3, 4, 30])), 1)
    weights, limit = noise.row_weights(power), noise.LIMIT * 11.5
    np.testing.assert_allclose(weights, [1, 1, 1, 1, 1, limit / 3000])


def test_rows_of_nothing_have_no_say() -> None:
    """More than half of all rows are 0: the median is that of the others."""
    np.testing.assert_allclose(noise.row_weights(np.array([0.0] * 9 + [1, 1, 1, 100])), [1.0] * 12 + [noise.LIMIT / 100])
    np.testing.assert_array_equal(noise.row_weights(np.zeros(3)), 1)
