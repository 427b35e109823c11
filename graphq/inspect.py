"""What is in a model, how two models differ, what a pass can be told: the answers of the commands that change nothing."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from inspect import cleandoc
from pathlib import Path
from typing import Any

from graphq import half, ir, linear, stored, tables, verify
from graphq.calibration import CalibrationSet
from graphq.data import open_data
from graphq.errors import GraphqError, ModelError, RecipeError
from graphq.executor import Executor, Fetch
from graphq.ops import OPERATORS
from graphq.pipeline import Pass, PassContext
from graphq.qdq import has_small_floats
from graphq.report import FileFacts, OutputComparison, file_facts
from graphq.targets import TARGETS, Target, get_target, violations

_QUANTIZING = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear")
_QUANTIZED = (*_QUANTIZING, *(f"{ir.DOMAIN}.{name}" for name in OPERATORS))


@dataclass(frozen=True)
class Interface:
    """One input or output of the model; a dimension is an int, a symbol, or None if unknown, `shape` None without a rank."""

    name: str
    dtype: str
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class LinearNode:
    """One operator with weights, or a lookup in a table; `refusal` is None if it can be quantized, `storage` the type of its codes if it
    already is."""

    name: str
    op_type: str
    weight_shape: tuple[int, ...] | None
    refusal: str | None
    storage: str | None


@dataclass(frozen=True)
class Fit:
    """Whether a recipe or target suits the model; `reason` says why not."""

    name: str
    reason: str | None


@dataclass(frozen=True)
class Inspection:
    """Attributes:
    file: Size, hash, opset and number of parameters.
    domains: Versions of the other operator sets.
    ops: Nodes by operator type (with its domain, if it is not the default one), most frequent first.
    weight_bytes: Bytes of constants by element type.
    linear: The operators with weights, and lookups in embedding tables, as passes see them: in the normalized model.
    dynamic_axes: Dimensions that are not fixed, as `input.0 (batch)`.
    already_quantized: Whether there are QuantizeLinear, DequantizeLinear or operators on codes, or weights that are stored as codes.
    targets: For each known target, whether the model as it is runs there.
    recipes: For each built-in recipe, whether it can be applied for the target that was asked about.
    """

    file: FileFacts
    ir_version: int
    producer: str
    domains: Mapping[str, int]
    inputs: tuple[Interface, ...]
    outputs: tuple[Interface, ...]
    ops: Mapping[str, int]
    weight_bytes: Mapping[str, int]
    linear: tuple[LinearNode, ...]
    dynamic_axes: tuple[str, ...]
    already_quantized: bool
    targets: tuple[Fit, ...]
    recipes: tuple[Fit, ...]

    @property
    def quantizable_share(self) -> float:
        """Share of the parameters that lie in nodes which can be quantized, 0 to 1."""
        inside = sum(math.prod(node.weight_shape) for node in self.linear if node.refusal is None and node.weight_shape)
        return inside / self.file.parameters if self.file.parameters else 0.0


def inspect(path: str | Path, target: str = "onnxruntime") -> Inspection:
    """Look at the model file `path`; `target` is the one that recipes are tried for."""
    chosen = get_target(target)
    model = ir.load(path)
    ops = dict(Counter(_op_name(node) for node in ir.all_nodes(model)).most_common())
    normal = normalized(model, chosen)
    nodes = tuple(_linear_nodes(normal))
    quantized = any(op in _QUANTIZED or op.endswith(("Integer", "NBits")) or ".Q" in op or op.startswith("QLinear") for op in ops)
    return Inspection(
        file=file_facts(path, model),
        ir_version=model.ir_version,
        producer=" ".join(part for part in (model.producer_name, model.producer_version) if part),
        domains={name: version for name, version in model.opset_imports.items() if name not in ("", "ai.onnx")},
        inputs=tuple(_interface(value) for value in model.graph.inputs if value.name not in model.graph.initializers),
        outputs=tuple(_interface(value) for value in model.graph.outputs),
        ops=ops,
        weight_bytes=_weight_bytes(model),
        linear=nodes,
        dynamic_axes=tuple(_dynamic_axes(model)),
        already_quantized=quantized or any(node.storage for node in nodes),
        targets=tuple(_target_fit(model, entry) for entry in TARGETS.values()),
        recipes=tuple(_recipe_fits(normal, chosen, nodes)),
    )


def normalized(model: ir.Model, target: Target) -> ir.Model:
    """A clone as the passes after `normalize` see it; the model itself if it cannot be normalized for `target`."""
    from graphq.recipe import pass_class

    nothing = CalibrationSet((), "iterable", "", (), 0, 0)
    current = ir.clone(model)
    try:
        pass_class("normalize")().apply(current, PassContext(current, model, nothing, nothing, target))
    except GraphqError:
        return model
    return current


def _op_name(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain not in ("", "ai.onnx") else node.op_type


def _interface(value: ir.Value) -> Interface:
    return Interface(value.name or "", _type_name(value.dtype), ir.shape_of(value))


def _type_name(dtype: ir.DataType | None) -> str:
    """As numpy calls it; ONNX's own name where numpy has none."""
    if dtype is None:
        return "?"
    return "string" if dtype == ir.DataType.STRING else str(dtype.numpy())


def _weight_bytes(model: ir.Model) -> dict[str, int]:
    found: Counter[str] = Counter()
    for graph in model.graphs():
        for value in graph.initializers.values():
            if value.const_value is not None:
                found[_type_name(value.const_value.dtype)] += value.const_value.nbytes
    return dict(found.most_common())


def _linear_nodes(model: ir.Model) -> Iterator[LinearNode]:
    for node in ir.all_nodes(model):
        if node.domain == "" and node.op_type in linear.NEVER_QUANTIZED:
            yield LinearNode(node.name or "", node.op_type, None, "not quantized by any pass", None)
        if tables.is_lookup(node) or tables.codes_of(node) is not None:
            yield _lookup(node)
        if node.domain != "" or node.op_type not in linear.LINEAR_OPS:
            continue
        weight = linear.weight_of(node)
        shape = stored.shape(model, weight) if weight is not None and stored.is_fixed(weight) else None
        storage = stored.storage(weight) if weight is not None and stored.is_stored(weight) else None
        refusal = f"already quantized ({storage})" if storage else linear.linear_refusal(node)
        yield LinearNode(node.name or "", node.op_type, shape, refusal, storage)


def _lookup(node: ir.Node) -> LinearNode:
    codes = tables.codes_of(node)
    storage = None if codes is None else _type_name(codes.dtype)
    refusal = tables.refusal(node) if storage is None else f"already quantized ({storage})"
    return LinearNode(node.name or "", node.op_type, ir.constant_shape(codes or node.inputs[0]), refusal, storage)  # type: ignore[arg-type]


def _dynamic_axes(model: ir.Model) -> Iterator[str]:
    for value in model.graph.inputs:
        shape = ir.shape_of(value)
        if value.name in model.graph.initializers:
            continue
        if shape is None:
            yield f"{value.name} (rank unknown)"
        for axis, dim in enumerate(shape or ()):
            if not isinstance(dim, int):
                yield f"{value.name}.{axis} ({dim or 'unnamed'})"


def _target_fit(model: ir.Model, target: Target) -> Fit:
    found = list(violations(model, target))
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    return Fit(target.name, f"{found[0][0]}: {found[0][1]}{more}" if found else None)


def _recipe_fits(model: ir.Model, target: Target, nodes: tuple[LinearNode, ...]) -> Iterator[Fit]:
    """Ask every pass of every built-in recipe whether it would refuse; nothing is calibrated or run."""
    from graphq.recipe import builtin_recipes, load_recipe

    nodes = tuple(node for node in nodes if node.op_type != "Gather")  # a recipe that only stores a table is not asked for
    for name in builtin_recipes():
        passes = load_recipe(name).passes
        fits = any(node.refusal is None for node in nodes) or not any(one.needs_weights for one in passes)
        reason = None if fits else _no_node(nodes)
        if reason is None:
            try:
                for one in passes:
                    one.precheck(model, target)
            except GraphqError as error:
                reason = error.what
        yield Fit(name, reason)


def _no_node(nodes: tuple[LinearNode, ...]) -> str:
    reasons = Counter(node.refusal for node in nodes)
    if not nodes:
        return "no Conv, ConvTranspose, Gemm or MatMul"
    return "no node to quantize: " + "; ".join(f"{reason} ({count})" for reason, count in reasons.most_common(2))


# ---- two models -----------------------------------------------------------------------------------------------------


def compare_files(a: str | Path, b: str | Path, data: str | Path | None = None, *, preprocess: str | Path | None = None, samples: int = 64,
                  layers: bool = False, seed: int = 0) -> tuple[tuple[OutputComparison, ...], str]:  # fmt: skip
    """How far `b` is from `a` on the same inputs (random ones without `data`), and a line about these inputs.

    Outputs are those of the models as ONNX Runtime deploys them, or of half precision itself (see `graphq.half`). With `layers` it
    is every float value that both models have under one name, computed by the plain semantics of the operators, worst first.
    """
    first, second = ir.load(a), ir.load(b)
    names = _shared_values(first, second) if layers else _shared_outputs(first, second, f"{a} and {b}")
    calibration = open_data(data, second, preprocess, seed).take(samples)  # the second may remember its preprocessing
    fetches = [Fetch(name) for name in names]
    defined = any(layers or half.has_half(model) or has_small_floats(model) for model in (first, second))
    reference, result = (Executor(model, fetches, deployed=not defined) for model in (first, second))
    found = verify.compare(reference, result, calibration, names)
    if layers:
        found = tuple(replace(one, top1_agreement=None) for one in sorted(found, key=lambda one: one.sqnr_db))
    return found, calibration.description


def _shared_outputs(a: ir.Model, b: ir.Model, where: str) -> list[str]:
    outputs = [[value.name or "" for value in model.graph.outputs] for model in (a, b)]
    inputs = [[entry.name for entry in ir.inputs(model)] for model in (a, b)]
    for what, (ours, theirs) in (("inputs", inputs), ("outputs", outputs)):
        if set(ours) != set(theirs):
            raise ModelError(f"The models have different {what}: {', '.join(ours)} and {', '.join(theirs)}.", where=where,
                             expected="the same names", hint="compare a model with one that was made from it")  # fmt: skip
    return outputs[0]


def _shared_values(a: ir.Model, b: ir.Model) -> list[str]:
    """Float activations that both make; codes of a value that `b` only moves may have its name."""
    ours, theirs = (
        {out.name: out.dtype for node in model.graph if node.op_type not in ("Constant", *_QUANTIZING) for out in node.outputs}
        for model in (a, b)
    )
    floats = {ir.DataType.FLOAT, *half.CODES}
    return [name for name, kind in ours.items() if name and {kind, theirs.get(name)} <= floats]


# ---- passes ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One option of a pass, for people."""

    name: str
    type: str
    default: str
    about: str


def pass_summaries() -> dict[str, str]:
    """Every installed pass with the first sentence about it; for one that cannot be imported, why not."""
    from graphq.recipe import catalog, pass_class

    found = {}
    for name in catalog():
        try:
            found[name] = _documented(pass_class(name))[0].split("\n")[0]
        except RecipeError as error:
            found[name] = error.what
    return found


def pass_options(name: str) -> tuple[str, list[Option]]:
    """What a pass does, and its options."""
    from pydantic import TypeAdapter

    from graphq.recipe import pass_class

    cls = pass_class(name)
    about, texts = _documented(cls)
    schema = TypeAdapter(cls).json_schema()
    texts = _documented(Pass)[1] | texts
    rows = [
        Option(key, _schema_text(entry), json.dumps(entry["default"]) if "default" in entry else "required", texts.get(key, ""))
        for key, entry in schema["properties"].items()
    ]
    return about, sorted(rows, key=lambda row: row.name == "allow_no_effect")


def _documented(cls: type) -> tuple[str, dict[str, str]]:
    """The text of a class's docstring, and of its attributes."""
    head, _, tail = cleandoc(cls.__doc__ or "").partition("Attributes:\n")
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", tail, re.MULTILINE)
    return head.strip(), {name: " ".join(text.split()) for name, text in entries}


def _schema_text(entry: Mapping[str, Any]) -> str:
    """One property of a JSON schema in words."""
    if "anyOf" in entry:
        return " or ".join(_schema_text(one) for one in entry["anyOf"])
    if "enum" in entry or "const" in entry:
        return " | ".join(str(value) for value in entry.get("enum", [entry.get("const")]))
    if entry.get("type") == "array":
        return f"list of {_schema_text(entry.get('items', {}))}"
    limits = (("minimum", ">="), ("exclusiveMinimum", ">"), ("maximum", "<="), ("exclusiveMaximum", "<"))
    bounds = " and ".join(f"{sign} {entry[key]}" for key, sign in limits if key in entry)
    return f"{entry.get('type', 'value')} {bounds}".rstrip()
