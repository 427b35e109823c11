"""Measure what learning by gradient descent adds to closed forms, and print one table.

    .venv/bin/python benchmarks/reconstruction.py [--out benchmarks/results] [--only PATTERN] [--seeds 3] [--steps 100] [--batch 16]
    .venv/bin/python benchmarks/reconstruction.py --vit-tiny [--budget 1800] [--calib 256] [--only PATTERN]

digits_vit at 4 and 3 bits of weights and activations: the closed-form recipe, with `reconstruct` behind it, and with `sos` instead of
its rounding. digits_cnn with sparse weights: pruned by magnitude, pruned and refitted in closed form, and distilled with and without
SpRe's branch; `recovered` is the share of what magnitude loses that is not lost. Each seed calibrates on 256 images of its own, of
the train split; accuracy is top-1 on the 450 images of the test split, mean over seeds, least and most behind it. --vit-tiny measures
ViT-Tiny instead (500 images, see lowbit.py), learning for so many seconds. Results: <out>/reconstruction.md and reconstruction.csv.
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
from pathlib import Path

import numpy as np
import onnxruntime as ort
import tables
import torch

import graphq
from graphq.models import digits, onnx_path
from graphq.recipe import parse_recipe

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
TINY = "vit_tiny_patch16_224"
CALIB = 256
NAMES = ("model", "format", "method")
Key = tuple[str, str, str]


def transformer(bits: int, group: int, *tail: str) -> str:
    """The recipe w4a4-vit at other widths, `tail` in the place of its rounding."""
    head = [
        "normalize", f"ln-reparam: {{bits: {bits}}}", f"sulq-softmax: {{bits: {bits}}}",
        f"dynamic-activations: {{bits: {bits}, symmetric: false}}",
        f"insert-qdq: {{activation_bits: {bits}, weights: false, attention: true, ranges: mse, tables: false, error_samples: 0}}",
    ]  # fmt: skip
    rounding = f"round: {{bits: {bits}, group_size: {group}, repair: true}}"
    return recipe(*head, *(entry.replace("ROUND", rounding).replace("WIDTH", f"bits: {bits}, group_size: {group}") for entry in tail))


def sparse(pattern: str, *tail: str) -> str:
    n, m = pattern.split(":")
    return recipe("normalize", *(entry.replace("PATTERN", f"n: {n}, m: {m}") for entry in tail))


def recipe(*passes: str) -> str:
    return "passes:\n" + "".join(f"  - {entry}\n" for entry in passes) + "gates: {max_size_ratio: 2}\n"


def rows(arguments: argparse.Namespace) -> dict[Key, str]:
    """Recipes by (model, format, method); that of a float model is empty."""
    how = f"batch: {arguments.batch}, steps: {100_000 if arguments.vit_tiny else arguments.steps}"
    how += f", budget_s: {arguments.budget}" * arguments.vit_tiny
    model, found = TINY if arguments.vit_tiny else "digits_vit", dict[Key, str]()
    found[model, "float32", ""] = ""
    for name, bits, group in (("W4A4", 4, 64), ("W3A3", 3, 32)):
        found[model, name, CLOSED] = transformer(bits, group, "ROUND")
        found[model, name, "+ reconstruct"] = transformer(bits, group, "ROUND", f"reconstruct: {{{how}}}")
        found[model, name, "sos"] = transformer(bits, group, f"sos: {{WIDTH, {how}}}")
    if arguments.vit_tiny:
        return found
    magnitude = "nm-prune: {PATTERN, score: magnitude, refit: false}"
    found["digits_cnn", "float32", ""] = ""
    for name in ("2:4", "1:4"):
        found["digits_cnn", name, MAGNITUDE] = sparse(name, magnitude)
        found["digits_cnn", name, "refitted in closed form"] = sparse(name, "nm-prune: {PATTERN}")
        for what, branch, rate in (("distilled", "false", 0.01), ("distilled", "false", 0.02), ("spre-finetune", "true", 0.01),
                                   ("spre-finetune", "true", 0.02)):  # fmt: skip
            tail = f"spre-finetune: {{branch: {branch}, rate: {rate}, {how}}}"
            found["digits_cnn", name, f"magnitude + {what}, rate {rate}"] = sparse(name, magnitude, tail)
        tail = f"spre-finetune: {{rate: 0.01, {how}}}"
        found["digits_cnn", name, "refitted + spre-finetune, rate 0.01"] = sparse(name, "nm-prune: {PATTERN}", tail)
    return found


CLOSED, MAGNITUDE = "closed form", "magnitude"


def measure(key: Key, text: str, seed: int, arguments: argparse.Namespace) -> tables.Row:
    """One line of the CSV file."""
    model = key[0]
    row: tables.Row = {**dict(zip(NAMES, key, strict=True)), "seed": str(seed)}
    assets = None
    if model == TINY:
        sys.path.insert(0, str(ASSETS))
        assets = importlib.import_module("assets")
    with tempfile.TemporaryDirectory() as folder:
        path = source = ASSETS / "models" / f"{model}.onnx" if assets else onnx_path(model)
        if text:
            path, started = Path(folder) / "out.onnx", time.perf_counter()
            calib = assets.calibration(model, arguments.calib) if assets else digits.images("train")[0][seed * CALIB : (seed + 1) * CALIB]
            report = graphq.convert(source, path, recipe=parse_recipe(text, "row"), calib=calib, seed=seed)
            row |= {"sqnr_db": report.comparison[0].sqnr_db, "seconds": time.perf_counter() - started}
        options = ort.SessionOptions()
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
        session = ort.InferenceSession(path, options)
        return row | {"accuracy": assets.top1(session, model) if assets else digits.accuracy(session)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--only", default="*", help="pattern of '<model> <format> <method>'; other rows stay as they were")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--vit-tiny", action="store_true")
    parser.add_argument("--budget", type=float, default=1800)
    parser.add_argument("--calib", type=int, default=CALIB)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = tables.earlier(arguments.out / "reconstruction.csv", [*NAMES, "seed"])
    mine = rows(arguments)
    for seed in range(1 if arguments.vit_tiny else arguments.seeds):
        for key, text in mine.items():
            if fnmatch.fnmatchcase(" ".join(key), arguments.only) and (text or not seed):
                found[*key, str(seed)] = measure(key, text, seed, arguments)
                print(found[*key, str(seed)], flush=True)
                write(found, arguments)


def write(found: dict[tuple[str, ...], tables.Row], arguments: argparse.Namespace) -> None:
    """A line of CSV for each seed, and a table of means, as far as it is measured: a run may be stopped."""
    columns = {key: (key, "") for key in (*NAMES, "seed", "accuracy", "sqnr_db", "seconds")}
    tables.write(arguments.out, "reconstruction", [], list(found.values()), columns)
    lines = ["| model | format | method | seeds | accuracy | least, most | SQNR dB | recovered | convert s |", "|" + "---|" * 9]
    order = {key: index for index, key in enumerate(dict.fromkeys(key[:3] for key in found))}
    for key in sorted(order, key=lambda key: (key[0], order[key])):
        mine = [row for one, row in found.items() if one[:3] == key]
        accuracy = [row["accuracy"] for row in mine]
        means = {name: np.mean([row[name] for row in mine]) for name in ("sqnr_db", "seconds") if all(name in row for row in mine)}
        floats = found.get((key[0], "float32", "", "0"))
        worst = [row["accuracy"] for one, row in found.items() if one[:3] == (key[0], key[1], MAGNITUDE)]
        recovered = ""
        if worst and floats and key[2] != MAGNITUDE and floats["accuracy"] > np.mean(worst):
            recovered = f"{(np.mean(accuracy) - np.mean(worst)) / (floats['accuracy'] - np.mean(worst)):.0%}"
        spread = f"{min(accuracy):.1f}, {max(accuracy):.1f}" if len(mine) > 1 else ""
        numbers = [format(means[name], style) if name in means else "" for name, style in (("sqnr_db", ".1f"), ("seconds", ".0f"))]
        cells = [*key, str(len(mine)), f"{np.mean(accuracy):.1f}", spread, numbers[0], recovered, numbers[1]]
        lines.append(f"| {' | '.join(cells)} |")
    head = [
        "# Learning by gradient descent, beside closed forms", "",
        f"`python benchmarks/reconstruction.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, graphq {graphq.__version__},",
        f"torch {torch.__version__}, onnxruntime {ort.__version__}, {platform.machine()}; other rows are of earlier runs.",
        "Accuracy: top-1 in percent. Recovered: of the accuracy that pruning by magnitude loses. Seconds: of a machine that did more.",
        "",
    ]  # fmt: skip
    (arguments.out / "reconstruction.md").write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
