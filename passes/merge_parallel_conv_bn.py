"""merge-parallel-conv-bn: one operator for a sum of linear branches of the same input, as SpRe and RepVGG train them.

A branch is a Conv (or Gemm or MatMul), a BatchNormalization or the input itself, and what multiplies it or is added to it a
channel. Smaller kernels are padded to the one that covers all; what comes out is the same, at the cost of one branch. Zeros that
all branches share stay: N:M sparse branches under one mask give an N:M sparse weight. Where nothing matches it costs milliseconds.
SpRe: arXiv 2306.05612; RepVGG: arXiv 2101.03697.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from graphq import ir, linear
from graphq.passes import _parallel_math as math
from graphq.passes._normalize_batch_norm import BATCH_NORM
from graphq.passes._normalize_math import affine
from graphq.passes._parallel_math import Kernel, Taps
from graphq.passes._shapes import infer_shapes
from graphq.pipeline import Pass, PassContext, pass_options

_LINEAR = frozenset({"Conv", "Gemm", "MatMul"})
_SUMS = frozenset({"Add", "Sum"})


@dataclass(frozen=True)
class _Branch:
    """A summand: what `node` makes of `source`, or `source` itself without one, changed a channel by `steps`, the last one first."""

    value: ir.Value
    source: ir.Value
    node: ir.Node | None
    steps: tuple[ir.Node, ...]


_Group = list[tuple[_Branch, Kernel]]
"""Branches that become one operator; the first has a node, which that will be."""


@pass_options
class MergeParallelConvBn(Pass):
    """Merges parallel branches of convolutions and normalizations into one convolution, exactly.

    Attributes:
        identity: Whether branches without a weight (the input itself, or a BatchNormalization of it) are merged too. They stand
            out in the merged weight, which formats of few bits then have to cover.
    """

    name: ClassVar[str] = "merge-parallel-conv-bn"
    keeps_function: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False

    identity: bool = True

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        before = ctx.edit.version
        for root in [node for node in model.graph.all_nodes() if _is_sum(node) and not _is_summand(node)]:
            self._merge_in(ctx, root)
        if ctx.edit.version > before:
            ctx.edit.prune()  # of constants
            infer_shapes(ctx)

    def _merge_in(self, ctx: PassContext, root: ir.Node) -> None:
        """Merge what can be merged in the sum that ends with `root`."""
        values = _summands(root)
        branches = [_branch(value, root) for value in values if not value.is_initializer()]
        groups = [group for source in dict.fromkeys(branch.source for branch in branches)
                  for group in self._groups(ctx, [branch for branch in branches if branch.source is source])]  # fmt: skip
        _name_shared(ctx, branches)
        if not groups:
            return
        _name_shared(ctx, branches)
        left = [value for value in values if not any(branch.value is value for group in groups for branch, _ in group)]
        merged = []
        for group in groups:
            kernel, node = math.merged([kernel for _, kernel in group]), group[0][0].node
            assert node is not None
            for value in [value for value in left if ir.constant(value) is not None]:
                numbers = _numbers(ir.constant(value), node, len(kernel.bias))
                if numbers is not None:
                    kernel = kernel.scaled(np.ones(1), numbers)
                    left.remove(value)
            merged.append(_write(ctx, group, kernel))
        total = merged[0]
        for value in [*merged[1:], *left]:
            total = ctx.edit.insert(root, "Add", [total, value], output=f"{root.outputs[0].name}_sum")
        ctx.edit.replace(root.outputs[0], total)
        _remove_unread(ctx, root)

    def _groups(self, ctx: PassContext, branches: Sequence[_Branch]) -> list[_Group]:
        """Of branches of one source, those that become one operator, the largest kernel first."""
        if len(branches) < 2 or all(branch.node is None for branch in branches):
            return []
        found, groups = list[tuple[_Branch, Kernel]](), list[_Group]()
        for branch in branches:
            kernel = _kernel(branch, branch.node) if branch.node is not None else None
            if isinstance(kernel, str) and branch.node is not None:
                ctx.skip(branch.node, f"not merged with the branches beside it: {kernel}")
            elif isinstance(kernel, Kernel):
                found.append((branch, kernel))
        for entry in sorted(found, key=lambda entry: -entry[1].weight.size):
            _join(ctx, groups, *entry)
        for branch in branches if self.identity and groups else []:
            host = groups[0][0][0].node
            if branch.node is None and host is not None:
                kernel = _plain(branch, host, groups[0][0][1])
                if isinstance(kernel, Kernel) and math.conflict([*(one for _, one in groups[0]), kernel]) is None:
                    groups[0].append((branch, kernel))
        return [group for group in groups if len(group) > 1]


def _join(ctx: PassContext, groups: list[_Group], branch: _Branch, kernel: Kernel) -> None:
    """Put a branch into the first group that it fits into, or a new one."""
    reason = None
    for group in groups:
        reason = math.conflict([*(one for _, one in group), kernel])
        if reason is None:
            group.append((branch, kernel))
            return
    groups.append([(branch, kernel)])
    if reason is not None and branch.node is not None:
        ctx.skip(branch.node, f"not merged with the branches beside it: {reason}")


# ---- reading --------------------------------------------------------------------------------------------------------


def _is_sum(node: ir.Node) -> bool:
    return not node.domain and node.op_type in _SUMS and ir.is_float(node.outputs[0])


def _reader(value: ir.Value) -> ir.Node | None:
    """The only node that reads `value`, in the graph that it is made in; None if others do, or the graph returns it."""
    uses, maker = ir.uses(value), value.producer()
    if len(uses) != 1 or value.is_graph_output() or maker is None or uses[0].node.graph is not maker.graph:
        return None
    return uses[0].node  # type: ignore[no-any-return]


def _is_summand(node: ir.Node) -> bool:
    reader = _reader(node.outputs[0])
    return reader is not None and _is_sum(reader)


def _summands(root: ir.Node) -> list[ir.Value]:
    """What a tree of sums adds up."""
    found, stack = list[ir.Value](), [value for value in reversed(root.inputs) if value is not None]
    while stack:
        value = stack.pop()
        maker = value.producer()
        if maker is not None and maker.graph is root.graph and _is_sum(maker) and _is_summand(maker):
            stack += [part for part in reversed(maker.inputs) if part is not None]
        else:
            found.append(value)
    return found


def _branch(value: ir.Value, root: ir.Node) -> _Branch:
    """Follow `value` back to the operator with weights that makes it, or to what others read too."""
    steps, source = list[ir.Node](), value
    while (node := source.producer()) is not None and node.graph is root.graph and not node.domain and _reader(source) is not None:
        if node.op_type in _LINEAR:
            return _Branch(value, linear.data_of(node), node, tuple(steps))
        index = _step_input(node)
        if index is None or node.inputs[index] is None:
            break
        steps.append(node)
        source = node.inputs[index]  # type: ignore[assignment]
    return _Branch(value, source, None, tuple(steps))


def _step_input(node: ir.Node) -> int | None:
    """The input that `node` multiplies, shifts or normalizes with constants; None if it does something else."""
    if node.op_type == "BatchNormalization":
        plain = not ir.attribute(node, "training_mode", 0) and not any(out.uses() or out.is_graph_output() for out in node.outputs[1:])
        return 0 if plain and all(ir.constant(value) is not None for value in node.inputs[1:5]) else None
    if node.op_type not in ("Mul", "Add"):
        return None
    moving = [index for index, value in enumerate(node.inputs) if ir.constant(value) is None]
    return moving[0] if len(moving) == 1 else None


def _kernel(branch: _Branch, node: ir.Node) -> Kernel | str:
    """A branch with an operator `node`, or why it is none that can be merged."""
    reason = linear.linear_refusal(node)
    if reason is not None:
        return reason
    bias = linear.bias_of(node)
    weight, given = ir.constant(linear.weight_of(node)), ir.constant(bias)
    assert weight is not None
    if bias is not None and given is None:
        return "its bias is not a constant"
    if ir.attribute(node, "transA", 0):
        return "it transposes its input"
    rows = weight.astype(np.float64) if linear.out_axis(node) == 0 else weight.astype(np.float64).T
    numbers = np.zeros(len(rows)) if given is None else given if node.op_type == "Conv" else _numbers(given, node, len(rows))
    if numbers is None:
        return "its bias is not one number a channel"
    if node.op_type != "Conv":
        factors = [float(ir.attribute(node, name, 1.0)) for name in ("alpha", "beta")]
        return _changed(branch, node, Kernel(factors[0] * rows, factors[1] * numbers))
    axes = rows.ndim - 2
    strides, dilations = (tuple(ir.attribute(node, name, (1,) * axes)) for name in ("strides", "dilations"))
    pads = _pads(node, weight.shape[2:], strides, dilations)
    if pads is None:
        return "its padding depends on the size of its input"
    taps = tuple(map(Taps.of, weight.shape[2:], dilations, pads[:axes], pads[axes:]))
    return _changed(branch, node, Kernel(rows, numbers, taps, strides, int(ir.attribute(node, "group", 1))))


def _pads(node: ir.Node, sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]) -> list[int] | None:
    """Padding in front of each axis, then behind each; None where it is known at run time only."""
    auto = ir.attribute(node, "auto_pad", "NOTSET")
    if auto == "NOTSET":
        return list(ir.attribute(node, "pads", (0,) * (2 * len(sizes))))
    if auto == "VALID":
        return [0] * (2 * len(sizes))
    if set(strides) != {1}:
        return None
    totals = [(size - 1) * dilation for size, dilation in zip(sizes, dilations, strict=True)]
    small, large = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return [*small, *large] if auto == "SAME_UPPER" else [*large, *small]


def _plain(branch: _Branch, host: ir.Node, kernel: Kernel) -> Kernel | str:
    """A branch without an operator as one that is added to `kernel` of `host`."""
    channels = len(kernel.weight)
    if channels != kernel.weight.shape[1] * kernel.groups:
        return "it has another number of channels"
    return _changed(branch, host, math.identity(channels, kernel.groups, len(kernel.taps)))


def _changed(branch: _Branch, host: ir.Node, kernel: Kernel) -> Kernel | str:
    """`kernel` with the steps of a branch behind it, channels as those of `host`."""
    for step in reversed(branch.steps):
        if step.op_type == "BatchNormalization":
            if linear.channel_axis(host) != 1 and _rank(host) != 2:
                return "what normalizes it does not do so a channel"
            parameters = [np.asarray(ir.constant(value)) for value in step.inputs[1:5]]
            kernel = kernel.scaled(*affine(*parameters, float(ir.attribute(step, "epsilon", 1e-5))))
            continue
        array = next(found for found in map(ir.constant, step.inputs) if found is not None)
        numbers = _numbers(array, host, len(kernel.bias))
        if numbers is None:
            return f"{step.op_type} {step.name!r} behind it is not one number a channel"
        ones, none = np.ones(len(numbers)), np.zeros(len(numbers))
        kernel = kernel.scaled(numbers, none) if step.op_type == "Mul" else kernel.scaled(ones, numbers)
    return kernel


def _rank(node: ir.Node) -> int | None:
    """Axes of what `node` makes, None if unknown."""
    if node.op_type != "MatMul":
        return len(ir.constant_shape(linear.weight_of(node)))
    shape = ir.shape_of(linear.data_of(node))
    return None if shape is None else len(shape)


def _numbers(array: np.ndarray | None, node: ir.Node, channels: int) -> np.ndarray | None:
    """What an operand of the output of `node` is for each channel, float64 [channels]; None if it is no such thing."""
    rank = _rank(node)
    if array is None or (rank is None and array.ndim > 1):
        return None
    return math.per_channel(array, channels, linear.channel_axis(node), rank or 1)


# ---- writing --------------------------------------------------------------------------------------------------------


def _name_shared(ctx: PassContext, branches: Sequence[_Branch]) -> None:
    """Skip the operators that could be branches of a merged one if nobody else read what they make."""
    sources = {branch.source for branch in branches if branch.node is not None}
    for branch in branches:
        maker = branch.source.producer()
        if branch.node is None and maker is not None and not maker.domain and maker.op_type in _LINEAR and linear.data_of(maker) in sources:
            ctx.skip(maker, "not merged with the branches beside it: its output is read elsewhere too")


def _write(ctx: PassContext, group: _Group, kernel: Kernel) -> ir.Value:
    """Let the node of the first branch be `kernel`; returns what it makes, with the bias where the node takes none."""
    node, edit = group[0][0].node, ctx.edit
    assert node is not None
    weight = kernel.weight if linear.out_axis(node) == 0 else kernel.weight.T
    edit.set_weight(node, linear.LINEAR_OPS[node.op_type].weight, np.ascontiguousarray(weight, np.float32))
    if node.op_type == "Conv":
        ends = [axis.pads for axis in kernel.taps]
        new = {"kernel_shape": kernel.weight.shape[2:], "pads": [before for before, _ in ends] + [after for _, after in ends],
               "dilations": [axis.dilation or 1 for axis in kernel.taps], "auto_pad": "NOTSET"}  # fmt: skip
    else:
        new = {"alpha": 1.0, "beta": 1.0} if node.op_type == "Gemm" else {}
    for name, value in new.items():
        edit.set_attribute(node, name, value)
    edit.now_makes(node.outputs[0], "merged")
    node.meta.pop(BATCH_NORM, None)  # it told of one branch
    ctx.measure(node.name or "", branches=len(group), zeros=float(np.mean(kernel.weight == 0)))
    bias = kernel.bias.astype(np.float32)
    if linear.bias_of(node) is not None:
        edit.set_weight(node, linear.bias_index(node), bias)
    elif bias.any():
        value = edit.initializer(f"{node.name}_bias", bias, graph=node.graph)  # type: ignore[arg-type]
        if node.op_type == "MatMul":
            return edit.insert(node, "Add", [node.outputs[0], value], output=f"{node.outputs[0].name}_biased", after=True)
        edit.rewire(node, linear.bias_index(node), value)
    return node.outputs[0]


def _remove_unread(ctx: PassContext, node: ir.Node) -> None:
    """Remove `node` and what only it has read: the sums behind it must not take it for a reader."""
    stack = [node]
    while stack:
        one = stack.pop()
        if one.graph is not None and not any(out.uses() or out.is_graph_output() for out in one.outputs):
            makers = [maker for value in one.inputs if (maker := ir.producer(value)) is not None]
            ctx.edit.remove(one)
            stack += makers
