"""Conformance by others' cases: every single-op model of onnx's backend test suite converts or is refused with a reason.

In the suite every operand is an input of the model, so hardly anything can be quantized: `normalize` alone has to leave all
outputs equal. A second round turns the float operands after the first into constants, as weights are in real models, and
converts those to integers.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from graphq import ir
from graphq.calibration import random_calibration
from graphq.convert import convert
from graphq.errors import DataError, GraphqError
from graphq.gates import Gates
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, run_passes
from graphq.recipe import Recipe
from graphq.report import Report
from graphq.spec import ModelInput
from graphq.targets import get_target
from graphq.verify import verify_graph

CHUNKS = 8
ANY_SIZE = Gates(max_size_ratio=1e9)  # the models are a few hundred bytes, less than the report inside the result
INT8 = Recipe(name="int8", passes=(Normalize(), InsertQdq()), gates=ANY_SIZE)
PLAIN = Recipe(name="plain", passes=(Normalize(allow_no_effect=True),), gates=ANY_SIZE)
AT_LEAST = 1500  # models; the suite of onnx 1.23 has 1884
RANDOM_OPS = {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Dropout"}

Feeds = Mapping[str, Any]


@functools.cache
def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return list(collect_testcases(None))


def feeds_of(case: Any) -> dict[str, Any]:
    return dict(zip((entry.name for entry in case.model.graph.input), case.data_sets[0][0], strict=False))


def attempt(model: Path, out: Path, feeds: Feeds, recipe: Recipe) -> Report | GraphqError:
    """Convert with the case's own inputs as the calibration data, or with random ones where they are none (scalars, sequences)."""
    own = feeds and all(isinstance(array, np.ndarray) for array in feeds.values())
    for calib in [dict(feeds), None] if own else [None]:
        try:
            return convert(model, out, recipe=recipe, calib=calib)
        except DataError as error:
            refusal: GraphqError = error
        except GraphqError as error:
            return error
    return refusal


def reason(error: GraphqError) -> str:
    """What was refused, without names and numbers."""
    what = re.split("[:;(]", re.sub("'.*?' ?", "", error.what))[0].strip(" .")
    for pattern, plain in ((r" is [a-z0-9]+ \[.*", " does not fit"), ("[0-9]+", "N")):
        what = re.sub(pattern, plain, what)
    return f"{type(error).__name__}: {what}"


def normalized(path: Path, out: Path) -> None:
    """`normalize` without the rest of `convert`, for models that no calibration data fits."""
    model = ir.load(path)
    none = random_calibration([ModelInput("x", np.dtype(np.float32), (None, 1))], 1)  # it reads none
    ctx = PassContext(model=ir.clone(model), reference=model, calib=none, held_out=none, target=get_target("onnxruntime"))
    run_passes(PLAIN.passes, ctx, verify_graph)
    ir.save(ctx.model, out)


def outputs(path: Path, feeds: Feeds) -> list[Any] | None:
    """What ONNX Runtime makes of the inputs; None if it cannot run the model."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return list(session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()}))
    except Exception:  # ORT's own exception types are not public
        return None


def equal(a: Any, b: Any) -> bool:
    """The same, or within 1e-6 of the largest element."""
    if not isinstance(a, np.ndarray) or not isinstance(b, np.ndarray):
        lists = isinstance(a, list) and isinstance(b, list)
        return len(a) == len(b) and all(map(equal, a, b)) if lists else type(a) is type(b) and bool(a == b)
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind in "biuOSU":
        return bool(np.array_equal(a, b))
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return np.allclose(a, b, rtol=1e-6, atol=1e-6 * float(np.abs(a[np.isfinite(a)]).max(initial=0.0)), equal_nan=True)


def is_random(proto: onnx.ModelProto) -> bool:
    return any(node.op_type in RANDOM_OPS for node in proto.graph.node)


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_model_converts_or_is_refused(chunk: int, tmp_path: Path, record_property: Any) -> None:
    """`int8` ends in a result or in a GraphqError; `normalize` leaves what ONNX Runtime computes as it was."""
    assert len(cases()) >= AT_LEAST
    counts: Counter[str] = Counter()
    faults = []
    path, out, plain = tmp_path / "model.onnx", tmp_path / "int8.onnx", tmp_path / "plain.onnx"
    for case in cases()[chunk::CHUNKS]:
        onnx.save(case.model, path)
        feeds = feeds_of(case)
        try:
            plain.unlink(missing_ok=True)
            for recipe, target in ((INT8, out), (PLAIN, plain)):
                found = attempt(path, target, feeds, recipe)
                counts[f"{recipe.name}: {'converted' if isinstance(found, Report) else reason(found)}"] += 1
                if isinstance(found, GraphqError) and not str(found).strip():
                    faults.append(f"{case.name}: refused without a reason")
            before = outputs(path, feeds)
            if before is None:
                counts["outputs: ONNX Runtime cannot run the original"] += 1
                continue
            if not plain.exists():
                try:
                    normalized(path, plain)
                except GraphqError as error:
                    counts[f"outputs: normalize refuses, {reason(error)}"] += 1
                    continue
            if is_random(case.model):
                counts["outputs: random by definition"] += 1
            elif (after := outputs(plain, feeds)) is None or not equal(before, after):
                faults.append(f"{case.name}: outputs differ, or the normalized model does not run")
            else:
                counts["outputs: equal"] += 1
        except Exception as error:  # anything but a GraphqError is what this test is looking for
            faults.append(f"{case.name}: {type(error).__name__}: {error}")
    record_property("counts", ("onnx backend suite, as it is", dict(counts)))
    assert not faults, "\n".join(faults)


def with_weights(case: Any) -> tuple[onnx.ModelProto, dict[str, Any]] | None:
    """The model with its inputs after the first as constants; None if it has only one."""
    feeds = feeds_of(case)
    names = list(feeds)
    if len(names) < 2 or not all(isinstance(array, np.ndarray) for array in feeds.values()):
        return None
    proto = onnx.ModelProto.FromString(case.model.SerializeToString())
    for name in names[1:]:
        proto.graph.initializer.append(numpy_helper.from_array(feeds[name], name))
    kept = [entry for entry in proto.graph.input if entry.name == names[0]]
    del proto.graph.input[:]
    proto.graph.input.extend(kept)
    return proto, {names[0]: feeds[names[0]]}


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_model_with_constant_weights(chunk: int, tmp_path: Path, record_property: Any) -> None:
    """As above; and every layer that becomes integer stays close to the float one: 20 dB and more on its own input."""
    counts: Counter[str] = Counter()
    faults = []
    path, out, plain = tmp_path / "model.onnx", tmp_path / "int8.onnx", tmp_path / "plain.onnx"
    for case in cases()[chunk::CHUNKS]:
        built = with_weights(case)
        if built is None:
            continue
        proto, feeds = built
        try:
            onnx.save(proto, path)
            found = attempt(path, out, feeds, INT8)
            counts[
                f"int8: {f'converted, {sum(found.quantized.values())} nodes quantized' if isinstance(found, Report) else reason(found)}"
            ] += 1
            if isinstance(found, Report) and min(entry.sqnr_db for entry in found.comparison) < 20:
                faults.append(f"{case.name}: {found.comparison}")
            before = outputs(path, feeds)
            if before is None or is_random(proto):
                continue
            try:
                normalized(path, plain)
            except GraphqError:
                continue
            after = outputs(plain, feeds)
            counts["outputs: equal"] += 1
            if after is None or not all(map(equal, before, after)):
                faults.append(f"{case.name}: outputs differ, or the normalized model does not run")
        except Exception as error:  # anything but a GraphqError is what this test is looking for
            faults.append(f"{case.name}: {type(error).__name__}: {error}")
    record_property("counts", ("onnx backend suite, operands but the first as constants", dict(counts)))
    assert not faults, "\n".join(faults)
