"""Sums over the rows that a linear layer reads, from which the closed forms are computed; letters as in `_layer_rows`."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np

from graphq import noise


@dataclass(frozen=True)
class Sums:
    """Sums over rows of X and of R: [G, N, O], which is what the layer's output lacks of what it should be.

    Attributes:
        count: N, or the sum of the rows' weights.
        gram: XᵀX, float64 [G, D, D].
        total: Σ x, float64 [G, D].
        cross: RᵀX, float64 [G, O, D].
        lack: Σ r, float64 [G, O].
        square: Σ r² over everything.
        power: Σ y² over everything, of the output as it should be.
    """

    count: float
    gram: np.ndarray
    total: np.ndarray
    cross: np.ndarray
    lack: np.ndarray
    square: float
    power: float

    @classmethod
    def none(cls, groups: int, outputs: int, inputs: int) -> Sums:
        gram, cross = np.zeros((groups, inputs, inputs)), np.zeros((groups, outputs, inputs))
        return cls(0, gram, gram[:, 0], cross, cross[..., 0], 0.0, 0.0)

    @classmethod
    def of(cls, x: np.ndarray, r: np.ndarray, y: np.ndarray) -> Sums:
        """Of float32 rows, of which those with a massive output count less (see `graphq.noise`).

        Multiplied in float32, in less than half the time, around the means of the rows, which may be far larger than what varies:
        off by 4e-7 of `sqrt(c_ii c_jj)`, C = `centred_gram`, at most.
        """
        unit = np.sqrt(noise.row_weights(np.square(y).mean((0, 2), dtype=np.float64))).astype(np.float32)[:, None]
        count = float(np.sum(unit.astype(np.float64) ** 2))
        x_mean, r_mean = ((part * unit**2).sum(1, dtype=np.float64).astype(np.float32) / np.float32(count) for part in (x, r))
        x, r, y = (x - x_mean[:, None]) * unit, (r - r_mean[:, None]) * unit, y * unit
        x_rest, r_rest = ((part * unit).sum(1, dtype=np.float64) for part in (x, r))
        x_mean, r_mean = x_mean.astype(np.float64), r_mean.astype(np.float64)

        def product(left: np.ndarray, mean: np.ndarray, rest: np.ndarray) -> np.ndarray:
            """Σ (left + mean)ᵀ(x + x_mean)."""
            around = (left.swapaxes(1, 2) @ x).astype(np.float64)
            return around + _outer(mean, x_rest + count * x_mean) + _outer(rest, x_mean)

        square = sum(float(np.sum(part)) for part in (r.astype(np.float64) ** 2, r_mean * (2 * r_rest + count * r_mean)))
        power = float(np.sum(y.astype(np.float64) ** 2))
        total, lack = x_rest + count * x_mean, r_rest + count * r_mean
        return cls(count, product(x, x_mean, x_rest), total, product(r, r_mean, r_rest), lack, square, power)

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def moved(self, delta: np.ndarray, shift: np.ndarray | float = 0.0) -> Sums:
        """The sums once the weight is W + `delta` [G, O, D] and the bias b + `shift` [G, O]."""
        shift = np.broadcast_to(shift, self.lack.shape)
        made, added = delta @ self.gram, (delta @ self.total[..., None])[..., 0]
        cross = self.cross - made - shift[..., None] * self.total[:, None]
        lack = self.lack - added - self.count * shift
        # Σ (r - a)² = Σ r² - Σ a (r + (r - a)), for what is added, a = X deltaᵀ + shift.
        square = self.square - np.sum(delta * (self.cross + cross)) - np.sum(shift * (self.lack + lack))
        return Sums(self.count, self.gram, self.total, cross, lack, max(float(square), 0.0), self.power)

    @property
    def centred_gram(self) -> np.ndarray:
        """XᵀX with the mean of X taken out, for errors whose mean the bias takes."""
        return self.gram - _outer(self.total, self.total) / (self.count or 1)

    @property
    def mean_lack(self) -> np.ndarray:
        """What the output lacks in the mean, [G, O]; 0 of nothing."""
        return self.lack / (self.count or 1)

    @property
    def error(self) -> float:
        """Σ r² / Σ y²; 0 of nothing."""
        return self.square / max(self.power, 1e-30)


def _outer(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """[G, O] and [G, D] as [G, O, D]."""
    return left[:, :, None] * right[:, None]
