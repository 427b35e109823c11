"""Build TensorRT-RTX engines of real models under recipes for GPUs, without a GPU, and write down what the builder made of each.

    .venv/bin/python benchmarks/engines.py [--out benchmarks/results] [--samples 32]

For every model and recipe: whether the engine is built, or who refuses it with which reason; the linear nodes by the operand types
that they got in the plan (`asked -> got` where the builder took others); its layers; how far the model that it is built from is from
the original on held-back samples, run by ONNX's definitions on a CPU; sizes and seconds. Then: how fast recipes are refused that
the target cannot express, before any calibration. Engines are built, not run: speed is not shown here.

Results: <out>/engines.md and .csv. Needs the shared assets and TensorRT-RTX.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib
import importlib.metadata
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import graphq
from graphq.errors import GraphqError, TargetError, VerifyError
from graphq.recipe import parse_recipe

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
TARGET = "tensorrt-rtx"
MODELS = {
    "ViT-Tiny": "vit_tiny_patch16_224", "MobileNetV2": "mobilenet_v2_1.0_224", "MiniLM": "minilm_l6_stsb", "ESPCN": "espcn_x3",
    "IMDN": "imdn_x2",
}  # fmt: skip
RECIPES = ("int8", "int8-fp16", "int4-weight-only", "w4a4-vit", "fp16", "bf16", "fp8", "nvfp4")
ILLEGAL = {
    "2-bit weights": "quantize-weights: {bits: 2}",
    "unsigned 4-bit weights with zero points": "round: {bits: 4, layers: all, symmetric: false}",
    "graphq's plugins": "quantize-weights: {bits: 4}\n- lower",
    "a latency budget that nothing here can measure": "mixed-precision: {latency: 0.5}\n- insert-qdq",
}
Row = dict[str, Any]


def build(name: str, recipe: str, calib: Any, folder: Path) -> Row:
    """One engine, or the reason why there is none."""
    row: Row = {"model": name, "recipe": recipe}
    started = time.perf_counter()
    try:
        found = graphq.convert(
            ASSETS / "models" / f"{MODELS[name]}.onnx", folder / "m.engine", recipe=recipe, calib=calib, target=TARGET, emit="engine",
            limits={"min_cosine": None, "max_size_ratio": None},
        )  # fmt: skip
    except (TargetError, VerifyError) as error:
        where = f" ({error.where.splitlines()[0][:120]})" if error.where else ""
        return row | {"engine": f"refused: {error.what}{where}", "seconds": time.perf_counter() - started}
    assert found.engine is not None
    lost = sum(node.is_lost for node in found.engine.nodes)
    return row | {
        "engine": "built", "nodes": "; ".join(f"{count} {kind}" for kind, count in found.engine.counts.items()), "lost": lost,
        "layers": found.engine.layers, "sqnr_db": found.comparison[0].sqnr_db, "engine_mb": found.output.bytes / 1e6,
        "seconds": sum(found.seconds.values()), "build_s": found.seconds["emit"],
    }  # fmt: skip


def refuse(what: str, passes: str, calib: Any, folder: Path) -> Row:
    """Seconds until a recipe is refused, with the words; 0 if it is not."""
    recipe = parse_recipe(f"passes:\n- normalize\n- {passes}\n", what)
    started = time.perf_counter()
    try:
        graphq.convert(ASSETS / "models" / f"{MODELS['ViT-Tiny']}.onnx", folder / "m.onnx", recipe=recipe, calib=calib, target=TARGET)
    except GraphqError as error:
        return {"recipe": what, "seconds": time.perf_counter() - started, "refusal": f"{error.what} ({error.where})"}
    return {"recipe": what, "seconds": 0.0, "refusal": "none"}


def write(rows: list[Row], refusals: list[Row], arguments: argparse.Namespace) -> None:
    arguments.out.mkdir(parents=True, exist_ok=True)
    keys = list(dict.fromkeys(key for row in rows for key in row))
    with (arguments.out / "engines.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, keys)
        table.writeheader()
        table.writerows(rows)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("tensorrt-rtx-cu13", "onnxruntime", "onnx", "graphq"))
    built = sum(row["engine"] == "built" for row in rows)
    lines = [
        "# Engines of TensorRT-RTX", "",
        f"`{shlex.join(['python', *sys.argv])}`, {datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, {versions}, "
        f"{platform.machine()}, no GPU: engines are built, not run.", "",
        f"{built} of {len(rows)} built. Nodes are MatMul, Gemm and Conv by the types of their operands in the builder's plan; *lost* are "
        "those that got floats where they asked for codes. Float x float are products of two activations, and layers that a recipe keeps "
        "float.", "",
        "| model | recipe | engine | nodes by operand types | lost | layers | SQNR dB | engine MB | seconds, build |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for row in rows:
        cells = [row["model"], row["recipe"], row["engine"]]
        if row["engine"] == "built":
            cells += [row["nodes"], row["lost"], row["layers"], f"{row['sqnr_db']:.1f}", f"{row['engine_mb']:.1f}",
                      f"{row['seconds']:.1f}, {row['build_s']:.1f}"]  # fmt: skip
        else:
            cells += ["", "", "", "", "", f"{row['seconds']:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "Refused before calibration, ViT-Tiny:", "", "| recipe | seconds | refusal |", "|---|---|---|"]
    lines += [f"| {row['recipe']} | {row['seconds']:.2f} | {row['refusal']} |" for row in refusals]
    (arguments.out / "engines.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    sys.path.insert(0, str(ASSETS))
    assets = importlib.import_module("assets")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, file in MODELS.items():
            calib = assets.calibration(file, arguments.samples)
            for recipe in RECIPES:
                rows.append(build(name, recipe, calib, Path(folder)))
                print(rows[-1], flush=True)
        calib = assets.calibration(MODELS["ViT-Tiny"], arguments.samples)
        refuse("warm up", ILLEGAL["2-bit weights"], calib, Path(folder))
        refusals = [refuse(what, passes, calib, Path(folder)) for what, passes in ILLEGAL.items()]
    write(rows, refusals, arguments)


if __name__ == "__main__":
    main()
