"""Weights with a few exceptions: most have few bits, those far out are kept (EasyQuant, arXiv 2403.02775).

Letters: a weight as rows [O, K] (outputs, inputs), groups of g inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphq.quantizers import MIN_SCALE, QParams, Uniform
from graphq.spec import QuantSpec

ROUNDS = 30
"""Times that codes and scales are fitted to each other, at most; they settle sooner."""

STARTS = (1.0, 0.8, 0.6, 0.45)
"""Shares of the min-max scale from which that starts; the best end counts."""


@dataclass(frozen=True)
class Split:
    """A weight without its exceptions, and those.

    Attributes:
        codes: [O, K].
        qparams: Of the rows, symmetric.
        missing: float16 [O, K]: what has to be added to the exceptions, in units of `unit`; 0 elsewhere.
        unit: The largest magnitude of what is missing, so that weights of any size keep the precision of float16.
        power, noise: Sums of squares of the weight, and of what it loses.
    """

    codes: np.ndarray
    qparams: QParams
    missing: np.ndarray
    unit: np.float32
    power: float
    noise: float


def split(rows: np.ndarray, spec: QuantSpec, sigmas: float, most: float) -> Split:
    """Codes for float32 `rows` [O, K], but for what lies farther than `sigmas` deviations of its row from 0.

    Args:
        spec: Symmetric; speaks of the rows.
        most: Share of the weights that is kept at most: those that lie farthest, in deviations.
    """
    away = np.abs(rows) / np.maximum(np.sqrt(np.square(rows).mean(1, dtype=np.float64, keepdims=True)), MIN_SCALE)
    count = int(most * rows.size)
    is_kept = away > max(sigmas, float(np.partition(away, rows.size - count - 1, axis=None)[rows.size - count - 1]))
    rest = np.where(is_kept, np.float32(0), rows)
    quantizer, qparams = Uniform(spec), fit(rest, spec)
    codes = quantizer.quantize(rest, qparams)
    decoded = quantizer.dequantize(codes, qparams)
    away = np.where(is_kept, rows - decoded, np.float32(0))
    unit = np.maximum(np.abs(away).max(), MIN_SCALE, dtype=np.float32)
    missing = (away / unit).astype(np.float16)
    lost = rows - decoded - missing.astype(np.float32) * unit
    return Split(codes, qparams, missing, unit, *(float(np.sum(np.square(part), dtype=np.float64)) for part in (rows, lost)))


def fit(rows: np.ndarray, spec: QuantSpec) -> QParams:
    """Symmetric qparams of least squared error, by turns: `q = round(w / s)` and `s = Σ w q / Σ q²` over each group."""
    quantizer = Uniform(spec)
    first = quantizer.fit_weight(rows)
    best, least = first.scale, np.full(first.scale.shape, np.inf)
    groups = first.scale.reshape(len(rows), -1).shape[1]

    def sums(array: np.ndarray) -> np.ndarray:
        return array.reshape(len(rows), groups, -1).sum(2, dtype=np.float64).reshape(first.scale.shape)

    for share in STARTS:
        scale = np.maximum(first.scale * np.float32(share), MIN_SCALE)
        for _ in range(ROUNDS):
            codes = quantizer.quantize(rows, QParams(scale, first.zero_point)).astype(np.float32)
            product, square = sums(rows * codes), sums(codes * codes)
            wanted = np.where(square > 0, product / np.maximum(square, 1), scale).astype(np.float32)
            wanted = np.maximum(wanted, MIN_SCALE)
            if np.array_equal(wanted, scale):
                break
            scale = wanted
        lost = sums(np.square(quantizer.fake_quantize(rows, QParams(scale, first.zero_point)) - rows))
        best, least = np.where(lost < least, scale, best), np.minimum(lost, least)
    return QParams(best.astype(np.float32), first.zero_point)


def steps(missing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places of what is not 0 in `missing`, flattened: steps of one byte whose running sum they are; and float16 values there.

    A gap of more than 255 takes several steps, with a value of 0 where they end.
    """
    flat = missing.reshape(-1)
    places = np.flatnonzero(flat)
    ways = np.diff(places, prepend=0)
    extra = np.maximum(ways - 1, 0) // 255
    ends = np.cumsum(extra + 1) - 1
    found = np.full(int(ends[-1]) + 1 if len(ends) else 0, 255, np.uint8)
    values = np.zeros(len(found), np.float16)
    found[ends], values[ends] = ways - 255 * extra, flat[places]
    return found, values
