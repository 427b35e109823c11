"""What several files of end-to-end tests share."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from graphq import cli, ir

WIDTH = 64
MODEL = f"""<ir_version: 10, opset_import: ["" : 21]>
tiny (float[n, 4] x) => (float[n, {WIDTH}] z)
<float[4, {WIDTH}] v = {{{", ".join(str(k % 7 - 3) for k in range(4 * WIDTH))}}},
 float[{WIDTH}, {WIDTH}] w = {{{", ".join(str(k % 11 - 5) for k in range(WIDTH * WIDTH))}}}>
{{ y = MatMul(x, v)  z = MatMul(y, w) }}"""
RECIPE = "passes:\n  - normalize\n  - quantize-weights\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model, a recipe and calibration data that fit each other, and an empty folder `out`."""
    ir.save(ir.from_onnx_text(MODEL), tmp_path / "model.onnx")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    np.savez(tmp_path / "calib.npz", x=np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32))
    (tmp_path / "out").mkdir()
    return tmp_path


class Ended(NamedTuple):
    """How a command ended: its exit code and what it wrote."""

    code: int
    out: str
    err: str


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """Runs the command line with some arguments."""

    def call(*arguments: object) -> Ended:
        with pytest.raises(SystemExit) as stop:
            cli.main([str(entry) for entry in arguments])
        out, err = capfd.readouterr()
        return Ended(int(stop.value.code or 0), out, err)

    return call
