"""The plan of an engine, read from what the builder says."""

import importlib.util
from pathlib import Path

import pytest

import graphq
from graphq import ir
from graphq.backends.engine_layers import Layer, Tensor, facts, read_plan
from graphq.models import digits, onnx_path
from graphq.recipe import parse_recipe

needs_rtx = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None,
                               reason="TensorRT-RTX is not installed (pip install graphq[tensorrt-rtx])")  # fmt: skip


def tensor(name: str, shape: str, dtype: str) -> str:
    return f"{{ Name: {name}, Dimensions: [{shape}], Strides: [1], StrideOrder: [0], Datatype: {dtype}, Format: (Linear) Row major }}"


def line(name: str, kind: str, inputs: str, constants: str, nodes: str, tactic: str = "sm80_xmma_gemm") -> str:
    return (f"Name: {name}, LayerType: {kind}, Inputs: [ {inputs}], Constants: [ {constants}], Outputs: [ {tensor('y', '-1,6', 'Float')}], "
            f"TacticName: {tactic}, StreamId: 0, Metadata: {nodes}")  # fmt: skip


INT8 = line("fc_myl0_1", "gemm", tensor("x", "-1,4", "Int8"), f"{tensor('w', '4,6', 'Int8')}, {tensor('alpha', '1', 'Float')}",
            "[ONNX Layer: fc][ONNX Layer: xd]")  # fmt: skip
LOST = line("__myl_CastMulFc_myl0_1", "runtime_fusion", f"{tensor('x', '-1,4', 'Int8')}, {tensor('w', '1,4,6', 'Float')}", "",
            "[ONNX Layer: fc][ONNX Layer: xd]")  # fmt: skip
GELU = line("__myl_DivErfCastMulAdd_myl0_2", "kgen", tensor("x", "-1,6", "Half"), tensor("b", "1,6", "Half"),
            "[ONNX Layer: fc][ONNX Layer: gelu]")  # fmt: skip
UNPACK = line("__myl_CastMul_myl0_0", "kgen", "", tensor("w", "4,6", "Int8"), "[ONNX Layer: wd][ONNX Layer: fc]")

WEIGHT = ", ".join(str(index % 7) for index in range(24))
MODEL = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["" : 21]>
    g (float[n, 4] x) => (float[n, 6] y)
    <float s = {{0.1}}, int8 z = {{0}}, int8[4, 6] w = {{{WEIGHT}}}, float[6] ws = {{1, 1, 1, 1, 1, 1}}, int8[n, 4] xq>
    {{
        xq = QuantizeLinear(x, s, z)
        [xd] xd = DequantizeLinear(xq, s, z)
        [wd] wd = DequantizeLinear<axis = 1>(w, ws)
        [fc] y = MatMul(xd, wd)
    }}""")


def test_a_line_is_read() -> None:
    weight, alpha = Tensor("int8", (4, 6)), Tensor("float32", (1,))
    layer = Layer("fc_myl0_1", "gemm", (Tensor("int8", (-1, 4)),), (weight, alpha), "sm80_xmma_gemm", ("fc", "xd"))
    assert read_plan(["Layers:", "nothing of interest", INT8]) == [layer]


def test_names_may_hold_brackets() -> None:
    (layer,) = read_plan([INT8.replace("[ONNX Layer: fc]", "[ONNX Layer: blocks[0]/fc]")])
    assert layer.nodes == ("blocks[0]/fc", "xd")


@pytest.mark.parametrize(("lines", "got", "unfused"), [
    ([INT8], "int8 x int8", ()), ([], "", ()), ([INT8, GELU], "int8 x int8", ()),
    ([UNPACK, LOST], "int8 x float32", ("xd", "wd")), ([LOST, UNPACK], "int8 x float32", ("xd", "wd")),
])  # fmt: skip
def test_what_a_node_asked_for_and_got(lines: list[str], got: str, unfused: tuple[str, ...]) -> None:
    found = facts(MODEL, read_plan(lines))
    assert [(node.node, node.asked, node.got) for node in found.nodes] == [("fc", "int8 x int8", got)]
    assert found.unfused == unfused and found.layers == len(lines)


@pytest.mark.parametrize(("tactic", "sparse"), [("sm80_sparse_gemm", 1), ("sm80_gemm", 0), ("__myelin_CASK_STUB", None), ("", None)])
def test_sparse_kernels_are_never_assumed(tactic: str, sparse: int | None) -> None:
    assert facts(MODEL, read_plan([INT8.replace("sm80_xmma_gemm", tactic)])).sparse_kernels == sparse


@needs_rtx
@pytest.mark.parametrize(("passes", "lost"), [
    ("- tune\n- insert-qdq", 0), ("- insert-qdq", 4), ("- tune\n- insert-qdq: {attention: true}", 0),
])  # fmt: skip
def test_a_joint_projection_loses_its_integers_unless_it_is_split(passes: str, lost: int, tmp_path: Path) -> None:
    """TensorRT-RTX 1.7 cuts it into query, key and value behind its DequantizeLinear, which then is no constant of an integer kernel."""
    recipe = parse_recipe(f"passes:\n- normalize\n{passes}\n", "r")
    report = graphq.convert(onnx_path("digits_vit"), tmp_path / "m.engine", recipe=recipe, calib={"input": digits.calibration(16)},
                            target="tensorrt-rtx", emit="engine")  # fmt: skip
    assert report.engine is not None and report.engine.layers > 20
    integer, changed = "int8 x int8", [node for node in report.engine.nodes if node.asked != node.got]
    assert len(changed) == lost and {(node.asked, node.got) for node in changed} <= {(integer, "int8 x float32")}
    assert len(report.engine.unfused) == 2 * lost
    assert report.engine.counts[integer] == sum(node.asked == integer for node in report.engine.nodes) - lost > 10
