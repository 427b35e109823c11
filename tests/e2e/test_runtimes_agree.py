"""A whole model with quantized attention gives the same in ONNX Runtime and in the ReferenceEvaluator.

In float64: in float32 the two add up in another order, which moves a number in 10,000 over the boundary of a code, and twelve layers
make 1e-3 of that (each quantizer alone: tests/passes/test_sulq_softmax.py).
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from graphq import ir
from graphq.calibration import open_calibration
from graphq.executor import Executor, Fetch
from graphq.passes.normalize import Normalize
from graphq.passes.sulq_softmax import SulqSoftmax
from graphq.pipeline import PassContext, run_passes
from graphq.targets import get_target
from graphq.verify import verify_graph


def doubled(proto: onnx.ModelProto) -> onnx.ModelProto:
    """The model in float64, its GELU in the tanh form: ONNX Runtime has no Erf of doubles."""
    tensors = list(proto.graph.initializer)
    for node in [*proto.graph.node, *(node for function in proto.functions for node in function.node)]:
        tensors += [entry.t for entry in node.attribute if entry.type == onnx.AttributeProto.TENSOR]
        if node.op_type == "Gelu":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("approximate", "tanh"))
    for tensor in tensors:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    del proto.graph.value_info[:]
    for value in [*proto.graph.input, *proto.graph.output]:
        value.type.tensor_type.elem_type = TensorProto.DOUBLE
    return proto


@pytest.mark.parametrize("quantizer", ["sulq", "log2", "log-sqrt2"])
def test_a_whole_vision_transformer(assets: ModuleType, quantizer: Any) -> None:
    """To 1e-5; behind the first convolution, which ONNX Runtime has not in float64 either. Symmetric forms, whose codes are floats."""
    model = ir.load(Path(str(assets.__file__)).parent / "models" / "vit_tiny_patch16_224.onnx")
    images = assets.calibration("vit_tiny_patch16_224", 2)
    calib = open_calibration(images, ir.inputs(model))
    ctx = PassContext(model=model, reference=ir.clone(model), calib=calib, held_out=calib, target=get_target("tensorrt-rtx"))
    run_passes([Normalize(), SulqSoftmax(quantizer=quantizer)], ctx, verify_graph)
    first = next(node for node in model.graph if node.op_type == "Conv").outputs[0].name or ""
    patches = Executor(model, [Fetch(first)]).run(images)[0].astype(np.float64)
    proto = ir.to_proto(model)
    proto.graph.node.remove(next(node for node in proto.graph.node if node.op_type == "Conv"))
    proto.graph.input.append(helper.make_tensor_value_info(first, TensorProto.FLOAT, None))
    feeds = {first: patches, **{name: array.astype(np.float64) for name, array in images.items()}}
    found = ort.InferenceSession(doubled(proto).SerializeToString()).run(None, feeds)[0]
    expected = ReferenceEvaluator(proto).run(None, feeds)[0]
    assert len(proto.functions) == 1 and np.abs(expected).max() > 1  # type: ignore[union-attr]
    np.testing.assert_allclose(found, expected, atol=1e-5)
