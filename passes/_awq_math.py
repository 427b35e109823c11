"""Scales of input channels that make the rounding of a weight hurt less: AWQ, arXiv 2306.00978.

`X W = (X / s) (diag(s) W)`: a weight that meets a large activation is rounded after it was scaled up, so that its error, which the
activation then divides, is smaller; the others of its group pay for it. Letters: X: [N, D] rows; weights as rows [O, D]; s: [D].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphq.noise import row_weights
from graphq.passes import _round_math
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, PerGroup, QuantSpec

POINTS = 20
"""Exponents rho that are tried: 0, 1/20, ... 19/20."""

CLIPS = _round_math.CLIPS[:18:4]
"""Shares of a range that are tried for each of them, down to 0.47; the pass that rounds searches more finely."""

OUTPUTS = 128
"""Outputs of each layer to judge by, at most: rows of a weight are rounded independently, and errors are sums over them."""


@dataclass(frozen=True)
class Layer:
    """What some layers read together, and how their weights will be rounded.

    Attributes:
        x: Rows of the activation, float32 [N, D].
        weights: Of each layer, float32 [O, D].
        specs: Format of each weight's rows (see `rows_of`).
        is_clipped: Whether scales are searched for that clip.
    """

    x: np.ndarray
    weights: Sequence[np.ndarray]
    specs: Sequence[QuantSpec]
    is_clipped: bool = True

    def noise(self, s: np.ndarray, x: np.ndarray | None = None) -> float:
        """Squared error of `(X / s) Q(diag(s) W)` against `X W`, summed over the layers, on `x` or the rows that scales are chosen for.

        Massive rows count less (see `graphq.noise`).
        """
        x = self.x if x is None else x
        unit = np.sqrt(row_weights(np.square(x).sum(1, dtype=np.float64))).astype(np.float32)
        x = x * unit[:, None]
        return float(sum(np.sum(np.square(x @ (error / s).T), dtype=np.float64) for error in self._errors(s)))

    def _errors(self, s: np.ndarray) -> list[np.ndarray]:
        """`Q(diag(s) W) - diag(s) W` of each layer, for scales that are chosen by what each input of it weighs."""
        importance = (np.square(self.x / s).mean(0, dtype=np.float64) + 1e-30)[None] if self.is_clipped else None
        found = []
        for weight, spec in zip(self.weights, self.specs, strict=True):
            scaled = weight * s
            qparams = _round_math.fit(scaled[None], spec, importance, CLIPS)
            found.append(Uniform(spec).fake_quantize(scaled, qparams) - scaled)
        return found


def rows_of(spec: QuantSpec, group_size: int | None) -> QuantSpec:
    """`spec` for a weight as rows [O, D]: a scale each, or one for `group_size` neighbours."""
    return QuantSpec(spec.bits, spec.signed, spec.symmetric, PerGroup(1, group_size) if group_size else PerAxis(0))


def sample(weight: np.ndarray) -> np.ndarray:
    """At most `OUTPUTS` of the rows of `weight` [O, D], spread evenly."""
    return weight[np.linspace(0, len(weight) - 1, min(OUTPUTS, len(weight))).astype(np.int64)]


def scale(size: np.ndarray, rho: float) -> np.ndarray:
    """`s = mean|x|^rho / sqrt(max * min)` of that, float32 [D], for `size = mean|x|` [D]; a channel that is never used keeps 1."""
    used = size > size.max(initial=0.0) * 1e-4
    s = np.where(used, size, 1.0) ** rho
    reach = s[used] if used.any() else np.ones(1)
    return np.asarray(np.where(used, s / np.sqrt(reach.max() * reach.min()), 1.0), np.float32)


def best(layer: Layer, size: np.ndarray, points: int = POINTS) -> tuple[np.ndarray, float]:
    """The `s` with the least noise among `points` exponents, and its rho; 0 means that nothing is scaled."""
    rhos = [point / points for point in range(points)]
    scales = [scale(size, rho) for rho in rhos]
    least = int(np.argmin([layer.noise(s) for s in scales]))
    return scales[least], rhos[least]
