"""Measure one converted model against its float original on onnxruntime CPU and print one line of JSON.

    measure.py ASSETS MODEL_NAME FLOAT.onnx CONVERTED.onnx CALIB.npz

Speed: both sessions share ONE pool of two threads (two pools would spin against each other on few cores), their runs
alternate in pairs AB, BA, ..., and the speed-up is the median of the per-pair ratios.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime as ort  # type: ignore[import-untyped, unused-ignore]
from scipy.stats import spearmanr  # type: ignore[import-untyped, unused-ignore]

Arrays = dict[str, np.ndarray]
THREADS, WARM_UP, ROUNDS = 2, 3, 30
SENTENCES = 1000


def session(path: str) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def seconds(model: ort.InferenceSession, feed: Arrays) -> float:
    start = time.perf_counter()
    model.run(None, feed)
    return time.perf_counter() - start


def speed(reference: ort.InferenceSession, converted: ort.InferenceSession, feed: Arrays) -> tuple[float, float]:
    """Median of the per-round ratios reference / converted, and median latency of `converted` in ms."""
    pair = (reference, converted)
    for _ in range(WARM_UP):
        for model in pair:
            model.run(None, feed)
    times = np.empty((ROUNDS, 2))
    for i in range(ROUNDS):
        for j in (0, 1) if i % 2 else (1, 0):
            times[i, j] = seconds(pair[j], feed)
    return float(np.median(times[:, 0] / times[:, 1])), float(np.median(times[:, 1]) * 1e3)


def embeddings(model: ort.InferenceSession, feed: Arrays, batch: int = 50) -> np.ndarray:
    """(N, D), each row of length one."""
    total = len(feed["input_ids"])
    parts = [model.run(None, {name: array[i : i + batch] for name, array in feed.items()})[0] for i in range(0, total, batch)]
    rows: np.ndarray = np.concatenate(parts).astype(np.float64)
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def text_quality(
    assets: ModuleType, reference: ort.InferenceSession, converted: ort.InferenceSession, calib_count: int
) -> dict[str, float]:
    """Cosines between the two models over at most SENTENCES sentences that were not used for calibration (evenly spaced
    over both sides of the pairs), and Spearman correlation of `converted` on all STS-B dev pairs."""
    pack = assets.DATA / "stsb_dev_tokens.npz"
    sides = [assets.sentences(pack, side) for side in (1, 2)]
    feed = {name: np.concatenate([side[name] for side in sides]) for name in sides[0]}
    ours, pairs = embeddings(converted, feed), len(sides[0]["input_ids"])
    chosen = np.unique(np.linspace(calib_count, 2 * pairs - 1, SENTENCES).astype(int))
    theirs = embeddings(reference, {name: array[chosen] for name, array in feed.items()})
    cosine = (ours[chosen] * theirs).sum(axis=1)
    with np.load(pack) as data:
        score = data["score"]
    correlation = spearmanr((ours[:pairs] * ours[pairs:]).sum(axis=1), score).statistic
    return {"cos_mean": float(cosine.mean()), "cos_min": float(cosine.min()), "spearman": float(correlation)}


def main(assets_folder: str, name: str, float_path: str, converted_path: str, calib: str) -> dict[str, Any]:
    sys.path.insert(0, assets_folder)
    assets = importlib.import_module("assets")
    ort.set_global_thread_pool_sizes(THREADS, 1)
    reference, converted = session(float_path), session(converted_path)
    with np.load(calib) as pack:
        samples = {key: pack[key] for key in pack.files}
    size_mb = Path(converted_path).stat().st_size / 1e6
    result: dict[str, Any] = {"runtime": f"onnxruntime {ort.__version__}", "size_mb": size_mb}
    for batch in (1, 8):
        ratio, latency = speed(reference, converted, {key: array[:batch] for key, array in samples.items()})
        result |= {f"speedup_b{batch}": ratio, f"latency_ms_b{batch}": latency}
    if name in assets.VISION:
        return result | {"top1": assets.top1(converted, name)}
    return result | text_quality(assets, reference, converted, len(next(iter(samples.values()))))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:6])))
