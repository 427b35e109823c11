"""The formulas of nm-prune: which weights stay, what the others make up for, and which order of channels keeps most."""

from __future__ import annotations

import numpy as np
import pytest

from graphq.passes import _masked
from graphq.passes import _nm_math as math
from graphq.passes._nm_math import Pattern
from graphq.passes._round_math import damped

SCORES: tuple[math.Score, ...] = ("magnitude", "wanda", "sparsegpt", "alps")
PATTERNS = [(2, 4), (1, 4), (4, 8), (1, 2)]


def layer(seed: int, inputs: int = 96, outputs: int = 64) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A weight [O, D], a damped Gram matrix, and rows that it has not seen, heavy-tailed and correlated."""
    rng = np.random.default_rng(seed)
    x = rng.standard_t(4, (4000, inputs)) * 10 ** rng.uniform(-1, 1, inputs)
    x = x @ np.linalg.qr(rng.standard_normal((inputs, inputs)))[0] * 10 ** rng.uniform(-0.5, 0.5, inputs)
    gram = x[:2000].T @ x[:2000]
    return rng.standard_t(5, (outputs, inputs)), damped(gram[None], 2000)[0], x[2000:]


@pytest.mark.parametrize("seed", range(5))
def test_t4_each_method_beats_the_one_before_it(seed: int) -> None:
    """METHODS.md T4, 2:4, output error on rows that were not seen: magnitude > Wanda > SparseGPT >= mask and refit."""
    weight, gram, x = layer(seed)

    def lost(found: np.ndarray) -> float:
        return float(np.sum((x @ (found - weight).T) ** 2) / np.sum((x @ weight.T) ** 2))

    magnitude, wanda, sparsegpt, alps = (math.prune(weight, gram, Pattern(2, 4, weight.shape[1]), score) for score in SCORES)
    refits = [_masked.fit(*pruned, gram, weight @ gram) for pruned in (magnitude, wanda, sparsegpt, alps)]
    assert lost(magnitude[0]) > lost(wanda[0]) > lost(sparsegpt[0]) >= lost(refits[2]) > lost(refits[3])
    assert lost(refits[1]) < lost(wanda[0]) / 2 and lost(refits[0]) < lost(magnitude[0]) / 2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("n", "m"), PATTERNS)
@pytest.mark.parametrize("score", SCORES)
def test_exactly_n_of_m_stay(score: math.Score, n: int, m: int, seed: int) -> None:
    weight, gram, _ = layer(seed)
    found, mask = math.prune(weight, gram, Pattern(n, m, 96), score)
    assert (mask.reshape(len(weight), -1, m).sum(-1) == n).all()
    assert not found[~mask].any() and not _masked.fit(found, mask, gram, weight @ gram)[~mask].any()
    if score in ("magnitude", "wanda"):
        np.testing.assert_array_equal(found[mask], weight[mask])


def test_of_equal_scores_the_first_stay() -> None:
    np.testing.assert_array_equal(math.largest(np.ones((1, 8)), 2, 4), [[True, True, False, False] * 2])


@pytest.mark.parametrize("score", SCORES)
def test_refit_is_the_least_squares_solution_of_each_output(score: math.Score) -> None:
    weight, gram, _ = layer(0)
    start, mask = math.prune(weight, gram, Pattern(2, 4, weight.shape[1]), score)
    found = _masked.fit(start, mask, gram, weight @ gram)
    for row, kept, one in zip(found, mask, weight, strict=True):
        exact = np.linalg.solve(gram[np.ix_(kept, kept)], gram[kept] @ one)
        np.testing.assert_allclose(row[kept], exact, atol=2e-2 * np.abs(exact).max())
        best = np.zeros(len(one))
        best[kept] = exact
        assert power(row - one, gram) <= power(best - one, gram) * (1 + 1e-4)


def power(delta: np.ndarray, gram: np.ndarray) -> float:
    return float(delta @ gram @ delta)


@pytest.mark.parametrize("seed", range(3))
def test_refit_never_loses_to_its_start(seed: int) -> None:
    weight, gram, _ = layer(seed)
    for score in SCORES:
        start, mask = math.prune(weight, gram, Pattern(2, 4, weight.shape[1]), score)
        found = _masked.fit(start, mask, gram, weight @ gram)
        assert all(power(a - one, gram) <= power(b - one, gram) * (1 + 1e-9) for a, b, one in zip(found, start, weight, strict=True))


def test_weights_that_fit_already_are_left_alone() -> None:
    weight, gram, _ = layer(0)
    pruned, mask = math.prune(weight, gram, Pattern(2, 4, 96), "magnitude")
    np.testing.assert_array_equal(_masked.fit(pruned, mask, gram, pruned @ gram), pruned)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("inputs", [8, 132])
def test_sparsegpt_is_the_textbooks(inputs: int, seed: int) -> None:
    """The same without blocks: each column that goes is made up for through the inverse of what is left (OBS)."""
    weight, gram, _ = layer(seed, inputs, 8)
    found, mask = math.prune(weight, gram, Pattern(2, 4, inputs), "sparsegpt")
    left, expected = weight.copy(), np.empty(weight.shape, bool)
    first = [np.linalg.inv(gram[k:, k:])[0] for k in range(inputs)]
    for k in range(inputs):
        if k % 4 == 0:
            expected[:, k : k + 4] = math.largest(left[:, k : k + 4] ** 2 / [first[j][0] for j in range(k, k + 4)], 2, 4)
        gone = np.where(expected[:, k], 0.0, left[:, k])
        left[:, k:] -= gone[:, None] * first[k] / first[k][0]
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_allclose(found, left, atol=1e-8 * np.abs(weight).max())
