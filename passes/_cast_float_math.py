"""What half precision does to constants, and which nodes are cheapest to leave in float32: arrays and numbers only.

The choice of nodes is a minimum cut. Each node is half or float32; a node that could be half costs its extra memory traffic if it
stays float32, and a value costs one Cast if a reader wants the other type than its producer makes. Both sums are linear in
the labels with one auxiliary node a value and direction, so that the minimum is exact (Ford and Fulkerson; Greig, Porteous and
Seheult 1989 for labels).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from graphq.half import Half
from graphq.noise import decibel

BORDER = -1
"""Stands for what lies outside and is float32: the inputs and outputs of the model, and subgraphs."""

_UNIT, _MOST = 1024, 1 << 20
"""Bytes that a capacity counts in (the flow is found in 32-bit integers), and the largest finite capacity."""


@dataclass(frozen=True)
class Wire:
    """A float value between nodes, which are numbered: who makes it, who reads it, and what a Cast of it costs in bytes."""

    producer: int
    readers: tuple[int, ...]
    cast: float


def float32_nodes(half: Iterable[int], float32: Iterable[int], work: Sequence[float], wires: Iterable[Wire]) -> set[int]:
    """The nodes that are to stay float32; of equally cheap choices the one with fewest.

    Args:
        half: Nodes that are half in any case.
        float32: Nodes that are float32 in any case.
        work: What each node costs in bytes if it stays float32.
        wires: All values.
    """
    from scipy.sparse import csr_array
    from scipy.sparse.csgraph import breadth_first_order, maximum_flow

    never, count = 1 << 30, len(work)
    source, sink = count, count + 1
    edges: list[tuple[int, int, int]] = [(source, node, _capacity(bytes_)) for node, bytes_ in enumerate(work)]
    edges += [(source, node, never) for node in half] + [(node, sink, never) for node in float32]
    size = sink + 1
    for wire in wires:
        producer = sink if wire.producer == BORDER else wire.producer
        readers = {sink if reader == BORDER else reader for reader in wire.readers} - {producer}
        down, up, size = size, size + 1, size + 2
        edges += [(down, producer, _capacity(wire.cast)), (producer, up, _capacity(wire.cast))]
        edges += [(reader, down, never) for reader in readers] + [(up, reader, never) for reader in readers]
    first, second, capacities = (np.array(column, np.int32) for column in zip(*edges, strict=True))
    order = np.lexsort((second, first))
    network = csr_array((capacities[order], (first[order], second[order])), (size, size), dtype=np.int32)
    network.sum_duplicates()
    network.data = np.minimum(network.data, never)
    residual = network - maximum_flow(network, source, sink).flow
    residual.data[residual.data < 0] = 0
    residual.eliminate_zeros()
    reaching = breadth_first_order(residual.T.tocsr(), sink, return_predecessors=False)
    return {int(node) for node in reaching if node < count}


def _capacity(bytes_: float) -> int:
    return int(min(max(round(bytes_ / _UNIT), 1), _MOST))


def constant_loss(array: np.ndarray, half: Half, *, bound: bool, scale: bool, min_sqnr_db: float) -> str | None:
    """Why the constant `array` must not be half; None if it may. What rounding does to weights is measured with their node.

    Args:
        bound: What is beyond the limits may become the limit: the bounds of a Clip.
        scale: Each element counts for itself: scales of activations.
        min_sqnr_db: What each scale has to keep.
    """
    finite = array[np.isfinite(array)].astype(np.float64)
    largest = float(np.abs(finite).max(initial=0.0))
    if not bound and largest > half.limit:
        return f"a constant of {largest:.3g} is beyond {half.storage}"
    rounded = half.round(finite, saturate=True).astype(np.float64)
    if array.size == 1 and finite.any() and not rounded.any():
        return f"a constant of {finite[0]:.3g} is 0 in {half.storage}"
    loss = min((decibel(a * a, (a - b) ** 2) for a, b in zip(finite, rounded, strict=True)), default=np.inf) if scale else np.inf
    return f"a scale keeps {loss:.1f} dB in {half.storage}, less than {min_sqnr_db:g}" if loss < min_sqnr_db else None
