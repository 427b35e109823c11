"""w4a16_gemm computes what `graphq.ops_gemm` says, in the interpreter and on a GPU, and compiles for every architecture without one."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphq import ops_gemm
from graphq.errors import UsageError

TOLERANCE = {np.float16: 2.0**-9, ml_dtypes.bfloat16: 2.0**-6}
"""Relative and absolute, of results up to 8. Up to 16 rows, scaled weights are not rounded, other than in the reference."""


def operands(leading: tuple[int, ...], k: int, n: int, groups: int = 1, dtype: Any = np.float16, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "x": rng.standard_normal((*leading, k)).astype(dtype),
        "weight": ops_gemm.pack_int4(rng.integers(-8, 8, (k, n))),
        "w_scale": (rng.uniform(0.5, 1.5, (groups, n)) / (8 * np.sqrt(k))).astype(dtype),
        "bias": rng.standard_normal(n).astype(dtype),
    }


def close(found: np.ndarray, values: dict[str, np.ndarray]) -> None:
    expected = ops_gemm.w4a16_gemm(**values)
    assert found.dtype == expected.dtype and found.shape == expected.shape
    tolerance = TOLERANCE[expected.dtype.type]
    np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), rtol=tolerance, atol=tolerance)


SMALL = {"m": 16, "n": 32, "k": 64, "warps": 4, "stages": 3}
SHAPES = [  # leading axes of x, K, N, groups, configuration
    pytest.param((1,), 256, 64, 2, {}, id="one row"),
    pytest.param((8,), 2048, 16, 16, {}, id="eight rows, one whole step"),
    pytest.param((9,), 1088, 17, 17, {}, id="nine rows, groups of 64, tails of K and N"),
    pytest.param((3,), 96, 40, 3, {}, id="groups of 32, half a block over"),
    pytest.param((2,), 1120, 5, 35, {}, id="groups of 32 over several steps"),
    pytest.param((1,), 192, 24, 2, {}, id="groups of 96"),
    pytest.param((1,), 50, 7, 1, {}, id="K not a multiple of anything"),
    pytest.param((1,), 1, 1, 1, {}, id="one by one"),
    pytest.param((1, 1, 1), 64, 8, 1, {}, id="batches of one"),
    pytest.param((20,), 1120, 40, 35, {}, id="twenty rows"),
    pytest.param((17,), 128, 33, 1, SMALL, id="wide, one scale a channel, tails of M and N"),
    pytest.param((20,), 160, 40, 5, SMALL, id="wide, groups of 32, tail of K"),
    pytest.param((40,), 256, 72, 2, {**SMALL, "k": 128}, id="wide, groups of 128, steps of 128"),
    pytest.param((18,), 192, 33, 3, {**SMALL, "k": 128}, id="wide, groups smaller than steps"),
    pytest.param((33,), 330, 20, 1, {**SMALL, "k": 128}, id="wide, K not a multiple of anything"),
    pytest.param((2, 3, 5), 64, 9, 2, SMALL, id="wide, batches"),
    pytest.param((150,), 64, 70, 1, SMALL, id="wide, several tiles each way"),
    pytest.param((65,), 128, 130, 1, {}, id="wide, as configured"),
]


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("leading", "k", "n", "groups", "config"), SHAPES)
def test_awkward_shapes(run: Any, leading: tuple[int, ...], k: int, n: int, groups: int, config: dict[str, Any], dtype: Any) -> None:
    values = operands(leading, k, n, groups, dtype)
    close(run("W4A16Gemm", values, **config), values)


@pytest.mark.parametrize("how", ["columns", "padded", "every other"])
@pytest.mark.parametrize("m", [3, 20])
def test_strided_x(run: Any, m: int, how: str) -> None:
    values = operands((m,), 192, 24, 3)
    close(run("W4A16Gemm", values, how, **(SMALL if m > 16 else {})), values)


def test_every_code_of_every_position(run: Any) -> None:
    """One-hot rows of x pick single weights, which must come out exactly: scales are powers of two."""
    codes = np.random.default_rng(0).integers(-8, 8, (128, 16))
    weight, scale = ops_gemm.pack_int4(codes), np.full((2, 16), 0.25, np.float16)
    for rows in np.split(np.eye(128, dtype=np.float16), 8):
        found = run("W4A16Gemm", {"x": rows, "weight": weight, "w_scale": scale, "bias": np.zeros(16, np.float16)})
        np.testing.assert_array_equal(found, rows @ codes.astype(np.float16) / 4)


def test_rows_that_cannot_be_seen_as_a_matrix_are_refused(run: Any) -> None:
    with pytest.raises(UsageError, match=r"call \.contiguous\(\) first"):
        run("W4A16Gemm", operands((2, 3), 64, 8), "columns")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 128), np.float16)}, r"weight of type uint8 and shape \[8, 32\]"),
        ({"w_scale": np.zeros((1, 8), np.float32)}, r"expected: float16 \[K / G, N\]"),
    ],
)
def test_what_does_not_fit_is_refused(run: Any, change: dict[str, np.ndarray], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        run("W4A16Gemm", operands((2,), 64, 8) | change)


def test_float32_is_refused(run: Any) -> None:
    with pytest.raises(UsageError, match="cannot take x of type float32"):
        run("W4A16Gemm", operands((2,), 64, 8, dtype=np.float32))


def test_a_configuration_for_fewer_rows_is_refused(run: Any) -> None:
    with pytest.raises(UsageError, match="takes at most 16 rows, not 20"):
        run("W4A16Gemm", operands((20,), 64, 8), **SMALL, split=True)
