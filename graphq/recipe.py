"""Recipes: which passes run, in which order, with which options; as YAML and as Python values.

    description: One sentence for `graphq recipes`.
    passes:
      - normalize                     # a name,
      - quantize-weights: {bits: 4}   # or a name with options
    gates: {max_accuracy_drop: 0.5}

Names come from the catalog: graphq's own passes and those of every installed distribution with an entry point in the group
`graphq.passes`. A recipe holds no code, no paths and no data; it is untrusted input, so its size is bounded, YAML aliases
are refused, and what a pass may be given is declared by the pass itself.
"""

from __future__ import annotations

import os
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from importlib import import_module, metadata
from inspect import isabstract
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from graphq.errors import RecipeError
from graphq.gates import Gates
from graphq.names import unknown_name

if TYPE_CHECKING:
    from graphq.pipeline import Pass

GROUP = "graphq.passes"
"""Entry-point group through which distributions bring passes; each entry loads to a dict of name -> "module:Class"."""

MAX_BYTES = 1_000_000
"""A larger recipe file is refused unread."""

_BUILTIN_PASSES = metadata.EntryPoint("builtin", "graphq.passes:CATALOG", GROUP)
_FOLDER = Path(__file__).with_name("recipes")
_KEYS = ("description", "passes", "gates")
_STRING_TAG = "tag:yaml.org,2002:str"

_T = TypeVar("_T")
_Path = tuple[str | int, ...]


# ---- recipes as values ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Passes in the order they run, and what the result has to reach."""

    name: str
    description: str = ""
    passes: tuple[Pass, ...]
    gates: Gates = Gates()

    def to_yaml(self) -> str:
        """The recipe as text that `parse_recipe` reads back; options that have their default value are left out."""
        rows = [(one.name, changed_options(one)) for one in self.passes]
        data = {
            "description": self.description,
            "passes": [{name: values} if values else name for name, values in rows],
            "gates": changed_options(self.gates),
        }
        return yaml.safe_dump({key: value for key, value in data.items() if value}, sort_keys=False, allow_unicode=True, width=120)

    def with_gates(self, limits: Mapping[str, float | None]) -> Recipe:
        """The recipe with other limits, by the names of gates; None takes one away. Raises RecipeError."""
        document = _Document("{}", "the gates that were given")
        return replace(self, gates=document.build(Gates, {**changed_options(self.gates), **limits}, (), "gate"))


def changed_options(value: Pass | Gates) -> dict[str, Any]:
    """The options of a pass, or the gates, that differ from their defaults, as plain data."""
    return TypeAdapter(type(value)).dump_python(value, mode="json", exclude_defaults=True)


# ---- finding passes and recipes -------------------------------------------------------------------------------------


@cache
def catalog() -> Mapping[str, str]:
    """Every pass that is installed: name -> "module:Class". Imports no pass.

    Raises:
        RecipeError: two distributions bring the same name, or one of them brings something else than a catalog.
    """
    entries = list(metadata.entry_points(group=GROUP))
    if all(entry.value != _BUILTIN_PASSES.value for entry in entries):  # a checkout that was never installed
        entries.insert(0, _BUILTIN_PASSES)
    found: dict[str, str] = {}
    owners: dict[str, str] = {}
    for entry in entries:
        owner = entry.dist.name if entry.dist else "graphq"
        for name, target in _load(entry, owner).items():
            if name in found:
                raise RecipeError(
                    f"Two packages bring a pass called {name!r}.", where=f"{owners[name]} ({found[name]}) and {owner} ({target})",
                    expected="one package for each name", hint=f"uninstall {owners[name]} or {owner}",
                )  # fmt: skip
            found[name], owners[name] = target, owner
    return found


def _load(entry: metadata.EntryPoint, owner: str) -> dict[str, str]:
    where, hint = f"entry point {entry.name} = {entry.value} of {owner}", f"install {owner} again, or uninstall it"
    try:
        found = entry.load()
    except Exception as error:  # whatever a foreign module raises
        raise RecipeError(f"The passes of {owner} cannot be loaded: {error}.", where=where, hint=hint) from error
    if not (isinstance(found, dict) and all(isinstance(text, str) for pair in found.items() for text in pair)):
        raise RecipeError(f"{owner} brings no catalog of passes.", where=where, expected='a dict of pass name -> "module:Class"', hint=hint)
    return found


def pass_class(name: str) -> type[Pass]:
    """The class behind a pass name, imported now. Raises RecipeError if there is none, or it is not a pass."""
    from graphq.pipeline import Pass

    if name not in catalog():
        raise RecipeError(**unknown_name("pass", name, catalog()))
    target = catalog()[name]
    module, _, attribute = target.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # whatever a foreign module raises
        raise RecipeError(f"Pass {name!r} cannot be imported: {error}.", where=target, hint="install what it needs") from error
    if not (isinstance(found, type) and issubclass(found, Pass)) or isabstract(found) or getattr(found, "name", None) != name:
        raise RecipeError(f"Pass {name!r} is not what its catalog says.", where=target, expected=f"a Pass whose name is {name!r}")
    return found


def builtin_recipes() -> dict[str, str]:
    """Names of the recipes that graphq brings along, with their descriptions. Imports no pass."""
    return {name: _Document(recipe_text(name), name).data.get("description", "") for name in _builtin_files()}


def recipe_text(name: str) -> str:
    """The YAML text of a built-in recipe, to be copied and edited."""
    if name not in _builtin_files():
        raise RecipeError(**unknown_name("built-in recipe", name, _builtin_files()))
    return _read(_builtin_files()[name])


def _builtin_files() -> dict[str, Path]:
    return {file.stem: file for file in sorted(_FOLDER.glob("*.yaml"))}


def load_recipe(name_or_path: str | os.PathLike[str]) -> Recipe:
    """A built-in recipe by name, or one from a YAML file. Raises RecipeError."""
    name, path = str(name_or_path), Path(name_or_path)
    if name in _builtin_files():
        return parse_recipe(recipe_text(name), name)
    if path.suffix.lower() in (".yaml", ".yml") or path.exists():
        return parse_recipe(_read(path), path.stem, str(path))
    wrong = unknown_name("built-in recipe", name, _builtin_files())
    raise RecipeError(wrong["what"], expected=wrong["expected"] + ", or a .yaml file", hint=wrong["hint"])


def _read(path: Path) -> str:
    if not path.is_file():
        raise RecipeError("There is no such recipe file.", where=str(path), hint="check the path; `graphq recipes` lists the built-in ones")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(f"The recipe file cannot be read: {error.strerror}.", where=str(path)) from error
    if len(content) > MAX_BYTES:
        raise RecipeError("The recipe file is too large to be one.", where=str(path), expected=f"at most {MAX_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError("The recipe file is not text.", where=f"{path}, line {line}", expected="YAML in UTF-8") from error


# ---- YAML to recipe -------------------------------------------------------------------------------------------------


def parse_recipe(text: str, name: str, source: str = "") -> Recipe:
    """The recipe in `text`. Errors call it `source`, or `name` if that is empty. Raises RecipeError."""
    document = _Document(text, source or name)
    for key in document.data:
        if key not in _KEYS:
            raise document.error((key,), **unknown_name("recipe key", key, _KEYS))
    description, entries = document.data.get("description") or "", document.data.get("passes")
    if not isinstance(description, str):
        raise document.error(("description",), "The description is not text.", expected="a sentence")
    if not isinstance(entries, list) or not entries:
        raise document.error(("passes",), "The recipe has no passes.", expected="passes: and below it one line `- name` for each pass")
    passes = tuple(_read_pass(document, index, entry) for index, entry in enumerate(entries))
    gates = document.build(Gates, document.data.get("gates"), ("gates",), "gate")
    return Recipe(name=name, description=description, passes=passes, gates=gates)


def _read_pass(document: _Document, index: int, entry: Any) -> Pass:
    path = ("passes", index)
    if isinstance(entry, dict) and len(entry) > 1:
        first, *others = entry
        raise document.error(
            path, f"One entry of the list names several things: {', '.join(entry)}.", expected="one pass with its options",
            hint=f"if {others[0]!r} is an option of {first!r}, indent it further; if it is a pass, start its line with a dash",
        )  # fmt: skip
    name, values = next(iter(entry.items())) if isinstance(entry, dict) and entry else (entry, None)
    if not isinstance(name, str):
        raise document.error(path, f"{reprlib.repr(entry)} is not a pass.", expected="`name` or `name: {option: value}`")
    if name not in catalog():
        raise document.error(path, **unknown_name("pass", name, catalog()))
    return document.build(pass_class(name), values, (*path, name), "option", f" of pass {name!r}")


class _Document:
    """A recipe's text as plain data, with the line of every entry, so that errors can point at it."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self.lines: dict[_Path, int] = {}
        try:
            loader = yaml.SafeLoader(text)
            root = loader.get_single_node()
            self._index(root, (), set())
            data = {} if root is None else loader.construct_document(root)
        except RecipeError:
            raise
        except RecursionError:
            raise self.error((), "The recipe is nested too deeply.", expected="passes, options and gates") from None
        except Exception as error:  # YAMLError, or nearly anything from a scalar with a wrong explicit tag
            mark = getattr(error, "problem_mark", None)
            self.lines = {(): mark.line + 1} if mark else {}
            raise self.error((), f"The recipe is not valid YAML: {getattr(error, 'problem', None) or error}.") from error
        if not isinstance(data, dict):
            raise self.error((), "The recipe is not a mapping.", expected=f"the keys {', '.join(_KEYS)}", hint="start with `passes:`")
        self.data: dict[str, Any] = data

    def _index(self, node: yaml.Node | None, path: _Path, seen: set[int]) -> None:
        """Note the lines of `node` and of all below; refuse what YAML takes and a recipe must not hold."""
        if node is None:
            return
        if id(node) in seen:
            raise self.error(path, "Recipes take no YAML aliases.", expected="a value", hint="write the value out instead of *name")
        seen.add(id(node))
        self.lines.setdefault(path, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            for index, item in enumerate(node.value):
                self._index(item, (*path, index), seen)
        elif isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                if key.tag != _STRING_TAG:
                    self.lines[path] = key.start_mark.line + 1
                    raise self.error(path, "A key is not a name.", expected="text", hint="put the key into quotes")
                below = (*path, key.value)
                if below in self.lines:
                    raise self.error(below, f"The key {key.value!r} stands twice.", expected="each key once",
                                     hint=f"its second place is line {key.start_mark.line + 1}")  # fmt: skip
                self.lines[below] = key.start_mark.line + 1
                self._index(value, below, seen)

    def error(self, path: _Path, what: str, *, expected: str = "", hint: str = "") -> RecipeError:
        """An error about the entry at `path`: its file, its line if it has one, and the number of its pass."""
        known = next((path[:end] for end in range(len(path), -1, -1) if path[:end] in self.lines), None)
        places = [self.source, f"line {self.lines[known]}" if known is not None else ""]
        if len(path) > 1 and path[0] == "passes":
            places.append(f"pass {int(path[1]) + 1}")
        return RecipeError(what, where=", ".join(place for place in places if place), expected=expected, hint=hint)

    def build(self, cls: type[_T], values: Any, path: _Path, noun: str, of: str = "") -> _T:
        """`cls` from its YAML options. `noun` and `of` are what errors call one: "option", " of pass 'x'"."""
        values = {} if values is None else values
        if not isinstance(values, dict):
            raise self.error(path, f"{reprlib.repr(values)} is not a set of {noun}s{of}.", expected=f"`{{{noun}: value}}`")
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            first, *rest = error.errors(include_url=False)
            key = str(first["loc"][0]) if first["loc"] else ""
            if first["type"] == "unexpected_keyword_argument":
                known = [field.name for field in fields(cls) if field.init]  # type: ignore[arg-type]
                raise self.error((*path, key), **unknown_name(noun + of, key, known)) from error
            same = [first, *(one for one in rest if one["loc"][:1] == first["loc"][:1])]
            reasons = dict.fromkeys(_plain(one["msg"]) for one in same)
            given = f"cannot be {reprlib.repr(values[key])}" if key in values else "is wrong" if not key else "is missing"
            what = f"{noun.capitalize()} {key!r}{of} {given}." if key else f"The {noun}s{of} do not fit together."
            expected = "a value" if first["type"] == "missing" else " or ".join(reasons)
            raise self.error((*path, *first["loc"]), what, expected=expected) from error


def _plain(message: str) -> str:
    """Pydantic's message as what comes after "expected": `less than or equal to 8`."""
    for start in ("Input should be ", "Value error, "):
        message = message.removeprefix(start)
    return message.replace("a valid tuple", "a list, such as [one, two]")


# ---- for editors ----------------------------------------------------------------------------------------------------


def recipe_schema(names: Iterable[str] | None = None) -> dict[str, Any]:
    """JSON schema of recipe files, with which editors complete and check them.

    Args:
        names: The passes to describe; all of the catalog if not given.
    """
    classes: dict[str, type] = {name: pass_class(name) for name in (catalog() if names is None else names)}
    adapters: list[Any] = [(key, "validation", TypeAdapter(cls)) for key, cls in {"": Gates, **classes}.items()]
    found, shared = TypeAdapter.json_schemas(adapters)
    schemas = {key: schema for (key, _), schema in found.items()}
    gates = schemas.pop("")
    with_options = {name: {"anyOf": [schema, {"type": "null"}]} for name, schema in schemas.items()}
    one_pass = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": False, "properties": with_options}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "graphq recipe",
        "type": "object",
        "additionalProperties": False,
        "required": ["passes"],
        "properties": {
            "description": {"type": "string"},
            "passes": {"type": "array", "minItems": 1, "items": {"anyOf": [{"enum": sorted(classes)}, one_pass]}},
            "gates": {"anyOf": [gates, {"type": "null"}]},
        },
        **shared,
    }
