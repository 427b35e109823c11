"""block-float: matrix products on small floats in blocks (NVFP4, MXFP8), for GPUs that multiply them, such as NVIDIA's Blackwell.

Weights become codes with a scale for each block along the axis that is summed over; activations are rounded in blocks where the model
runs, so that calibration has to find one number a tensor at most: NVFP4 saturates beyond `HEADROOM` times the largest magnitude seen.
What blocks are, and how the graph says it: `graphq.block_floats`.
"""

from __future__ import annotations

from typing import ClassVar

import numpy as np

from graphq import block_floats, ir, linear
from graphq.block_floats import BLOCKS, OPSETS, FormatName
from graphq.errors import TargetError
from graphq.exclude import is_excluded, nothing_to_quantize, require_matches
from graphq.noise import decibel
from graphq.observers import Range
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

STORAGE = {"nvfp4": "float4e2m1", "mxfp8": "float8e4m3fn"}
HEADROOM = 8.0
"""How far beyond calibration an activation may go before the scales of its blocks, E4M3 of up to 448 tensor scales, saturate."""


@pass_options
class BlockFloat(Pass):
    """Quantizes MatMul and Gemm with constant weights to small floats in blocks.

    Attributes:
        format: `nvfp4` (4 bits, blocks of 16 with an E4M3 scale) or `mxfp8` (8 bits, blocks of 32 with a power of two).
        activations: Whether to round what the products read as well; without it weights alone get smaller.
        exclude: Patterns of node names (or operator types) that stay float.
    """

    name: ClassVar[str] = "block-float"
    needs_data: ClassVar[bool] = True

    format: FormatName = "nvfp4"
    activations: bool = True
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        if STORAGE[self.format] not in target.storage or target.opset < OPSETS[self.format]:
            raise TargetError(
                f"{target.name} does not take {STORAGE[self.format]}.", where=f"pass {self.name}, format: {self.format}",
                expected="--target tensorrt, tensorrt-rtx or generic",
            )  # fmt: skip
        reasons = [self._refusal(node) for node in model.graph if node.op_type in ("Gemm", "MatMul") and not node.domain]
        if not self.allow_no_effect and None not in reasons:
            block = BLOCKS[self.format]
            raise nothing_to_quantize(
                filter(None, reasons), f"at least one MatMul or Gemm with a constant float32 weight of a multiple of {block} inputs"
            )

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        reasons = {node: self._refusal(node) for node in model.graph if node.op_type in linear.LINEAR_OPS and not node.domain}
        largest = self._largest({linear.data_of(node).name or "" for node, reason in reasons.items() if reason is None}, ctx)
        chosen = set()
        for node, reason in reasons.items():
            if reason is None and largest.get(linear.data_of(node).name or "") == 0:
                reason = "calibration saw nothing but zeros in its input"
            if reason is None:
                chosen.add(node.outputs[0].name)
            else:
                ctx.skip(node, reason)
        if not chosen:
            return
        ctx.edit.raise_opset(OPSETS[self.format])  # which may put new nodes in the place of old ones
        readers: dict[ir.Value, list[tuple[ir.Node, int]]] = {}
        for node in [node for node in model.graph if node.outputs[0].name in chosen]:
            readers.setdefault(linear.data_of(node), []).append((node, linear.data_index(node)))
            self._quantize(node, ctx)
        if self.activations:
            for value, places in readers.items():
                block_floats.insert_activation(ctx.edit, value, self.format, HEADROOM * largest.get(value.name or "", 0.0), places)
        ctx.edit.prune()

    def _refusal(self, node: ir.Node) -> str | None:
        if is_excluded(node, self.exclude):
            return "excluded by the recipe"
        if reason := linear.linear_refusal(node):
            return reason
        if node.op_type not in ("Gemm", "MatMul") or (node.op_type == "Gemm" and ir.attribute(node, "transA", 0)):
            return "blocks lie along the last axis of what a matrix product reads"
        inputs, dims = ir.constant_shape(linear.weight_of(node))[linear.in_axis(node)], ir.shape_of(linear.data_of(node))
        if inputs % BLOCKS[self.format]:
            return f"its {inputs} inputs are not a multiple of the block of {BLOCKS[self.format]}"
        return "the shape of its input is not known" if self.activations and (dims is None or dims[-1] != inputs) else None

    def _largest(self, names: set[str], ctx: PassContext) -> dict[str, float]:
        """The largest magnitude of each value in calibration, where the format has a scale for it."""
        if self.format != "nvfp4" or not self.activations:
            return {}
        observers = {name: Range(name, "current") for name in sorted(names)}
        stats = ctx.observe(observers.values())
        return {name: max(-float(stats[one]["low"]), float(stats[one]["high"]), 0.0) for name, one in observers.items()}

    def _quantize(self, node: ir.Node, ctx: PassContext) -> None:
        index, turned = linear.LINEAR_OPS[node.op_type].weight, linear.in_axis(node) == 1
        weight = ir.constant(linear.weight_of(node))
        assert weight is not None
        rows = np.ascontiguousarray(weight.T) if turned else weight
        blocks = block_floats.quantize(rows, self.format)
        error = rows - blocks.dequantize()
        power, noise = (float(np.sum(part.astype(np.float64) ** 2)) for part in (rows, error))
        ctx.measure(node.name or "", weight_sqnr_db=decibel(power, noise))
        block_floats.insert_weight(ctx.edit, node, index, blocks, turned=turned)
