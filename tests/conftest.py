"""Says in one line what to do when graphq is not installed, since every test would fail for that reason."""

import importlib.util

import pytest


def pytest_configure() -> None:
    if importlib.util.find_spec("graphq") is None or importlib.util.find_spec("graphq.passes") is None:
        raise pytest.UsageError("graphq.passes cannot be imported: run `make test`, or `pip install -e .` first")
