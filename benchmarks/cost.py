"""Measure what graphq costs, in seconds and in memory, and print the tables.

    .venv/bin/python benchmarks/cost.py [--out benchmarks/results] [--parts ranges,chain,io] [--rounds 3] [--tmp DIR]

- ranges: normalize and insert-qdq with each range estimator, from 64 and from 512 images, in rounds; ratios are within a round.
- chain: what happens before the first calibration batch of a chain of 2,000 small layers (4,000 activations), and the
  whole conversion of chains of 500, 1,000 and 2,000.
- io: reading and writing a model of 2.68 GB in external data, and its weight-only conversion.

Every measurement has a process of its own (cost_worker.py); its imports are left out of the seconds, not of the memory.
This process stays small and imports no arrays: on Linux a child's peak RSS starts from that of its parent. Results:
<out>/cost.md and cost.csv. Needs 8 GB of free disk in --tmp, for the part io.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "shared" / "assets"
MODELS = ("vit_tiny_patch16_224", "mobilenet_v2_1.0_224")
RANGES = ("min-max", "percentile", "mse", "entropy")
IMAGES = (64, 512)
LAYERS = (500, 1000, 2000)
TIMEOUT_S = 900

TIME_BAR, MEMORY_BAR = 1.3, 1.1  # ratios to min-max of the same round; memory also to 64 images
PREPARE_BAR_S, IO_BAR_S, IO_BAR_MB = 2.0, 5.0, 300.0

Row = dict[str, Any]
Rows = list[Row]


def ask(job: str, *arguments: object) -> Row:
    """Run a job of cost_worker.py; `-P` keeps this folder off its import path."""
    command = [sys.executable, "-P", str(HERE / "cost_worker.py"), job, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    if done.returncode or not done.stdout:
        raise SystemExit(f"cost.py: {shlex.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    answer: Row = json.loads(done.stdout)
    return answer


def note(text: str) -> None:
    print(f"{datetime.datetime.now():%H:%M:%S} {text}", file=sys.stderr, flush=True)


# ---- the parts ------------------------------------------------------------------------------------------------------


def measure_ranges(folder: Path, rounds: int) -> Rows:
    """One row a conversion, and one row a model and estimator for the scales that differ from min-max's."""
    rows: Rows = []
    for model in MODELS:
        for images in IMAGES:
            calib = folder / f"calib{images}.npz"
            ask("make-calibration", ASSETS, model, images, calib)
            for index in range(rounds):
                for ranges in RANGES if index % 2 == 0 else RANGES[::-1]:
                    out = folder / f"{ranges}.onnx"
                    answer = ask("convert", ASSETS / "models" / f"{model}.onnx", calib, ranges, out)
                    rows.append({"part": "ranges", "model": model, "case": ranges, "size": images, "round": index} | answer)
                    spent = f"{answer['seconds']:.2f} s, {answer['cpu_s']:.1f} s CPU, {answer['peak_mb']:.0f} MB"
                    note(f"{model} {images} images {ranges}: {spent}")
            for ranges in RANGES[1:]:
                answer = ask("scales", folder / "min-max.onnx", folder / f"{ranges}.onnx")
                rows.append({"part": "scales", "model": model, "case": ranges, "size": images} | answer)
            calib.unlink()
    return rows


def measure_chain(folder: Path, rounds: int) -> Rows:
    rows: Rows = []
    for layers in LAYERS:
        path = folder / f"chain{layers}.onnx"
        ask("make-chain", layers, path)
        for index in range(rounds):
            answer = ask("prepare", path)
            rows.append({"part": "prepare", "model": "chain", "case": "prepare", "size": layers, "round": index} | answer)
            note(f"prepare {layers} layers: {answer['seconds']:.2f} s, {answer['all_s']:.2f} s with all taps")
        answer = ask("convert", path, "random", "min-max", folder / "out.onnx")
        rows.append({"part": "chain", "model": "chain", "case": "convert", "size": layers, "round": 0} | answer)
        note(f"convert {layers} layers: {answer['seconds']:.2f} s")
    return rows


def measure_io(folder: Path, rounds: int) -> Rows:
    """The page cache is warm: the file has just been written, and a first round is not counted."""
    path, rows = folder / "big.onnx", list[Row]()
    size = ask("make-big", path)["gb"]
    for index in range(-1, rounds):
        answer = ask("load-save", path, folder / "copy.onnx")
        remove(folder, "copy.onnx*")
        if index >= 0:
            rows.append({"part": "io", "model": "big", "case": "load + save", "size": size, "round": index} | answer)
            note(f"load {answer['load_s']:.2f} s, save {answer['save_s']:.2f} s, {answer['peak_mb']:.0f} MB")
    answer = ask("weights", path, folder / "int4.onnx", "int4-weight-only")
    rows.append({"part": "io", "model": "big", "case": "int4-weight-only", "size": size, "round": 0} | answer)
    note(f"int4-weight-only: {answer['seconds']:.1f} s, {answer['peak_mb']:.0f} MB")
    remove(folder, "int4.onnx*")
    remove(folder, "big.*")
    return rows


def remove(folder: Path, pattern: str) -> None:
    for path in folder.glob(pattern):
        path.unlink()


PARTS: dict[str, Callable[[Path, int], Rows]] = {"ranges": measure_ranges, "chain": measure_chain, "io": measure_io}


# ---- tables ---------------------------------------------------------------------------------------------------------


def chosen(rows: Iterable[Row], **wanted: Any) -> Rows:
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def median(rows: Rows, key: str) -> float:
    return statistics.median(row[key] for row in rows)


def verdict(value: float, bar: float, form: str = "{:.2f}") -> str:
    return form.format(value) if value <= bar else f"**{form.format(value)}**"


def ratio(rows: Rows, base: Rows, key: str) -> float:
    """Median over the rounds of the ratio within a round."""
    of_round = {row["round"]: row[key] for row in base}
    return statistics.median(row[key] / of_round[row["round"]] for row in rows)


def fastest(rows: Rows) -> float:
    return min(float(row["seconds"]) for row in rows)


def ranges_table(rows: Rows) -> list[str]:
    cells = [["model", "images", "ranges", "s", "s / min-max", "fastest s (/ min-max)", "CPU s (/ min-max)"]]
    cells[0] += ["peak MB", "MB / min-max", "MB / 64 images", "scales that differ", "narrower"]
    for model in MODELS:
        for images in IMAGES:
            base = chosen(rows, part="ranges", model=model, size=images, case="min-max")
            for ranges in RANGES:
                own = chosen(rows, part="ranges", model=model, size=images, case=ranges)
                few = chosen(rows, part="ranges", model=model, size=IMAGES[0], case=ranges)
                found = chosen(rows, part="scales", model=model, size=images, case=ranges)
                scales = [f"{row['differ']} of {row['common']}" for row in found] + [str(row["narrower"]) for row in found]
                cells.append([
                    model, str(images), ranges, f"{median(own, 'seconds'):.2f}", verdict(ratio(own, base, "seconds"), TIME_BAR),
                    f"{fastest(own):.2f} ({fastest(own) / fastest(base):.2f})",
                    f"{median(own, 'cpu_s'):.1f} ({ratio(own, base, 'cpu_s'):.2f})",
                    f"{median(own, 'peak_mb'):.0f}", verdict(ratio(own, base, "peak_mb"), MEMORY_BAR),
                    verdict(ratio(own, few, "peak_mb"), MEMORY_BAR), *(scales or ["", ""]),
                ])  # fmt: skip
    return ["## Range estimators, recipe normalize + insert-qdq", "",
            f"Medians over rounds; ratios are within a round. Bars: time at most {TIME_BAR} x min-max, memory at most {MEMORY_BAR} x "
            f"min-max and {MEMORY_BAR} x that of 64 images. The calibration file is read inside the "
            "conversion. What else runs on the machine only ever adds: where the median is far from the fastest "
            "of the rounds, its ratio says little; CPU seconds are of all threads.", "", *table(cells)]  # fmt: skip


def chain_table(rows: Rows) -> list[str]:
    cells = [["layers", "taps", "normalize s", "placement s", "session s", "before the first batch s",
              "with every activation tapped (taps) s", "whole conversion s", "of it passes / verify / emit s", "peak MB"]]  # fmt: skip
    for layers in LAYERS:
        own, whole = chosen(rows, part="prepare", size=layers), chosen(rows, part="chain", size=layers)[0]
        bar = PREPARE_BAR_S if layers == LAYERS[-1] else float("inf")
        cells.append([
            str(layers), str(own[0]["taps"]), *(f"{median(own, f'{part}_s'):.2f}" for part in ("normalize", "placement", "session")),
            verdict(median(own, "seconds"), bar), f"{verdict(median(own, 'all_s'), bar)} ({own[0]['all_taps']})", f"{whole['seconds']:.1f}",
            " / ".join(f"{whole[f'{part}_s']:.1f}" for part in ("passes", "verify", "emit")), f"{whole['peak_mb']:.0f}",
        ])  # fmt: skip
    return ["## A chain of small layers (MatMul 8x8, Relu): twice as many activations as layers", "",
            f"Bar: at most {PREPARE_BAR_S:.0f} s before the first calibration batch at {LAYERS[-1]} layers. Its parts: loading, normalize, "
            "placement, the session with its taps; the recipe taps the MatMul inputs, the other column taps everything.",
            "", *table(cells)]  # fmt: skip


def io_table(rows: Rows) -> list[str]:
    cells = [["what", "GB in", "load s", "save s", "s in all", "peak MB", "GB out"]]
    own = chosen(rows, part="io", case="load + save")
    cells.append(["load + save", f"{own[0]['size']:.2f}", f"{median(own, 'load_s'):.2f}", f"{median(own, 'save_s'):.2f}",
                  verdict(median(own, "seconds"), IO_BAR_S),
                  verdict(median(own, "peak_mb"), IO_BAR_MB, "{:.0f}"), f"{own[0]['size']:.2f}"])  # fmt: skip
    for row in chosen(rows, part="io", case="int4-weight-only"):
        seconds = [f"{row['load_s']:.2f}", "", f"{row['seconds']:.1f}"]
        cells.append([row["case"], f"{row['size']:.2f}", *seconds, f"{row['peak_mb']:.0f}", f"{row['gb']:.2f}"])
    return ["## A model of more than 2 GB", "",
            f"Bars for load + save: {IO_BAR_S:.0f} s and {IO_BAR_MB:.0f} MB. The conversion runs the model, original and result, "
            "to verify it; no bar.", "", *table(cells)]  # fmt: skip


def table(cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]]]


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def header(versions: Row, load: float) -> list[str]:
    return [
        f"command: {shlex.join(['.venv/bin/python', *sys.argv])}",
        f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; CPU: {cpu()}; load average at the start: {load:.1f}",
        f"Python {platform.python_version()}; " + ", ".join(f"{name} {version}" for name, version in versions.items()),
    ]


TABLES: dict[str, Callable[[Rows], list[str]]] = {"ranges": ranges_table, "chain": chain_table, "io": io_table}


def markdown(rows: Rows, parts: list[str], head: list[str]) -> str:
    intro = "Seconds without imports, peak RSS with them, each conversion in a fresh process. **Bold**: misses its bar."
    lines = ["# What graphq costs", "", *(f"- {line}" for line in head), "", intro]
    for part in parts:
        lines += ["", *TABLES[part](rows)]
    return "\n".join(lines) + "\n"


def write(rows: Rows, parts: list[str], head: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "cost.md").write_text(markdown(rows, parts, head))
    with (folder / "cost.csv").open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in head)
        out = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        out.writeheader()
        out.writerows(rows)


def some_parts(text: str) -> list[str]:
    unknown = sorted(set(text.split(",")) - set(PARTS))
    if unknown:
        raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(PARTS)}")
    return text.split(",")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of cost.md and cost.csv")
    parser.add_argument("--parts", type=some_parts, default=list(PARTS), help=",".join(PARTS))
    parser.add_argument("--rounds", type=int, default=3, help="runs of each measurement")
    parser.add_argument("--tmp", type=Path, default=None, help="where temporary files go (8 GB); removed afterwards")
    options = parser.parse_args()
    needed = [ASSETS / "assets.py", *(ASSETS / "models" / f"{model}.onnx" for model in MODELS)]
    missing = [path for path in needed if not path.exists()]
    if "ranges" in options.parts and missing:
        print(f"cost.py: no models: {missing[0]} is missing; the part `ranges` needs it (or give --parts chain,io)", file=sys.stderr)
        return 2
    head, rows = header(ask("versions"), os.getloadavg()[0]), list[Row]()
    if options.tmp is not None:
        options.tmp.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="graphq-cost-", dir=options.tmp) as name:
        for index, part in enumerate(options.parts):
            rows += PARTS[part](Path(name), options.rounds)
            write(rows, options.parts[: index + 1], head, options.out)
    print(markdown(rows, options.parts, head))
    return 0


if __name__ == "__main__":
    sys.exit(main())
