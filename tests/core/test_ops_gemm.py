"""The contract of the custom operators: layouts survive the trip, and both runtimes compute with the body what numpy does."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import ir, ops, ops_gemm
from graphq.editor import Editor
from graphq.errors import UsageError
from graphq.executor import Executor
from graphq.functions import call

RNG = np.random.default_rng(0)
GEMMS = [name for name in ops.OPERATORS if name.endswith("Gemm")]
ONNX_TYPES = {"float16": "float16", "bfloat16": "bfloat16", "float32": "float", "int8": "int8", "uint8": "uint8"}
CASES = [  # leading axes of x, K, N, groups
    ((1,), 64, 8, 1),
    ((5,), 128, 24, 4),
    ((2, 3), 192, 7, 3),
    ((4,), 96, 16, 3),
    ((3,), 50, 5, 1),
    ((1, 1, 2), 1, 1, 1),
]


def operands(name: str, leading: tuple[int, ...], k: int, n: int, groups: int, dtype: Any = np.float32,
             per_row: bool = True) -> dict[str, Any]:  # fmt: skip
    """Random operands; scales are such that results are around 1."""
    codes = RNG.integers(-8, 8, (k, n)) if name.startswith("W4") else RNG.integers(-128, 128, (k, n))
    found: dict[str, Any] = {"weight": ops_gemm.pack_int4(codes) if name.startswith("W4") else ops_gemm.pack_int8(codes)}
    scale = RNG.uniform(0.5, 1.5, (groups, n)) / ((8 if name.startswith("W4") else 128) * np.sqrt(k))
    bias = RNG.standard_normal(n).astype(dtype)
    if name == "W4A16Gemm":
        return {"x": RNG.standard_normal((*leading, k)).astype(dtype), **found, "w_scale": scale.astype(dtype), "bias": bias}
    x_scale = RNG.uniform(0.01, 0.03, (*leading, 1) if per_row else ()).astype(np.float32)
    w_scale = (scale[0] if name == "W8A8Gemm" else scale).astype(np.float32)
    x = RNG.integers(-128, 128, (*leading, k)).astype(np.int8)
    return {"x": x, **found, "x_scale": np.asarray(x_scale), "w_scale": w_scale, "bias": bias}


def model_of(name: str, values: dict[str, Any], opset: int = 21) -> ir.Model:
    """A model of one call, with all operands but x as initializers."""
    x, out = values["x"], str(values["bias"].dtype)
    shape = ", ".join(map(str, (*x.shape[:-1], len(values["bias"]))))
    model = ir.from_onnx_text(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g ({ONNX_TYPES[str(x.dtype)]}[{", ".join(map(str, x.shape))}] x) '
        f"=> ({ONNX_TYPES[out]}[{shape}] y) {{ y = Identity(x) }}"
    )
    edit = Editor(model)
    inputs = [model.graph.inputs[0], *(edit.initializer(key, values[key]) for key in ops.OPERATORS[name].inputs[1:])]
    node = next(iter(model.graph))
    edit.replace_output(node.outputs[0], call(edit, ops.OPERATORS[name].body, node, inputs, output="z", like=node.outputs[0]))
    edit.prune()
    return model


# ---- layouts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 31, 32, 33, 63, 64, 65, 128, 1000])
def test_int4_survives_the_trip(k: int) -> None:
    codes = RNG.integers(-8, 8, (k, 3)).astype(np.int8)
    packed = ops_gemm.pack_int4(codes)
    assert packed.dtype == np.uint8 and packed.shape == (3, 32 * -(-k // 64))
    np.testing.assert_array_equal(ops_gemm.unpack_int4(packed, k), codes)


def test_int4_is_laid_out_as_documented() -> None:
    codes = RNG.integers(-8, 8, (192, 2))
    packed = ops_gemm.pack_int4(codes)
    for b, i, n in [(0, 0, 0), (0, 31, 1), (1, 0, 0), (2, 17, 1)]:
        assert packed[n, 32 * b + i] == (codes[64 * b + i, n] + 8) | (codes[64 * b + 32 + i, n] + 8) << 4


def test_int4_pads_with_zeros() -> None:
    assert set(ops_gemm.unpack_int4(ops_gemm.pack_int4(np.full((40, 1), 3, np.int8)), 64)[40:, 0]) == {0}


@pytest.mark.parametrize("code", [-9, 8])
def test_int4_refuses_what_does_not_fit(code: int) -> None:
    with pytest.raises(UsageError, match="do not fit into 4 bits"):
        ops_gemm.pack_int4(np.full((64, 1), code))


def test_int8_survives_the_trip() -> None:
    codes = RNG.integers(-128, 128, (5, 3)).astype(np.int8)
    assert ops_gemm.pack_int8(codes).shape == (3, 5) and ops_gemm.pack_int8(codes).flags.c_contiguous
    np.testing.assert_array_equal(ops_gemm.unpack_int8(ops_gemm.pack_int8(codes)), codes)


# ---- references and bodies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("case", CASES)
def test_reference_is_the_textbook_formula(name: str, case: Any) -> None:
    """In float64, of the codes that went in; float32 sums of up to 192 numbers around 1 are good to 1e-5."""
    values = operands(name, *case)
    k = case[1]
    codes = ops_gemm.unpack_int4(values["weight"], k) if name.startswith("W4") else ops_gemm.unpack_int8(values["weight"])
    scale = np.atleast_2d(values["w_scale"]).astype(np.float64)
    weight = codes * scale[np.arange(k) * len(scale) // k]
    expected = (values["x"].astype(np.float64) * values.get("x_scale", 1.0)) @ weight + values["bias"]
    np.testing.assert_allclose(ops.OPERATORS[name].reference(**values), expected, atol=1e-5)


@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("opset", [21, 25])
@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("case", CASES)
def test_both_runtimes_compute_the_body(name: str, case: Any, opset: int, per_row: bool) -> None:
    """float32: sums of up to 192 numbers around 1 in any order are good to 1e-5."""
    values = operands(name, *case, per_row=per_row)
    expected = ops.OPERATORS[name].reference(**values)
    model = model_of(name, values, opset)
    found = Executor(model).run({"x": values["x"]})[0]
    evaluated = ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": values["x"]})[0]
    assert found.dtype == evaluated.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-5)
    np.testing.assert_allclose(evaluated, expected, atol=1e-5)


@pytest.mark.parametrize("name", GEMMS)
@pytest.mark.parametrize("case", CASES)
def test_half_precision_bodies(name: str, case: Any) -> None:
    """Results below 8 are rounded to steps of 2^-8 at most, at most three times; a runtime may also sum in float16."""
    values = operands(name, *case, dtype=np.float16)
    expected = ops.OPERATORS[name].reference(**values)
    model = model_of(name, values)
    for found in (Executor(model).run({"x": values["x"]})[0], ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": values["x"]})[0]):
        assert found.dtype == np.float16
        np.testing.assert_allclose(found.astype(np.float32), expected.astype(np.float32), atol=2e-2)


def test_bfloat16_reference() -> None:
    """Relative to the sum of magnitudes, bfloat16 weights and results are good to 2^-8."""
    values = operands("W4A16Gemm", (4,), 128, 16, 4, ml_dtypes.bfloat16)
    found = ops_gemm.w4a16_gemm(**values)
    exact = ops_gemm.w4a16_gemm(**{key: value if key == "weight" else value.astype(np.float32) for key, value in values.items()})
    assert found.dtype == ml_dtypes.bfloat16
    np.testing.assert_allclose(found.astype(np.float32), exact, atol=0.05)


def test_the_checker_takes_the_bodies() -> None:
    for name in GEMMS:
        onnx.checker.check_model(ir.to_proto(model_of(name, operands(name, (2,), 64, 4, 1))), full_check=True)


def test_extreme_sums_are_exact() -> None:
    """Every product at its largest, at the largest K: float32 sums would be off."""
    k = ops_gemm.MAX_K
    one = np.float32(1)
    values = {"x": np.full((1, k), -128, np.int8), "x_scale": np.asarray(one), "bias": np.zeros(1, np.float32)}
    values["x"][0, 0] = -127
    weight = ops_gemm.pack_int8(np.full((k, 1), -128))
    assert ops_gemm.w8a8_gemm(weight=weight, w_scale=np.ones(1, np.float32), **values)[0, 0] == np.float32(128 * 128 * k - 128)


# ---- limits ---------------------------------------------------------------------------------------------------------


def test_sizes() -> None:
    assert ops_gemm.sizes(operands("W4A16Gemm", (2, 3), 192, 7, 3)) == ops_gemm.Sizes(6, 192, 7, 64)
    assert ops_gemm.sizes(operands("W8A8Gemm", (5,), 50, 7, 1)) == ops_gemm.Sizes(5, 50, 7, 50)
    assert ops_gemm.sizes(operands("W4A8Gemm", (5,), 128, 7, 2, per_row=False)) == ops_gemm.Sizes(5, 128, 7, 64)


@pytest.mark.parametrize(
    ("name", "key", "bad", "message"),
    [
        ("W4A16Gemm", "x", np.zeros((2, 192), np.float32), "expected: float16 or bfloat16"),
        ("W4A16Gemm", "x", np.zeros((2, 192)), r"cannot take x of type float64 and shape \[2, 192\]"),
        ("W4A16Gemm", "x", np.zeros(192, np.float16), r"expected: \[\.\.\., M, K\]"),
        ("W4A16Gemm", "x", np.zeros((2, 320), np.float16), r"expected: uint8 \[N, 32 \* ceil\(K / 64\)\] = \[7, 160\]"),
        ("W4A16Gemm", "weight", np.zeros((96, 7), np.uint8), r"= \[7, 96\]"),
        ("W4A16Gemm", "w_scale", np.zeros((3, 7), np.float32), r"expected: float16 \[K / G, N\]"),
        ("W4A16Gemm", "w_scale", np.zeros((4, 7), np.float16), "groups of a multiple of 32 of K = 192"),
        ("W4A16Gemm", "w_scale", np.zeros((5, 7), np.float16), "groups of a multiple of 32 of K = 192"),
        ("W4A16Gemm", "w_scale", np.zeros((0, 7), np.float16), r"\[K / G, N\]"),
        ("W4A16Gemm", "bias", np.zeros((1, 7), np.float16), r"expected: float16 \[N\]"),
        ("W4A16Gemm", "bias", np.zeros(7, np.float32), r"expected: float16 \[N\]"),
        ("W8A8Gemm", "x", np.zeros((2, 192), np.uint8), "expected: int8"),
        ("W8A8Gemm", "x", np.zeros((2, ops_gemm.MAX_K + 1), np.int8), "int32 sums overflow"),
        ("W8A8Gemm", "weight", np.zeros((192, 7), np.int8), r"expected: int8 \[N, K\] = \[7, 192\]"),
        ("W8A8Gemm", "w_scale", np.zeros((1, 7), np.float32), r"expected: float32 \[N\]"),
        ("W8A8Gemm", "x_scale", np.zeros((3, 1), np.float32), r"expected: float32 \[\] or \[2, 1\]"),
        ("W4A8Gemm", "x_scale", np.zeros((), np.float16), r"expected: float32 \[\]"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(name: str, key: str, bad: np.ndarray, message: str) -> None:
    values = operands(name, (2,), 192, 7, 3, np.float16) | {key: bad}
    with pytest.raises(UsageError, match=message) as caught:
        ops.check(name, values, where="node fc1")
    assert "where: node fc1" in str(caught.value)


def test_unknown_operators_are_named() -> None:
    with pytest.raises(UsageError, match="W4A16Gemm"):
        ops.check("W4A16", {})
