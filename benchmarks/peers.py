"""Convert real models with graphq and with its peers, each from the same calibration data, and print one table.

    python benchmarks/peers.py [--models a,b] [--tools x,y] [--calib-count 128] [--out benchmarks/results]

Every tool has its own virtual environment (.envs/<env>, made on first use from peers/<env>.txt) and every conversion
its own process (convert.py). Quality and speed (measure.py) and the TensorRT-RTX build (rtx_build.py) run in the
interpreter that runs this file. Converted models and logs stay in .envs/work. Results: <out>/peers.csv and peers.md.
This process stays small and imports no arrays: on Linux a child's peak RSS starts from that of its parent.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert import TOOLS

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "shared" / "assets"
ENVS, WORK = HERE / ".envs", HERE / ".envs" / "work"
MODELS = ("vit_tiny_patch16_224", "mobilenet_v2_1.0_224", "squeezenet1_1", "minilm_l6_stsb")
FLOAT = "float"
TIMEOUT_S = 600

Row = dict[str, Any]

NOTES = f"""\
convert: seconds from file to file in a fresh process, imports left out; peak: its maximum RSS, imports included.
top-1: 500 ImageNet validation images. cos: cosine of float and converted sentence embeddings over 1000 STS-B dev
sentences not used for calibration, mean and minimum; Spearman: all 1500 dev pairs. Speed-up: onnxruntime CPU,
2 threads, float and converted alternating, median of 30 ratios; the row `{FLOAT}` is float against itself and shows
the noise. TensorRT-RTX: ahead-of-time build of the strongly typed network, no GPU needed."""


def spread(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if key in row else ""


def quality(row: Row) -> str:
    text = "cos {cos_mean:.4f} min {cos_min:.3f}, Spearman {spearman:.4f}"
    return spread(row, "top1", "top-1 {:.1f}") or (text.format(**row) if "cos_mean" in row else "")


def size(row: Row) -> str:
    return "{size_mb:.1f} ({ratio:.2f})".format(**row) if "size_mb" in row else ""


def speedup(row: Row) -> str:
    return "{speedup_b1:.2f} / {speedup_b8:.2f}".format(**row) if "speedup_b1" in row else ""


def verdict(row: Row) -> str:
    if "builds" not in row:
        return f"failed: {textwrap.shorten(row['error'], 160)}" if "error" in row else ""
    return "yes" if row["builds"] else f"no: {textwrap.shorten(row['reason'], 110)}"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "model": lambda row: row["model"],
    "tool": lambda row: f"{row['tool']} ({row['remark']})" if row.get("remark") else row["tool"],
    "convert s": lambda row: spread(row, "convert_s", "{:.1f}"),
    "peak MB": lambda row: spread(row, "peak_mb", "{:.0f}"),
    "size MB (ratio)": size,
    "quality": quality,
    "speed-up b1 / b8": speedup,
    "builds with TensorRT-RTX": verdict,
}
CSV_KEYS = [
    *("model", "tool", "convert_s", "import_s", "peak_mb", "size_mb", "ratio"),
    *("top1", "cos_mean", "cos_min", "spearman"),
    *("speedup_b1", "speedup_b8", "latency_ms_b1", "latency_ms_b8"),
    *("builds", "reason", "remark", "error"),
]


def environment(name: str | None) -> str:
    """The interpreter of environment `name`, which is made if its pins are not the ones installed."""
    if name is None:
        return sys.executable
    folder, pins = ENVS / name, HERE / "peers" / f"{name}.txt"
    python, installed = folder / "bin" / "python", folder / "installed.txt"
    if not installed.exists() or installed.read_text() != pins.read_text():
        print(f"environment {name}: installing {pins.name}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", "-r", str(pins)]
        subprocess.run(pip, check=True, stdout=sys.stderr)
        shutil.copyfile(pins, installed)
    return str(python)


def ask(log: Path, python: str, script: str, *arguments: object) -> Row:
    """Run a worker and return the JSON of its stdout; a crash, a timeout or a lack of JSON is an `error`.

    `-P` keeps this folder off the worker's import path, so no tool can import one of our files by accident.
    """
    command = [python, "-P", str(HERE / script), *map(str, arguments)]
    with log.open("a") as stderr:
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, cwd=log.parent, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return {"error": f"{script}: timeout after {TIMEOUT_S} s"}
    if done.returncode or not done.stdout:
        last = (log.read_text(errors="replace").strip().splitlines() or ["no message"])[-1]
        return {"error": f"{script}: exit status {done.returncode}: {last}"}
    answer: Row = json.loads(done.stdout)
    return answer


def prepare(model: str, calib_count: int) -> tuple[Path, Path]:
    """A writable copy of the model in a folder of its own (some tools write beside it), and the calibration file."""
    folder = WORK / model
    folder.mkdir(parents=True, exist_ok=True)
    path, calib = folder / f"{model}.onnx", folder / f"calib{calib_count}.npz"
    shutil.copyfile(ASSETS / "models" / path.name, path)
    command = [sys.executable, str(ASSETS / "assets.py"), "calib", model, str(calib), str(calib_count)]
    subprocess.run(command, check=True)
    return path, calib


def bench(model: str, tool: str, path: Path, calib: Path) -> Row:
    """One row of the table; what fails leaves `error` and the columns before it."""
    row: Row = {"model": model, "tool": tool}
    converted, log = path.with_name(f"{tool}.onnx"), path.with_name(f"{tool}.log")
    log.write_text("")
    if tool == FLOAT:
        converted = path
    else:
        converted.unlink(missing_ok=True)
        try:
            python = environment(TOOLS[tool].env)
        except subprocess.CalledProcessError as error:
            return row | {"error": f"environment: {error}"}
        row |= ask(log, python, "convert.py", tool, path, converted, calib)
    if "error" not in row:
        row |= ask(log, sys.executable, "measure.py", ASSETS, model, path, converted, calib)
    if "error" not in row:
        row |= ask(log, sys.executable, "rtx_build.py", converted, calib)
    if "size_mb" in row:
        row["ratio"] = row["size_mb"] * 1e6 / path.stat().st_size
    return row


def cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def header(rows: list[Row], calib_count: int) -> list[str]:
    """Where, when, with which versions and how the table was made."""
    measured_with = {row[key]: None for key in ("runtime", "builder") for row in rows if key in row}
    versions = {row["tool"]: row["versions"] for row in rows if "versions" in row}
    return [
        f"command: {shlex.join(['python', *sys.argv])}",
        f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; CPU: {cpu()}; "
        f"Python {platform.python_version()}; calibration samples: {calib_count}",
        f"measured with: {', '.join(measured_with)}",
        *(
            f"{tool}: {TOOLS[tool].about}; " + ", ".join(f"{name} {version}" for name, version in found.items())
            for tool, found in versions.items()
        ),
    ]


def markdown(rows: list[Row], calib_count: int) -> str:
    table = [list(COLUMNS), ["---"] * len(COLUMNS)]
    table += [[cell(row).replace("|", "\\|") for cell in COLUMNS.values()] for row in rows]
    lines = ["# INT8 on real models", "", *(f"- {line}" for line in header(rows, calib_count)), "", NOTES, ""]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in table]) + "\n"


def write(rows: list[Row], folder: Path, calib_count: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "peers.md").write_text(markdown(rows, calib_count))
    with (folder / "peers.csv").open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in header(rows, calib_count))
        table = csv.DictWriter(file, CSV_KEYS, extrasaction="ignore")
        table.writeheader()
        table.writerows(rows)


def names(known: list[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        unknown = sorted(set(text.split(",")) - set(known))
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
        return text.split(",")

    return parse


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=names(list(MODELS)), default=list(MODELS), help=",".join(MODELS))
    parser.add_argument("--tools", type=names(list(TOOLS)), default=[tool for tool in TOOLS if TOOLS[tool].bits == 8],
                        help=",".join(TOOLS))  # fmt: skip
    parser.add_argument("--calib-count", type=int, default=128, help="images or sentences to calibrate with")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of peers.csv and peers.md")
    options = parser.parse_args()
    if not (ASSETS / "assets.py").exists():
        print(f"peers.py: no models: {ASSETS}/assets.py is missing; see its MANIFEST.md", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for model in options.models:
        path, calib = prepare(model, options.calib_count)
        for tool in (FLOAT, *options.tools):
            rows.append(bench(model, tool, path, calib))
            print(" | ".join(cell(rows[-1]) for cell in COLUMNS.values()), file=sys.stderr, flush=True)
            write(rows, options.out, options.calib_count)
    print(markdown(rows, options.calib_count))
    return 0


if __name__ == "__main__":
    sys.exit(main())
