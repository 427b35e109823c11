"""Measure what low-bit recipes keep of a model's accuracy, with each ingredient switched on in turn, and print one table.

    .venv/bin/python benchmarks/lowbit.py [--out benchmarks/results] [--only PATTERN] [--calib 256] [--extra] [--jobs 1]

Rows of one model build on each other, from rounding to nearest to the recipe that ships. Calibration: 256 training-like images.
Accuracy: top-1 on the 500 images of the dev split and, with --extra, on 744 training-like images that calibration has not seen
(every model is better on those: read the differences). Models run as a user runs them, in ONNX Runtime; nothing here measures
speed, since most of these widths are simulated on a CPU. Results: <out>/lowbit.md and lowbit.csv.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import importlib
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import onnxruntime as ort
import tables

import graphq
from graphq.recipe import parse_recipe, recipe_text

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
VIT, MOBILENET = "vit_tiny_patch16_224", "mobilenet_v2_1.0_224"
EXTRA = "imagenet_train_extra744"


def transformer(
    weight: int, activation: int, *, reparam: bool = True, sulq: bool = True, tokens: bool = True, ranges: str = "mse", **rounding: Any
) -> str:
    """A recipe as YAML; `rounding` are options of the pass `round`, `aqer: True` puts that pass before it."""
    aqer = rounding.pop("aqer", False)
    lines = ["normalize"]
    lines += [f"ln-reparam: {{bits: {activation}}}"] * reparam + [f"sulq-softmax: {{bits: {activation}}}"] * sulq
    lines += [f"dynamic-activations: {{bits: {activation}, symmetric: false}}"] * tokens
    lines.append(
        f"insert-qdq: {{activation_bits: {activation}, weights: false, attention: true, ranges: {ranges}, tables: false, error_samples: 0}}"
    )
    lines += ["aqer"] * aqer
    lines.append(f"round: {{bits: {weight}, {', '.join(f'{key}: {str(value).lower()}' for key, value in rounding.items())}}}")
    return "passes:\n" + "".join(f"  - {line}\n" for line in lines)


def convolution(**rounding: Any) -> str:
    options = ", ".join(f"{key}: {str(value).lower()}" for key, value in rounding.items())
    return f"passes:\n  - normalize\n  - insert-qdq: {{weights: false, error_samples: 0}}\n  - round: {{bits: 4, {options}}}\n"


RTN = {"algorithm": "rtn", "scales": "min-max", "correct_bias": False}
MSE = {"algorithm": "rtn", "correct_bias": False}
STATIC = {"reparam": False, "sulq": False, "tokens": False}
ROWS: list[tuple[str, str, str, str]] = [  # (model, bits, what, recipe)
    *[
        (VIT, f"W{weight}A4", what, text)
        for weight in (4, 3)
        for what, text in (
            ("rounding to nearest, min-max", transformer(weight, 4, **STATIC, ranges="min-max", **RTN)),
            ("+ ranges of least squared error", transformer(weight, 4, **STATIC, **MSE)),
            ("+ ln-reparam", transformer(weight, 4, sulq=False, tokens=False, **MSE)),
            ("+ sulq-softmax", transformer(weight, 4, tokens=False, **MSE)),
            ("+ one range a token", transformer(weight, 4, **MSE)),
            ("+ bias correction", transformer(weight, 4, algorithm="rtn")),
            ("+ aqer", transformer(weight, 4, aqer=True, algorithm="rtn")),
            ("+ gptq", transformer(weight, 4, aqer=True, algorithm="gptq")),
            ("+ greedy rounding", transformer(weight, 4, aqer=True)),
            ("the same without aqer", transformer(weight, 4)),
            (f"recipe w{weight}a4-vit", recipe_text(f"w{weight}a4-vit")),
        )
        if weight == 4 or what.startswith(("rounding", "+ one", "+ greedy", "recipe"))
    ],
    (VIT, "W4A4", "recipe w4a4-svdquant", recipe_text("w4a4-svdquant")),
    (VIT, "W4A4", "recipe w4a4-wush", recipe_text("w4a4-wush")),
    *[
        (VIT, "W3A16", f"{name}, groups of 64", f"passes: [normalize, round: {{bits: 3, group_size: 64, algorithm: {name}, layers: all}}]")
        for name in ("rtn", "gptq", "greedy")
    ],
    (VIT, "W3A16", "rotate, then gptq", "passes: [normalize, rotate, round: {bits: 3, group_size: 64, algorithm: gptq, layers: all}]"),
    (VIT, "W3A16", "higgs without data", "passes: [normalize, higgs]"),
    (VIT, "W3A16", "recipe w3a16-higgs", recipe_text("w3a16-higgs")),
    (VIT, "W3A16", "the same, in pairs", "passes: [normalize, higgs: {rounding: greedy, numbers: 2}]"),
    (VIT, "W6A6", "rounding to nearest, min-max", transformer(6, 6, **STATIC, ranges="min-max", **RTN)),
    (VIT, "W6A6", "recipe w6a6-vit", recipe_text("w6a6-vit")),
    (VIT, "W8A8", "recipe w8a8-vit", recipe_text("w8a8-vit")),
    (VIT, "W8A8", "recipe int8", recipe_text("int8")),
    (VIT, "W4A16", "recipe w4a16-gptq", recipe_text("w4a16-gptq")),
    (VIT, "W4A8", "recipe w4a8", recipe_text("w4a8")),
    (VIT, "mixed", "recipe mixed", recipe_text("mixed")),
    (MOBILENET, "W4A8", "rounding to nearest, min-max", convolution(**RTN)),
    (MOBILENET, "W4A8", "+ bias correction", convolution(algorithm="rtn")),
    (MOBILENET, "W4A8", "greedy rounding", convolution()),
    (MOBILENET, "W4A8", "recipe w4a8", recipe_text("w4a8")),
    (MOBILENET, "mixed", "recipe mixed", recipe_text("mixed")),
    (MOBILENET, "W8A8", "recipe int8", recipe_text("int8")),
    ("squeezenet1_1", "W4A8", "recipe w4a8", recipe_text("w4a8")),
    ("squeezenet1_1", "W8A8", "recipe int8", recipe_text("int8")),
]


def measure(job: tuple[str, str, str, str], calib: int, extra: bool) -> dict[str, Any]:
    """A row of the table; a job whose recipe is empty is the float model."""
    model, bits, what, text = job
    sys.path.insert(0, str(ASSETS))
    assets = importlib.import_module("assets")
    row: dict[str, Any] = {"model": model, "bits": bits, "what": what}
    with tempfile.TemporaryDirectory() as folder:
        path = source = ASSETS / "models" / f"{model}.onnx"
        if text:
            path, data = Path(folder) / "out.onnx", assets.calibration(model, calib)
            started = time.perf_counter()
            report = graphq.convert(source, path, recipe=parse_recipe(text, "row"), calib=data)
            row |= {"seconds": time.perf_counter() - started, "size": report.output.bytes / report.model.bytes}
            row |= {"sqnr_db": report.comparison[0].sqnr_db}
        session = ort.InferenceSession(path)
        row["dev"] = assets.top1(session, model)
        if extra:
            row["extra"] = assets.top1(session, model, EXTRA)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--only", default="*", help="pattern of '<model> <bits> <what>'; other rows of an earlier run stay in the tables")
    parser.add_argument("--calib", type=int, default=256)
    parser.add_argument("--extra", action="store_true")
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, which share the cores: seconds are those then")
    arguments = parser.parse_args()
    models = dict.fromkeys(row[0] for row in ROWS)
    jobs = [job for model in models for job in [(model, "float32", "", ""), *(row for row in ROWS if row[0] == model)]]
    chosen = [job for job in jobs if fnmatch.fnmatchcase(" ".join(job[:3]), arguments.only)]
    found = {} if arguments.only == "*" else tables.earlier(arguments.out / "lowbit.csv", ("model", "bits", "what"))
    with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
        for row in pool.map(partial(measure, calib=arguments.calib, extra=arguments.extra), chosen):
            found[row["model"], row["bits"], row["what"]] = row
            print(row, flush=True)
            write([found[job[:3]] for job in jobs if job[:3] in found], len(jobs), arguments)


def write(rows: list[dict[str, Any]], total: int, arguments: argparse.Namespace) -> None:
    """The tables, as far as they are measured: a run may be stopped."""
    columns = {
        "model": ("model", ""), "bits": ("bits", ""), "what": ("ingredients", ""), "dev": ("top-1 dev", ".1f"),
        **({"extra": ("top-1 extra", ".1f")} if any("extra" in row for row in rows) else {}),
        "sqnr_db": ("SQNR dB", ".1f"), "size": ("file size", ".3f"), "seconds": ("convert s", ".0f"),
    }  # fmt: skip
    again = "" if arguments.only == "*" else f" The rows `{arguments.only}` are of this run, the others of an earlier one."
    head = [
        "# Low-bit recipes, ingredient by ingredient", "",
        f"`python benchmarks/lowbit.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, graphq {graphq.__version__},",
        f"onnxruntime {ort.__version__}, {platform.machine()}, {arguments.calib} calibration images.",
        f"{len(rows)} of {total} rows.{again}",
    ]  # fmt: skip
    tables.write(arguments.out, "lowbit", head, rows, columns)


if __name__ == "__main__":
    main()
