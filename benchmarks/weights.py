"""Measure what weight-only recipes keep of a model's accuracy, and print one table.

    .venv/bin/python benchmarks/weights.py [--out benchmarks/results] [--only PATTERN] [--calib 128]

Each row is converted in a process of its own. Accuracy: top-1 on 500 ImageNet validation images (ViT-Tiny), cosine of float and
converted sentence embeddings over 1000 STS-B sentences not used for calibration (MiniLM), perplexity on 128 sequences of the dev split
(a Llama of 0.23 million parameters). `exact`: activations of MatMulNBits are float; `deployed`: as ONNX Runtime does by default,
which rounds them to 8 bits. ModelOpt (int4, awq_clip) runs in its own environment (see peers.py). Nothing here measures speed.
Results: <out>/weights.md and weights.csv.
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
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from convert import TOOLS
from lowbit import ASSETS, VIT
from measure import text_quality
from peers import WORK, ask, environment, prepare

import graphq
from graphq.recipe import parse_recipe, recipe_text

MINILM, LLAMA = "minilm_l6_stsb", "aidreams260k_llama"
MODELS = (VIT, MINILM, LLAMA)
PEER = "modelopt-int4"
TABLES = "  - quantize-weights: {bits: 8, op_types: [], allow_no_effect: true}\n"


def made(*passes: str) -> str:
    return "passes:\n  - normalize\n" + "".join(f"  - {one}\n" for one in passes) + TABLES


def rounded(bits: int, group: int, algorithm: str, *, awq: bool = False) -> str:
    """Rounded behind awq or not; scales of least squared error."""
    before = [f"awq: {{bits: {bits}, group_size: {group}, allow_no_effect: true}}"] * awq
    return made(*before, f"round: {{bits: {bits}, group_size: {group}, algorithm: {algorithm}, layers: all}}")


def plain(bits: int, group: int, form: str = "integer") -> str:
    return made(f"quantize-weights: {{bits: {bits}, group_size: {group}, fallback_bits: 8, tables: false, format: {form}}}")


def outliers(bits: int, group: int) -> str:
    """Where keeping outliers does not pay, to nearest."""
    how = f"bits: {bits}, group_size: {group}"
    return made(
        f"outliers: {{{how}, allow_no_effect: true}}",
        f"quantize-weights: {{{how}, fallback_bits: 8, tables: false, allow_no_effect: true}}",
    )


NAMES = ("int8-weight-only", "int4-weight-only", "w4a16-gptq", "w4a16-gptq-g32", "w4a16-awq", "w3a16-higgs", "nested-8-6-4-2")
SVD = "svd-branch: {rank: 16, weight_bits: 4, group_size: 64, activation_bits: null, min_gain_db: 0, allow_no_effect: true}"
GPTQ64 = "round: {bits: 4, group_size: 64, algorithm: gptq, layers: all}"
ROWS: list[tuple[str, str]] = [  # (what, recipe)
    ("float32", ""),
    *[
        row
        for bits, group in ((4, 128), (4, 32), (3, 128), (3, 32))
        for row in (
            (f"{bits} bits, groups of {group}: to nearest, min-max", plain(bits, group)),
            (f"{bits} bits, groups of {group}: awq", rounded(bits, group, "rtn", awq=True)),
            (f"{bits} bits, groups of {group}: gptq", rounded(bits, group, "gptq")),
            (f"{bits} bits, groups of {group}: greedy", rounded(bits, group, "greedy")),
        )
    ],
    ("4 bits, groups of 32: awq and gptq", rounded(4, 32, "gptq", awq=True)),
    ("4 bits, groups of 128: outliers kept", outliers(4, 128)),
    ("4 bits, groups of 32: outliers kept", outliers(4, 32)),
    ("4 bits, groups of 32: nf4", plain(4, 32, "nf4")),
    ("4 bits, groups of 32: fp4", plain(4, 32, "fp4")),
    ("4 bits, groups of 64: gptq", made(GPTQ64)),
    ("4 bits, groups of 64: rotate and gptq", made("rotate: {allow_no_effect: true}", GPTQ64)),
    ("4 bits, groups of 64: gptq and lorc, rank 16", made(GPTQ64, "lorc: {rank: 16, min_gain_db: 0, allow_no_effect: true}")),
    ("4 bits, groups of 64: svd-branch, rank 16, and gptq", made(SVD, GPTQ64)),
    ("residual-expand, 2 orders of 4 bits", made("residual-expand: {bits: 4, orders: 2}")),
    *((f"recipe {name}", recipe_text(name)) for name in NAMES),
]


def session(path: Path, *, exact: bool) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if exact:
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(path, options)


def quality(model: str, source: Path, converted: Path, calib: int, *, exact: bool) -> tuple[float, str]:
    """What counts for `model`, and all of it as text."""
    assets = importlib.import_module("assets")
    own = session(converted, exact=exact)
    if model == VIT:
        top1 = assets.top1(own, model)
        return top1, f"top-1 {top1:.1f}"
    if model == MINILM:
        found = text_quality(assets, session(source, exact=True), own, calib)
        return found["cos_mean"], "cos {cos_mean:.4f} min {cos_min:.3f}, Spearman {spearman:.4f}".format(**found)
    with np.load(assets.DATA / "aidreams_selfsampled_tokens.npz") as pack:
        tokens = pack["dev"].astype(np.int64)
    scores = own.run(None, {"input_ids": tokens})[0][:, :-1].astype(np.float64)
    scores -= scores.max(-1, keepdims=True)
    likely = np.take_along_axis(scores, tokens[:, 1:, None], -1)[..., 0] - np.log(np.exp(scores).sum(-1))
    perplexity = float(np.exp(-likely.mean()))
    return perplexity, f"perplexity {perplexity:.3f}"


def measure(job: tuple[str, str, str], calib: int) -> dict[str, Any]:
    """A row of the table; a job whose recipe is empty is the float model, or that of the peer."""
    model, what, text = job
    sys.path.insert(0, str(ASSETS))
    assets = importlib.import_module("assets")
    row: dict[str, Any] = {"model": model, "what": what}
    with tempfile.TemporaryDirectory() as folder:
        path = source = ASSETS / "models" / f"{model}.onnx"
        if what == PEER:
            copy, data = prepare(model, calib)
            path = copy.with_name(f"{PEER}.onnx")
            found = ask(WORK / f"{PEER}.log", environment(TOOLS[PEER].env), "convert.py", PEER, copy, path, data)
            if "error" in found:
                return row | {"exact": found["error"]}
            row["seconds"] = found["convert_s"]
        elif text:
            path, data = Path(folder) / "out.onnx", assets.calibration(model, calib)
            row["samples"] = len(next(iter(data.values())))
            started = time.perf_counter()
            try:
                graphq.convert(source, path, recipe=parse_recipe(text, "row"), calib=data)
            except graphq.GraphqError as error:  # a gate that is missed, most often
                return row | {"exact": str(error).splitlines()[0]}
            row["seconds"] = time.perf_counter() - started
        row |= {"size_mb": path.stat().st_size / 1e6, "exact": quality(model, source, path, calib, exact=True)[1]}
        row["deployed"] = quality(model, source, path, calib, exact=False)[1]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--only", default="*", help="pattern of '<model> <what>'; other rows of an earlier run stay in the table")
    parser.add_argument("--calib", type=int, default=128)
    arguments = parser.parse_args()
    jobs = [(model, *row) for model in MODELS for row in (*ROWS, *([(PEER, "")] if model == MINILM else []))]
    chosen = [job for job in jobs if fnmatch.fnmatchcase(" ".join(job[:2]), arguments.only)]
    found = {} if arguments.only == "*" else earlier(arguments.out / "weights.csv")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for row in pool.map(partial(measure, calib=arguments.calib), chosen):
            found[row["model"], row["what"]] = row
            print(row, flush=True)
            write([found[job[:2]] for job in jobs if job[:2] in found], len(jobs), arguments)


def earlier(file: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows that an earlier run wrote, by model and ingredients."""
    if not file.exists():
        return {}
    with file.open(newline="", encoding="utf-8") as lines:
        rows: list[dict[str, Any]] = [{key: text for key, text in row.items() if text} for row in csv.DictReader(lines)]
    for row in rows:
        row |= {key: float(row[key]) for key in ("samples", "size_mb", "seconds") if key in row}
    return {(row["model"], row["what"]): row for row in rows}


def write(rows: list[dict[str, Any]], total: int, arguments: argparse.Namespace) -> None:
    """The table, as far as it is measured: a run may be stopped."""
    columns = {"model": "", "what": "", "exact": "", "deployed": "", "size_mb": ".2f", "samples": ".0f", "seconds": ".0f"}
    titles = {"what": "weights", "size_mb": "file MB", "samples": "samples", "seconds": "convert s"}
    lines = ["| " + " | ".join(titles.get(key, key) for key in columns) + " |", "|" + "---|" * len(columns)]
    cells = [[format(row.get(key, ""), form if key in row else "") for key, form in columns.items()] for row in rows]
    lines += ["| " + " | ".join(line) + " |" for line in cells]
    again = "" if arguments.only == "*" else f" The rows `{arguments.only}` are of this run, the others of an earlier one."
    head = [
        "# Weight-only recipes", "",
        f"`python benchmarks/weights.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, graphq {graphq.__version__},",
        f"onnxruntime {ort.__version__}, {platform.machine()}; `samples`: of calibration data, where a recipe reads any or verifies on it.",
        f"{len(rows)} of {total} rows.{again} `deployed`: ONNX Runtime rounds activations of MatMulNBits to 8 bits;",
        "`exact`: it does not.", "",
    ]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "weights.md").write_text("\n".join([*head, *lines, ""]), encoding="utf-8")
    with (arguments.out / "weights.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns), extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
