"""Passes in every order that a recipe may ask for: what follows insert-qdq, or comes before it, must not ruin the result."""

from __future__ import annotations

from functools import cache

import numpy as np
import onnx_ir
import pytest
from onnx import numpy_helper, parser

from graphq import ir
from graphq.calibration import open_calibration
from graphq.errors import GraphqError
from graphq.executor import Executor
from graphq.passes import CATALOG
from graphq.pipeline import PassContext, run_passes
from graphq.recipe import pass_class
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

TARGETS = ("onnxruntime", "tensorrt-rtx", "generic")
LOSS_DB = 10.0
"""What another pass may cost, of what insert-qdq alone reaches."""
REFUSALS = {
    "insert-qdq": "nothing to quantize|changed nothing",
    "quantize-weights": "nothing to quantize|changed nothing",
    "equalize": "changed nothing",
    "migrate": "changed nothing",
    "aqer": "changed nothing",
    "cross-scale": "changed nothing",
    "dynamic-activations": "changed nothing",
    "ln-reparam": "No LayerNormalization or RMSNormalization",
    "mixed-precision": "changed nothing|no layer",
    "round": "changed nothing",
    "sulq-softmax": "No softmax",
    "svd-branch": "nothing to quantize",
    "digit-planes": "changed nothing|does not take uint2",
    **{
        name: "changed nothing"
        for name in (
            "awq", "channel-repair", "higgs", "lorc", "merge-parallel-conv-bn", "nm-prune", "outliers", "residual-channels",
            "residual-expand", "rotate", "spre-finetune", "wush",
        )
    },
}
"""Passes that find nothing to do behind insert-qdq and say so."""
ELSEWHERE = {
    ("block-float", "mlp", "onnxruntime"): "does not take float4e2m1",
    **{("block-float", "mlp", target): "changed nothing" for target in TARGETS[1:]},
    **{("block-float", "conv", target): "does not take float4e2m1|nothing to quantize" for target in TARGETS},
    **{("lower", model, target): "no plugins" for model in ("mlp", "conv") for target in ("onnxruntime", "tensorrt-rtx")},
    ("lower", "conv", "generic"): "changed nothing",
    **{("block-float", "mlp", target): "changed nothing" for target in ("tensorrt-rtx", "generic")},
}
"""Passes that are for other targets, or for other models."""
MODELS = {
    "mlp": "(float[N, 32] x) => (float[N, 16] y) { a = MatMul(x, w1) b = Add(a, b1) g = Gelu(b) c = MatMul(g, w2) y = Add(c, b2) }",
    "conv": "(float[N, 8, 8, 8] x) => (float[N, 8, 6, 6] y) { a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a) y = Conv(r, w2, b2) }",
}
OPTIONS = {"mixed-precision": {"size": 0.25}}
"""What passes need to be told."""
each = pytest.mark.parametrize(("model", "target"), [(model, target) for model in MODELS for target in TARGETS])


@cache
def network(name: str) -> tuple[ir.Model, dict[str, np.ndarray]]:
    """The model and its calibration data, one channel of which is larger than the others."""
    rng = np.random.default_rng(0)
    shapes = {"mlp": ((32, 48), (48,), (48, 16), (16,)), "conv": ((16, 8, 3, 3), (16,), (8, 16, 3, 3), (8,))}[name]
    x = rng.standard_normal((64, 32) if name == "mlp" else (64, 8, 8, 8)).astype(np.float32)
    x[:, 3] *= 6
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 21]>\n{name} {MODELS[name]}')
    for key, shape in zip(("w1", "b1", "w2", "b2"), shapes, strict=True):
        scale = np.sqrt(2 / np.prod(shape if name == "mlp" else shape[1:])) * (4 if name == "mlp" else 1) if len(shape) > 1 else 0.3
        proto.graph.initializer.append(numpy_helper.from_array((rng.standard_normal(shape) * scale).astype(np.float32), key))
    return onnx_ir.from_proto(proto), {"x": x}


@cache
def quality(model: str, target: str, *passes: str) -> float:
    """SQNR in dB of the result of `passes` against the original, on the calibration data."""
    original, feeds = network(model)
    data = open_calibration(feeds, ir.inputs(original))
    ctx = PassContext(model=ir.clone(original), reference=ir.clone(original), calib=data, held_out=data, target=get_target(target))
    leading = passes[: passes.index("insert-qdq")]
    plan = [pass_class(name)(allow_no_effect=position < len(leading), **OPTIONS.get(name, {})) for position, name in enumerate(passes)]
    run_passes(plan, ctx, verify_graph)
    require_legal(ctx.model, ctx.target)
    before, after = (Executor(one, threads=1).run(feeds)[0].astype(np.float64) for one in (original, ctx.model))
    return float(10 * np.log10(np.sum(before**2) / max(np.sum((before - after) ** 2), 1e-30)))


@each
def test_insert_qdq_alone(model: str, target: str) -> None:
    assert 25 < quality(model, target, "normalize", "insert-qdq") < 60


@each
@pytest.mark.parametrize("name", sorted(CATALOG))
def test_after_insert_qdq(model: str, target: str, name: str) -> None:
    """bias-correct is what this is about: an activation shifted to the middle of a symmetric range has its shift in the bias."""
    refusal = REFUSALS.get(name) or ELSEWHERE.get((name, model, target))
    if refusal:
        with pytest.raises(GraphqError, match=refusal):
            quality(model, target, "normalize", "insert-qdq", name)
    else:
        assert quality(model, target, "normalize", "insert-qdq", name) > quality(model, target, "normalize", "insert-qdq") - LOSS_DB


@each
@pytest.mark.parametrize("name", ["migrate", "equalize", "bias-correct"])
def test_before_insert_qdq(model: str, target: str, name: str) -> None:
    assert quality(model, target, "normalize", name, "insert-qdq") > quality(model, target, "normalize", "insert-qdq") - LOSS_DB


@each
def test_all_at_once(model: str, target: str) -> None:
    passes = ("normalize", "equalize", "migrate", "insert-qdq", "bias-correct")
    assert quality(model, target, *passes) > quality(model, target, "normalize", "insert-qdq") - LOSS_DB
