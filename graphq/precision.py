"""Bits asked for a layer: written on the node by passes that decide (mixed-precision), read by those that quantize.

The request is a metadata entry of the node, so that it survives clones and files, and is not an edit of what is computed.
"""

from __future__ import annotations

from dataclasses import dataclass

from graphq import ir
from graphq.editor import Editor
from graphq.errors import ModelError

KEY = "graphq.bits"


@dataclass(frozen=True)
class Bits:
    """Widths of a layer's weight and of the activation it reads; None leaves it float."""

    weight: int | None
    activation: int | None


def ask(edit: Editor, node: ir.Node, bits: Bits) -> None:
    """Ask whoever quantizes `node` later for `bits`."""
    edit.annotate(node, KEY, f"w{bits.weight or 'float'} a{bits.activation or 'float'}")


def asked(node: ir.Node, default: Bits) -> Bits:
    """The bits that were asked for `node`, or `default`.

    Raises:
        ModelError: the entry is not one that `ask` writes.
    """
    text = node.metadata_props.get(KEY)
    if text is None:
        return default
    try:
        weight, activation = (part[1:] for part in text.split())
        return Bits(*(None if part == "float" else int(part) for part in (weight, activation)))
    except ValueError as error:
        raise ModelError(
            "A node asks for bits that cannot be read.", where=f"{ir.describe(node)}: {text!r}", expected="such as 'w4 a8'"
        ) from error
