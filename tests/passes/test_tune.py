"""tune: each form computes the same as what it replaces, and nothing else is touched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx.reference import ReferenceEvaluator

from graphq import ir
from graphq.calibration import open_calibration, random_calibration
from graphq.passes import _tune_math as math
from graphq.passes.normalize import Normalize
from graphq.passes.tune import Tune
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph

HEAD = '<ir_version: 10, opset_import: ["" : 21]> '


def tuned(
    text: str, feeds: dict[str, np.ndarray], target: str = "onnxruntime", **weights: np.ndarray
) -> tuple[ir.Model, ir.Model, PassRecord]:
    """The model of `text` with `weights` in place of its inputs of those names, before and after the pass."""
    model = ir.from_onnx_text(HEAD + text)
    for name, array in weights.items():
        value = next(value for value in model.graph.inputs if value.name == name)
        model.graph.inputs.remove(value)
        value.const_value = ir.make_tensor(array, str(array.dtype), name)
        model.graph.register_initializer(value)
    before = ir.clone(model)
    data = open_calibration(feeds, ir.inputs(model))
    ctx = PassContext(model=model, reference=before, calib=data, held_out=data, target=get_target(target))
    return before, model, run_passes([Normalize(), Tune()], ctx, verify_graph)[1]


def outputs(model: ir.Model, feeds: dict[str, np.ndarray]) -> np.ndarray:
    return np.asarray(ReferenceEvaluator(ir.to_proto(model)).run(None, feeds)[0])


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


# ---- block-convolution ----------------------------------------------------------------------------------------------

CONV = "g (float[N,{c},{h},{w}] x, float[5,{c},{k},{k}] weight) => (float[N,5,A,B] y) {{ y = Conv<{attributes}>(x, weight) }}"


@pytest.mark.parametrize("kernel", [3, 4, 5, 7])
@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (0, 0, 1, 1), (1, 1, 1, 1), (1, 0, 2, 1), (3, 3, 3, 3)])
@pytest.mark.parametrize("stride", [2, 3])
def test_a_convolution_over_blocks_is_the_same_convolution(kernel: int, pads: tuple[int, ...], stride: int) -> None:
    rng = np.random.default_rng(kernel)
    text = CONV.format(c=3, h=12, w=18, k=kernel, attributes=f"strides=[{stride},{stride}], pads=[{','.join(map(str, pads))}]")
    feeds = {"x": rng.normal(size=(2, 3, 12, 18)).astype(np.float32)}
    before, after, record = tuned(text, feeds, weight=rng.normal(size=(5, 3, kernel, kernel)).astype(np.float32))
    if kernel > stride and record.edits:
        assert operators(after) == ["SpaceToDepth", "Conv"]
    np.testing.assert_allclose(outputs(after, feeds), outputs(before, feeds), atol=2e-5)


def test_most_convolutions_over_blocks_fit() -> None:
    """The test above would pass if none did."""
    fitting = [math.blocks_of(12, kernel, 2, before, after)[2] >= 0 for kernel in (3, 5, 7) for before in (0, 1) for after in (0, 1)]
    assert all(fitting)


@pytest.mark.parametrize(
    ("channels", "kernel", "height", "attributes"),
    [
        (8, 3, 12, "strides=[2,2]"),  # patches of many channels are gathered fast
        (3, 3, 12, "strides=[1,1]"),
        (3, 3, 13, "strides=[2,2]"),  # not a whole number of blocks
        (3, 3, 12, "strides=[2,1]"),
        (3, 3, 12, "strides=[2,2], dilations=[2,2]"),
        (3, 3, 12, 'strides=[2,2], auto_pad="SAME_UPPER"'),
        (3, 2, 12, "strides=[2,2]"),  # patches do not overlap
    ],
)
def test_other_convolutions_are_left_alone(channels: int, kernel: int, height: int, attributes: str) -> None:
    text = CONV.format(c=channels, h=height, w=12, k=kernel, attributes=attributes)
    feeds = {"x": np.ones((1, channels, height, 12), np.float32)}
    _, after, record = tuned(text, feeds, weight=np.ones((5, channels, kernel, kernel), np.float32))
    assert operators(after) == ["Conv"] and not record.edits


# ---- sum-before-norm, pooled-mean -----------------------------------------------------------------------------------

NORM = """g (float[N,4,8] a, float[N,4,8] b, float[8] gain) => (float[N,4,8] y) {{
    s = Add(a, b)
    y = LayerNormalization<axis=-1>(s, gain) {more}
}}"""


def test_a_residual_before_a_normalization_becomes_a_sum() -> None:
    rng = np.random.default_rng(0)
    feeds = {name: rng.normal(size=(2, 4, 8)).astype(np.float32) for name in "ab"}
    before, after, _ = tuned(NORM.format(more=""), feeds, gain=np.ones(8, np.float32))
    assert operators(after) == ["Sum", "LayerNormalization"]
    np.testing.assert_array_equal(outputs(after, feeds), outputs(before, feeds))


def test_a_residual_that_others_read_too_stays_an_add() -> None:
    text = NORM.format(more="z = Relu(s)").replace("(float[N,4,8] y)", "(float[N,4,8] y, float[N,4,8] z)")
    feeds = {name: np.ones((2, 4, 8), np.float32) for name in "ab"}
    assert "Add" in operators(tuned(text, feeds, gain=np.ones(8, np.float32))[1])


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("axes", [[2, 3], [-1, -2]])
def test_a_mean_over_all_positions_is_pooled(keepdims: int, axes: list[int]) -> None:
    shape = "float[N,3,1,1]" if keepdims else "float[N,3]"
    text = f"g (float[N,3,4,5] x, int64[2] axes) => ({shape} y) {{ y = ReduceMean<keepdims={keepdims}>(x, axes) }}"
    feeds = {"x": np.random.default_rng(1).normal(size=(2, 3, 4, 5)).astype(np.float32)}
    before, after, _ = tuned(text, feeds, axes=np.array(axes))
    assert operators(after) == (["GlobalAveragePool"] if keepdims else ["GlobalAveragePool", "Flatten"])
    np.testing.assert_allclose(outputs(after, feeds), outputs(before, feeds), atol=1e-6)


@pytest.mark.parametrize("axes", [[1, 2], [2], [1, 2, 3]])
def test_other_means_are_left_alone(axes: list[int]) -> None:
    text = f"g (float[N,3,4,5] x, int64[{len(axes)}] axes) => (float y) {{ y = ReduceMean<keepdims=0>(x, axes) }}"
    feeds = {"x": np.ones((2, 3, 4, 5), np.float32)}
    text = text.replace("(float y)", f"(float[{','.join('ABCD'[: 4 - len(axes)])}] y)")
    assert operators(tuned(text, feeds, axes=np.array(axes))[1]) == ["ReduceMean"]


def test_the_mean_of_a_normalization_over_channels_is_not_pooled() -> None:
    text = "g (float[N,3,4] x, int64[1] axes) => (float[N,3,1] y) { y = ReduceMean<keepdims=1>(x, axes) }"
    assert operators(tuned(text, {"x": np.ones((2, 3, 4), np.float32)}, axes=np.array([-1]))[1]) == ["ReduceMean"]


# ---- floored-mask ---------------------------------------------------------------------------------------------------

MASKED = """g (float[N,6,6] scores, float[N,1,6] keep) => (float[N,6,6] y) {{
    one = Constant<value_float=1.0>()
    huge = Constant<value_float={huge}>()
    drop = Sub(one, keep)
    mask = Mul(drop, huge)
    masked = Add(scores, mask)
    [probabilities] y = Softmax<axis=-1>(masked)
}}"""


def masked_feeds(seed: int = 0, spread: float = 3.0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    keep = (np.arange(6) < np.array([6, 4, 1, 3])[:, None]).astype(np.float32)[:, None]
    return {"scores": (spread * rng.normal(size=(4, 6, 6))).astype(np.float32), "keep": keep}


@pytest.mark.parametrize("huge", ["-10000.0", "-3.4028234663852886e+38"])
def test_masked_scores_are_cut_without_changing_a_probability(huge: str) -> None:
    feeds = masked_feeds()
    before, after, record = tuned(MASKED.format(huge=huge), feeds)
    assert operators(after)[-2:] == ["Clip", "Softmax"] and not record.skipped
    np.testing.assert_allclose(outputs(after, feeds), outputs(before, feeds), rtol=1e-6, atol=1e-12)
    new = masked_feeds(seed=1, spread=6.0)  # scores that reach further than in calibration
    np.testing.assert_allclose(outputs(after, new), outputs(before, new), rtol=1e-6, atol=1e-12)


def test_a_row_that_is_masked_throughout_stays_uniform() -> None:
    feeds = masked_feeds()
    feeds["keep"][0] = 0
    before, after, _ = tuned(MASKED.format(huge="-3.4028234663852886e+38"), feeds)
    np.testing.assert_allclose(outputs(after, feeds), outputs(before, feeds), rtol=1e-6, atol=1e-12)


def test_rows_that_lie_too_far_apart_are_refused() -> None:
    feeds = masked_feeds()
    feeds["scores"][0] += 60
    _, after, record = tuned(MASKED.format(huge="-10000.0"), feeds)
    assert "Clip" not in operators(after) and "too far apart" in record.skipped[0][1]


def test_random_scores_give_no_floor() -> None:
    model = ir.from_onnx_text(HEAD + MASKED.format(huge="-1e38"))
    data = random_calibration(ir.inputs(model), 8)
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    run_passes([Normalize(), Tune()], ctx, verify_graph)
    assert "Clip" not in operators(model)


def test_no_unmasked_score_no_floor() -> None:
    assert math.floor_for(np.full(4, -3e38)) is None and math.floor_for(np.zeros(0)) is None
    assert math.floor_for(np.array([2.5, -3e38, 10.0])) == -43.0


def test_scores_without_a_mask_are_left_alone() -> None:
    assert "Clip" not in operators(tuned(MASKED.format(huge="-1.0"), masked_feeds())[1])


@pytest.mark.parametrize("target", ["tensorrt", "tensorrt-rtx", "generic"])
def test_other_targets_keep_what_they_have(target: str) -> None:
    record: Any = tuned(MASKED.format(huge="-10000.0"), masked_feeds(), target)[2]
    assert not record.edits
