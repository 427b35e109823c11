"""Imports point one way: cli -> convert, bench -> backends -> core <- passes, kernels, models.

Read from the source, so that an import inside a function counts as well.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = {"graphq": "graphq", "graphq.passes": "passes", "graphq.kernels": "kernels", "graphq.models": "models"}
RANKS = {"__main__": 4, "cli": 3, "cli_bench": 3, "cli_options": 3, "cli_sensitivity": 3, "cli_synthesize": 3, "console": 3,
         "console_sparsity": 3, "graphs": 3, "convert": 2, "request": 2, "measured": 2, "bench": 2, "backends": 1}  # fmt: skip
"""Of the modules above the core; a module may import what ranks as high as itself, or lower."""
PLUGINS = ("passes", "kernels", "models")
ON_TORCH = {"torch_executor", "synthesis"}
"""Parts of the core that are written in torch; whatever is not one of them imports them on first use."""
WITHOUT_TORCH = {f"graphq.synthesis{name}" for name in ("", ".graph", ".inputs", ".labels", ".natural", ".resume", ".sheet",
                                                        ".strategy", ".tokens")}  # fmt: skip
"""Modules of theirs that are not."""
HEAVY = {"onnxruntime", "torch", "tensorrt", "tensorrt_rtx", "triton", "ray"}


@dataclass(frozen=True)
class Import:
    """One import: `lazy` if inside a function, `typing` if seen by type checkers only."""

    module: str
    line: int
    lazy: bool
    typing: bool


def module_files() -> dict[str, Path]:
    found = {}
    for package, folder in FOLDERS.items():
        for file in (ROOT / folder).rglob("*.py"):
            parts = file.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    return found


FILES = module_files()


def imports(module: str, source: str, is_package: bool = False) -> Iterator[Import]:
    """What `source` imports, as absolute names; `from graphq import ir` is an import of graphq.ir."""
    package = module if is_package else module.rpartition(".")[0]

    def visit(node: ast.AST, lazy: bool, typing: bool) -> Iterator[Import]:
        if isinstance(node, ast.Import):
            yield from (Import(alias.name, node.lineno, lazy, typing) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                below = f"{base}.{alias.name}"
                yield Import(below if below in FILES or (base in FOLDERS and node.level) else base, node.lineno, lazy, typing)
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = typing or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
        for child in ast.iter_child_nodes(node):
            yield from visit(child, lazy, typing)

    return visit(ast.parse(source), False, False)


def wrong(module: str, found: Import) -> str:
    """Why `module` must not import that, or nothing."""
    top = found.module.partition(".")[0]
    area, other = _area(module), _area(found.module)
    if top == "onnx_ir" and module not in ("graphq.ir", "graphq.ir_files", "graphq.ir_proto") and area != "models":
        return "only graphq/ir.py, ir_files.py and ir_proto.py import onnx_ir"
    late = found.lazy or found.typing
    if top in HEAVY and area not in PLUGINS and not late and (top != "torch" or not _is_on_torch(module)):
        return "heavy modules load on first use"
    if _is_on_torch(found.module) and not _is_on_torch(module) and not late:
        return "what is written in torch loads on first use"
    if top != "graphq" or found.module == "graphq" or module == "graphq":
        return ""
    if area in PLUGINS:
        if other not in PLUGINS:
            return "plugins know the core only" if other in RANKS else ""
        return "" if other == area and _is_own(module, found.module) else "passes, kernels and models do not know each other"
    if other in PLUGINS:
        return "" if RANKS.get(area, 0) >= 2 else "passes and kernels arrive through catalogs"
    return "imports point down" if RANKS.get(other, 0) > RANKS.get(area, 0) else ""


def _is_on_torch(module: str) -> bool:
    return _area(module) in ON_TORCH and module not in WITHOUT_TORCH


def _area(module: str) -> str:
    return f"{module}.".split(".")[1] if module.startswith("graphq") else ""


def _is_own(module: str, imported: str) -> bool:
    """Whether a plugin may import its sibling: a shared `_helper`, the same folder, or anything among models."""
    area, *rest = imported.split(".")[1:]
    return area == "models" or not rest or rest[0].startswith("_") or rest[0] == f"{module}..".split(".")[2]


def imports_of(module: str) -> list[Import]:
    file = FILES[module]
    return list(imports(module, file.read_text(encoding="utf-8"), file.name == "__init__.py"))


@pytest.mark.parametrize("module", sorted(FILES))
def test_imports_point_down(module: str) -> None:
    faults = [f"{FILES[module].relative_to(ROOT)}:{one.line}: {one.module}: {wrong(module, one)}" for one in imports_of(module)
              if wrong(module, one)]  # fmt: skip
    assert not faults, "\n".join(faults)


def test_no_circles_at_import_time() -> None:
    graph = {module: {one.module for one in imports_of(module) if not one.lazy and not one.typing and one.module in FILES} - {module}
             for module in FILES if module != "graphq"}  # fmt: skip
    list(TopologicalSorter(graph).static_order())  # raises CycleError


def test_all_folders_are_looked_at() -> None:
    assert {"graphq.ir", "graphq.passes", "graphq.kernels", "graphq.models.digits"} <= set(FILES)


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("graphq.spec", "import graphq.passes.normalize", "passes and kernels arrive through catalogs"),
        ("graphq.spec", "from graphq import passes", "passes and kernels arrive through catalogs"),
        ("graphq.spec", "def f():\n    from . import convert", "imports point down"),
        ("graphq.convert", "from graphq.cli import main", "imports point down"),
        ("graphq.backends.files", "from graphq import convert", "imports point down"),
        ("graphq.qdq", "import onnx_ir", "only graphq/ir.py, ir_files.py and ir_proto.py import onnx_ir"),
        ("graphq.passes.x", "from onnx_ir import Node", "only graphq/ir.py, ir_files.py and ir_proto.py import onnx_ir"),
        ("graphq.executor", "import onnxruntime as ort", "heavy modules load on first use"),
        ("graphq.synthesis", "import torch", "heavy modules load on first use"),
        ("graphq.synthesis.images", "import torch", ""),
        ("graphq.synthesis.images", "import onnxruntime", "heavy modules load on first use"),
        ("graphq.synthesis", "from graphq.synthesis import images", "what is written in torch loads on first use"),
        ("graphq.passes.x", "from graphq.kernels import y", "passes, kernels and models do not know each other"),
        ("graphq.passes.x", "from . import normalize", "passes, kernels and models do not know each other"),
        ("graphq.passes.x", "from .normalize import Normalize", "passes, kernels and models do not know each other"),
        ("graphq.passes.x", "from graphq.convert import convert", "plugins know the core only"),
        ("graphq.kernels.x.kernel", "from graphq.kernels.y.kernel import z", "passes, kernels and models do not know each other"),
        ("graphq.convert", "from graphq import passes", ""),
        ("graphq.cli", "from graphq.convert import convert", ""),
        ("graphq.executor", "def f():\n    import onnxruntime", ""),
        ("graphq.executor", "if TYPE_CHECKING:\n    import onnxruntime", ""),
        ("graphq.passes.x", "from . import _x_math\nfrom ._placement import y", ""),
        ("graphq.kernels.x.plugin", "from .kernel import y", ""),
        ("graphq.passes.x", "from graphq import ir", ""),
        ("graphq.executor", "import torch", "heavy modules load on first use"),
        ("graphq.torch_executor.x", "import torch", ""),
        ("graphq.torch_executor.x", "import onnxruntime", "heavy modules load on first use"),
        ("graphq.executor", "from graphq.torch_executor import TorchExecutor", "what is written in torch loads on first use"),
        ("graphq.passes.x", "def f():\n    from graphq.torch_executor import TorchExecutor", ""),
    ],
)
def test_the_rules_themselves(module: str, source: str, reason: str) -> None:
    assert {wrong(module, one) for one in imports(module, source)} == {reason}
