"""Measure what calibration data from nothing is worth: noise, each way to synthesize it, and real images, in one table.

    .venv/bin/python benchmarks/synthesis.py [--out benchmarks/results] [--only PATTERN] [--count 32] [--steps N] [--dev 500]
                                             [--scratch FOLDER] [--again] [--threads 0]

For each recipe the float model, then the same recipe calibrated on `count` samples of each kind. top-1: on the first `dev` images of the
dev split (all test images for digits_cnn); SQNR: of the logits there against those of the float model, which tells more than a few
images change their class. Data is made once for all recipes of a model, in SCRATCH, where a stopped run goes on; rows that an earlier
run measured with the same count, steps and images are kept. Results: <out>/synthesis.md and synthesis.csv.
"""

from __future__ import annotations

import argparse
import datetime
import fnmatch
import functools
import importlib
import platform
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort
import tables
from lowbit import ASSETS, MOBILENET, VIT, convolution, transformer

import graphq
from graphq.models import digits, onnx_path
from graphq.preprocess import PRESETS
from graphq.recipe import Recipe, load_recipe, parse_recipe
from graphq.synthesis import make_strategy, synthesize

CNN = "digits_cnn"
Way = tuple[str, str, dict[str, Any]]
"""What the table calls it, a strategy (or none), and its options."""

COMMON: list[Way] = [("noise", "", {}), ("natural", "natural", {}), ("natural, clouds alone", "natural", {"leaves": False})]
LOGITS: list[Way] = [
    ("logits", "logits", {}),
    ("logits from noise", "logits", {"start": "noise"}),
    ("logits, hard labels", "logits", {"soft_labels": False}),
    ("logits without variation", "logits", {"variation": 0.0}),
]
REAL: list[Way] = [("real", "", {})]
WAYS: Mapping[str, list[Way]] = {
    VIT: [
        *COMMON,
        ("patch-similarity", "patch-similarity", {}),
        ("logits", "logits", {}),
        ("vit-attention", "vit-attention", {}),
        ("vit-attention without priors", "vit-attention", {"priors": False}),
        ("vit-attention without regions", "vit-attention", {"regions": False}),
        ("vit-attention, hard labels", "vit-attention", {"soft_labels": False}),
        ("vit-attention, labels alone", "vit-attention", {"priors": False, "regions": False, "soft_labels": False}),
        ("vit-attention from natural", "vit-attention", {"start": "natural"}),
        *REAL,
    ],
    MOBILENET: [*COMMON, *LOGITS, *REAL],
    CNN: [*COMMON, ("bn-stats", "bn-stats", {}), ("bn-stats from noise", "bn-stats", {"start": "noise"}), *LOGITS, *REAL],
}
RECIPES: list[tuple[str, str, str | None]] = [  # (model, what the table calls it, the recipe as YAML if it is not built in)
    (VIT, "w8a8-vit", None),
    (VIT, "w4a4-vit", None),
    (VIT, "W4A4, rounding to nearest", transformer(4, 4, algorithm="rtn", correct_bias=False)),
    (MOBILENET, "int8", None),
    (MOBILENET, "w4a8", None),
    (MOBILENET, "W4A8, rounding to nearest, bias correction", convolution(algorithm="rtn")),
    (CNN, "int8", None),
    (CNN, "w4a8", None),
]
COLUMNS = {
    "model": ("model", ""), "recipe": ("recipe", ""), "data": ("calibration data", ""), "count": ("samples", ".0f"),
    "steps": ("steps", ".0f"), "dev": ("top-1 dev", ".1f"), "lost": ("points lost", ".1f"), "sqnr_db": ("SQNR dB", ".1f"),
    "made": ("synthesis s", ".0f"), "seconds": ("convert s", ".0f"), "images": ("dev images", ".0f"),
}  # fmt: skip
KEY = ("model", "recipe", "data")


@functools.cache
def assets() -> ModuleType:
    sys.path.insert(0, str(ASSETS))
    return importlib.import_module("assets")


def model_path(model: str) -> Path:
    return onnx_path(CNN) if model == CNN else ASSETS / "models" / f"{model}.onnx"


@functools.cache
def dev(model: str, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images as the model takes them, their labels, and the logits of the float model."""
    if model == CNN:
        inputs, labels = digits.images("test")
    else:
        _, _, pack, size = assets().VISION[model]
        pictures, labels = assets().images(pack, size, count)
        inputs = assets().preprocess(pictures, model)
    return inputs, labels, logits(model_path(model), inputs)


def logits(path: Path, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path)
    name = session.get_inputs()[0].name
    return np.concatenate([session.run(None, {name: inputs[i : i + 50]})[0] for i in range(0, len(inputs), 50)])


def data(model: str, way: Way, arguments: argparse.Namespace) -> tuple[dict[str, np.ndarray], float, int | None]:
    """Calibration arrays, the seconds that they took, and steps, if there were any. All models here take values from -1 to 1."""
    what, strategy, options = way
    if what == "real":
        arrays = {"input": digits.calibration(arguments.count)} if model == CNN else assets().calibration(model, arguments.count)
        return arrays, 0.0, None
    if what == "noise":
        shape = dev(model, arguments.dev)[0].shape[1:]
        return {"input": np.random.default_rng(0).standard_normal((arguments.count, *shape), np.float32)}, 0.0, None
    steps = None if strategy == "natural" else arguments.steps or make_strategy(strategy, options).steps
    kept = arguments.scratch / f"{model}-{what.replace(' ', '-').replace(',', '')}-{arguments.count}-{steps}"
    made = synthesize(model_path(model), strategy, options=options, count=arguments.count, steps=steps, preprocess=PRESETS["inception"],
                      resume=kept)  # fmt: skip
    return dict(made), made.facts.seconds, steps


def measure(job: tuple[str, str, str | None], way: Way | None, arguments: argparse.Namespace) -> tables.Row:
    """A row of the table; no way is the float model."""
    model, name, text = job
    inputs, labels, reference = dev(model, arguments.dev)
    right = 100 * float((reference.argmax(axis=1) == labels).mean())
    row: tables.Row = {"model": model, "recipe": name, "data": way[0] if way else "", "dev": right, "images": len(labels)}
    if way is None:
        return row | {"recipe": "float32"}
    calib, made, steps = data(model, way, arguments)
    recipe: str | Recipe = load_recipe(name) if text is None else parse_recipe(text, name)
    with tempfile.TemporaryDirectory() as folder:
        path, started = Path(folder) / "out.onnx", time.perf_counter()
        limits = dict.fromkeys(("min_speedup", "min_cosine", "min_sqnr_db", "max_size_ratio"))  # what is bad is to be seen
        graphq.convert(model_path(model), path, recipe=recipe, calib=calib, limits=limits)
        row |= {"seconds": time.perf_counter() - started, "made": made, "count": arguments.count, "steps": steps}
        found = logits(path, inputs)
    row["dev"] = 100 * float((found.argmax(axis=1) == labels).mean())
    noise = np.square(found - reference, dtype=np.float64).sum()
    return row | {"lost": right - row["dev"], "sqnr_db": 10 * float(np.log10(np.square(reference, dtype=np.float64).sum() / noise))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--only", default="*", help="pattern of '<model> <recipe> <calibration data>'; other rows stay as they are")
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--steps", type=int, help="of optimisation; each strategy's own number without it")
    parser.add_argument("--dev", type=int, default=500, help="images to measure on")
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()) / "graphq-synthesis")
    parser.add_argument("--again", action="store_true", help="measure rows that are there already")
    parser.add_argument("--threads", type=int, default=0, help="of torch; 0 leaves it to torch")
    arguments = parser.parse_args()
    arguments.scratch.mkdir(parents=True, exist_ok=True)
    if arguments.threads:
        importlib.import_module("torch").set_num_threads(arguments.threads)
    models = dict.fromkeys(model for model, *_ in RECIPES)
    jobs: list[tuple[tuple[str, str, str | None], Way | None]] = []
    for model in models:
        recipes = [recipe for recipe in RECIPES if recipe[0] == model]
        jobs += [((model, "float32", None), None), *((recipe, way) for recipe in recipes for way in WAYS[model])]
    found = tables.earlier(arguments.out / "synthesis.csv", KEY)
    for job, way in jobs:
        key = (*job[:2], way[0] if way else "")
        if not fnmatch.fnmatchcase(" ".join(key), arguments.only) or (not arguments.again and is_known(found.get(key), way, arguments)):
            continue
        found[key] = measure(job, way, arguments)
        print(found[key], flush=True)
        keys = [(*other[:2], way[0] if way else "") for other, way in jobs]
        write([found[key] for key in keys if key in found], len(jobs), arguments)


def is_known(row: tables.Row | None, way: Way | None, arguments: argparse.Namespace) -> bool:
    """Whether `row` was measured with what is asked for."""
    if row is None or (row["model"] != CNN and row["images"] != arguments.dev):
        return False
    steps = None if way is None or way[1] in ("", "natural") else arguments.steps or make_strategy(way[1], way[2]).steps
    return way is None or (row.get("count") == arguments.count and row.get("steps") == steps)


def write(rows: list[tables.Row], total: int, arguments: argparse.Namespace) -> None:
    """The tables, as far as they are measured."""
    head = [
        "# Calibration without data", "",
        f"`python benchmarks/synthesis.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, graphq {graphq.__version__},",
        f"onnxruntime {ort.__version__}, {platform.machine()}. {len(rows)} of {total} rows; each says its samples, steps and images.",
    ]  # fmt: skip
    tables.write(arguments.out, "synthesis", head, rows, COLUMNS)


if __name__ == "__main__":
    main()
