"""Grids of the least squared error for normally distributed numbers, and weights on them (HIGGS, arXiv 2411.17525).

A weight that a Hadamard matrix with random signs has mixed is close to normally distributed, whatever it was before: one grid serves
all groups, with the scale `|w| / √g` for each, and no data. Letters: W: rows [O, K]; groups of g inputs; p numbers a point.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from graphq.codebooks import Codebook, Coded, encode

_STEPS, _TOLERANCE = 4000, 1e-9
_FITS, _DESCENTS = 4, 3
_SIDE, _STEP = 4.5, 0.075  # The square lattice on which the normal density of the plane is summed.


@cache
def grid(bits: int, size: int) -> Codebook:
    """The `2^(bits p)` points of least mean squared error for independent normal numbers, p = `size` (1 or 2) at a time.

    Computed by Lloyd's iteration: each point goes to the mean of what is nearest to it.
    """
    points = _line(1 << bits) if size == 1 else _plane(1 << (2 * bits))
    return Codebook(points.astype(np.float32))


def _line(count: int) -> np.ndarray:
    """Points [count, 1] by the Lloyd-Max conditions (Lloyd, doi 10.1109/TIT.1982.1056489)."""
    from scipy.special import ndtri

    points = ndtri((np.arange(count) + 0.5) / count)
    for _ in range(_STEPS):
        share, mean = _cells(points)
        moved = mean / share
        if np.abs(moved - points).max() < _TOLERANCE:
            break
        points = moved
    return np.asarray(points)[:, None]


def _cells(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the normal density: ∫ φ and ∫ x φ over what is nearest to each of the ascending points."""
    from scipy.special import ndtr

    ends = np.concatenate([[-np.inf], (points[1:] + points[:-1]) / 2, [np.inf]])
    return np.diff(ndtr(ends)), -np.diff(np.exp(-np.square(ends) / 2)) / np.sqrt(2 * np.pi)


def _plane(count: int) -> np.ndarray:
    """Points [count, 2] by Lloyd's iteration on a lattice with the normal density."""
    from scipy.spatial import cKDTree

    axis = np.arange(-_SIDE, _SIDE + _STEP / 2, _STEP)
    places = np.stack(np.meshgrid(axis, axis), axis=-1).reshape(-1, 2)
    density = np.exp(-np.square(places).sum(1) / 2)
    # A sunflower: points of even spacing in the measure whose density is the square root of the normal one, as large grids have it.
    order = (np.arange(count) + 0.5) / count
    radius, angle = np.sqrt(-4 * np.log(1 - order)), np.arange(count) * np.pi * (3 - np.sqrt(5))
    points = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    for _ in range(_STEPS // 80):
        _, nearest = cKDTree(points).query(places)
        share = np.bincount(nearest, density, count)
        sums = np.stack([np.bincount(nearest, density * places[:, axis], count) for axis in (0, 1)], axis=1)
        points = np.where(share[:, None] > 0, sums / np.maximum(share, 1e-300)[:, None], points)
    return points


def scales(rows: np.ndarray, book: Codebook, group: int) -> np.ndarray:
    """A scale for each group, float32 [O, K / g], of a tiny size at least: `|w| / √g`, then what fits the points that this gives.

    The second is the least squares of w over its points, a few times in turn: a group of 64 numbers is no exact normal distribution.
    """
    groups = rows.reshape(len(rows), -1, group).astype(np.float32)
    size = np.sqrt(np.square(groups, dtype=np.float64).mean(-1))
    found = np.where(size > 0, np.maximum(size, np.finfo(np.float32).tiny), 1.0).astype(np.float32)
    for _ in range(_FITS):
        points = book.dequantize(book.quantize(groups / found[..., None]))
        fit = np.sum(groups * points, axis=-1) / np.maximum(np.sum(np.square(points), axis=-1), 1e-30)
        found = np.where(fit > 0, np.maximum(fit, np.finfo(np.float32).tiny), found).astype(np.float32)
    return found


def nearest(rows: np.ndarray, book: Codebook, group: int) -> Coded:
    """`rows` on the grid, each weight for itself: no data needed."""
    return encode(rows.astype(np.float32), book, scales(rows, book, group))


def feedback(rows: np.ndarray, book: Codebook, group: int, gram: np.ndarray) -> Coded:
    """`rows` on the grid, p columns at a time, each error made up for by the columns that are left (GPTQ, arXiv 2210.17323).

    Args:
        gram: Damped Gram matrix of what the layer reads, [K, K]; columns with the largest inputs go first.
    """
    p, scale = book.size, scales(rows, book, group)
    sizes = np.diag(gram).reshape(-1, p).sum(1)
    blocks = np.argsort(-sizes, kind="stable")
    order = (blocks[:, None] * p + np.arange(p)).reshape(-1)
    upper = np.linalg.cholesky(np.linalg.inv(gram[np.ix_(order, order)])).T
    left, places = rows[:, order].astype(np.float64), np.empty((len(rows), len(blocks)), np.int64)
    step = max(p, 128 // p * p)
    for start in range(0, len(order), step):
        stop = min(start + step, len(order))
        for at in range(start, stop, p):
            own, block = slice(at, at + p), blocks[at // p]
            size = scale[:, [block * p // group]].astype(np.float64)
            places[:, block] = book.quantize((left[:, own] / size).astype(np.float32))[:, 0]
            lost = left[:, own] - book.points[places[:, block]] * size
            left[:, own] = np.linalg.solve(upper[own, own].T, lost.T).T
            left[:, at + p : stop] -= left[:, own] @ upper[own, at + p : stop]
        left[:, stop:] -= left[:, start:stop] @ upper[start:stop, stop:]
    return Coded(book, places, scale)


def descend(rows: np.ndarray, coded: Coded, gram: np.ndarray) -> Coded:
    """Codes and scales in turn, each the best for the others as they are, so that the error `δ C δᵀ` of no row grows."""
    rows = rows.astype(np.float64)
    for _ in range(_DESCENTS):
        coded = _better_codes(rows, coded, gram)
        coded = Coded(coded.book, coded.places, _better_scales(rows, coded, gram))
    return coded


def _better_codes(rows: np.ndarray, coded: Coded, gram: np.ndarray) -> Coded:
    """One walk over the columns, p at a time: the point of least error, given all other columns."""
    book, places, group = coded.book, coded.places.copy(), rows.shape[1] // coded.scale.shape[1]
    p, points = book.size, book.points.astype(np.float64)
    delta = coded.decode() - rows
    slope = delta @ gram
    for block in range(places.shape[1]):
        own = slice(block * p, block * p + p)
        size, mine = coded.scale[:, [block * p // group]].astype(np.float64), gram[own, own]
        moves = (points - points[places[:, block], None]) * size[:, None]  # [O, L, p]
        cost = np.einsum("olp,olp->ol", moves, moves @ mine + 2 * slope[:, None, own])
        best = cost.argmin(1)
        moving = np.flatnonzero(cost[np.arange(len(best)), best] < -1e-12 * np.abs(slope[:, own]).max(initial=0.0))
        if len(moving):
            slope[moving] += moves[moving, best[moving]] @ gram[own]
            places[moving, block] = best[moving]
    return Coded(book, places, coded.scale)


def _better_scales(rows: np.ndarray, coded: Coded, gram: np.ndarray) -> np.ndarray:
    """The scales of least error for the codes, which solve a small linear system for each row; where one is not positive, those it has."""
    count, units = coded.scale.shape[1], coded.book.dequantize(coded.places).astype(np.float64)
    parts = units.reshape(len(rows), count, -1)
    system = np.empty((len(rows), count, count))
    for index in range(count):
        seen = parts[:, index] @ gram[index * parts.shape[2] : (index + 1) * parts.shape[2]]
        system[:, index] = (seen * units).reshape(parts.shape).sum(-1)
    wanted = ((rows @ gram) * units).reshape(parts.shape).sum(-1)
    system += 1e-9 * np.einsum("oaa->o", system)[:, None, None] * np.eye(count) + 1e-30 * np.eye(count)
    found = np.linalg.solve(system, wanted[..., None])[..., 0]
    is_good = np.all(np.isfinite(found) & (found >= np.finfo(np.float32).tiny), axis=1, keepdims=True)
    return np.where(is_good, found, coded.scale).astype(np.float32)
