"""Run a model on torch, differentiable with respect to whatever is fed: inputs, activations, weights, scales.

Needs torch (extra `torch`), so it is imported only by what asks for it. `executor` flattens the graph and walks it, `table` holds the
operators that the modules `ops_*` register.
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
