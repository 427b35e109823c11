"""Invertible linear maps of what a layer reads, `x -> x T` with `W -> T⁻¹ W`, that cost less than a matrix of all inputs.

Letters: D inputs of a layer as A blocks of B. T is block diagonal, or a Kronecker product `L ⊗ R` of two small matrices, which mixes
all inputs. Rows x: [..., D]; weights W: [D, O].
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphq.passes import _hadamard_math as hadamard


@dataclass(frozen=True, eq=False)
class Transform:
    """T, float64.

    Attributes:
        count: A.
        right: Matrices of the blocks, [A, B, B], or one for all of them, [1, B, B].
        left: L, [A, A], which then mixes the blocks; only with one `right`.
    """

    count: int
    right: np.ndarray
    left: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.left is not None and len(self.right) != 1:
            raise ValueError("blocks that are mixed have one matrix")

    @property
    def block(self) -> int:
        """B."""
        return int(self.right.shape[-1])

    @property
    def size(self) -> int:
        """D."""
        return self.count * self.block

    def rows(self, x: np.ndarray) -> np.ndarray:
        """`x T`, float64 [..., D]."""
        parts = np.einsum("...ij,ijk->...ik", x.reshape(*x.shape[:-1], self.count, self.block), self._all())
        if self.left is not None:
            parts = self.left.T @ parts
        return np.asarray(parts.reshape(x.shape))

    def undo(self, weight: np.ndarray) -> np.ndarray:
        """`T⁻¹ W`, float64 [D, O]: what a layer that reads `x T` has to multiply it by."""
        parts = np.linalg.inv(self._all()) @ weight.reshape(self.count, self.block, -1)
        if self.left is not None:
            parts = np.einsum("il,ljo->ijo", np.linalg.inv(self.left), parts)
        return np.asarray(parts.reshape(weight.shape))

    def inverse(self) -> Transform:
        """T⁻¹."""
        return Transform(self.count, np.linalg.inv(self.right), None if self.left is None else np.linalg.inv(self.left))

    def gram(self, gram: np.ndarray) -> np.ndarray:
        """`Tᵀ C T` of a Gram matrix C [D, D]: that of `x T`."""
        return self.rows(self.rows(gram).T)

    def _all(self) -> np.ndarray:
        return np.broadcast_to(self.right, (self.count, self.block, self.block))


def block_hadamard(size: int, block: int, seed: int) -> Transform:
    """A Hadamard matrix with random signs for each block (QuaRot, arXiv 2404.00456). `block` divides `size`."""
    return Transform(size // block, hadamard.rotation(block, seed)[None])


def full_hadamard(size: int, seed: int) -> Transform:
    """A Hadamard matrix with random signs for all inputs, as a Kronecker product; where there is none, it is an orthogonal matrix."""
    block, count = hadamard.factors(size)
    return Transform(count, hadamard.rotation(block, seed)[None], hadamard.rotation(count, seed + 1))


def wush(grams: np.ndarray, weight: np.ndarray, *, floor: float, damping: float) -> Transform:
    """The block diagonal T after which round to nearest costs the least, of both x and W (WUSH, arXiv 2512.00956).

    For each block, with `AAᵀ = E[xᵀx]` and `AᵀW = V S Uᵀ`, `T = A⁻ᵀ V S^½ Hᵀ`: then `x T` and `T⁻¹ W` have the same second moments up to
    a factor, spread evenly over the block by H. All blocks of `x T` have one mean square, that of x, for quantizers that share a scale.

    Args:
        grams: E[xᵀx] of each block [A, B, B].
        weight: The weights of all that read x, side by side [D, O].
        floor: Added to S, in units of its mean: what is (almost) not read shall not be made arbitrarily small.
        damping: Added to the diagonals of the Gram matrices, in units of their mean.
    """
    count, block = grams.shape[:2]
    whole = float(np.einsum("aii->", grams)) / (count * block) or 1.0
    basis, found = hadamard.orthogonal(block, 0), np.empty(grams.shape)
    for index, gram in enumerate(grams):
        moment = gram + damping * whole * np.eye(block)
        root = np.linalg.cholesky(moment)
        left, strength, _ = np.linalg.svd(root.T @ weight[index * block : (index + 1) * block])
        strength = np.concatenate([strength, np.zeros(block - len(strength))])
        strength += floor * strength.mean() if strength.any() else 1.0
        one = np.linalg.solve(root.T, left) * np.sqrt(strength) @ basis.T
        found[index] = one * np.sqrt(whole * block / np.trace(one.T @ moment @ one))
    return Transform(count, found)


def best_block(size: int, most: int, least: int, multiple: int = 1) -> int | None:
    """The block of `least` to `most` neighbours to divide `size` into: the largest that has a Hadamard matrix, or else the largest.

    A `multiple` of some number, or None if there is no such block.
    """
    sizes = [block for block in range(least, min(size, most) + 1) if size % block == block % multiple == 0]
    return max(sizes, key=lambda block: (hadamard.hadamard(block) is not None, block), default=None)
