"""What the TensorRT plugins of all kernels share: from a launch to what an ahead-of-time implementation returns.

TensorRT keeps the PTX in the engine and launches it itself, so an engine needs neither Python nor graphq. Modules called `plugin` import
`tensorrt.plugin` when they register. It reads annotations at run time: those modules must not postpone them (no `from __future__`).

What holds for such plugins:

- They take float32, float16, bfloat16 and int8 tensors, but no uint8 (`nvinfer1::PluginTensorDesc::type`) and no 4-bit ones.
- Scalars are 32-bit integers. Attributes would be compiled in; operators of graphq have none.
- `graphq.backends.plugins` turns nodes of a model into such plugins.
- An engine holds one kernel for all shapes of its profile, that of the largest, and for the one architecture it was compiled for.
- Kernels above 48 KiB of shared memory need TensorRT to raise the function's limit: NVIDIA does not say that it does, and it was not tried.
- TensorRT 11.1 and 11.2 are reported to leak a copy of the code with each change of shape (github.com/NVIDIA/TensorRT/issues/4849).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from graphq.errors import UsageError
from graphq.operands import Operand

from ._compile import Compiled, compile_launch
from ._launch import Launch

_DTYPES = {"FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8"}


def operands(**descs: Any) -> dict[str, Operand]:
    """Shapes and types of some `TensorDesc`, dynamic axes at their largest: what blocks must be able to hold.

    Raises:
        UsageError: plugins cannot have tensors of such a type.
    """
    for name, desc in descs.items():
        if desc.dtype.name not in _DTYPES:
            raise UsageError(f"A plugin cannot take {name} of type {desc.dtype.name}.", expected=", ".join(_DTYPES))
    return {
        name: Operand(tuple(desc.shape.max if desc.shape.is_dynamic else desc.shape), _DTYPES[desc.dtype.name])
        for name, desc in descs.items()
    }  # fmt: skip


def as_packed(found: dict[str, Operand]) -> dict[str, Operand]:
    """`found` with its packed weight as `graphq.ops_gemm` has it, in uint8: TensorRT holds the same bytes as int8."""
    if found["weight"].dtype != "int8":
        raise UsageError(f"A plugin cannot take a packed weight of type {found['weight'].dtype}.", expected="its bytes as int8")
    return found | {"weight": replace(found["weight"], dtype="uint8")}


def count(desc: Any, axes: slice) -> Any:
    """Number of entries along these axes of a `TensorDesc`, as a symbolic expression."""
    import tensorrt.plugin as trtp

    return trtp.ShapeExprs.from_tuple(tuple(desc.shape_expr)[axes]).numel()


def device_arch() -> int:
    """Compute capability of the current GPU, 90 for 9.0.

    Raises:
        UsageError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UsageError("There is no GPU to compile plugins for.", hint="name one by its compute capability: arch=90 is 9.0")
    major, minor = torch.cuda.get_device_capability()
    return major * 10 + minor


def embed(launch: Launch, arch: int, scalars: Mapping[str, Any], programs: Any) -> tuple[str, str, Any, Any]:
    """What an `aot_impl` returns: entry point, PTX, launch parameters, scalar arguments.

    Args:
        launch: For the largest shape.
        scalars: A symbolic expression for each scalar of `launch`, by name.
        programs: Their number, an expression as well.
    """
    import tensorrt.plugin as trtp

    dynamic = {name for name, value in scalars.items() if not value.is_constant}
    compiled = compile_launch(launch, arch, unaligned=dynamic)
    parameters = trtp.KernelLaunchParams(grid_x=programs, block_x=compiled.threads, shared_mem=compiled.shared_bytes)
    arguments = trtp.SymIntExprs.from_tuple(tuple(trtp.SymInt32(scalars[name]) for name in compiled.scalars))
    return compiled.name, arranged(compiled, len(launch.types)), parameters, arguments


def embed_product(launch: Launch, arch: int, x: Any, weight: Any) -> tuple[str, str, Any, Any]:
    """`embed`, for the kernels whose scalars are those of a matrix product, from the `TensorDesc` of x [.., M, K] and of weight [N, ..].

    An engine for many values of M has one kernel for all, that of the largest: build another for decoding.
    """
    import tensorrt.plugin as trtp

    m, n, k = count(x, slice(-1)), weight.shape_expr[0], x.shape_expr[-1]
    strides = {name: trtp.ShapeExpr(value) for name, value in launch.scalars.items() if name.startswith("stride_")}
    programs = trtp.cdiv(m, launch.constants["BLOCK_M"]) * trtp.cdiv(n, launch.constants["BLOCK_N"])
    return embed(launch, arch, {"M": m, "N": n, "K": k, **strides}, programs)


def arranged(compiled: Compiled, pointers: int) -> str:
    """The PTX with its parameters as TensorRT passes them: inputs, scalars, output.

    Triton's order is pointers, scalars, and two pointers to scratch memory. Those are dropped, for TensorRT has nothing to put there.
    Only declarations move: the code refers to them by name.

    Raises:
        RuntimeError: the kernel uses scratch memory.
    """
    head = re.search(rf"\.entry {re.escape(compiled.name)}\(\n(.*?)\n\)", compiled.ptx, re.DOTALL)
    assert head is not None, f"{compiled.name} has no entry point"
    declared = head[1].split(",\n")
    assert len(declared) == len(compiled.parameters)
    used, (first, second) = declared[:-2], declared[-2:]
    for scratch in (first, second):
        if compiled.ptx.count(scratch.split()[-1]) > 1:
            raise RuntimeError(f"{compiled.name} uses scratch memory, which TensorRT does not have for it")
    ordered = [*used[: pointers - 1], *used[pointers:], used[pointers - 1]]
    return compiled.ptx[: head.start(1)] + ",\n".join(ordered) + compiled.ptx[head.end(1) :]
