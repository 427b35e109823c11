"""residual-expand: what is stored and computed, on either side of quantized activations (REx)."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import ir, qdq, stored
from graphq.errors import RecipeError, TargetError
from graphq.executor import Executor, decode

GOLDEN = Path(__file__).parent / "golden" / "residual_expand"
TEXT = '<ir_version: 10, opset_import: ["" : 21]>\n'
LAYERS = {
    "MatMul and Add": "g (float[N, 48] x, float[48, 20] w, float[20] b) => (float[N, 20] y) { [it] a = MatMul(x, w) y = Add(a, b) }",
    "Gemm": "g (float[N, 48] x, float[20, 48] w, float[20] b) => (float[N, 20] y)"
            " { [it] y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b) }",
    "Conv": "g (float[N, 12, 2, 2] x, float[20, 12, 2, 1] w, float[20] b) => (float[N, 20, 1, 2] y) { [it] y = Conv (x, w, b) }",
    "Conv groups": "g (float[N, 12, 2, 2] x, float[20, 6, 2, 1] w) => (float[N, 20, 1, 2] y) { [it] y = Conv <group = 2> (x, w) }",
}  # fmt: skip
INTEGER = "insert-qdq: {weights: false, error_samples: 0, float_budget: 0}"
Layer = Callable[..., tuple[ir.Model, np.ndarray]]


@pytest.fixture
def layer(weighted: Callable[..., ir.Model], heavy: Callable[..., np.ndarray]) -> Layer:
    def layer(name: str, seed: int = 0) -> tuple[ir.Model, np.ndarray]:
        x = heavy(seed, 60, 48)
        return weighted(TEXT + LAYERS[name], np.random.default_rng(seed)), x.reshape(-1, 12, 2, 2) if "Conv" in name else x

    return layer


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    return Executor(model).run({"x": x})[0].astype(np.float64)


@pytest.mark.parametrize("options", ["{orders: 3}", "{gamma: 0.3}", "{gamma: 0.5, group_size: 16, bits: 3}", "{orders: 2, bits: 8}"])
@pytest.mark.parametrize("is_integer", [False, True], ids=["float", "integer"])
@pytest.mark.parametrize("name", LAYERS)
def test_both_engines_compute_the_sum(layer: Layer, after: Callable[..., Any], name: str, is_integer: bool, options: str) -> None:
    """ONNX Runtime and the reference evaluator agree to 1e-5; behind quantized activations each order is a product of its own."""
    reference, x = layer(name)
    model, record = after(reference, x, *[INTEGER] * is_integer, f"residual-expand: {options}")
    made, again = run(model, x), ReferenceEvaluator(ir.to_proto(model)).run(None, {"x": x})[0]
    rounded = [node for node in model.graph if node.op_type == "QuantizeLinear" and node.name.startswith("y")]  # type: ignore[union-attr]
    step = max([float(ir.constant(node.inputs[1]).max()) for node in rounded], default=0.0)  # type: ignore[union-attr]
    np.testing.assert_allclose(made, again, atol=1e-5 * np.abs(made).max() + 1.01 * step)  # outputs that are rounded may fall either way
    products = sum(node.op_type in ("Conv", "Gemm", "MatMul") for node in model.graph)
    orders = 3 if "3}" in options and "orders" in options else 2
    assert products == (orders if is_integer and name != "Conv groups" else 1)
    assert all(stored.is_stored(node.inputs[1]) for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul"))
    bits = {"{orders: 3}": 12, "{gamma: 0.3}": 5.2, "{orders: 2, bits: 8}": 16}.get(options, 4.5)
    assert record.measurements[0].numbers["bits"] == pytest.approx(bits)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", LAYERS)
def test_errors_fall_tenfold_an_order(layer: Layer, after: Callable[..., Any], name: str, seed: int) -> None:
    """T9: amplitudes at the output, 4 bits."""
    reference, x = layer(name, seed)
    wanted, size = run(reference, x), list[float]()
    for orders in (1, 2, 3):
        model, _ = after(reference, x, f"residual-expand: {{orders: {orders}}}")
        size.append(float(np.sqrt(np.mean((run(model, x) - wanted) ** 2))))
    assert 10 * size[1] < size[0] and 10 * size[2] < size[1]


@pytest.mark.parametrize("name", LAYERS)
def test_no_share_is_plain_rounding(layer: Layer, after: Callable[..., Any], name: str) -> None:
    """Bit for bit what quantize-weights makes, which is one order as well."""
    reference, x = layer(name)
    plain, none, one = (after(reference, x, line)[0] for line in (
        "quantize-weights: {bits: 4}", "residual-expand: {gamma: 0}", "residual-expand: {orders: 1}"))  # fmt: skip
    np.testing.assert_array_equal(run(none, x), run(plain, x))
    np.testing.assert_array_equal(run(one, x), run(plain, x))


def test_zeros_and_sizes(layer: Layer, after: Callable[..., Any]) -> None:
    """A pruned weight keeps its zeros; two orders of 4 bits take a little over a quarter of the bytes, a quarter of the neurons less."""
    reference, x = layer("MatMul and Add")
    value = next(node for node in reference.graph if node.name == "it").inputs[1]
    sparse = ir.constant(value) * (np.random.default_rng(0).random((48, 20)) < 0.5)  # type: ignore[operator]
    value.const_value = ir.make_tensor(sparse.astype(np.float32), "float32", value.name or "")  # type: ignore[union-attr]
    shares = []
    for gamma in (0.25, 1.0):
        model, _ = after(reference, x, f"residual-expand: {{gamma: {gamma}}}")
        weight = decode(model, next(node for node in model.graph if node.name == "it").inputs[1])  # type: ignore[arg-type]
        assert not weight[sparse == 0].any() and weight[sparse != 0].any()
        before, made = qdq.quantized_weight_bytes(model)
        shares.append(made / before)
    assert before == sparse.size * 4 and shares[0] < 0.25 < shares[1] < 0.31


@pytest.mark.parametrize(("lines", "target", "error", "match"), [
    (["residual-expand: {bits: 2}"], "tensorrt", TargetError, "does not take int2"),
    (["residual-expand: {exclude: [it]}"], "onnxruntime", TargetError, "excluded by the recipe"),
    (["quantize-weights", "residual-expand"], "onnxruntime", RecipeError, "quantized already"),
])  # fmt: skip
def test_refusals(layer: Layer, after: Callable[..., Any], lines: list[str], target: str, error: type[Exception], match: str) -> None:
    reference, x = layer("MatMul and Add")
    with pytest.raises(error, match=match):
        after(reference, x, *lines, target=target)


def test_branches_stay_float(layer: Layer, after: Callable[..., Any]) -> None:
    reference, x = layer("MatMul and Add")
    model, record = after(reference, x, "svd-branch: {rank: 2, min_gain_db: 0, store: float32}", "residual-expand")
    assert sum(reason == "a float weight was asked for it" for _, reason in record.skipped) == 2
    assert Counter(node.op_type for node in model.graph)["DequantizeLinear"] == 2


@pytest.mark.parametrize(("case", "lines"), [("sum", []), ("products", [INTEGER])])
def test_golden(heavy: Callable[..., np.ndarray], after: Callable[..., Any], case: str, lines: list[str]) -> None:
    """`GRAPHQ_GOLDEN=write` writes the second half of each file anew."""
    path = GOLDEN / f"{case}.txt"
    before, _, expected = path.read_text(encoding="utf-8").partition("----\n")
    model, _ = after(ir.from_onnx_text(before), heavy(0, 60, 6), *lines, "residual-expand: {gamma: 0.5}")
    rows = [f"{name}: {value.dtype}{list(value.shape or ())}" for name, value in model.graph.initializers.items()]
    for node in model.graph:
        rows.append(f"{node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' if value else '-' for value in node.inputs)})")
    found = "\n".join([f"opset {ir.opset(model)}", *rows, ""])
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(f"{before}----\n{found}", encoding="utf-8")
    else:
        assert found == expected
