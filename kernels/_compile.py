"""Compile a launch ahead of time, for any NVIDIA GPU and without one: what plugins embed and what the tables of resources are made of."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ._launch import INTERPRETED, Launch

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, technical specifications)."""

PTX_VERSION = 87
"""8.7, the first that knows sm_120, which drivers of CUDA 12.8 and later read. Triton would write the newest that its own tools know."""

_TYPES = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32", "int8": "i8", "uint8": "u8", "int32": "i32"}
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code.

    Attributes:
        name: Its entry point.
        ptx: Text that a driver compiles for the GPU at hand.
        cubin: Machine code for one architecture.
        scalars: The integers that it takes after its pointers, int32, in order.
        parameters: Types of all parameters, as PTX names them; the last two are pointers to scratch memory that these kernels leave alone.
        threads: Of a program.
        shared_bytes: Dynamic shared memory of a program, to be asked for at launch.
    """

    name: str
    ptx: str
    cubin: bytes
    scalars: tuple[str, ...]
    parameters: tuple[str, ...]
    threads: int
    shared_bytes: int

    @cached_property
    def _usage(self) -> dict[str, int]:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.cubin)
            file.flush()
            told = subprocess.run([_TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
        return {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", told.stdout)}

    @property
    def registers(self) -> int:
        """Of a thread."""
        return self._usage["REG"]

    @property
    def spill_bytes(self) -> int:
        """Bytes of a thread that lie in memory because registers ran out."""
        return self._usage["STACK"] + self._usage["LOCAL"]


def compile_launch(launch: Launch, arch: int, unaligned: Collection[str] = ()) -> Compiled:
    """Machine code of `launch` for compute capability `arch`.

    Pointers are taken to be multiples of 16 bytes. So are those scalars that are multiples of 16 in `launch`, but for the `unaligned`;
    others may take any value at run time. A stride of 1 is compiled in, which is what makes loads wide, and is no parameter.

    Raises:
        RuntimeError: kernels are interpreted in this process.
    """
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET is set: the kernels of this process cannot be compiled")
    fixed = {name: value for name, value in launch.scalars.items() if name.startswith("stride_") and value == 1}
    constants = {**fixed, **launch.constants}
    pointers = launch.function.arg_names[: len(launch.types)]
    signature = {name: f"*{_TYPES[kind]}" for name, kind in zip(pointers, launch.types, strict=True)}
    signature |= {name: "i32" for name in launch.scalars} | dict.fromkeys(constants, "constexpr")
    ordered = {name: signature[name] for name in launch.function.arg_names}
    aligned = {*pointers, *(name for name, value in launch.scalars.items() if value % 16 == 0 and name not in unaligned)}
    hints = {(index,): [["tt.divisibility", 16]] for index, name in enumerate(ordered) if name in aligned and name not in constants}
    made = triton.compile(
        ASTSource(fn=launch.function, signature=ordered, constexprs=constants, attrs=hints),
        target=GPUTarget("cuda", arch, 32),
        options={"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True, "ptx_version": PTX_VERSION},
    )
    head = made.asm["ptx"].split(".entry", 1)[1].split("{", 1)[0]
    return Compiled(
        name=made.metadata.name,
        ptx=made.asm["ptx"],
        cubin=made.asm["cubin"],
        scalars=tuple(name for name in launch.scalars if name not in fixed),
        parameters=tuple(re.findall(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)", head)),
        threads=made.metadata.num_warps * 32,
        shared_bytes=made.metadata.shared,
    )
