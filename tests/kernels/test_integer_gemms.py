"""w8a8_gemm and w4a8_gemm compute what `graphq.ops_gemm` says, in the interpreter and on a GPU."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphq import ops, ops_gemm
from graphq.errors import UsageError

BOTH = pytest.mark.parametrize("name", ["W8A8Gemm", "W4A8Gemm"])
TOLERANCE = {np.float32: 2.0**-18, np.float16: 2.0**-10, ml_dtypes.bfloat16: 2.0**-7}
"""Relative and absolute, of results up to 8: sums are exact, so that only few float32 operations and one rounding to T can differ."""


def operands(name: str, leading: tuple[int, ...], k: int, n: int, groups: int = 1, dtype: Any = np.float32,
             per_row: bool = True) -> dict[str, Any]:  # fmt: skip
    rng = np.random.default_rng(0)
    short = name == "W4A8Gemm"
    codes = rng.integers(-8, 8, (k, n)) if short else rng.integers(-128, 128, (k, n))
    scale = rng.uniform(0.5, 1.5, (groups, n)) / ((8 if short else 128) * np.sqrt(k))
    return {
        "x": rng.integers(-128, 128, (*leading, k)).astype(np.int8),
        "weight": ops_gemm.pack_int4(codes) if short else ops_gemm.pack_int8(codes),
        "x_scale": np.asarray(rng.uniform(0.01, 0.03, (*leading, 1) if per_row else ()).astype(np.float32)),
        "w_scale": (scale if short else scale[0]).astype(np.float32),
        "bias": rng.standard_normal(n).astype(dtype),
    }


def close(name: str, found: np.ndarray, values: dict[str, Any]) -> None:
    expected = ops.OPERATORS[name].reference(**values)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype.type]
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance)


SMALL = {"m": 16, "n": 32, "k": 64, "warps": 4, "stages": 3}
SHAPES = [  # leading axes of x, K, N, groups of W4A8Gemm, configuration
    pytest.param((1,), 256, 64, 2, {}, id="one row"),
    pytest.param((8,), 2048, 16, 16, {}, id="eight rows, whole steps"),
    pytest.param((9,), 1088, 17, 17, {}, id="nine rows, groups of 64, tails of K and N"),
    pytest.param((3,), 96, 40, 3, {}, id="groups of 32, half a block over"),
    pytest.param((2,), 1120, 5, 35, {}, id="groups of 32 over several steps"),
    pytest.param((1,), 50, 7, 1, {}, id="K not a multiple of anything"),
    pytest.param((1,), 1, 1, 1, {}, id="one by one"),
    pytest.param((17,), 128, 33, 1, SMALL, id="wide, one scale a channel, tails of M and N"),
    pytest.param((20,), 160, 40, 5, SMALL, id="wide, groups of 32, tail of K"),
    pytest.param((40,), 256, 72, 2, {**SMALL, "k": 128}, id="wide, groups of 128, steps of 128"),
    pytest.param((18,), 192, 33, 3, {**SMALL, "k": 128}, id="wide, groups smaller than steps"),
    pytest.param((33,), 330, 20, 1, {**SMALL, "k": 128}, id="wide, K not a multiple of anything"),
    pytest.param((2, 3, 5), 64, 9, 1, SMALL, id="wide, batches"),
    pytest.param((150,), 64, 70, 1, SMALL, id="wide, several tiles each way"),
    pytest.param((65,), 128, 130, 1, {}, id="wide, as configured"),
]


@BOTH
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize(("leading", "k", "n", "groups", "config"), SHAPES)
def test_awkward_shapes(run: Any, name: str, leading: tuple[int, ...], k: int, n: int, groups: int, config: dict[str, Any],
                        per_row: bool) -> None:  # fmt: skip
    values = operands(name, leading, k, n, groups, per_row=per_row)
    close(name, run(name, values, **config), values)


@BOTH
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("m", [5, 20])
def test_half_precision_results(run: Any, name: str, m: int, dtype: Any) -> None:
    values = operands(name, (m,), 192, 24, 3, dtype)
    close(name, run(name, values, **(SMALL if m > 16 else {})), values)


@BOTH
@pytest.mark.parametrize("how", ["columns", "padded", "every other"])
@pytest.mark.parametrize("m", [3, 20])
def test_strided_x(run: Any, name: str, m: int, how: str) -> None:
    values = operands(name, (m,), 192, 24, 3)
    close(name, run(name, values, how, **(SMALL if m > 16 else {})), values)


@BOTH
@pytest.mark.parametrize("config", [{}, SMALL])
def test_extreme_codes_are_exact(run: Any, name: str, config: dict[str, Any]) -> None:
    """All products at their largest, whose sums a float32 dot product would not hold; scales are powers of two."""
    k, least = 2048, -8 if name == "W4A8Gemm" else -128
    values = operands(name, (16,), k, 8, per_row=False)
    x = np.full((16, k), -128, np.int8)
    x[:, 0] = 127 - np.arange(16)
    pack = ops_gemm.pack_int4 if name == "W4A8Gemm" else ops_gemm.pack_int8
    values |= {"x": x, "weight": pack(np.full((k, 8), least)), "x_scale": np.asarray(np.float32(1)), "bias": np.zeros(8, np.float32)}
    values["w_scale"] = np.full_like(values["w_scale"], 2.0**-10)
    expected = np.repeat((x.astype(np.int64).sum(axis=1) * least * 2.0**-10)[:, None], 8, axis=1)
    np.testing.assert_array_equal(run(name, values, **config), expected.astype(np.float32))


@BOTH
def test_what_does_not_fit_is_refused(run: Any, name: str) -> None:
    with pytest.raises(UsageError, match=r"x of type float32 and shape \[2, 64\]"):
        run(name, operands(name, (2,), 64, 8) | {"x": np.zeros((2, 64), np.float32)})
    with pytest.raises(UsageError, match="takes at most 16 rows, not 20"):
        run(name, operands(name, (20,), 64, 8), **SMALL, split=True)
    with pytest.raises(UsageError, match=r"call \.contiguous\(\) first"):
        run(name, operands(name, (2, 3), 64, 8), "columns")
