"""Options of an engine as the command line gives them."""

from pathlib import Path

import pytest

from graphq.engines import EngineFacts, EngineOptions, NodePrecision, parse_options
from graphq.errors import UsageError


def test_nothing_asked_is_none() -> None:
    assert parse_options([], []) is None


def test_options_and_shapes() -> None:
    found = parse_options(["sparse", "level=5", "compute-capability=8.9,12.0", "timing_cache=a.cache"], ["ids=1:8:32x128", "mask=4x1:2:3"])
    assert found == EngineOptions(
        sparse=True, level=5, compute_capability=("8.9", "12.0"), timing_cache=Path("a.cache"),
        shapes={"ids": ((1, 8, 32), (128, 128, 128)), "mask": ((4, 4, 4), (1, 2, 3))},
    )  # fmt: skip


@pytest.mark.parametrize(("texts", "shapes", "said"), [
    (["spars"], [], "did you mean 'sparse'"), (["level=6"], [], "level=6"), (["level=high"], [], "level=high"),
    (["compute_capability=89"], [], "compute_capability"), (["shapes=1"], [], "engine option"),
    (["level"], [], "level=3"), (["sparse=1"], [], "takes no value"), (["timing_cache="], [], "needs a value"),
    (["level=1", "level=2"], [], "given twice"), ([], ["x=1", "x=2"], "given twice"),
    ([], ["input"], "input=1:8:32x3x224x224"), ([], ["input=1:8x3"], "fewest:best:most"), ([], ["=3"], "NAME="),
])  # fmt: skip
def test_what_does_not_fit_is_refused(texts: list[str], shapes: list[str], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(texts, shapes)
    assert said in str(caught.value)


def test_counts_tell_apart_what_was_asked_and_got() -> None:
    nodes = [NodePrecision(f"n{index}", "int8 x int8", got, "l") for index, got in enumerate(["int8 x int8"] * 2 + ["int8 x float32", ""])]
    assert dict(EngineFacts(4, tuple(nodes), (), None).counts) == {
        "int8 x int8": 2, "int8 x int8 -> int8 x float32": 1, "int8 x int8 -> unknown": 1,
    }  # fmt: skip


@pytest.mark.parametrize(("asked", "got", "is_lost"), [
    ("int8 x int8", "int8 x int8", False), ("int8 x int8", "int8 x float32", True), ("int8 x int8", "", False),
    ("int8 x int4", "int8 x int8", False), ("float16 x int4", "float16 x float16", True), ("float32 x int8", "int8 x float32", False),
    ("float32 x float32", "float32 x float32", False),
])  # fmt: skip
def test_what_is_lost(asked: str, got: str, is_lost: bool) -> None:
    assert NodePrecision("n", asked, got, "l").is_lost == is_lost
