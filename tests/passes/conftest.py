"""What several files of tests of one pass share: test files cannot import each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest

from graphq import ir
from graphq.calibration import open_calibration, random_calibration
from graphq.executor import Executor
from graphq.passes.insert_qdq import InsertQdq
from graphq.passes.normalize import Normalize
from graphq.pipeline import PassContext, PassRecord, run_passes
from graphq.spec import ModelInput
from graphq.targets import get_target, require_legal
from graphq.verify import verify_graph

Feeds = Mapping[str, np.ndarray]


def _copy(proto: onnx.ModelProto) -> ir.Model:
    return onnx_ir.from_proto(onnx.ModelProto.FromString(proto.SerializeToString()))


@pytest.fixture
def weighted() -> Callable[[str, np.random.Generator], ir.Model]:
    """A model from ONNX text whose inputs but for x have become weights: normally distributed float32."""

    def weighted(text: str, rng: np.random.Generator) -> ir.Model:
        model = ir.from_onnx_text(text)
        for value in [value for value in model.graph.inputs if value.name != "x"]:
            model.graph.inputs.remove(value)
            shape = tuple(int(size) for size in ir.shape_of(value) or ())  # type: ignore[arg-type]
            value.const_value = ir.make_tensor(rng.normal(size=shape).astype(np.float32), "float32", value.name or "")
            model.graph.register_initializer(value)
        return model

    return weighted


# ---- insert-qdq -----------------------------------------------------------------------------------------------------


@pytest.fixture
def quantize() -> Callable[..., tuple[ir.Model, PassRecord]]:
    """The model after normalize and insert-qdq, and what the latter did."""

    def quantize(proto: onnx.ModelProto, feeds: Feeds, target: str = "onnxruntime", **options: Any) -> tuple[ir.Model, PassRecord]:
        model = _copy(proto)
        data = open_calibration(dict(feeds), ir.inputs(model))
        ctx = PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
        record = run_passes([Normalize(), InsertQdq(**options)], ctx, verify_graph)[1]
        require_legal(model, ctx.target)
        return model, record

    return quantize


@pytest.fixture
def run() -> Callable[..., np.ndarray]:
    """First output, by exact ONNX semantics or as deployed."""

    def run(model: onnx.ModelProto | ir.Model, feeds: Feeds, *, deployed: bool = False) -> np.ndarray:
        model = model if isinstance(model, ir.Model) else _copy(model)
        return Executor(model, deployed=deployed, threads=1).run(feeds)[0]

    return run


@pytest.fixture
def sqnr() -> Callable[[np.ndarray, np.ndarray], float]:
    """Signal over noise in dB."""

    def sqnr(reference: np.ndarray, result: np.ndarray) -> float:
        noise = np.sum((reference.astype(np.float64) - result) ** 2)
        return float(10 * np.log10(np.sum(reference.astype(np.float64) ** 2) / max(noise, 1e-30)))

    return sqnr


@pytest.fixture
def integer_layers() -> Callable[[ir.Model], set[str | None]]:
    """Names of the nodes of the main graph whose weights are integers."""

    def integer_layers(model: ir.Model) -> set[str | None]:
        linear = [node for node in model.graph if node.op_type in ("Conv", "Gemm", "MatMul")]
        makers = {node.name: ir.producer(node.inputs[1]) for node in linear}
        return {name for name, maker in makers.items() if maker is not None and maker.op_type == "DequantizeLinear"}

    return integer_layers


# ---- normalize ------------------------------------------------------------------------------------------------------


def _context(model: ir.Model, target: str = "onnxruntime") -> PassContext:
    data = random_calibration([ModelInput("x", np.dtype(np.float32), (None, 1))], 1)  # normalize reads none
    return PassContext(model=model, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))


def _normalize(proto: onnx.ModelProto, target: str = "onnxruntime", **options: Any) -> tuple[ir.Model, PassRecord]:
    ctx = _context(_copy(proto), target)
    return ctx.model, run_passes([Normalize(**options)], ctx, verify_graph)[0]


def _outputs(proto: onnx.ModelProto, feeds: Feeds) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, {entry.name: feeds[entry.name] for entry in session.get_inputs()})


@pytest.fixture
def make_context() -> Callable[..., PassContext]:
    return _context


@pytest.fixture
def normalize() -> Callable[..., tuple[ir.Model, PassRecord]]:
    """The model after normalize, and what that did."""
    return _normalize


@pytest.fixture
def same() -> Callable[..., tuple[ir.Model, PassRecord]]:
    """Normalize, and require equal outputs under equal names."""

    def same(proto: onnx.ModelProto, feeds: Feeds, **options: Any) -> tuple[ir.Model, PassRecord]:
        model, record = _normalize(proto, **options)
        result = ir.to_proto(model)
        assert [value.name for value in result.graph.output] == [value.name for value in proto.graph.output]
        for before, after in zip(_outputs(proto, feeds), _outputs(result, feeds), strict=True):
            assert before.shape == after.shape and before.dtype == after.dtype
            np.testing.assert_allclose(after, before, rtol=1e-6, atol=1e-6 * max(1.0, float(np.abs(before).max(initial=0))))
        return model, record

    return same


# ---- branches and residuals -----------------------------------------------------------------------------------------


@pytest.fixture
def heavy() -> Callable[..., np.ndarray]:
    """Correlated rows of channels of very different size, with means and heavy tails, float32 [rows, width]."""

    def heavy(seed: int, rows: int, width: int, spread: float = 0.8) -> np.ndarray:
        rng = np.random.default_rng(seed)
        mix = rng.standard_normal((width, width)) / np.sqrt(width) + np.eye(width)
        size = np.exp(spread * rng.standard_normal(width))
        return ((rng.standard_t(5, (rows, width)) @ mix + 0.3 * rng.standard_normal(width)) * size).astype(np.float32)

    return heavy


@pytest.fixture
def after() -> Callable[..., tuple[ir.Model, PassRecord]]:
    """A model after the passes of a recipe (YAML, one line each), calibrated with `x`, and what the last pass did."""

    def after(model: ir.Model, x: np.ndarray, *lines: str, target: str = "onnxruntime") -> tuple[ir.Model, PassRecord]:
        from graphq.recipe import parse_recipe

        copy, data = ir.clone(model), open_calibration({"x": x}, ir.inputs(model))
        ctx = PassContext(model=copy, reference=ir.clone(model), calib=data, held_out=data, target=get_target(target))
        recipe = parse_recipe("passes:\n" + "".join(f"  - {line}\n" for line in lines), "test")
        record = run_passes(recipe.passes, ctx, verify_graph)[-1]
        require_legal(copy, ctx.target)
        return copy, record

    return after
