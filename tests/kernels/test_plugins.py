"""TensorRT plugins hold to NVIDIA's contract: its own code registers them, checks them and asks for kernels, as when it builds an engine.

What is TensorRT's library is replaced (tensorrt_stub.py); what these tests cannot see is what that library does with the answers.
"""

import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphq import kernels, ops, ops_gemm, ops_softmax
from graphq.errors import UsageError
from graphq.log_quantizers import LogUniform

from . import driver
from . import tensorrt_stub as stub

CUDA = driver.library()
ARCH = 90 if CUDA is None else driver.arch(CUDA)
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
    "w4a16, any batch": (
        "W4A16Gemm", [("BF16", (1, 7, 256), (9, 7, 256)), fixed("INT8", 33, 128), fixed("BF16", 1, 33), fixed("BF16", 33)],
    ),
    "w8a8": ("W8A8Gemm", [fixed("INT8", 5, 99), fixed("INT8", 64, 99), fixed("FLOAT"), fixed("FLOAT", 64), fixed("HALF", 64)]),
    "w8a8, scale a row": (
        "W8A8Gemm",
        [("INT8", (1, 64), (300, 64)), fixed("INT8", 130, 64), ("FLOAT", (1, 1), (300, 1)), fixed("FLOAT", 130), fixed("FLOAT", 130)],
    ),
    "w4a8": ("W4A8Gemm", [fixed("INT8", 100, 128), fixed("INT8", 64, 64), fixed("FLOAT"), fixed("FLOAT", 2, 64), fixed("BF16", 64)]),
    "w4a8, scale a row": (
        "W4A8Gemm",
        [("INT8", (1, 4, 128), (4, 4, 128)), fixed("INT8", 8, 64), ("FLOAT", (1, 4, 1), (4, 4, 1)), fixed("FLOAT", 1, 8), fixed("HALF", 8)],
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def trt(compiler: Any) -> Iterator[Any]:
    """`tensorrt` with the plugins of graphq."""
    module = stub.module()
    if module is None:
        pytest.skip("NVIDIA's Python files are not installed (pip install tensorrt-cu13-bindings)")
    stub.remove()
    sys.modules["tensorrt"] = module
    kernels._register.__wrapped__(ARCH)  # each replacement of TensorRT has a registry of its own
    yield module
    stub.remove()


def build(trt: Any, operator: str, inputs: list[Input], at: list[Shape] | None = None,
          namespace: str = "graphq") -> SimpleNamespace:  # fmt: skip
    """Ask for the kernel as TensorRT's builder does, and evaluate expressions for the shapes `at`, by default the largest."""
    creator = trt.get_plugin_registry().get_creator(operator, "1", namespace)
    plugin = creator.create_plugin(operator, namespace, [], None, trt.QuickPluginCreationRequest.STRICT_AOT)
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
    subprocess.run(
        [ptxas, f"-arch=sm_{ARCH}{'a' if ARCH >= 90 else ''}", tmp_path / "kernel.ptx", "-o", tmp_path / "kernel.cubin"], check=True
    )


@pytest.mark.parametrize("kind", ["FLOAT", "HALF", "BF16"])
def test_results_have_the_shape_and_type_of_the_operator(trt: Any, kind: str) -> None:
    x = fixed(kind, 2, 5, 7)
    made = build(trt, "SULQSoftmax", [x, PARAMS])
    assert (made.dtype, made.shape, made.scalars) == (kind, (2, 5, 7), [10, 7, 7])
    made = build(trt, "SULQSoftmaxCodes", [x, PARAMS])
    assert (made.dtype, made.shape, made.scalars) == ("INT8", (2, 5, 4), [10, 7, 4])
    made = build(trt, "SULQAttentionValue", [fixed("INT8", 2, 5, 4), LEVELS, fixed(kind, 2, 7, 9)])
    assert (made.dtype, made.shape, made.scalars) == (kind, (2, 5, 9), [5, 7, 4, 9])


@pytest.mark.parametrize(
    ("case", "at", "shape", "scalars", "grid"),
    [
        ("softmax, any batch", [(2, 3, 64, 64), (5,)], (2, 3, 64, 64), [384, 64, 64], 384 // 32),
        ("softmax, any length", [(1, 3, 77, 77), (5,)], (1, 3, 77, 77), [231, 77, 77], -(-231 // 4)),  # 4 rows of at most 512
        ("codes, any length", [(2, 3, 9, 77), (5,)], (2, 3, 9, 39), [54, 77, 39], -(-54 // 4)),
        ("value, any batch", [(5, 64, 32), (16,), (5, 64, 33)], (5, 64, 33), [64, 64, 32, 33], 5),
        ("w8a8, scale a row", [(7, 64), (130, 64), (7, 1), (130,), (130,)], (7, 130), [7, 130, 64, 64], None),
        ("w4a16, any batch", [(2, 7, 256), (33, 128), (1, 33), (33,)], (2, 7, 33), [14, 33, 256, 256], None),
    ],
)
def test_one_kernel_serves_all_shapes_of_an_engine(
    trt: Any, case: str, at: list[Shape], shape: Shape, scalars: list[int], grid: int | None
) -> None:
    made, largest = build(trt, *CASES[case], at=at), build(trt, *CASES[case])
    assert (made.name, made.ptx, made.block, made.shared) == (largest.name, largest.ptx, largest.block, largest.shared)
    assert (made.shape, made.scalars) == (shape, scalars)
    assert grid is None or made.grid == grid


def test_grid_of_a_product_covers_rows_and_channels(trt: Any) -> None:
    from graphq.kernels.w8a8_gemm import kernel

    launch = kernel.launch(ops_gemm.Sizes(300, 64, 130, 64), "float32", ARCH, scale_per_row=True)
    assert build(trt, *CASES["w8a8, scale a row"]).grid == launch.programs > 1


def test_every_operator_is_a_plugin_with_its_inputs(trt: Any) -> None:
    from tensorrt.plugin._lib import QDP_REGISTRY

    operators = ops.OPERATORS
    plugins = {name: plugin for name, plugin in QDP_REGISTRY.items() if name.startswith("graphq::")}
    inputs = {name: tuple(plugin.input_tensor_names) for name, plugin in plugins.items()}
    assert inputs == {f"graphq::{name}": operator.inputs for name, operator in operators.items()}
    assert set(kernels.CATALOG) == set(operators)
    assert all(not plugin.input_attrs and plugin.aot_impl_func and not plugin.impl_func for plugin in plugins.values())


def test_without_a_gpu_the_architecture_must_be_named(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"arch=90 is 9\.0"):
        kernels.register_plugins()


def test_only_declarations_of_the_ptx_change(trt: Any) -> None:
    from graphq.kernels import _compile, _plugin
    from graphq.kernels.sulq_softmax.kernel import softmax_launch

    made = _compile.compile_launch(softmax_launch(6, 64, "float16", False), ARCH)
    built = build(trt, "SULQSoftmax", [fixed("HALF", 6, 64), PARAMS])
    removed, added = set(made.ptx.splitlines()) - set(built.ptx.splitlines()), set(built.ptx.splitlines()) - set(made.ptx.splitlines())
    assert all(line.strip().startswith(".param") for line in removed | added)
    used = replace(made, ptx=made.ptx.replace("ret;", f"ld.param.b64 %rd1, [{made.name}_param_7]; ret;"))
    with pytest.raises(RuntimeError, match="scratch memory"):
        _plugin.arranged(used, 3)


@pytest.mark.parametrize(
    ("operator", "inputs", "message"),
    [
        ("SULQSoftmax", [fixed("INT4", 4, 8), PARAMS], "cannot take x of type INT4"),
        ("SULQSoftmax", [fixed("INT8", 4, 8), PARAMS], "cannot take x of type int8"),
        ("SULQSoftmaxCodes", [fixed("HALF", 4, 8), fixed("HALF", 5)], "cannot take params"),
        ("SULQAttentionValue", [fixed("UINT8", 4, 4), LEVELS, fixed("HALF", 8, 8)], "cannot take packed of type UINT8"),
        ("SULQAttentionValue", [fixed("INT8", 4, 4), LEVELS, fixed("HALF", 9, 8)], "cannot take packed"),
        ("SULQAttentionValue", [fixed("INT8", 4, 4), LEVELS, fixed("HALF", 8, 300)], "D of at most 256"),
        ("W4A16Gemm", [fixed("HALF", 1, 256), fixed("UINT8", 48, 128), fixed("HALF", 2, 48), fixed("HALF", 48)], "weight of type UINT8"),
        ("W4A16Gemm", [fixed("HALF", 1, 256), fixed("HALF", 48, 128), fixed("HALF", 2, 48), fixed("HALF", 48)], "its bytes as int8"),
        ("W8A8Gemm", [fixed("INT8", 5, 99), fixed("INT8", 64, 98), fixed("FLOAT"), fixed("FLOAT", 64), fixed("HALF", 64)], "weight"),
    ],
)
def test_what_does_not_fit_is_refused(trt: Any, operator: str, inputs: list[Input], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(trt, operator, inputs)


def test_the_replacement_of_tensorrt_lets_no_fault_pass(trt: Any) -> None:
    """Mistakes that NVIDIA's code knows are found by it here as well."""
    import tensorrt.plugin as trtp

    def describe(x: trtp.TensorDesc, bits: int) -> trtp.TensorDesc:
        return x.like()

    def postponed(x: "trtp.TensorDesc") -> "trtp.TensorDesc":
        return x.like()

    Result = tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]

    def without_bits(x: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc]) -> Result:
        raise AssertionError

    def wrong_type(x: trtp.TensorDesc, bits: float, outputs: tuple[trtp.TensorDesc], tactic: int) -> Result:
        raise AssertionError

    def wrong_result(x: trtp.TensorDesc, bits: int, outputs: tuple[trtp.TensorDesc], tactic: int) -> tuple[str, str]:
        raise AssertionError

    trtp.register("tests::Fault")(describe)
    for function, message in [
        (without_bits, "does not match the expected input arg schema"),
        (wrong_type, "different from the one specified at registration"),
        (wrong_result, "Return annotation is"),
    ]:
        with pytest.raises(ValueError, match=message):
            trtp.aot_impl("tests::Fault")(function)
    with pytest.raises(ValueError, match="not a supported serializable type|should come first"):
        trtp.register("tests::Postponed")(postponed)


@pytest.mark.parametrize(
    ("parameters", "scalars", "message"),
    [("none", "good", "Launch params must be"), ("good", "list", "Extra args must be"), ("good", "untyped", "Extra args must be")],
)
def test_wrong_launches_are_found(trt: Any, parameters: str, scalars: str, message: str) -> None:
    import tensorrt.plugin as trtp

    name = f"Launch{parameters}{scalars}"

    @trtp.register(f"tests::{name}")
    def describe(x: trtp.TensorDesc) -> trtp.TensorDesc:
        return x.like()

    @trtp.aot_impl(f"tests::{name}")
    def implement(
        x: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        made: dict[str, Any] = {"good": trtp.SymIntExprs(0), "list": [], "untyped": trtp.SymIntExprs.from_tuple((3,))}
        return "kernel", "ptx", {"good": trtp.KernelLaunchParams(), "none": None}[parameters], made[scalars]

    creator = trt.get_plugin_registry().get_creator(name, "1", "tests")
    assert creator is not None
    with pytest.raises(TypeError, match=message):
        build(trt, name, [fixed("HALF", 4, 8)], namespace="tests")


DTYPES = {"FLOAT": np.float32, "HALF": np.float16, "BF16": ml_dtypes.bfloat16, "INT8": np.int8}


def random(name: str, kind: str, shape: Shape, rng: np.random.Generator) -> np.ndarray:
    """An operand for which results are of size 1 or so."""
    if name == "params":
        quantizer = LogUniform(4)
        return ops_softmax.softmax_params(quantizer, quantizer.fit(np.geomspace(1e-3, 1, 100, dtype=np.float32)))
    if kind == "INT8":
        return rng.integers(-128, 128, shape, dtype=np.int8)
    return (rng.random(shape) / 100 if "scale" in name else rng.standard_normal(shape)).astype(DTYPES[kind])


@pytest.mark.gpu
@pytest.mark.skipif(CUDA is None, reason="there is no NVIDIA GPU")
@pytest.mark.parametrize("case", CASES)
def test_what_tensorrt_launches_computes_the_operator(trt: Any, case: str) -> None:
    """Tolerances: one code of 1000 may be the next one, for sums in another order; products have the rounding of their type."""
    operator, inputs = CASES[case]
    built = build(trt, operator, inputs)
    contract = ops.OPERATORS[operator]
    rng = np.random.default_rng(0)
    operands = {name: random(name, kind, shape, rng) for name, (kind, _, shape) in zip(contract.inputs, inputs, strict=True)}
    found = driver.launch(CUDA, built, list(operands.values()), np.full(built.shape, 85, DTYPES[built.dtype]))
    if contract.layout == "int4-halves-v1":
        operands["weight"] = operands["weight"].view(np.uint8)
    expected = contract.reference(**operands)
    if operator == "SULQSoftmaxCodes":
        apart = np.abs(ops_softmax.unpack_codes(found).astype(int) - ops_softmax.unpack_codes(expected))
        assert apart.max() <= 1 and apart.mean() <= 1e-3
        return
    error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    size = np.abs(expected.astype(np.float64)).max()
    tolerance = {"FLOAT": 2.0**-18, "HALF": 2.0**-9, "BF16": 2.0**-6}[built.dtype]
    assert np.mean(error > tolerance * size) <= (1e-3 if operator == "SULQSoftmax" else 0)
