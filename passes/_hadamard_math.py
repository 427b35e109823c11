"""Orthogonal matrices whose entries are all of one size, or nearly so: Hadamard matrices, and what stands in where there is none.

Rows of a Hadamard matrix of order n are orthogonal and hold 1 and -1 only; here it is divided by √n. Orders: 2^k (Sylvester), q + 1 and
2 (q + 1) for primes q (Paley), and twice any of them. Multiplied by one, a vector with a few large entries gets many of middle size.
"""

from __future__ import annotations

import numpy as np


def hadamard(size: int) -> np.ndarray | None:
    """An orthogonal matrix, float64 [size, size], with entries of ±1/√size and a constant first column; None if none is built here."""
    signs = _signs(size)
    return None if signs is None else signs * signs[:, :1] / np.sqrt(size)


def _signs(size: int) -> np.ndarray | None:
    if size == 1:
        return np.ones((1, 1))
    if size % 4 == 0 and (size - 1) % 4 == 3 and _is_prime(size - 1):
        return np.eye(size) + _skew(_residues(size - 1))
    if size % 4 == 0 and (size // 2 - 1) % 4 == 1 and _is_prime(size // 2 - 1):
        core = _symmetric(_residues(size // 2 - 1))
        return np.kron(core, [[1, 1], [1, -1]]) + np.kron(np.eye(size // 2), [[1, -1], [-1, -1]])
    half = _signs(size // 2) if size % 2 == 0 else None
    return None if half is None else np.kron([[1, 1], [1, -1]], half)


def _residues(prime: int) -> np.ndarray:
    """Jacobsthal matrix of a prime: 1 where the difference of row and column is a square, 0 on the diagonal, -1 elsewhere."""
    kinds = np.full(prime, -1.0)
    kinds[np.arange(1, prime) ** 2 % prime] = 1
    kinds[0] = 0
    return np.asarray(kinds[(np.arange(prime)[:, None] - np.arange(prime)) % prime])


def _skew(jacobsthal: np.ndarray) -> np.ndarray:
    ones = np.ones((len(jacobsthal), 1))
    return np.block([[np.zeros((1, 1)), ones.T], [-ones, jacobsthal]])


def _symmetric(jacobsthal: np.ndarray) -> np.ndarray:
    ones = np.ones((len(jacobsthal), 1))
    return np.block([[np.zeros((1, 1)), ones.T], [ones, jacobsthal]])


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


def orthogonal(size: int, seed: int) -> np.ndarray:
    """An orthogonal matrix, float64 [size, size], with a constant first column.

    A Hadamard matrix, or the Kronecker product of the largest whose order divides `size` with a random orthogonal matrix.
    """
    order = next(order for order in range(size, 0, -1) if size % order == 0 and _signs(order) is not None)
    found = hadamard(order)
    assert found is not None
    if order == size:
        return found
    rest = size // order
    columns = np.random.default_rng(seed).standard_normal((rest, rest))
    columns[:, 0] = 1
    basis, triangle = np.linalg.qr(columns)
    return np.kron(basis * np.sign(np.diag(triangle)), found)


def signs(size: int, seed: int) -> np.ndarray:
    """Random 1 and -1, float64 [size]."""
    return np.random.default_rng([seed, size]).choice([-1.0, 1.0], size)


def factors(size: int) -> tuple[int, int]:
    """`size` as a product of two numbers, as close to each other as may be, for which there are Hadamard matrices; else of any two."""
    pairs = [(size // small, small) for small in range(int(size**0.5), 0, -1) if size % small == 0]
    return next((pair for pair in pairs if all(_signs(order) is not None for order in pair)), pairs[0])


def rotation(size: int, seed: int, *, keeps_mean: bool = False) -> np.ndarray:
    """A random orthogonal matrix that spreads every entry over all others, float64 [size, size], for rows `x Q`.

    Args:
        keeps_mean: Let `x Q` have the mean of x, so that the rotation commutes with LayerNormalization: `Q = H diag(1, ±1...) Hᵀ` for
            a first column of H that is constant. Otherwise `Q = diag(±1) H`.
    """
    matrix, random = orthogonal(size, seed), signs(size, seed)
    if not keeps_mean:
        return random[:, None] * matrix
    random[0] = 1
    return (matrix * random) @ matrix.T
