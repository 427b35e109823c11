"""Every pass of the catalog keeps the promises that recipes, reports and documentation rely on."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest
from pydantic import TypeAdapter

from graphq.passes import CATALOG
from graphq.pipeline import Pass
from graphq.recipe import Recipe, builtin_recipes, catalog, load_recipe, parse_recipe, pass_class, recipe_schema, recipe_text

TESTS = Path(__file__).parent / "passes"
ALL_PASSES = pytest.mark.parametrize("name", sorted(CATALOG))
ALL_RECIPES = pytest.mark.parametrize("name", sorted(builtin_recipes()))


def own_fields(cls: type[Pass]) -> list[str]:
    return [field.name for field in dataclasses.fields(cls) if field.name != "allow_no_effect"]


def test_catalog_is_found_through_its_entry_point() -> None:
    assert CATALOG.items() <= catalog().items()


@ALL_PASSES
def test_name_is_kebab_case_and_the_class_is_called_alike(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", name)
    cls = pass_class(name)
    assert cls.name == name
    assert cls.__name__ == "".join(word.capitalize() for word in name.split("-"))
    assert cls.__module__ == f"graphq.passes.{name.replace('-', '_')}"


@ALL_PASSES
def test_pass_is_a_frozen_value_that_needs_no_option(name: str) -> None:
    one = pass_class(name)()
    assert one == pass_class(name)()
    with pytest.raises(dataclasses.FrozenInstanceError):
        one.allow_no_effect = True  # type: ignore[misc]


@ALL_PASSES
def test_pass_is_documented_with_each_option(name: str) -> None:
    cls = pass_class(name)
    text = cls.__dict__.get("__doc__") or ""
    assert text and not text.startswith(f"{cls.__name__}("), "dataclass wrote the docstring"
    assert [option for option in own_fields(cls) if not re.search(rf"\b{option}\b", text)] == []


@ALL_PASSES
def test_pass_has_a_test_file(name: str) -> None:
    assert (TESTS / f"test_{name.replace('-', '_')}.py").is_file()


@ALL_PASSES
def test_options_survive_the_trip_through_a_recipe(name: str) -> None:
    """All options at once, each given as the text of a recipe gives it."""
    cls = pass_class(name)
    values = TypeAdapter(cls).dump_python(cls(allow_no_effect=True), mode="json")
    read = parse_recipe(json.dumps({"passes": [{name: values}]}), "all")  # JSON is YAML
    assert read.passes == (cls(allow_no_effect=True),)
    assert parse_recipe(read.to_yaml(), "all") == read


@ALL_PASSES
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="no_such_option"):
        TypeAdapter(pass_class(name)).validate_python({"no_such_option": 1})


@ALL_RECIPES
def test_recipe_loads_and_survives_the_trip_through_yaml(name: str) -> None:
    recipe = load_recipe(name)
    assert isinstance(recipe, Recipe) and recipe.name == name
    assert recipe.passes[0].name == "normalize"
    assert parse_recipe(recipe.to_yaml(), name) == recipe


@ALL_RECIPES
def test_recipe_is_explained(name: str) -> None:
    assert builtin_recipes()[name] and recipe_text(name).startswith("# ")


def test_schema_describes_every_pass_and_option() -> None:
    schema = recipe_schema()
    bare, with_options = schema["properties"]["passes"]["items"]["anyOf"]
    assert set(CATALOG) <= set(bare["enum"])
    assert json.dumps(schema)
    for name in CATALOG:
        (described, _) = with_options["properties"][name]["anyOf"]
        while "$ref" in described:
            described = schema["$defs"][described["$ref"].rpartition("/")[2]]
        assert set(described["properties"]) == {*own_fields(pass_class(name)), "allow_no_effect"}
        assert described["additionalProperties"] is False
