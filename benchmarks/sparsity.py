"""Measure what 2:4 sparse weights keep of a model's accuracy, method by method, and print one table.

    .venv/bin/python benchmarks/sparsity.py [--out benchmarks/results] [--only PATTERN] [--calib 256]

Accuracy: top-1 in percent on the 500 images of the dev split; for sentences, 100 times the Spearman correlation on the 1500 pairs of
STS-B dev. `lost` is what is lost of it, and `share` that of what magnitude without a refit loses: a refit is to bring it below a half.
Models run in ONNX Runtime on a CPU, which multiplies zeros like all else: nothing here measures speed.
Results: <out>/sparsity.md and sparsity.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import importlib
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import onnxruntime as ort
from measure import text_quality

import graphq
from graphq.gates import Gates
from graphq.recipe import parse_recipe, recipe_text

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
MODELS = ("vit_tiny_patch16_224", "minilm_l6_stsb")


def pruned(**options: Any) -> str:
    text = ", ".join(f"{key}: {str(value).lower()}" for key, value in options.items())
    return f"passes:\n  - normalize\n  - nm-prune: {{{text}}}\ngates:\n  max_size_ratio: 2\n"


BASELINE = "magnitude"
METHODS = {
    "float32": "",
    BASELINE: pruned(score="magnitude", refit=False),
    "wanda": pruned(score="wanda", refit=False),
    "sparsegpt": pruned(score="sparsegpt", refit=False),
    "magnitude + refit": pruned(score="magnitude"),
    "sparsegpt + refit": pruned(score="sparsegpt"),
    "sparsegpt + refit + permute": pruned(score="sparsegpt", permute=True),
    "alps + refit": pruned(score="alps"),
    "alps + refit + permute": pruned(score="alps", permute=True),
    "recipe nm24": recipe_text("nm24"),
    "recipe nm24-int8": recipe_text("nm24-int8"),
}


def measure(model: str, method: str, calib: int) -> dict[str, Any]:
    """A row of the table."""
    sys.path.insert(0, str(ASSETS))
    assets = importlib.import_module("assets")
    source, row = ASSETS / "models" / f"{model}.onnx", {"model": model, "method": method}
    with tempfile.TemporaryDirectory() as folder:
        path = source
        if METHODS[method]:
            path, started = Path(folder) / "out.onnx", time.perf_counter()
            limits = {name: None for name in Gates.__annotations__}
            report = graphq.convert(source, path, recipe=parse_recipe(METHODS[method], "row"), calib=assets.calibration(model, calib),
                                    limits=limits)  # fmt: skip
            row |= {"seconds": time.perf_counter() - started, "sqnr_db": report.comparison[0].sqnr_db}
            row["size"] = report.output.bytes / report.model.bytes
        if model in assets.VISION:
            return row | {"accuracy": assets.top1(ort.InferenceSession(path), model)}
        found = text_quality(assets, ort.InferenceSession(source), ort.InferenceSession(path), calib)
        return row | {"accuracy": 100 * found["spearman"], "cosine": found["cos_mean"]}


COLUMNS = {"model": "", "method": "", "accuracy": ".1f", "lost": ".1f", "share": ".2f", "cosine": ".3f", "sqnr_db": ".1f", "size": ".2f",
           "seconds": ".0f"}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--only", default="*", help="pattern of '<model> <method>'; other rows of an earlier run stay in the table")
    parser.add_argument("--calib", type=int, default=256)
    arguments = parser.parse_args()
    jobs = [(model, method) for model in MODELS for method in METHODS]
    found = {} if arguments.only == "*" else earlier(arguments.out / "sparsity.csv")
    for job in jobs:
        if fnmatch.fnmatchcase(" ".join(job), arguments.only):
            found[job] = measure(*job, arguments.calib)
            print(found[job], flush=True)
            write([found[key] for key in jobs if key in found], len(jobs), arguments)


def earlier(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that an earlier run wrote, by model and method."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        rows = [{key: text if key in ("model", "method") else float(text) for key, text in row.items() if text}
                for row in csv.DictReader(lines)]  # fmt: skip
    return {(row["model"], row["method"]): row for row in rows}


def write(rows: list[dict[str, Any]], total: int, arguments: argparse.Namespace) -> None:
    """The table, as far as it is measured: a run may be stopped."""
    base = {(row["model"], row["method"]): row["accuracy"] for row in rows}
    for row in rows:
        before, worst = base.get((row["model"], "float32")), base.get((row["model"], BASELINE))
        if before is not None and row["method"] != "float32":
            row["lost"] = before - row["accuracy"]
            row |= {} if worst is None else {"share": row["lost"] / (before - worst)}
    again = "" if arguments.only == "*" else f" The rows `{arguments.only}` are of this run, the others of an earlier one."
    head = [
        "# 2:4 sparse weights, method by method", "",
        f"`python benchmarks/sparsity.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, graphq {graphq.__version__},",
        f"onnxruntime {ort.__version__}, {platform.machine()}, {arguments.calib} calibration samples.",
        f"{len(rows)} of {total} rows.{again}", "",
        "Accuracy: top-1 of 500 images, or 100 x Spearman correlation of 1500 pairs of sentences. Share: of what magnitude loses.", "",
    ]  # fmt: skip
    cells = [[format(row[key], style) if key in row else "" for key, style in COLUMNS.items()] for row in rows]
    lines = ["| " + " | ".join(COLUMNS) + " |", "|" + "---|" * len(COLUMNS), *("| " + " | ".join(row) + " |" for row in cells)]
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "sparsity.md").write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    with (arguments.out / "sparsity.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(COLUMNS), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
