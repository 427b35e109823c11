"""Measure what the image tower of a dual encoder keeps when it is quantized without data: D4C, its parts, and what it is compared with.

    .venv/bin/python benchmarks/clip.py [--out benchmarks/results] [--seeds 3] [--count 32] [--steps 100] [--only PATTERN] [--jobs 1]

The model is models/digits_clip: zero-shot top-1 among ten prompts on 1000 scenes, in ONNX Runtime. Each row is a source of calibration
images, `count` of them, once for each seed; mean and standard deviation over seeds. SQNR compares the embeddings of the test scenes with
the float model's; it is less noisy than accuracy, of which one scene is 0.1 points. All synthesized images keep to [-1, 1], as
pixels do, and so does the noise. The tower has no BatchNormalization, so that there is nothing for bn-stats; PSAQ-ViT stands for what
knows no texts. Results: <out>/clip.md and clip.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import platform
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from tables import earlier

import graphq
from graphq.models import digits, digits_clip, onnx_path
from graphq.recipe import parse_recipe
from graphq.synthesis import synthesize

SOURCES: dict[str, tuple[str, dict[str, Any]]] = {  # name: (strategy or what else, its options)
    "noise": ("noise", {}),
    "PSAQ-ViT (patch-similarity)": ("patch-similarity", {}),
    "PSAQ-ViT, as little smoothed as D4C": ("patch-similarity", {"variation": 3.0}),
    "D4C, semantic alone": ("clip", {"structure": False, "perturb": False}),
    "D4C without semantic (random directions)": ("clip", {"semantic": False}),
    "D4C without structure": ("clip", {"structure": False}),
    "D4C without perturbation": ("clip", {"perturb": False}),
    "D4C": ("clip", {}),
    "real": ("real", {}),
}


def static(weight: int, activation: int) -> str:
    """Ranges of activations from calibration alone, none found anew for each token; weights refitted and rounded on the same images."""
    return f"""passes:
  - normalize
  - insert-qdq: {{activation_bits: {activation}, weights: false, attention: true, tables: false, error_samples: 0}}
  - round: {{bits: {weight}, repair: true}}
"""


RECIPES = {"W4A8": static(4, 8), "W4A4": static(4, 4)}


def images(source: str, seed: int, arguments: argparse.Namespace, text: Path) -> np.ndarray:
    """Calibration images [count, 1, 32, 32] of a source."""
    strategy, options = SOURCES[source]
    if strategy == "real":
        return digits_clip.calibration(arguments.count, seed)
    if strategy == "noise":
        shape = (arguments.count, 1, digits.IMAGE_SIZE, digits.IMAGE_SIZE)
        return np.random.default_rng(seed).standard_normal(shape, np.float32).clip(-1, 1)
    if strategy == "clip":
        options = {"flip": 0.0, "text": str(text), **options}
    found = synthesize(onnx_path("digits_clip"), strategy, options=options, count=arguments.count, steps=arguments.steps,
                       batch=arguments.count, seed=seed, preprocess="inception")  # fmt: skip
    return found[digits.INPUT_NAME]


def embeddings(path: Path, inputs: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(None, {digits.INPUT_NAME: part})[0] for part in np.split(inputs, 10)])


def measure(job: tuple[int, str], arguments: argparse.Namespace, text: Path) -> list[dict[str, Any]]:
    """A row for each recipe, of a seed and a source."""
    seed, source = job
    (inputs, labels), texts, tower = digits_clip.test_scenes(), digits_clip.text_embeddings(), onnx_path("digits_clip")
    expected = embeddings(tower, inputs)
    started = time.perf_counter()
    data = images(source, seed, arguments, text)
    seconds = time.perf_counter() - started
    rows = []
    for name, recipe in RECIPES.items():
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "out.onnx"
            graphq.convert(tower, path, recipe=parse_recipe(recipe, name), calib={digits.INPUT_NAME: data})
            found = embeddings(path, inputs)
        sqnr = 10 * np.log10(np.square(expected).sum() / np.square(found - expected).sum())
        top1 = 100 * float(((found @ texts.T).argmax(1) == labels).mean())
        rows.append({"source": source, "seed": seed, "recipe": name, "top1": top1, "sqnr_db": float(sqnr), "synthesis_s": seconds})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """Mean and standard deviation over seeds, as Markdown."""
    lines = ["| calibration images | " + " | ".join(f"{name} top-1 | SQNR dB" for name in RECIPES) + " | synthesis s |",
             "|" + "---|" * (2 * len(RECIPES) + 2)]  # fmt: skip
    for source in SOURCES:
        own = [row for row in rows if row["source"] == source]
        if own:
            cells = [spread([row[key] for row in own if row["recipe"] == name]) for name in RECIPES for key in ("top1", "sqnr_db")]
            lines.append(f"| {source} | " + " | ".join(cells) + f" | {np.mean([row['synthesis_s'] for row in own]):.0f} |")
    return lines


def spread(values: list[float]) -> str:
    return f"{np.mean(values):.1f} ± {np.std(values, ddof=1) if len(values) > 1 else 0:.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--jobs", type=int, default=1, help="rows at a time, which share the cores: seconds are those then")
    parser.add_argument("--only", default="*", help="pattern of a source; other rows of an earlier run stay in the tables")
    arguments = parser.parse_args()
    file = arguments.out / "clip.csv"
    names = ("source", "seed", "recipe")
    rows = [] if arguments.only == "*" else [row | {"seed": int(row["seed"])} for row in earlier(file, names).values()]
    chosen = [source for source in SOURCES if fnmatch.fnmatchcase(source, arguments.only)]
    rows = [row for row in rows if row["source"] not in chosen]
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder) / "text.npz"
        np.savez(text, text_embedding=digits_clip.text_embeddings())
        jobs = [(seed, source) for seed in range(arguments.seeds) for source in chosen]
        with ProcessPoolExecutor(arguments.jobs, mp_context=get_context("spawn")) as pool:
            for found in pool.map(partial(measure, arguments=arguments, text=text), jobs):
                rows += found
                print(found, flush=True)
                write(rows, arguments, file)


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace, file: Path) -> None:
    """The tables, as far as they are measured: a run may be stopped."""
    inputs, labels = digits_clip.test_scenes()
    right = ((embeddings(onnx_path("digits_clip"), inputs) @ digits_clip.text_embeddings().T).argmax(1) == labels).mean()
    head = [
        "# A dual encoder quantized without data", "",
        f"`python benchmarks/clip.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, graphq {graphq.__version__},",
        f"onnxruntime {ort.__version__}, {platform.machine()}, {arguments.count} images, {arguments.steps} steps, {arguments.seeds} seeds.",
        f"Zero-shot top-1 of digits_clip among ten prompts, on {len(labels)} scenes; float32: {100 * right:.1f}.", "",
    ]  # fmt: skip
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text("\n".join([*head, *table(rows), ""]), encoding="utf-8")
    with file.open("w", newline="", encoding="utf-8") as out:
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
