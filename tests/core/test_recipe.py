"""Recipes read from YAML and written back, and every way in which one can be wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Annotated, ClassVar, Literal

import pytest
import yaml
from pydantic import Field

from graphq import recipe as recipes
from graphq.errors import RecipeError
from graphq.gates import Gates
from graphq.pipeline import Pass, pass_options
from graphq.recipe import MAX_BYTES, Recipe, builtin_recipes, catalog, load_recipe, parse_recipe, pass_class, recipe_schema


@pass_options
class Polish(Pass):
    """A pass with an option of every kind."""

    name: ClassVar[str] = "polish"
    bits: int = Field(8, ge=2, le=8)
    damping: Annotated[float, Field(gt=0)] = 0.01
    mode: Literal["fast", "exact"] = "fast"
    keep: tuple[str, ...] = ()
    limits: dict[str, float] = Field(default_factory=dict)
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.mode == "exact" and self.bits == 2:
            raise ValueError("2 bits cannot be exact")

    def apply(self, model: object, ctx: object) -> None:
        """Never called here."""


@pass_options
class Needy(Pass):
    """A pass with an option that has no default."""

    name: ClassVar[str] = "needy"
    size: int

    def apply(self, model: object, ctx: object) -> None:
        """Never called here."""


class Odd:
    """Not a pass."""

    name = "odd"


TARGETS = {
    "polish": "recipe_test_passes:Polish",
    "needy": "recipe_test_passes:Needy",
    "odd": "recipe_test_passes:Odd",
    "renamed": "recipe_test_passes:Polish",
    "abstract": "graphq.pipeline:Pass",
    "absent": "recipe_test_passes:Absent",
    "lost": "no_such_module:Lost",
}


@pytest.fixture(autouse=True)
def own_catalog(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The catalog holds the passes of this file and nothing else."""
    module = ModuleType("recipe_test_passes")
    module.__dict__.update(Polish=Polish, Needy=Needy, Odd=Odd, CATALOG=TARGETS)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(recipes, "catalog", lambda: TARGETS)
    catalog.cache_clear()
    yield module
    catalog.cache_clear()


def read(text: str) -> Recipe:
    return parse_recipe(text, "mine", "mine.yaml")


def refusal(text: str) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        read(text)
    return caught.value


# ---- reading and writing --------------------------------------------------------------------------------------------


def test_names_options_and_gates() -> None:
    text = "description: All.\npasses:\n- polish\n- polish: {bits: 4, keep: [a, b]}\n- needy:\n    size: 3\ngates: {min_sqnr_db: 30}\n"
    passes = (Polish(), Polish(bits=4, keep=("a", "b")), Needy(size=3))
    assert read(text) == Recipe(name="mine", description="All.", passes=passes, gates=Gates(min_sqnr_db=30))


@pytest.mark.parametrize("text", ["1e-3", "0.001", "'1e-3'", "1.0e-3"])
def test_numbers_that_yaml_takes_for_text(text: str) -> None:
    assert read(f"passes: [polish: {{damping: {text}}}]").passes == (Polish(damping=0.001),)
    assert read(f"passes: [polish]\ngates: {{min_speedup: {text}}}").gates == Gates(min_speedup=0.001)


@pytest.mark.parametrize("entry", ["polish", "polish:", "polish: {}", "{polish: null}"])
def test_no_options_can_be_written_in_many_ways(entry: str) -> None:
    assert read(f"passes:\n- {entry}\n").passes == (Polish(),)


@pytest.mark.parametrize(
    "one",
    [
        Recipe(name="mine", passes=(Polish(),)),
        Recipe(name="mine", description="Überall: 'quoted' # no comment", passes=(Polish(damping=1e-30), Polish(damping=1e-30))),
        Recipe(name="mine", passes=(Polish(keep=("yes", "1e-3", "")), Polish(limits={"8": 0.5}, clip=0.0, allow_no_effect=True))),
        Recipe(name="mine", passes=(Needy(size=0),), gates=Gates(max_accuracy_drop=0, min_cosine=0.999, max_size_ratio=2)),
    ],
)
def test_yaml_round_trip(one: Recipe) -> None:
    assert read(one.to_yaml()) == one


def test_only_what_differs_from_the_defaults_is_written() -> None:
    one = Recipe(name="mine", passes=(Polish(), Polish(bits=4, mode="fast"), Needy(size=1)))
    assert yaml.safe_load(one.to_yaml()) == {"passes": ["polish", {"polish": {"bits": 4}}, {"needy": {"size": 1}}]}


def test_byte_order_mark_is_fine(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("\ufeffpasses: [polish]", encoding="utf-8")
    assert load_recipe(file) == Recipe(name="own", passes=(Polish(),))


def test_builtin_recipes_have_descriptions() -> None:
    assert {"int8", "int8-weight-only", "int4-weight-only"} <= set(builtin_recipes())
    assert all(builtin_recipes().values())


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "where", "parts"),
    [
        # the form of the file
        ("", "mine.yaml", ["no passes"]),
        ("# nothing", "mine.yaml", ["no passes"]),
        ("- polish", "mine.yaml, line 1", ["not a mapping", "`passes:`"]),
        ("passes:", "mine.yaml, line 1", ["no passes", "`- name`"]),
        ("description: x\npasses: []", "mine.yaml, line 2", ["no passes"]),
        ("passes: polish", "mine.yaml, line 1", ["no passes"]),
        ("passes: [polish]\ndescription: [a]", "mine.yaml, line 2", ["description", "text"]),
        ("passes: [polish]\npases: []", "mine.yaml, line 2", ["recipe key", "'pases'", "did you mean 'passes'"]),
        ("passes: [polish]\n\ngate: {}", "mine.yaml, line 3", ["did you mean 'gates'"]),
        # YAML
        ("passes: [polish", "mine.yaml, line 1", ["not valid YAML"]),
        ("passes:\n- polish\n\t- x", "mine.yaml, line 3", ["not valid YAML"]),
        ("passes: [polish]\npasses: [needy]", "mine.yaml, line 1", ["'passes' stands twice", "line 2"]),
        ("passes: [polish: {bits: 4, bits: 8}]", "mine.yaml, line 1, pass 1", ["'bits' stands twice"]),
        ("---\npasses: [polish]\n---\npasses: [polish]", "mine.yaml, line 3", ["not valid YAML", "another document"]),
        ("passes: [polish]\n1: x", "mine.yaml, line 2", ["A key is not a name", "quotes"]),
        ("? [passes]\n: x", "mine.yaml, line 1", ["A key is not a name"]),
        ("passes: [!!python/object/apply:os.getcwd []]", "mine.yaml, line 1", ["not valid YAML", "constructor"]),
        ("passes: [polish: {bits: !!int x}]", "mine.yaml", ["not valid YAML"]),
        ("description: \x00", "mine.yaml", ["not valid YAML"]),
        # entries
        ("passes:\n- polish\n- polsh", "mine.yaml, line 3, pass 2", ["no pass called 'polsh'", "did you mean 'polish'"]),
        ("passes:\n- polish:\n  bits: 4", "mine.yaml, line 2, pass 1", ["polish, bits", "indent it further", "dash"]),
        ("passes:\n- {}", "mine.yaml, line 2, pass 1", ["{} is not a pass"]),
        ("passes:\n- 5", "mine.yaml, line 2, pass 1", ["5 is not a pass"]),
        ("passes:\n-", "mine.yaml, line 2, pass 1", ["None is not a pass"]),
        ("passes:\n- [polish]", "mine.yaml, line 2, pass 1", ["['polish'] is not a pass"]),
        # options
        ("passes:\n- polish: 4", "mine.yaml, line 2, pass 1", ["4 is not a set of options of pass 'polish'"]),
        ("passes:\n- polish:\n    bit: 4", "mine.yaml, line 3, pass 1", ["option of pass 'polish'", "'bit'", "did you mean 'bits'"]),
        ("passes:\n- polish:\n    bits: 9", "mine.yaml, line 3, pass 1", ["'bits'", "cannot be 9", "less than or equal to 8"]),
        ("passes:\n- polish:\n    bits: four", "mine.yaml, line 3, pass 1", ["cannot be 'four'", "integer"]),
        ("passes: [polish: {damping: 0}]", "mine.yaml, line 1, pass 1", ["greater than 0"]),
        ("passes: [polish: {mode: quick}]", "mine.yaml, line 1, pass 1", ["'fast' or 'exact'"]),
        ("passes:\n- polish:\n    keep:\n    - a\n    - 5", "mine.yaml, line 5, pass 1", ["'keep'", "string"]),
        ("passes: [polish: {mode: exact, bits: 2}]", "mine.yaml, line 1, pass 1", ["do not fit together", "2 bits cannot be exact"]),
        ("passes: [needy]", "mine.yaml, line 1, pass 1", ["Option 'size' of pass 'needy' is missing"]),
        # gates
        ("passes: [polish]\ngates: 5", "mine.yaml, line 2", ["5 is not a set of gates"]),
        ("passes: [polish]\ngates:\n  min_sqnr: 5", "mine.yaml, line 3", ["no gate called 'min_sqnr'", "did you mean 'min_sqnr_db'"]),
        ("passes: [polish]\ngates:\n  max_accuracy_drop: -1", "mine.yaml, line 3", ["Gate 'max_accuracy_drop' cannot be -1"]),
        ("passes: [polish]\ngates: {min_speedup: .nan}", "mine.yaml, line 2", ["finite"]),
    ],
)  # fmt: skip
def test_refusals_say_where_and_what(text: str, where: str, parts: list[str]) -> None:
    error = refusal(text)
    assert error.where == where
    assert [part for part in parts if part not in str(error)] == [], str(error)


def test_aliases_are_refused() -> None:
    """Nine lines of nine aliases each would otherwise stand for a billion entries."""
    rows = ["a: &a [x, x]", *(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True))]
    error = refusal("\n".join(rows))
    assert error.where == "mine.yaml, line 2" and "aliases" in error.what
    assert "aliases" in refusal("passes: &a [*a]").what


def test_deep_nesting_is_refused() -> None:
    assert "nested too deeply" in refusal("passes: " + "[" * 50_000).what


def test_long_values_are_cut_in_messages() -> None:
    assert len(str(refusal(f"passes: [polish: {{bits: {'x' * 100_000}}}]"))) < 500


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no such recipe file\.\n  where: .*gone\.yaml"):
        load_recipe(tmp_path / "gone.yaml")


def test_folder_is_not_a_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe file"):
        load_recipe(tmp_path)


def test_bytes_that_are_no_text(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(b"passes:\n- polish # \xe9\n")
    with pytest.raises(RecipeError, match=r"own\.yaml, line 2\n  expected: YAML in UTF-8"):
        load_recipe(file)


def test_large_file_is_refused_unread(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_bytes(b"#" * (MAX_BYTES + 1))
    with pytest.raises(RecipeError, match="too large"):
        load_recipe(file)


def test_unknown_builtin_recipe() -> None:
    with pytest.raises(RecipeError, match=r"int8-weight-only(.|\n)*or a \.yaml file(.|\n)*did you mean 'int8'"):
        load_recipe("int88")


# ---- the catalog ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("odd", "not what its catalog says"),
        ("renamed", "not what its catalog says"),
        ("abstract", "not what its catalog says"),
        ("absent", "cannot be imported"),
        ("lost", "no_such_module"),
        ("polsh", "did you mean 'polish'"),
    ],
)
def test_what_is_no_pass(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        pass_class(name)


def entry_points(monkeypatch: pytest.MonkeyPatch, *values: str) -> None:
    found = [metadata.EntryPoint(f"e{index}", value, recipes.GROUP) for index, value in enumerate(values)]
    monkeypatch.setattr(metadata, "entry_points", lambda group: found)


def test_catalog_without_installed_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch)
    assert catalog()["normalize"] == "graphq.passes.normalize:Normalize"


def test_catalog_gathers_all_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, "recipe_test_passes:CATALOG")
    assert {"normalize", "polish"} <= set(catalog())


def test_a_name_can_be_taken_once_only(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, "recipe_test_passes:CATALOG", "recipe_test_passes:CATALOG")
    with pytest.raises(RecipeError, match=r"Two packages bring a pass called 'polish'"):
        catalog()


@pytest.mark.parametrize(("value", "message"), [("no_such_module:X", "cannot be loaded"), ("recipe_test_passes:Odd", "brings no catalog")])
def test_a_broken_catalog_is_named(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    entry_points(monkeypatch, value)
    with pytest.raises(RecipeError, match=message):
        catalog()


def test_schema_of_chosen_passes() -> None:
    schema = recipe_schema(["polish", "needy"])
    bare, with_options = schema["properties"]["passes"]["items"]["anyOf"]
    assert bare == {"enum": ["needy", "polish"]}
    assert set(with_options["properties"]) == {"polish", "needy"}
    bits = schema["$defs"]["Polish"]["properties"]["bits"]
    assert (bits["minimum"], bits["maximum"], bits["default"]) == (2, 8, 8)
    assert set(schema["$defs"]["Gates"]["properties"]) == set(Gates.__dataclass_fields__)
