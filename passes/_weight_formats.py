"""What passes that store weights need to know of them besides their numbers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from graphq import ir, linear, precision, qdq
from graphq.editor import Editor
from graphq.errors import TargetError
from graphq.precision import Bits
from graphq.spec import PerAxis, PerGroup, QuantSpec
from graphq.targets import Target


def require_stored(name: str, storage: str, target: Target, where: str) -> None:
    """Raises TargetError if `target` does not read weights of the ONNX type `storage`, which the pass `name` would write."""
    if storage not in target.storage:
        raise TargetError(
            f"{target.name} does not take {storage} weights.", where=f"pass {name}, {where}",
            expected=f"one of {', '.join(sorted(target.storage))}",
        )  # fmt: skip


def storable(name: str, node: ir.Node, bits: int, target: Target, *, symmetric: bool = True, numbers: int = 1) -> QuantSpec | str:
    """The format of a weight, with a scale for each of axis 0, of the bits that `node` asks for, or else `bits`; or why it stays float.

    Args:
        name: Of the pass that stores it.
        numbers: Weights that one code stands for, whose bits it has all.

    Raises:
        TargetError: `target` does not read it.
    """
    asked = precision.asked(node, Bits(bits, None)).weight
    if asked is None:
        return "a float weight was asked for it"
    require_stored(name, QuantSpec(asked * numbers, signed=symmetric).storage, target, f"{ir.describe(node)}, {asked} bits")
    return QuantSpec(asked, signed=symmetric, symmetric=symmetric, granularity=PerAxis(0))


def not_grouped(node: ir.Node, group_size: int | None, *, whole: bool = False) -> str | None:
    """Why the weight of `node` cannot have a scale for each `group_size` of its inputs; None if it can, or for no groups.

    Args:
        whole: Whether the last group must not be smaller than the others: DequantizeLinear allows that, a reshape does not.
    """
    shape = ir.constant_shape(linear.weight_of(node))
    if not group_size:
        return None
    if len(shape) != 2:
        return "groups along the reduction axis need a matrix, this weight has kernel positions"
    size = shape[linear.in_axis(node)]
    return f"its {size} inputs are not a multiple of the group size {group_size}" if whole and size % group_size else None


def in_groups(node: ir.Node, spec: QuantSpec, group_size: int | None, *, whole: bool = False) -> QuantSpec:
    """`spec` with a scale for each `group_size` of the inputs of `node`, or an output channel where there cannot be groups, or no two."""
    shape = ir.constant_shape(linear.weight_of(node))
    has_groups = not_grouped(node, group_size, whole=whole) is None and (group_size or 0) <= shape[linear.in_axis(node)]
    return qdq.spec_for_weight(node, spec, group_size or None if has_groups else None)


def of_rows(spec: QuantSpec) -> QuantSpec:
    """`spec` of a weight for its rows [O, K]."""
    return replace(spec, granularity=PerGroup(1, spec.granularity.size) if isinstance(spec.granularity, PerGroup) else PerAxis(0))


def turn(edit: Editor, nodes: Iterable[ir.Node]) -> None:
    """Store the weights of Gemms that transpose them the other way round, where they read floats and share the weight with nobody.

    ONNX Runtime 1.31 multiplies blocked codes (MatMulNBits) behind a MatMul or a Gemm with `transB = 0`; before one with `transB = 1` it
    makes floats of them at every run.
    """
    for node in nodes:
        weight, maker = linear.weight_of(node), ir.producer(linear.data_of(node))
        array = ir.constant(weight)
        if node.op_type != "Gemm" or not ir.attribute(node, "transB", 0) or (maker is not None and qdq.is_quantizer(maker)):
            continue
        if weight is not None and array is not None and len(ir.uses(weight)) == 1:
            edit.set_weight(node, linear.LINEAR_OPS["Gemm"].weight, np.ascontiguousarray(array.T))
            edit.set_attribute(node, "transB", 0)
