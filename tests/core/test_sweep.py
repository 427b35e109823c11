"""The sweep: what it hands over equals plain runs of both models, each node runs once, and spilling changes no number."""

from __future__ import annotations

import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from graphq import ir, qdq, sweep
from graphq.calibration import CalibrationSet, open_calibration
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.executor import Executor, Fetch
from graphq.quantizers import Uniform
from graphq.spec import PerAxis, PerTensor, QuantSpec
from graphq.sweep import SweepStep

HEAD = '<ir_version: 10, opset_import: ["" : 21]>'
SQUARE = ", ".join(str((k * 7 % 11 - 5) / 4) for k in range(16))
BRANCHES = f"""{HEAD}
branches (float[n, 4] x) => (float[n, 4] y, float[n, 4] side)
<float[4, 4] w1 = {{{SQUARE}}}, float[4, 4] w2 = {{{SQUARE}}}, float[4, 4] w3 = {{{SQUARE}}}, float[4, 4] w4 = {{{SQUARE}}}>
{{
   [first] a = MatMul(x, w1)
   [relu] b = Relu(a)
   [second] c = MatMul(b, w2)
   [residual] d = Add(c, b)
   [left] e = MatMul(d, w3)
   [right] side = MatMul(d, w4)
   [join] f = Mul(e, side)
   [outer] g = Add(f, a)
   [last] y = Tanh(g)
}}"""
LINEAR = ("first", "second", "left", "right")
IF_MODEL = f"""{HEAD}
chosen (float[n, 4] x, bool[n] pick) => (float[n, 4] y)
<float[4, 4] w1 = {{{SQUARE}}}, float[4, 4] w2 = {{{SQUARE}}}>
{{
   [first] a = MatMul(x, w1)
   [relu] b = Relu(a)
   [any] m = Cast <to = 7> (pick)
   [count] t = ReduceMax <keepdims = 0> (m)
   [flag] c = Cast <to = 9> (t)
   [choice] d = If(c) <
      then_branch = left () => (float[n, 4] p) {{ p = Add(a, b) }},
      else_branch = right () => (float[n, 4] q) {{ r = Neg(b)  q = Sub(r, a) }}>
   [second] e = MatMul(d, w2)
   [last] y = Add(e, b)
}}"""
SAMPLES = 21  # two whole batches and a short one


@pytest.fixture(autouse=True)
def batches_of_eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "BATCH", 8)


def data(model: ir.Model) -> CalibrationSet:
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((SAMPLES, 4)).astype(np.float32), "pick": np.arange(SAMPLES) % 2 == 0}
    return open_calibration({entry.name: arrays[entry.name] for entry in ir.inputs(model)}, ir.inputs(model))


def named(model: ir.Model, *names: str) -> list[ir.Node]:
    nodes = {node.name: node for node in model.graph}
    return [nodes[name] for name in names]


def values(model: ir.Model, value: ir.Value | None) -> np.ndarray:
    """One value over all samples, by a plain run of the whole model."""
    assert value is not None
    executor = Executor(model, [Fetch(value.name or "")])
    return np.concatenate([executor.run(batch)[0] for batch in data(model).batches(sweep.BATCH)])


def joined(batches: list[np.ndarray]) -> np.ndarray:
    assert [len(array) for array in batches] == [min(sweep.BATCH, SAMPLES - start) for start in range(0, SAMPLES, sweep.BATCH)]
    return np.concatenate(batches)


def walk(model: ir.Model, reference: ir.Model, names: tuple[str, ...], **options: int) -> Iterator[SweepStep]:
    return sweep.sweep(model, reference, named(model, *names), data(model), **options)


@pytest.fixture(params=[BRANCHES, IF_MODEL], ids=["branches", "if"])
def models(request: pytest.FixtureRequest) -> tuple[ir.Model, ir.Model, tuple[str, ...]]:
    """A model, its reference, and where to stop."""
    model = ir.from_onnx_text(request.param)
    return model, ir.clone(model), LINEAR if request.param is BRANCHES else ("first", "second")


@pytest.mark.parametrize("budget", [2 << 30, 500, 0])
def test_every_step_equals_plain_runs(models: tuple[ir.Model, ir.Model, tuple[str, ...]], budget: int) -> None:
    """Weights are changed at every stop: what comes after has to see that in the current model, and only there."""
    model, reference, stops = models
    edit = Editor(model)
    twins = {node.name: node for node in reference.graph}
    seen = []
    for step in walk(model, reference, stops, memory_budget=budget):
        twin = twins[step.node.name]
        x_cur, y_ref = joined(step.x_cur), joined(step.y_ref)
        np.testing.assert_array_equal(x_cur, values(model, step.node.inputs[0]))
        np.testing.assert_array_equal(y_ref, values(reference, twin.outputs[0]))
        if seen and step.node.op_type == "MatMul":
            assert not np.array_equal(x_cur, values(reference, twin.inputs[0])), step.node.name
        if step.node.op_type == "MatMul":
            old = ir.constant(step.node.inputs[1])
            assert old is not None
            edit.set_weight(step.node, 1, old * 1.25 + 0.1)
        np.testing.assert_array_equal(joined(step.y_cur()), values(model, step.node.outputs[0]))
        seen.append(step.node.name)
    assert seen == list(stops)


def test_nodes_are_visited_in_the_order_of_the_graph() -> None:
    model = ir.from_onnx_text(BRANCHES)
    assert [step.node.name for step in walk(model, ir.clone(model), ("right", "first", "left", "second"))] == list(LINEAR)
    assert list(walk(model, ir.clone(model), ())) == []


def test_any_node_can_be_a_stop() -> None:
    model = ir.from_onnx_text(BRANCHES)
    reference, every = ir.clone(model), tuple(node.name or "" for node in model.graph)
    for step in walk(model, reference, every):
        np.testing.assert_array_equal(joined(step.x_cur), values(model, step.node.inputs[0]))
        np.testing.assert_array_equal(joined(step.y_ref), values(model, step.node.outputs[0]))


@pytest.mark.parametrize("budget", [2 << 30, 0])
def test_blocks_equal_plain_runs(budget: int) -> None:
    """Each block has what has to run for its end and has not; weights are changed at every stop, which later blocks see."""
    model = ir.from_onnx_text(BRANCHES)
    reference, edit, found = ir.clone(model), Editor(model), []
    ends = [node.outputs[0] for node in named(model, "residual", "right", "last")]
    for step in sweep.sweep_blocks(model, reference, ends, data(model), batch=8, memory_budget=budget):
        np.testing.assert_array_equal(joined(step.y_ref), values(reference, step.end))
        for name, arrays in step.x_cur.items():
            np.testing.assert_array_equal(joined(arrays), values(model, ir.values_by_name(model.graph)[name]))
        for node in step.nodes:
            if node.op_type == "MatMul":
                edit.set_weight(node, 1, np.asarray(ir.constant(node.inputs[1])) * 1.25 + 0.1)
        found.append(([node.name for node in step.nodes], sorted(step.x_cur)))
    assert [(sorted(map(str, nodes)), read) for nodes, read in found] == [
        (["first", "relu", "residual", "second"], ["x"]), (["right"], ["d"]), (["join", "last", "left", "outer"], ["a", "d", "side"]),
    ]  # fmt: skip


def test_blocks_end_with_values_that_the_reference_has() -> None:
    model = ir.from_onnx_text(BRANCHES)
    reference = ir.clone(model)
    ir.values_by_name(reference.graph)["d"].name = "other"
    with pytest.raises(ModelError, match="no such value"):
        next(sweep.sweep_blocks(model, reference, [ir.values_by_name(model.graph)["d"]], data(model)))


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> dict[ir.Model, Counter[str]]:
    """How often each node of each model has run, and under "sessions" how many sessions there were."""
    found: dict[ir.Model, Counter[str]] = defaultdict(Counter)
    init, run = Executor.__init__, Executor.run

    def noting_init(self: Executor, which: ir.Model, *args: object, **options: object) -> None:
        init(self, which, *args, **options)  # type: ignore[arg-type]
        self.noted = (which, [node.name for node in options["nodes"]])  # type: ignore[attr-defined]
        found[which]["sessions"] += 1

    def noting_run(self: Executor, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        which, names = self.noted  # type: ignore[attr-defined]
        found[which].update(names)
        return run(self, feeds)

    monkeypatch.setattr(Executor, "__init__", noting_init)
    monkeypatch.setattr(Executor, "run", noting_run)
    return found


BATCHES = -(-SAMPLES // 8)
NEEDED = {"branches": ["first", "relu", "second", "residual"], "if": ["first", "relu", "any", "count", "flag", "choice"]}
"""What the stops of the models above depend on."""


@pytest.mark.parametrize("case", ["branches", "if"])
def test_every_node_runs_once_in_either_model(case: str, ran: dict[ir.Model, Counter[str]]) -> None:
    model = ir.from_onnx_text(BRANCHES if case == "branches" else IF_MODEL)
    reference, stops = ir.clone(model), LINEAR if case == "branches" else ("first", "second")
    for step in walk(model, reference, stops):
        assert len(step.y_ref) == BATCHES
    assert len(step.y_ref) == BATCHES  # a second time, it is there already
    del ran[model]["sessions"], ran[reference]["sessions"]
    assert ran[model] == dict.fromkeys(NEEDED[case], BATCHES)
    assert ran[reference] == dict.fromkeys([*NEEDED[case], *stops[-1 if case == "if" else -2 :]], BATCHES)


def test_the_reference_runs_only_for_who_asks(ran: dict[ir.Model, Counter[str]]) -> None:
    model = ir.from_onnx_text(BRANCHES)
    reference = ir.clone(model)
    steps = list(walk(model, reference, LINEAR))
    assert ran[model] and not ran[reference]
    assert steps[2].y_ref and set(ran[reference]) == {"sessions", *NEEDED["branches"], "left"}
    with pytest.raises(AssertionError, match="over"):
        _ = steps[1].y_ref


def test_stops_that_read_one_value_cost_one_session(ran: dict[ir.Model, Counter[str]]) -> None:
    """As query, key and value do: what the first of them computes is not needed for the others."""
    model = ir.from_onnx_text(BRANCHES)
    list(walk(model, ir.clone(model), ("left", "right")))
    assert ran[model]["sessions"] == 1


def test_what_nobody_reads_any_more_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most the frontier is held: here x, and in either model two values beside what the step hands over."""
    steps = "\n".join(f"[n{k}] v{k + 1} = MatMul(v{k}, w)" for k in range(30))
    model = ir.from_onnx_text(f"{HEAD}\nm (float[n, 4] x) => (float[n, 4] v30)\n<float[4, 4] w = {{{SQUARE}}}> {{ v0 = Relu(x)\n{steps} }}")
    stores, init = [], sweep.Store.__init__

    def noting(self: sweep.Store, folder: Path, budget: int) -> None:
        init(self, folder, budget)
        stores.append(self)

    monkeypatch.setattr(sweep.Store, "__init__", noting)
    held = [stores[0].held for _ in walk(model, ir.clone(model), tuple(f"n{k}" for k in range(30)))]
    assert max(held) <= 4 * SAMPLES * 4 * 4 and held[-1] == held[5]


def test_spilling_leaves_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = ir.from_onnx_text(BRANCHES)
    peak = 0
    for step in walk(model, ir.clone(model), LINEAR, memory_budget=0):
        peak = max(peak, len(list(tmp_path.rglob("*.npy"))))
        assert all(isinstance(array, np.memmap) for array in step.y_ref)
    assert peak > 0 and not list(tmp_path.iterdir())
    unfinished = walk(model, ir.clone(model), LINEAR, memory_budget=0)
    assert next(unfinished).y_ref
    assert list(tmp_path.rglob("*.npy"))
    unfinished.close()  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())


def test_batches_are_put_away_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    model, events = ir.from_onnx_text(BRANCHES), []
    put, run = sweep.Store.put, Executor.run
    monkeypatch.setattr(sweep.Store, "put", lambda self, array: events.append("put") or put(self, array))
    monkeypatch.setattr(Executor, "run", lambda self, feeds: events.append("run") or run(self, feeds))
    list(walk(model, ir.clone(model), ("last",), memory_budget=0))
    ran = [index for index, event in enumerate(events) if event == "run"]
    assert all("put" in events[start:stop] for start, stop in zip(ran, [*ran[1:], len(events)], strict=True))


def test_inputs_count_against_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = ir.from_onnx_text(BRANCHES)
    (step,) = walk(model, ir.clone(model), ("first",), memory_budget=0)
    assert all(isinstance(array, np.memmap) for array in step.x_cur)
    np.testing.assert_array_equal(joined(step.x_cur), values(model, step.node.inputs[0]))


def test_nothing_spills_within_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = ir.from_onnx_text(BRANCHES)
    for _ in walk(model, ir.clone(model), LINEAR):
        assert not list(tmp_path.rglob("*.npy"))


def test_a_node_that_only_the_current_model_has() -> None:
    model = ir.from_onnx_text(BRANCHES)
    reference = ir.clone(model)
    model.graph[2].name = "renamed"
    (step,) = walk(model, reference, ("renamed",))
    np.testing.assert_array_equal(joined(step.x_cur), values(model, step.node.inputs[0]))
    with pytest.raises(ModelError, match="(?s)no such node.*MatMul 'renamed'"):
        _ = step.y_ref


# ---- quantizing on the way ------------------------------------------------------------------------------------------


def quantize(edit: Editor, step: SweepStep) -> None:
    """An asymmetric QDQ pair on the input and an int8 weight, as a pass would do at a stop."""
    x, spec = np.concatenate(step.x_cur), QuantSpec(8, signed=False, symmetric=False, granularity=PerTensor())
    value = step.node.inputs[0]
    assert value is not None
    qdq.insert_weight(edit, step.node, QuantSpec(8, granularity=PerAxis(1)))
    qdq.insert_pair(edit, value, Uniform(spec).fit(x.min(), x.max()), spec, [(step.node, 0)])


def test_pairs_and_weights_put_in_on_the_way_are_seen_downstream() -> None:
    model = ir.from_onnx_text(BRANCHES)
    reference = ir.clone(model)
    edit = Editor(model)
    for index, step in enumerate(walk(model, reference, LINEAR)):
        np.testing.assert_array_equal(joined(step.x_cur), values(model, step.node.inputs[0]))
        twin = next(node for node in reference.graph if node.name == step.node.name)
        assert np.array_equal(joined(step.x_cur), values(reference, twin.inputs[0])) == (index == 0)
        quantize(edit, step)
        np.testing.assert_array_equal(joined(step.y_cur()), values(model, step.node.outputs[0]))


def test_a_quantized_weight_is_no_part_of_the_frontier(monkeypatch: pytest.MonkeyPatch) -> None:
    """DequantizeLinear of a constant is computed with its reader: kept for later, it would cost more than the activations."""
    model = ir.from_onnx_text(BRANCHES)
    reference, edit = ir.clone(model), Editor(model)
    for node in named(model, *LINEAR):
        qdq.insert_weight(edit, node, QuantSpec(8, granularity=PerAxis(1)))
    stored = []
    put = sweep.Store.put

    def noting(self: sweep.Store, array: np.ndarray) -> np.ndarray:
        stored.append(array.shape)
        return put(self, array)

    monkeypatch.setattr(sweep.Store, "put", noting)
    for step in walk(model, reference, LINEAR):
        np.testing.assert_array_equal(joined(step.x_cur), values(model, step.node.inputs[0]))
        np.testing.assert_array_equal(joined(step.y_cur()), values(model, step.node.outputs[0]))
    assert stored and {shape[0] for shape in stored} == {8, 5}


def test_a_stop_whose_first_input_is_constant() -> None:
    model = ir.from_onnx_text(f"""{HEAD}
m (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] w = {{{SQUARE}}}, float[4, 4] v = {{{SQUARE}}}>
{{ [folded] k = Neg(w)  [product] a = MatMul(k, v)  [turned] b = MatMul(a, v)  [last] y = MatMul(x, b) }}""")
    for step in walk(model, ir.clone(model), ("product", "turned", "last")):
        if step.node.name != "last":
            for batch in step.x_cur:
                np.testing.assert_array_equal(batch, values(model, step.node.inputs[0])[:4])
            np.testing.assert_array_equal(step.y_ref[0], step.y_cur()[0])
        else:
            np.testing.assert_array_equal(joined(step.x_cur), values(model, step.node.inputs[0]))
            np.testing.assert_array_equal(joined(step.y_ref), values(model, step.node.outputs[0]))


@pytest.mark.parametrize("bits", [8, 6, 4])
def test_what_lies_before_a_quantizer_is_there_for_every_reader(bits: int) -> None:
    """Also for a stop that comes after others have run, and without the Clip that widths of 6 bits have."""
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 21]> g (float[N,4] x) => (float[N,4] y, float[N,4] z)
        <float[4,4] w = {1,2,3,4, 5,6,7,8, 9,1,2,3, 4,5,6,7}> {
            a = Neg(x)
            [first] b = MatMul(a, w)
            [middle] y = MatMul(b, w)
            [last] z = MatMul(a, w)
        }"""
    )
    reference, edit = ir.clone(model), Editor(model)
    a = named(model, "first")[0].inputs[0]
    assert a is not None
    spec = QuantSpec(bits)
    readers = [(node, 0) for node in named(model, "first", "last")]
    qdq.insert_pair(edit, a, Uniform(spec).fit(-1.0, 1.0), spec, readers)
    x = np.linspace(-3, 3, 40, dtype=np.float32).reshape(10, 4)
    steps = dict[str | None, tuple[np.ndarray, np.ndarray]]()
    for step in sweep.sweep(model, reference, named(model, "first", "middle", "last"), open_calibration({"x": x}, ir.inputs(model))):
        steps[step.node.name] = (np.concatenate(step.x_cur), np.concatenate(step.x_raw))
    for name in ("first", "last"):
        np.testing.assert_array_equal(steps[name][1], -x)
        assert np.abs(steps[name][0]).max() < 1.2
    np.testing.assert_array_equal(*steps["middle"])
