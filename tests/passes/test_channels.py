"""Reordered channels take with them what is remembered of their BatchNormalization, in depthwise convolutions too."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from graphq import ir
from graphq.passes._normalize_batch_norm import BATCH_NORM

TEXT = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 8, 6, 6] x, float[32, 8, 3, 3] w, float[32, 1, 3, 3] d, float[16, 32, 1, 1] v, float[32] s, float[32] o, float[32] m) =>
  (float[N, 16, 4, 4] y) {
  ones = Constant <value = float[1] {1.0}> ()  size = Constant <value_ints = [32]> ()  one = Expand(ones, size)
  a = Conv <pads = [1, 1, 1, 1]> (x, w)  r = Relu(a)
  [depthwise] e = Conv <group = 32> (r, d)  n = BatchNormalization(e, s, o, m, one)  q = Relu(n)
  y = Conv(q, v)
}"""


@pytest.mark.parametrize("line", ["channel-repair: {share: 0.25}", "nm-prune: {permute: true, exclude: [depthwise]}"])
def test_statistics_follow_their_channels(weighted: Callable[..., ir.Model], after: Callable[..., Any], line: str) -> None:
    """Each channel is known by its kernel; and equalize, which reads the statistics, goes through."""
    rng = np.random.default_rng(0)
    model, x = weighted(TEXT, rng), rng.standard_normal((16, 8, 6, 6)).astype(np.float32)
    floats, changed = after(model, x, "normalize")[0], after(model, x, "normalize", line)[0]
    before, now = (next(node for node in one.graph if node.name == "depthwise") for one in (floats, changed))
    rows = [np.asarray(ir.constant(node.inputs[1])).reshape(-1, 9) for node in (before, now)]
    order = [int(np.abs(rows[0] - row).max(1).argmin()) for row in rows[1]]
    assert len(set(order)) == len(order) == (24 if "repair" in line else 32) and order != list(range(len(order)))
    for key, part in before.meta[BATCH_NORM].items():
        if np.ndim(part):
            np.testing.assert_array_equal(now.meta[BATCH_NORM][key], part[order])
    after(model, x, "normalize", line, "equalize")
