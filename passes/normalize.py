"""normalize: the canonical form that the other passes assume. The function that the model computes stays the same.

What holds afterwards, for the main graph and its subgraphs:

1. Every node and every value that is read has a name, unique in the model; inputs and outputs keep theirs.
2. Weights are initializers: `Constant` nodes are lifted, constant expressions folded, and an initializer that is also listed as
   an input (an optional override of a default) is a constant from now on: what may change per call cannot be compressed.
3. No dead nodes, no `Identity`, no inference-time `Dropout`; model-local functions are inlined (but those of the domain `graphq`).
4. The fused `Attention` is written as MatMul and Softmax, unless it keeps a cache.
5. `BatchNormalization` is folded into the linear operator before it where that is exact. Its parameters stay readable as
   `node.meta[BATCH_NORM]` of that operator, for data-free methods; `meta` survives a clone, not a file.
6. Shapes and element types are known wherever ONNX can infer them.
7. The operator set is at least the target's minimum and at most its newest; the file format fits both.

Quantizers that are in the model already stay as they are.
"""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from graphq import ir
from graphq.errors import TargetError
from graphq.passes import _normalize_attention as attention
from graphq.passes import _normalize_batch_norm as batch_norm
from graphq.passes import _normalize_fold as fold
from graphq.passes import _normalize_graph as graph
from graphq.passes import _normalize_opset as opset
from graphq.passes._shapes import infer_shapes
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

BATCH_NORM = batch_norm.BATCH_NORM


@pass_options
class Normalize(Pass):
    """Rewrites the model to the form that the other passes expect, keeping its function.

    Attributes:
        fold_limit: Bytes that a folded constant may have, unless it is no larger than the constants it replaces.
    """

    name: ClassVar[str] = "normalize"
    idle_is_fine: ClassVar[bool] = True
    needs_weights: ClassVar[bool] = False
    keeps_function: ClassVar[bool] = True

    fold_limit: Annotated[int, Field(ge=0)] = 1 << 20

    def precheck(self, model: ir.Model, target: Target) -> None:
        version = ir.opset(model)
        if version > target.opset:
            raise TargetError(
                f"The model uses opset {version}; {target.name} loads none above {target.opset}.", expected=f"opset {target.opset} at most",
                hint=f"export the model again with opset_version={target.opset}, or choose another target",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        self.precheck(model, ctx.target)
        edit = ctx.edit
        graph.unique_names(edit)  # first: everything below, and every message, names nodes
        graph.free_initializers(edit)
        graph.inline_functions(ctx)  # before lifting: functions hold their constants in nodes
        graph.lift_constants(edit)  # before the opset is raised: the converter copies what lies in nodes, not initializers
        ctx.edit.edits["shape"] += infer_shapes(ctx)  # the converter needs some, and folding must know how large a result will be
        opset.raise_opset(ctx)  # before BatchNorm: the converter may replace nodes, and with them their meta
        graph.unique_names(edit)
        graph.lift_constants(edit)
        graph.drop_identities(edit)
        if attention.decompose_attention(ctx):
            ctx.edit.edits["shape"] += infer_shapes(ctx)
        fold.fold_constants(edit, self.fold_limit)
        batch_norm.fold_batch_norms(ctx)
        edit.prune()
        ctx.edit.edits["shape"] += infer_shapes(ctx)
