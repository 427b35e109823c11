"""The synthetic decoders are valid, deterministic and of the size they say; the tables and the picture hold what was measured."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any
from xml.etree import ElementTree

import numpy as np
import onnx
import pytest

from graphq import ir
from graphq.executor import Executor


@pytest.fixture
def large(script: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch) -> Any:
    found = script("large")
    monkeypatch.setattr(found, "VOCABULARY", 100)
    monkeypatch.setattr(found, "TOKENS", 8)
    return found


@pytest.mark.parametrize("tied", [False, True])
def test_a_decoder_looks_back_only(large: Any, tmp_path: Path, tied: bool) -> None:
    sizes = large.Decoder(128, 160, 2, tied)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        large.write_decoder(tmp_path / name / "m.onnx", sizes)
    assert (tmp_path / "one" / "m.data").read_bytes() == (tmp_path / "two" / "m.data").read_bytes()
    assert (tmp_path / "one" / "m.data").stat().st_size == 4 * sizes.parameters
    onnx.checker.check_model(tmp_path / "one" / "m.onnx", full_check=True)
    model = ir.load(tmp_path / "one" / "m.onnx")
    assert max(value.const_value.size for value in model.graph.initializers.values()) == sizes.largest  # type: ignore[union-attr]
    ids = np.random.default_rng(0).integers(0, 100, (2, 8))
    changed = ids.copy()
    changed[:, 5:] = (changed[:, 5:] + 1) % 100
    a, b = (Executor(model).run({"ids": tokens})[0] for tokens in (ids, changed))
    assert a.shape == (2, 8, 100) and 0.1 < a.std() < 20
    np.testing.assert_allclose(a[:, :5], b[:, :5], atol=1e-4)
    assert np.abs(a[:, 5:] - b[:, 5:]).max() > 0.1


def test_a_conversion_is_measured_and_drawn(large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large, "DECODERS", {"0.1": large.Decoder(64, 96, 1), "0.3": large.Decoder(128, 160, 2)})
    (tmp_path / "scratch").mkdir()
    rows = large.measure(["0.1"], [1], "int8-weight-only", tmp_path / "scratch")
    rows += large.measure(["0.3"], [1, 2], "int8-weight-only", tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())
    assert [row["whole"] for row in rows] == [True, False, True]
    assert all(20 < row["own_mb"] <= row["peak_mb"] and row["mb_s"] > 0 for row in rows)
    large.write(rows, ["command: this test"], tmp_path)
    assert (tmp_path / "large.md").read_text().count("in segments") == 1
    labels = [text.text for text in ElementTree.parse(tmp_path / "large.svg").iter("{http://www.w3.org/2000/svg}text")]
    assert {"peak, budget 1 MB", "peak, budget 2 MB", "largest layer"} <= set(labels)


def test_a_full_disk_is_said_first(large: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large.shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 1000})())
    with pytest.raises(SystemExit, match="GB free"):
        large.measure(["1.3"], [256], "int4-weight-only", tmp_path)
    assert not list(tmp_path.iterdir())
