"""lorc: behind any quantizer of weights, the held-out error falls, and grows with nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphq import ir
from graphq.executor import Executor

TEXT = '<ir_version: 10, opset_import: ["" : 21]>\n'
LAYERS = {
    "MatMul and Add": "g (float[N, 64] x, float[64, 48] w, float[48] b) => (float[N, 48] y) { [it] a = MatMul(x, w) y = Add(a, b) }",
    "MatMul": "g (float[N, 64] x, float[64, 48] w) => (float[N, 48] y) { [it] a = MatMul(x, w) y = Relu(a) }",
    "Gemm": "g (float[N, 64] x, float[48, 64] w, float[48] b) => (float[N, 48] y)"
            " { [it] y = Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, b) }",
    "Conv": "g (float[N, 16, 2, 2] x, float[48, 16, 2, 1] w, float[48] b) => (float[N, 48, 1, 2] y) { [it] y = Conv (x, w, b) }",
}  # fmt: skip
QUANTIZERS = {
    "quantize-weights": ["quantize-weights: {bits: 4}"],
    "round": ["round: {bits: 4, layers: all, algorithm: gptq}"],
    "repair": ["insert-qdq: {activation_bits: 4, weights: false, error_samples: 0}", "round: {bits: 3, repair: true, algorithm: rtn}"],
    "residual-expand": ["residual-expand: {bits: 2, gamma: 0.5}"],
}
Case = tuple[ir.Model, np.ndarray, np.ndarray]


@pytest.fixture
def layer(weighted: Callable[..., ir.Model], heavy: Callable[..., np.ndarray]) -> Callable[..., Case]:
    """A float model, rows to calibrate with, and others."""

    def layer(name: str, seed: int = 0) -> Case:
        x = heavy(seed, 3000, 64)
        return weighted(TEXT + LAYERS[name], np.random.default_rng(seed)), *np.split(x.reshape(-1, 16, 2, 2) if name == "Conv" else x, 2)  # type: ignore[return-value]

    return layer


def error(model: ir.Model, reference: ir.Model, x: np.ndarray) -> float:
    """Noise over signal at the output."""
    made, wanted = (Executor(one).run({"x": x})[0].astype(np.float64) for one in (model, reference))
    return float(np.sum((made - wanted) ** 2) / np.sum(wanted**2))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("name", LAYERS)
def test_behind_any_quantizer(layer: Callable[..., Case], after: Callable[..., Any], name: str, quantizer: str) -> None:
    """The error on unseen rows falls by 2 % at least, by 15 % where activations are float; int8 factors do as well as float32 ones."""
    reference, x, fresh = layer(name)
    before = error(after(reference, x, *QUANTIZERS[quantizer])[0], reference, fresh)
    left = {}
    for store in ("int8", "float32"):
        model, record = after(reference, x, *QUANTIZERS[quantizer], f"lorc: {{rank: 6, min_gain_db: 0, store: {store}}}")
        left[store] = error(model, reference, fresh)
        assert [entry.where for entry in record.measurements] == ["it"]
        assert sum(node.op_type == "DequantizeLinear" for node in model.graph) >= (3 if store == "int8" else 1)
    assert left["int8"] < (0.98 if quantizer == "repair" else 0.85) * before
    assert left["int8"] == pytest.approx(left["float32"], rel=0.03)


@pytest.mark.parametrize("seed", range(3))
def test_gains_grow_with_the_rank(layer: Callable[..., Case], after: Callable[..., Any], seed: int) -> None:
    """T7 at the outputs: by 5 % each time."""
    reference, x, fresh = layer("MatMul and Add", seed)
    errors = [error(after(reference, x, "quantize-weights: {bits: 4}")[0], reference, fresh)]
    for rank in (3, 6, 12):
        model, _ = after(reference, x, "quantize-weights: {bits: 4}", f"lorc: {{rank: {rank}, min_gain_db: 0}}")
        errors.append(error(model, reference, fresh))
    assert all(less < 0.95 * more for more, less in zip(errors, errors[1:], strict=False))


def test_no_mean_error_is_left_where_a_bias_can_take_it(layer: Callable[..., Case], after: Callable[..., Any]) -> None:
    """Rows of massive outputs count less there, so that a tenth may be left."""
    reference, x, _ = layer("Gemm")
    model, _ = after(reference, x, "quantize-weights: {bits: 4}", "lorc: {rank: 6, min_gain_db: 0}")
    made, wanted = (Executor(one).run({"x": x})[0] for one in (model, reference))
    assert np.abs((made - wanted).mean(0)).max() < 0.1 * np.sqrt(np.square(made - wanted).mean())


def test_the_branch_reads_what_lies_before_the_quantizer(layer: Callable[..., Case], after: Callable[..., Any]) -> None:
    reference, x, _ = layer("MatMul and Add")
    model, _ = after(reference, x, "dynamic-activations: {bits: 4}", "round: {bits: 4}", "lorc: {rank: 6, min_gain_db: 0}")
    (first,) = [node for node in model.graph if node.name == "a_branch_left"]
    assert first.inputs[0] in model.graph.inputs


@pytest.mark.parametrize(("lines", "reason"), [
    (["quantize-weights: {exclude: [other]}", "lorc: {rank: 4, min_gain_db: 0}"], "its weight is not quantized"),
    (["quantize-weights: {bits: 4}", "lorc: {rank: 4, min_gain_db: 0, exclude: [other]}"], "excluded by the recipe"),
    (["quantize-weights: {bits: 4}", "lorc: {rank: 20, min_gain_db: 0, allow_no_effect: true}"], "more than half"),
    (["quantize-weights: {bits: 4}", "lorc: {rank: 4, min_gain_db: 90, allow_no_effect: true}"], "less than 90 dB"),
    (["svd-branch: {rank: 4, min_gain_db: 0}", "quantize-weights: {bits: 4}", "lorc: {rank: 4, min_gain_db: 0}"], "float was asked for it"),
])  # fmt: skip
def test_refusals(weighted: Callable[..., ir.Model], heavy: Callable[..., np.ndarray], after: Callable[..., Any], lines: list[str],
                  reason: str) -> None:  # fmt: skip
    text = "g (float[N, 64] x, float[64, 64] w, float[64, 64] v) => (float[N, 64] y) { [it] a = MatMul(x, w) [other] y = MatMul(a, v) }"
    _, record = after(weighted(TEXT + text, np.random.default_rng(0)), heavy(0, 500, 64), *lines)
    assert any(reason in found for _, found in record.skipped)
