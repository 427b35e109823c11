"""The bias of a layer: not one that only a branch of an If adds, and a branch of low rank joins what the model reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphq import ir
from graphq.editor import Editor
from graphq.executor import Executor
from graphq.passes import _bias

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 64] x, float[64, 64] w, float[64] b) => (float[N, 64] y) {
  h = MatMul(x, w)
  axes = Constant <value_ints = [0, 1]> ()
  s = ReduceSum <keepdims = 0> (x, axes)
  least = Constant <value_float = -1e9> ()
  c = Greater(s, least)
  y = If (c) <then_branch = t () => (float[N, 64] o) { o = Add(h, b) }, else_branch = e () => (float[N, 64] p) { p = Identity(x) }>
}"""


@pytest.fixture
def model(weighted: Callable[..., ir.Model]) -> ir.Model:
    return weighted(TEXT, np.random.default_rng(0))


def test_an_add_in_a_subgraph_is_no_bias(model: ir.Model) -> None:
    assert _bias.find(model.graph[0]) is None


@pytest.mark.parametrize(("lines", "least"), [
    (["svd-branch: {rank: 8, min_gain_db: 0}"], 100),
    (["insert-qdq: {weights: false, error_samples: 0}", "residual-expand: {gamma: 0.5}"], 20),
], ids=str)  # fmt: skip
def test_branches_of_layers_that_a_subgraph_reads(model: ir.Model, after: Callable[..., Any], lines: list[str], least: float) -> None:
    """The sum is read, not the rest alone: dB of the output."""
    x = np.random.default_rng(1).standard_normal((64, 64)).astype(np.float32)
    made, wanted = (Executor(one, threads=1).run({"x": x})[0] for one in (after(model, x, *lines)[0], model))
    assert 10 * np.log10(np.square(wanted).sum() / np.square(made - wanted).sum()) > least


def test_only_an_output_can_be_replaced(model: ir.Model) -> None:
    """In whichever graph it is one."""
    edit, inner = Editor(model), next(node for node in ir.all_nodes(model) if node.op_type == "Add")
    old = inner.outputs[0]
    with pytest.raises(ValueError, match="not an output"):
        edit.replace_output(model.graph[0].outputs[0], old)
    new = edit.insert(inner, "Relu", [old], output="o_relu", like=old, after=True)
    edit.replace_output(old, new)
    assert inner.graph is not None and list(inner.graph.outputs) == [new] and new.name == "o" and old.name == "o_inner"
