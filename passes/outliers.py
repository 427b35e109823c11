"""outliers: weights with few bits but for the few that lie far out, which are kept and no longer decide the scale. No data needed.

What is kept is stored with 3 bytes a weight (a step from the one before, and a float16 of what the code lacks there), and put in by a
function of standard operators that ONNX Runtime evaluates once, at load. It multiplies floats then: the file is small, memory and
time are those of the float model.

Its codes have no zero points. Where exceptions gain too little over a plain format that has them (most often in small groups), the
layer is left to `quantize-weights` or `round` behind this pass. A smaller error of weights is no promise for the model's: a Llama of
width 64, 4 bits in groups of 32, has a perplexity of 6.160 with the layers that gain 1 dB, 6.145 when all are rounded to nearest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import codebooks, functions, ir, linear
from graphq.codebooks import Codebook, Coded
from graphq.exclude import nothing_to_quantize, require_matches
from graphq.noise import decibel
from graphq.passes import _layer_rows, _weight_formats
from graphq.passes import _outliers_math as math
from graphq.passes._layer_rows import Layer
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.quantizers import Uniform
from graphq.spec import QuantSpec
from graphq.targets import Target

PATCH = """PatchedWeight (weight, steps, missing, unit) => (patched) {
  flat_shape = Constant<value = int64[1] {-1}> ()
  flat = Reshape (weight, flat_shape)
  axis = Constant<value = int64 {0}> ()
  wide = Cast<to = 7> (steps)
  places = CumSum (wide, axis)
  shares = Cast<to = 1> (missing)
  values = Mul (shares, unit)
  nothing = Sub (flat, flat)
  sparse = ScatterElements<axis = 0> (nothing, places, values)
  sum = Add (flat, sparse)
  shape = Shape (weight)
  patched = Reshape (sum, shape)
}"""
"""weight: any shape; steps: uint8 [n], whose running sum are places in the flattened weight; missing: float16 [n], in units of
`unit` (float32), added there."""


@pass_options
class Outliers(Pass):
    """Stores weights as integers of least squared error, and those far out nearly exactly (EasyQuant, arXiv 2403.02775).

    Attributes:
        bits: Width of a weight, unless its layer asks for another.
        group_size: One scale for so many consecutive weights along the reduction axis; 0 means one an output channel, as convolutions
            get, and weights that are not a multiple of it.
        sigmas: Weights farther from 0 than so many deviations of their output channel are kept.
        most: Share of a layer's weights that may be kept; each costs 24 bits.
        min_gain_db: What the error of a weight must gain over the best format for rounding to nearest that the target has.
        exclude: Patterns of node names (or operator types) that stay float.
    """

    name: ClassVar[str] = "outliers"

    bits: Literal[2, 3, 4] = 4
    group_size: Annotated[int, Field(ge=0, le=1024)] = 0
    sigmas: Annotated[float, Field(gt=0)] = 3.0
    most: Annotated[float, Field(ge=0, le=0.1)] = 0.01
    min_gain_db: Annotated[float, Field(ge=0)] = 1.0
    exclude: tuple[str, ...] = ()

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        reasons = [self._format(model, node, target) for node in _layer_rows.candidates(model)]
        if not self.allow_no_effect and all(isinstance(reason, str) for reason in reasons):
            raise nothing_to_quantize(map(str, reasons), "at least one layer with a constant float32 weight")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        found = [self._format(model, node, ctx.target) for node in _layer_rows.candidates(model)]
        ctx.edit.raise_opset(max((spec.opset for spec in found if isinstance(spec, QuantSpec)), default=0))  # may replace nodes
        for node in _layer_rows.candidates(model):
            spec = self._format(model, node, ctx.target)
            if isinstance(spec, str):
                ctx.skip(node, spec)
            else:
                self._store(ctx, node, spec)
        ctx.edit.prune()

    def _format(self, model: ir.Model, node: ir.Node, target: Target) -> QuantSpec | str:
        """What the weight of `node` becomes, or why it stays float."""
        if reason := _layer_rows.refusal(model, node, self.exclude):
            return reason
        spec = _weight_formats.storable(self.name, node, self.bits, target)
        return spec if isinstance(spec, str) else _weight_formats.in_groups(node, spec, self.group_size, whole=True)

    def _store(self, ctx: PassContext, node: ir.Node, spec: QuantSpec) -> None:
        layer, index = Layer(node), linear.LINEAR_OPS[node.op_type].weight
        weight = layer.weight()
        rows = weight.reshape(-1, weight.shape[2])
        how = _weight_formats.of_rows(spec)
        found = math.split(rows, how, self.sigmas, self.most)
        gain = decibel(_noise_of_nearest(rows, how, ctx.target), found.noise)
        if gain < self.min_gain_db:
            return ctx.skip(node, f"keeping outliers gains {gain:.2f} dB over rounding to nearest, of {self.min_gain_db:g} asked")
        book = Codebook(np.arange(spec.qmin, spec.qmax + 1, dtype=np.float32)[:, None])
        coded = Coded(book, found.codes.astype(np.int64) - spec.qmin, found.qparams.scale.reshape(len(rows), -1))
        steps, values = math.steps(layer.stored(found.missing.reshape(weight.shape)))
        coarse = codebooks.insert(ctx.edit, node, coded)
        if len(steps):
            arrays = {"steps": steps, "missing": values, "unit": np.asarray(found.unit)}
            operands = [coarse, *(ctx.edit.initializer(f"{coarse.name}_{key}", array) for key, array in arrays.items())]
            patched = functions.call(ctx.edit, PATCH, node, operands, output=f"{coarse.name}_patched", like=coarse, after=False)
            ctx.edit.rewire(node, index, patched)
        kept = np.count_nonzero(found.missing)
        ctx.measure(node.name or "", weight_sqnr_db=decibel(found.power, found.noise), bits=spec.bits, kept=kept / weight.size)


def _noise_of_nearest(rows: np.ndarray, spec: QuantSpec, target: Target) -> float:
    """What `rows` lose by rounding to nearest in the best plain format of the target: min-max, with zero points if it takes them."""
    plain = Uniform(replace(spec, signed=target.symmetric_only, symmetric=target.symmetric_only))
    return float(np.sum(np.square(plain.fake_quantize(rows, plain.fit_weight(rows)) - rows), dtype=np.float64))
