"""TensorRT plugins hold to NVIDIA's contract: its own code registers them, checks them and asks for kernels, as when it builds an engine.

What is TensorRT's library is replaced (tensorrt_stub.py); what these tests cannot see is what that library does with the answers.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from . import tensorrt_stub as stub

Shape = tuple[int, ...]
Input = tuple[str, Shape, Shape]
"""Type, least and largest shape."""


def fixed(kind: str, *shape: int) -> Input:
    return kind, shape, shape


PARAMS, LEVELS = fixed("FLOAT", 5), fixed("FLOAT", 16)
CASES: dict[str, tuple[str, list[Input]]] = {
    "softmax": ("SULQSoftmax", [fixed("HALF", 2, 3, 197, 197), PARAMS]),
    "softmax of one row": ("SULQSoftmax", [fixed("BF16", 64), PARAMS]),
    "softmax, long": ("SULQSoftmax", [fixed("FLOAT", 3, 20000), PARAMS]),
    "softmax, any batch": ("SULQSoftmax", [("HALF", (1, 3, 64, 64), (8, 3, 64, 64)), PARAMS]),
    "softmax, any length": ("SULQSoftmax", [("HALF", (1, 3, 1, 1), (8, 3, 512, 512)), PARAMS]),
    "codes": ("SULQSoftmaxCodes", [fixed("HALF", 2, 3, 197, 197), PARAMS]),
    "codes, any length": ("SULQSoftmaxCodes", [("FLOAT", (1, 3, 1, 1), (8, 3, 512, 512)), PARAMS]),
    "value": ("SULQAttentionValue", [fixed("INT8", 2, 3, 197, 99), LEVELS, fixed("HALF", 2, 3, 197, 64)]),
    "value, any batch": ("SULQAttentionValue", [("INT8", (1, 64, 32), (9, 64, 32)), LEVELS, ("BF16", (1, 64, 33), (9, 64, 33))]),
    "w4a16, decoding": ("W4A16Gemm", [fixed("HALF", 1, 256), fixed("INT8", 48, 128), fixed("HALF", 2, 48), fixed("HALF", 48)]),
    "w4a16, any batch": ("W4A16Gemm", [("BF16", (1, 7, 256), (9, 7, 256)), fixed("INT8", 33, 128), fixed("BF16", 1, 33), fixed("BF16", 33)]),
    "w8a8": ("W8A8Gemm", [fixed("INT8", 5, 99), fixed("INT8", 64, 99), fixed("FLOAT"), fixed("FLOAT", 64), fixed("HALF", 64)]),
    "w8a8, scale a row": ("W8A8Gemm", [("INT8", (1, 64), (300, 64)), fixed("INT8", 128, 64), ("FLOAT", (1, 1), (300, 1)), fixed("FLOAT", 128),
                                       fixed("FLOAT", 128)]),
    "w4a8": ("W4A8Gemm", [fixed("INT8", 100, 128), fixed("INT8", 64, 64), fixed("FLOAT"), fixed("FLOAT", 2, 64), fixed("BF16", 64)]),
    "w4a8, scale a row": ("W4A8Gemm", [("INT8", (1, 4, 128), (4, 4, 128)), fixed("INT8", 64, 64), ("FLOAT", (1, 4, 1), (4, 4, 1)),
                                       fixed("FLOAT", 1, 64), fixed("HALF", 64)]),
}  # fmt: skip


@pytest.fixture(scope="module")
def trt() -> Iterator[Any]:
    """`tensorrt` with the plugins of graphq for compute capability 9.0."""
    pytest.importorskip("torch", reason="torch is not installed (pip install graphq[kernels])")
    pytest.importorskip("triton", reason="Triton is not installed (pip install graphq[kernels])")
    module = stub.module()
    if module is None:
        pytest.skip("NVIDIA's Python files are not installed (pip install tensorrt-cu13-bindings)")
    stub.remove()
    sys.modules["tensorrt"] = module
    from graphq import kernels

    kernels.register_plugins(arch=90)
    yield module
    stub.remove()


def build(trt: Any, operator: str, inputs: list[Input], at: list[Shape] | None = None) -> SimpleNamespace:
    """Ask for the kernel as TensorRT's builder does, and evaluate expressions for the shapes `at`, by default the largest."""
    creator = trt.get_plugin_registry().get_creator(operator, "1", "graphq")
    plugin = creator.create_plugin(operator, "graphq", [], None, trt.QuickPluginCreationRequest.STRICT_AOT)
    types = [trt.DataType[kind] for kind, _, _ in inputs]
    result_types = plugin.get_output_data_types(types, [len(shape) for _, shape, _ in inputs])
    shapes = at or [largest for _, _, largest in inputs]
    exprs = [[trt.IDimensionExpr(size, low == high) for size, low, high in zip(shape, least, largest, strict=True)]
             for shape, (_, least, largest) in zip(shapes, inputs, strict=True)]  # fmt: skip
    (result,) = plugin.get_output_shapes(exprs, [], trt.IExprBuilder())
    descs = [trt.DynamicPluginTensorDesc(kind, least, largest) for kind, (_, least, largest) in zip(types, inputs, strict=True)]
    descs.append(trt.DynamicPluginTensorDesc(result_types[0], *[tuple(size.value for size in result)] * 2))
    combination = plugin.get_supported_format_combinations(descs, len(inputs))
    assert [one.type for one in combination] == [*types, *result_types]
    plugin.configure_plugin(descs[:-1], descs[-1:])
    assert plugin.get_valid_tactics() == []
    plugin.set_tactic(0)
    launch, scalars = SimpleNamespace(), _Scalars()
    plugin.get_launch_params(exprs, descs, len(inputs), launch, scalars, trt.IExprBuilder())
    name, ptx = plugin.get_kernel([desc.desc for desc in descs[:-1]], [descs[-1].desc])
    return SimpleNamespace(
        dtype=result_types[0].name, shape=tuple(size.value for size in result), name=name, ptx=ptx.decode(),
        scalars=[scalars[index].expr.value for index in range(scalars.nbSymExprs)], pointers=len(inputs) + 1,
        grid=launch.grid_x.expr.value, block=launch.block_x.expr.value, shared=launch.shared_mem.expr.value,
        rest=[getattr(launch, key).expr.value for key in ("grid_y", "grid_z", "block_y", "block_z")],
    )  # fmt: skip


class _Scalars(dict[int, Any]):
    nbSymExprs = 0


@pytest.mark.parametrize("case", CASES)
def test_ptx_takes_what_tensorrt_passes(trt: Any, case: str, tmp_path: Path) -> None:
    """Pointers to the inputs, scalars, a pointer to the output; a block of the size that the code was compiled for; and ptxas takes it."""
    built = build(trt, *CASES[case])
    head = re.search(rf"\.visible \.entry {built.name}\((.*?)\)(.*?){{", built.ptx, re.DOTALL)
    assert head is not None
    kinds = re.findall(r"\.param \.(\w+)", head[1])
    assert kinds == ["u64"] * (built.pointers - 1) + ["u32"] * len(built.scalars) + ["u64"]
    assert f".reqntid {built.block}" in head[2] and built.rest == [1, 1, 1, 1]
    declared = set(re.findall(rf"{built.name}_param_\d+", head[1]))
    assert set(re.findall(rf"{built.name}_param_\d+", built.ptx)) == declared
    (tmp_path / "kernel.ptx").write_text(built.ptx, encoding="utf-8")
    triton = pytest.importorskip("triton")
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    subprocess.run([ptxas, "-arch=sm_90a", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"], check=True)


@pytest.mark.parametrize("kind", ["FLOAT", "HALF", "BF16"])
def test_results_have_the_shape_and_type_of_the_operator(trt: Any, kind: str) -> None:
    x = fixed(kind, 2, 5, 7)
    made = build(trt, "SULQSoftmax", [x, PARAMS])
    assert (made.dtype, made.shape, made.scalars) == (kind, (2, 5, 7), [10, 7, 7])
    made = build(trt, "SULQSoftmaxCodes", [x, PARAMS])
    assert (made.dtype, made.shape, made.scalars) == ("INT8", (2, 5, 4), [10, 7, 4])
    made = build(trt, "SULQAttentionValue", [fixed("INT8", 2, 5, 4), LEVELS, fixed(kind, 2, 7, 9)])
    assert (made.dtype, made.shape, made.scalars) == (kind, (2, 5, 9), [5, 7, 4, 9])
