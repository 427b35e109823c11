"""Run a model on torch, differentiable with respect to whatever is fed: inputs, activations, weights, scales.

Needs torch (extra `torch`), so it is imported only by what asks for it. `executor` flattens the graph and walks it, `table` holds the
operators that the modules `ops_*` register, and `tensors` which torch types stand for ONNX's.

Why not onnx2torch (1.5.15): of twelve models exported with opset 20 and 21 it converts one, and of the 1,884 models of onnx's backend
suite it computes 338 right (`benchmarks/torch_executor.py peer`), as nearly all its operators are those of operator sets up to 17; it
makes modules, so that a weight or an activation cannot be fed, and it needs torchvision.
"""

from graphq.errors import UsageError

try:
    import torch as _torch  # noqa: F401
except ImportError as error:
    raise UsageError(
        "What was asked for runs models on torch, which is not installed.", hint="pip install graphq[torch], or torch for your GPU first"
    ) from error  # fmt: skip

from graphq.torch_executor.executor import TorchExecutor
from graphq.torch_executor.table import OPERATORS

__all__ = ["OPERATORS", "TorchExecutor"]
