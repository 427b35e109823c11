"""Passes that compare with the float model: layers that no longer compute the same are told, and left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphq import ir
from graphq.executor import Executor
from graphq.passes.nm_prune import NmPrune

TEXT = '<ir_version: 10, opset_import: ["" : 21]>\n'
MLP = "g (float[N, 64] x, float[64, 96] w, float[96] b, float[96, 32] v) => (float[N, 32] y)"
MLP += " { [first] h = MatMul(x, w) a = Add(h, b) r = Gelu(a) [second] y = MatMul(r, v) }"
ROUND = "round: {bits: 3, layers: all, algorithm: rtn}"
LORC = "lorc: {rank: 4, min_gain_db: 0, allow_no_effect: true}"
After = Callable[..., tuple[ir.Model, Any]]


def sqnr(model: ir.Model, reference: ir.Model, x: np.ndarray) -> float:
    made, wanted = (Executor(one, threads=1).run({"x": x})[0].astype(np.float64) for one in (model, reference))
    return float(10 * np.log10(np.sum(wanted**2) / np.sum((made - wanted) ** 2)))


@pytest.fixture(autouse=True)
def _zeros_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """nm-prune stands here for a pass that changes what the model computes; that others undo its zeros is not what this is about."""
    monkeypatch.setattr(NmPrune, "check", lambda self, model: None)


@pytest.fixture
def case(weighted: Callable[..., ir.Model]) -> tuple[ir.Model, np.ndarray]:
    return weighted(TEXT + MLP, np.random.default_rng(0)), np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)


@pytest.mark.parametrize("lines", [
    ["higgs: {where: activations}"],
    ["nm-prune", "wush", ROUND],
    ["nm-prune", "rotate", ROUND],
    ["nm-prune", "svd-branch: {rank: 8, min_gain_db: 0}", ROUND],
    ["nm-prune", "equalize: {allow_no_effect: true}", ROUND],
    ["outliers: {bits: 2}", LORC],
], ids=str)  # fmt: skip
def test_a_branch_never_does_harm(case: tuple[ir.Model, np.ndarray], after: After, lines: list[str]) -> None:
    """Behind a pass that changed what a layer reads or makes, and behind another branch: no branch, or a better one."""
    reference, x = case
    plain, with_branch = (after(reference, x, *lines, *more)[0] for more in ([], [LORC]))
    assert sqnr(with_branch, reference, x) > sqnr(plain, reference, x) - 0.01


def test_equalized_values_are_not_those_of_the_reference(weighted: Callable[..., ir.Model], after: After) -> None:
    text = "g (float[N, 64] x, float[64, 64] w, float[64, 32] v) => (float[N, 32] y) { h = Gemm(x, w) r = Relu(h) y = Gemm(r, v) }"
    model, x = weighted(TEXT + text, np.random.default_rng(0)), np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)
    lines = ["nm-prune", "equalize", ROUND]
    _, record = after(model, x, *lines, LORC)
    assert [reason for _, reason in record.skipped] == ["the float model has no layer that computes the same from the same"] * 2


@pytest.mark.parametrize("transform", ["nm-prune: {permute: true, m: 8}", "higgs: {where: activations}", "rotate"])
def test_means_are_not_corrected_towards_those_of_other_channels(weighted: Callable[..., ir.Model], after: After, transform: str) -> None:
    """Whatever was permuted or rotated before: the correction costs nothing, and gains where rounding moved the mean."""
    text = ("g (float[N, 64] x, float[64, 64] w, float[64] b, float[64, 32] v, float[32] c) => (float[N, 32] y)"
            " { h = Gemm(x, w, b) r = Gelu(h) y = Gemm(r, v, c) }")  # fmt: skip
    model, x = weighted(TEXT + text, np.random.default_rng(0)), np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)
    lines = ["nm-prune", transform] if transform == "rotate" else [transform]
    lines += [] if "higgs" in transform else ["quantize-weights: {bits: 8}"]
    plain, corrected = (after(model, x, *lines, *more)[0] for more in ([], ["bias-correct: {samples: 0, allow_no_effect: true}"]))
    assert sqnr(corrected, model, x) > sqnr(plain, model, x) - 0.05


def test_a_reordered_layer_is_not_compared(case: tuple[ir.Model, np.ndarray], after: After) -> None:
    from graphq.editor import Editor
    from graphq.passes import _channels, _twins

    model, _ = after(*case, "normalize")
    twins = {node.name: node for node in ir.clone(model).graph}
    (first, second) = (node for node in model.graph if node.op_type == "MatMul")
    assert _twins.computes_the_same(first, twins[first.name]) and _twins.computes_the_same(second, twins[second.name])
    region = _channels.region(second)
    assert not isinstance(region, str)
    region.reorder(Editor(model), np.random.default_rng(0).permutation(96))
    assert not _twins.makes_the_same(first, twins[first.name])
    assert _twins.makes_the_same(second, twins[second.name]) and not _twins.computes_the_same(second, twins[second.name])


@pytest.mark.parametrize("line", ["svd-branch: {rank: 4, min_gain_db: 0}", "rotate"])
def test_twice_is_refused(case: tuple[ir.Model, np.ndarray], after: After, line: str) -> None:
    (reference, x), again = case, line.replace("}", ", allow_no_effect: true}") if "{" in line else "rotate: {allow_no_effect: true}"
    _, record = after(reference, x, line, again)
    assert not record.edits and any("already" in reason for _, reason in record.skipped)


@pytest.mark.parametrize(("shape", "is_taken"), [("1", True), ("1, 96", True), ("48, 96", False), ("48, 1", False)])
def test_a_branch_needs_one_bias_a_channel(weighted: Callable[..., ir.Model], after: After, shape: str, is_taken: bool) -> None:
    text = f"g (float[48, 64] x, float[64, 96] w, float[{shape}] c) => (float[48, 96] y) {{ y = Gemm(x, w, c) }}"
    x = np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32)
    _, record = after(weighted(TEXT + text, np.random.default_rng(0)), x, "quantize-weights: {bits: 2}", LORC)
    assert bool(record.measurements) == is_taken
    assert is_taken or record.skipped[0][1] == "its bias differs from row to row"


def test_a_weight_that_was_turned_is_the_same_layer(weighted: Callable[..., ir.Model], after: After) -> None:
    text = "g (float[N, 64] x, float[96, 64] w, float[96] c) => (float[N, 96] y) { y = Gemm <transB = 1> (x, w, c) }"
    x = np.random.default_rng(1).standard_normal((256, 64)).astype(np.float32)
    model, record = after(weighted(TEXT + text, np.random.default_rng(0)), x, "quantize-weights: {bits: 2}", LORC)
    assert record.measurements and not any(ir.attribute(node, "transB", 0) for node in model.graph)


@pytest.mark.parametrize(("before", "line"), [
    (["quantize-weights: {bits: 2}"], LORC), ([], "svd-branch: {rank: 4, min_gain_db: 0, allow_no_effect: true}"),
])  # fmt: skip
@pytest.mark.parametrize("count", [1, 2, 4])
def test_few_rows(case: tuple[ir.Model, np.ndarray], after: After, before: list[str], line: str, count: int) -> None:
    """From two rows on, one is held out: a gain is that of a row which the branch was not fitted to, and finite."""
    reference, x = case
    _, record = after(reference, x[:count], *before, line)
    if count == 1:
        assert not record.measurements and ["single row" in reason for _, reason in record.skipped].count(True) == 2
    assert all(np.isfinite(list(entry.numbers.values())).all() for entry in record.measurements)
    assert record.measurements or record.skipped
