"""sulq_softmax kernels compute what `graphq.ops_softmax` says, over awkward shapes, and compile for every architecture without a GPU.

Sums of floats in another order move a weight by a few units in its last place, so a code may be the next one where the exact weight
lies within 1e-3 of a step from a boundary between two codes. Such codes are counted; anywhere else the codes are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphq import ops, ops_softmax
from graphq.errors import UsageError
from graphq.log_quantizers import LogUniform
from graphq.ops_softmax import softmax_params, unpack_codes

Record = Callable[[str, object], None]
BOUNDARY = 1e-3
BFLOAT16 = ml_dtypes.bfloat16
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float16, BFLOAT16])
# One column; pairs; tails of columns, of rows, of both; a full block; ViT; no rows; more columns than a block holds.
SHAPES = [(1,), (3, 1), (2, 2), (5, 3), (9, 16), (33, 100), (4, 256), (257, 17), (2, 3, 7, 197), (0, 8), (2, 16385)]


def scores(shape: tuple[int, ...], dtype: Any = np.float32) -> np.ndarray:
    """Some are masked, and so is all of the last row."""
    rng = np.random.default_rng(0)
    x = np.where(rng.random(shape) < 0.1, -np.inf, 2 * rng.standard_normal(shape)).astype(dtype)
    x.reshape(-1, shape[-1])[-1:] = -np.inf
    return x


def fitted(x: np.ndarray, bits: int = 4) -> np.ndarray:
    quantizer = LogUniform(bits)
    return softmax_params(quantizer, quantizer.fit(ops_softmax.softmax(x if x.size else scores((4, 8)))))


def positions(x: np.ndarray, params: np.ndarray) -> np.ndarray:
    """Codes in float64 before they are rounded."""
    shift, center, scale, low, high = params.astype(np.float64)
    exact = x.astype(np.float64)
    power = np.exp(exact - np.maximum(exact.max(-1, keepdims=True), np.finfo(np.float32).min))
    weight = power / np.maximum(power.sum(-1, keepdims=True), 1)
    return np.asarray((np.clip(np.log(weight + shift), low, high) - center) / scale)


def compare(same: np.ndarray, next_one: np.ndarray, position: np.ndarray, record: Record) -> None:
    """Results are the `same` as expected, but for boundaries, where they may be the `next_one`."""
    at_boundary = np.abs(position - np.floor(position) - 0.5) < BOUNDARY
    assert (same | (at_boundary & next_one)).all()
    record("counts", ("codes of sulq_softmax", {"all": same.size, "at a boundary, the next one": int(np.sum(~same))}))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 7])
def test_levels(run: Any, shape: tuple[int, ...], dtype: Any, bits: int, record_property: Record) -> None:
    x = scores(shape, dtype)
    params = fitted(x, bits)
    shift, center, scale, *_ = params.astype(np.float64)
    y = run("SULQSoftmax", {"x": x, "params": params})
    assert y.dtype == dtype and y.shape == x.shape
    rounding = {np.float32: 0.0, np.float16: 2.0**-11, BFLOAT16: 2.0**-7}[dtype]  # the interpreter cuts off to bfloat16

    def is_level(code: np.ndarray) -> np.ndarray:
        level = np.exp(code * scale + center) - shift
        return np.asarray(
            np.abs(y.astype(np.float64) - level) <= rounding * np.maximum(np.abs(level), 2.0**-14) + 2.0**-20 * (np.abs(level) + shift)
        )

    position = positions(x, params)
    compare(is_level(np.rint(position)), is_level(np.floor(position)) | is_level(np.ceil(position)), position, record_property)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes(run: Any, shape: tuple[int, ...], dtype: Any, record_property: Record) -> None:
    x = scores(shape, dtype)
    params = fitted(x)
    codes = unpack_codes(run("SULQSoftmaxCodes", {"x": x, "params": params}))
    padded = np.pad(x.astype(np.float32), [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)], constant_values=-np.inf)
    position = positions(padded, params)
    compare(codes == np.rint(position), np.abs(codes - position) < 0.5 + BOUNDARY, position, record_property)


def test_a_row_masked_everywhere_has_weight_zero(run: Any) -> None:
    params = softmax_params(LogUniform(4), LogUniform(4).fit(np.float32([0, 0.1, 1])))
    assert np.abs(run("SULQSoftmax", {"x": np.full((3, 5), -np.inf, np.float32), "params": params})).max() <= 1e-6


def product(lead: tuple[int, ...], rows: int, columns: int, depth: int, dtype: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "packed": rng.integers(-128, 128, (*lead, rows, (columns + 1) // 2), dtype=np.int8),
        "levels": rng.random(16, dtype=np.float32),
        "v": rng.standard_normal((*lead, columns, depth)).astype(dtype),
    }


@DTYPES
@pytest.mark.parametrize(
    ("lead", "rows", "columns", "depth"),
    [((), 1, 1, 1), ((), 3, 2, 5), ((2, 3), 7, 197, 64), ((1,), 65, 129, 33), ((2,), 130, 64, 16), ((0,), 3, 4, 8), ((2,), 4, 31, 256)],
)
def test_attention_value(run: Any, lead: tuple[int, ...], rows: int, columns: int, depth: int, dtype: Any) -> None:
    operands = product(lead, rows, columns, depth, dtype)
    y = run("SULQAttentionValue", operands)
    assert y.dtype == dtype and y.shape == (*lead, rows, depth)
    levels = operands["levels"].astype(dtype).astype(np.float64)
    weight, value = levels[unpack_codes(operands["packed"]).astype(int) + 8][..., :columns], operands["v"].astype(np.float64)
    # Of the sum of all terms: a weight and the result are rounded, and the interpreter cuts off to bfloat16.
    rounding = {np.float32: 2.0**-20, np.float16: 2.0**-10, BFLOAT16: 2.0**-6}[dtype]
    assert (np.abs(y.astype(np.float64) - weight @ value) <= rounding * (weight @ np.abs(value))).all()


@pytest.mark.parametrize("how", ["columns", "padded", "every other"])
@pytest.mark.parametrize("operator", ["SULQSoftmax", "SULQSoftmaxCodes", "SULQAttentionValue"])
def test_what_is_not_contiguous_is_refused(run: Any, operator: str, how: str) -> None:
    operands = {"x": scores((2, 5, 24)), "params": fitted(scores((2, 5, 24))), **product((2,), 5, 24, 16, np.float32)}
    with pytest.raises(UsageError, match=r"call \.contiguous\(\) first"):
        run(operator, {key: operands[key] for key in ops.OPERATORS[operator].inputs}, how)


@pytest.mark.parametrize(
    ("operator", "change", "message"),
    [
        ("SULQSoftmax", {"x": np.zeros((2, 6))}, "x of type float64"),
        ("SULQSoftmaxCodes", {"params": np.ones(4, np.float32)}, "cannot take params"),
        ("SULQAttentionValue", {"v": np.zeros((9, 8), np.float32)}, "cannot take packed"),
        ("SULQAttentionValue", {"v": np.zeros((6, 257), np.float32)}, "D of at most 256"),
    ],
)
def test_what_does_not_fit_is_refused(run: Any, operator: str, change: dict[str, np.ndarray], message: str) -> None:
    operands = {"x": np.zeros((2, 6), np.float32), "params": np.ones(5, np.float32), **product((), 4, 6, 8, np.float32), **change}
    with pytest.raises(UsageError, match=message):
        run(operator, {key: operands[key] for key in ops.OPERATORS[operator].inputs})


ARCHS = (80, 86, 89, 90, 120)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("columns", [256, 16385])
@pytest.mark.parametrize("packed", [False, True])
def test_softmax_compiles_to_few_instructions(compiler: Any, columns: int, packed: bool, arch: int) -> None:
    """No spills; for each element two exponentials, or one for codes, and one logarithm; wide accesses where rows are aligned."""
    from graphq.kernels.sulq_softmax import kernel

    launch = kernel.softmax_launch(64, columns, "float16", packed)
    found = compiler.compile_launch(launch, arch)
    assert found.spill_bytes == 0 and found.shared_bytes <= 48 * 1024 and found.threads == 32 * launch.warps
    elements = launch.constants.get("BLOCK_ROWS", 1) * launch.constants["BLOCK_COLUMNS"] // found.threads
    assert found.ptx.count("lg2.approx") == elements == 16
    exponentials = found.ptx.count("ex2.approx")
    assert exponentials == (elements if packed else 2 * elements) if columns <= kernel.ONE_BLOCK else exponentials > elements
    if columns % 256 == 0:
        assert "ld.global.v4.b32" in found.ptx and ("st.global.v2.b32" if packed else "st.global.v4.b32") in found.ptx


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("depth", [64, 256])
@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_attention_value_fits(compiler: Any, depth: int, dtype: str, arch: int) -> None:
    """No spills and no more shared memory than any launch may have; 16-bit values go through tensor cores."""
    from graphq.kernels.sulq_softmax import kernel

    found = compiler.compile_launch(kernel.attention_launch(6, 197, 197, depth, dtype), arch)
    assert found.spill_bytes == 0 and found.shared_bytes <= 48 * 1024
    assert dtype == "float32" or ("wgmma.mma_async" if arch == 90 else "mma.sync") in found.ptx
