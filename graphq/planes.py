"""Weights as planes of digits: one file that holds a model in 8, 6, 4 and 2 bits (and any width between), nested in each other.

A code `q` of 8 unsigned bits is four digits of 2 bits, `q = 64 d_3 + 16 d_2 + 4 d_1 + d_0`; plane k holds the digits `d_k` of all
weights as uint2 (opset 25). With b bits only the leading b bits of a code are read, and what the rest may be is replaced by its
mean: `w = (q - q mod 2^(8-b) + (2^(8-b) - 1) / 2 - zero_point) * scale`. How many bits are read is one number, the initializer
`graphq_bits`; a file with planes left out is smaller and reads what is left (`select`). Planes are left out whole: a file of 5 bits
still holds the digits of 6.

Runtimes fold the planes into floats when a session is made, and the number with them: to choose a width is to change the model
before it is loaded, which `select_bits` does. `SessionOptions.add_initializer` is too late for it: ONNX Runtime 1.31 folds first.

After MultiQuant, arXiv 2305.08117, whose branches of 2 bits are trained; these are digits of one quantizer, and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx.external_data_helper import load_external_data_for_model

from graphq import functions, ir, report
from graphq.editor import Editor
from graphq.errors import ModelError, UsageError
from graphq.ir_files import PROTOBUF_LIMIT
from graphq.qdq import quantized_weight_bytes
from graphq.verify import verify_graph

OPSET = 25
"""The first with uint2."""

PLANES, DIGIT = 4, 2
"""Planes of a full code, and bits of a digit."""

BITS = "graphq_bits"
"""The float32 scalar that says how many bits are read (`graphq_bits_1` where the model has such a value itself); a file that has fewer
reads what it has."""

_OPERATOR = "PlaneWeight"


def split(codes: np.ndarray) -> list[np.ndarray]:
    """The planes of uint8 `codes`, the highest digits first: arrays of their shape with values 0 to 3."""
    return [codes >> np.uint8(DIGIT * plane) & np.uint8(3) for plane in reversed(range(PLANES))]


def nested(codes: np.ndarray, bits: int) -> np.ndarray:
    """What uint8 `codes` stand for when their leading `bits` are read, in steps of the 8-bit code; float32 of their shape."""
    dropped = 8 - bits
    first = codes >> np.uint8(dropped) << np.uint8(dropped)
    return first.astype(np.float32) + np.float32(((1 << dropped) - 1) / 2)


def insert(edit: Editor, anchor: ir.Node, name: str, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray,
           like: ir.Value) -> ir.Value:  # fmt: skip
    """Put the weight `(codes - zero_point) * scale` in planes before `anchor`; returns its float value.

    Args:
        codes: uint8, of the shape of `like`, or with the axis of groups split in two.
        scale, zero_point: float32 and uint8, of a shape that broadcasts to that of the codes.
        like: The float weight.
    """
    values = [edit.initializer(f"{name}_plane_{PLANES - 1 - index}", plane, "uint2") for index, plane in enumerate(split(codes))]
    values += [edit.initializer(f"{name}_scale", scale), edit.initializer(f"{name}_zero_point", zero_point, "uint8")]
    bits = next((node.inputs[-1] for node in _weights(edit.model)), None) or edit.initializer(BITS, np.asarray(8, np.float32))
    result = _call(edit, anchor, [*values, bits], f"{name}_decoded", like)
    shape = ir.constant_shape(like)
    if codes.shape == shape:
        return result
    result.shape = None
    whole = edit.shared((BITS, shape), f"{name}_shape", lambda: np.array(shape, np.int64), "int64")
    return edit.insert(anchor, "Reshape", [result, whole], output=f"{name}_flat", like=like)


def _call(edit: Editor, anchor: ir.Node, values: Sequence[ir.Value | None], name: str, like: ir.Value) -> ir.Value:
    return functions.call(edit, _body(len(values) - 3), anchor, values, output=name, like=like, after=False)


def _body(count: int) -> str:
    """The operator that reads `count` planes, the highest ones: Horner's rule, and what `nested` does. All of it is exact in float32."""
    planes = [f"plane_{PLANES - 1 - index}" for index in range(count)]
    lines = ["one = Constant <value_float = 1.0> ()", "two = Constant <value_float = 2.0> ()", "four = Constant <value_float = 4.0> ()",
             "full = Constant <value_float = 8.0> ()", f"held = Constant <value_float = {DIGIT * count}.0> ()",
             f"code_0 = Cast <to = 1> ({planes[0]})"]  # fmt: skip
    for index, plane in enumerate(planes[1:]):
        lines += [f"shifted_{index} = Mul (code_{index}, four)", f"digit_{index} = Cast <to = 1> ({plane})",
                  f"code_{index + 1} = Add (shifted_{index}, digit_{index})"]  # fmt: skip
    lines += [
        "kept = Min (bits, held)",
        "dropped = Sub (held, kept)", "share = Pow (two, dropped)", f"levels = Div (code_{count - 1}, share)", "level = Floor (levels)",
        "missing = Sub (full, kept)", "span = Pow (two, missing)", "first = Mul (level, span)",
        "others = Sub (span, one)", "half = Div (others, two)", "middle = Add (first, half)",
        "zero = Cast <to = 1> (zero_point)", "steps = Sub (middle, zero)", "weight = Mul (steps, scale)",
    ]  # fmt: skip
    inputs, body = ", ".join([*planes, "scale", "zero_point", "bits"]), "\n".join(lines)
    return f"{_OPERATOR}{count} ({inputs}) => (weight) {{ {body} }}"


def _weights(model: ir.Model) -> Iterator[ir.Node]:
    return (node for node in model.graph if node.domain == ir.DOMAIN and node.op_type.startswith(_OPERATOR))


def select(model: ir.Model, bits: int) -> None:
    """Leave out the planes that `bits` do not need, and read `bits` of what is left.

    An odd number takes the planes of the next even one, which can still be selected after it.

    Raises:
        ModelError: the model has no planes.
        UsageError: it does not have `bits` any more, or there is no such width.
    """
    nodes = list(_weights(model))
    if not nodes:
        raise ModelError("The weights of the model are not stored in planes.", expected="a result of the pass digit-planes",
                         hint="graphq convert --recipe nested-8-6-4-2 makes one")  # fmt: skip
    held = DIGIT * min(len(node.inputs) - 3 for node in nodes)
    if not 1 <= bits <= held:
        raise UsageError(f"The model does not hold its weights in {bits} bits.", where=f"{held} bits are there", expected=f"1 to {held}")
    edit, count = Editor(model), -(-bits // DIGIT)
    for node in nodes:
        out, planes = node.outputs[0], len(node.inputs) - 3
        if planes > count:
            edit.replace(out, _call(edit, node, [*node.inputs[:count], *node.inputs[planes:]], out.name or "weight", out))
            edit.remove(node)
    edit.remove_functions(ir.DOMAIN, [f"{_OPERATOR}{more}" for more in range(count + 1, PLANES + 1)])
    for value in {node.inputs[-1] for node in _weights(model)}:
        edit.set_constant(value, np.asarray(bits, np.float32))  # type: ignore[arg-type]
    edit.prune()
    verify_graph(model)
    if report.METADATA_KEY in model.metadata_props:
        told = report.read_embedded(model)
        note = f"Of the weights, {bits} bits were kept after the conversion; what was measured then is left out, `graphq compare` measures."
        notes = (note, *(other for other in told.notes if not other.startswith("Of the weights, ")))
        after = quantized_weight_bytes(model)[1]
        told = replace(told, comparison=(), held_out=0, accuracy=None, gates=(), notes=notes, weight_bytes_after=after)
        model.metadata_props[report.METADATA_KEY] = told.to_json(indent=None)


def select_bits(model: str | Path, bits: int) -> onnx.ModelProto:
    """The model in the file `model`, which `digit-planes` made, with `bits` of its weights: to load, or to save as a smaller file.

        session = onnxruntime.InferenceSession(graphq.select_bits("nested.onnx", 4).SerializeToString())

    Raises:
        ModelError: the model has no planes, or is too large for one protobuf with the bits that are left (2 GiB).
        UsageError: it does not hold `bits`, 1 to 8.
    """
    found = ir.load(model)
    select(found, bits)
    if ir.weight_bytes(found) > PROTOBUF_LIMIT - (1 << 26):
        raise ModelError("The model does not fit into one protobuf.", where=f"{model}: {bits} bits a weight", expected="2 GiB at most",
                         hint=f"graphq planes {model} --bits {bits} -o FILE writes its weights beside it")  # fmt: skip
    proto = ir.to_proto(found)
    load_external_data_for_model(proto, str(Path(model).parent))
    return proto
