"""LogUniform: codes and levels are the textbook formulas, never more than 2^bits; sulq finds the best shift and orders as published."""

from __future__ import annotations

import numpy as np
import pytest

from graphq.log_quantizers import OCTAVE, SHIFTS, LogParams, LogUniform
from graphq.quantizers import MIN_SCALE, Uniform
from graphq.spec import QuantSpec

SEEDS = pytest.mark.parametrize("seed", range(3))
BITS = pytest.mark.parametrize("bits", range(2, 9))
KINDS = ("sulq", "rounded", "log2", "log-sqrt2")


def weights(seed: int = 0, size: int = 64, sharpness: float = 2.0) -> np.ndarray:
    """Rows of attention weights: most tiny, a few near 1."""
    scores = np.random.default_rng(seed).standard_normal((256, size)) * sharpness
    power = np.exp(scores - scores.max(1, keepdims=True))
    return (power / power.sum(1, keepdims=True)).astype(np.float32)


def fitted(kind: str, bits: int, x: np.ndarray) -> tuple[LogUniform, LogParams]:
    quantizer = LogUniform(bits, whole_exponents=kind == "rounded", lowest_is_zero=kind == "log-sqrt2")
    if kind.startswith("log"):
        return quantizer, quantizer.fit_octaves(float(x.max()), 1 if kind == "log2" else 2)
    return quantizer, quantizer.fit(x)


def sqnr(kind: str, bits: int, x: np.ndarray) -> float:
    if kind == "uniform":
        quantizer = Uniform(QuantSpec(bits, signed=False, symmetric=False))
        result = quantizer.fake_quantize(x, quantizer.fit_weight(x))
    else:
        logarithmic, params = fitted(kind, bits, x)
        result = logarithmic.fake_quantize(x, params)
    return float(10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((result - x).astype(np.float64) ** 2)))


# ---- formulas -------------------------------------------------------------------------------------------------------


@BITS
@SEEDS
def test_sulq_is_the_formula(bits: int, seed: int) -> None:
    """Codes and levels in float64; a code at a border may fall to either side in float32."""
    x = weights(seed)
    quantizer, params = fitted("sulq", bits, x)
    shift, center, scale = (float(number) for number in (params.shift, params.center, params.scale))
    exact = (np.log(x.astype(np.float64) + shift) - center) / scale
    codes = np.clip(np.rint(exact), quantizer.spec.qmin, quantizer.spec.qmax)
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    q = quantizer.quantize(x, params)
    assert clear.mean() > 0.99 and np.array_equal(q[clear], codes[clear])
    np.testing.assert_allclose(quantizer.dequantize(q, params), np.exp(center + scale * q) - shift, atol=1e-6)


@BITS
@SEEDS
@pytest.mark.parametrize("kind", ["log2", "log-sqrt2"])
def test_fixed_ratios_are_the_formulas(kind: str, bits: int, seed: int) -> None:
    """`q = clip(round(-k log2(x / s)), 0, 2^b - 1)`, `x = s 2^(-q/k)`; the last code of log-sqrt2 is 0."""
    x, k, last = weights(seed), 1 if kind == "log2" else 2, (1 << bits) - 1
    exact = -k * np.log2(x.astype(np.float64) / x.max())
    steps = np.clip(np.rint(exact), 0, last)
    expected = np.where((steps == last) & (kind == "log-sqrt2"), 0, x.max() * 2.0 ** (-steps / k))
    clear = np.abs(exact - np.floor(exact) - 0.5) > 1e-4
    quantizer, params = fitted(kind, bits, x)
    np.testing.assert_allclose(quantizer.fake_quantize(x, params)[clear], expected[clear], rtol=1e-5, atol=1e-7)


@BITS
@pytest.mark.parametrize("kind", KINDS)
def test_there_are_two_to_the_bits_levels_and_no_more(kind: str, bits: int) -> None:
    dense = np.concatenate([np.linspace(0, 1, 100_001), np.geomspace(1e-40, 1, 100_001)]).astype(np.float32)
    quantizer, params = fitted(kind, bits, dense)
    codes = np.unique(quantizer.quantize(dense, params))
    assert codes.min() >= quantizer.spec.qmin and codes.max() <= quantizer.spec.qmax and len(codes) <= 1 << bits
    assert len(np.unique(quantizer.fake_quantize(dense, params))) <= 1 << bits
    if kind == "sulq":
        assert len(codes) == 1 << bits


@BITS
@pytest.mark.parametrize("kind", KINDS)
def test_order_is_kept(kind: str, bits: int) -> None:
    x = np.sort(weights().reshape(-1))
    quantizer, params = fitted(kind, bits, x)
    assert (np.diff(quantizer.fake_quantize(x, params)) >= 0).all()


@BITS
@SEEDS
def test_both_ends_of_the_range_are_levels_of_sulq(bits: int, seed: int) -> None:
    x = weights(seed)
    quantizer, params = fitted("sulq", bits, x)
    ends = np.array([x.min(), x.max()])
    np.testing.assert_allclose(quantizer.fake_quantize(ends, params), ends, atol=1e-6)


@BITS
def test_the_largest_level_can_be_set(bits: int) -> None:
    x = weights(sharpness=0.5)
    params = LogUniform(bits).fit(x, 1.0)
    top = LogUniform(bits).dequantize(np.array([LogUniform(bits).spec.qmax], np.int8), params)
    assert x.max() < 0.5 and top[0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_whole_exponents_are_powers_of_two_less_the_shift(bits: int) -> None:
    x = weights()
    quantizer, params = fitted("rounded", bits, x)
    exponents = np.log2(np.unique(quantizer.fake_quantize(x, params)).astype(np.float64) + params.shift)
    np.testing.assert_allclose(exponents, np.rint(exponents), atol=1e-4)


def test_codes_are_int8_in_the_shape_of_the_array() -> None:
    x = weights()[:4].reshape(2, 2, -1)
    quantizer, params = fitted("sulq", 4, x)
    codes = quantizer.quantize(x, params)
    assert codes.dtype == np.int8 and codes.shape == x.shape
    levels = quantizer.dequantize(codes, params)
    assert levels.dtype == np.float32 and np.array_equal(levels, quantizer.fake_quantize(x, params))


@pytest.mark.parametrize(("bits", "storage"), [(2, "int4"), (3, "int4"), (4, "int4"), (5, "int8"), (8, "int8")])
def test_storage(bits: int, storage: str) -> None:
    assert LogUniform(bits).storage == storage


# ---- fitting --------------------------------------------------------------------------------------------------------


@BITS
@SEEDS
@pytest.mark.parametrize("kind", ["sulq", "rounded"])
def test_the_shift_is_the_best_of_the_grid(kind: str, bits: int, seed: int) -> None:
    """Brute force, written without the code that is tested."""
    x = weights(seed)
    wide = x.astype(np.float64)
    errors = []
    for shift in SHIFTS:
        log = np.log(wide + shift)
        step = (log.max() - log.min()) / (2**bits - 1)
        level = log.min() + np.rint((log - log.min()) / step) * step
        if kind == "rounded":
            level = np.rint(level / np.log(2)) * np.log(2)
        errors.append(np.mean((np.exp(level) - shift - wide) ** 2))
    quantizer, params = fitted(kind, bits, x)
    assert quantizer.error(x, params) == pytest.approx(min(errors), rel=1e-2)
    assert errors[SHIFTS.index(round(float(params.shift), 6))] == pytest.approx(min(errors), rel=1e-2)


def test_sharp_and_flat_attention_take_other_shifts() -> None:
    sharp, flat = (fitted("sulq", 4, weights(sharpness=sharpness))[1].shift for sharpness in (6.0, 0.3))
    assert sharp != flat


@pytest.mark.parametrize("x", [np.zeros(8, np.float32), np.full(8, 0.25, np.float32), np.float32([1.0])])
@pytest.mark.parametrize("kind", ["sulq", "log2", "log-sqrt2"])
def test_arrays_of_one_value(kind: str, x: np.ndarray) -> None:
    quantizer, params = fitted(kind, 4, x)
    np.testing.assert_allclose(quantizer.fake_quantize(x, params), x, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_an_exact_zero_has_a_code(kind: str) -> None:
    """Masked positions: what they become is below anything that is attended to."""
    x = weights()
    quantizer, params = fitted(kind, 4, x)
    assert 0 <= quantizer.fake_quantize(np.zeros(1, np.float32), params)[0] + params.shift <= x.mean() + params.shift


def test_nan_is_refused() -> None:
    quantizer, params = fitted("sulq", 4, weights())
    with pytest.raises(ValueError, match="NaN"):
        quantizer.quantize(np.float32([0.5, np.nan]), params)


@pytest.mark.parametrize("numbers", [(0.0, 0.0, 1.0), (0.1, 0.0, 0.0), (0.1, np.inf, 1.0), (-0.1, 0.0, 1.0)])
def test_params_that_make_no_levels_are_refused(numbers: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        LogParams(*(np.float32(number) for number in numbers))


def test_params_are_float32() -> None:
    with pytest.raises(ValueError, match="float32"):
        LogParams(0.1, 0.0, 1.0)  # type: ignore[arg-type]


# ---- order of the quantizers ---------------------------------------------------------------------


@SEEDS
def test_at_four_bits_sulq_is_best_and_log_sqrt2_no_worse_than_log2(seed: int) -> None:
    found = {kind: sqnr(kind, 4, weights(seed)) for kind in (*KINDS, "uniform")}
    assert found["sulq"] > found["log-sqrt2"] >= found["log2"]
    assert found["sulq"] > found["uniform"] and found["sulq"] >= found["rounded"]


@SEEDS
def test_only_sulq_and_uniform_gain_from_more_than_six_bits(seed: int) -> None:
    x = weights(seed)
    gain = {kind: sqnr(kind, 8, x) - sqnr(kind, 6, x) for kind in (*KINDS, "uniform")}
    assert gain["sulq"] > 9 and gain["uniform"] > 9
    assert all(abs(gain[kind]) < 1 for kind in ("rounded", "log2", "log-sqrt2"))
    assert sqnr("sulq", 8, x) > sqnr("uniform", 8, x) > sqnr("log-sqrt2", 8, x) > sqnr("log2", 8, x)


@SEEDS
@BITS
def test_rounding_exponents_never_helps(seed: int, bits: int) -> None:
    assert sqnr("sulq", bits, weights(seed)) >= sqnr("rounded", bits, weights(seed))


def test_an_octave_is_a_factor_of_two() -> None:
    assert np.exp(OCTAVE) == pytest.approx(2, rel=1e-6) and LogUniform(4).fit_octaves(1.0, 1).shift == MIN_SCALE
