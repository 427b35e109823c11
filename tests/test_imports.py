"""Importing graphq and asking for help is cheap: the heavy libraries load on first use. Each case is a fresh interpreter."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HEAVY = ("torch", "triton", "onnxruntime", "tensorrt", "tensorrt_rtx", "ray", "onnx_ir", "onnxscript", "scipy")


def loaded_after(code: str) -> set[str]:
    """Top-level modules that are loaded once `code` has run."""
    then = "print('LOADED', *{name.partition('.')[0] for name in sys.modules})"
    script = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\n{then}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.rpartition("LOADED")[2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import graphq",
        "import graphq.recipe; graphq.recipe.builtin_recipes(), graphq.recipe.catalog()",
        "import graphq.kernels, graphq.ops",
        "import runpy; sys.argv = ['graphq', '--help']; runpy.run_module('graphq', run_name='__main__')",
    ],
    ids=["import", "list recipes and passes", "kernels and their contract", "help"],
)
def test_nothing_heavy_is_loaded(code: str) -> None:
    loaded = loaded_after(code)
    assert "graphq" in loaded
    assert not loaded.intersection(HEAVY)


def test_the_check_sees_what_is_loaded() -> None:
    assert "onnx_ir" in loaded_after("import graphq.ir")


def test_every_package_is_shipped() -> None:
    """The package list is written by hand, since the folders are not where their import names say."""
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name: ROOT / folder for name, folder in setup["package-dir"].items()}
    found = {
        ".".join([name, *file.parent.relative_to(folder).parts]) for name, folder in folders.items() for file in folder.rglob("__init__.py")
    }
    assert found == set(setup["packages"])
