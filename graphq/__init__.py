"""graphq makes ONNX models smaller and faster, and shows that they still work.

Importing it is cheap: what the public names stand for is imported when one of them is used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from graphq.errors import DataError, GraphqError, ModelError, RecipeError, TargetError, UsageError, VerifyError

if TYPE_CHECKING:
    from graphq.bench import bench
    from graphq.convert import convert
    from graphq.engines import EngineOptions
    from graphq.graphs import convert_graph
    from graphq.pipeline import Pass
    from graphq.planes import select_bits
    from graphq.recipe import Recipe, load_recipe
    from graphq.report import Report
    from graphq.spec import QuantSpec

__version__ = "0.1.0"

__all__ = [
    "DataError", "EngineOptions", "GraphqError", "ModelError", "Pass", "QuantSpec", "Recipe", "RecipeError", "Report", "TargetError",
    "UsageError", "VerifyError", "bench", "convert", "convert_graph", "load_recipe", "select_bits",
]  # fmt: skip

_LAZY = {
    "EngineOptions": "engines", "Pass": "pipeline", "QuantSpec": "spec", "Recipe": "recipe", "Report": "report", "bench": "bench",
    "convert": "convert", "convert_graph": "graphs", "load_recipe": "recipe", "select_bits": "planes",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `graphq.convert` the function, whoever imports the module of that name: importing one sets it as an attribute."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _LAZY and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
