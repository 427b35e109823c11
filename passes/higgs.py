"""higgs: weights as codes of a grid that is the best for normally distributed numbers, which a Hadamard matrix makes of them first.

Each group of inputs of a weight is multiplied by a Hadamard matrix with random signs and divided by its size; then one table serves all
weights, whatever their outliers. Decoding multiplies back: with the weight, once, when a session loads, or with the activation, at run
time, for runtimes that keep codes in memory. No data is needed; with some, errors are made up for as in GPTQ.

Without data it is no better than rounding to nearest where weights have no outliers: on a Llama of width 64, 3 bits in groups of 64, the
perplexity is 6.88 against 6.82; with `rounding: greedy` it is 6.52 (GPTQ: 6.58, float: 5.97).
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from graphq import codebooks, ir, linear
from graphq.editor import Editor
from graphq.exclude import nothing_to_quantize, require_matches
from graphq.noise import decibel
from graphq.passes import _bias, _block_transform, _layer_rows, _round_math, _weight_formats
from graphq.passes import _block_transform_math as math
from graphq.passes import _higgs_math as higgs
from graphq.passes._layer_rows import Layer
from graphq.passes._sums import Sums
from graphq.pipeline import Pass, PassContext, pass_options
from graphq.spec import QuantSpec
from graphq.targets import Target

LEAST = 16
"""Inputs of a group, at least: fewer are not mixed well, and pay for many scales."""

OPSET = 21


@pass_options
class Higgs(Pass):
    """Stores weights as codes of a Gaussian grid, behind a randomized Hadamard transform (HIGGS, arXiv 2411.17525).

    Attributes:
        bits: Bits of a weight, unless its layer asks for others. Codes of 3 bits are stored in 4: ONNX has no narrower type for them.
        group_size: Inputs that are mixed and share a scale, at most: the largest order of a Hadamard matrix that divides those of a layer.
        numbers: Weights that one code stands for: pairs have a smaller error by 0.4 to 0.8 dB, in codes of twice the bits.
        rounding: Whether each weight goes to the nearest point, without data, or errors are made up for by other weights as in GPTQ, and
            codes and scales then improved in turn.
        where: Whether decoding takes the transform out of the weights again, or what layers read is transformed at run time.
        seed: Of the signs.
        samples: Calibration samples to use, 0 for all.
        exclude: Patterns of node names (or operator types) that stay float.
    """

    name: ClassVar[str] = "higgs"

    bits: Annotated[int, Field(ge=2, le=4)] = 3
    group_size: Annotated[int, Field(ge=LEAST, le=1024)] = 64
    numbers: Literal[1, 2] = 1
    rounding: Literal["nearest", "greedy"] = "nearest"
    where: Literal["weights", "activations"] = "weights"
    seed: Annotated[int, Field(ge=0)] = 0
    samples: Annotated[int, Field(ge=0)] = 0
    exclude: tuple[str, ...] = ()

    @property
    def needs_data(self) -> bool:  # type: ignore[override]
        """Whether it reads calibration data."""
        return self.rounding == "greedy"

    def precheck(self, model: ir.Model, target: Target) -> None:
        require_matches(model, self.exclude)
        formats = [self._format(model, node, target) for node in _layer_rows.candidates(model)]
        if not self.allow_no_effect and all(isinstance(reason, str) for reason in formats):
            raise nothing_to_quantize(map(str, formats), "at least one MatMul, Gemm or Conv with a constant float32 weight")

    def apply(self, model: ir.Model, ctx: PassContext) -> None:
        formats = [self._format(model, node, ctx.target) for node in _layer_rows.candidates(model)]
        opsets = [QuantSpec(spec.bits * self.numbers).opset for spec in formats if isinstance(spec, QuantSpec)]
        if opsets:
            ctx.edit.raise_opset(max(OPSET, *opsets))  # may replace nodes
        layers, bits = dict[ir.Node, math.Transform](), dict[ir.Node, int]()
        for node in _layer_rows.candidates(model):
            spec = self._format(model, node, ctx.target)
            if isinstance(spec, str):
                ctx.skip(node, spec)
            else:
                layers[node], bits[node] = self._transform(node), spec.bits
        moved = self._move(model, layers, ctx) if self.where == "activations" else set()
        if self.rounding == "greedy":
            for step in ctx.sweep(list(layers), self.samples or None):
                sums = sum(_layer_rows.collect(step, ctx.seed), start=_nothing(step.node))
                self._store(step.node, layers[step.node], bits[step.node], sums, ctx, is_moved=step.node in moved)
        else:
            for node, transform in layers.items():
                self._store(node, transform, bits[node], None, ctx, is_moved=node in moved)
        ctx.edit.prune()

    def _format(self, model: ir.Model, node: ir.Node, target: Target) -> QuantSpec | str:
        """What says how many bits a weight of `node` gets, or why it stays float."""
        if reason := _layer_rows.refusal(model, node, self.exclude):
            return reason
        if node.op_type == "Conv" and ir.attribute(node, "group", 1) != 1:
            return "it is a convolution of several groups"
        if self._group(node) is None:
            return f"its {_inputs(node)} inputs cannot be divided into groups of {LEAST} to {self.group_size}"
        return _weight_formats.storable(self.name, node, self.bits, target, numbers=self.numbers)

    def _group(self, node: ir.Node) -> int | None:
        return math.best_block(_inputs(node), self.group_size, LEAST, self.numbers)

    def _transform(self, node: ir.Node) -> math.Transform:
        group = self._group(node)
        assert group is not None, "see _refusal"
        return math.block_hadamard(_inputs(node), group, self.seed)

    def _move(self, model: ir.Model, layers: dict[ir.Node, math.Transform], ctx: PassContext) -> set[ir.Node]:
        """Let layers read transformed activations where they can; those that do."""
        done = set[ir.Node]()
        for value, readers in _block_transform.edges(model).items():
            nodes = [node for node in readers if node in layers]
            if nodes:
                _block_transform.apply(ctx.edit, value, nodes, layers[nodes[0]], self.exclude)
                done.update(nodes)
        return done

    def _store(self, node: ir.Node, transform: math.Transform, bits: int, sums: Sums | None, ctx: PassContext, *,
               is_moved: bool) -> None:  # fmt: skip
        """Put codes in the place of the weight; what that does to the mean of the output goes into the bias, where there is one."""
        layer, book = Layer(node), higgs.grid(bits, self.numbers)
        weight = layer.weight()
        rows = weight[0].astype(np.float64) if is_moved else transform.undo(weight[0].T.astype(np.float64)).T
        if sums is None:
            coded = higgs.nearest(rows, book, transform.block)
            power, noise = float(np.sum(rows**2)), float(np.sum((coded.decode() - rows) ** 2))
            ctx.measure(node.name or "", weight_sqnr_db=decibel(power, noise), bits=bits)
        else:
            takes_mean = _bias.can_shift(node)
            gram = sums.centred_gram[0] if takes_mean else sums.gram[0]
            gram = _round_math.damped((gram if is_moved else transform.gram(gram))[None], sums.count)[0]
            coded = higgs.descend(rows, higgs.feedback(rows, book, transform.block, gram), gram)
            delta = coded.decode() - rows
            sums = sums.moved((delta if is_moved else transform.inverse().undo(delta.T).T)[None])
            if takes_mean:
                _bias.shift(ctx.edit, node, sums.mean_lack.reshape(-1))
                sums = sums.moved(np.zeros(weight.shape), sums.mean_lack)
            ctx.measure(node.name or "", sqnr_db=decibel(sums.power, sums.square), bits=bits)
        value = codebooks.insert(ctx.edit, node, coded)
        if not is_moved:
            _decode(ctx.edit, node, value, transform)


def _inputs(node: ir.Node) -> int:
    """What a layer of one group sums over."""
    shape = ir.constant_shape(linear.weight_of(node))
    return int(np.prod(shape)) // shape[linear.out_axis(node)]


def _nothing(node: ir.Node) -> Sums:
    groups, outputs, inputs = Layer(node).weight().shape
    return Sums.none(groups, outputs, inputs)


def _decode(edit: Editor, node: ir.Node, value: ir.Value, transform: math.Transform) -> None:
    """Let `node` read T W where it reads `value`, which is W of shape [K, O], [O, K] or that of a kernel."""
    shape, block, matrix = [int(size) for size in ir.shape_of(value) or ()], transform.block, transform.right[0]  # type: ignore[arg-type]
    is_turned = node.op_type != "Conv" and linear.in_axis(node) == 0
    groups = [transform.count, block, shape[1]] if is_turned else [shape[0], transform.count, block]
    parts = _reshaped(edit, node, value, groups, "groups")
    array = (matrix if is_turned else matrix.T).astype(np.float32)
    constant = edit.shared((array.shape, array.tobytes()), "hadamard", lambda: array, "float32")
    operands = [constant, parts] if is_turned else [parts, constant]
    mixed = edit.insert(node, "MatMul", operands, output=f"{value.name}_mixed", like=parts)
    edit.rewire(node, linear.LINEAR_OPS[node.op_type].weight, _reshaped(edit, node, mixed, shape, "weight", like=value))


def _reshaped(edit: Editor, node: ir.Node, value: ir.Value, shape: list[int], name: str, *, like: ir.Value | None = None) -> ir.Value:
    constant = edit.shared(("shape", *shape), "weight_shape", lambda: np.array(shape, np.int64), "int64")
    made = edit.insert(node, "Reshape", [value, constant], output=f"{value.name}_{name}", like=like)
    made.type, made.shape = value.type, ir.Shape(shape)
    return made
