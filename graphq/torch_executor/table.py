"""The table of operators: ONNX's name -> a function on torch tensors. The modules `ops_*` fill it with the decorator `operator`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from graphq.ir import DataType

Gradient = Literal["exact", "through", "none"]

Result = Any
"""A tensor, a list of tensors where ONNX has a sequence, or a tuple of these where the operator has several outputs."""


@dataclass(frozen=True)
class Call:
    """What an operator's function knows of its node besides the operands.

    Attributes:
        attributes: As Python numbers, texts and lists; tensors as torch's, on the CPU.
        opset: The version of the operator set that the node is of.
        wanted: For each output of the node, whether it has a name.
        types: Element types of the operands, None where they are not known before the model runs.
        dtype: What floats are computed in.
        device: Where floats live.
        made: Element type of the first output, None if not known.
        is_own: Whether the node stands in a body of a function of graphq, whose roundings are steps of a quantizer.
        programs: The subgraphs among the attributes, as functions of two lists, what their inputs are and all that the subgraphs of the
            node read from outside, to a list of what they return.
        formals: How many inputs each of these has.
    """

    attributes: Mapping[str, Any]
    opset: int
    wanted: Sequence[bool]
    types: Sequence[DataType | None]
    dtype: torch.dtype
    device: torch.device
    made: DataType | None = None
    is_own: bool = False
    programs: Mapping[str, Callable[..., list[Any]]] = field(default_factory=dict)
    formals: Mapping[str, int] = field(default_factory=dict)

    def get(self, name: str, default: Any = None) -> Any:
        return self.attributes.get(name, default)

    def type(self, index: int) -> DataType | None:
        return self.types[index] if index < len(self.types) else None


@dataclass(frozen=True)
class Operator:
    """One entry of the table.

    Attributes:
        run: Computes the outputs from a `Call` and the operands, None for those that are left out.
        numbers: Operands that are read as Python numbers, such as shapes: they stay on the CPU.
        gradient: `exact`: that of what is computed. `through`: roundings count as if they were not there. `none`: outputs have none.
        since: The first operator set whose meaning it computes.
    """

    run: Callable[..., Result]
    numbers: tuple[int, ...]
    gradient: Gradient
    since: int


OPERATORS: dict[str, Operator] = {}
"""Operators of ONNX's default domain."""


def operator(*names: str, numbers: tuple[int, ...] = (), gradient: Gradient = "exact",
             since: int = 7) -> Callable[[Callable[..., Result]], Callable[..., Result]]:  # fmt: skip
    """Enter a function under `names`."""

    def enter(run: Callable[..., Result]) -> Callable[..., Result]:
        for name in names:
            OPERATORS[name] = Operator(run, numbers, gradient, since)
        return run

    return enter


def numbers_of(operand: torch.Tensor | Sequence[int] | None) -> list[Any]:
    """The elements of a small operand as Python numbers."""
    if operand is None:
        return []
    return [int(one) for one in operand.reshape(-1).tolist()] if isinstance(operand, torch.Tensor) else list(operand)


def axes_of(call: Call, operand: torch.Tensor | None) -> list[int] | None:
    """The axes of a reduction, a Squeeze...: an attribute in old operator sets, an operand in new ones; None if neither is given."""
    if operand is not None:
        return numbers_of(operand)
    axes = call.get("axes")
    return None if axes is None else list(axes)
