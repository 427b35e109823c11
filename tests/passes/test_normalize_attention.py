"""normalize: the fused Attention operator becomes MatMul and Softmax, with the results of onnx's reference and of ONNX Runtime."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper, parser
from onnx.reference import ReferenceEvaluator

from graphq import ir
from graphq.pipeline import PassRecord

Normalize = Callable[..., tuple[ir.Model, PassRecord]]
Feeds = dict[str, np.ndarray]

B, SQ, SK, D, DV = 2, 5, 7, 8, 6
HEADS = pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)], ids=["multi", "grouped", "one"])
LAYOUT = pytest.mark.parametrize("flat", [False, True], ids=["4d", "3d"])
DYNAMIC = pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
CAUSAL = pytest.mark.parametrize("causal", [0, 1], ids=["", "causal"])


def attention(heads: tuple[int, int] = (4, 4), *, flat: bool = False, dynamic: bool = False, mask: np.ndarray | None = None,
              mask_shape: Sequence[int | str] = (), constant_mask: bool = False, opset: int = 23, lengths: tuple[int, int] = (SQ, SK),
              **attributes: Any) -> tuple[onnx.ModelProto, Feeds]:  # fmt: skip
    """A model of one Attention node, and its feeds."""
    rng = np.random.default_rng(0)
    (h, hk), (sq, sk) = heads, lengths
    real = {
        "q": (B, sq, h * D) if flat else (B, h, sq, D),
        "k": (B, sk, hk * D) if flat else (B, hk, sk, D),
        "v": (B, sk, hk * DV) if flat else (B, hk, sk, DV),
    }
    symbols = {"q": ("b", "sq"), "k": ("b", "sk"), "v": ("b", "sk")}

    def declared(name: str) -> list[int | str]:
        shape: list[int | str] = list(real[name])
        if dynamic:
            shape[0], shape[1 if flat else 2] = symbols[name]
        return shape

    feeds = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in real.items()}
    inputs = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, declared(name)) for name in real]
    if flat:
        attributes |= {"q_num_heads": h, "kv_num_heads": hk}
    constants = []
    if mask is not None:
        if constant_mask:
            constants.append(numpy_helper.from_array(mask, "mask"))
        else:
            feeds["mask"] = mask
            kind = helper.np_dtype_to_tensor_dtype(mask.dtype)
            inputs.append(helper.make_tensor_value_info("mask", kind, mask_shape or mask.shape))
    node = helper.make_node("Attention", [*real, *(["mask"] if mask is not None else [])], ["y"], name="attention", **attributes)
    outputs = [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)]
    graph = helper.make_graph([node], "g", inputs, outputs, constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=11), feeds


def run(proto: onnx.ModelProto, feeds: Feeds) -> np.ndarray:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


def require_same(normalize: Normalize, proto: onnx.ModelProto, feeds: Feeds) -> ir.Model:
    """The decomposed model: it gives what the fused operator gives, in ONNX Runtime and the reference evaluator."""
    model, record = normalize(proto)
    assert not record.skipped and "Attention" not in types(model)
    decomposed = ir.to_proto(model)
    wanted = ReferenceEvaluator(proto).run(None, feeds)[0]
    np.testing.assert_allclose(run(proto, feeds), wanted, atol=1e-5)
    np.testing.assert_allclose(run(decomposed, feeds), wanted, atol=1e-5)
    np.testing.assert_allclose(ReferenceEvaluator(decomposed).run(None, feeds)[0], wanted, atol=1e-5)
    return model


def types(model: ir.Model) -> Counter[str]:
    return Counter(node.op_type for node in model.graph)


def some_mask() -> np.ndarray:
    """Boolean, of which every query sees a key."""
    mask = np.random.default_rng(1).random((SQ, SK)) > 0.4
    mask[:, 0] = True
    return mask


@HEADS
@LAYOUT
@DYNAMIC
@CAUSAL
@pytest.mark.parametrize("more", [{}, {"scale": 0.3}, {"softcap": 2.0}], ids=["plain", "scale", "softcap"])
def test_without_mask(normalize: Normalize, heads: tuple[int, int], flat: bool, dynamic: bool, causal: int, more: dict[str, float]) -> None:
    require_same(normalize, *attention(heads, flat=flat, dynamic=dynamic, is_causal=causal, **more))


@LAYOUT
@DYNAMIC
@CAUSAL
@pytest.mark.parametrize("kind", ["bool", "added", "minus_infinity"])
@pytest.mark.parametrize("blind", [False, True], ids=["", "blind_query"])
def test_masks(normalize: Normalize, flat: bool, dynamic: bool, causal: int, kind: str, blind: bool) -> None:
    """A query that sees no key gets zeros, as the operator says, and no NaN."""
    mask = some_mask()
    if blind:
        mask[2] = False
    if kind != "bool":
        hidden = -np.inf if kind == "minus_infinity" or blind else -3.0
        mask = np.where(mask, np.random.default_rng(2).standard_normal(mask.shape), hidden).astype(np.float32)
    shape = ("sq", "sk") if dynamic else ()
    require_same(normalize, *attention((4, 2), flat=flat, dynamic=dynamic, is_causal=causal, mask=mask, mask_shape=shape, softcap=2.0))


@pytest.mark.parametrize("opset", [23, 24, 25, 26])
def test_opsets(normalize: Normalize, opset: int) -> None:
    proto, feeds = attention(opset=opset)
    model, record = normalize(proto)
    assert not record.skipped
    np.testing.assert_allclose(run(ir.to_proto(model), feeds), ReferenceEvaluator(proto).run(None, feeds)[0], atol=1e-5)


@CAUSAL
def test_a_padding_mask_for_all_queries(normalize: Normalize, causal: int) -> None:
    """[B, 1, 1, keys] is broadcast. ONNX Runtime refuses it in the fused operator, and the reference forgets the causal mask of all
    queries but the first, so the same mask with a row for each query is what it is compared with."""
    mask = np.ones((B, 1, 1, SK), bool)
    mask[1, :, :, 4:] = False
    proto, feeds = attention(mask=mask, is_causal=causal)
    whole, whole_feeds = attention(mask=np.ascontiguousarray(np.broadcast_to(mask, (B, 1, SQ, SK))), is_causal=causal)
    model, _ = normalize(proto)
    np.testing.assert_allclose(run(ir.to_proto(model), feeds), ReferenceEvaluator(whole).run(None, whole_feeds)[0], atol=1e-5)


def test_the_plain_case_is_five_nodes(normalize: Normalize) -> None:
    model = require_same(normalize, *attention(dynamic=True))
    assert [node.op_type for node in model.graph] == ["Mul", "Transpose", "MatMul", "Softmax", "MatMul"]


@CAUSAL
def test_a_constant_mask_that_leaves_a_key_to_each_query_needs_no_guard(normalize: Normalize, causal: int) -> None:
    model = require_same(normalize, *attention(mask=some_mask(), constant_mask=True, is_causal=causal))
    assert types(model)["Where"] == 1


def test_a_constant_mask_and_a_causal_one_may_hide_all_keys_together(normalize: Normalize) -> None:
    mask = some_mask()
    mask[0, 0] = False
    model = require_same(normalize, *attention(mask=mask, constant_mask=True, is_causal=1))
    assert types(model)["Where"] == 2


def test_causal_masks_of_one_size_are_made_once(normalize: Normalize) -> None:
    proto = parser.parse_model("""<ir_version: 10, opset_import: ["" : 23]>
g (float[b, 2, s, 4] x) => (float[b, 2, s, 4] y) {
  a = Attention <is_causal = 1> (x, x, x)
  y = Attention <is_causal = 1> (a, a, a)
}""")
    model, _ = normalize(proto)
    assert types(model)["Range"] == 2 and types(model)["GreaterOrEqual"] == 1
    feeds = {"x": np.random.default_rng(0).standard_normal((1, 2, 3, 4)).astype(np.float32)}
    np.testing.assert_allclose(run(ir.to_proto(model), feeds), run(proto, feeds), atol=1e-5)


def test_a_small_causal_mask_of_fixed_size_is_a_constant(normalize: Normalize) -> None:
    model = require_same(normalize, *attention(is_causal=1))
    assert types(model) == Counter({"MatMul": 2, "Mul": 1, "Transpose": 1, "Where": 1, "Softmax": 1})


CACHE = """g (float[2, 2, 5, 8] q, float[2, 2, 5, 8] past, int64[2] lengths, bool[5, 3] short) => (float[2, 2, 5, 8] y) """
KEPT = {
    "past": ("y, a, b = Attention(q, q, q, , past, past)", "it reads a cache of keys and values"),
    "lengths": ("y = Attention(q, q, q, , , , lengths)", "it reads a cache of keys and values"),
    "scores": ("a, b, c, s = Attention(q, q, q) y = MatMul(s, q)", "it returns keys, values or scores as well"),
    "short_mask": ("y = Attention(q, q, q, short)", "its mask may be shorter than its keys"),
    "precision": ("y = Attention<softmax_precision = 11>(q, q, q)", "its softmax does not compute in float32"),
    "half": ("h = Cast<to = 10>(q) a = Attention(h, h, h) y = Cast<to = 1>(a)", "it does not compute in float32"),
    "window": ("y = Attention<left_window_size = 2>(q, q, q)", "its queries see a window of keys only"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_stays(normalize: Normalize, case: str) -> None:
    body, reason = KEPT[case]
    proto = parser.parse_model(f'<ir_version: 11, opset_import: ["" : {25 if case == "window" else 24}]>\n{CACHE}{{ {body} }}')
    model, record = normalize(proto)
    assert types(model)["Attention"] == 1
    assert [why for _, why in record.skipped] == [reason]


@pytest.mark.parametrize(("shape", "reason"), [
    ("b, h, s, 8", "its number of heads is not known"),
    ("b, 2, s, d", "the size of its heads is not known"),
])  # fmt: skip
def test_sizes_that_are_not_known(normalize: Normalize, shape: str, reason: str) -> None:
    text = f"g (float[{shape}] x) => (float[{shape}] y) {{ y = Attention(x, x, x) }}"
    proto = parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}')
    model, record = normalize(proto)
    assert types(model)["Attention"] == 1 and record.skipped[0][1] == reason


def test_an_unknown_rank_stays(normalize: Normalize) -> None:
    text = "g (float[a, b] x, int64[r] shape) => (float[b, 2, s, 8] y) { v = Reshape(x, shape) y = Attention(v, v, v) }"
    model, record = normalize(parser.parse_model(f'<ir_version: 10, opset_import: ["" : 23]>\n{text}'))
    assert types(model)["Attention"] == 1 and record.skipped[0][1] == "the rank of its inputs is not known"
