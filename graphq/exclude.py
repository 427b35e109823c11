"""Which nodes a recipe leaves alone, by patterns of names and operator types: one rule for all passes."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

from graphq import ir

PART_OF = "graphq.part_of"
"""Metadata entry of a node that is a part of a node of the model as it came: the name of that."""


def given_name(node: ir.Node) -> str:
    """The name of `node`, or of the node that it is a part of, in the model as it came."""
    return node.metadata_props.get(PART_OF, node.name or "")


def is_excluded(node: ir.Node, patterns: Sequence[str]) -> bool:
    """Whether a pattern (`*`, `?`) fits the name of `node`, now or as it came, or is its operator type."""
    names = {node.name or "", given_name(node)}
    return any(pattern == node.op_type or any(fnmatchcase(name, pattern) for name in names) for pattern in patterns)
