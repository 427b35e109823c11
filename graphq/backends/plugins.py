"""Hand the operators of the domain `graphq` in a model over to TensorRT plugins."""

from __future__ import annotations

from functools import partial
from importlib import import_module

import numpy as np

from graphq import ir, ops
from graphq.editor import Editor
from graphq.errors import TargetError

REGISTER = "graphq.kernels:register_plugins"
"""What registers the plugins in this process, as "module:function"."""

NODE_ATTRIBUTES = {"plugin_namespace": "graphq", "plugin_version": "1", "aot": 1}
"""By which TensorRT's ONNX parser finds a plugin and takes its ahead-of-time implementation."""


def with_plugins(model: ir.Model) -> ir.Model:
    """A copy of `model` whose operators of the domain `graphq` are computed by the kernels of graphq, registered in this process.

    Raises:
        TargetError: what compiles the kernels is not installed.
        UsageError: there is no GPU to compile them for.
    """
    module, _, function = REGISTER.partition(":")
    try:
        getattr(import_module(module), function)()
    except ImportError as error:
        raise TargetError(
            "The kernels of graphq cannot be compiled.", where=str(error), expected="torch and triton",
            hint="pip install 'graphq[kernels]', or leave out --engine plugins",
        ) from error  # fmt: skip
    copy = ir.clone(model)
    bind(copy)
    return copy


def bind(model: ir.Model) -> None:
    """Turn the calls of functions that plugins compute into nodes that TensorRT's parser takes for these plugins.

    The functions go, since the parser would put their bodies in; packed weights become int8, because plugins have no uint8 tensors.
    """
    edit, names = Editor(model), set(ops.OPERATORS)
    for node in [node for node in ir.all_nodes(model) if node.domain == ir.DOMAIN and node.op_type in names]:
        for name, value in NODE_ATTRIBUTES.items():
            edit.set_attribute(node, name, value)
        for index, operand in enumerate(node.inputs):
            packed = ir.constant(operand)
            if packed is not None and packed.dtype == np.uint8:
                name = f"{operand.name}_bytes" if operand is not None else ""
                edit.rewire(node, index, edit.shared(operand, name, partial(packed.view, np.int8), "int8"))
    edit.remove_functions(ir.DOMAIN, names)
    edit.prune()
