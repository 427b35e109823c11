"""The rows of benchmarks/synthesis.py can be measured, and a stopped run keeps those that it has."""

import argparse
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from graphq.recipe import load_recipe, parse_recipe
from graphq.synthesis import make_strategy

pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")


def test_every_way_and_recipe_exists(script: Callable[[str], ModuleType]) -> None:
    synthesis = script("synthesis")
    for ways in synthesis.WAYS.values():
        assert len({way[0] for way in ways}) == len(ways)
        for _, strategy, options in ways:
            assert not strategy or make_strategy(strategy, options)
    for model, name, text in synthesis.RECIPES:
        assert model in synthesis.WAYS and (load_recipe(name) if text is None else parse_recipe(text, name))


def test_a_row_is_measured_once(script: Callable[[str], ModuleType], tmp_path: Path) -> None:
    synthesis, tables = script("synthesis"), script("tables")
    arguments = argparse.Namespace(out=tmp_path, count=8, steps=2, dev=50, scratch=tmp_path)
    way = ("natural", "natural", {})
    row = synthesis.measure((synthesis.CNN, "int8", None), way, arguments)
    assert row["images"] == 450 and row["dev"] > 90 and row["sqnr_db"] > 20 and row["lost"] < 5
    synthesis.write([row], 2, arguments)
    (found,) = tables.earlier(tmp_path / "synthesis.csv", synthesis.KEY).values()
    assert found == pytest.approx({key: value for key, value in row.items() if value is not None})
    assert synthesis.is_known(found, way, arguments)
    arguments.count = 9
    assert not synthesis.is_known(found, way, arguments)
    assert "natural" in (tmp_path / "synthesis.md").read_text()
