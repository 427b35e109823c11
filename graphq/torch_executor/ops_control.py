"""Branches and loops, whose bodies are subgraphs; sequences, which are Python lists."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphq.torch_executor.table import Call, numbers_of, operator

# ---- branches and loops ---------------------------------------------------------------------------------------------


@operator("If", numbers=(0,))
def if_(call: Call, condition: Tensor, *captured: Any) -> Any:
    found = call.programs["then_branch" if bool(condition) else "else_branch"]([], captured)
    return found[0] if len(call.wanted) == 1 else found


@operator("Loop", numbers=(0, 1))
def loop(call: Call, limit: Tensor | None, condition: Tensor | None, *operands: Any) -> Any:
    """What the body carries, then what it scans, stacked."""
    body, carried_count = call.programs["body"], call.formals["body"] - 2
    carried, captured = list(operands[:carried_count]), operands[carried_count:]
    scanned: list[list[Any]] = [[] for _ in range(len(call.wanted) - carried_count)]
    count, step = None if limit is None else int(limit), 0
    going = condition is None or bool(condition)
    while going and (count is None or step < count):
        found = body([torch.tensor(step), torch.tensor(True), *carried], captured)
        going, carried = bool(found[0]), found[1 : 1 + carried_count]
        for kept, one in zip(scanned, found[1 + carried_count :], strict=True):
            kept.append(one)
        step += 1
    results = [*carried, *(torch.stack(kept) if kept else torch.zeros(0, dtype=call.dtype, device=call.device) for kept in scanned)]
    return results[0] if len(call.wanted) == 1 else results


@operator("Scan", since=9)
def scan(call: Call, *operands: Any) -> Any:
    """States first, then what is scanned along an axis, forwards or backwards."""
    count, body = call.get("num_scan_inputs"), call.programs["body"]
    state_count = call.formals["body"] - count
    states, sources = list(operands[:state_count]), operands[state_count : state_count + count]
    captured, made = operands[state_count + count :], len(call.wanted) - state_count
    axes = call.get("scan_input_axes") or [0] * count
    rows = [list(source.unbind(axis)) for source, axis in zip(sources, axes, strict=True)]
    rows = [row[::-1] if back else row for row, back in zip(rows, call.get("scan_input_directions") or [0] * count, strict=True)]
    scanned: list[list[Any]] = [[] for _ in range(made)]
    for step in zip(*rows, strict=True):
        found = body([*states, *step], captured)
        states = found[:state_count]
        for kept, one in zip(scanned, found[state_count:], strict=True):
            kept.append(one)
    backs, axes = call.get("scan_output_directions") or [0] * made, call.get("scan_output_axes") or [0] * made
    results = [*states, *(torch.stack(kept[::-1] if back else kept, axis) for kept, back, axis in zip(scanned, backs, axes, strict=True))]
    return results[0] if len(call.wanted) == 1 else results


# ---- sequences ------------------------------------------------------------------------------------------------------


@operator("SequenceConstruct")
def sequence_construct(call: Call, *operands: Tensor) -> list[Tensor]:
    return list(operands)


@operator("SequenceEmpty", gradient="none")
def sequence_empty(call: Call) -> list[Tensor]:
    return []


@operator("SequenceInsert", numbers=(2,))
def sequence_insert(call: Call, sequence: list[Tensor], tensor: Tensor, place: Tensor | None = None) -> list[Tensor]:
    longer = list(sequence)
    longer.insert(len(sequence) if place is None else numbers_of(place)[0], tensor)
    return longer


@operator("SequenceErase", numbers=(1,))
def sequence_erase(call: Call, sequence: list[Tensor], place: Tensor | None = None) -> list[Tensor]:
    at = (-1 if place is None else numbers_of(place)[0]) % len(sequence)
    return [*sequence[:at], *sequence[at + 1 :]]


@operator("SequenceAt", numbers=(1,))
def sequence_at(call: Call, sequence: list[Tensor], place: Tensor) -> Tensor:
    return sequence[numbers_of(place)[0]]


@operator("SequenceLength", gradient="none")
def sequence_length(call: Call, sequence: list[Tensor]) -> Tensor:
    return torch.tensor(len(sequence))


@operator("ConcatFromSequence")
def concat_from_sequence(call: Call, sequence: list[Tensor]) -> Tensor:
    return torch.stack(sequence, call.get("axis")) if call.get("new_axis", 0) else torch.cat(sequence, call.get("axis"))


@operator("SplitToSequence", numbers=(1,))
def split_to_sequence(call: Call, x: Tensor, sizes: Tensor | None = None) -> list[Tensor]:
    axis = call.get("axis", 0)
    if sizes is None:
        parts = x.split(1, axis)
        return list(parts) if call.get("keepdims", 1) else [part.squeeze(axis) for part in parts]
    return list(x.split(numbers_of(sizes) if sizes.ndim else numbers_of(sizes)[0], axis))


@operator("SequenceMap")
def sequence_map(call: Call, *operands: Any) -> Any:
    count = call.formals["body"]
    own, captured = operands[:count], operands[count:]
    rows = [[one[index] if isinstance(one, list) else one for one in own] for index in range(len(own[0]))]
    found = [call.programs["body"](row, captured) for row in rows]
    columns = [[row[index] for row in found] for index in range(len(call.wanted))]
    return columns[0] if len(columns) == 1 else columns


# ---- optional values, which are None where there is none ------------------------------------------------------------


@operator("Optional")
def optional(call: Call, value: Any = None) -> Any:
    return value


@operator("OptionalGetElement")
def optional_get_element(call: Call, value: Any) -> Any:
    return value


@operator("OptionalHasElement", gradient="none")
def optional_has_element(call: Call, value: Any = None) -> Tensor:
    return torch.tensor(value is not None)
