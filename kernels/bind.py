"""Hand the operators of the domain `graphq` in a model over to the TensorRT plugins of their kernels."""

from __future__ import annotations

import numpy as np

from graphq import ir, ops
from graphq.editor import Editor

NODE_ATTRIBUTES = {"plugin_namespace": "graphq", "plugin_version": "1", "aot": 1}
"""By which TensorRT's ONNX parser finds a plugin and takes its ahead-of-time implementation."""

def bind_plugins(model: ir.Model) -> None:
    """Turn the calls of functions that plugins compute into nodes that TensorRT's parser takes for these plugins.

    The functions go, since the parser would put their bodies in; packed weights become int8, because plugins have no uint8 tensors.
    """
    edit, names = Editor(model), set(ops.OPERATORS)
    for node in [node for node in ir.all_nodes(model) if node.domain == ir.DOMAIN and node.op_type in names]:
        for name, value in NODE_ATTRIBUTES.items():
            edit.set_attribute(node, name, value)
        for index, value in enumerate(node.inputs):
            packed = ir.constant(value)
            if packed is not None and packed.dtype == np.uint8:
                edit.rewire(node, index, edit.initializer(value.name or "packed", packed.view(np.int8)))  # type: ignore[union-attr]
    edit.remove_functions(ir.DOMAIN, names)
    edit.prune()
