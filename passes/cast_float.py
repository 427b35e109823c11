"""cast-float: float16 or bfloat16 where it is safe, float32 where range or measured error demands it, for runtimes that take
precision from the graph (TensorRT 11 and TensorRT-RTX are strongly typed).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import ir
from graphq.errors import TargetError
from graphq.exclude import require_matches
from graphq.half import BFLOAT16_OPSET, HALVES, Half
from graphq.passes import _cast_float_masks as masks
from graphq.passes import _cast_float_plan as planning
from graphq.passes._cast_float_plan import Plan
from graphq.passes._shapes import infer_shapes
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

LEAST_SQNR_DB = {"fp16": 40.0, "bf16": 30.0}
"""What one node alone has to leave of the outputs. All nodes together leave 54 to 68 dB in float16 and 36 to 50 in bfloat16 in networks
where none stands out (ViT-Tiny, MiniLM, SqueezeNet, ESPCN)."""


@pass_options
class CastFloat(Pass):
    """Writes half precision into the graph; the model's inputs and outputs stay float32.

    A node stays float32 if ONNX does not define it for the type, if a value near it was seen to come too near to the type's
    limits, if a constant that it reads gets lost, or if it alone, reading and making rounded values, changes the outputs too much; then
    those around it stay float32 whose Casts would cost more than they save. Subgraphs stay float32, and so do functions, but for the
    operators of graphq that take any float type; masks of a Softmax that stand for minus infinity become numbers that the type holds.
    It comes after all passes that look for float32, which are all but `lower`.

    Attributes:
        precision: `fp16` (11 significant bits, up to 65504) or `bf16` (8 bits, the range of float32).
        exclude: Patterns of node names (or operator types) that stay float32.
        margin: How many times larger than seen in calibration a value may get without overflow.
        min_sqnr_db: A node that alone would leave less of the model's outputs stays float32; by default 40 for fp16 and 30 for bf16.
        error_samples: Calibration samples for measuring errors; 0 measures none.
    """

    name: ClassVar[str] = "cast-float"
    needs_data: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False

    precision: Literal["fp16", "bf16"] = "fp16"
    exclude: tuple[str, ...] = ()
    margin: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 4.0
    min_sqnr_db: Annotated[float, Field(ge=0)] | None = None
    error_samples: Annotated[int, Field(ge=0)] = 4

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        if self.precision not in target.halves:
            raise TargetError(
                f"{target.name} does not run {HALVES[self.precision].storage}.", where=f"pass {self.name}, precision: {self.precision}",
                expected=f"precision: {' or '.join(sorted(target.halves))}", hint="or choose another target, such as --target tensorrt",
            )  # fmt: skip
        found, half = _types(model), HALVES[self.precision]
        if not self.allow_no_effect and not found & {ir.DataType.FLOAT, None, half.code}:
            other = next((name for name, one in HALVES.items() if one.code in found), None)
            raise TargetError(
                "There is nothing in float32.", where=f"pass {self.name}", expected="a float32 model",
                hint=f"it is {HALVES[other].storage} already: take precision: {other}, or start from the float32 model" if other else "",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        infer_shapes(ctx)  # passes before it leave types of what they made open
        half, found = HALVES[self.precision], _types(model)
        if not found & {ir.DataType.FLOAT, None}:
            return ctx.nothing_to_do(f"it is {half.storage} already" if half.code in found else "nothing in it is float32")
        if self.precision == "bf16":
            ctx.edit.raise_opset(BFLOAT16_OPSET)
        least = LEAST_SQNR_DB[self.precision] if self.min_sqnr_db is None else self.min_sqnr_db
        masks.saturate(ctx, half, margin=self.margin, min_sqnr_db=least, samples=self.error_samples)
        plan = planning.make_plan(ctx, half, exclude=self.exclude, margin=self.margin, min_sqnr_db=least, samples=self.error_samples)
        casts = _write(plan, half, ctx)
        if not plan.half and half.code in found:  # float32 remains where whoever exported it wanted it
            ctx.nothing_to_do(f"what can be {half.storage} is {half.storage} already")
        for node, reason in plan.kept.items():
            ctx.skip(node, reason)
            if node in plan.measured:
                ctx.measure(node.name or "", sqnr_db=plan.measured[node])
        ctx.measure("all nodes", half=len(plan.half), float32=len(plan.kept), casts=casts)


def _types(model: ir.Model) -> set[ir.DataType | None]:
    """The element types of what nodes read and make, subgraphs included; None if one is not known."""
    return {value.dtype for node in model.graph.all_nodes() for value in (*node.inputs, *node.outputs) if value is not None and value.name}


def _write(plan: Plan, half: Half, ctx: PassContext) -> int:
    """Change types and constants as planned and put Casts between the two kinds of nodes; returns how many."""
    narrow = {node.outputs[index] for node, found in plan.half.items() for index in found.outputs}
    casts: dict[ir.Value, ir.Value] = {}
    for value in list(ir.values_by_name(ctx.model.graph).values()):
        if value.dtype != ir.DataType.FLOAT:
            continue
        for node, index in [(use.node, use.idx) for use in ir.uses(value)]:
            wanted = node in plan.half and index in plan.half[node].inputs
            if planning.is_constant(value):
                if wanted:
                    ctx.edit.rewire(node, index, _constant(node, index, half, ctx))
            elif wanted != (value in narrow) and not planning.follows(node):
                ctx.edit.rewire(node, index, _cast(value, half if wanted else None, casts, ctx))
        if value in narrow and value.is_graph_output():
            ctx.edit.replace_output(value, _cast(value, None, casts, ctx))
    for value in narrow:
        maker = value.producer()
        if maker is not None and maker.op_type == "Cast":
            ctx.edit.set_attribute(maker, "to", int(half.code))
        value.type = ir.tensor_type(half.storage)
    ctx.edit.prune()
    return len(casts)


def _constant(node: ir.Node, index: int, half: Half, ctx: PassContext) -> ir.Value:
    """The half copy of a constant that `node` reads, one for all that take it alike."""
    value, array = node.inputs[index], ir.constant(node.inputs[index])
    assert value is not None and array is not None
    bound, scale = index in planning.BOUNDS.get(node.op_type, ()), index in planning.SCALES.get(node.op_type, ())

    def rounded() -> np.ndarray:
        made = half.round(array, saturate=bound)
        return np.where(array > 0, np.maximum(made, half.least), made) if scale else made

    return ctx.edit.shared((value, half, bound, scale), f"{value.name}_{half.storage}", rounded, half.storage)


def _cast(value: ir.Value, half: Half | None, casts: dict[ir.Value, ir.Value], ctx: PassContext) -> ir.Value:
    """`value` in half precision, or in float32 if None, by one Cast for all readers."""
    if value not in casts:
        maker = value.producer()
        code, name = (half.code, half.storage) if half is not None else (ir.DataType.FLOAT, "float32")
        to = {"to": int(code)}
        made = ctx.edit.insert(maker, "Cast", [value], output=f"{value.name}_{name}", attributes=to, after=maker is not None)
        made.shape, made.type = value.shape, ir.tensor_type(name)
        casts[value] = made
    return casts[value]
