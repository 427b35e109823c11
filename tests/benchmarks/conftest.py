"""Modules of `benchmarks/`, which is no package: its scripts import each other by name."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], ModuleType]:
    """Imports one by name."""
    monkeypatch.syspath_prepend(FOLDER)
    return importlib.import_module
