"""Pipeline: statistics live until an edit, a pass without effect is an error, and the guilty pass is named."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
from pydantic import Field

from graphq import ir, pipeline, verify
from graphq.calibration import open_calibration
from graphq.errors import GraphqError, RecipeError, VerifyError
from graphq.executor import BATCH, SAMPLE_SIZE
from graphq.histogram import Histogram
from graphq.observers import ChannelRange, Moments, Range
from graphq.pipeline import SAMPLED_BATCHES, Pass, PassContext, fold, pass_options, run_passes
from graphq.targets import get_target

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
m (float[n, 2] x) => (float[n, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{ [one] a = MatMul(x, w)  [two] y = Neg(a) }"""
X = np.random.default_rng(0).standard_normal((11, 2)).astype(np.float32)
W = np.float32([[1, 2], [3, 4]])


@pytest.fixture
def ctx() -> PassContext:
    model = ir.from_onnx_text(TEXT)
    data = open_calibration(X, ir.inputs(model))
    return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("generic"))


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """What each run of a model was for."""
    runs: list[set[str]] = []
    fold = pipeline.fold

    def noting(model: ir.Model, observers: list[Range], *rest: object) -> object:
        runs.append({f"{tap.source} {tap.value}" for observer in observers for tap in observer.taps})
        return fold(model, observers, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "fold", noting)
    return runs


@pass_options
class Scale(Pass):
    """Multiplies the weight of the first node."""

    name: ClassVar[str] = "scale"

    factor: float = 2.0
    times: int = Field(1)
    kinds: list[str] = Field(default_factory=lambda: ["MatMul"])
    limit: Annotated[int, Field(ge=0)] = 8
    mode: Literal["mul", "add"] = "mul"
    broken: bool = False

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        if self.factor == 1:
            ctx.skip(model.graph[1], "no weight")
            return
        weight = ir.constant(model.graph[0].inputs[1])
        assert weight is not None
        ctx.edit.set_weight(model.graph[0], 1, weight * self.factor)
        ctx.measure("one", factor=self.factor)
        if self.broken:
            model.graph[1].op_type = "NoSuchOperator"


@pass_options
class Idle(Pass):
    name: ClassVar[str] = "idle"
    idle_is_fine: ClassVar[bool] = True

    def apply(self, model: ir.Model, ctx: PassContext) -> None: ...


@pass_options
class Doubtful(Scale):
    name: ClassVar[str] = "doubtful"

    def check(self, model: ir.Model) -> None:
        raise VerifyError("It did not hold.")


# ---- statistics -----------------------------------------------------------------------------------------------------


def test_statistics_equal_numpy(ctx: PassContext) -> None:
    found = ctx.observe([Range("a"), ChannelRange("y", 1), Range("x", "reference")])
    product = X @ W
    assert float(found[Range("a")]["low"]) == pytest.approx(product.min(), rel=1e-6)
    np.testing.assert_allclose(found[ChannelRange("y", 1)]["high"], (-product).max(0), rtol=1e-6)
    assert float(found[Range("x", "reference")]["high"]) == X.max()


def test_one_run_serves_all_observers_of_a_model(ctx: PassContext, folds: list[set[str]]) -> None:
    ctx.observe([Range("a"), Range("y"), Range("a", "reference"), Range("a"), Moments("y")])
    assert folds == [{"reference a"}, {"current a", "current y"}]


def test_statistics_are_kept_until_an_edit(ctx: PassContext, folds: list[set[str]]) -> None:
    first = ctx.observe([Range("a")])
    assert ctx.observe([Range("a")])[Range("a")] is first[Range("a")] and len(folds) == 1
    ctx.observe([Range("a"), Range("y")])
    assert folds[1:] == [{"current y"}]
    ctx.edit.set_weight(ctx.model.graph[0], 1, W * 3)
    again = ctx.observe([Range("a")])
    assert folds[2:] == [{"current a"}]
    assert float(again[Range("a")]["high"]) == pytest.approx(3 * float(first[Range("a")]["high"]), rel=1e-6)


def test_statistics_of_the_reference_survive_edits(ctx: PassContext, folds: list[set[str]]) -> None:
    first = ctx.observe([Range("a", "reference")])
    ctx.edit.set_weight(ctx.model.graph[0], 1, W * 3)
    second = ctx.observe([Range("a", "reference"), Range("a")])
    assert folds == [{"reference a"}, {"current a"}]
    assert second[Range("a", "reference")] is first[Range("a", "reference")]
    assert float(second[Range("a")]["high"]) > float(second[Range("a", "reference")]["high"])


def test_observing_values_that_are_not_there(ctx: PassContext) -> None:
    with pytest.raises(GraphqError, match="absent"):
        ctx.observe([Range("absent")])


def test_progress_counts_samples(ctx: PassContext) -> None:
    calls: list[tuple[str, int, int]] = []
    ctx.progress = lambda *call: calls.append(call)
    ctx.observe([Range("a")])
    done = [call[1] for call in calls]
    assert done == sorted(set(done)) and done[-1] == len(X) and {call[2] for call in calls} == {len(X)}


def test_a_sweep_takes_as_many_samples_as_asked(ctx: PassContext) -> None:
    steps = list(ctx.sweep([ctx.model.graph[0]], samples=3))
    np.testing.assert_array_equal(np.concatenate(steps[0].x_cur), X[:3])
    assert sum(map(len, next(ctx.sweep([ctx.model.graph[0]])).x_cur)) == len(X)


# ---- running passes -------------------------------------------------------------------------------------------------


def test_records_say_what_each_pass_did(ctx: PassContext) -> None:
    first, second, third = run_passes([Scale(), Idle(), Scale(factor=3.0)], ctx, verify.verify_graph)
    assert (first.name, first.edits, first.options) == ("scale", {"weight": 1}, {})
    assert [(entry.where, entry.numbers) for entry in first.measurements] == [("one", {"factor": 2.0})]
    assert (second.edits, second.measurements, second.skipped) == ({}, (), ())
    assert third.edits == {"weight": 1} and third.options == {"factor": 3.0} and third.seconds >= 0
    np.testing.assert_array_equal(ir.constant(ctx.model.graph[0].inputs[1]), 6 * W)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"factor": 0.5},
        {"times": 2},
        {"kinds": ["Gemm"]},
        {"limit": 9},
        {"mode": "add"},
        {"allow_no_effect": True},
        {"times": 3, "limit": 0},
    ],
)
def test_records_hold_the_options_that_differ(ctx: PassContext, options: dict[str, object]) -> None:
    """However the default is declared."""
    assert run_passes([Scale(**options)], ctx, verify.verify_graph)[0].options == options  # type: ignore[arg-type]


def test_options_equal_to_the_default_are_left_out(ctx: PassContext) -> None:
    given = Scale(factor=2.0, times=1, kinds=["MatMul"], limit=8, mode="mul")
    assert run_passes([given], ctx, verify.verify_graph)[0].options == {}


def test_a_pass_without_effect_is_an_error(ctx: PassContext) -> None:
    with pytest.raises(RecipeError, match=r"(?s)'scale' changed nothing.*number 2 of 2.*no weight \(1\).*allow_no_effect"):
        run_passes([Idle(), Scale(factor=1)], ctx, verify.verify_graph)
    record = run_passes([Scale(factor=1, allow_no_effect=True)], ctx, verify.verify_graph)[0]
    assert record.edits == {} and record.skipped == (("Neg 'two' (?)", "no weight"),)


@pytest.mark.parametrize(("guilty", "error"), [(Scale(broken=True), "NoSuchOperator"), (Doubtful(), "It did not hold")])
def test_the_guilty_pass_is_named(ctx: PassContext, guilty: Pass, error: str) -> None:
    with pytest.raises(VerifyError, match=error) as found:
        run_passes([Scale(), guilty, Scale(factor=5)], ctx, verify.verify_graph)
    assert found.value.__notes__ == [f"  pass: {guilty.name}, number 2 of 3"]
    np.testing.assert_array_equal(ir.constant(ctx.model.graph[0].inputs[1]), 4 * W)  # the third never ran


def test_what_did_not_change_is_not_verified_again(ctx: PassContext) -> None:
    verified: list[ir.Model] = []
    run_passes([Idle(), Scale(), Idle(), Scale()], ctx, verified.append)
    assert verified == [ctx.model, ctx.model]


@pytest.mark.parametrize("options", [{"factr": 2}, {"factor": "much"}, {"limit": -1}, {"mode": "div"}])
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Scale(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("width", [3, 3 * SAMPLE_SIZE])
def test_extrema_come_from_every_batch_and_subsamples_from_some(width: int) -> None:
    """Small tensors are sampled whole, and from every batch."""
    shape = f"float[N,{width}]"
    model = ir.from_onnx_text(f'<ir_version: 10, opset_import: ["" : 21]> g ({shape} x) => ({shape} y) {{ y = Neg(x) }}')
    x = np.tile(np.arange(200, dtype=np.float32)[:, None], (1, width))
    stats = fold(model, [Histogram("y"), Range("y")], open_calibration({"x": x}, ir.inputs(model)))
    assert {float(stat["low"]) for stat in stats.values()} == {-199}
    counted = int(stats[Histogram("y")]["counts"].sum())
    if width == 3:
        assert counted == x.size
    else:
        assert SAMPLED_BATCHES * BATCH * SAMPLE_SIZE / 2 <= counted < 200 * SAMPLE_SIZE / 2


# ---- passes that keep the function ----------------------------------------------------------------------------------


@pass_options
class Claiming(Scale):
    """Says that it keeps the function, which it does with a factor of 1 / 1."""

    name: ClassVar[str] = "claiming"
    keeps_function: ClassVar[bool] = True


def test_a_pass_that_changes_the_function_and_says_otherwise_is_named(ctx: PassContext) -> None:
    """By 3 %: 30 dB; a change of 0.1 % passes, as do passes that claim nothing."""
    run_passes([Scale(), Claiming(factor=1.001)], ctx, verify.verify_graph)
    with pytest.raises(VerifyError, match="before claiming, which should keep the function") as caught:
        run_passes([Scale(), Claiming(factor=1.03)], ctx, verify.verify_graph)
    assert "claiming, number 2 of 2" in "".join(caught.value.__notes__) and "30." in str(caught.value.where)


def test_models_larger_than_the_budget_are_not_run(ctx: PassContext) -> None:
    ctx.memory_budget = 15  # of 16 bytes of weights
    run_passes([Claiming(factor=2.0)], ctx, verify.verify_graph)


def test_outputs_that_differ_from_run_to_run_tell_nothing(ctx: PassContext) -> None:
    noisy = ir.from_onnx_text(TEXT.replace("[two] y = Neg(a)", "[two] r = RandomNormalLike(a) y = Add(a, r)"))
    other = PassContext(model=noisy, reference=ir.clone(noisy), calib=ctx.calib, held_out=ctx.calib, target=ctx.target)
    run_passes([Claiming(factor=1.001)], other, verify.verify_graph)
