"""What each runtime can express and what it fuses: tables, read by the passes that place quantizers.

The facts were found by running; each has a test in `tests/core/test_targets.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

import numpy as np

from graphq import ir, linear
from graphq.errors import TargetError
from graphq.names import unknown_name
from graphq.spec import PerAxis, PerTensor, QuantSpec


@dataclass(frozen=True)
class OpRule:
    """How a runtime takes one operator type when it is quantized.

    Attributes:
        anchor: Worth quantizing for its own sake (it has weights). Others are quantized only between quantized neighbours.
        quantized_output: There is an integer kernel only if the output is quantized as well.
        shared_scale: Inputs and output use one scale, so that the integers pass through unchanged.
    """

    anchor: bool = False
    quantized_output: bool = False
    shared_scale: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime as a table.

    Attributes:
        activation, weight: The formats of its fast integer path; a weight's axis is set per node.
        bias_int32: Whether a bias may be an INT32 DequantizeLinear with scale `x_scale * w_scale`.
        symmetric_only: Whether a zero point other than 0 is refused.
        opset, ir_version: The newest it loads.
        ops: Rule by operator type; operators without a row stay float.
        fused_activations: Operators that disappear into the integer kernel before them.
        moves_codes: Operators that only move elements, of 8-bit integers as well as of floats.
        forms: Forms of float operators that it runs faster than what exporters write; see the passes `tune` and `round`.
        storage: Element types that its DequantizeLinear takes.
        activation_storage: Those of them that activations may have; narrower codes are stored in 8 bits, clipped.
        narrow_weights: Operator types whose weights may be stored in fewer than 8 bits.
        measures_speed: Whether ONNX Runtime is what runs it, so that speed can be measured here.
        halves: Half-precision types whose operators it has, by the names that recipes use.
        integer_lookup: Whether a Gather may read a constant table of integers that are dequantized after it.
        takes_plugins: Whether operators of the domain `graphq` can be bound to kernels of graphq there.
        builds_engines: Whether results can be compiled to an engine file.
        engine_lacks: Names of the `EngineOptions` that its builder does not have, with the reason.
        sparse: Multiples that the outputs and inputs of a layer have to be for its kernels of 2:4 sparse weights; None if it has
            none (see `graphq.sparse_kernels`).
    """

    name: str
    about: str
    activation: QuantSpec
    weight: QuantSpec
    bias_int32: bool
    symmetric_only: bool
    opset: int
    ir_version: int
    ops: Mapping[str, OpRule]
    fused_activations: frozenset[str] = frozenset()
    moves_codes: frozenset[str] = frozenset()
    forms: frozenset[str] = frozenset()
    storage: frozenset[str] = frozenset({"int8", "uint8", "int4", "uint4"})
    activation_storage: frozenset[str] = frozenset({"int8", "uint8", "int4", "uint4"})
    narrow_weights: frozenset[str] = frozenset(linear.LINEAR_OPS)
    measures_speed: bool = False
    takes_plugins: bool = False
    builds_engines: bool = False
    engine_lacks: Mapping[str, str] = field(default_factory=dict)
    sparse: tuple[int, int] | None = None
    halves: frozenset[str] = frozenset({"fp16", "bf16"})
    integer_lookup: bool = True
    minimum_opset: int = field(default=21)

    def in_floats(self) -> Target:
        """The same runtime with 8-bit floats (E4M3) in place of its integers."""
        activation, weight = (QuantSpec(granularity=spec.granularity, grid="e4m3") for spec in (self.activation, self.weight))
        return replace(self, activation=activation, weight=weight, bias_int32=False)


_SHAPE_ONLY = ("Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze", "Identity")
_ANCHORS = {"Conv": OpRule(anchor=True), "Gemm": OpRule(anchor=True), "MatMul": OpRule(anchor=True)}
_ORT_OPS = {
    **_ANCHORS,
    "Conv": OpRule(anchor=True, quantized_output=True),
    "Add": OpRule(quantized_output=True),
    "Concat": OpRule(quantized_output=True, shared_scale=True),
    "MaxPool": OpRule(quantized_output=True, shared_scale=True),
    "GlobalAveragePool": OpRule(quantized_output=True),
    "AveragePool": OpRule(quantized_output=True),
    "LeakyRelu": OpRule(quantized_output=True),
    "Sigmoid": OpRule(quantized_output=True),
    **{op: OpRule(quantized_output=True, shared_scale=True) for op in _SHAPE_ONLY},
}
_INT8 = QuantSpec(8, signed=True, symmetric=True, granularity=PerTensor())
_INT8_WEIGHT = replace(_INT8, granularity=PerAxis(0))

_TENSORRT = Target(
    name="tensorrt",
    about="NVIDIA TensorRT 11: strongly typed, symmetric INT8, float bias",
    activation=_INT8, weight=_INT8_WEIGHT, bias_int32=False, symmetric_only=True, opset=24, ir_version=11,
    ops=MappingProxyType(_ANCHORS), storage=frozenset({"int8", "int4", "float8e4m3fn", "float4e2m1"}),
    activation_storage=frozenset({"int8", "float8e4m3fn"}),
    narrow_weights=frozenset({"Gemm", "MatMul"}), forms=frozenset({"split-projection"}), integer_lookup=False,
    takes_plugins=True, builds_engines=True, sparse=(8, 16),
    engine_lacks=MappingProxyType({"compute_capability": "it builds for the GPU that it finds"}),
)  # fmt: skip

TARGETS: Mapping[str, Target] = MappingProxyType({
    "onnxruntime": Target(
        name="onnxruntime",
        about="ONNX Runtime on a CPU: uint8 activations with int8 weights run on VNNI and AMX",
        activation=replace(_INT8, signed=False, symmetric=False), weight=_INT8_WEIGHT, bias_int32=True, symmetric_only=False,
        opset=26, ir_version=13, ops=MappingProxyType(_ORT_OPS), fused_activations=frozenset({"Relu", "Clip"}),
        moves_codes=frozenset({*_SHAPE_ONLY, "SpaceToDepth"}),
        forms=frozenset({
            "sum-before-norm", "block-convolution", "pooled-mean", "floored-mask", "split-projection", "attention-bias", "upright-gemm",
        }),
        storage=frozenset({"int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "uint16", "int32"}), measures_speed=True,
        halves=frozenset({"fp16"}),
    ),
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": replace(
        _TENSORRT, name="tensorrt-rtx", about="NVIDIA TensorRT-RTX: as tensorrt, no plugins",
        takes_plugins=False,
        engine_lacks=MappingProxyType({"timing_cache": "it measures nothing while it builds", "plugins": "it has none"}),
    ),
    "generic": Target(
        name="generic", about="any runtime with QuantizeLinear and DequantizeLinear: symmetric INT8, float bias",
        activation=_INT8, weight=_INT8_WEIGHT, bias_int32=False, symmetric_only=False, opset=26, ir_version=13, takes_plugins=True,
        ops=MappingProxyType(_ANCHORS),
        storage=frozenset({
            "int8", "uint8", "int4", "uint4", "int2", "uint2", "int16", "uint16", "int32", "float8e4m3fn", "float4e2m1",
        }),
        activation_storage=frozenset({"int8", "uint8", "int4", "uint4", "float8e4m3fn"}),
    ),
})  # fmt: skip


def get_target(name: str) -> Target:
    if name not in TARGETS:
        raise TargetError(**unknown_name("target", name, TARGETS))
    return TARGETS[name]


def violations(model: ir.Model, target: Target) -> Iterator[tuple[str, str]]:
    """What `target` would refuse, as (node, rule)."""
    if ir.opset(model) > target.opset:
        yield "model", f"opset {ir.opset(model)} is newer than {target.opset}"
    for node in ir.all_nodes(model):
        if node.domain != "" or node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        integer = node.inputs[0] if node.op_type == "DequantizeLinear" else node.outputs[0]
        typed = [value for value in (integer, *node.inputs[2:3]) if value is not None and value.dtype is not None]
        storage = str(typed[0].dtype).lower() if typed else None
        if storage is not None and storage not in target.storage and storage.startswith(("int", "uint", "float8", "float4")):
            yield ir.describe(node), f"{target.name} does not take {storage} in {node.op_type}"
        zero = ir.constant(node.inputs[2]) if target.symmetric_only and len(node.inputs) > 2 else None
        if zero is not None and np.any(zero.astype(np.int64)):
            yield ir.describe(node), f"{target.name} refuses zero points other than 0"


def require_legal(model: ir.Model, target: Target) -> None:
    """Raises TargetError naming the first nodes that `target` would refuse, with the rule."""
    found = list(violations(model, target))
    if found:
        rows = "; ".join(f"{node}: {rule}" for node, rule in found[:3])
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise TargetError(
            f"{target.name} cannot run this model.", where=rows + more, hint="choose another target, or a recipe for this one"
        )
