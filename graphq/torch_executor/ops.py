"""All operators: importing this module fills the table."""

from __future__ import annotations

from graphq.torch_executor import (  # noqa: F401
    ops_attention,
    ops_conv,
    ops_index,
    ops_math,
    ops_norm,
    ops_quantize,
    ops_reduce,
    ops_resize,
    ops_shape,
)
from graphq.torch_executor.table import OPERATORS

__all__ = ["OPERATORS"]
