"""sulq-softmax: quantize attention weights by their logarithm, where nearly all of them are small and few are near 1.

Each softmax that feeds a MatMul gets a node of the domain `graphq` behind it, whose body of standard operators any runtime has
(`graphq.functions`). Its codes are signed integers of 4 or 8 bits, or floats with the same values for TensorRT. Main graph only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import functions, ir
from graphq.errors import TargetError
from graphq.executor import BATCH, Executor, Fetch
from graphq.log_quantizers import OCTAVE, LogParams, LogUniform
from graphq.noise import decibel
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.targets import Target

FINE = 5
"""Bits from which `sulq` has a level for 1, the most that a softmax can return: finer levels gain less than clipping unseen data costs."""

OPERATORS = {"sulq": "SULQ", "log2": "QuantizeLog2", "log-sqrt2": "QuantizeLogSqrt2"}

_PASSING = frozenset({"Identity", "Dropout", "Cast", "Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten"})
"""Operators that exporters put between a softmax and the MatMul that reads it."""

# Where the Clip stands matters: ONNX Runtime 1.31 fails to load a model with a Clip right before a QuantizeLinear to int4.
_LOGARITHM = """
  shifted = Add (x, shift)
  log = Log (shifted)
  inside = Clip (log, low, high)
  offset = Sub (inside, center)"""
_INTEGER_CODES = """
  codes = QuantizeLinear (offset, scale, zero)
  steps = DequantizeLinear (codes, scale, zero)"""
_FLOAT_CODES = """
  ratio = Div (offset, scale)
  codes = Round (ratio)
  steps = Mul (codes, scale)"""
_LEVEL = """
  level = Add (steps, center)
  power = Exp (level)
  y = Sub (power, shift)"""
_LEVELS = {
    "SULQ": _LEVEL,
    "QuantizeLog2": _LEVEL,
    "SULQRounded": f"""
  level = Add (steps, center)
  octave = Constant <value = float {{{OCTAVE!s}}}> ()
  exponent = Div (level, octave)
  whole = Round (exponent)
  rounded = Mul (whole, octave)
  power = Exp (rounded)
  y = Sub (power, shift)""",
    "QuantizeLogSqrt2": """
  level = Add (steps, center)
  power = Exp (level)
  unshifted = Sub (power, shift)
  above = Greater (level, floor)
  kept = CastLike (above, power)
  y = Mul (unshifted, kept)""",
}


def body(name: str, inputs: Sequence[str]) -> str:
    """What `LogUniform` computes, operator by operator, as a function for `graphq.functions`.

    Inputs are `x`, the `LogParams`, the logarithms `low` and `high` of the outermost levels, `floor` below which lies the lowest
    alone, and `zero`, 0 of the type of the codes. Without that the codes are floats.
    """
    codes = _INTEGER_CODES if "zero" in inputs else _FLOAT_CODES
    return f"{name} ({', '.join(inputs)}) => (y) {{{_LOGARITHM}{codes}{_LEVELS[name]}\n}}"


@pass_options
class SulqSoftmax(Pass):
    """Quantizes the output of every softmax that feeds a MatMul (I&S-ViT, arXiv 2311.10126).

    Attributes:
        bits: Width of a code.
        quantizer: How levels are spaced: `sulq`, fitted to the data; `log2` and `log-sqrt2`, by fixed ratios.
        round_exponent: Let the levels of `sulq` be powers of two (less its shift), for hardware that can only shift bits.
        samples: Calibration samples that it is fitted to.
    """

    name: ClassVar[str] = "sulq-softmax"
    needs_data: ClassVar[bool] = True

    bits: Annotated[int, Field(ge=2, le=8)] = 4
    quantizer: Literal["sulq", "log2", "log-sqrt2"] = "sulq"
    round_exponent: bool = False
    samples: Annotated[int, Field(ge=1)] = 32

    def __post_init__(self) -> None:
        if self.round_exponent and self.quantizer != "sulq":
            raise ValueError("round_exponent goes with quantizer: sulq; the exponents of the others are what their names say")

    def precheck(self, model: ir.Model, target: Target) -> None:
        if not self.allow_no_effect and not any(node.op_type == "Softmax" and _readers(node) for node in model.graph if not node.domain):
            raise TargetError(
                "No softmax feeds a MatMul.", where=f"pass {self.name}", expected="a transformer",
                hint="take the recipe int8 for other models",
            )  # fmt: skip

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        found = {node: _readers(node) for node in _softmaxes(model, ctx)}
        if not found:
            return
        weights = self._weights(model, list(found), ctx)
        quantizer = LogUniform(self.bits, self.round_exponent, self.quantizer == "log-sqrt2")
        for node, readers in found.items():
            x = weights[node]
            if not np.isfinite(x).all():
                ctx.skip(node, "its output holds NaN on calibration data")
                continue
            params = self._fit(quantizer, x)
            result = self._insert(ctx, node.outputs[0], quantizer, params)
            for reader, index in readers:
                ctx.edit.rewire(reader, index, result)
            sqnr = decibel(float(np.mean(x.astype(np.float64) ** 2)), quantizer.error(x, params))
            ctx.measure(node.name or "", sqnr_db=sqnr, shift=float(params.shift))

    def _weights(self, model: ir.Model, nodes: list[ir.Node], ctx: PassContext) -> dict[ir.Node, np.ndarray]:
        """A sample of each softmax's output, float32 of shape (n,); its largest value is in it."""
        names = [node.outputs[0].name or "" for node in nodes]
        executor = Executor(model, [Fetch(name, view) for name in names for view in ("sample", "extrema")])
        parts: dict[ir.Node, list[np.ndarray]] = {node: [] for node in nodes}
        for batch in ctx.calib.take(self.samples).batches(BATCH):
            arrays = iter(executor.run(batch))
            for node, sample, extrema in zip(nodes, arrays, arrays, strict=True):
                parts[node] += [sample.reshape(-1), extrema[1:]]
        return {node: np.concatenate(arrays) for node, arrays in parts.items()}

    def _fit(self, quantizer: LogUniform, x: np.ndarray) -> LogParams:
        if self.quantizer == "sulq":
            return quantizer.fit(x, 1.0 if self.bits >= FINE else None)
        return quantizer.fit_octaves(float(x.max()), 1 if self.quantizer == "log2" else 2)

    def _insert(self, ctx: PassContext, softmax: ir.Value, quantizer: LogUniform, params: LogParams) -> ir.Value:
        spec = quantizer.spec
        numbers = {
            "shift": params.shift,
            "center": params.center,
            "scale": params.scale,
            "low": params.center + spec.qmin * params.scale,
            "high": params.center + spec.qmax * params.scale,
        }
        if quantizer.lowest_is_zero:
            numbers["floor"] = numbers["low"] + params.scale / 2
        operands = {key: ctx.edit.initializer(f"{softmax.name}_{key}", np.asarray(number)) for key, number in numbers.items()}
        if not ctx.target.builds_engines:  # TensorRT names the QuantizeLinear of a function once, and refuses the second call
            operands["zero"] = ctx.edit.initializer(f"{softmax.name}_zero", np.zeros((), np.int8), quantizer.storage)
        text = body("SULQRounded" if quantizer.whole_exponents else OPERATORS[self.quantizer], ["x", *operands])
        return functions.call(
            ctx.edit, text, softmax.producer(), [softmax, *operands.values()], output=f"{softmax.name}_quantized", like=softmax
        )


def _softmaxes(model: ir.Model, ctx: PassContext) -> Iterator[ir.Node]:
    """The nodes to quantize; others are skipped with the reason."""
    for node in model.graph.all_nodes():
        if node.domain or node.op_type != "Softmax":
            continue
        reason = _refusal(node, model)
        if reason is None:
            yield node
        else:
            ctx.skip(node, reason)


def _refusal(node: ir.Node, model: ir.Model) -> str | None:
    if node.graph is not model.graph:
        return "it lies in a subgraph"
    if not ir.is_float(node.outputs[0]):
        return f"its output is {node.outputs[0].dtype}, not float32"
    readers = [use.node for use in ir.uses(node.outputs[0])]
    if any(reader.op_type == "QuantizeLinear" or reader.domain == ir.DOMAIN for reader in readers):
        return "its output is quantized already"
    return None if _readers(node) else "no MatMul reads its output"


def _readers(node: ir.Node) -> list[tuple[ir.Node, int]]:
    """Who reads the output of `node` and is a MatMul, or hands it on to one."""
    return [(use.node, use.idx) for use in ir.uses(node.outputs[0]) if _leads_to_matmul(use.node, use.idx)]


def _leads_to_matmul(node: ir.Node, index: int) -> bool:
    if node.domain:
        return False
    if node.op_type == "MatMul":
        return True
    return node.op_type in _PASSING and index == 0 and any(_leads_to_matmul(use.node, use.idx) for use in ir.uses(node.outputs[0]))
