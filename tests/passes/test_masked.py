"""Least squares under a mask: an input that never says anything does not spoil the others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from graphq import ir
from graphq.executor import Executor
from graphq.passes import _masked


def test_inputs_that_are_always_zero() -> None:
    """Weights of dead inputs stay, the others are those of least squares (1e-4)."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 8)) * (np.arange(8) < 6)
    weight, gram = rng.standard_normal((3, 8)), x.T @ x
    mask = rng.random((3, 8)) < 0.6
    found = _masked.fit(weight, mask, gram, weight @ gram)
    for row, kept, made in zip(weight, mask, found, strict=True):
        alive = kept & (np.arange(8) < 6)
        expected = np.linalg.lstsq(x[:, alive], x @ row, rcond=None)[0]
        np.testing.assert_allclose(made[alive], expected, atol=1e-4)
        assert (made[kept & ~alive] == row[kept & ~alive]).all() and not made[~kept].any()
    assert np.isfinite(_masked.fit(weight, mask, np.zeros((8, 8)), np.zeros((3, 8)))).all()


def test_a_layer_behind_dead_units_is_pruned(weighted: Callable[..., ir.Model], after: Callable[..., Any]) -> None:
    text = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 16] x, float[16, 16] w, float[16, 8] v, float[8] c) => (float[N, 8] y) {
  h = Gemm(x, w)  s = Abs(h)  n = Neg(s)  r = Relu(n)  y = Gemm(r, v, c) }"""
    x = np.random.default_rng(1).standard_normal((100, 16)).astype(np.float32)
    model = weighted(text, np.random.default_rng(0))
    for rows in (x, x[:1]):
        pruned, _ = after(model, rows, "nm-prune")
        assert np.isfinite(Executor(pruned, threads=1).run({"x": x})[0]).all()
