"""What an image is to show, drawn at random: classes, soft labels, where attention lies, which parts show something of their own."""

from __future__ import annotations

import numpy as np

BOOST = (5.0, 10.0)
"""Range of the logits of the classes that an image shows."""

MOST_BUMPS, MOST_REGIONS = 5, 4


def soft_label(random: np.random.Generator, classes: list[int], count: int) -> np.ndarray:
    """Softmax of random logits, those of `classes` drawn from `BOOST` and the others standard normal: float32 `[count]`."""
    logits = random.standard_normal(count)
    logits[classes] = random.uniform(*BOOST, len(classes))
    shares = np.exp(logits - logits.max())
    return np.asarray(shares / shares.sum(), np.float32)


def hard_label(classes: list[int], count: int) -> np.ndarray:
    """The first of `classes` alone: float32 `[count]`."""
    return np.eye(count, dtype=np.float32)[classes[0]]


def attention_prior(random: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A mixture of up to `MOST_BUMPS` Gaussians over a grid of patches, summing to 1: float32 `[rows * columns]`.

    Centres lie anywhere on the grid, standard deviations are a twentieth to a quarter of its sides, weights are uniform.
    """
    y, x = np.mgrid[:rows, :columns]
    total = np.zeros((rows, columns))
    for _ in range(random.integers(1, MOST_BUMPS, endpoint=True)):
        centre, width = random.uniform(0, [rows - 1, columns - 1]), random.uniform(0.05, 0.25, 2) * [rows, columns]
        bump = np.exp(-0.5 * (((y - centre[0]) / width[0]) ** 2 + ((x - centre[1]) / width[1]) ** 2))
        total += random.uniform() * bump / bump.sum()
    return np.asarray(total / total.sum(), np.float32).reshape(-1)


def regions(random: np.random.Generator, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """One to `MOST_REGIONS` boxes (top, left, bottom, right) that do not overlap: each within a quarter of the image of its own."""
    half = np.array([height // 2, width // 2])
    found = []
    for quarter in random.permutation(4)[: random.integers(1, MOST_REGIONS, endpoint=True)]:
        size = np.ceil(random.uniform(0.6, 1.0, 2) * half).astype(int)
        corner = np.array([quarter // 2, quarter % 2]) * half + random.integers(0, half - size, endpoint=True)
        found.append((int(corner[0]), int(corner[1]), int(corner[0] + size[0]), int(corner[1] + size[1])))
    return found
