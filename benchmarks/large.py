"""Measure what large models cost: peak memory against the largest layer, and float weights compressed a second.

    .venv/bin/python benchmarks/large.py [--out benchmarks/results] [--sizes 0.1 0.3 1.3] [--budgets 256 2048]
                                         [--recipe int4-weight-only] [--scratch DIR]

Synthetic decoders (RMSNorm, rotary positions, causal attention, SwiGLU; random weights of sensible scale) are written layer by
layer as external data into a scratch folder, and `graphq convert` runs on each, with random inputs, in a process of its own.

- peak: the largest resident set of that process, file pages that it maps included, as the kernel counts it; `own` is the largest
  part of it that no file backs, sampled.
- MB/s: float32 megabytes (10^6) of the model over the wall time of the whole command: reading, quantizing, verifying, writing.
- budget: `--memory-budget`. Models with more weights are worked on layer by layer; smaller ones are held whole.

Results: <out>/large.md, .csv and .svg. The scratch folder is removed, also after an error.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

HERE = Path(__file__).resolve().parent
TOKENS, VOCABULARY, HEAD = 32, 32000, 64
BAR_MB, BAR_SPEED = 6000, 60
"""Megabytes that 1.3 billion parameters may take at most, and float megabytes a second that it has to reach at least."""

Row = dict[str, Any]


# ---- models ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decoder:
    """Sizes of a decoder-only transformer."""

    width: int
    hidden: int
    blocks: int
    tied: bool = False

    @property
    def largest(self) -> int:
        """Parameters of the largest layer."""
        return self.width * max(self.hidden, VOCABULARY)

    @property
    def parameters(self) -> int:
        """Of all matrices."""
        return self.blocks * self.width * (4 * self.width + 3 * self.hidden) + (1 if self.tied else 2) * VOCABULARY * self.width


DECODERS = {"0.1": Decoder(768, 2048, 12), "0.3": Decoder(1024, 2816, 22), "1.3": Decoder(2048, 5504, 24)}
"""By billions of parameters, about."""


class Writer:
    """Nodes of a graph, and its weights, which go to the data file one by one."""

    def __init__(self, data: Any, location: str) -> None:
        self.data, self.location = data, location
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []

    def node(self, op: str, inputs: list[str], name: str, count: int = 1, **attributes: Any) -> str:
        outputs = [name] if count == 1 else [f"{name}_{index}" for index in range(count)]
        self.nodes.append(helper.make_node(op, inputs, outputs, name=name, **attributes))
        return outputs[0]

    def constant(self, name: str, array: Any) -> str:
        self.weights.append(onnx.numpy_helper.from_array(np.asarray(array), name))
        return name

    def weight(self, name: str, shape: tuple[int, ...], scale: float) -> str:
        """Normal numbers, the same for the same name and shape."""
        rng, offset = np.random.default_rng([*name.encode()]), self.data.tell()
        for start in range(0, shape[0], 1024):  # never all of a layer
            rows = rng.standard_normal((min(1024, shape[0] - start), *shape[1:]), np.float32)
            np.multiply(rows, np.float32(scale), out=rows).tofile(self.data)
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.location), ("offset", offset), ("length", self.data.tell() - offset)):
            tensor.external_data.add(key=key, value=str(value))
        self.weights.append(tensor)
        return name

    def linear(self, x: str, name: str, inputs: int, outputs: int, gain: float = 1.0) -> str:
        return self.node("MatMul", [x, self.weight(f"{name}_w", (inputs, outputs), gain / np.sqrt(inputs))], name)

    def norm(self, x: str, name: str, width: int) -> str:
        mean = self.node("ReduceMean", [self.node("Mul", [x, x], f"{name}_square"), "last"], f"{name}_mean")
        root = self.node("Sqrt", [self.node("Add", [mean, "epsilon"], f"{name}_shifted")], f"{name}_root")
        gain = self.constant(f"{name}_gain", np.ones(width, np.float32))
        return self.node("Mul", [self.node("Div", [x, root], f"{name}_unit"), gain], name)

    def rotated(self, x: str, name: str) -> str:
        """Rotary positions: pairs of features turn with the position (Su et al., arXiv 2104.09864)."""
        first = self.node("Split", [x], f"{name}_half", 2, axis=3, num_outputs=2)
        swapped = self.node("Concat", [self.node("Neg", [f"{name}_half_1"], f"{name}_neg"), first], f"{name}_swapped", axis=3)
        return self.node("Add", [self.node("Mul", [x, "cos"], f"{name}_cos"), self.node("Mul", [swapped, "sin"], f"{name}_sin")], name)

    def block(self, x: str, name: str, sizes: Decoder) -> str:
        width, gain = sizes.width, 1 / np.sqrt(2 * sizes.blocks)
        h = self.norm(x, f"{name}_norm1", width)
        parts = [self.linear(h, f"{name}_{key}", width, width) for key in "qkv"]
        split = [self.node("Reshape", [part, "heads"], f"{part}_heads") for part in parts]
        q, k, v = (self.node("Transpose", [part], f"{part}_first", perm=[0, 2, 1, 3]) for part in split)
        k = self.node("Transpose", [self.rotated(k, f"{name}_k_turned")], f"{name}_k_last", perm=[0, 1, 3, 2])
        q = self.node("Mul", [self.rotated(q, f"{name}_q_turned"), "scale"], f"{name}_q_scaled")
        masked = self.node("Add", [self.node("MatMul", [q, k], f"{name}_scores"), "mask"], f"{name}_masked")
        shares = self.node("Softmax", [masked], f"{name}_shares", axis=-1)
        mixed = self.node("Transpose", [self.node("MatMul", [shares, v], f"{name}_mixed")], f"{name}_mixed_last", perm=[0, 2, 1, 3])
        attended = self.linear(self.node("Reshape", [mixed, "joined"], f"{name}_joined"), f"{name}_o", width, width, gain)
        x = self.node("Add", [x, attended], f"{name}_attended")
        h = self.norm(x, f"{name}_norm2", width)
        gate = self.linear(h, f"{name}_gate", width, sizes.hidden)
        gate = self.node("Mul", [gate, self.node("Sigmoid", [gate], f"{name}_sigmoid")], f"{name}_silu")
        h = self.node("Mul", [gate, self.linear(h, f"{name}_up", width, sizes.hidden)], f"{name}_hidden")
        return self.node("Add", [x, self.linear(h, f"{name}_down", sizes.hidden, width, gain)], f"{name}_out")


def write_decoder(path: Path, sizes: Decoder) -> None:
    """Write a decoder of `TOKENS` tokens: `ids` int64 [N, T] in, `logits` float32 [N, T, V] out."""
    width = sizes.width
    angles = np.arange(TOKENS)[:, None] / 10000 ** (np.arange(HEAD // 2) / (HEAD // 2))
    angles = np.concatenate([angles, angles], 1).astype(np.float32)
    shapes = {"heads": [0, 0, width // HEAD, HEAD], "joined": [0, 0, width], "last": [-1]}
    floats = {"cos": np.cos(angles), "sin": np.sin(angles), "epsilon": np.float32(1e-6), "scale": np.float32(HEAD**-0.5),
              "mask": np.triu(np.full((TOKENS, TOKENS), -1e9, np.float32), 1)}  # fmt: skip
    with path.with_suffix(".data").open("wb") as data:
        writer = Writer(data, path.with_suffix(".data").name)
        for name, array in {**{key: np.array(value, np.int64) for key, value in shapes.items()}, **floats}.items():
            writer.constant(name, array)
        table = writer.weight("table", (VOCABULARY, width), 1.0)
        x = writer.node("Gather", [table, "ids"], "embedded")
        for index in range(sizes.blocks):
            x = writer.block(x, f"block{index}", sizes)
        x = writer.norm(x, "norm", width)
        if sizes.tied:
            writer.node("MatMul", [x, writer.node("Transpose", [table], "turned", perm=[1, 0])], "logits")
        else:
            writer.nodes[-1].output[0] = x
            writer.linear(x, "logits", width, VOCABULARY)
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["N", TOKENS])
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", TOKENS, VOCABULARY])
    graph = helper.make_graph(writer.nodes, "decoder", [ids], [logits], writer.weights)
    path.write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString())


# ---- the measurement ------------------------------------------------------------------------------------------------


def convert(model: Path, recipe: str, budget_mb: int) -> Row:
    """Run `graphq convert` on `model` and watch its memory. What it writes is removed."""
    folder = model.parent / "result"
    folder.mkdir()
    command = [sys.executable, "-m", "graphq", "convert", str(model), "--out", str(folder / "out.onnx"), "--recipe", recipe,
               "--memory-budget", f"{budget_mb}MB", "--report", str(folder), "--quiet"]  # fmt: skip
    started, own = time.perf_counter(), 0.0
    child = subprocess.Popen(command)
    try:
        while os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None:
            own = max(own, anonymous_mb(child.pid))
            time.sleep(0.05)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if child.returncode is None:
            child.kill()
            child.wait()
    seconds = time.perf_counter() - started
    if child.returncode:
        raise SystemExit(f"large.py: {shlex.join(command)} failed with status {child.returncode}")
    report = json.loads((folder / "report.json").read_text())
    shutil.rmtree(folder)
    return {
        "seconds": seconds, "cpu_s": usage.ru_utime + usage.ru_stime, "peak_mb": usage.ru_maxrss * 1024 / 1e6, "own_mb": own,
        **{f"{stage}_s": value for stage, value in report["seconds"].items()}, "result_mb": report["output"]["bytes"] / 1e6,
        "cosine": report["comparison"][0]["cosine"], "whole": report["latency"] is not None,
    }  # fmt: skip


def anonymous_mb(process: int) -> float:
    """Resident memory of a process that no file backs, now; 0 if it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0.0
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("RssAnon")), 0.0)


def measure(sizes: list[str], budgets: list[int], recipe: str, scratch: Path | None) -> list[Row]:
    rows = []
    if scratch:
        scratch.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="graphq-large-", dir=scratch) as folder:
            sizes_of, model = DECODERS[size], Path(folder) / "decoder.onnx"
            need, free = 4 * sizes_of.parameters * 1.5, shutil.disk_usage(folder).free
            if free < need:
                raise SystemExit(f"large.py: {folder} has {free / 1e9:.1f} GB free, {size} billion parameters need {need / 1e9:.1f} GB")
            write_decoder(model, sizes_of)
            float_mb = model.with_suffix(".data").stat().st_size / 1e6
            for budget in budgets:
                row: Row = {"size": size, "budget_mb": budget, "float_mb": float_mb, "largest_mb": 4e-6 * sizes_of.largest}
                row |= convert(model, recipe, budget)
                row["mb_s"] = float_mb / row["seconds"]
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
    return rows


# ---- tables and the plot --------------------------------------------------------------------------------------------


def markdown(rows: list[Row], head: list[str]) -> str:
    lines = ["# What large models cost", "", *(f"- {line}" for line in head), ""]
    lines += [f"Bars for 1.3 billion parameters: {BAR_MB} MB at most, {BAR_SPEED} MB/s at least. The largest layer counts as float32.", ""]
    columns = ["parameters (10^9)", "float MB", "largest layer MB", "budget MB", "peak MB", "own MB", "s", "MB/s", "CPU s",
               "load / passes / verify / emit s", "result MB", "cosine", "ran"]  # fmt: skip
    lines += [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    for row in rows:
        stages = " / ".join(f"{row[f'{stage}_s']:.1f}" for stage in ("load", "passes", "verify", "emit"))
        cells = [row["size"], f"{row['float_mb']:.0f}", f"{row['largest_mb']:.0f}", str(row["budget_mb"]), f"{row['peak_mb']:.0f}",
                 f"{row['own_mb']:.0f}", f"{row['seconds']:.1f}", f"{row['mb_s']:.0f}", f"{row['cpu_s']:.1f}", stages,
                 f"{row['result_mb']:.0f}", f"{row['cosine']:.5f}", "whole" if row["whole"] else "in segments"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "![peak memory against the size of the model](large.svg)", ""])


def plot(rows: list[Row]) -> str:
    """Peak memory against the float size of the model as SVG, beside the float size itself and the largest layer."""
    width, height, left, bottom = 600, 320, 60, 50
    right, top = max(row["float_mb"] for row in rows), max(BAR_MB, *(row["peak_mb"] for row in rows))

    def x(size: float) -> float:
        return left + (width - left - 150) * size / right

    def y(memory: float) -> float:
        return height - bottom - (height - bottom - 20) * memory / top

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for tick in range(0, int(top) + 1, 1000):
        parts.append(f'<line x1="{left}" x2="{x(right):.1f}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick}</text>')
    parts.append(f'<line x1="{left}" x2="{x(right):.1f}" y1="{y(BAR_MB):.1f}" y2="{y(BAR_MB):.1f}" stroke="#c00" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{x(right) + 8:.1f}" y="{y(BAR_MB) + 4:.1f}" fill="#c00">bar</text>')
    for size, megabytes in dict((row["size"], row["float_mb"]) for row in rows).items():
        parts.append(f'<text x="{x(megabytes):.1f}" y="{height - bottom + 18}" text-anchor="middle">{size}</text>')
    parts.append(f'<text x="{x(right / 2):.1f}" y="{height - 12}" text-anchor="middle">billions of parameters, by float megabytes</text>')
    parts.append(f'<text x="14" y="{y(top / 2):.1f}" text-anchor="middle" transform="rotate(-90 14 {y(top / 2):.1f})">megabytes</text>')
    budgets = sorted({row["budget_mb"] for row in rows})
    series = [(f"peak, budget {budget} MB", colour, "peak_mb", [row for row in rows if row["budget_mb"] == budget])
              for budget, colour in zip(budgets, itertools.cycle(("#17c", "#182", "#a50", "#808")), strict=False)]  # fmt: skip
    series.append(("largest layer", "#777", "largest_mb", series[0][3]))
    for label, colour, key, chosen in series:
        points = sorted((x(row["float_mb"]), y(row[key])) for row in chosen)
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts += [f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{colour}"/>' for px, py in points]
        parts.append(f'<text x="{points[-1][0] + 8:.1f}" y="{points[-1][1] + 4:.1f}" fill="{colour}">{label}</text>')
    return "\n".join([*parts, "</svg>", ""])


def header() -> list[str]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    cpu, load = names[0] if names else platform.processor(), os.getloadavg()[0]
    date, machine = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC", f"{cpu}, {os.cpu_count()} cores"
    command = shlex.join([".venv/bin/python", *sys.argv])
    return [f"command: {command}", f"date: {date}; CPU: {machine}; load average at the start: {load:.1f}"]


def write(rows: list[Row], head: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "large.md").write_text(markdown(rows, head))
    (folder / "large.svg").write_text(plot(rows))
    with (folder / "large.csv").open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in head)
        out = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        out.writeheader()
        out.writerows(rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of large.md, large.csv and large.svg")
    parser.add_argument("--sizes", nargs="+", choices=DECODERS, default=list(DECODERS), help="billions of parameters")
    parser.add_argument("--budgets", nargs="+", type=int, default=[256, 2048], help="memory budgets in MB")
    parser.add_argument("--recipe", default="int4-weight-only")
    parser.add_argument("--scratch", type=Path, help="where models are written, 1.5 times their float size at most")
    options = parser.parse_args()
    head = [*header(), f"recipe: {options.recipe}"]
    rows = measure(options.sizes, options.budgets, options.recipe, options.scratch)
    write(rows, head, options.out)
    print(markdown(rows, head))
    return 0


if __name__ == "__main__":
    sys.exit(main())
