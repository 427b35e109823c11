"""sulq_softmax kernels against the numpy references, over awkward shapes.

Sums of floats in another order move a weight by a few units in its last place, so a code may be the next one where the exact weight
lies within 1e-3 of a boundary between two codes. Such codes are counted; anywhere else the codes are equal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphq import ops_softmax
from graphq.errors import UsageError
from graphq.log_quantizers import LogParams, LogUniform
from graphq.ops_softmax import code_levels, softmax_params, unpack_codes

torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")
pytest.importorskip("triton", reason="Triton is not installed")

from graphq.kernels.sulq_softmax import kernel  # noqa: E402

BOUNDARY = 1e-3
"""Distance to the boundary between two codes, in steps, within which either is right."""
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
# One column; pairs; tails of columns, of rows, of both; a full block; ViT; batch axes; more columns than a block holds.
SHAPES = [(1,), (3, 1), (2, 2), (5, 3), (9, 16), (33, 100), (4, 256), (257, 17), (2, 3, 7, 197), (0, 8), (2, kernel.ONE_BLOCK + 1)]


def scores(shape: tuple[int, ...], dtype: Any, seed: int = 0) -> Any:
    """Some are masked, and so is all of the last row."""
    rng = np.random.default_rng(seed)
    x = np.where(rng.random(shape) < 0.1, -np.inf, 2 * rng.standard_normal(shape)).astype(np.float32)
    x.reshape(-1, shape[-1])[-1:] = -np.inf
    return torch.from_numpy(x).to(dtype)


def wide(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.float().numpy())


def fitted(x: Any, bits: int = 4) -> tuple[LogUniform, LogParams]:
    quantizer = LogUniform(bits)
    return quantizer, quantizer.fit(ops_softmax.softmax(wide(x))) if x.numel() else LogParams(*np.float32([0.01, 0, 0.1]))


def positions(x: Any, params: np.ndarray) -> np.ndarray:
    """Where each weight lies between codes, in float64: its code before it is rounded."""
    shift, center, scale, low, high = params.astype(np.float64)
    exact = wide(x).astype(np.float64)
    power = np.exp(exact - np.maximum(exact.max(-1, keepdims=True), np.finfo(np.float32).min))
    weight = power / np.maximum(power.sum(-1, keepdims=True), 1)
    return np.asarray((np.clip(np.log(weight + shift), low, high) - center) / scale)


def count_apart(codes: np.ndarray, position: np.ndarray, record: Callable[[str, object], None]) -> None:
    """Check codes (as floats, before rounding noise) against exact positions; record how many lie at a boundary and differ."""
    apart = np.abs(codes - np.rint(position))
    at_boundary = np.abs(np.abs(position - np.floor(position)) - 0.5) < BOUNDARY
    assert apart.max(initial=0) <= 1 and not apart[~at_boundary].any()
    record("counts", ("codes of sulq_softmax", {"all": codes.size, "at a boundary, the next one": int(apart.sum())}))


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("bits", [4, 7])
def test_levels(shape: tuple[int, ...], dtype: Any, bits: int, record_property: Callable[[str, object], None]) -> None:
    x = scores(shape, dtype)
    quantizer, fit = fitted(x, bits)
    params = softmax_params(quantizer, fit)
    y = kernel.sulq_softmax(x, torch.from_numpy(params))
    assert y.dtype == dtype and y.shape == x.shape
    position = positions(x, params)
    expected = np.exp(np.rint(position) * fit.scale + fit.center) - fit.shift
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[dtype]
    equal = np.abs(wide(y) - expected) <= tolerance * np.maximum(np.abs(expected), fit.shift) + 1e-7
    codes = np.rint((np.log(np.maximum(wide(y) + fit.shift, 1e-30)) - fit.center) / fit.scale)
    count_apart(np.where(equal, np.rint(position), codes), position, record_property)


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_codes(shape: tuple[int, ...], dtype: Any, record_property: Callable[[str, object], None]) -> None:
    x = scores(shape, dtype)
    params = softmax_params(*fitted(x))
    packed = kernel.sulq_softmax(x, torch.from_numpy(params), packed=True)
    assert packed.dtype == torch.int8 and packed.shape == (*shape[:-1], (shape[-1] + 1) // 2)
    padded = torch.nn.functional.pad(x.float(), (0, shape[-1] % 2), value=-np.inf)
    count_apart(unpack_codes(packed.numpy()), positions(padded, params), record_property)


def test_a_row_masked_everywhere_has_weight_zero() -> None:
    x = torch.full((3, 5), -np.inf)
    params = softmax_params(LogUniform(4), LogUniform(4).fit(np.float32([0, 0.1, 1])))
    assert np.abs(kernel.sulq_softmax(x, torch.from_numpy(params)).numpy()).max() <= 1e-6


@pytest.mark.parametrize("packed", [False, True])
def test_strides_do_not_matter(packed: bool) -> None:
    x = scores((6, 40, 30), torch.float32)
    params = torch.from_numpy(softmax_params(*fitted(x)))
    for view in (x.transpose(1, 2), x[:, ::3], x[..., 3:20]):
        assert not view.is_contiguous()
        assert torch.equal(kernel.sulq_softmax(view, params, packed), kernel.sulq_softmax(view.contiguous(), params, packed))


@DTYPES
@pytest.mark.parametrize(
    ("lead", "rows", "columns", "depth"),
    [((), 1, 1, 1), ((), 3, 2, 5), ((2, 3), 7, 197, 64), ((1,), 65, 129, 33), ((2,), 130, 64, 16), ((0,), 3, 4, 8), ((2,), 4, 31, 256)],
)
def test_attention_value(lead: tuple[int, ...], rows: int, columns: int, depth: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    packed = torch.from_numpy(rng.integers(-128, 128, (*lead, rows, (columns + 1) // 2), dtype=np.int8))
    v = torch.from_numpy(rng.standard_normal((*lead, columns, depth)).astype(np.float32)).to(dtype)
    levels = rng.random(16, dtype=np.float32)
    y = kernel.attention_value(packed, torch.from_numpy(levels), v)
    assert y.dtype == dtype and y.shape == (*lead, rows, depth)
    rounded = wide(torch.from_numpy(levels).to(dtype))
    weight, value = rounded[unpack_codes(packed.numpy()).astype(int) + 8][..., :columns].astype(np.float64), wide(v).astype(np.float64)
    # Of all terms, since the interpreter cuts floats off to bfloat16 instead of rounding them.
    rounding = {torch.float32: 2**-20, torch.float16: 2**-10, torch.bfloat16: 2**-6}[dtype]
    assert (np.abs(wide(y) - weight @ value) <= rounding * (weight @ np.abs(value))).all()


def test_attention_value_takes_any_strides() -> None:
    rng = np.random.default_rng(0)
    v = torch.from_numpy(rng.standard_normal((2, 24, 3, 16)).astype(np.float32)).transpose(1, 2)
    packed = torch.from_numpy(rng.integers(-128, 128, (2, 3, 12, 5), dtype=np.int8)).transpose(2, 3)
    levels = torch.from_numpy(code_levels(*fitted(scores((4, 9), torch.float32))))
    assert torch.equal(kernel.attention_value(packed, levels, v), kernel.attention_value(packed.contiguous(), levels, v.contiguous()))


def test_refusals() -> None:
    x, params, levels = torch.zeros(2, 6), torch.ones(5), torch.ones(16)
    packed, v = torch.zeros(4, 3, dtype=torch.int8), torch.zeros(6, 8)
    for call, match in [
        (lambda: kernel.sulq_softmax(x.double(), params), "no softmax here"),
        (lambda: kernel.sulq_softmax(x[:, :0], params), "no softmax here"),
        (lambda: kernel.sulq_softmax(x, params[:4]), "`params` has shape"),
        (lambda: kernel.attention_value(packed, levels, v[:4]), "do not go with values"),
        (lambda: kernel.attention_value(packed.byte(), levels, v), "`packed` has shape"),
        (lambda: kernel.attention_value(packed, levels[:8], v), "`levels` has shape"),
        (lambda: kernel.attention_value(packed, levels, v.long()), "no product here"),
        (lambda: kernel.attention_value(packed, levels, torch.zeros(6, 257)), "too wide"),
    ]:
        with pytest.raises(UsageError, match=match):
            call()
