"""Bytes, operations, floors and verdicts are those that one gets by hand; the picture shows every point below its roof."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import pytest

CEILINGS = {"copy": 4e12, "matrix": {"float16": 8e14, "bfloat16": 8e14, "int8": 1.6e15}}


@pytest.fixture
def roofline(script: Callable[[str], ModuleType]) -> Any:
    return script("roofline")


def row(kernel: str = "w4a16_gemm", times: dict[str, float] | None = None, **changes: Any) -> dict[str, Any]:
    return {
        "kernel": kernel, "family": "llm", "shape": "8B up", "dtype": "float16", "sizes": {"m": 1}, "bytes": 8_000_000,
        "weight_bytes": 4_000_000, "operations": 32_000_000, "unit": "float16", "wrong": [], "refused": {},
        "times": {name: {"median_s": seconds} for name, seconds in (times or {}).items()}, **changes,
    }  # fmt: skip


def test_bytes_and_operations(roofline: Any) -> None:
    weight = 4096 * 2048 + 32 * 4096 * 2
    assert roofline.w4a16(1, 4096, 4096, 128, "float16") == roofline.Work(
        weight + 2 * 3 * 4096, weight, 2 * 4096**2, "float16")  # fmt: skip
    assert roofline.w4a16(3, 70, 10, 70, "bfloat16") == roofline.Work(660 + 2 * (210 + 10 + 30), 10 * 64 + 10 * 2, 4200, "bfloat16")
    assert roofline.w8a8(16, 64, 32, "float16") == roofline.Work(
        32 * 64 + 4 * 32 + 16 * 64 + 4 + 2 * (32 + 16 * 32), 32 * 64 + 4 * 32, 2 * 16 * 64 * 32, "int8")  # fmt: skip
    assert roofline.w4a8(16, 256, 32, 128, "float32") == roofline.Work(
        32 * 128 + 2 * 32 * 4 + 16 * 256 + 4 * 16 + 4 * (32 + 16 * 32), 32 * 128 + 2 * 32 * 4, 2 * 16 * 256 * 32, "int8")  # fmt: skip
    assert roofline.softmax(6, 7, "float32") == roofline.Work(2 * 42 * 4 + 20, 0, 16 * 42)
    assert roofline.softmax_codes(6, 7, "float16") == roofline.Work(42 * 2 + 6 * 4 + 20, 0, 12 * 42)
    assert roofline.attention_value(2, 3, 5, 8, "float16") == roofline.Work(
        2 * (3 * 3 + 2 * 8 * (5 + 3)) + 64, 0, 2 * 2 * 3 * 5 * 8, "float16")  # fmt: skip


def test_floor_is_the_larger_of_two_times(roofline: Any) -> None:
    assert roofline.floor_s(roofline.Work(4_000_000, 0, 8_000_000, "float16"), CEILINGS) == pytest.approx(1e-6)
    assert roofline.floor_s(roofline.Work(4_000_000, 0, 16 * 10**9, "int8"), CEILINGS) == pytest.approx(1e-5)
    assert roofline.floor_s(roofline.Work(8_000_000), CEILINGS) == pytest.approx(2e-6)
    assert roofline.ridge("float16", CEILINGS) == pytest.approx(200)


def test_ratios_are_against_the_best_of_a_kind(roofline: Any) -> None:
    one = row(times={"graphq": 2e-6, "cuBLAS": 8e-6, "torch._int_mm, sums only": 3e-6, "torch._int_mm, rescaled": 5e-6})
    assert roofline.ratio(one, roofline.CUBLAS) == pytest.approx(4)
    assert roofline.ratio(one, roofline.INT_MM) == pytest.approx(1.5)
    assert roofline.ratio(one, "another") is None and roofline.ratio(row(), roofline.CUBLAS) is None
    assert roofline.bandwidth_share(one, one["weight_bytes"], CEILINGS) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rows", "met", "missed"),
    [
        ([], [None, None], []),
        ([row()], [None, None], []),
        ([row(times={"graphq": 1.2e-6, "cuBLAS": 3.7e-6})], [True, True], []),
        ([row(times={"graphq": 1.3e-6, "cuBLAS": 3.8e-6})], [False, False], ["8B up, M = 1, float16"]),
        ([row(times={"graphq": 1.2e-6})], [True, None], []),
        ([row(times={"graphq": 1.2e-6, "cuBLAS": 3.7e-6}), row(shape="70B", wrong=["graphq"])], [False, False], ["70B, M = 1, float16"]),
        ([row(times={"graphq": 9e-6, "cuBLAS": 9e-6}, family="vit")], [None, None], []),
        ([row(times={"graphq": 9e-6, "cuBLAS": 9e-6}, sizes={"m": 16})], [None, None], []),
    ],
)
def test_a_target_is_met_by_all_of_its_cases_or_missed(roofline: Any, rows: list[Any], met: list[Any], missed: list[str]) -> None:
    """4 MB of weights in 1.25 us are 80 % of 4 TB/s."""
    found = roofline.targets(rows, CEILINGS)
    assert [one["met"] for one in found[:2]] == met and found[0]["missed_on"] == missed
    assert all(one["met"] is None for one in found[2:])


def test_targets_of_the_other_kernels(roofline: Any) -> None:
    many = row("w8a8_gemm", {"graphq": 1e-3, "torch._int_mm, sums only": 0.86e-3, "cuBLAS": 0.5e-3}, sizes={"m": 4096})
    levels = row("sulq_softmax", {"graphq": 2.4e-6, roofline.FORM: 9e-6, "torch softmax alone": 3e-6}, sizes={"rows": 5})
    assert [one["met"] for one in roofline.targets([many, levels], CEILINGS)] == [None, None, True, False, False]


def test_the_picture_shows_what_was_timed_under_its_roofs(roofline: Any) -> None:
    rows = [row(times={"graphq": 2.5e-6}), row("w8a8_gemm", {"graphq": 1e-4}, unit="int8", operations=10**11),
            row("sulq_softmax", {"graphq": 3e-6}, unit=""), row()]  # fmt: skip
    drawn = ElementTree.fromstring(roofline.picture(rows, CEILINGS, "a < b & c"))
    circles = [one for one in drawn if one.tag.endswith("circle")]
    assert len(circles) == 3 + 3  # points and legend
    words = [one.text for one in drawn if one.tag.endswith("text")]
    assert "a < b & c" in words and "copy 4.00 TB/s" in words and "int8 1600e12/s" in words
    roofs = [{key: float(one.attrib[key]) for key in ("x1", "y1", "x2", "y2")} for one in drawn if one.get("stroke") == "#c00"]
    slope, *level = roofs
    assert slope["y2"] == min(one["y1"] for one in level) and slope["x2"] == max(one["x1"] for one in level)
    x, y = (float(circles[0].attrib[key]) for key in ("cx", "cy"))
    along = slope["y1"] + (slope["y2"] - slope["y1"]) * (x - slope["x1"]) / (slope["x2"] - slope["x1"])
    decade = (roofline.HEIGHT - roofline.TOP - roofline.BOTTOM) / 3  # 10^13 to 10^16
    assert y - along == pytest.approx(decade * math.log10(1 / 0.8), abs=0.2)  # 8 MB in 2.5 us are 80 % of 4 TB/s


def test_a_picture_without_times_says_so(roofline: Any) -> None:
    for ceilings in ({}, CEILINGS):
        assert re.search("nothing was timed", roofline.picture([row()], ceilings, "dry run"))
