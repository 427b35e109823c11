"""What a builder made of a model: the plan that it logs, read, and held against the types that the graph asks for.

TensorRT-RTX 1.7 describes each layer of an engine in one line of its verbose log, if the builder was asked for detailed profiling. That
needs no GPU. Whether TensorRT writes the same lines was not tried: where none are read, what nodes got is unknown.
A layer that computes lists the ONNX nodes that it came from and the types of what it reads:

    Name: fc1_myl0_18, LayerType: gemm, Inputs: [ { Name: a, Dimensions: [-1,192], ..., Datatype: Int8, ... }],
    Constants: [ { Name: b, Dimensions: [192,768], ..., Datatype: Int8, ...}, ...], Outputs: [...], TacticName: ...,
    StreamId: 0, Metadata: [ONNX Layer: fc1][ONNX Layer: fc1_weight_dequantized]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from graphq import ir, linear
from graphq.engines import EngineFacts, NodePrecision

_LAYER = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: (?P<inputs>.*?), Constants: (?P<constants>.*?), Outputs: .*?"
    r", TacticName: (?P<tactic>.*?), StreamId: .*?Metadata: (?P<metadata>.*)"
)
_TENSOR = re.compile(r"Dimensions: \[(?P<shape>[^\]]*)\].*?Datatype: (?P<dtype>\w+)")
_NODE = "[ONNX Layer: "
_TYPES = {"Float": "float32", "Half": "float16", "BFloat16": "bfloat16", "FP8": "float8e4m3fn", "FP4E2M1": "float4e2m1"}
_POINTWISE = frozenset({"kgen", "shape_call", "constant", "shuffle"})
"""Kinds of layers that do not multiply matrices, unless their name says so."""
_MULTIPLIES = re.compile(r"gemm|Fc|Conv|mha")
_CHOSEN_LATER = "STUB"
"""In the name of a tactic: the kernel is picked where the engine is loaded."""
_FLOATS = {"float": "float32", "double": "float64"}
_MOVES = frozenset({"Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Identity", "Slice", "Split", "Gather"})


@dataclass(frozen=True)
class Tensor:
    """What a layer reads; a size of -1 is open."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def is_scalar(self) -> bool:
        return all(size == 1 for size in self.shape)


@dataclass(frozen=True)
class Layer:
    """One layer of an engine.

    Attributes:
        kind: The builder's word for what it is, such as `gemm`.
        nodes: Names of the ONNX nodes that it came from.
    """

    name: str
    kind: str
    inputs: tuple[Tensor, ...]
    constants: tuple[Tensor, ...]
    tactic: str
    nodes: tuple[str, ...]

    @property
    def multiplies(self) -> bool:
        return self.kind not in _POINTWISE or _MULTIPLIES.search(self.name) is not None

    def operands(self, has_weight: bool) -> str:
        """Types of the two operands of its product. A weight that it does not read as a constant was dequantized before it."""
        weights = [tensor for tensor in self.constants if not tensor.is_scalar] if has_weight else []
        pair = [*self.inputs[:1], *(weights[:1] or self.inputs[1:2])]
        return " x ".join(tensor.dtype for tensor in pair) if len(pair) == 2 else ""


def read_plan(lines: Iterable[str]) -> list[Layer]:
    """The layers that a log describes; lines of another form are passed over."""
    return [_layer(match) for match in map(_LAYER.search, lines) if match]


def _layer(match: re.Match[str]) -> Layer:
    return Layer(
        match["name"], match["kind"], _tensors(match["inputs"]), _tensors(match["constants"]), match["tactic"],
        tuple(part.rstrip().removesuffix("]") for part in match["metadata"].split(_NODE)[1:]),
    )  # fmt: skip


def _tensors(text: str) -> tuple[Tensor, ...]:
    return tuple(
        Tensor(_TYPES.get(found["dtype"], found["dtype"].lower()), tuple(int(size) for size in found["shape"].split(",") if size))
        for found in _TENSOR.finditer(text)
    )


def facts(model: ir.Model, layers: Sequence[Layer]) -> EngineFacts:
    """What became of the linear nodes of `model` in the engine with these layers."""
    holders: dict[str, Layer] = {name: layer for layer in layers if layer.multiplies for name in layer.nodes}
    nodes = [node for node in model.graph if not node.domain and node.op_type in linear.LINEAR_OPS]
    found = [_precision(node, holders) for node in nodes]
    unfused = [name for node, one in zip(nodes, found, strict=True) if one.is_lost for name in _quantizers(node)]
    tactics = [layer.tactic for layer in layers if layer.multiplies]
    later = any(_CHOSEN_LATER in tactic for tactic in tactics) or not any(tactics)
    sparse = None if later else sum("sparse" in tactic.lower() for tactic in tactics)
    return EngineFacts(len(layers), tuple(found), tuple(dict.fromkeys(unfused)), sparse)


def _precision(node: ir.Node, holders: Mapping[str, Layer]) -> NodePrecision:
    layer = holders.get(node.name or "")
    asked = " x ".join(_asked(value) for value in _operands(node))
    got = layer.operands(_is_constant(_operands(node)[1])) if layer is not None else ""
    return NodePrecision(node.name or "", asked, got, "" if layer is None else layer.name)


def _operands(node: ir.Node) -> tuple[ir.Value, ir.Value]:
    """What a linear node multiplies: data first."""
    return linear.data_of(node), linear.weight_of(node)  # type: ignore[return-value]


def _asked(value: ir.Value) -> str:
    """The type that a DequantizeLinear before `value` reads, past operators that only move elements; that of `value` otherwise."""
    maker = _source(value)
    if maker is not None and maker.op_type == "DequantizeLinear":
        value = maker.inputs[0]  # type: ignore[assignment]
    name = str(value.dtype).lower() if value.dtype is not None else "float32"
    return _FLOATS.get(name, name)


def _source(value: ir.Value) -> ir.Node | None:
    maker = ir.producer(value)
    while maker is not None and not maker.domain and maker.op_type in _MOVES and maker.inputs:
        maker = ir.producer(maker.inputs[0])
    return maker


def _is_constant(value: ir.Value) -> bool:
    maker = _source(value)
    if maker is not None and maker.op_type == "DequantizeLinear":
        return _is_constant(maker.inputs[0])  # type: ignore[arg-type]
    return ir.constant(value) is not None


def _quantizers(node: ir.Node) -> list[str]:
    makers = [_source(value) for value in _operands(node)]
    return [maker.name or "" for maker in makers if maker is not None and maker.op_type == "DequantizeLinear"]
