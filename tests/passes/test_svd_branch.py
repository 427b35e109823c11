"""svd-branch: the same function, smaller errors at 4 bits, and a branch that everybody leaves precise."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphq import ir, linear
from graphq.errors import GraphqError
from graphq.executor import Executor

TEXT = '<ir_version: 10, opset_import: ["" : 21]>\n'
LAYERS = {
    "MatMul and Add": ((64,), "g (float[N, 5, 64] x, float[64, 48] w, float[48] b) => (float[N, 5, 48] y)"
                       " { [it] a = MatMul(x, w) y = Add(a, b) }"),
    "MatMul": ((64,), "g (float[N, 5, 64] x, float[64, 48] w) => (float[N, 5, 48] y) { [it] a = MatMul(x, w) y = Relu(a) }"),
    "Gemm": ((64,), "g (float[N, 64] x, float[64, 48] w, float[48] b) => (float[N, 48] y)"
             " { [it] y = Gemm <alpha = 0.5, beta = 2.0> (x, w, b) }"),
    "Gemm transB": ((64,), "g (float[N, 64] x, float[48, 64] w) => (float[N, 48] y) { [it] y = Gemm <transB = 1> (x, w) }"),
    "Conv": ((8, 6, 6), "g (float[N, 8, 6, 6] x, float[48, 8, 3, 3] w, float[48] b) => (float[N, 48, 3, 6] y)"
             " { [it] y = Conv <pads = [1, 1, 1, 1], strides = [2, 1]> (x, w, b) }"),
    "Conv 1 x 1": ((48, 3, 3), "g (float[N, 48, 3, 3] x, float[48, 48, 1, 1] w) => (float[N, 48, 3, 3] y) { [it] y = Conv (x, w) }"),
}  # fmt: skip

Case = tuple[ir.Model, np.ndarray, np.ndarray]


@pytest.fixture
def layer(weighted: Callable[..., ir.Model], heavy: Callable[..., np.ndarray]) -> Callable[..., Case]:
    """A float model, rows to calibrate with, and others."""

    def layer(name: str, seed: int = 0, samples: int = 400) -> Case:
        shape, text = LAYERS[name]
        rows = heavy(seed, 2 * samples * 5, shape[0])
        x = np.ascontiguousarray(rows.reshape(2 * samples, 5, -1)) if "5, 64" in text else rows[: 2 * samples]
        if len(shape) > 1:
            rows = heavy(seed, 2 * samples * shape[1] * shape[2], shape[0])
            x = np.ascontiguousarray(np.moveaxis(rows.reshape(2 * samples, *shape[1:], shape[0]), -1, 1))
        return weighted(TEXT + text, np.random.default_rng(seed)), x[:samples], x[samples:]

    return layer


def error(model: ir.Model, reference: ir.Model, x: np.ndarray) -> float:
    """Noise over signal at the output."""
    made, wanted = (Executor(one).run({"x": x})[0].astype(np.float64) for one in (model, reference))
    return float(np.sum((made - wanted) ** 2) / np.sum(wanted**2))


def branches(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.metadata_props.get("graphq.bits") == "wfloat afloat"]


@pytest.mark.parametrize("store", ["int8", "float32"])
@pytest.mark.parametrize("name", LAYERS)
def test_the_model_computes_the_same(layer: Callable[..., Case], after: Callable[..., Any], name: str, store: str) -> None:
    """To 1e-5 of the largest output, also with factors of 8 bits: the rest makes good what they cost."""
    reference, x, fresh = layer(name, samples=100)
    model, record = after(reference, x, f"svd-branch: {{rank: 6, min_gain_db: 0, store: {store}}}")
    made, wanted = (Executor(one).run({"x": fresh})[0] for one in (model, reference))
    np.testing.assert_allclose(made, wanted, atol=1e-5 * np.abs(wanted).max())
    assert [entry.where for entry in record.measurements] == ["it"] and record.measurements[0].numbers["gain_db"] > 0
    counts = Counter(node.op_type for node in model.graph)
    assert len(branches(model)) == 2 and counts["DequantizeLinear"] == (2 if store == "int8" else 0)
    names, before = ({value.name for node in one.graph for value in node.outputs} for one in (model, reference))
    assert names >= before - {"a"}, "what the branch is missing from has another name"


@pytest.mark.parametrize("seed", range(3))
def test_gains_grow_with_the_rank(layer: Callable[..., Case], after: Callable[..., Any], seed: int) -> None:
    """T7 at the outputs of a file with 4-bit weights and activations, on rows that nobody has seen: 5 % less each time."""
    reference, x, fresh = layer("MatMul and Add", seed)
    quantized = ["dynamic-activations: {bits: 4, symmetric: false}", "round: {bits: 4, group_size: 32, algorithm: rtn}"]
    errors = [error(after(reference, x, *quantized)[0], reference, fresh)]
    for rank in (3, 6, 12):
        model, _ = after(reference, x, f"svd-branch: {{rank: {rank}, group_size: 32, min_gain_db: 0}}", *quantized)
        errors.append(error(model, reference, fresh))
    assert all(less < 0.95 * more for more, less in zip(errors, errors[1:], strict=False))


@pytest.mark.parametrize("store", ["int8", "float32"])
@pytest.mark.parametrize("quantizers", [
    ["dynamic-activations: {bits: 4}", "round: {bits: 4}"], ["insert-qdq: {weights: false, error_samples: 0}", "round: {bits: 4}"],
    ["dynamic-activations: {bits: 4}", "insert-qdq: {weights: false, attention: true, allow_no_effect: true}", "round: {bits: 4}"],
    ["insert-qdq: {error_samples: 0}"], ["quantize-weights: {bits: 4}"], ["aqer: {allow_no_effect: true}", "quantize-weights: {bits: 4}"],
    ["residual-expand"],
], ids=lambda lines: " ".join(line.partition(":")[0] for line in lines))  # fmt: skip
def test_nobody_quantizes_the_branch(layer: Callable[..., Case], after: Callable[..., Any], quantizers: list[str], store: str) -> None:
    """It reads the float activation, and keeps its own weights; the layer's own weight is quantized."""
    reference, x, _ = layer("MatMul and Add", samples=60)
    model, _ = after(reference, x, f"svd-branch: {{rank: 4, min_gain_db: 0, store: {store}}}", *quantizers)
    first, second = branches(model)
    assert first.inputs[0] in model.graph.inputs and second.inputs[0] is first.outputs[0]
    kinds = [str(ir.producer(linear.weight_of(node)).inputs[0].dtype) if store == "int8" else str(linear.weight_of(node).dtype)  # type: ignore[union-attr]
             for node in (first, second)]  # fmt: skip
    assert kinds == ["INT8" if store == "int8" else "FLOAT"] * 2
    (own,) = [node for node in model.graph if node.name == "it"]
    assert not linear.is_linear(own) and ir.constant(linear.weight_of(own)) is None


@pytest.mark.parametrize(("text", "options", "reason"), [
    ("g (float[N, 64] x, float[64, 48] w) => (float[N, 48] y) { [it] y = MatMul(x, w) }", "{rank: 14}", "more than half of its 64 x 48"),
    ("g (float[N, 64] x, float[64, 48] w) => (float[N, 48] y) { [it] y = MatMul(x, w) }", "{min_gain_db: 90, rank: 4}", "less than 90 dB"),
    ("g (float[N, 64] x, float[64, 48] w) => (float[N, 48] y) { [it] y = MatMul(x, w) }", '{exclude: ["it"]}', "excluded by the recipe"),
    ("g (float[64, N] x, float[64, 48] w) => (float[N, 48] y) { [it] y = Gemm <transA = 1> (x, w) }", "{rank: 4}", "transposed"),
    ("g (float[N, 64, 1, 1] x, float[64, 32, 1, 1] w) => (float[N, 64, 1, 1] y) { [it] y = Conv <group = 2> (x, w) }", "{rank: 4}",
     "all channels"),
])  # fmt: skip
def test_refusals(weighted: Callable[..., ir.Model], after: Callable[..., Any], text: str, options: str, reason: str) -> None:
    model = weighted(TEXT + text, np.random.default_rng(0))
    x = np.random.default_rng(1).standard_normal([64 if isinstance(size, str) else size for size in ir.shape_of(model.graph.inputs[0])])  # type: ignore[union-attr]
    with pytest.raises(GraphqError, match=reason):
        after(model, x.astype(np.float32), f"svd-branch: {options}")


def test_a_layer_that_is_to_stay_float_gets_no_branch(layer: Callable[..., Case], after: Callable[..., Any]) -> None:
    """A second run finds the branches of the first."""
    reference, x, _ = layer("MatMul and Add", samples=60)
    line = "svd-branch: {rank: 4, min_gain_db: 0, store: float32}"
    _, record = after(reference, x, line, line.replace("}", ", allow_no_effect: true}"))
    assert sum(reason == "float was asked for it" for _, reason in record.skipped) == 2
