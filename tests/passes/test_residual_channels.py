"""residual-channels: one product, a second rounding of what reaches far, behind each kind of quantizer (ARCQuant)."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from graphq import ir, linear
from graphq.errors import RecipeError, TargetError
from graphq.executor import Executor

GOLDEN = Path(__file__).parent / "golden" / "residual_channels"
TEXT = '<ir_version: 10, opset_import: ["" : 21]>\n'
MATMUL = "g (float[N, 128] x, float[128, 32] w, float[32] b) => (float[N, 32] y) { [it] a = MatMul(x, w) y = Add(a, b) }"
GEMM = "g (float[N, 128] x, float[32, 128] w, float[32] b) => (float[N, 32] y) { [it] y = Gemm <alpha = 0.5, transB = 1> (x, w, b) }"
PAIR = (
    "g (float[N, 128] x, float[128, 32] w, float[128, 16] v) => (float[N, 48] y)"
    " { [it] a = MatMul(x, w) [too] b = MatMul(x, v) y = Concat <axis = -1> (a, b) }"
)
TOKENS = "dynamic-activations: {bits: 4, symmetric: false}"
STATIC = "insert-qdq: {activation_bits: 4, weights: false, error_samples: 0}"
WEIGHTS = {"{}": "round: {bits: 4, group_size: 32, algorithm: rtn, correct_bias: false}",
           "{format: nvfp4}": "block-float: {activations: false}"}  # fmt: skip
Case = Callable[..., tuple[ir.Model, np.ndarray, np.ndarray]]


@pytest.fixture
def outliers(weighted: Callable[..., ir.Model]) -> Case:
    """A model, rows to calibrate with and others: of 128 channels, 40 reach up to 8 times as far as the rest."""

    def outliers(text: str = MATMUL, seed: int = 0) -> tuple[ir.Model, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        size = rng.permutation(np.concatenate([2 ** (1.4 + 1.6 * rng.random(40)), np.full(88, 0.7)]))
        mix = np.eye(128) + 0.3 * rng.standard_normal((128, 128)) / np.sqrt(128)
        x = (np.clip(rng.standard_t(8, (2000, 128)) @ mix, -5, 5) * size).astype(np.float32)
        return weighted(TEXT + text, rng), x[:1000], x[1000:]

    return outliers


def error(model: ir.Model, reference: ir.Model, x: np.ndarray) -> float:
    """Noise over signal at the output."""
    made, wanted = (Executor(one).run({"x": x})[0].astype(np.float64) for one in (model, reference))
    return float(np.sum((made - wanted) ** 2) / np.sum(wanted**2))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("quantizer", [TOKENS, STATIC, None], ids=["tokens", "static", "nvfp4"])
def test_errors_fall_until_channels_are_exhausted(outliers: Case, after: Callable[..., Any], quantizer: str | None, seed: int) -> None:
    """T11, W4A4 on unseen rows: every block of channels gains 1 % at least, and none comes after those above an eighth."""
    reference, x, fresh = outliers(seed=seed)
    how, target = ("{}", "onnxruntime") if quantizer else ("{format: nvfp4}", "generic")
    plain = [quantizer, WEIGHTS[how]] if quantizer else ["block-float"]
    errors, counts = [error(after(reference, x, *plain, target=target)[0], reference, fresh)], list[int]()
    above = int(np.sum(np.abs(x).max(0) > np.abs(x).max() / 8))
    for limit in range(16, -(-above // 16) * 16 + 17, 16):
        option = how.replace("{", f"{{channels: {limit}, ").replace(", }", "}")
        model, _ = after(reference, x, *[quantizer] * bool(quantizer), f"residual-channels: {option}", WEIGHTS[how], target=target)
        errors.append(error(model, reference, fresh))
        counts.append(next(ir.shape_of(linear.weight_of(node))[0] - 128 for node in model.graph if node.name == "it"))  # type: ignore[index,operator]
    assert above >= 20 and counts[-1] == counts[-2] == -(-above // 16) * 16
    assert all(less < 0.99 * more for more, less in zip(errors[:-1], errors[1:-1], strict=False)) and errors[-1] == errors[-2]


@pytest.mark.parametrize("quantizer", [TOKENS, STATIC])
@pytest.mark.parametrize("text", [MATMUL, GEMM, PAIR])
def test_layers(outliers: Case, after: Callable[..., Any], text: str, quantizer: str) -> None:
    """Float weights: two thirds of the error are left at most. Layers that read one activation share what is appended."""
    reference, x, fresh = outliers(text)
    plain, (model, record) = after(reference, x, quantizer)[0], after(reference, x, quantizer, "residual-channels: {channels: 48}")
    assert error(model, reference, fresh) < 0.67 * error(plain, reference, fresh)
    assert len(record.measurements) == (2 if text == PAIR else 1)
    assert sum(node.op_type == "Sub" for node in model.graph) == 1


@pytest.mark.parametrize(("lines", "target", "kind", "match"), [
    (["residual-channels"], "onnxruntime", RecipeError, "its input is not quantized"),
    ([TOKENS, "residual-channels: {exclude: [it]}"], "onnxruntime", RecipeError, "excluded by the recipe"),
    ([TOKENS, "residual-channels", "residual-channels"], "onnxruntime", RecipeError, "its input is not quantized"),
    ([TOKENS, "round: {bits: 4}", "residual-channels"], "onnxruntime", RecipeError, "quantized already"),
    ([TOKENS, "residual-channels: {format: nvfp4}"], "generic", RecipeError, "its input is quantized already"),
    (["residual-channels: {format: nvfp4}"], "onnxruntime", TargetError, "does not take float4e2m1"),
])  # fmt: skip
def test_refusals(outliers: Case, after: Callable[..., Any], lines: list[str], target: str, kind: type[Exception], match: str) -> None:
    reference, x, _ = outliers()
    with pytest.raises(kind, match=match):
        after(reference, x, *lines, target=target)


def test_zeros_have_no_far_channels(outliers: Case, after: Callable[..., Any]) -> None:
    reference, x, _ = outliers()
    with pytest.raises(RecipeError, match="nothing but zeros"):
        after(reference, 0 * x, "dynamic-activations: {bits: 4}", "residual-channels")


def test_convolutions_and_branches_are_left_alone(weighted: Callable[..., ir.Model], outliers: Case, after: Callable[..., Any]) -> None:
    reference, x, _ = outliers()
    _, record = after(reference, x, "svd-branch: {rank: 4, min_gain_db: 0, store: float32}", TOKENS, "residual-channels")
    assert sum(reason == "it asks for float activations" for _, reason in record.skipped) == 2
    text = "g (float[N, 32, 2, 2] x, float[8, 32, 1, 1] w) => (float[N, 8, 2, 2] y) { [it] y = Conv(x, w) }"
    with pytest.raises(RecipeError, match="the last axis"):
        after(weighted(TEXT + text, np.random.default_rng(0)), x.reshape(-1, 32, 2, 2), STATIC, "residual-channels")


@pytest.mark.parametrize(("case", "lines"), [("tokens", [TOKENS]), ("static", [STATIC])])
def test_golden(outliers: Case, after: Callable[..., Any], case: str, lines: list[str]) -> None:
    """`GRAPHQ_GOLDEN=write` writes the files anew."""
    path = GOLDEN / f"{case}.txt"
    reference, x, _ = outliers()
    model, _ = after(reference, x, *lines, "residual-channels: {channels: 16}")
    rows = [f"{name}: {value.dtype}{list(value.shape or ())}" for name, value in model.graph.initializers.items()]
    for node in model.graph:
        rows.append(f"{node.outputs[0].name} = {node.op_type}({', '.join(value.name or '-' for value in node.inputs if value)})")
    found = "\n".join([f"opset {ir.opset(model)}", *rows, ""])
    if os.environ.get("GRAPHQ_GOLDEN") == "write":
        path.write_text(found, encoding="utf-8")
    assert found == path.read_text(encoding="utf-8")
