"""What the contract of an operator looks at: types and shapes of its operands, and how an error names one that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from graphq.errors import UsageError

HALVES = ("float16", "bfloat16")
FLOATS = (*HALVES, "float32")


@dataclass(frozen=True)
class Operand:
    """Stands in for an array or a tensor of which only this is known."""

    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Operands:
    """The operands of one call of the operator `name`, by input.

    Attributes:
        floats: Types that the operator computes in.
        where: What to call the place in an error, such as a node.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    floats: tuple[str, ...]
    where: str = ""

    def require(self, holds: bool, key: str, expected: str) -> None:
        """Raises UsageError, with what was `expected` of the operand `key`, unless that `holds`."""
        if not holds:
            raise UsageError(
                f"{self.name} cannot take {key} of type {self.dtypes[key]} and shape {list(self.shapes[key])}.",
                where=self.where or ", ".join(f"{one} {list(shape)}" for one, shape in self.shapes.items()), expected=expected,
            )  # fmt: skip


def dtype_name(operand: Any) -> str:
    """`float16`, of an array or a tensor."""
    return str(operand.dtype).rpartition(".")[2]
