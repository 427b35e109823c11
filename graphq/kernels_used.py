"""Which nodes ONNX Runtime really computes on integers: its own optimized graph says so, not the Q/DQ nodes of the model."""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

from graphq import ir, linear, stored
from graphq.executor import Executor

_INTEGER = frozenset({
    "ConvInteger", "DynamicQuantizeMatMul", "GatherBlockQuantized", "MatMulBnb4", "MatMulInteger", "MatMulIntegerToFloat",
    "MatMulNBits", "NhwcMaxPool", "QAttention", "QGemm", "QMoE", "DynamicQuantizeLSTM", "QEmbedLayerNormalization",
})  # fmt: skip
_INTEGER_PREFIXES = ("QLinear", "QOrdered")
_EITHER = frozenset({"AveragePool", "Concat", "MaxPool", "Pad", "Relu", "Resize"})
"""Operators with kernels for both: the element type decides. Those that only move data in memory are not counted."""
_FLOAT_LINEAR = frozenset({*linear.LINEAR_OPS, "FusedConv", "FusedGemm", "FusedMatMul", "NhwcFusedConv", "TransposeMatMul", "GemmFastGelu"})
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})
_INTEGER_TYPES = frozenset({onnx.TensorProto.INT8, onnx.TensorProto.UINT8})
_TOKEN = re.compile(r"_token_\d+$")  # ORT makes names unique like this


@dataclass(frozen=True)
class Kernel:
    """One node of the optimized graph.

    Attributes:
        op_type: What runs, such as `QLinearConv`.
        name: In the optimized graph.
        original: The node of the model that it computes (the linear one, if several were fused); None if ORT made it up.
        note: For Q/DQ nodes, what they stand between.
    """

    op_type: str
    name: str
    original: str | None
    note: str = ""


@dataclass(frozen=True)
class KernelsUsed:
    """Attributes:
    integer: Computed on integer codes (weights alone, in the case of `MatMulNBits` and other blocked formats).
    floating: Linear operators that stayed float.
    conversions: Q/DQ nodes that are left over inside the graph; those right at an input or output of the model are not.
    """

    integer: tuple[Kernel, ...]
    floating: tuple[Kernel, ...]
    conversions: tuple[Kernel, ...]

    @property
    def counts(self) -> Mapping[str, int]:
        """Integer nodes by kernel, most frequent first."""
        return dict(Counter(kernel.op_type for kernel in self.integer).most_common())


def kernels(model: ir.Model | str | Path) -> KernelsUsed:
    """Let ONNX Runtime optimize `model` for this machine's CPU and sort the nodes of the result.

    What it fuses depends on the CPU: the answer holds for machines of this kind.
    """
    model = model if isinstance(model, ir.Model) else ir.load(model)
    with tempfile.TemporaryDirectory(prefix="graphq-") as folder:
        path = Path(folder) / "optimized.onnx"
        Executor(model, deployed=True, optimized_path=str(path))
        return read_optimized(path, model)


def read_optimized(path: str | Path, model: ir.Model) -> KernelsUsed:
    """The same from the graph that a session over `model` has written to `path` (`Executor(optimized_path=...)`)."""
    return _sort(onnx.load(path, load_external_data=False).graph, _Origins(model))


def _sort(graph: onnx.GraphProto, origins: _Origins) -> KernelsUsed:
    integer, floating, conversions = [], [], []
    types = {entry.name: entry.type.tensor_type.elem_type for entry in [*graph.value_info, *graph.input, *graph.output]}
    for node in _nodes(graph):
        if node.op_type in _CONVERSIONS:
            conversions.append(node)
        elif _is_integer(node, types):
            integer.append(Kernel(node.op_type, node.name, origins.of(node)))
        elif node.op_type in _FLOAT_LINEAR:
            floating.append(Kernel(node.op_type, node.name, origins.of(node)))
    return KernelsUsed(tuple(integer), tuple(floating), tuple(_inside(graph, conversions, origins)))


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for entry in node.attribute:
            for subgraph in [entry.g, *entry.graphs]:
                yield from _nodes(subgraph)


def _is_integer(node: onnx.NodeProto, types: Mapping[str, int]) -> bool:
    if node.op_type in _EITHER:
        return types.get(node.output[0]) in _INTEGER_TYPES
    return node.op_type in _INTEGER or node.op_type.startswith(_INTEGER_PREFIXES)


def _inside(graph: onnx.GraphProto, conversions: list[onnx.NodeProto], origins: _Origins) -> Iterator[Kernel]:
    """The conversions that do not just take a model input in or give a model output out, each with its float neighbour."""
    outer = {entry.name for entry in [*graph.input, *graph.output]}
    makers = {name: node for node in _nodes(graph) for name in node.output}
    readers = {name: node for node in _nodes(graph) for name in node.input}
    constants = {entry.name for entry in graph.initializer}
    for node in conversions:
        quantizes = node.op_type == "QuantizeLinear"
        value = node.input[0] if quantizes else node.output[0]
        if value in outer:
            continue
        neighbour = makers.get(value) if quantizes else readers.get(value)
        note = "" if neighbour is None else f"{'after' if quantizes else 'before'} {neighbour.op_type} {neighbour.name!r}"
        if node.input[0] in constants:
            note = f"constant {node.input[0]!r} {note}"
        yield Kernel(node.op_type, node.name, origins.of(node), note)


class _Origins:
    """Finds the node of a model that a node of its optimized graph computes: by name, by weight, or by output."""

    def __init__(self, model: ir.Model) -> None:
        nodes = [node for node in ir.all_nodes(model) if node.name]
        self._names = {node.name for node in nodes}
        self._makers = {out.name: node for node in nodes for out in node.outputs if out.name}
        linears = [node for node in nodes if node.domain == "" and node.op_type in linear.LINEAR_OPS]
        self._weights = {name: node.name for node in linears for name in _weight_names(node)}

    def of(self, node: onnx.NodeProto) -> str | None:
        name = _TOKEN.sub("", node.name)
        if name in self._names:
            return name
        by_weight = next((self._weights[value] for value in node.input if value in self._weights), None)
        if by_weight is not None:
            return by_weight
        makers = [self._makers[value] for value in [*node.output, name.removesuffix("_nchwc")] if value in self._makers]
        found = next(iter(makers), None)
        if found is not None and any(op in node.op_type for op in ("Conv", "Gemm", "MatMul")):
            found = _linear_before(found) or found
        return None if found is None else found.name


def _linear_before(node: ir.Node) -> ir.Node | None:
    """The linear operator behind the few operators that were fused into it."""
    current: ir.Node | None = node
    for _ in range(4):
        if current is None or current.op_type in linear.LINEAR_OPS:
            return current
        current = ir.producer(current.inputs[0]) if current.inputs else None
    return None


def _weight_names(node: ir.Node) -> Iterator[str]:
    """Names of what the weight is stored as: itself, or codes, scales and zero points."""
    yield from (part.name for part in stored.parts(linear.weight_of(node)) if part.name)
