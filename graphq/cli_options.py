"""Options of the command line that several commands share, how their values are read, and how results are printed as JSON."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from graphq.names import unknown_name

TARGET_NAMES = ("onnxruntime", "tensorrt", "tensorrt-rtx", "generic")
"""`graphq.targets.TARGETS`, known without importing it."""

EMIT_KINDS = ("onnx", "engine")


def one_of(kind: str, names: Sequence[str], about: str) -> Any:
    """An option that takes one of `names`, and says which one was meant."""

    def check(value: str) -> str:
        if value in names:
            return value
        wrong = unknown_name(kind, value, names)
        raise typer.BadParameter(f"{wrong['what']} Expected {wrong['expected']}{wrong['hint'] and '; ' + wrong['hint']}")

    return typer.Option(metavar="|".join(names), callback=check, autocompletion=lambda: list(names), help=about)


ARRAYS = "an .npz with one array per model input, an .npy, or a folder of images"
Model = Annotated[Path, typer.Argument(metavar="MODEL", help="An ONNX file.")]
Calib = Annotated[Path | None, typer.Option(help=f"Calibration inputs: {ARRAYS}; synth makes them from the model.")]
Preprocess = Annotated[str | None, typer.Option(help="How uint8 images become inputs: imagenet, inception, unit, none, or a YAML file.")]
Evaluate = Annotated[Path | None, typer.Option("--eval", help="An .npz with the inputs and `labels`: measure accuracy before and after.")]
TargetName = Annotated[str, one_of("target", TARGET_NAMES, "The runtime to write for.")]
EmitKind = Annotated[str, one_of("kind of result", EMIT_KINDS, "Write an ONNX model, or a TensorRT engine.")]
Seed = Annotated[int, typer.Option(min=0, max=2**32 - 1, help="Of everything random.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:I?B)?\s*", re.IGNORECASE)


def parse_size(text: str | int) -> int:
    """`512MB`, `2 GiB`, `1.5g` or a number of bytes; a kilobyte has 1024 bytes, whichever way it is written."""
    match = _SIZE.fullmatch(str(text))
    count = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if count < 1 << 20:
        raise typer.BadParameter(f"{text!r} is not a size of at least 1MB. Write it as 512MB or 2GB.")
    return count


MemoryBudget = Annotated[
    int, typer.Option(metavar="SIZE", parser=parse_size, show_default="2GB",
                      help="Memory for activations, such as 512MB; models with more weights than that are worked on layer by "
                           "layer where no activations are calibrated, verified in segments, and not timed."),
]  # fmt: skip


def parse_bits(text: str) -> tuple[int, ...]:
    """`8,6,4`: widths from 4 to 8."""
    if not re.fullmatch(r"[4-8](,[4-8])*", text.replace(" ", "")):
        raise typer.BadParameter(f"{text!r} is no list of widths from 4 to 8. Write it as 8,6,4.")
    return tuple(int(width) for width in text.split(","))


def parse_gate(text: str) -> tuple[str, float | None]:
    """`NAME=VALUE`, or `NAME=off`."""
    name, _, value = text.partition("=")
    try:
        return name.strip(), None if value.strip() == "off" else float(value)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no limit. Write it as min_speedup=1.2, or min_speedup=off.") from None


Limits = Annotated[
    list[Any] | None,
    typer.Option(metavar="NAME=VALUE|off", parser=parse_gate, help="A limit instead of the recipe's: min_speedup=off; repeatable."),
]  # fmt: skip
EngineTexts = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME[=VALUE]", help="How an engine is built: sparse, strip, weight_streaming, level=0..5, timing_cache=FILE, "
                 "compute_capability=8.9,12.0; repeatable."),
]  # fmt: skip
Shapes = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=SHAPE", help="Range of an input of the engine, fewest:best:most: input=1:8:32x3x224x224; repeatable."),
]  # fmt: skip
Widths = Annotated[Any, typer.Option(metavar="N,N,...", parser=parse_bits, help="Widths to try; the first is the one in question.")]


def print_json(value: Any) -> None:
    """A result, which may hold the toolkit's own dataclasses, on stdout."""
    from graphq.report import plain

    sys.stdout.write(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
