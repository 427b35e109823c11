"""Measure one file of the recipe nested-8-6-4-2 at each of its widths against files quantized to that width, and print a table.

    .venv/bin/python benchmarks/nested.py [--out benchmarks/results] [--samples 500]

`nested`: the leading bits of the one file, selected by graphq.select_bits; weights without data. `direct`: rounding to nearest to
that width, min-max, one scale and zero point an output channel, as the nested file has at 8 bits. `direct, mse`: the same with
ranges of least squared error, which one file for all widths cannot have. Activations are floats, and embedding tables have 8 bits, in
all of them. Accuracy: ViT-Tiny top-1 on images of the dev split; MiniLM Spearman's correlation (x 100) of the cosines of
sentence pairs with their scores on STS-B dev, and the mean cosine of embeddings with those of the float model.
Results: <out>/nested.md.
"""

from __future__ import annotations

import argparse
import datetime
import importlib
import platform
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

import graphq
from graphq.recipe import parse_recipe, recipe_text

ASSETS = Path(__file__).resolve().parents[2] / "shared" / "assets"
WIDTHS = (8, 6, 4, 2)
VIT, MINILM = "vit_tiny_patch16_224", "minilm_l6_stsb"
DIRECT = """passes:
  - normalize
  - round: {{bits: {bits}, algorithm: rtn, layers: all, symmetric: false, scales: {scales}, correct_bias: false}}
  - quantize-weights: {{bits: 8, op_types: [], allow_no_effect: true}}
"""

Judge = Callable[[ort.InferenceSession], dict[str, float]]


def image_judge(assets: Any, samples: int) -> Judge:
    pictures, labels = assets.images("imagenet_val_dev500", 224, samples)
    inputs = assets.preprocess(pictures[:samples], VIT)

    def judge(session: ort.InferenceSession) -> dict[str, float]:
        logits = [session.run(None, {"input": inputs[start : start + 25]})[0] for start in range(0, len(inputs), 25)]
        return {"accuracy": 100 * float((np.concatenate(logits).argmax(1) == labels[:samples]).mean())}

    return judge


def sentence_judge(assets: Any, samples: int, source: Path) -> Judge:
    path = assets.DATA / "stsb_dev_tokens.npz"
    sides = [{name: array[-samples:] for name, array in assets.sentences(path, side).items()} for side in (1, 2)]
    with np.load(path, allow_pickle=False) as pack:
        scores = pack["score"][-samples:]

    def embed(session: ort.InferenceSession) -> list[np.ndarray]:
        return [
            np.concatenate([session.run(None, {name: array[start : start + 50] for name, array in side.items()})[0]
                            for start in range(0, len(scores), 50)])
            for side in sides
        ]  # fmt: skip

    exact = embed(ort.InferenceSession(source))

    def judge(session: ort.InferenceSession) -> dict[str, float]:
        found = embed(session)
        cosine = np.mean([(a * b).sum(1).mean() for a, b in zip(exact, found, strict=True)])  # they have length 1
        return {"accuracy": 100 * spearman((found[0] * found[1]).sum(1), scores), "cosine": float(cosine)}

    return judge


def spearman(one: np.ndarray, other: np.ndarray) -> float:
    """Correlation of ranks; equal values share the mean of theirs."""

    def ranks(values: np.ndarray) -> np.ndarray:
        _, group, count = np.unique(values, return_inverse=True, return_counts=True)
        return (np.cumsum(count) - (count - 1) / 2)[group]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


def session(model: str | bytes) -> ort.InferenceSession:
    """As the numbers of the format are: without integer activations, which ONNX Runtime would choose for some widths."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def measure(model: str, judge: Judge, calib: dict[str, np.ndarray], folder: Path) -> list[dict[str, Any]]:
    source, path = ASSETS / "models" / f"{model}.onnx", folder / "out.onnx"
    rows = [{"model": model, "bits": 32, "what": "float", "bytes": source.stat().st_size, **judge(session(str(source)))}]
    print(rows[-1], flush=True)

    def convert(text: str, out: Path) -> None:
        graphq.convert(source, out, recipe=parse_recipe(text, "row"), calib=calib, limits={"max_size_ratio": None})

    nested = folder / "nested.onnx"
    convert(recipe_text("nested-8-6-4-2"), nested)
    for bits in WIDTHS:
        selected = graphq.select_bits(nested, bits).SerializeToString()
        rows.append({"model": model, "bits": bits, "what": "nested", "bytes": len(selected), **judge(session(selected))})
        print(rows[-1], flush=True)
        for what, scales in (("direct", "min-max"), ("direct, mse", "mse")):
            convert(DIRECT.format(bits=bits, scales=scales), path)
            rows.append({"model": model, "bits": bits, "what": what, "bytes": path.stat().st_size, **judge(session(str(path)))})
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--samples", type=int, default=500, help="dev images, and sentence pairs, to measure on")
    arguments = parser.parse_args()
    sys.path.insert(0, str(ASSETS))
    assets = importlib.import_module("assets")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for model in (VIT, MINILM):
            source = ASSETS / "models" / f"{model}.onnx"
            judge = image_judge(assets, arguments.samples) if model == VIT else sentence_judge(assets, arguments.samples, source)
            rows += measure(model, judge, assets.calibration(model, 32), Path(folder))
            write(rows, arguments)


def write(rows: list[dict[str, Any]], arguments: argparse.Namespace) -> None:
    lines = ["| model | bits | what | bytes | accuracy | cosine |", "|---|---|---|---|---|---|"]
    for row in rows:
        cosine = f"{row['cosine']:.4f}" if "cosine" in row else ""
        lines.append(f"| {row['model']} | {row['bits']} | {row['what']} | {row['bytes']:,} | {row['accuracy']:.1f} | {cosine} |")
    head = [
        "# One nested file against a file for each width", "",
        f"`python benchmarks/nested.py {' '.join(sys.argv[1:])}`, {datetime.date.today()}, graphq {graphq.__version__},",
        f"onnxruntime {ort.__version__}, {platform.machine()}. {arguments.samples} images, {arguments.samples} sentence pairs.", "",
    ]  # fmt: skip
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "nested.md").write_text("\n".join([*head, *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
