"""spre-finetune: a pruned model gets closer to the dense one, keeps its zeros, and its branches are merged exactly."""

from __future__ import annotations

import numpy as np
import pytest

from graphq import ir, linear, sparsity
from graphq.calibration import open_calibration
from graphq.errors import RecipeError
from graphq.executor import Executor
from graphq.models import digits, onnx_path
from graphq.passes.nm_prune import NmPrune
from graphq.passes.normalize import Normalize
from graphq.passes.spre_finetune import SpreFinetune
from graphq.pipeline import Pass, PassContext, PassRecord, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph

pytest.importorskip("torch", reason="needs torch")
pytest.importorskip("sklearn", reason="needs scikit-learn's digits")

MAGNITUDE = NmPrune(n=1, m=4, score="magnitude", refit=False)


def pruned(seed: int = 0, *passes: Pass) -> PassContext:
    """digits_cnn, pruned; each seed has calibration images of its own."""
    model = ir.load(onnx_path("digits_cnn"))
    data = open_calibration({"input": digits.images("train")[0][40 * seed : 40 * (seed + 1)]}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"), seed=seed)
    run_passes((Normalize(), *(passes or (MAGNITUDE,))), ctx, verify_graph)
    return ctx


def apply(ctx: PassContext, one: Pass) -> PassRecord:
    return run_passes([one], ctx, verify_graph)[0]


def error(ctx: PassContext) -> float:
    """Noise over signal of the logits on 64 images that nothing has seen."""
    images = digits.images("test")[0][:64]
    made, wanted = (Executor(model).run({"input": images})[0].astype(np.float64) for model in (ctx.model, ctx.reference))
    return float(np.sum((made - wanted) ** 2) / np.sum(wanted**2))


def weights(ctx: PassContext) -> dict[str, np.ndarray]:
    found = {node.name or "": ir.constant(linear.weight_of(node)) for node in ctx.model.graph if node.op_type in linear.LINEAR_OPS}
    return {name: array for name, array in found.items() if array is not None}


@pytest.mark.parametrize("seed", range(3))
def test_it_gets_closer_to_the_dense_model(seed: int) -> None:
    """A quarter of the error that pruning made goes at least; every zero stays one, and nothing else becomes one."""
    ctx = pruned(seed)
    before, zeros = error(ctx), {name: array == 0 for name, array in weights(ctx).items()}
    record = apply(ctx, SpreFinetune(steps=15, batch=8, rate=0.02))
    assert error(ctx) < 0.75 * before
    assert all(np.array_equal(array == 0, zeros[name]) for name, array in weights(ctx).items())
    (numbers,) = (one.numbers for one in record.measurements)
    assert numbers["branches"] == 3 and numbers["found_db"] > numbers["sqnr_before_db"]


def test_branches_are_merged_into_what_was_trained() -> None:
    """The merged weight is `g1 W1 + g2 W2` to float32's last digits; W2 keeps to its positions."""
    torch = pytest.importorskip("torch")
    from graphq.passes._learned import Floats
    from graphq.passes._spre_torch import BranchLeaf

    ctx = pruned()
    node = next(node for node in ctx.model.graph if node.op_type == "Conv" and weights(ctx)[node.name or ""].shape == (64, 64, 3, 3))
    weight = weights(ctx)[node.name or ""]
    spatial = np.broadcast_to(sparsity.position_sparsity(weight, 0.75) < 0.75, weight.shape)
    value = linear.weight_of(node)
    assert value is not None
    leaf = BranchLeaf(Floats(value, weight, 1.0, True), spatial, 0.1, torch.device("cpu"))
    np.testing.assert_allclose(leaf.merged(), weight, atol=1e-7)
    torch.manual_seed(0)
    leaf.tensors = [tensor + torch.randn_like(tensor) for tensor in leaf.tensors]
    (one, first), (two, second) = ((w.numpy().astype(np.float64), g.numpy()[:, None, None, None]) for w, g in leaf.branches())
    np.testing.assert_allclose(leaf.merged(), first * one + second * two, atol=1e-5)
    np.testing.assert_allclose(leaf.values(hard=True)[0].numpy(), leaf.merged(), atol=1e-5)
    assert not two[~spatial].any() and not leaf.merged()[weight == 0].any() and two[spatial & (weight != 0)].all()


def test_without_the_branch_and_with_fewer_layers() -> None:
    ctx = pruned()
    names = list(weights(ctx))
    before = weights(ctx)
    record = apply(ctx, SpreFinetune(steps=25, batch=8, branch=False, exclude=(names[-1],)))
    assert record.measurements[0].numbers["branches"] == 0
    assert record.measurements[0].numbers["gained_db"] > 0
    moved = {name for name, array in weights(ctx).items() if not np.array_equal(array, before[name])}
    assert moved == set(names[:-1]), record.skipped


def test_outputs_alone_are_distilled_too() -> None:
    ctx = pruned()
    before = error(ctx)
    apply(ctx, SpreFinetune(steps=30, batch=8, features=False))
    assert error(ctx) < 0.8 * before


def test_the_same_call_twice_gives_the_same_bytes() -> None:
    made = []
    for _ in range(2):
        ctx = pruned()
        apply(ctx, SpreFinetune(steps=2, batch=8))
        made.append(ir.to_proto(ctx.model).SerializeToString())
    assert made[0] == made[1]


def test_what_does_not_help_is_not_kept() -> None:
    ctx = pruned()
    before = ir.to_proto(ctx.model).SerializeToString()
    record = apply(ctx, SpreFinetune(steps=2, batch=8, rate=100))
    assert ir.to_proto(ctx.model).SerializeToString() == before
    assert ("the model", "its error on the samples that judge did not fall") in record.skipped


def test_a_dense_model_is_refused() -> None:
    model = ir.load(onnx_path("digits_cnn"))
    data = open_calibration({"input": digits.calibration(8)}, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))
    run_passes([Normalize()], ctx, verify_graph)
    with pytest.raises(RecipeError, match="changed nothing"):
        apply(ctx, SpreFinetune())
