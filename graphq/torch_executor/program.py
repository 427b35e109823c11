"""From a graph to a list of steps: every value becomes a slot, every node a function that reads slots and fills slots.

Model-local functions, and operators that ONNX defines by a body and the table does not have, are replaced by their bodies here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch

from graphq import ir
from graphq.errors import ModelError
from graphq.torch_executor import bodies, ops
from graphq.torch_executor.table import Call
from graphq.torch_executor.tensors import to_torch

HOST_TYPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
"""Constants of these types, and single integers of any, stay on the CPU until a tensor on the device meets them: nearly all are shapes,
axes, indices and zero points."""


class Step(NamedTuple):
    """One call. Slots may be -1: an operand that is left out, a result that nobody reads."""

    run: Callable[..., Any]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    label: str


@dataclass(frozen=True)
class Scope:
    """What names mean among the nodes of one graph or one function body.

    Attributes:
        slots: Of the values that are known.
        opsets: Operator set versions by domain.
        arguments: What attributes of a function body refer to.
        where: The call that the body stands for; empty in the main graph.
    """

    slots: dict[ir.Value, int]
    opsets: Mapping[str, int]
    arguments: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""
    is_own: bool = False

    @property
    def version(self) -> int:
        """Of the default operator set."""
        return self.opsets.get("", self.opsets.get("ai.onnx", 1))


class Drop:
    """Lets elements of activations pass their quantizers unchanged, each with `probability`, the same ones for the same seed."""

    def __init__(self, device: torch.device, probability: float) -> None:
        self.probability, self._device = probability, device

    @cached_property
    def _generator(self) -> torch.Generator:
        return torch.Generator(self._device).manual_seed(0)

    def dequantize(self, run: Callable[..., torch.Tensor], *operands: Any) -> torch.Tensor:
        """What `run`, a DequantizeLinear, makes of its operands but the last, and of that one where it passes."""
        y = run(*operands[:-1])
        if not self.probability:
            return y
        chance = torch.rand(y.shape, generator=self._generator, device=y.device)
        return torch.where(chance < self.probability, operands[-1], y)


class Program:
    """The steps of some nodes, in an order in which they can run.

    Attributes:
        steps: All of them; which ones run is decided when it is known what is fed (see `graphq.torch_executor.executor`).
        names: Slot of each value of the graph by name.
        constants: What makes the tensor of a slot that holds a constant.
        weights: Slots that follow from constants alone.
        host: Slots that hold tensors on the CPU whatever the device.
    """

    def __init__(self, model: ir.Model, dtype: torch.dtype, device: torch.device, drop: Drop,
                 outer: tuple[Program, Scope, ir.Graph] | None = None) -> None:  # fmt: skip
        self.model, self.dtype, self.device, self.drop = model, dtype, device, drop
        self.steps: list[Step] = []
        self.names: dict[str, int] = {}
        self.constants: dict[int, Callable[[], torch.Tensor]] = {}
        self.kinds: dict[int, ir.DataType] = {}
        self.weights: set[int] = set()
        self.host: set[int] = set()
        self.captured: dict[int, int] = {}
        self.count = 0
        self._moved: dict[int, int] = {}
        self._raw: dict[int, int] = {}
        self._outer = outer

    # ---- slots ------------------------------------------------------------------------------------------------------

    def slot(self, kind: ir.DataType | None = None) -> int:
        if kind is not None:
            self.kinds[self.count] = kind
        self.count += 1
        return self.count - 1

    def find(self, value: ir.Value, scope: Scope) -> int:
        """The slot of `value`; a new one for a constant, for what an outer graph computes, and for what has to be fed."""
        if value in scope.slots:
            return scope.slots[value]
        slot = scope.slots[value] = self.slot(value.dtype)
        if self._outer is not None and value.graph is not self._outer[2]:
            self.captured[slot] = self._outer[0].find(value, self._outer[1])
        elif value.is_initializer() and value.const_value is not None and not scope.where:
            self.constant(slot, value.const_value)
        if value.name and not scope.where:
            self.names[value.name] = slot
        return slot

    def constant(self, slot: int, tensor: Any) -> None:
        """Let `slot` hold `tensor`, one of the graph's; it is read when a run first needs it."""
        on_host = tensor.dtype in HOST_TYPES or (tensor.dtype.is_integer() and tensor.size == 1)
        self.kinds[slot] = tensor.dtype
        self.weights.add(slot)
        if on_host:
            self.host.add(slot)
        device = torch.device("cpu") if on_host else self.device
        self.constants[slot] = lambda: to_torch(tensor.numpy(), self.dtype, device)

    # ---- steps ------------------------------------------------------------------------------------------------------

    def add(self, nodes: Iterable[ir.Node], scope: Scope) -> None:
        for node in nodes:
            function = self.model.functions.get(node.op_identifier())
            if function is not None:
                self._add_body(node, scope, function, {})
            elif node.op_type == "Constant" and not node.domain:
                self._add_constant(node, scope)
            elif node.domain in ("", "ai.onnx") and node.op_type in ops.OPERATORS and scope.version >= ops.OPERATORS[node.op_type].since:
                self._add_step(node, scope)
            elif (body := bodies.of(node, scope.version, [self._kind(value, scope) for value in node.inputs])) is not None:
                self._add_body(node, scope, *body)
            else:
                raise ModelError(
                    f"The operator {node.domain or 'ai.onnx'}.{node.op_type} cannot run on torch.", where=scope.where or ir.describe(node),
                    expected=f"one of the {len(ops.OPERATORS)} operators in graphq.torch_executor.OPERATORS, or a model-local function",
                    hint="cut the model before it, or feed its outputs and fetch what lies behind",
                )  # fmt: skip

    def _kind(self, value: ir.Value | None, scope: Scope) -> ir.DataType | None:
        return None if value is None else value.dtype or self.kinds.get(scope.slots.get(value, -1))

    def _add_constant(self, node: ir.Node, scope: Scope) -> None:
        tensor = bodies.constant_of(node, self._attributes(node, scope), ir.describe(node))
        self.constant(self._output(node.outputs[0], scope, tensor.dtype), tensor)

    def _add_body(self, node: ir.Node, scope: Scope, function: ir.Function, defaults: Mapping[str, Any]) -> None:
        """Run the body of `function` instead of `node`."""
        arguments = dict(defaults) | {name: attr for name, attr in function.attributes.items() if attr.value is not None}
        arguments |= {name: attr for name, attr in self._resolved(node, scope)}
        inputs = [None if value is None else self.find(value, scope) for value in node.inputs]
        inputs += [None] * (len(function.inputs) - len(inputs))
        slots = {formal: -1 if slot is None else slot for formal, slot in zip(function.inputs, inputs, strict=False)}
        own = scope.is_own or node.domain == ir.DOMAIN
        inner = Scope(slots, function.opset_imports, arguments, scope.where or ir.describe(node), own)
        self.add(function, inner)
        for formal, value in zip(function.outputs, node.outputs, strict=False):
            scope.slots[value] = self.find(formal, inner)
            if value.name and not scope.where:
                self.names[value.name] = scope.slots[value]

    def _resolved(self, node: ir.Node, scope: Scope) -> Iterable[tuple[str, Any]]:
        """The attributes of `node`, references to arguments of the function replaced."""
        for name, attr in node.attributes.items():
            if not attr.is_ref():
                yield name, attr
            elif attr.ref_attr_name and attr.ref_attr_name in scope.arguments:
                yield name, scope.arguments[attr.ref_attr_name]

    def _attributes(self, node: ir.Node, scope: Scope) -> dict[str, Any]:
        found = {}
        for name, attr in self._resolved(node, scope):
            kind = attr.type.name
            if kind == "TENSOR":
                found[name] = attr.value if node.op_type == "Constant" else to_torch(attr.value.numpy(), self.dtype, "cpu")
            elif kind not in ("GRAPH", "GRAPHS"):
                found[name] = list(attr.value) if kind.endswith("S") and kind != "TENSORS" else attr.value
        return found

    def _output(self, value: ir.Value, scope: Scope, kind: ir.DataType | None) -> int:
        if not value.name:
            return -1
        slot = self.slot(kind)
        scope.slots[value] = slot
        if not scope.where:
            self.names[value.name] = slot
        return slot

    def _add_step(self, node: ir.Node, scope: Scope) -> None:
        entry = ops.OPERATORS[node.op_type]
        inputs = [-1 if value is None else self.find(value, scope) for value in node.inputs]
        attributes = self._attributes(node, scope)
        programs, captured = self._subprograms(node, scope)
        formals = {name: len(node.attributes[name].value.inputs) for name in programs}
        made = bodies.made_type(node.op_type, attributes, [self.kinds.get(slot) for slot in inputs]) or node.outputs[0].dtype
        call = Call(attributes, scope.version, [bool(value.name) for value in node.outputs],
                    [self.kinds.get(slot) for slot in inputs], self.dtype, self.device, made, scope.is_own, programs, formals)  # fmt: skip
        tensors = [slot for index, slot in enumerate(inputs) if index not in entry.numbers and slot >= 0]
        on_host = node.op_type in ("Shape", "Size") or (bool(tensors) and self.host.issuperset(tensors) and not captured)
        if not on_host and self.device.type != "cpu":
            inputs = [slot if index in entry.numbers else self._on_device(slot) for index, slot in enumerate(inputs)]
        outputs = [self._output(value, scope, made if index == 0 else value.dtype) for index, value in enumerate(node.outputs)]
        kept = [slot for slot in outputs if slot >= 0]
        if self.weights.issuperset(slot for slot in (*inputs, *captured) if slot >= 0):
            self.weights.update(kept)
        if on_host:
            self.host.update(kept)
        run = partial(entry.run, call)
        if node.op_type == "QuantizeLinear" and inputs[0] not in self.weights:
            self._raw[outputs[0]] = inputs[0]
        elif node.op_type == "DequantizeLinear" and inputs[0] in self._raw:
            run, inputs = partial(self.drop.dequantize, run), [*inputs, self._raw[inputs[0]]]
        label = ir.describe(node) + (f" in {scope.where}" if scope.where else "")
        self.steps.append(Step(run, (*inputs, *captured), tuple(outputs), label))

    def _on_device(self, slot: int) -> int:
        """A slot with what `slot` holds on the CPU, on the device."""
        if slot not in self.host:
            return slot
        if slot not in self._moved:
            self._moved[slot] = self.slot(self.kinds.get(slot))
            if slot in self.weights:
                self.weights.add(self._moved[slot])
            self.steps.append(Step(partial(_move, self.device), (slot,), (self._moved[slot],), "a constant or a shape"))
        return self._moved[slot]

    def _subprograms(self, node: ir.Node, scope: Scope) -> tuple[dict[str, Callable[..., list[Any]]], list[int]]:
        """The graphs among the attributes of `node` as functions, and the slots that they read besides their inputs."""
        from graphq.torch_executor.executor import Plan

        programs: dict[str, Callable[..., list[Any]]] = {}
        captured: list[int] = []
        for name, attr in node.attributes.items():
            if attr.type.name != "GRAPH":
                continue
            graph, inner = attr.value, Program(self.model, self.dtype, self.device, self.drop, (self, scope, attr.value))
            formals = [inner.slot(value.dtype) for value in graph.inputs]
            within = Scope(dict(zip(graph.inputs, formals, strict=True)), scope.opsets, scope.arguments, "", scope.is_own)
            inner.add(graph, within)
            results = [inner.find(value, within) for value in graph.outputs]
            plan = Plan(inner, [*formals, *inner.captured], results, {})
            first = len(captured)
            captured += inner.captured.values()
            programs[name] = partial(_run_part, plan, len(inner.captured), first)
        return programs, captured


def _move(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(device)


def _run_part(plan: Any, count: int, first: int, formals: Sequence[Any], captured: Sequence[Any]) -> list[Any]:
    return list(plan.run([*formals, *captured[first : first + count]]))
