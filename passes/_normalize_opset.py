"""The step of normalize that raises the operator set, with a check that nothing was left behind."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from onnx import defs, helper

from graphq import ir
from graphq.errors import GraphqError, ModelError
from graphq.passes._normalize_graph import graph_nodes, unique_names
from graphq.pipeline import PassContext


def raise_opset(ctx: PassContext) -> None:
    """Raise the default operator set to the target's minimum, and the file format to the one that goes with it.

    Raises:
        ModelError: an operator cannot be converted.
    """
    model, wanted = ctx.model, ctx.target.minimum_opset
    before = ir.opset(model)
    if before < wanted:
        if any(node.domain == "" for node in ir.all_nodes(model)):
            _convert(ctx, before, wanted)
        else:
            model.opset_imports[""] = wanted
            ctx.edit.edits["opset"] += 1
    _set_format(ctx)


def _set_format(ctx: PassContext) -> None:
    imports = [helper.make_opsetid("", ir.opset(ctx.model))]
    lowest = max(10, helper.find_min_ir_version_for(imports, ignore_unknown=True))
    version = min(max(ctx.model.ir_version, lowest), ctx.target.ir_version)
    if version != ctx.model.ir_version:
        ctx.model.ir_version = version
        ctx.edit.edits["ir_version"] += 1


def _convert(ctx: PassContext, before: int, wanted: int) -> None:
    for node in graph_nodes(ctx.model):
        obstacle = _obstacle(node, before, wanted)
        if obstacle is not None:
            raise _cannot(ctx.model, before, wanted, obstacle, node)
    with _captured("onnxscript") as records:
        try:
            ctx.edit.raise_opset(wanted)
        except Exception as error:  # the converters raise several unrelated types
            if isinstance(error, GraphqError) and not isinstance(error, ModelError):
                raise
            cause = next((record.exc_info[1] for record in records if record.exc_info), None) or error
            raise _cannot(ctx.model, before, wanted, str(cause)) from error
    left = next((record.getMessage() for record in records if record.getMessage().startswith("Skipping version conversion")), None)
    if left is not None:
        raise _cannot(ctx.model, before, wanted, left)
    unique_names(ctx.edit)
    for node in graph_nodes(ctx.model):
        fault = _fault(node, wanted)
        if fault is not None:
            raise _cannot(ctx.model, before, wanted, fault, node)


def _cannot(model: ir.Model, before: int, wanted: int, why: str, node: ir.Node | None = None) -> ModelError:
    if node is None:
        words = set(why.replace("'", " ").replace(":", " ").replace(",", " ").split())
        node = next((one for one in graph_nodes(model) if one.op_type in words), None)
    return ModelError(
        f"The model cannot be raised from opset {before} to {wanted}: {why.strip()[:300]}", where="" if node is None else ir.describe(node),
        expected=f"opset {wanted}, the lowest that has the formats of this target",
        hint=f"export the model again with opset_version={wanted}, or replace this operator",
    )  # fmt: skip


def _fault(node: ir.Node, version: int) -> str | None:
    """What of `node` its definition in opset `version` does not know: the converters leave some operators behind silently."""
    if node.domain:
        return None
    try:
        schema = defs.get_schema(node.op_type, version, "")
    except defs.SchemaError:
        return f"{node.op_type} does not exist in opset {version}"
    if schema.deprecated:
        return f"{node.op_type} does not exist in opset {version}"
    unknown = [name for name in node.attributes if name not in schema.attributes]
    if unknown:
        return f"{node.op_type} has no attribute {unknown[0]!r} in opset {version}"
    if not schema.min_input <= len(node.inputs) <= schema.max_input:
        return f"{node.op_type} does not take {len(node.inputs)} inputs in opset {version}"
    return None


def _obstacle(node: ir.Node, before: int, wanted: int) -> str | None:
    """What the converters would get wrong without a word."""
    if node.domain == "" and node.op_type == "Scan" and before < 9:
        return "Scan has a batch axis before opset 9, which the converter drops"
    if node.domain == "" and node.op_type == "GroupNormalization" and before < 21 <= wanted:
        data, scale = (ir.shape_of(value) for value in node.inputs[:2])
        if data is None or scale is None or not isinstance(data[1], int) or not isinstance(scale[0], int):
            return "GroupNormalization has a scale per channel from opset 21 on, and its number of channels is not known"
    return None


class _Collector(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.records: list[logging.LogRecord] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(record)


@contextmanager
def _captured(name: str) -> Iterator[list[logging.LogRecord]]:
    """Collect what a library logs instead of letting it reach the terminal."""
    handler, logger = _Collector(), logging.getLogger(name)
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(handler)
    try:
        yield handler.records
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
