"""The cut that decides between float32 and half, against all choices."""

from __future__ import annotations

import numpy as np
import pytest

from graphq.passes import _cast_float_math as math


def cost(chosen: set[int], work: list[float], wires: list[math.Wire]) -> float:
    def wide(node: int) -> bool:
        return node == math.BORDER or node in chosen

    return sum(work[node] for node in chosen) + sum(
        wire.cast for wire in wires if any(wide(reader) != wide(wire.producer) for reader in wire.readers)
    )


@pytest.mark.parametrize("seed", range(12))
def test_the_cut_is_the_cheapest_choice(seed: int) -> None:
    """Against all choices; costs in whole capacity units, so that nothing is rounded."""
    rng, count = np.random.default_rng(seed), 9
    work = [1024.0 * int(rng.integers(1, 6)) for _ in range(count)]
    wires = [math.Wire(math.BORDER, (0, 1), 2048.0), math.Wire(count - 1, (math.BORDER,), 3072.0)]
    wires += [math.Wire(node, tuple(rng.choice(np.arange(node + 1, count), min(2, count - 1 - node), replace=False).tolist()),
                        1024.0 * int(rng.integers(1, 9))) for node in range(count - 1)]  # fmt: skip
    half, wide = [2, 5], [3, 7]
    found = math.float32_nodes(half, wide, work, wires)
    free = [node for node in range(count) if node not in half + wide]
    choices = [{*wide, *(node for bit, node in enumerate(free) if mask >> bit & 1)} for mask in range(1 << len(free))]
    best = min(cost(choice, work, wires) for choice in choices)
    assert cost(found, work, wires) == best and set(wide) <= found and not found & set(half)
    assert len(found) == min(len(choice) for choice in choices if cost(choice, work, wires) == best)
