"""Small floats in blocks with a scale each: NVFP4 and MXFP8, as blocked QuantizeLinear and DequantizeLinear of standard ONNX.

| format | codes | block | scale of a block | of a tensor |
|---|---|---|---|---|
| nvfp4 | E2M1, 4 bits | 16 | E4M3, 8 bits | float32 |
| mxfp8 | E4M3, 8 bits | 32 | a power of two | |

MXFP8: OCP microscaling formats, arXiv 2310.10537. Its scales are powers of two rounded up, so that nothing is clipped, in float32: no
runtime at hand takes E8M0 constants. Activations are divided by them and quantized with the scale 1, since TensorRT-RTX 1.7 builds no
8-bit QuantizeLinear whose block scales are computed where the model runs; its products it computes in floats. NVFP4: the two scales
that NVIDIA's Blackwell multiplies with, for which the same builder picks 4-bit kernels; a block's scale is at least `FLOOR` of the
tensor's, so that a block of zeros does not divide by zero.

ONNX Runtime's CPU has no 4-bit floats: `emulated` writes them as arithmetic on float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from graphq import functions, ir
from graphq.editor import Editor
from graphq.quantizers import MIN_SCALE, QParams, Uniform
from graphq.spec import PerGroup, QuantSpec

Array = np.ndarray[Any, np.dtype[Any]]
FormatName = Literal["nvfp4", "mxfp8"]

BLOCKS = {"nvfp4": 16, "mxfp8": 32}
OPSETS = {"nvfp4": 23, "mxfp8": 21}
FLOOR = 2.0**-6
"""The smallest normal E4M3."""

_E4M3, _E2M1 = QuantSpec(8, grid="e4m3"), QuantSpec(4, grid="e2m1")


@dataclass(frozen=True)
class Blocks:
    """A weight in blocks along axis 0.

    Invariant: `weight ≈ codes * repeat(scale, block, axis 0)`, with `scale = scale_codes * tensor_scale` if there are such.

    Attributes:
        codes: `[K, N]` of an ml_dtypes type.
        scale: float32 `[K / block, N]`.
        scale_codes: The same as E4M3 codes of `tensor_scale`; None for mxfp8.
    """

    codes: Array
    scale: Array
    scale_codes: Array | None = None
    tensor_scale: np.float32 | None = None

    def dequantize(self) -> Array:
        """float32 `[K, N]`."""
        block = len(self.codes) // len(self.scale)
        return self.codes.astype(np.float32) * np.repeat(self.scale, block, axis=0)


def tensor_scale(largest: float) -> np.float32:
    """The scale of a whole tensor in nvfp4 whose largest magnitude is `largest`."""
    return np.float32(max(largest / (_E2M1.qmax * _E4M3.qmax), float(MIN_SCALE)))


def quantize(weight: Array, kind: FormatName) -> Blocks:
    """`weight`, float32 `[K, N]` with K a multiple of the block, in blocks along axis 0."""
    block = BLOCKS[kind]
    top = np.abs(weight.reshape(-1, block, weight.shape[1])).max(1)
    if kind == "mxfp8":
        scale = np.exp2(np.ceil(np.log2(np.maximum(top / _E4M3.qmax, MIN_SCALE)))).astype(np.float32)
        return Blocks(_codes(weight, scale, _E4M3, block), scale)
    whole = tensor_scale(float(top.max(initial=0.0)))
    quantizer, qparams = Uniform(_E4M3), QParams(np.asarray(whole), np.zeros((), np.int32))
    raw = np.maximum(top / np.float32(_E2M1.qmax), whole * np.float32(FLOOR)).astype(np.float32)
    codes = quantizer.quantize(raw, qparams)
    scale = quantizer.dequantize(codes, qparams)
    return Blocks(_codes(weight, scale, _E2M1, block), scale, codes, whole)


def _codes(weight: Array, scale: Array, spec: QuantSpec, block: int) -> Array:
    qparams = QParams(np.maximum(scale, MIN_SCALE), np.zeros(scale.shape, np.int32))
    return Uniform(QuantSpec(spec.bits, grid=spec.grid, granularity=PerGroup(0, block))).quantize(weight, qparams)


# ---- in the graph ---------------------------------------------------------------------------------------------------


def insert_weight(edit: Editor, node: ir.Node, index: int, blocks: Blocks, *, turned: bool) -> None:
    """Let `node` read `blocks`, dequantized, as input `index`; `turned` if it reads `[N, K]`.

    Nodes that read the same weight, with the inputs along the same axis, share what is stored.
    """
    value = node.inputs[index]
    assert value is not None
    name, axis = value.name or "weight", int(turned)

    def stored(suffix: str, array: Array, storage: str) -> ir.Value:
        key = (value, turned, storage, suffix)
        return edit.shared(key, f"{name}_{suffix}", lambda: np.ascontiguousarray(array.T) if turned else array, storage)

    codes = stored("quantized", blocks.codes, _storage(blocks.codes))
    if blocks.scale_codes is None:
        scale = stored("scale", blocks.scale, "float32")
    else:
        operands = [stored("block_scale", blocks.scale_codes, "float8e4m3fn"), stored("scale", np.asarray(blocks.tensor_scale), "float32")]
        scale = edit.insert(node, "DequantizeLinear", operands, output=f"{name}_block_scale_dequantized")
        scale.type = ir.tensor_type("float32")
    attributes = {"axis": axis, "block_size": len(blocks.codes) // len(blocks.scale)}
    result = edit.insert(node, "DequantizeLinear", [codes, scale], output=f"{name}_dequantized", attributes=attributes, like=value)
    edit.rewire(node, index, result)


def insert_activation(edit: Editor, value: ir.Value, kind: FormatName, largest: float, readers: list[tuple[ir.Node, int]]) -> ir.Value:
    """Let `readers` read `value` rounded in blocks along its last axis, whose scales are computed where the model runs; returns the result.

    Args:
        largest: Magnitude that scales of blocks must hold, for the tensor's scale of nvfp4; beyond it values saturate.
    """
    block, name = BLOCKS[kind], value.name or "value"
    dims = ir.shape_of(value)
    assert dims is not None and isinstance(dims[-1], int), "insert_activation needs the rank and the last size"
    anchor = value.producer()

    def constant(suffix: str, array: Array, storage: str = "") -> ir.Value:
        return edit.shared((suffix, array.tobytes(), storage), f"block_{suffix}", lambda: array, storage or str(array.dtype))

    def add(op_type: str, operands: list[ir.Value], suffix: str, storage: str = "float32", **attributes: int) -> ir.Value:
        nonlocal anchor
        made = edit.insert(anchor, op_type, operands, output=f"{name}_{suffix}", attributes=attributes, after=anchor is not None)
        made.type = ir.tensor_type(storage)
        anchor = made.producer()
        return made

    shape = constant("shape", np.array([*[0] * (len(dims) - 1), dims[-1] // block, block]))
    grouped = add("Reshape", [add("Abs", [value], "magnitude"), shape], "blocks")
    top = add("ReduceMax", [grouped, constant("axis", np.array([-1]))], "largest", keepdims=0)
    if kind == "nvfp4":
        whole = np.asarray(tensor_scale(largest))
        raw = add("Div", [top, constant("limit", np.asarray(np.float32(_E2M1.qmax)))], "block_range")
        kept = add("Max", [raw, constant("floor", np.asarray(whole * np.float32(FLOOR), np.float32))], "block_kept")
        operands = [edit.initializer(f"{name}_scale", whole), constant("zero", np.zeros(()), "float8e4m3fn")]
        axis, narrow = len(dims) - 1, int(ir.DataType.FLOAT4E2M1)
        scale_codes = add("QuantizeLinear", [kept, *operands], "block_scale", _E4M3.storage)
        scale = add("DequantizeLinear", [scale_codes, *operands], "block_scale_dequantized")
        codes = add("QuantizeLinear", [value, scale], "quantized", _E2M1.storage, axis=axis, block_size=block, output_dtype=narrow)
        codes.shape = value.shape
        result = add("DequantizeLinear", [codes, scale], "dequantized", axis=axis, block_size=block)
    else:
        raw = add("Div", [top, constant("limit", np.asarray(np.float32(_E4M3.qmax)))], "block_range")
        kept = add("Max", [raw, constant("least", np.asarray(np.float32(2.0**-100)))], "block_kept")
        octaves = add("Div", [add("Log", [kept], "log"), constant("octave", np.asarray(np.float32(np.log(2))))], "octaves")
        power = add("Pow", [constant("two", np.asarray(np.float32(2))), add("Ceil", [octaves], "exponent")], "block_scale")
        steps = add("Unsqueeze", [power, constant("axis", np.array([-1]))], "block_steps")
        ratio = add("Div", [add("Reshape", [value, shape], "grouped"), steps], "ratio")
        operands = [constant("one", np.asarray(np.float32(1))), constant("zero", np.zeros(()), "float8e4m3fn")]
        codes = add("QuantizeLinear", [ratio, *operands], "quantized", _E4M3.storage)
        level = add("Mul", [add("DequantizeLinear", [codes, *operands], "codes"), steps], "levels")
        result = add("Reshape", [level, constant("flat", np.array([*[0] * (len(dims) - 1), dims[-1]]))], "dequantized")
    result.shape, result.type = value.shape, value.type
    for node, index in readers:
        edit.rewire(node, index, result)
    return result


def _storage(codes: Array) -> str:
    return _E2M1.storage if codes.dtype.itemsize == 1 and "float4" in str(codes.dtype) else _E4M3.storage


# ---- emulation ------------------------------------------------------------------------------------------------------

_ROUND = """
RoundE2M1 (x, scale, blocks) => (y) {
  last = Constant <value = int64[1] {-1}> ()
  flat = Constant <value = int64[1] {0}> ()
  grouped = Reshape (x, blocks)
  steps = Unsqueeze (scale, last)
  ratio = Div (grouped, steps)
  magnitude = Abs (ratio)
  half = Constant <value = float {0.5}> ()
  one = Constant <value = float {1.0}> ()
  two = Constant <value = float {2.0}> ()
  four = Constant <value = float {4.0}> ()
  least = Constant <value = float {-6.0}> ()
  most = Constant <value = float {6.0}> ()
  below_two = Less (magnitude, two)
  below_four = Less (magnitude, four)
  coarse = Where (below_four, one, two)
  step = Where (below_two, half, coarse)
  counted = Div (ratio, step)
  whole = Round (counted)
  wide = Mul (whole, step)
  code = Clip (wide, least, most)
  level = Mul (code, steps)
  shape = Shape (x)
  y = Reshape (level, shape)
}"""


def emulated(model: ir.Model) -> ir.Model:
    """A model that computes in float32 what the 4-bit floats in the main graph of `model` stand for; itself if there are none.

    The nodes of `model` are put in topological order for it.
    """
    narrow = ir.DataType.FLOAT4E2M1
    found = [node for node in model.graph if node.op_type == "DequantizeLinear" and node.inputs[0].dtype == narrow]  # type: ignore[union-attr]
    if not found:
        return model
    model.graph.sort()  # probes of passes put nodes in behind what they read, but in any order, and a clone needs theirs
    copy = ir.clone(model)
    edit, places = Editor(copy), {node: place for place, node in enumerate(model.graph)}
    nodes = list(copy.graph)
    for node in [nodes[places[one]] for one in found]:
        codes, scale = node.inputs[:2]
        assert codes is not None and scale is not None
        array, maker = ir.constant(codes), codes.producer()
        if array is not None:
            wide = edit.initializer(f"{codes.name}_wide", array.astype(np.float32))
            _take_place(edit, node, _scaled(edit, node, wide, scale))
        elif maker is not None and maker.op_type == "QuantizeLinear" and "block_size" in maker.attributes:
            block, rank = ir.attribute(maker, "block_size"), len(ir.shape_of(codes) or ())
            blocks = edit.initializer(f"{codes.name}_blocks", np.array([*[0] * (rank - 1), -1, block]))
            operands = [_float32(edit, node, maker.inputs[0]), _float32(edit, node, scale), blocks]
            rounded = functions.call(edit, _ROUND, node, operands, output=f"{codes.name}_rounded", like=node.outputs[0], after=False)
            _take_place(edit, node, rounded)
            if not codes.uses():
                edit.remove(maker)
    edit.prune_constants()
    return copy


def _float32(edit: Editor, node: ir.Node, value: ir.Value | None) -> ir.Value:
    """`value`, which may be half precision, as float32, for what is put before `node`."""
    assert value is not None
    if value.dtype in (None, ir.DataType.FLOAT):
        return value
    wide = edit.insert(node, "Cast", [value], output=f"{value.name}_float32", attributes={"to": int(ir.DataType.FLOAT)})
    wide.shape, wide.type = value.shape, ir.tensor_type("float32")
    return wide


def _take_place(edit: Editor, node: ir.Node, new: ir.Value) -> None:
    """Let `new` be read, and known by its name, where the output of `node` was: whoever looks at values of the model asks by name."""
    old, name = node.outputs[0], node.outputs[0].name
    new.type = ir.tensor_type("float32")
    if old.dtype not in (None, ir.DataType.FLOAT):
        new = edit.insert(node, "Cast", [new], output=f"{name}_cast", attributes={"to": int(old.dtype or 0)}, like=old)
    edit.replace(old, new)
    if new.name != name:
        edit.swap_names(old, new)
    edit.remove(node)


def _scaled(edit: Editor, node: ir.Node, wide: ir.Value, scale: ir.Value) -> ir.Value:
    """`wide`, codes as floats, times the blocked `scale` of the DequantizeLinear `node`."""
    axis, (rows, columns) = ir.attribute(node, "axis", 1) % 2, ir.constant_shape(wide)
    block = ir.attribute(node, "block_size", 0)
    shape = (rows // block, block, columns) if axis == 0 else (rows, columns // block, block)
    places, rank = edit.initializer("blocks", np.array(shape)), edit.initializer("axis", np.array([axis + 1]))
    grouped = edit.insert(node, "Reshape", [wide, places], output=f"{wide.name}_blocks")
    steps = edit.insert(node, "Unsqueeze", [_float32(edit, node, scale), rank], output=f"{wide.name}_steps")
    level = edit.insert(node, "Mul", [grouped, steps], output=f"{wide.name}_levels")
    for value in (grouped, steps, level):
        value.type = ir.tensor_type("float32")
    whole = edit.initializer("shape", np.array([rows, columns]))
    return edit.insert(node, "Reshape", [level, whole], output=f"{wide.name}_dequantized", like=node.outputs[0])
