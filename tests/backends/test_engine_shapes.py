"""The sizes that an engine is built for."""

import pytest

from graphq.backends.engine_shapes import BATCH, Input, Profile, profile
from graphq.engines import AxisRange
from graphq.errors import UsageError

IDS = Input("ids", (-1, -1), ("batch", "seq"))
PAST = Input("past", (-1, 4, -1, 8), ("batch", None, "past"))
OTHER = Input("other", (-1, 4, -1, 8), ("n", None, "past"))
INPUTS = [IDS, PAST, OTHER]
SEEN = {"ids": (1, 5), "past": (1, 4, 7, 8), "other": (1, 4, 7, 8)}


def fixed(*sizes: int) -> list[AxisRange]:
    return [(size, size, size) for size in sizes]


def test_without_wishes_sizes_end_at_the_data_and_that_is_said() -> None:
    assert profile([IDS, PAST], SEEN, {}, 1) == Profile(
        {"ids": (BATCH, (1, 5, 5)), "past": (BATCH, (4, 4, 4), (1, 7, 7), (8, 8, 8))}, ("ids axis 1 (seq)", "past axis 2 (past)")
    )
    assert profile([IDS], SEEN, {}, None).shapes == {"ids": (BATCH, (5, 5, 5))}


def test_a_wish_goes_for_its_symbol_and_for_the_batch_of_all() -> None:
    found = profile(INPUTS, SEEN, {"past": [(2, 3, 4), *fixed(4), (0, 16, 128), *fixed(8)]}, 1)
    assert found.shapes["other"] == ((2, 3, 4), (4, 4, 4), (0, 16, 128), (8, 8, 8))
    assert found.shapes["ids"] == ((2, 3, 4), (1, 5, 5)) and found.capped == ("ids axis 1 (seq)",)


def test_fixed_inputs_need_no_range() -> None:
    assert profile([Input("x", (1, 3), (None, None))], {"x": (1, 3)}, {}, 1) == Profile({}, ())


@pytest.mark.parametrize(("asked", "reason"), [
    ({"nothing": fixed(1)}, "no such input"), ({"ids": fixed(1)}, "has 2 axes, not 1"),
    ({"ids": [(2, 1, 3), (1, 1, 1)]}, "axis 0 is not in the order"),
    ({"ids": fixed(0, 1)}, "axis 0 is not in the order"), ({"past": fixed(1, 5, 1, 8)}, "axis 1 is fixed to 4"),
    ({"past": fixed(1, 4, 2, 8), "other": fixed(1, 4, 3, 8)}, "'past' is asked for in two ranges"),
    ({"ids": fixed(1, 2), "past": fixed(2, 4, 2, 8)}, "in two ranges"),
])  # fmt: skip
def test_what_fits_nothing_is_refused_with_the_reason(asked: dict[str, list[AxisRange]], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        profile(INPUTS, SEEN, asked, 1)
