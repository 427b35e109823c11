"""Half precision: what float16 and bfloat16 hold, and how a model in them is run honestly.

ONNX Runtime's CPU computes most float16 operators in float32 and drops the casts between them, so that nothing ever overflows
(the square of 3000 comes out as 9 million), and has no bfloat16 operators at all. `emulated` therefore writes each half value as
a float32 one that is rounded by a pair of Casts, which the runtime keeps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from graphq import ir
from graphq.editor import Editor

BFLOAT16_OPSET = 22
"""From here on Conv, pooling and most other operators are defined for bfloat16."""


@dataclass(frozen=True)
class Half:
    """A float type of 16 bits.

    Attributes:
        storage: Its name in numpy and, with `tensor()` around it, in ONNX schemas.
        code: Its ONNX type.
        digits: Bits of the significand: whole numbers up to `2**digits` are exact.
        limit: Its largest number.
        tiny: Its smallest number that has all digits.
        least: Its smallest number above 0.
    """

    storage: str
    code: ir.DataType
    digits: int
    limit: float
    tiny: float
    least: float

    def round(self, array: np.ndarray, *, saturate: bool = False) -> np.ndarray:
        """`array` in this type; too large becomes infinite, or with `saturate` the largest number."""
        if saturate:
            array = np.clip(array, -self.limit, self.limit)
        with np.errstate(over="ignore"):
            return np.asarray(array).astype(np.float16 if self.storage == "float16" else ml_dtypes.bfloat16)


HALVES: Mapping[str, Half] = MappingProxyType({
    "fp16": Half("float16", ir.DataType.FLOAT16, 11, 65504.0, 2.0**-14, 2.0**-24),
    "bf16": Half("bfloat16", ir.DataType.BFLOAT16, 8, float(ml_dtypes.finfo(ml_dtypes.bfloat16).max), 2.0**-126, 2.0**-133),
})  # fmt: skip

CODES = frozenset(half.code for half in HALVES.values())


def is_half(value: ir.Value | None) -> bool:
    return value is not None and value.dtype in CODES


def has_half(model: ir.Model) -> bool:
    """Whether anything in the main graph is float16 or bfloat16."""
    return any(map(is_half, ir.values_by_name(model.graph).values()))


def emulated(model: ir.Model) -> ir.Model:
    """A model that computes in float32 what `model` computes in half precision, rounded after each node; names stay.

    What it returns and is fed keeps its type. A call of a function of graphq counts as one node. `model` itself comes back if it holds
    no half values, or if they cannot be told apart: types are not stated, or some lie in subgraphs or in functions of others.
    """
    if not has_half(model) or any(_is_hidden(node, model) for node in ir.all_nodes(model)):
        return model
    copy = ir.clone(model)
    edit = Editor(copy)
    for value in copy.graph.initializers.values():
        if is_half(value) and value.const_value is not None and not value.is_graph_output():
            wide = partial(_widened, value.const_value)
            value.const_value = ir.lazy_tensor(wide, "float32", ir.constant_shape(value), value.name or "")
            value.type = ir.tensor_type("float32")
    for value in copy.graph.inputs:
        if is_half(value):
            _read_wide(edit, value, value)
    for node in list(copy.graph):
        for out in [out for out in node.outputs if is_half(out)]:
            narrow = out
            if node.op_type != "Cast":
                code = int(out.dtype or 0)
                narrow = edit.insert(node, "Cast", [out], output=f"{out.name}_rounded", attributes={"to": code}, like=out, after=True)
                out.type = ir.tensor_type("float32")
            _read_wide(edit, out, narrow)
    return copy


def _widened(tensor: Any) -> np.ndarray:
    return np.asarray(tensor.numpy().astype(np.float32))


def _read_wide(edit: Editor, out: ir.Value, narrow: ir.Value) -> None:
    """Let all readers of `out` read `narrow`, its half form, as float32; what the model returns is `narrow` itself."""
    readers = [(use.node, use.idx) for use in ir.uses(out) if use.node is not narrow.producer()]
    maker, to = narrow.producer(), {"to": int(ir.DataType.FLOAT)}
    wide = edit.insert(maker, "Cast", [narrow], output=f"{out.name}_wide", attributes=to, after=maker is not None)
    wide.shape, wide.type = out.shape, ir.tensor_type("float32")
    for reader, index in readers:
        edit.rewire(reader, index, wide)
    if out.is_graph_output() and narrow is not out:
        edit.replace_output(out, narrow)
    elif not (out.is_graph_output() or out.is_graph_input()):
        edit.swap_names(out, wide)  # whoever asks for the value gets numbers that numpy knows


def _is_hidden(node: ir.Node, model: ir.Model) -> bool:
    """Whether `node` may compute in half precision where `emulated` does not look, or with types that it does not know."""
    values = [*node.inputs, *node.outputs]
    if node.graph is not model.graph or node.domain not in ("", ir.DOMAIN):
        return any(map(is_half, values))
    return any(value is not None and value.dtype is None and value.type is None for value in node.outputs if value.name)
