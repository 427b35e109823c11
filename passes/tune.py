"""tune: write float operators in the form that the target runs fastest. The function stays the same (`floored-mask`: on real scores).

Which forms those are is the target's matter (`Target.forms`); each was found by profiling:

- `sum-before-norm`: `Add -> LayerNormalization` becomes `Sum -> LayerNormalization`. ONNX Runtime fuses the first into
  SkipLayerNormalization, whose CPU kernel is several times slower than its parts.
- `block-convolution`: a strided convolution of few channels (the first one of a CNN) runs over SpaceToDepth blocks, without
  stride: the integer kernel spends most of its time on gathering patches of three channels.
- `split-projection`: queries, keys and values made by one matrix product, and cut apart behind it, get a product each.
- `attention-bias`: biases of keys, which change nothing, and of values, which may join the bias behind attention, are no Adds.
- `pooled-mean`: a mean over all positions becomes GlobalAveragePool, which can stay integer.
- `floored-mask`: masked attention scores are cut at a floor far below all others seen in calibration. Their exponentials are
  subnormal numbers otherwise, which make Softmax about ten times slower. Left out where calibration data is random.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from graphq import ir, linear
from graphq.editor import Editor
from graphq.executor import BATCH, THREADS, WORKERS, Executor, Fetch
from graphq.passes import _tune_math as math
from graphq.passes._tune_attention import attention_bias
from graphq.passes._tune_split import split_projection
from graphq.pipeline import Pass, PassContext, pass_options

FEW_CHANNELS = 4
"""Input channels up to which gathering patches costs an integer convolution more than the arithmetic."""

MASK_DEPTH = 8
"""Nodes between a mask's huge constant and the scores it is added to, at most."""


@pass_options
class Tune(Pass):
    """Rewrites what the target's float kernels are slow at (which forms: see `graphq.targets`).

    Attributes:
        samples: Calibration samples that show how far attention scores reach.
    """

    name: ClassVar[str] = "tune"
    idle_is_fine: ClassVar[bool] = True
    keeps_function: ClassVar[bool] = True
    needs_data: ClassVar[bool] = True

    samples: Annotated[int, Field(ge=1)] = 4

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        for node in list(model.graph):
            for form, rewrite in _REWRITES.items():
                if form in ctx.target.forms and not node.domain:
                    rewrite(ctx.edit, node)
        floors = "floored-mask" in ctx.target.forms and ctx.calib.kind != "random"
        masked = [node for node in model.graph if floors and _is_masked_softmax(node)]
        for node, floor in zip(masked, self._floors(model, masked, ctx), strict=True):
            if floor is None:
                ctx.skip(node, "its rows lie too far apart for one floor under the masked scores")
            else:
                _cut(ctx.edit, node, floor)
        ctx.edit.prune()

    def _floors(self, model: ir.Model, nodes: list[ir.Node], ctx: PassContext) -> list[float | None]:
        """The floor under the scores that each of the Softmax nodes reads."""
        if not nodes:
            return []
        probe = ir.clone(model)
        edit, twins = Editor(probe), {node.name: node for node in probe.graph}
        fetches = [Fetch(_row_maxima(edit, twins[node.name])) for node in nodes]
        runs = list(Executor(probe, fetches, threads=THREADS, prepack=False).stream(ctx.calib.take(self.samples).batches(BATCH // WORKERS)))
        return [math.floor_for(np.concatenate([maxima.reshape(-1) for maxima in arrays])) for arrays in zip(*runs, strict=True)]


def _sum_before_norm(edit: Editor, node: ir.Node) -> None:
    uses = ir.uses(node.outputs[0])
    if node.op_type != "Add" or len(uses) != 1 or node.outputs[0].is_graph_output():
        return
    if uses[0].node.op_type == "LayerNormalization" and not uses[0].node.domain and not any(map(_is_constant, node.inputs)):
        edit.change_operator(node, "Sum")


def _pooled_mean(edit: Editor, node: ir.Node) -> None:
    shape = ir.shape_of(node.inputs[0]) if node.inputs else None
    if node.op_type != "ReduceMean" or shape is None or len(shape) < 4 or not ir.is_float(node.inputs[0]):
        return  # of rank 3 it may as well be that of a normalization over channels
    axes = ir.constant(node.inputs[1]) if len(node.inputs) > 1 else None
    if axes is None or sorted(int(axis) % len(shape) for axis in axes) != list(range(2, len(shape))):
        return
    pooled = edit.insert(node, "GlobalAveragePool", [node.inputs[0]], output=f"{node.outputs[0].name}_pooled")
    pooled.shape, pooled.type = ir.Shape((*shape[:2], *(1 for _ in shape[2:]))), node.inputs[0].type  # type: ignore[union-attr]
    if not ir.attribute(node, "keepdims", 1):
        pooled = edit.insert(node, "Flatten", [pooled], output=f"{node.outputs[0].name}_flat", like=node.outputs[0])
    edit.replace(node.outputs[0], pooled)
    edit.remove(node)


def _block_convolution(edit: Editor, node: ir.Node) -> None:
    if node.op_type != "Conv" or not linear.is_linear(node):
        return
    weight, shape = ir.constant(linear.weight_of(node)), ir.shape_of(linear.data_of(node))
    assert weight is not None
    stride, plan = _block_plan(node, weight, shape)
    if plan is None:
        return
    (height, top, bottom), (width, left, right) = plan
    pads = ir.attribute(node, "pads", [0, 0, 0, 0])
    blocks = edit.insert(node, "SpaceToDepth", [linear.data_of(node)], output=f"{linear.data_of(node).name}_blocks",
                         attributes={"blocksize": stride}, like=linear.data_of(node))  # fmt: skip
    assert shape is not None
    blocks.shape = ir.Shape((shape[0], stride * stride * weight.shape[1], shape[2] // stride, shape[3] // stride))  # type: ignore[operator]
    edit.rewire(node, 0, blocks)
    edit.set_weight(node, 1, math.block_weight(weight, stride, pads[:2]))
    for name, value in (("kernel_shape", [height, width]), ("strides", [1, 1]), ("pads", [top, left, bottom, right])):
        edit.set_attribute(node, name, value)


def _block_plan(node: ir.Node, weight: np.ndarray, shape: tuple[Any, ...] | None) -> tuple[int, Any]:
    """The stride, and for each axis kernel and padding in blocks; None where the rewrite does not fit."""
    strides, pads = ir.attribute(node, "strides", [1, 1]), ir.attribute(node, "pads", [0, 0, 0, 0])
    plain = ir.attribute(node, "group", 1) == 1 and set(ir.attribute(node, "dilations", [1])) == {1}
    if weight.ndim != 4 or weight.shape[1] > FEW_CHANNELS or not plain or ir.attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return 0, None
    stride = int(strides[0])
    sizes = shape[2:] if shape is not None and len(shape) == 4 else (None,)
    if stride < 2 or strides[1] != stride or not all(isinstance(size, int) and size % stride == 0 for size in sizes):
        return 0, None
    if any(kernel <= stride for kernel in weight.shape[2:]):
        return 0, None  # patches that do not overlap are gathered once anyway
    axes = zip(sizes, weight.shape[2:], pads[:2], pads[2:], strict=True)
    plan = [math.blocks_of(size, kernel, stride, before, after) for size, kernel, before, after in axes]  # type: ignore[arg-type]
    return stride, plan if all(after >= 0 for _, _, after in plan) else None


_REWRITES: Mapping[str, Callable[[Editor, ir.Node], None]] = {
    "sum-before-norm": _sum_before_norm,
    "pooled-mean": _pooled_mean,
    "block-convolution": _block_convolution,
    "split-projection": split_projection,
    "attention-bias": attention_bias,
}


def _is_constant(value: ir.Value | None) -> bool:
    return value is None or value.is_initializer()


def _is_masked_softmax(node: ir.Node) -> bool:
    """Whether a Softmax over the last axis reads scores to which something made of a huge negative constant was added."""
    if node.op_type != "Softmax" or node.domain or not node.name:
        return False
    rank = len(ir.shape_of(node.inputs[0]) or ())
    scores = ir.producer(node.inputs[0])
    if ir.attribute(node, "axis", -1) not in (-1, rank - 1) or scores is None or scores.op_type not in ("Add", "Where"):
        return False
    return any(_holds_huge(value, MASK_DEPTH) for value in scores.inputs)


def _holds_huge(value: ir.Value | None, depth: int) -> bool:
    array = ir.constant(value)
    if array is not None:
        return array.size > 0 and array.dtype.kind == "f" and float(array.min()) < math.MASKED
    maker = ir.producer(value)
    return maker is not None and depth > 0 and any(_holds_huge(source, depth - 1) for source in maker.inputs)


def _row_maxima(edit: Editor, node: ir.Node) -> str:
    axes = edit.initializer(f"{node.name}_last_axis", np.array([-1], np.int64))
    return edit.insert(node, "ReduceMax", [node.inputs[0], axes], output=f"{node.name}_maxima", attributes={"keepdims": 0}).name or ""


def _cut(edit: Editor, node: ir.Node, floor: float) -> None:
    low = edit.initializer(f"{node.name}_floor", np.array(floor, np.float32))
    edit.rewire(node, 0, edit.insert(node, "Clip", [node.inputs[0], low], output=f"{node.name}_floored", like=node.inputs[0]))
