"""The torch executor against onnx's backend node tests: every model that it takes gives the expected outputs, and says so if not.

Prints how many pass, and which operators the others are of. In a second round gradients of the same models are compared with finite
differences, with respect to all their float operands.
"""

from __future__ import annotations

import functools
import warnings
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed (pip install graphq[torch])")

from graphq.errors import ModelError  # noqa: E402
from graphq.torch_executor import OPERATORS, TorchExecutor  # noqa: E402

CHUNKS = 4
AT_LEAST = 1500  # models; the suite of onnx 1.23 has 1884
WIDE = {onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16}
RANDOM = "training_dropout"
"""Drops elements at random; the executor computes what inference does."""
CODES = {"DequantizeLinear", "MatMulInteger", "ConvInteger"}
"""Read integers that a quantizer made, which are floats in the executor."""
ELSEWHERE = {"Cast", "CastLike", "ConcatFromSequence", "GlobalLpPool", "If", "Optional", "SequenceAt", "SequenceConstruct", "SequenceErase",
             "SequenceInsert", "Trilu"}  # fmt: skip
"""Have no backend test with float operands that are all finite, but one in `test_torch_executor_gradients`."""
MODELS = 3
"""Of each operator: how many have their gradients compared."""


@functools.cache
def cases() -> list[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        return list(collect_testcases(None))


def arrays(values: Any) -> list[Any]:
    return [onnx.numpy_helper.to_array(value) if isinstance(value, onnx.TensorProto) else value for value in values]


def has_texts(case: Any) -> bool:
    values = [value for group in case.data_sets[0] for value in arrays(group) if value is not None]
    return any(isinstance(value, np.ndarray) and value.dtype.kind in "OSU" for value in values)


def executor(case: Any, **options: Any) -> TorchExecutor:
    from onnx_ir import from_proto

    return TorchExecutor(from_proto(case.model), device="cpu", **options)


def missing(error: ModelError) -> str:
    """The operator that was refused; nothing if it is something else that failed."""
    return error.what.split(" cannot run on torch")[0].removeprefix("The operator ") if "cannot run on torch" in error.what else ""


def difference(found: Any, expected: Any) -> str:
    """What differs, beyond the suite's own tolerance; half precision is computed in float32, and compared with 1e-2."""
    if isinstance(found, list):
        return next((text for pair in zip(found, expected, strict=True) if (text := difference(*pair))), "")
    expected = np.asarray(expected)
    narrow = expected.dtype.itemsize < 4 and expected.dtype.kind not in "biu"
    wide = np.complex128 if expected.dtype.kind == "c" else np.float64
    if tuple(found.shape) != expected.shape:
        return f"shape {tuple(found.shape)} instead of {expected.shape}"
    with np.errstate(invalid="ignore"):  # NaN as an integer
        good = np.allclose(
            found.numpy().astype(wide), expected.astype(wide), rtol=1e-2 if narrow else 1e-3, atol=1e-5, equal_nan=True
        )
    return "" if good else f"{found.numpy()} instead of {expected}"


@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_every_model_gives_the_expected_outputs(chunk: int, record_property: Any) -> None:
    assert len(cases()) >= AT_LEAST
    counts: Counter[str] = Counter()
    faults = []
    for case in cases()[chunk::CHUNKS]:
        if has_texts(case):
            counts["not taken: texts"] += 1
            continue
        if RANDOM in case.name:
            counts["not taken: dropout in training is random"] += 1
            continue
        double = any(entry.type.tensor_type.elem_type == onnx.TensorProto.DOUBLE for entry in case.model.graph.input)
        try:
            run = executor(case, dtype=torch.float64 if double else torch.float32)
            inputs, outputs = map(arrays, case.data_sets[0])
            found = run.run(dict(zip((entry.name for entry in case.model.graph.input), inputs, strict=False)))
        except ModelError as error:
            if not (name := missing(error)):
                faults.append(f"{case.name}: {error}")
            counts[f"not taken: no operator {name}"] += 1
            continue
        wrong = [text for pair in zip(found, outputs, strict=True) if (text := difference(*pair))]
        faults += [f"{case.name}: {text}" for text in wrong]
        counts["equal"] += not wrong
    record_property("counts", ("torch executor, onnx backend suite", dict(counts)))
    assert not faults, "\n".join(faults)


def single(case: Any) -> str:
    """The operator that a model consists of; nothing if there are several, or if the output is rounded to a narrow type."""
    kinds = {node.op_type for node in case.model.graph.node}
    is_wide = all(entry.type.tensor_type.elem_type in WIDE or "Cast" not in "".join(kinds) for entry in case.model.graph.output)
    return next(iter(kinds)) if len(kinds) == 1 and is_wide else ""


def floats_of(case: Any, rng: np.random.Generator) -> Iterator[tuple[str, Any, bool]]:
    """Name and tensor of each operand, and whether it is differentiated by: then moved a little, off the kinks and ties."""
    for entry, value in zip(case.model.graph.input, arrays(case.data_sets[0][0]), strict=False):
        if isinstance(value, np.ndarray) and (value.dtype.kind == "f" or (single(case) in CODES and value.dtype.itemsize == 1)):
            yield entry.name, torch.tensor(value.astype(np.float64) + 0.01 * rng.random(value.shape), requires_grad=True), True
        else:
            yield entry.name, value, False


def gradient_fault(case: Any) -> str | None:
    """What is wrong with the gradients of a model, None if it has none to compare."""
    rng = np.random.default_rng(0)
    try:
        run = executor(case, dtype=torch.float64)
    except ModelError:
        return None
    operands = list(floats_of(case, rng))
    numbers = OPERATORS[single(case)].numbers
    read = {name for index, name in enumerate(case.model.graph.node[0].input) if index in numbers}
    names = [name for name, _, moves in operands if moves and name not in read]
    fixed = {name: value for name, value, moves in operands if not moves or name in read}
    fixed = {name: value.detach() if isinstance(value, torch.Tensor) else value for name, value in fixed.items()}

    def function(*tensors: Any) -> tuple[Any, ...]:
        results = run.run(fixed | dict(zip(names, tensors, strict=True)))
        flat = [one for result in results for one in (result if isinstance(result, list) else [result])]
        return tuple(one for one in flat if isinstance(one, torch.Tensor) and one.is_floating_point() and one.requires_grad)

    values = [value for name, value, _ in operands if name in names]
    if not all(bool(value.isfinite().all()) for value in values) or not sum(value.numel() for value in values):
        return None
    results = function(*values)
    if not results or not all(bool(one.isfinite().all()) for one in results):
        return None
    try:
        torch.autograd.gradcheck(function, values, fast_mode=True, atol=1e-4, nondet_tol=1e-9)
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:500]
    return ""


@pytest.fixture(scope="module")
def gradients() -> dict[str, list[tuple[str, str]]]:
    """By operator: the models whose gradients were compared, and what was wrong with them."""
    found: dict[str, list[tuple[str, str]]] = {}
    torch.manual_seed(0)  # gradcheck projects Jacobians on random vectors
    for case in cases():
        name = single(case)
        if name in OPERATORS and OPERATORS[name].gradient == "exact" and not has_texts(case) and RANDOM not in case.name:
            fault = gradient_fault(case) if len(found.get(name, ())) < MODELS else None
            if fault is not None:
                found.setdefault(name, []).append((case.name, fault))
    return found


def test_gradients_are_those_of_finite_differences(gradients: dict[str, list[tuple[str, str]]], record_property: Any) -> None:
    kinds = Counter(entry.gradient for entry in OPERATORS.values())
    record_property("counts", ("torch executor, operators by gradient", {**kinds, "models compared": sum(map(len, gradients.values()))}))
    faults = [f"{model}: {fault}" for models in gradients.values() for model, fault in models if fault]
    assert not faults, "\n".join(faults)


def test_no_operator_is_left_out(gradients: dict[str, list[tuple[str, str]]]) -> None:
    exact = {name for name, entry in OPERATORS.items() if entry.gradient == "exact"}
    assert exact - set(gradients) == ELSEWHERE
    assert {entry.gradient for entry in OPERATORS.values()} == {"exact", "through", "none"}
