"""TensorRT engines as data: how one is to be built, and what its builder made of the model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass as options

from graphq.errors import UsageError
from graphq.names import unknown_name

ENGINE_SUFFIXES = (".engine", ".plan", ".trt")
"""Of files that hold engines."""

AxisRange = tuple[int, int, int]
"""Fewest, best and most of one axis."""


@options(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
class EngineOptions:
    """How an engine is built. What a package does not have is refused by `graphq.backends.tensorrt`.

    Attributes:
        shapes: Range of each axis by input name, for inputs with open axes; the others get ranges from the data.
        sparse: Let the builder pick kernels for weights with two zeros in each four (2:4) along the axis that is summed over.
        strip: Leave the weights out of the engine; they are put in where it is loaded (a refit from the ONNX file).
        weight_streaming: Let the engine run with part of its weights in the memory of the host.
        level: How long the builder searches, 0 to 5; its own default if None.
        compute_capability: GPUs to build for, such as `8.9`; the package's own default if empty.
        plugins: Compute the operators of the domain `graphq` by graphq's kernels, which the engine then holds.
        timing_cache: File of measured kernels, read if it is there and written afterwards.
    """

    shapes: Mapping[str, tuple[AxisRange, ...]] = Field(default_factory=dict)
    sparse: bool = False
    strip: bool = False
    weight_streaming: bool = False
    level: Annotated[int, Field(ge=0, le=5)] | None = None
    compute_capability: tuple[Annotated[str, Field(pattern=r"^\d+\.\d$")], ...] = ()
    plugins: bool = False
    timing_cache: Path | None = None


_SIZE = r"\d+(?::\d+:\d+)?"
_SHAPE = re.compile(rf"(?P<name>.+)=(?P<axes>{_SIZE}(?:x{_SIZE})*)")


def parse_options(texts: Sequence[str], shapes: Sequence[str]) -> EngineOptions | None:
    """Options as the command line takes them: `sparse`, `level=5`, `compute_capability=8.9,12.0`; shapes as `input=1:8:32x3x224x224`.

    Returns:
        None if there are none.

    Raises:
        UsageError: a name is not known, or a value does not fit.
    """
    if not texts and not shapes:
        return None
    values: dict[str, Any] = {"shapes": {}}
    for name, axes in map(_parse_shape, shapes):
        if name in values["shapes"]:
            raise UsageError("The shape of one input is given twice.", where=f"--shape {name}=...")
        values["shapes"][name] = axes
    known = [entry.name for entry in fields(EngineOptions) if entry.name != "shapes"]
    for text in texts:
        name, has_value, value = (part.strip() for part in text.partition("="))
        name = name.replace("-", "_")
        if name not in known:
            raise UsageError(**unknown_name("engine option", name, known))
        if name in values:
            raise UsageError("An engine option is given twice.", where=f"--engine {text}")
        if bool(has_value) == (name in _FLAGS) or (has_value and not value):
            raise UsageError(
                f"Engine option {name!r} {'takes no value' if name in _FLAGS else 'needs a value'}.", where=f"--engine {text}",
                expected=name if name in _FLAGS else f"{name}={_EXAMPLES[name]}",
            )  # fmt: skip
        values[name] = (value.split(",") if name == "compute_capability" else value) if has_value else True
    return options_of(values)


_FLAGS = frozenset({"sparse", "strip", "weight_streaming", "plugins"})
_EXAMPLES = {"level": "3", "compute_capability": "8.9,12.0", "timing_cache": "timings.cache"}


def options_of(values: Mapping[str, Any]) -> EngineOptions:
    """Options from a mapping of their names.

    Raises:
        UsageError: a name is not known, or a value does not fit.
    """
    try:
        return EngineOptions(**values)
    except ValidationError as error:
        first = error.errors()[0]
        where = f"{'.'.join(map(str, first['loc']))}={first['input']}"
        raise UsageError(f"An engine option does not fit: {first['msg']}.", where=where) from error


def _parse_shape(text: str) -> tuple[str, tuple[AxisRange, ...]]:
    found = _SHAPE.fullmatch(text.strip())
    if found is None:
        raise UsageError(
            f"{text!r} is no shape.", where="--shape", expected="NAME=SIZExSIZEx..., each SIZE a number or fewest:best:most",
            hint="such as input=1:8:32x3x224x224",
        )  # fmt: skip
    axes = [[int(size) for size in axis.split(":")] for axis in found["axes"].split("x")]
    return found["name"], tuple((axis[0], axis[len(axis) // 2], axis[-1]) for axis in axes)


_WIDE = frozenset({"float32", "float16", "bfloat16"})


@dataclass(frozen=True)
class NodePrecision:
    """One linear node of the model in the engine.

    Attributes:
        node: Its name in the model.
        asked: Types of its two operands in the model, such as `int8 x int8`.
        got: The same in the kernel that computes it; empty if the plan does not say.
        layer: The layer of the engine that holds it.
    """

    node: str
    asked: str
    got: str
    layer: str

    @property
    def is_lost(self) -> bool:
        """Whether fewer operands are quantized than were asked for. Codes of 4 bits that a kernel reads as 8 are not lost."""
        wide = [sum(kind not in _WIDE for kind in text.split(" x ")) for text in (self.asked, self.got)]
        return bool(self.got) and wide[1] < wide[0]


def shape_text(axes: Sequence[AxisRange]) -> str:
    """A range as the command line takes it: `1:8:32x3x224x224`."""
    return "x".join(str(best) if low == best == high else f"{low}:{best}:{high}" for low, best, high in axes)


@dataclass(frozen=True)
class EngineFacts:
    """What the builder says about its plan.

    Attributes:
        layers: Kernels that one inference launches; 0 if the plan could not be read.
        nodes: What became of each linear node.
        unfused: Q/DQ nodes of linear nodes that did not get the type they asked for: they cost time and save none.
        sparse_kernels: Layers with a kernel for 2:4 sparsity; None if kernels are only picked where the engine is loaded.
        options: How it was built.
        shapes: Range of each axis of the inputs with open axes, as they were built in.
        capped: Axes other than the batch that are no larger than in the data, as `input axis 1 (past)`.
        sqnr_db: By output, how close the engine comes to the model that it was built from; empty if it was not run.
        not_run: Why it was not.
    """

    layers: int
    nodes: tuple[NodePrecision, ...]
    unfused: tuple[str, ...]
    sparse_kernels: int | None
    options: EngineOptions = EngineOptions()
    shapes: Mapping[str, tuple[AxisRange, ...]] = field(default_factory=dict)
    capped: tuple[str, ...] = ()
    sqnr_db: Mapping[str, float] = field(default_factory=dict)
    not_run: str = ""

    @property
    def counts(self) -> Mapping[str, int]:
        """Nodes by what they got, most first: `int8 x int8`, or `int8 x int8 -> float32 x float32` if that is not what was asked."""
        texts = [node.asked if node.asked == node.got else f"{node.asked} -> {node.got or 'unknown'}" for node in self.nodes]
        return dict(Counter(texts).most_common())
