"""Which nodes a recipe leaves alone, by patterns of names and operator types: one rule for all passes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from graphq import ir
from graphq.errors import RecipeError, TargetError
from graphq.names import did_you_mean

PART_OF = "graphq.part_of"
"""Metadata entry of a node that is a part of a node of the model as it came: the name of that."""


def given_name(node: ir.Node) -> str:
    """The name of `node`, or of the node that it is a part of, in the model as it came."""
    return node.metadata_props.get(PART_OF, node.name or "")


def is_excluded(node: ir.Node, patterns: Sequence[str]) -> bool:
    """Whether a pattern (`*`, `?`) fits the name of `node`, now or as it came, or is its operator type."""
    names = {node.name or "", given_name(node)}
    return any(pattern == node.op_type or any(fnmatchcase(name, pattern) for name in names) for pattern in patterns)


def require_matches(model: ir.Model, exclude: Sequence[str]) -> None:
    """Raises RecipeError for a pattern that names no node: it would have no effect."""
    for pattern in exclude:
        if not any(is_excluded(node, [pattern]) for node in ir.all_nodes(model)):
            names = {given_name(node) for node in ir.all_nodes(model)}
            raise RecipeError(
                "An exclude pattern matches no node.", where=f"exclude: {pattern!r}",
                expected="the name of a node, with * and ?, or an operator type",
                hint=did_you_mean(pattern, names) or "`graphq inspect --layers` lists the names",
            )  # fmt: skip


def nothing_to_quantize(reasons: Iterable[str], expected: str) -> TargetError:
    """The error of a pass that would change no node; `reasons` are why each stays as it is."""
    found = sorted(set(reasons))
    hint = "start from the float model; `graphq inspect --layers` lists the nodes with the reason why each stays float"
    if any("FLOAT16" in reason for reason in found):
        hint = "the model is in half precision: export it in float32; --recipe int8-fp16 then makes halves of what stays float, fp16 of all"
    return TargetError("There is nothing to quantize.", where="; ".join(found[:3]), expected=expected, hint=hint)
