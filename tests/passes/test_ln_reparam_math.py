"""The arithmetic of ln-reparam in float64, without a graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphq.passes import _ln_reparam_math as math
from graphq.quantizers import Uniform
from graphq.spec import QuantSpec

SEEDS = pytest.mark.parametrize("seed", range(3))
D, WIDTH = 32, 24


def rows(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((512, D)) * 10 ** rng.uniform(-1, 1, D) + rng.standard_normal(D)


def codes(x: np.ndarray, scale: Any, zero_point: Any, bits: int) -> np.ndarray:
    return np.clip(np.rint(x / scale) + zero_point, 0, (1 << bits) - 1)


@SEEDS
@pytest.mark.parametrize("bits", [3, 4, 6, 8])
@pytest.mark.parametrize("zero_point", ["middle", "mean", "fractional"])
def test_codes_are_those_of_the_channels_if_the_zero_point_is_whole(seed: int, bits: int, zero_point: str) -> None:
    """Rounded codes plus a whole zero point, as every runtime computes them."""
    y = rows(seed)
    channels = math.channel_qparams(y.min(0), y.max(0), bits)
    middle = 1 << (bits - 1)
    common = {"middle": middle, "mean": round(float(channels.zero_point.mean())), "fractional": middle + 0.4}[zero_point]
    one = math.change(channels, common)  # type: ignore[arg-type]
    found = codes((y + one.offset) / one.ratio, one.scale, round(common), bits)
    mismatch = np.mean(found != codes(y, channels.scale.astype(np.float64), channels.zero_point, bits))
    assert mismatch > 0.1 if zero_point == "fractional" else mismatch == 0


@SEEDS
def test_which_common_scale_is_taken_changes_nothing(seed: int) -> None:
    """Codes are the same, and outputs to 1e-10: the weights take the factor."""
    y, w = rows(seed), np.random.default_rng(seed).standard_normal((D, WIDTH))
    channels = math.channel_qparams(y.min(0), y.max(0), 4)
    one = math.change(channels, 8)
    results = []
    for scale in (one.scale, 1.0, float(np.median(channels.scale)), float(channels.scale.max())):
        ratio = channels.scale.astype(np.float64) / scale
        found = codes((y + one.offset) / ratio, scale, 8, 4)
        weight = ratio[:, None] * w
        step = np.abs(weight).max(0) / 7
        results.append((found, ((found - 8) * scale) @ (np.rint(weight / step) * step)))
    for found, output in results[1:]:
        assert np.array_equal(found, results[0][0])
        np.testing.assert_allclose(output, results[0][1], rtol=1e-10, atol=1e-10 * np.abs(output).max())


@SEEDS
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_range_has_the_common_scale_and_zero_point(bits: int, symmetric: bool, seed: int) -> None:
    y = rows(seed)
    one = math.change(math.channel_qparams(y.min(0), y.max(0), bits), 1 << (bits - 1))
    qparams = Uniform(QuantSpec(bits, signed=symmetric, symmetric=symmetric)).fit(*math.common_range(one, bits, symmetric=symmetric))
    assert float(qparams.scale) == pytest.approx(one.scale, rel=1e-6)
    assert int(qparams.zero_point) == (0 if symmetric else one.zero_point)


def test_headroom_lies_around_the_middle_and_narrow_channels_are_widened() -> None:
    low, high = np.array([-1.0, -3.0, 0.0, 0.0]), np.array([1.0, 1.0, 4.0, 0.0])
    plain, wide = (math.channel_qparams(low, high, 8, headroom=headroom) for headroom in (1.0, 1.5))
    np.testing.assert_allclose(plain.scale * 255, [2, 4, 4, math.NARROWEST * 2.5], rtol=1e-6)
    np.testing.assert_allclose(wide.scale, 1.5 * plain.scale, rtol=1e-6)
    np.testing.assert_allclose(plain.zero_point, [127.5, 191, 0, 127.5], atol=0.5)
    np.testing.assert_allclose(wide.zero_point, [127.5, 170, 42.5, 127.5], atol=0.5)
    assert math.channel_qparams(low, high, 8, zero_points=False).zero_point.tolist() == [128] * 4
