"""The command `graphq bench`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from graphq import console
from graphq.backends.runners import RUNTIMES
from graphq.cli_options import ARRAYS, Debug, Json, Preprocess, Seed
from graphq.errors import UsageError


def parse_batches(text: str) -> tuple[int, ...]:
    """`1,8`: samples a call."""
    if not re.fullmatch(r"[1-9]\d{0,6}(,[1-9]\d{0,6})*", text.replace(" ", "")):
        raise typer.BadParameter(f"{text!r} is no list of batch sizes. Write it as 1,8.")
    return tuple(dict.fromkeys(int(size) for size in text.split(",")))


def _parse_seconds(text: str | float) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= 3600:
        raise typer.BadParameter(f"{text!r} is no time between 0 and 3600 seconds. Write it as 5 or 0.5.")
    return seconds


Batches = Annotated[
    Any,
    typer.Option("--batch", metavar="N,N,...", parser=parse_batches, help="Samples a call; without it what the models are fixed to, or 1."),
]  # fmt: skip
Runtimes = Annotated[
    list[str] | None,
    typer.Option("--runtime", metavar="NAME", help=f"{', '.join(RUNTIMES)}; repeatable. All that work here without it."),
]  # fmt: skip
Seconds = Annotated[
    Any, typer.Option("--seconds", metavar="SECONDS", parser=_parse_seconds, help="For each model, runtime and batch size; 2 without it.")
]  # fmt: skip
Output = Annotated[
    Path | None, typer.Option("--output", "--out", "-o", metavar="FILE.json", help="Write the result there, to put beside later ones.")
]  # fmt: skip


def bench(
    models: Annotated[list[Path], typer.Argument(metavar="MODEL...", help="ONNX files or engines; speed-ups are over the first. "
                                                 "Also results of earlier runs (.json): each keeps a table of its own.")],
    runtime: Runtimes = None,
    batch: Batches = None,
    data: Annotated[Path | None, typer.Option(help=f"Inputs: {ARRAYS}. Random without it.")] = None,
    preprocess: Preprocess = None,
    threads: Annotated[int, typer.Option(min=0, max=4096, help="CPU threads for each model; 0: what the runtime chooses.")] = 0,
    seconds: Seconds = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Exactly so many turns of each model, instead of a time.")] = None,
    output: Output = None,
    seed: Seed = 0,
    as_json: Json = False,
    debug: Debug = False,
) -> None:  # fmt: skip
    """Measure the speed and memory of models, side by side, on every runtime that is here.

    Exit code 1 if one of the models ran on none of them; the others are shown all the same.
    """
    from graphq.backends import files
    from graphq.bench import SECONDS
    from graphq.bench import bench as measure

    if seconds is not None and rounds is not None:
        raise UsageError("Two lengths of measuring exclude each other.", where="--seconds and --rounds", expected="one of them")
    if output is not None:
        if output.suffix.lower() != ".json":
            raise UsageError("The result is JSON.", where=f"--output {output}", expected="a file name that ends in .json")
        files.check_output(output, models)
    with console.progress_bar() as progress:
        found = measure(models, runtimes=runtime or (), data=data, preprocess=preprocess, batches=batch or (), threads=threads,
                        seconds=seconds or SECONDS, rounds=rounds, seed=seed, progress=progress)  # fmt: skip
    if output is not None:
        with files.pending(output) as part:
            part.write_text(found.to_json() + "\n", encoding="utf-8")
    if as_json:
        sys.stdout.write(found.to_json() + "\n")
    else:
        console.benchmarks(found)
    newest = [row for row in found.rows if row.run == found.rows[0].run]  # the new ones come first
    if not newest or {row.model for row in newest} - {row.model for row in newest if row.reason is None}:
        raise typer.Exit(1)
