"""D4C: what crops show, what they are compared with, and images that the small dual encoder takes for what texts say."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from graphq import ir
from graphq.errors import DataError, ModelError, UsageError
from graphq.models import digits, digits_clip, onnx_path
from graphq.synthesis import Synthesized, synthesize

torch = pytest.importorskip("torch")

from graphq.synthesis import views  # noqa: E402
from graphq.synthesis.clip import Clip, assign, info_nce  # noqa: E402

MODEL = onnx_path("digits_clip")
STILL = torch.tensor([[0.9, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 0.0, 0.0]])
"""Chances at which nothing happens."""


def scene(count: int, channels: int = 1, size: tuple[int, int] = (20, 30)) -> tuple[torch.Tensor, list[views.Box], torch.Tensor]:
    """Images, crops and masks, seeded."""
    random = np.random.default_rng(0)
    boxes = [views.random_box(random, *size) for _ in range(count)]
    images = torch.from_numpy(random.standard_normal((count, channels, *size), np.float32))
    return images, boxes, views.masks(boxes, *size)


def seen(images: torch.Tensor, boxes: list[views.Box] | None, chances: torch.Tensor | None, **kind: float) -> torch.Tensor:
    return views.foregrounds(images, boxes, chances, torch.full((images.shape[1], 1, 1), -1.0), views.Perturbation(**kind))


def with_chance(**changed: float) -> torch.Tensor:
    """`STILL`, but for one chance, by the number behind its name: `flip0=0.1`."""
    chances = STILL.clone()
    for name, value in changed.items():
        chances[0, int(name.strip("abcdefghijklmnopqrstuvwxyz"))] = value
    return chances


# ---- what crops show -----------------------------------------------------------------------------------------------------


def test_crops_have_the_asked_share_of_the_image_and_lie_anywhere() -> None:
    _, boxes, masks = scene(200, size=(64, 96))
    areas = masks.mean(dim=(1, 2, 3))
    assert 0.39 < areas.min() < 0.45 and 0.65 < areas.max() < 0.71
    assert {0} < {rows.start for rows, _ in boxes} and max(columns.stop for _, columns in boxes) == 96


@pytest.mark.parametrize("channels", [1, 3])
def test_foreground_and_background_are_made_of_complementary_pixels(channels: int) -> None:
    """By gradients: each pixel reaches one of the two views, and none both, whatever the perturbation."""
    images, boxes, masks = scene(24, channels)
    images.requires_grad_()
    chances = torch.from_numpy(np.random.default_rng(1).random((24, views.CHANCES), np.float32))
    chances[:, 1:5], chances[:, 9] = 0.5, 0.9  # a turned or erased crop may show less than all of itself
    weights = torch.randn(24, channels, 20, 30, generator=torch.Generator().manual_seed(0))
    (front,) = torch.autograd.grad((seen(images, boxes, chances, jitter=0.0) * weights).sum(), images)
    (back,) = torch.autograd.grad((views.backgrounds(images, masks, torch.randn_like(images)) * weights).sum(), images)
    torch.testing.assert_close((front != 0).float(), masks.expand_as(images), rtol=0, atol=0)
    torch.testing.assert_close((back != 0).float(), 1 - masks.expand_as(images), rtol=0, atol=0)


def test_no_perturbation_shows_anything_outside_of_the_crop() -> None:
    images, boxes, masks = scene(24)
    chances = torch.from_numpy(np.random.default_rng(2).random((24, views.CHANCES), np.float32))
    changed = torch.where(masks > 0, images, torch.tensor(1e6))
    torch.testing.assert_close(seen(images, boxes, chances), seen(changed, boxes, chances), rtol=0, atol=0)


def test_a_crop_is_enlarged_bilinearly() -> None:
    images, boxes, _ = scene(5, 3)
    expected = [torch.nn.functional.interpolate(image[None][..., rows, columns], size=(20, 30), mode="bilinear", align_corners=False)
                for image, (rows, columns) in zip(images, boxes, strict=True)]  # fmt: skip
    torch.testing.assert_close(seen(images, boxes, None), torch.cat(expected), rtol=0, atol=1e-3)
    assert seen(images, None, None) is images


@pytest.mark.parametrize(("chance", "expected"), [
    ({}, lambda image: image),
    ({"flip0": 0.1}, lambda image: image.flip(3)),
    ({"shift4": 1.0}, lambda image: image[:, :, [*range(1, 20), 19]]),  # a twentieth of the height is one row
    ({"brightness5": 1.0}, lambda image: (image + 1) * 1.4 - 1),
    ({"contrast6": 0.0}, lambda image: image.mean() + (image - image.mean()) * 0.6),
])  # fmt: skip
def test_each_perturbation_does_what_it_says(chance: dict[str, float], expected) -> None:
    images, *_ = scene(1)
    torch.testing.assert_close(seen(images, None, with_chance(**chance)), expected(images), rtol=0, atol=1e-3)


def test_rotation_keeps_pixels_square() -> None:
    """A disc stays one in an image that is not square; a bar turns by the angle."""
    y, x = np.mgrid[:20, :30] - np.array([9.5, 14.5])[:, None, None]
    disc, bar = (torch.from_numpy(part.astype(np.float32))[None, None] for part in (np.exp(-(x**2 + y**2) / 8), np.exp(-(y**2) / 8)))
    turned = seen(disc, None, with_chance(angle1=1.0), degrees=45.0)
    torch.testing.assert_close(turned, disc, rtol=0, atol=0.05)
    found = seen(bar, None, with_chance(angle1=1.0), degrees=45.0)[0, 0].numpy()
    tops = found[:, [10, 19]].argmax(0)
    assert abs(tops[1] - tops[0]) == pytest.approx(9, abs=1)


def test_blur_keeps_the_mean_of_a_bump_and_erasing_clears_a_square() -> None:
    bump = torch.zeros(1, 1, 20, 30)
    bump[0, 0, 10, 10] = 16
    blurred = seen(bump, None, with_chance(blur8=0.0))
    torch.testing.assert_close(blurred[0, 0, 9:12, 9:12], torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]), rtol=0, atol=1e-3)
    erased = seen(torch.ones(1, 3, 20, 30), None, with_chance(erase9=0.0, row10=0.999, column11=0.0))
    gone = erased[0] == 0
    assert gone.sum() == 3 * 4 * 6 and gone[:, 16:, :6].all()


# ---- what they are compared with -----------------------------------------------------------------------------------------


def test_contrast_is_the_formula() -> None:
    random = np.random.default_rng(0)
    embeddings, texts, others = (random.standard_normal((count, 4)) for count in (3, 5, 2))
    labels = np.array([4, 0, 2])
    rows = np.concatenate([texts, others])
    cosines = embeddings @ rows.T / np.linalg.norm(embeddings, axis=1)[:, None] / np.linalg.norm(rows, axis=1)
    expected = np.log(np.exp(cosines / 0.1).sum(1)) - cosines[range(3), labels] / 0.1
    tensors = [torch.from_numpy(part) for part in (embeddings, texts, labels, others)]
    np.testing.assert_allclose(info_nce(*tensors).numpy(), expected, rtol=1e-12)
    assert (info_nce(*tensors[:3]) < info_nce(*tensors)).all()


def test_every_text_is_drawn_as_often_as_the_others() -> None:
    assert np.bincount(assign(range(30), 10, 0)).tolist() == [3] * 10
    np.testing.assert_array_equal(assign(range(7, 19), 10, 0), assign(range(30), 10, 0)[7:19])
    assert assign(range(10), 10, 0).tolist() != assign(range(10), 10, 1).tolist()


# ---- the strategy --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "text.npz"
    np.savez(path, text_embedding=digits_clip.text_embeddings())
    return path


def made(text: Path, count: int = 8, steps: int = 60, seed: int = 0, **options: object) -> Synthesized:
    return synthesize(MODEL, "clip", options={"text": str(text), "flip": 0.0, **options}, count=count, steps=steps, seed=seed,
                      preprocess="inception", device="cpu")  # fmt: skip


@cache
def session() -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_model_takes_images_for_what_the_texts_say(text: Path, seed: int) -> None:
    """All of them where nothing else is asked of them; a tenth is chance."""
    images = made(text, seed=seed, structure=False, perturb=False)[digits.INPUT_NAME]
    (found,) = session().run(None, {digits.INPUT_NAME: images})
    np.testing.assert_array_equal((found @ digits_clip.text_embeddings().T).argmax(1), assign(range(8), 10, seed))
    noise = np.random.default_rng(seed).standard_normal(images.shape)
    assert variation(images) < 0.7 * variation(noise.clip(-1, 1))


def variation(images: np.ndarray) -> float:
    return float(np.abs(np.diff(images, axis=2)).mean() + np.abs(np.diff(images, axis=3)).mean())


def test_the_parts_can_be_left_out_and_each_changes_the_images(text: Path) -> None:
    parts = [{}, {"semantic": False}, {"structure": False}, {"perturb": False}, {"variation": 0.0}]
    found = [made(text, count=2, steps=3, **part)["input"] for part in parts]
    assert {one.shape for one in found} == {(2, 1, 32, 32)}
    assert len({one.tobytes() for one in found}) == len(parts)


def test_losses_fall_and_the_same_seed_gives_the_same_bytes(text: Path) -> None:
    first, again, other = (made(text, count=3, steps=20, seed=seed) for seed in (0, 0, 1))
    assert first["input"].tobytes() == again["input"].tobytes() != other["input"].tobytes()
    assert set(first.facts.last) == {"contrast", "variation"}
    assert sum(first.facts.last.values()) < sum(first.facts.first.values())
    assert np.abs(first["input"]).max() <= 1


def test_texts_are_needed_and_have_to_fit(text: Path, tmp_path: Path) -> None:
    model = ir.load(MODEL)
    assert Clip(text=text).evidence(model) == "10 texts, embeddings of 32 numbers"
    with pytest.raises(UsageError, match="The strategy clip has no texts"):
        Clip().evidence(model)
    with pytest.raises(DataError, match="no such file"):
        Clip(text=tmp_path / "none.npz").evidence(model)
    np.savez(tmp_path / "other.npz", embedding=np.ones((2, 32), np.float32))
    with pytest.raises(DataError, match="holds no text embeddings"):
        Clip(text=tmp_path / "other.npz").evidence(model)
    np.savez(tmp_path / "short.npz", text_embedding=np.ones((2, 31), np.float32))
    with pytest.raises(ModelError, match="no embedding of images that fits the texts"):
        Clip(text=tmp_path / "short.npz").evidence(model)
