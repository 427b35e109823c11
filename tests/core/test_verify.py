"""verify: numbers equal numpy's, what must not pass does not, and nothing else is refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from graphq import ir
from graphq.calibration import CalibrationSet, open_calibration
from graphq.editor import Editor
from graphq.errors import VerifyError
from graphq.executor import Executor
from graphq.verify import BATCH, compare, measure_latency, require_same_interface, verify_graph

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
TEXT = f"""{HEAD}
m (float[n, 3] x) => (float[n, 3] y, float[n, 3] z)
<float[3] w = {{1, 2, 3}}, float zero = {{0}}>
{{ y = Mul(x, w)  z = Add(x, w) }}"""
X = np.random.default_rng(0).standard_normal((3 * BATCH + 2, 3)).astype(np.float32)


def model_of(text: str = TEXT) -> ir.Model:
    return ir.from_onnx_text(text)


def data(x: np.ndarray = X) -> CalibrationSet:
    return open_calibration(x, ir.inputs(model_of(f"{HEAD}\nm (float[n, 3] x) => (float[n, 3] y) {{ y = Neg(x) }}")))


class Fake:
    """An executor that hands out slices of given outputs."""

    def __init__(self, *outputs: np.ndarray) -> None:
        self.outputs, self.at = outputs, 0

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        start, self.at = self.at, self.at + len(feeds["x"])
        return [output[start : self.at] if output.ndim else output for output in self.outputs]


def compared(a: np.ndarray, b: np.ndarray, name: str = "y") -> Any:
    executors: list[Any] = [Fake(a), Fake(b)]
    return compare(*executors, data(), [name])[0]


# ---- compare --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 5), (1,), ()])
def test_numbers_equal_numpy(shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(1)
    a = rng.standard_normal((len(X), *shape)).astype(np.float32)
    b = (a + 0.1 * rng.standard_normal(a.shape)).astype(np.float32)
    found, (p, q) = compared(a, b), (part.reshape(len(X), -1).astype(np.float64) for part in (a, b))
    assert found.name == "y"
    assert found.sqnr_db == pytest.approx(10 * math.log10((p**2).sum() / ((p - q) ** 2).sum()))
    assert found.max_abs == pytest.approx(np.abs(p - q).max())
    cosine = (p * q).sum(1) / (np.linalg.norm(p, axis=1) * np.linalg.norm(q, axis=1))
    assert found.cosine == pytest.approx(cosine.mean())
    classes = a.ndim == 2 and p.shape[1] > 1  # a map or a sequence has no one class for a sample
    assert found.top1_agreement == (pytest.approx((p.argmax(1) == q.argmax(1)).mean()) if classes else None)


def test_logits_of_tokens_are_compared_token_by_token() -> None:
    rng = np.random.default_rng(2)
    a = rng.standard_normal((len(X), 5, 7)).astype(np.float32)
    b = (a + 0.5 * rng.standard_normal(a.shape)).astype(np.float32)
    share = (a.argmax(2) == b.argmax(2)).mean()
    assert compared(a, b, "logits").top1_agreement == pytest.approx(share) and 0.1 < share < 0.95
    assert compared(a, b, "last_hidden_state").top1_agreement is None


def test_equal_outputs_are_perfect() -> None:
    found = compared(X, X.copy())
    assert (found.sqnr_db, found.cosine, found.max_abs, found.top1_agreement) == (math.inf, 1.0, 0.0, 1.0)


def test_zeros() -> None:
    found = compared(np.zeros_like(X), np.zeros_like(X))
    assert (found.sqnr_db, found.cosine) == (math.inf, 1.0)
    lost = compared(X, np.zeros_like(X))
    assert lost.sqnr_db == pytest.approx(0) and lost.cosine == 0
    assert compared(np.zeros_like(X), X).sqnr_db < -1000


def test_an_output_without_a_batch_axis() -> None:
    found = compared(np.float32(2.0), np.float32(1.0))
    assert found.sqnr_db == pytest.approx(10 * math.log10(4)) and found.top1_agreement is None


def test_integers_and_booleans() -> None:
    labels = np.arange(len(X))[:, None] % 3
    found = compared(labels, labels)
    assert found.sqnr_db == math.inf and compared(labels > 0, labels > 1).sqnr_db < 10


def test_real_models() -> None:
    model = model_of()
    other = ir.clone(model)
    Editor(other).set_weight(other.graph[0], 1, np.float32([1, 2, 2.5]))
    first, second = compare(Executor(model), Executor(other), data(), ["y", "z"])
    assert (first.name, second.name) == ("y", "z") and second.sqnr_db == math.inf
    assert first.max_abs == pytest.approx(np.abs(X[:, 2] * 0.5).max(), rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("sample", [0, len(X) - 1])
def test_what_is_not_finite_is_refused(bad: float, sample: int) -> None:
    result = X.copy()
    result[sample, 1] = bad
    with pytest.raises(VerifyError, match="(?s)'y' holds NaN or infinity"):
        compared(X, result)


def test_what_was_not_finite_before_may_stay_so() -> None:
    reference = X.copy()
    reference[:, 0] = -np.inf  # a mask
    assert compared(reference, reference.copy()).sqnr_db == math.inf
    finite = reference.copy()
    finite[:, 0] = -3e38
    assert compared(reference, finite).top1_agreement == 1


def test_a_changed_shape_is_refused() -> None:
    with pytest.raises(VerifyError, match=r"(?s)'y' changed its shape.*where: \(\d, 2\).*expected: \(\d, 3\)"):
        compared(X[:, :3], X[:, :2])


# ---- graphs and interfaces ------------------------------------------------------------------------------------------


def test_valid_graphs_pass() -> None:
    verify_graph(model_of())


def test_large_weights_are_not_needed_for_the_check() -> None:
    weight = ", ".join("1" for _ in range(3 * 400))
    verify_graph(model_of(f"{HEAD}\nm (float[n, 3] x) => (float[n, 400] y)\n<float[3, 400] w = {{{weight}}}> {{ y = MatMul(x, w) }}"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda model: setattr(model.graph[0], "op_type", "NoSuchOperator"), "NoSuchOperator"),
        (lambda model: setattr(model.graph[1].outputs[0], "name", "y"), "y"),
        (lambda model: Editor(model).set_attribute(model.graph[0], "bogus", 1), "bogus"),
        (lambda model: model.graph[0].resize_inputs(1), "Mul"),
        (lambda model: model.graph[0].replace_input_with(0, ir.Value(name="from nowhere")), "from nowhere"),
        (lambda model: _read_too_early(model), "late"),
    ],
    ids=["unknown operator", "name twice", "unknown attribute", "input missing", "dangling input", "order"],
)
def test_invalid_graphs_are_refused(change: Any, message: str) -> None:
    model = model_of()
    change(model)
    with pytest.raises(VerifyError, match=f"(?s)not valid ONNX.*({message})"):
        verify_graph(model)


def _read_too_early(model: ir.Model) -> None:
    edit = Editor(model)
    late = edit.insert(model.graph[1], "Neg", [model.graph.inputs[0]], output="late", after=True)
    edit.rewire(model.graph[0], 0, late)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (TEXT.replace("[n, 3] x)", "[n, 3] x, float[n] more)"), "inputs changed.*more"),
        (TEXT.replace("float[n, 3] y, float[n, 3] z", "float[n, 3] z, float[n, 3] y"), "outputs changed"),
        (TEXT.replace("float[n, 3] y, ", ""), "outputs changed"),
        (TEXT.replace(" x", " v").replace("(x", "(v"), "inputs changed"),
    ],
    ids=["more inputs", "order", "fewer outputs", "renamed"],
)
def test_a_changed_interface_is_refused(text: str, message: str) -> None:
    with pytest.raises(VerifyError, match=f"(?s){message}"):
        require_same_interface(model_of(), model_of(text))


@pytest.mark.parametrize("text", [TEXT.replace("float[n, 3] x", "float16[n, 3] x"), TEXT.replace("float[n, 3] x", "float[n, 4] x")])
def test_a_changed_type_or_shape_of_an_input_is_refused(text: str) -> None:
    with pytest.raises(VerifyError, match="inputs changed"):
        require_same_interface(model_of(), model_of(text))


def test_the_same_interface_passes() -> None:
    require_same_interface(model_of(), model_of(TEXT.replace("Mul", "Sub")))


def test_latency_is_measured_side_by_side() -> None:
    executor = Executor(model_of())
    found = measure_latency(executor, executor, {"x": X}, seconds=0.0)
    assert found.batch == len(X) and found.reference_ms > 0 and found.result_ms > 0
    assert found.speedup == pytest.approx(found.reference_ms / found.result_ms)
