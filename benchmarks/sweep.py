"""Measure what layer-by-layer passes cost: forward work against depth, memory against its budget, seconds on a real model.

    .venv/bin/python benchmarks/sweep.py [--out benchmarks/results] [--images 256]

- work: a sweep over vision transformers of 2 to 24 blocks that stops at every layer with weights. Multiply-adds of all nodes
  that ran, in units of a float forward pass over the same samples: once when only the current model is read, once when the
  reference's outputs are read as well; and the wall time of the same.
- memory: the same sweep over 12 blocks with several memory budgets: what it holds, what it spills, and the peak RSS.
- seconds: the recipe w4a4-vit on ViT-Tiny; the search for the scales of its layers' inputs; rounding all its weights.

Each has a process of its own. Results: <out>/sweep.md, .csv and .svg. `seconds` is left out where the shared assets are not.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ASSETS = HERE.parents[1] / "shared" / "assets"
VIT = ASSETS / "models" / "vit_tiny_patch16_224.onnx"
BLOCKS = (2, 6, 12, 24)
BUDGETS_MB = (2048, 128, 32, 0)
TOKENS, WIDTH, HEADS, SAMPLES = 197, 192, 3, 32
BAR = 2.5
"""Float forward passes that a sweep may cost, at any depth."""

Row = dict[str, Any]


# ---- jobs, each in a process of its own -----------------------------------------------------------------------------


def transformer(blocks: int) -> Any:
    """A vision transformer without its first convolution, with random weights: [N, 197, 192] tokens in and out."""
    import numpy as np
    import onnx
    from onnx import helper, numpy_helper

    rng, nodes, weights = np.random.default_rng(0), [], []

    def constant(name: str, array: Any) -> str:
        weights.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def linear(data: str, inputs: int, outputs: int, name: str) -> str:
        weight = constant(f"{name}_w", (rng.standard_normal((inputs, outputs)) / np.sqrt(inputs)).astype(np.float32))
        return node("Add", [node("MatMul", [data, weight], name), constant(f"{name}_b", np.zeros(outputs, np.float32))], f"{name}_out")

    def norm(data: str, name: str) -> str:
        ones, zeros = constant(f"{name}_g", np.ones(WIDTH, np.float32)), constant(f"{name}_b", np.zeros(WIDTH, np.float32))
        return node("LayerNormalization", [data, ones, zeros], name, axis=-1)

    heads = constant("heads", np.array([0, TOKENS, HEADS, WIDTH // HEADS], np.int64))
    joined, last = constant("joined", np.array([0, TOKENS, WIDTH], np.int64)), "x"
    for b in range(blocks):
        first = norm(last, f"norm1_{b}")
        q, k, v = (node("Reshape", [linear(first, WIDTH, WIDTH, f"{part}_{b}"), heads], f"{part}_heads_{b}") for part in "qkv")
        turned = [node("Transpose", [q], f"q_t_{b}", perm=[0, 2, 1, 3]), node("Transpose", [k], f"k_t_{b}", perm=[0, 2, 3, 1])]
        scores = node("Softmax", [node("MatMul", turned, f"scores_{b}")], f"softmax_{b}", axis=-1)
        mixed = node("MatMul", [scores, node("Transpose", [v], f"v_t_{b}", perm=[0, 2, 1, 3])], f"mixed_{b}")
        flat = node("Reshape", [node("Transpose", [mixed], f"mixed_t_{b}", perm=[0, 2, 1, 3]), joined], f"flat_{b}")
        last = node("Add", [last, linear(flat, WIDTH, WIDTH, f"proj_{b}")], f"residual1_{b}")
        hidden = node("Gelu", [linear(norm(last, f"norm2_{b}"), WIDTH, 4 * WIDTH, f"fc1_{b}")], f"gelu_{b}")
        last = node("Add", [last, linear(hidden, 4 * WIDTH, WIDTH, f"fc2_{b}")], f"residual2_{b}")
    ends = [[helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", TOKENS, WIDTH])] for name in ("x", last)]
    graph = helper.make_graph(nodes, "vit", *ends, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return onnx.shape_inference.infer_shapes(model)


def sweep_job(blocks: str, budget_mb: str, reads: str) -> Row:
    """A sweep over a transformer of so many blocks; `reads` is `current` or `both`."""
    import numpy as np
    import onnx_ir

    import graphq.sweep
    from graphq import ir, linear
    from graphq.calibration import open_calibration
    from graphq.executor import Executor

    model = onnx_ir.from_proto(transformer(int(blocks)))
    x = np.random.default_rng(1).standard_normal((SAMPLES, TOKENS, WIDTH)).astype(np.float32)
    data = open_calibration({"x": x}, ir.inputs(model))
    done = {"multiply_adds": 0.0}

    def multiply_adds(node: ir.Node) -> float:
        """Of one sample: each output of a matrix product sums over the last axis of the first input."""
        if node.op_type != "MatMul":
            return 0.0
        shape, inner = ir.shape_of(node.outputs[0]) or (), (ir.shape_of(node.inputs[0]) or ())[-1]
        return float(np.prod([dim for dim in (*shape[1:], inner) if isinstance(dim, int)], dtype=np.float64))

    class Counting(Executor):
        def __init__(self, model: ir.Model, *args: Any, nodes: Any, **options: Any) -> None:
            super().__init__(model, *args, nodes=nodes, **options)
            self.multiply_adds = sum(map(multiply_adds, nodes))

        def run(self, feeds: Any) -> list[np.ndarray]:
            done["multiply_adds"] += self.multiply_adds * len(next(iter(feeds.values())))
            return super().run(feeds)

    executor = Executor(model)
    for _ in range(2):  # the first run allocates
        started = time.perf_counter()
        for batch in data.batches(graphq.executor.BATCH):
            executor.run(batch)
        forward_s = time.perf_counter() - started
    graphq.sweep.Executor = Counting  # type: ignore[misc]
    stores, init = [], graphq.sweep.Store.__init__
    graphq.sweep.Store.__init__ = lambda self, *args: (init(self, *args), stores.append(self))[0]  # type: ignore[method-assign]
    stops = [node for node in model.graph if linear.is_linear(node)]
    held, started = 0, time.perf_counter()
    for step in graphq.sweep.sweep(model, ir.clone(model), stops, data, memory_budget=int(budget_mb) << 20):
        if reads == "both":
            assert step.y_ref
        held = max(held, stores[0].held)
    return {
        "stops": len(stops), "work": done["multiply_adds"] / (SAMPLES * sum(map(multiply_adds, model.graph))),
        "forward_s": forward_s, "seconds": time.perf_counter() - started, "held_mb": held / 2**20, "spilled_files": stores[0].files,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip


def context(images: str) -> Any:
    """ViT-Tiny and its calibration images."""
    import importlib

    from graphq import ir
    from graphq.calibration import open_calibration
    from graphq.pipeline import PassContext
    from graphq.targets import get_target

    sys.path.insert(0, str(ASSETS))
    model = ir.load(VIT)
    data = open_calibration(importlib.import_module("assets").calibration(VIT.stem, int(images)), ir.inputs(model))
    return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target("onnxruntime"))


def recipe_job(images: str) -> Row:
    """Seconds of each pass of the recipe w4a4-vit."""
    from graphq.pipeline import run_passes
    from graphq.recipe import load_recipe
    from graphq.verify import verify_graph

    records = run_passes(load_recipe("w4a4-vit").passes, context(images), verify_graph)
    return {record.name: record.seconds for record in records}


def search_job(images: str) -> Row:
    """Seconds of searching the scale of each layer's inputs for 4-bit weights (AWQ, SmoothQuant), calibration included."""
    from graphq.passes.migrate import Migrate
    from graphq.passes.normalize import Normalize
    from graphq.pipeline import run_passes
    from graphq.verify import verify_graph

    record = run_passes([Normalize(), Migrate(weight_bits=4)], context(images), verify_graph)[-1]
    return {"scaled": len(record.measurements), "migrate": record.seconds}


def rounding_job(images: str) -> Row:
    """Seconds that each algorithm takes for all weights of ViT-Tiny, scales included; the sums of the rows are there."""
    from dataclasses import replace

    import numpy as np

    from graphq.passes import _layer_rows
    from graphq.passes import _round_math as math
    from graphq.passes.normalize import Normalize
    from graphq.pipeline import run_passes
    from graphq.spec import PerAxis, QuantSpec
    from graphq.verify import verify_graph

    ctx, spent, weights = context(images), dict.fromkeys(("sums", "scales", "rtn", "gptq", "wqer", "greedy"), 0.0), 0
    run_passes([Normalize()], ctx, verify_graph)
    spec = replace(QuantSpec(4, signed=False, symmetric=False), granularity=PerAxis(0))

    def timed(key: str, work: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = work()
        spent[key] += time.perf_counter() - started
        return result

    nodes = [node for node in _layer_rows.candidates(ctx.model) if _layer_rows.refusal(ctx.model, node, ()) is None]
    for step in ctx.sweep(nodes):
        weight = _layer_rows.Layer(step.node).weight()
        weights += weight.size
        train, held = timed("sums", lambda step=step: _layer_rows.collect(step, 0))
        gram = math.damped((train + held).centred_gram, train.count + held.count)
        qparams = timed("scales", lambda weight=weight, gram=gram: math.fit(weight, spec, np.einsum("gdd->gd", gram)))
        grid = math.Grid.of(qparams, spec, weight.shape)
        for name in ("rtn", "gptq", "wqer", "greedy"):
            timed(name, lambda name=name, weight=weight, gram=gram, grid=grid: math.round_weight(name, weight, gram, grid))
    return {"layers": len(nodes), "weights": weights} | spent


JOBS: dict[str, Callable[..., Row]] = {"sweep": sweep_job, "recipe": recipe_job, "search": search_job, "rounding": rounding_job}


# ---- the measurements -----------------------------------------------------------------------------------------------


def ask(job: str, *arguments: object) -> Row:
    """Run a job; `-P` keeps this folder off its import path."""
    command = [sys.executable, "-P", str(HERE / "sweep.py"), "--job", job, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"sweep.py: {shlex.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    row: Row = {"part": job, "arguments": " ".join(map(str, arguments))} | json.loads(done.stdout)
    print(row, file=sys.stderr, flush=True)
    return row


def measure(images: int) -> list[Row]:
    rows = [ask("sweep", blocks, BUDGETS_MB[0], reads) for blocks in BLOCKS for reads in ("current", "both")]
    rows += [ask("sweep", 12, budget, "both") for budget in BUDGETS_MB[1:]]
    return rows + ([ask(job, images) for job in ("recipe", "search", "rounding")] if VIT.exists() else [])


def chosen(rows: list[Row], part: str, arguments: str = "") -> list[Row]:
    return [row for row in rows if row["part"] == part and row["arguments"].endswith(arguments)]


# ---- tables and the plot --------------------------------------------------------------------------------------------


def table(cells: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in [cells[0], ["---"] * len(cells[0]), *cells[1:]]]


def work_table(rows: list[Row]) -> list[str]:
    cells = [["blocks", "stops", "current model only: work", "time / forward", "reference too: work", "time / forward"]]
    for blocks in BLOCKS:
        pair = [next(row for row in rows if row["arguments"] == f"{blocks} {BUDGETS_MB[0]} {reads}") for reads in ("current", "both")]
        cells.append([str(blocks), str(pair[0]["stops"]), *(
            f"{value:.2f}" for row in pair for value in (row["work"], row["seconds"] / row["forward_s"])
        )])  # fmt: skip
    return table(cells)


def memory_table(rows: list[Row]) -> list[str]:
    cells = [["budget MB", "held MB at most", "files", "peak RSS MB", "s"]]
    for budget in BUDGETS_MB:
        row = next(row for row in rows if row["arguments"] == f"12 {budget} both")
        cells.append([str(budget), f"{row['held_mb']:.0f}", str(row["spilled_files"]), f"{row['peak_mb']:.0f}", f"{row['seconds']:.1f}"])
    return table(cells)


def markdown(rows: list[Row], head: list[str]) -> str:
    lines = ["# What a sweep costs", "", *(f"- {line}" for line in head), "", "## Work against depth", ""]
    lines += [f"Multiply-adds of all nodes that ran, in float forward passes over {SAMPLES} samples (bar: {BAR}, at any depth).", ""]
    lines += [*work_table(rows), "", "![work against depth](sweep.svg)", "", "## Memory against its budget, 12 blocks", ""]
    lines += ["The budget covers what the sweep holds between stops; ONNX Runtime and the imports come on top.", "", *memory_table(rows)]
    if recipe := chosen(rows, "recipe"):
        passes = {key: value for key, value in recipe[0].items() if isinstance(value, float)}
        lines += ["", f"## ViT-Tiny, {recipe[0]['arguments']} images: the recipe w4a4-vit", ""]
        passes["all"] = sum(passes.values())
        lines += table([["pass", "s"], *([name, f"{seconds:.1f}"] for name, seconds in passes.items())])
        search = chosen(rows, "search")[0]
        lines += ["", "## Searching the scales of its layers' inputs for 4-bit weights", ""]
        lines += [f"{search['migrate']:.1f} s for all layers, calibration included; {search['scaled']} of them gain enough."]
        found = chosen(rows, "rounding")[0]
        lines += ["", f"## Rounding all {found['weights']:,} weights of its {found['layers']} layers", ""]
        lines += table([["what", "s"], *([name, f"{value:.1f}"] for name, value in found.items() if isinstance(value, float))])
    return "\n".join(lines) + "\n"


def plot(rows: list[Row]) -> str:
    """Work against blocks as SVG: flat lines are what is wanted."""
    width, height, left, bottom, top = 560, 300, 60, 50, 3.0

    def x(blocks: float) -> float:
        return left + (width - left - 130) * blocks / max(BLOCKS)

    def y(work: float) -> float:
        return height - bottom - (height - bottom - 20) * work / top

    parts = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="12">']
    parts.append(f'<rect width="{width}" height="{height}" fill="white"/>')
    for tick in (0, 1, 2, 3):
        parts.append(f'<line x1="{left}" x2="{x(24)}" y1="{y(tick)}" y2="{y(tick)}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y(tick) + 4}" text-anchor="end">{tick}</text>')
    for blocks in BLOCKS:
        parts.append(f'<text x="{x(blocks)}" y="{height - bottom + 18}" text-anchor="middle">{blocks}</text>')
    parts.append(f'<text x="{x(12)}" y="{height - 12}" text-anchor="middle">blocks of the vision transformer</text>')
    parts.append(f'<text x="16" y="{y(1.5)}" text-anchor="middle" transform="rotate(-90 16 {y(1.5)})">float forward passes</text>')
    parts.append(f'<line x1="{left}" x2="{x(24)}" y1="{y(BAR)}" y2="{y(BAR)}" stroke="#c00" stroke-dasharray="4 3"/>')
    parts.append(f'<text x="{x(24) + 8}" y="{y(BAR) + 4}" fill="#c00">bar</text>')
    for reads, colour, label in (("current", "#17c", "current only"), ("both", "#182", "and reference")):
        points = [(x(blocks), y(chosen(rows, "sweep", f"{blocks} {BUDGETS_MB[0]} {reads}")[0]["work"])) for blocks in BLOCKS]
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
    machine = f"CPU: {cpu}, {os.cpu_count()} cores; load average at the start: {load:.1f}"
    date = f"date: {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC; {machine}"
    return [f"command: {shlex.join(['.venv/bin/python', *sys.argv])}", date]


def write(rows: list[Row], head: list[str], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "sweep.md").write_text(markdown(rows, head))
    (folder / "sweep.svg").write_text(plot(rows))
    with (folder / "sweep.csv").open("w", newline="") as file:
        file.writelines(f"# {line}\n" for line in head)
        out = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        out.writeheader()
        out.writerows(rows)


def main() -> int:
    if sys.argv[1:2] == ["--job"]:
        print(json.dumps(JOBS[sys.argv[2]](*sys.argv[3:])))
        return 0
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results", help="folder of sweep.md, sweep.csv and sweep.svg")
    parser.add_argument("--images", type=int, default=256, help="calibration images of the part `seconds`")
    options = parser.parse_args()
    head, rows = header(), measure(options.images)
    write(rows, head, options.out)
    print(markdown(rows, head))
    return 0


if __name__ == "__main__":
    sys.exit(main())
