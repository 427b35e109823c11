"""A pass from another distribution, found through its entry point: the only way in, and the way that graphq's own passes take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

PASS = '''
"""A pass that lives outside of graphq."""

from typing import Annotated, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir
from graphq.pipeline import Pass, PassContext, pass_options

CATALOG = {"scale-output": "acme_passes:ScaleOutput"}


@pass_options
class ScaleOutput(Pass):
    """Multiplies the first output.

    Attributes:
        factor: What to multiply with.
    """

    name: ClassVar[str] = "scale-output"
    factor: Annotated[float, Field(gt=0)] = 1.0

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        output = model.graph.outputs[0]
        factor = ctx.edit.initializer("factor", np.float32(self.factor))
        scaled = ctx.edit.insert(output.producer(), "Mul", [output, factor], output="scaled", like=output, after=True)
        ctx.edit.replace_output(output, scaled)
'''
RECIPE = "passes:\n  - normalize\n  - scale-output: {factor: 1e-3}\ngates: {max_size_ratio: 1000}\n"
MODEL = '<ir_version: 10, opset_import: ["" : 21]> acme (float[2, 3] x) => (float[2, 3] y) { y = Relu(x) }'


def install(folder: Path, name: str, module: str, text: str) -> None:
    """What pip would leave in `folder` for a distribution of one module that brings passes."""
    (folder / f"{module}.py").write_text(text)
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[graphq.passes]\nacme = {module}:CATALOG\n")


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH", "")]))
    env = {**os.environ, "PYTHONPATH": paths, "COLUMNS": "200"}
    return subprocess.run([sys.executable, "-m", *arguments], capture_output=True, text=True, timeout=300, env=env, cwd=folder)


@pytest.fixture
def acme(tmp_path: Path) -> Path:
    install(tmp_path, "acme-passes", "acme_passes", PASS)
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    onnx.save(onnx.parser.parse_model(MODEL), tmp_path / "model.onnx")
    return tmp_path


def test_passes_lists_it(acme: Path) -> None:
    done = run(acme, "graphq", "passes")
    assert done.returncode == 0, done.stderr
    assert "scale-output" in done.stdout and "insert-qdq" in done.stdout


def test_a_recipe_runs_it(acme: Path) -> None:
    done = run(acme, "graphq", "convert", "model.onnx", "-o", "out.onnx", "--recipe", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    result = onnx.load(acme / "out.onnx")
    assert [node.op_type for node in result.graph.node] == ["Relu", "Mul"]
    (factor,) = (onnx.numpy_helper.to_array(tensor) for tensor in result.graph.initializer)
    np.testing.assert_array_equal(factor, np.float32(1e-3))
    assert result.graph.output[0].name == "y"


def test_its_options_are_checked_like_any_other(acme: Path) -> None:
    (acme / "recipe.yaml").write_text(RECIPE.replace("1e-3", "-1"))
    done = run(acme, "graphq", "convert", "model.onnx", "-o", "out.onnx", "--recipe", "recipe.yaml")
    assert done.returncode == 1
    assert "factor" in done.stderr and "greater than 0" in done.stderr and "Traceback" not in done.stderr
    assert not (acme / "out.onnx").exists()


def test_a_second_pass_of_that_name_is_refused_with_both_distributions(acme: Path) -> None:
    install(acme, "other-passes", "other_passes", 'CATALOG = {"scale-output": "other_passes:ScaleOutput"}\n')
    done = run(acme, "graphq", "passes")
    assert done.returncode == 1
    assert all(text in done.stderr for text in ("'scale-output'", "acme-passes", "other-passes"))
    assert "Traceback" not in done.stderr


def test_a_distribution_that_does_not_load_is_named(acme: Path) -> None:
    install(acme, "broken-passes", "broken_passes", "import no_such_module\n")
    done = run(acme, "graphq", "passes")
    assert done.returncode == 1
    assert all(text in done.stderr for text in ("broken-passes", "no_such_module"))
