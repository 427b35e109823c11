"""Kernels take tensors as they lie in memory, or say why not; the catalog holds what is documented and shipped."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

from graphq import ops
from graphq.errors import UsageError
from graphq.kernels import CATALOG

ROOT = Path(__file__).parents[2]
ALL = pytest.mark.parametrize("operator", sorted(CATALOG))


@ALL
def test_a_kernel_is_a_folder_with_its_reasons(operator: str) -> None:
    module, _, function = CATALOG[operator].partition(":")
    folder, known = module.split(".")[2], ops.OPERATORS
    assert module == f"graphq.kernels.{folder}.kernel" and operator.lower() == function.replace("_", "")
    text = (ROOT / "kernels" / folder / "README.md").read_text(encoding="utf-8")
    assert operator in text and known[operator].layout in text
    setup = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    assert "README.md" in setup["package-data"][f"graphq.kernels.{folder}"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda one: {"out": one["out"][:, :-1]}, r"cannot write to torch\.float16 \[2, 15\]"),
        (lambda one: {"out": one["out"].float()}, r"cannot write to torch\.float32 \[2, 16\]"),
        (lambda one: {"out": one["out"].T.contiguous().T}, r"takes no out of strides \[1, 2\]"),
        (lambda one: {"weight": one["weight"].T.contiguous().T}, r"takes no weight of strides \[1, 16\]"),
        (lambda one: {"bias": one["bias"].to("meta")}, "x on cpu and bias on meta"),
        (lambda one: {"x": one["x"][:, None].expand(2, 3, 64), "out": one["out"].new_empty(2, 3, 16)}, "rows that are one stride apart"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(compiler: Any, change: Any, message: str) -> None:
    import torch

    from graphq.kernels.w4a16_gemm.kernel import w4a16_gemm

    half = {"dtype": torch.float16}
    one = {
        "x": torch.zeros(2, 64, **half), "weight": torch.zeros(16, 32, dtype=torch.uint8), "w_scale": torch.zeros(1, 16, **half),
        "bias": torch.zeros(16, **half), "out": torch.zeros(2, 16, **half),
    }  # fmt: skip
    with pytest.raises(UsageError, match=message):
        w4a16_gemm(**one | change(one))
