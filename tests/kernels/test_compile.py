"""Every configuration of the tables compiles for its architecture without a GPU, to the instructions it is meant for, and fits."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest

from graphq import ops_gemm
from graphq.errors import UsageError

KERNELS = ("w4a16_gemm", "w8a8_gemm", "w4a8_gemm")
ARCHS = (80, 86, 89, 90, 120)
MMA = r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.f16\.f16\.f32", r"mma\.sync\.aligned\.m16n8k32\.row\.col\.satfinite\.s32\.s8\.s8\.s32"
WGMMA = r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.f16\.f16", r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8\.s8"


def module(name: str) -> Any:
    return importlib.import_module(f"graphq.kernels.{name}.kernel")


def sizes(name: str, m: int) -> ops_gemm.Sizes:
    return ops_gemm.Sizes(m, 4096, 4096, 4096 if name == "w8a8_gemm" else 128)


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("name", KERNELS)
def test_tables_fit_their_architectures(compiler: Any, name: str, arch: int) -> None:
    """No configuration spills registers or asks for more shared memory than there is; all use tensor cores as they should."""
    for limit, config in module(name).TABLE[arch]:
        m = int(min(limit, 4096))
        found = compiler.compile_launch(module(name).launch(sizes(name, m), "float16", arch), arch)
        assert found.spill_bytes == 0 and found.registers <= 255, config
        assert found.shared_bytes <= compiler.SHARED_LIMIT[arch], config
        assert found.threads == config.warps * 32
        of_floats, of_integers = WGMMA if arch == 90 and not config.split else MMA
        assert re.search(of_floats if name == "w4a16_gemm" else of_integers, found.ptx), config
        assert f".target sm_{arch}" in found.ptx and f".entry {found.name}(" in found.ptx


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("m", [1, 4096])
def test_bfloat16(compiler: Any, m: int, arch: int) -> None:
    found = compiler.compile_launch(module("w4a16_gemm").launch(sizes("w4a16_gemm", m), "bfloat16", arch), arch)
    assert re.search(r"mma\S+(f32\.)?bf16\.bf16", found.ptx) and "fma.rn.bf16x2" in found.ptx
    assert found.spill_bytes == 0


@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("m", [1, 4096])
@pytest.mark.parametrize("arch", [80, 90])
def test_weights_are_read_in_wide_pieces_and_stay_operands(compiler: Any, name: str, m: int, arch: int) -> None:
    """Most asynchronous copies are of 16 bytes, and nothing but sums is converted from integers to floats."""
    found = compiler.compile_launch(module(name).launch(sizes(name, m), "float16", arch), arch)
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x([0-9a-f]+)", found.ptx)
    assert set(copies) <= {"10", "8", "4"} and copies.count("10") > len(copies) / 2
    assert name != "w4a16_gemm" or "cvt.rn.f16.s" not in found.ptx


@pytest.mark.parametrize("name", KERNELS)
def test_any_size_and_stride_compiles(compiler: Any, name: str) -> None:
    """Tails of K, groups of 32, x with strides of its own: what a plugin for any shape may ask for."""
    odd = ops_gemm.Sizes(3, 1056, 100, 1056 if name == "w8a8_gemm" else 32)
    strided = compiler.compile_launch(module(name).launch(odd, "float16", 89, strides=(7, 5)), 89)
    assert strided.scalars[:5] == ("M", "N", "K", "stride_xm", "stride_xk")
    unaligned = compiler.compile_launch(module(name).launch(odd, "float16", 89), 89, unaligned=("M", "N", "K", "stride_xm"))
    assert unaligned.scalars[:4] == ("M", "N", "K", "stride_xm") and "stride_xk" not in unaligned.scalars
    for found in (strided, unaligned):
        pointers = len(module(name).launch(odd, "float16", 89).types)
        assert found.parameters == ("u64",) * pointers + ("u32",) * len(found.scalars) + ("u64",) * 2


def test_newer_architectures_take_the_next_lower_table() -> None:
    from graphq.kernels._launch import pick

    table = module("w8a8_gemm").TABLE
    assert pick(table, 100, 4096) == pick(table, 90, 4096) and pick(table, 121, 1) == pick(table, 120, 1)
    assert pick(table, 75, 1) == pick(table, 80, 1)


@pytest.mark.parametrize("name", KERNELS)
def test_candidates_include_the_tables(name: str) -> None:
    """What a benchmark times holds what is chosen without one."""
    for table in module(name).TABLE.values():
        for limit, config in table:
            assert config in set(module(name).configs(int(min(limit, 4096)))), config


def test_there_is_no_kernel_for_float32_activations() -> None:
    with pytest.raises(UsageError, match="no kernel for float32"):
        module("w4a16_gemm").launch(sizes("w4a16_gemm", 1), "float32", 90)


# ---- assembly that the interpreter cannot run -----------------------------------------------------------------------


def run_assembly(text: str, word: int, outputs: int) -> list[int]:
    """What the few instructions of our inline assembly leave in $0.., given the input register."""
    values: dict[str, int] = {f"${outputs}": word}

    def value(operand: str) -> int:
        return values[operand] if operand in values else int(operand, 0)

    def fma(dtype: Any, a: int, b: int, c: int) -> int:
        x, y, z = (np.array([n], np.uint32).view(dtype).astype(np.float64) for n in (a, b, c))
        return int((x * y + z).astype(dtype).view(np.uint32)[0])

    def prmt(a: int, b: int, selector: int) -> int:
        either = (a | b << 32).to_bytes(8, "little")
        return int.from_bytes(bytes(either[selector >> 4 * i & 7] for i in range(4)), "little")

    def lop3(a: int, b: int, c: int, table: int) -> int:
        return sum((table >> ((a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1) & 1) << i for i in range(32))

    import ml_dtypes

    instructions = {
        "and.b32": lambda a, b: a & b,
        "shr.u32": lambda a, b: a >> b,
        "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
        "mov.b32": lambda a: a,
        "prmt.b32": prmt,
        "lop3.b32": lop3,
        "fma.rn.f16x2": lambda a, b, c: fma(np.float16, a, b, c),
        "fma.rn.bf16x2": lambda a, b, c: fma(ml_dtypes.bfloat16, a, b, c),
    }
    for line in re.findall(r"[^{};]+(?=;)", text):
        name, operands = line.strip().split(maxsplit=1)
        if name != ".reg":
            target, *sources = (operand.strip() for operand in operands.split(","))
            values[target] = instructions[name](*map(value, sources))
    return [values[f"${index}"] for index in range(outputs)]


BYTES = np.random.default_rng(0).permutation(np.repeat(np.arange(256, dtype=np.uint8), 4)).reshape(-1, 4)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_assembly_unpacks_to_floats(compiler: Any, dtype: str) -> None:
    """All bytes in all places."""
    import ml_dtypes

    kind = np.float16 if dtype == "float16" else ml_dtypes.bfloat16
    text = getattr(module("w4a16_gemm"), f"_UNPACK_{dtype.upper()}").value
    for four in BYTES:
        found = np.array(run_assembly(text, int(four.view(np.uint32)[0]), 4), np.uint32).view(kind).astype(np.int32)
        np.testing.assert_array_equal(found, np.concatenate([four & 15, four >> 4]).astype(np.int32) - 8)


def test_assembly_unpacks_to_integers(compiler: Any) -> None:
    text = module("w4a8_gemm")._UNPACK.value
    for four in BYTES:
        found = np.array(run_assembly(text, int(four.view(np.uint32)[0]), 2), np.uint32).view(np.int8)
        np.testing.assert_array_equal(found, (np.concatenate([four & 15, four >> 4]).astype(np.int32) - 8) * 16)
