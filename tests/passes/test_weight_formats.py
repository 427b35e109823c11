"""The formats of weights: what a layer asks for, what the target reads, and the opset that it takes, alike in all passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphq import ir, precision, stored
from graphq.calibration import open_calibration
from graphq.editor import Editor
from graphq.errors import TargetError
from graphq.executor import Executor
from graphq.pipeline import PassContext, run_passes
from graphq.precision import Bits
from graphq.recipe import parse_recipe
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[n, 64] x, float[64, 32] w, float[32, 32] v) => (float[n, 32] y) { [asks] a = MatMul(x, w) r = Relu(a) [plain] y = MatMul(r, v) }"""
STORES = {
    "quantize-weights": "{bits: 4}", "nf4": "{format: nf4}", "outliers": "{min_gain_db: 0, most: 0.1, sigmas: 2}", "residual-expand": "{}",
    "round": "{layers: all}", "higgs": "{bits: 4}",
}  # fmt: skip
Weighted = Callable[[str, np.random.Generator], ir.Model]


def apply(model: ir.Model, line: str, target: str = "onnxruntime") -> ir.Model:
    copy, data = ir.clone(model), open_calibration({"x": x()}, ir.inputs(model))
    ctx = PassContext(model=copy, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
    run_passes(parse_recipe(f"passes:\n  - {line}\n", "test").passes, ctx, verify_graph)
    require_legal(copy, ctx.target)
    return copy


def x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32)


def storage(model: ir.Model) -> dict[str | None, set[str]]:
    """Types of the integers that each layer's weight is made of."""
    layers = [node for node in model.graph if node.op_type == "MatMul"]
    types = {node.name: {str(part.dtype) for part in stored.parts(node.inputs[1])} for node in layers}
    return {name: {kind for kind in found if "INT" in kind and kind != "INT64"} for name, found in types.items()}


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("name", STORES)
def test_what_a_layer_asks_for(weighted: Weighted, name: str, bits: int) -> None:
    """It gets that, with the opset that it needs; the other layer gets what the pass was told."""
    model = weighted(TEXT, np.random.default_rng(0))
    precision.ask(Editor(model), next(node for node in model.graph if node.name == "asks"), Bits(bits, None))
    made = apply(model, f"{name.replace('nf4', 'quantize-weights')}: {STORES[name]}")
    found = {layer: {kind[-1] for kind in kinds if kind.startswith("INT") or name != "outliers"} for layer, kinds in storage(made).items()}
    assert str(bits) in found["asks"] and "4" not in found["asks"] and "4" in found["plain"]
    assert ir.opset(made) == (25 if bits == 2 else 21)
    assert np.isfinite(Executor(made).run({"x": x()})[0]).all()


@pytest.mark.parametrize("name", STORES)
def test_what_the_target_does_not_read_is_refused_first(weighted: Weighted, name: str) -> None:
    """With the layer that asks for it, before anything is changed."""
    model = weighted(TEXT, np.random.default_rng(0))
    precision.ask(Editor(model), next(node for node in model.graph if node.name == "asks"), Bits(2, None))
    with pytest.raises(TargetError, match="tensorrt-rtx does not take int2 weights") as caught:
        apply(model, f"{name.replace('nf4', 'quantize-weights')}: {STORES[name]}", "tensorrt-rtx")
    assert "'asks'" in caught.value.where


@pytest.mark.parametrize("options", ["bits: 2", "bits: 2, numbers: 2", "bits: 2, rounding: greedy", "bits: 2, where: activations"])
def test_grids_of_two_bits(weighted: Weighted, options: str) -> None:
    """Codes of one weight are of 2 bits, those of pairs of 4: TensorRT takes the latter."""
    model = weighted(TEXT, np.random.default_rng(0))
    made = apply(model, f"higgs: {{{options}}}")
    assert storage(made)["plain"] == ({"INT4"} if "numbers" in options else {"INT2"})
    wanted, own = Executor(model).run({"x": x()})[0], Executor(made).run({"x": x()})[0]
    assert np.sum((own - wanted) ** 2) < 0.5 * np.sum(wanted**2)
    if "numbers" in options:
        assert storage(apply(model, f"higgs: {{{options}}}", "tensorrt-rtx"))["plain"] == {"INT4"}
    else:
        with pytest.raises(TargetError, match="does not take int2 weights"):
            apply(model, f"higgs: {{{options}}}", "tensorrt-rtx")


@pytest.mark.parametrize("name", ["digit-planes", "higgs", "outliers", "residual-expand", "round"])
def test_the_opset_stays_where_nothing_is_stored(weighted: Weighted, name: str) -> None:
    model: Any = weighted(TEXT.replace("21", "17"), np.random.default_rng(0))
    made = apply(model, f"{name}: {{exclude: [MatMul], allow_no_effect: true}}")
    assert ir.opset(made) == 17
