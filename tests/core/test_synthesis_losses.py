"""What synthesized images are judged by and drawn to: each function against what it says, on arrays small enough to know the answer."""

from __future__ import annotations

import numpy as np
import pytest

from graphq.synthesis import labels

torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")

from graphq.synthesis import losses  # noqa: E402
from graphq.synthesis.vit_attention import active, show  # noqa: E402

SEEDS = pytest.mark.parametrize("seed", range(3))


def rng(seed: int) -> np.random.Generator:
    return np.random.default_rng(seed)


# ---- what is drawn --------------------------------------------------------------------------------------------------


@SEEDS
@pytest.mark.parametrize("grid", [(14, 14), (8, 8), (7, 16)])
def test_attention_priors_are_distributions_with_a_peak(seed: int, grid: tuple[int, int]) -> None:
    prior = labels.attention_prior(rng(seed), *grid)
    assert prior.dtype == np.float32 and prior.shape == (grid[0] * grid[1],) and (prior >= 0).all()
    assert abs(prior.sum(dtype=np.float64) - 1) < 1e-6
    assert prior.max() > 2 / len(prior)  # evenly spread attention is what they are to prevent
    assert not np.array_equal(prior, labels.attention_prior(rng(seed + 100), *grid))


@SEEDS
def test_soft_labels_are_distributions_on_their_classes(seed: int) -> None:
    label = labels.soft_label(rng(seed), [3, 7], 10)
    assert abs(label.sum(dtype=np.float64) - 1) < 1e-6 and label[[3, 7]].sum() > 0.9 and (label > 0).all()
    assert labels.hard_label([7, 3], 10).tolist() == [0, 0, 0, 0, 0, 0, 0, 1, 0, 0]


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (33, 50)])
def test_regions_lie_inside_and_do_not_overlap(size: tuple[int, int]) -> None:
    counts = set()
    for seed in range(40):
        cover, boxes = np.zeros(size, int), labels.regions(rng(seed), *size)
        for top, left, bottom, right in boxes:
            assert 0 <= top < bottom <= size[0] and 0 <= left < right <= size[1]
            cover[top:bottom, left:right] += 1
        assert cover.max() == 1
        counts.add(len(boxes))
    assert counts == {1, 2, 3, 4}


# ---- losses ---------------------------------------------------------------------------------------------------------


def test_cross_entropy_of_a_distribution_is_least_at_itself() -> None:
    target = torch.softmax(torch.tensor([[1.0, 2.0, 0.5], [0.0, 0.0, 3.0]]), dim=1)
    at_itself = losses.cross_entropy(target.log(), target)
    assert torch.allclose(at_itself, -(target * target.log()).sum(dim=1), atol=1e-6)
    assert (losses.cross_entropy(target.log() + torch.tensor([[0.3, 0.0, 0.0]]), target) > at_itself).all()


def test_total_variation_is_the_mean_step_to_a_neighbour() -> None:
    steps = torch.arange(4.0).expand(2, 1, 4, 4)  # 1 to the right, 0 downwards
    assert torch.allclose(losses.total_variation(steps, 2.0), torch.tensor(0.5**0.5 / 2), atol=1e-5)
    assert losses.total_variation(torch.full((1, 3, 5, 5), 7.0), 1.0).item() < 1e-5
    tiled = torch.from_numpy(rng(0).standard_normal((1, 1, 8, 8), np.float32))
    assert torch.allclose(losses.total_variation(tiled, 1.0), losses.total_variation(tiled.expand(1, 3, 8, 8), 1.0))


def test_attention_is_compared_as_shares_of_the_patches() -> None:
    prior = torch.from_numpy(np.stack([labels.attention_prior(rng(seed), 4, 4) for seed in range(6)]).reshape(2, 3, 16))
    assert losses.attention_distance(0.2 * prior, prior).abs().max() < 1e-6
    even = torch.full((2, 3, 16), 1 / 16)
    assert torch.allclose(losses.attention_distance(even, prior), (16 * prior - 1).square().mean(dim=(1, 2)), atol=1e-5)


def test_patch_attention_is_that_of_the_class_token_or_the_mean() -> None:
    weights = torch.softmax(torch.from_numpy(rng(1).standard_normal((2, 3, 10, 10), np.float32)), dim=3)
    assert torch.equal(losses.patch_attention(weights, 9), weights[:, :, 0, 1:])
    assert torch.equal(losses.patch_attention(weights, 10), weights.mean(dim=2))


def test_diverse_patches_have_the_higher_entropy() -> None:
    random = rng(2)
    alike = 1 + 0.02 * random.standard_normal((1, 36, 16))
    diverse = alike * np.where(np.arange(36) < 18, 1, -1)[:, None] + random.standard_normal((1, 36, 16)) * 0.7
    features = torch.from_numpy(np.concatenate([alike, diverse])).requires_grad_()
    entropy = losses.similarity_entropy(features)
    assert entropy[1] > entropy[0] + 0.3
    (gradient,) = torch.autograd.grad(entropy.sum(), features)
    assert torch.isfinite(gradient).all() and gradient.abs().max() > 0


def test_the_kernel_is_a_density() -> None:
    samples, points = torch.tensor([[-0.2, 0.4]]), np.linspace(-1.5, 1.5, 601)
    density = [float(losses.kernel(samples, torch.tensor([float(point)]))) for point in points]
    assert abs(np.trapezoid(density, points) - 1) < 1e-4


@pytest.mark.parametrize("shape", [(64, 5, 7, 7), (512, 5)])
def test_statistics_are_measured_in_units_of_the_channel(shape: tuple[int, ...]) -> None:
    values = torch.from_numpy(rng(3).standard_normal(shape))
    axes = [axis for axis in range(len(shape)) if axis != 1]
    mean, deviation = values.mean(dim=axes), values.var(dim=axes, unbiased=False).sqrt()
    assert losses.statistics_distance(values, mean, deviation) < 1e-9
    far = losses.statistics_distance(values, mean + deviation, deviation)
    assert abs(float(far) - 1) < 1e-6
    assert torch.allclose(losses.statistics_distance(100 * values, 100 * (mean + deviation), 100 * deviation), far)


# ---- parts of images ------------------------------------------------------------------------------------------------


def test_gradients_outside_the_active_part_are_exactly_zero() -> None:
    images = torch.from_numpy(rng(4).standard_normal((3, 2, 16, 16), np.float32)).requires_grad_()
    boxes = [(2, 3, 9, 11), None, (8, 0, 16, 7)]
    shown = show(images, boxes)
    assert shown.shape == images.shape and torch.equal(shown[1], images[1])
    (gradient,) = torch.autograd.grad(shown.pow(3).sum(), images)
    for index, box in enumerate(boxes):
        top, left, bottom, right = box or (0, 0, 16, 16)
        outside = gradient[index].clone()
        assert outside[:, top:bottom, left:right].abs().min() > 0
        outside[:, top:bottom, left:right] = 0
        assert torch.equal(outside, torch.zeros_like(outside))


def test_steps_alternate_between_the_whole_and_its_parts_in_turn() -> None:
    assert [active(step, 4) for step in range(8)] == [0, 1, 0, 2, 0, 3, 0, 1]
    assert {active(step, 1) for step in range(8)} == {0}
    assert [active(step, 2) for step in range(4)] == [0, 1, 0, 1]
