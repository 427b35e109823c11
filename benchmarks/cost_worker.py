"""Measure one job in this process and print what it took as one line of JSON; `cost.py` starts it, once for each row.

    cost_worker.py JOB ARGUMENT...          a job is a key of `JOBS`, its arguments are those of the function

Imports come before the clock starts. Stdout carries the JSON only, stderr all else. The jobs `make-*` only write files.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import onnx  # noqa: E402
import onnxruntime  # type: ignore[import-untyped, unused-ignore]  # noqa: E402, F401  (graphq imports what it needs late)
import onnxscript.version_converter  # noqa: E402, F401

import graphq.convert  # noqa: E402
import graphq.sweep  # noqa: E402
from graphq import ir, recipe, targets, verify  # noqa: E402
from graphq.calibration import open_calibration  # noqa: E402
from graphq.executor import Executor, Fetch  # noqa: E402
from graphq.passes import _placement, insert_qdq, normalize, quantize_weights  # noqa: E402, F401
from graphq.pipeline import PassContext, run_passes  # noqa: E402

Row = dict[str, Any]
REPORTED = ("graphq", "onnxruntime", "onnx", "onnx-ir", "onnxscript", "numpy")
WIDTH, BIG_LAYERS, BIG_WIDTH = 8, 40, 4096


@contextmanager
def timed(row: Row, key: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    row[key] = time.perf_counter() - started


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# ---- files ----------------------------------------------------------------------------------------------------------


def make_calibration(assets: str, model: str, count: str, out: str) -> Row:
    """The first `count` of the 256 + 744 training images, preprocessed for `model`."""
    sys.path.insert(0, assets)
    pack: Any = importlib.import_module("assets")
    first = pack.images("imagenet_train_calib256", 224, int(count))[0]
    more = pack.images("imagenet_train_extra744", 224, int(count) - len(first))[0]
    np.savez(out, input=pack.preprocess(np.concatenate([first, more]), model))
    return {"images": len(first) + len(more)}


def make_chain(layers: str, out: str) -> Row:
    """`layers` times MatMul (8x8) and Relu: twice as many activations. The weights keep the signal's size."""
    rng = np.random.default_rng(0)
    graph = onnx.GraphProto(name="chain")
    graph.input.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", WIDTH]))
    last = "x"
    for index in range(int(layers)):
        weight = np.eye(WIDTH) + 0.01 * rng.standard_normal((WIDTH, WIDTH))
        graph.initializer.append(onnx.numpy_helper.from_array(weight.astype(np.float32), f"w{index}"))
        graph.node.append(onnx.helper.make_node("MatMul", [last, f"w{index}"], [f"m{index}"], name=f"matmul{index}"))
        graph.node.append(onnx.helper.make_node("Relu", [f"m{index}"], [f"r{index}"], name=f"relu{index}"))
        last = f"r{index}"
    graph.output.append(onnx.helper.make_tensor_value_info(last, onnx.TensorProto.FLOAT, ["batch", WIDTH]))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), out)
    return {}


def make_big(out: str) -> Row:
    """40 MatMuls of 4096 x 4096 in float32, 2.68 GB, with all weights in one external file."""
    path = Path(out)
    graph, size = onnx.GraphProto(name="big"), BIG_WIDTH * BIG_WIDTH * 4
    shape, rng = ["batch", BIG_WIDTH], np.random.default_rng(0)
    graph.input.append(onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape))
    weight = rng.standard_normal((BIG_WIDTH, BIG_WIDTH), np.float32) / np.float32(BIG_WIDTH**0.5)
    with path.with_suffix(".data").open("wb") as data:
        for index in range(BIG_LAYERS):
            tensor = onnx.TensorProto(name=f"w{index}", dims=[BIG_WIDTH] * 2, data_type=onnx.TensorProto.FLOAT)
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": path.with_suffix(".data").name, "offset": str(index * size), "length": str(size)}
            tensor.external_data.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in place.items())
            graph.initializer.append(tensor)
            data.write(np.roll(weight, index, 0).data)
            last, out_name = "x" if index == 0 else f"h{index - 1}", "y" if index == BIG_LAYERS - 1 else f"h{index}"
            graph.node.append(onnx.helper.make_node("MatMul", [last, f"w{index}"], [out_name], name=f"matmul{index}"))
    graph.output.append(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, shape))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8), path)
    return {"gb": BIG_LAYERS * size / 1e9}


# ---- measurements ---------------------------------------------------------------------------------------------------


def plan(ranges: str = "min-max") -> recipe.Recipe:
    """What every int8 recipe does, with one range estimator; no migrate, which has its own need of ranges."""
    text = f"{{passes: [normalize, {{insert-qdq: {{ranges: {ranges}}}}}], gates: {{max_size_ratio: 100}}}}"
    return recipe.parse_recipe(text, f"int8-{ranges}")


def convert(model: str, calib: str, ranges: str, out: str) -> Row:
    """The whole conversion, from file to file; `cpu_s` is of all threads."""
    row, before = dict[str, Any](), time.process_time()
    with timed(row, "seconds"):
        report = graphq.convert(model, out, recipe=plan(ranges), calib=calib)
    row["cpu_s"] = time.process_time() - before
    row["peak_mb"] = peak_mb()
    row |= {f"{stage}_s": value for stage, value in report.seconds.items()}
    row |= {f"{entry.name}_s": entry.seconds for entry in report.passes}
    return row


def scales(first: str, second: str) -> Row:
    """How many activation scales differ between two converted models, matched by the value they quantize."""
    found = [_activation_scales(path) for path in (first, second)]
    both = found[0].keys() & found[1].keys()
    return {"common": len(both), "differ": sum(found[0][name] != found[1][name] for name in both),
            "narrower": sum(found[1][name][0] < found[0][name][0] for name in both)}  # fmt: skip


def _activation_scales(path: str) -> dict[str, tuple[float, int]]:
    graph = onnx.load(path).graph
    arrays = {entry.name: onnx.numpy_helper.to_array(entry) for entry in graph.initializer}
    nodes = [node for node in graph.node if node.op_type == "QuantizeLinear" and node.input[0] not in arrays]
    return {node.input[0]: (float(arrays[node.input[1]]), int(arrays[node.input[2]])) for node in nodes}


def prepare(model: str) -> Row:
    """All that happens before the first calibration batch: normalize, placement, and the sessions with their taps."""
    row: Row = {}
    with timed(row, "seconds"):
        with timed(row, "load_s"):
            original = ir.load(model)
            data = open_calibration("random", ir.inputs(original), seed=0)
        with timed(row, "context_s"):
            ctx = PassContext(
                model=ir.clone(original), reference=original, calib=data, held_out=data, target=targets.get_target("onnxruntime")
            )
        with timed(row, "normalize_s"):
            run_passes([normalize.Normalize()], ctx, verify.verify_graph)
        with timed(row, "placement_s"):
            insert_qdq.InsertQdq().precheck(ctx.model, ctx.target)
            found = _placement.place(ctx.model, ctx.target)
        taps = [Fetch(value.name or "", "extrema") for value in found.readers if value not in found.derived]
        with timed(row, "session_s"):
            Executor(ctx.model, taps)
    row |= {"peak_mb": peak_mb(), "taps": len(taps)}
    every = [Fetch(out.name or "", "extrema") for node in ctx.model.graph for out in node.outputs]
    with timed(row, "session_all_s"):
        Executor(ctx.model, every)
    row["all_taps"] = len(every)
    row["all_s"] = row["seconds"] - row["session_s"] + row["session_all_s"]
    return row


def load_save(model: str, out: str) -> Row:
    row: Row = {}
    with timed(row, "load_s"):
        loaded = ir.load(model)
    with timed(row, "save_s"):
        ir.save(loaded, out)
    return row | {"seconds": row["load_s"] + row["save_s"], "peak_mb": peak_mb()}


def weights(model: str, out: str, name: str) -> Row:
    """A built-in recipe without its gates, on random inputs."""
    row: Row = {}
    full = recipe.load_recipe(name)
    bare = recipe.Recipe(name=full.name, description=full.description, passes=full.passes)
    with timed(row, "seconds"):
        report = graphq.convert(model, out, recipe=bare)
    row["peak_mb"] = peak_mb()
    row |= {f"{stage}_s": value for stage, value in report.seconds.items()}
    return row | {"gb": sum(part.stat().st_size for part in Path(out).parent.glob(f"{Path(out).name}*")) / 1e9}


def versions() -> Row:
    return {name: importlib.metadata.version(name) for name in REPORTED}


JOBS: dict[str, Callable[..., Row]] = {
    "make-calibration": make_calibration, "make-chain": make_chain, "make-big": make_big, "convert": convert, "scales": scales,
    "prepare": prepare, "load-save": load_save, "weights": weights, "versions": versions,
}  # fmt: skip


def main() -> None:
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps(JOBS[sys.argv[1]](*sys.argv[2:])), file=answer)


if __name__ == "__main__":
    main()
