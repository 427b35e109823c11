"""A model, or nodes of it, as a function on torch tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from graphq import ir
from graphq.errors import ModelError, UsageError
from graphq.torch_executor.program import Drop, Program, Scope, Step
from graphq.torch_executor.tensors import to_torch


class Plan:
    """What runs when certain slots are fed and others are fetched; constants are computed once, here.

    Args:
        feeds: Slots, in the order in which `run` takes their tensors.
        fetches: Slots, in the order in which `run` returns theirs.
        kept: Tensors of constant slots, shared by the plans of a program.
    """

    def __init__(self, program: Program, feeds: Sequence[int], fetches: Sequence[int], kept: dict[int, Any]) -> None:
        self.feeds, self.fetches = list(feeds), list(fetches)
        fed = set(feeds)
        steps = _needed(program.steps, fetches, fed)
        constant = set(program.constants) - fed
        moving: list[Step] = []
        fixed: list[Step] = []
        for step in steps:
            is_fixed = all(slot in constant or slot < 0 for slot in step.inputs)
            (fixed if is_fixed else moving).append(step)
            if is_fixed:
                constant.update(slot for slot in step.outputs if slot >= 0)
        read = {slot for step in moving for slot in step.inputs} | set(fetches)
        self.unfed = [slot for slot in sorted(read - fed - constant - {-1}) if not any(slot in step.outputs for step in moving)]
        template: list[Any] = [None] * (program.count + 2)  # the last two: results that nobody reads, operands that are left out
        if not self.unfed:
            _fold(program, fixed, read & constant, kept)
            for slot in read & constant:
                template[slot] = kept[slot]
        self.template = template
        self.steps = _with_ends(moving, fed, {*fetches, *constant}, program.count)

    def run(self, tensors: Iterable[Any]) -> list[Any]:
        values = self.template.copy()
        for slot, tensor in zip(self.feeds, tensors, strict=True):
            values[slot] = tensor
        label = ""
        try:
            for run, inputs, outputs, ended, label in self.steps:  # noqa: B007
                result = run(*[values[slot] for slot in inputs])
                if type(outputs) is int:
                    values[outputs] = result
                else:
                    for slot, one in zip(outputs, result, strict=False):
                        values[slot] = one
                for slot in ended:
                    values[slot] = None
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
            raise ModelError(
                f"torch failed while running the model: {str(error).splitlines()[0][:300] if str(error) else type(error).__name__}",
                where=label, hint="check that what is fed has the shapes that the model was exported for",
            ) from error  # fmt: skip
        return [values[slot] for slot in self.fetches]


def _needed(steps: Sequence[Step], fetches: Sequence[int], fed: set[int]) -> list[Step]:
    """Those of `steps` that the fetches depend on."""
    wanted, chosen = set(fetches) - fed, []
    for step in reversed(steps):
        if wanted.isdisjoint(step.outputs):
            continue
        chosen.append(step)
        wanted.update(slot for slot in step.inputs if slot >= 0 and slot not in fed)
    return chosen[::-1]


def _fold(program: Program, steps: Sequence[Step], wanted: set[int], kept: dict[int, Any]) -> None:
    """Compute the constants `wanted` into `kept`."""
    missing = wanted - set(kept)
    if not missing:
        return
    steps = _needed(steps, sorted(missing), set(kept))
    read = {slot for step in steps for slot in step.inputs} | missing
    values: list[Any] = [None] * (program.count + 2)
    for slot in read - {-1}:
        if slot in kept:
            values[slot] = kept[slot]
        elif slot in program.constants:
            values[slot] = program.constants[slot]()
    with torch.no_grad():
        plan = Plan.__new__(Plan)
        plan.template, plan.feeds, plan.fetches = values, [], sorted(missing)
        plan.steps = _with_ends(steps, set(kept), missing, program.count)
        kept.update(zip(plan.fetches, plan.run([]), strict=True))


def _with_ends(steps: Sequence[Step], fed: set[int], lasting: set[int], count: int) -> list[tuple[Any, ...]]:
    """The steps as `Plan.run` walks them, each with the slots that nobody reads after it."""
    last = {slot: index for index, step in enumerate(steps) for slot in (*step.inputs, *step.outputs) if slot >= 0}
    found: list[tuple[Any, ...]] = []
    for index, step in enumerate(steps):
        outputs = [count if slot < 0 or slot in fed else slot for slot in step.outputs]
        ended = tuple(slot for slot in {*step.inputs, *step.outputs} if slot >= 0 and last[slot] == index and slot not in lasting)
        found.append((step.run, step.inputs, outputs[0] if len(outputs) == 1 else tuple(outputs), ended, step.label))
    return found


class TorchExecutor:
    """A model, or nodes of it, as a function on torch tensors, differentiable with respect to whatever is fed.

    What is fed may be any value of the main graph: inputs, activations, weights. It is not computed then, and wins over an initializer:
    a trainable weight, a scale, an image that is being synthesized is a tensor with `requires_grad`, fed under its name. What depends
    on constants alone is computed once for each set of fed names, and kept; later changes of the model are not seen.

    Rounding in QuantizeLinear has gradient 1, and what its range cuts off has none, so that gradients with respect to its input and its
    scale are those of LSQ (arXiv 1902.08153); codes are floats. The same holds for Round in the functions of graphq.

    Args:
        model: The model; it is not changed.
        fetches: Names of the values to return; the model's outputs by default.
        nodes: Run only these nodes of the main graph.
        device: Where floats live; a CUDA device if torch finds one. Shapes and indices that the graph computes stay on the CPU.
        dtype: What floats of all widths are computed in.
        drop: Probability that an element of an activation passes a pair of quantizers unchanged (QDrop, arXiv 2203.05740); the attribute
            of that name may be changed between runs. The same runs on a new executor drop the same elements.

    Raises:
        ModelError: an operator, which is named with its node, cannot run on torch; or a fetch is no value of the graph.
    """

    def __init__(self, model: ir.Model, fetches: Sequence[str] | None = None, *, nodes: Sequence[ir.Node] | None = None,
                 device: str | torch.device | None = None, dtype: torch.dtype = torch.float32, drop: float = 0.0) -> None:  # fmt: skip
        self.device = _device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.dtype, self._drop = dtype, Drop(self.device, drop)
        self.fetches = [value.name or "" for value in model.graph.outputs] if fetches is None else list(fetches)
        self._program = Program(model, dtype, self.device, self._drop)
        values = ir.values_by_name(model.graph)
        unknown = [name for name in self.fetches if name not in values]
        if unknown:
            raise ModelError(f"The graph has no value {unknown[0]!r} to fetch.", expected="names of inputs, initializers, node outputs")
        scope = Scope({}, model.opset_imports)
        for value in model.graph.inputs:
            self._program.find(value, scope)
        chosen = list(model.graph) if nodes is None else list(nodes)
        self._program.add(_in_order(chosen, [values[name] for name in self.fetches]), scope)
        self._slots = [self._program.find(values[name], scope) for name in self.fetches]
        self._kept: dict[int, Any] = {}
        self._plans: dict[tuple[str, ...], tuple[list[str], Plan]] = {}

    @property
    def drop(self) -> float:
        return self._drop.probability

    @drop.setter
    def drop(self, probability: float) -> None:
        self._drop.probability = probability

    def run(self, feeds: Mapping[str, torch.Tensor | np.ndarray]) -> list[torch.Tensor]:
        """One tensor per fetch; a fetch that does not depend on the feeds may be one that later runs return again.

        Feeds that nothing reads are ignored. Floats are converted to the executor's type.

        Raises:
            ModelError: a value that is needed was not fed, or torch fails at a node.
        """
        key = tuple(feeds)
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._plan(feeds)
        names, plan = found
        return plan.run([self._tensor(name, feeds[name]) for name in names])

    def _plan(self, feeds: Mapping[str, Any]) -> tuple[list[str], Plan]:
        names = [name for name in feeds if name in self._program.names]
        plan = Plan(self._program, [self._program.names[name] for name in names], self._slots, self._kept)
        if plan.unfed:
            by_slot = {slot: name for name, slot in self._program.names.items()}
            missing = ", ".join(by_slot.get(slot, "?") for slot in plan.unfed)
            raise ModelError(f"Values that are needed were not fed: {missing}.", expected="a tensor for each of them")
        return names, plan

    def _tensor(self, name: str, tensor: Any) -> Any:
        if tensor is None:  # an optional value that is not there
            return None
        if isinstance(tensor, list):  # a sequence
            return [self._tensor(name, one) for one in tensor]
        if not isinstance(tensor, torch.Tensor):
            tensor = to_torch(np.asarray(tensor), self.dtype, "cpu")
        on_host = self._program.names[name] in self._program.host and not tensor.is_floating_point()
        return tensor.to(device="cpu" if on_host else self.device, dtype=self.dtype if tensor.is_floating_point() else None)


def _in_order(nodes: Sequence[ir.Node], fetches: Sequence[ir.Value]) -> list[ir.Node]:
    """Those of `nodes` that the fetches depend on, each after those it reads, else as they are."""
    members = set(nodes)

    def makers(values: Iterable[ir.Value]) -> list[ir.Node]:
        found = [ir.producer(value) for value in values]
        return [node for node in found if node is not None and node in members]

    needed: set[ir.Node] = set()
    waiting = makers(fetches)
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += makers(ir.reads(node))
    placed: dict[ir.Node, None] = {}
    for node in nodes:
        stack = [node] if node in needed else []
        while stack:
            before = [one for one in makers(ir.reads(stack[-1])) if one not in placed]
            if before:
                stack += before
            else:
                placed[stack.pop()] = None
    return list(placed)


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"torch has no device {name!r}.", expected="cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no GPU.", where=f"device {name}", expected="cpu, or a GPU and a build of torch for it")
    return device
