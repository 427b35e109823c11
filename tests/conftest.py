"""Says in one line what to do when graphq is not installed, since every test would fail for that reason; prints counts."""

import importlib.util
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest


def pytest_configure() -> None:
    if importlib.util.find_spec("graphq") is None or importlib.util.find_spec("graphq.passes") is None:
        raise pytest.UsageError("graphq.passes cannot be imported: run `make test`, or `pip install -e .` first")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What tests recorded as the property `counts` (title, {what: how many}), added up over tests and workers."""
    totals: dict[str, Counter[str]] = {}
    for reports in terminalreporter.stats.values():
        for report in reports:
            for name, value in getattr(report, "user_properties", ()) if getattr(report, "when", "") == "call" else ():
                if name == "counts":
                    totals.setdefault(value[0], Counter()).update(value[1])
    for title, counts in totals.items():
        terminalreporter.section(title)
        for what, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:5d}  {what}")


@pytest.fixture(autouse=True)
def _one_thread_of_torch() -> None:
    """Models are small here; and sums have one order, on any machine and whatever else was tested before."""
    if (torch := sys.modules.get("torch")) is not None:
        torch.set_num_threads(1)


ASSETS = Path(__file__).parents[1].parent / "shared" / "assets"


@pytest.fixture(scope="session")
def assets() -> ModuleType:
    """The module that reads the shared images and texts; tests that need them are skipped where they are not."""
    spec = importlib.util.spec_from_file_location("assets", ASSETS / "assets.py")
    if spec is None or spec.loader is None or not (ASSETS / "assets.py").is_file():
        pytest.skip(f"there are no assets in {ASSETS}")
    pytest.importorskip("PIL", reason="Pillow is not installed (pip install graphq[images])")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
