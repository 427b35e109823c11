"""Stands in for the native half of TensorRT, so that NVIDIA's own `tensorrt.plugin` package runs without the library.

That package is pure Python and comes from the wheel `tensorrt-cu13-bindings`: registration, the checks of signatures and results,
and what TensorRT calls to build an engine are NVIDIA's code. Here are only the names from C++ that it touches: enumerations with their
documented members, records without behaviour, and integer expressions that are evaluated at once.
"""

from __future__ import annotations

import enum
import importlib.util
import operator
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

DataType = enum.Enum("DataType", "FLOAT HALF BF16 INT8 INT32 INT64 BOOL UINT8 FP8 INT4 FP4 E8M0")
TensorFormat = enum.Enum("TensorFormat", "LINEAR CHW2 HWC8 CHW4 CHW16 CHW32")
DimensionOperation = enum.Enum("DimensionOperation", "SUM PROD MAX MIN SUB EQUAL LESS FLOOR_DIV CEIL_DIV")
PluginFieldType = enum.Enum("PluginFieldType", "FLOAT16 FLOAT32 FLOAT64 INT8 INT16 INT32 CHAR DIMS UNKNOWN BF16 INT64 FP8 INT4 FP4")
PluginArgType = enum.Enum("PluginArgType", "INT")
PluginArgDataType = enum.Enum("PluginArgDataType", "INT8 INT16 INT32")
QuickPluginCreationRequest = enum.Enum("QuickPluginCreationRequest", "UNKNOWN PREFER_JIT PREFER_AOT STRICT_JIT STRICT_AOT")

_OPERATIONS = {
    "SUM": operator.add, "PROD": operator.mul, "MAX": max, "MIN": min, "SUB": operator.sub, "EQUAL": operator.eq, "LESS": operator.lt,
    "FLOOR_DIV": operator.floordiv, "CEIL_DIV": lambda a, b: -(-a // b),
}  # fmt: skip


class IDimensionExpr:
    """An integer; `constant` if the engine is built for it alone."""

    def __init__(self, value: int, constant: bool = True) -> None:
        self.value, self.constant = value, constant

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        return self.value


class IExprBuilder:
    def constant(self, value: int) -> IDimensionExpr:
        return IDimensionExpr(value)

    def operation(self, operation: DimensionOperation, a: IDimensionExpr, b: IDimensionExpr) -> IDimensionExpr:
        return IDimensionExpr(int(_OPERATIONS[operation.name](a.value, b.value)), a.constant and b.constant)


class Dims(tuple[int, ...]):
    MAX_DIMS = 8


class DimsExprs(list[Any]):
    def __init__(self, length: int) -> None:
        super().__init__([None] * length)


class PluginTensorDesc:
    dims: Dims
    type: DataType
    format = TensorFormat.LINEAR
    scale = -1.0


class DynamicPluginTensorDesc:
    """`desc.dims` holds -1 where `min`, `opt` and `max` differ."""

    def __init__(self, dtype: DataType, smallest: tuple[int, ...], largest: tuple[int, ...]) -> None:
        self.desc = PluginTensorDesc()
        self.desc.type = dtype
        self.desc.dims = Dims(a if a == b else -1 for a, b in zip(smallest, largest, strict=True))
        self.min, self.opt, self.max = Dims(smallest), Dims(largest), Dims(largest)


class _Registry:
    def __init__(self) -> None:
        self.creators: dict[tuple[str, str, str], Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        self.creators[creator.name, creator.plugin_version, namespace] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators[name, version, namespace]


class _Native:
    """What NVIDIA's classes derive from: constructed without arguments, and nothing else is asked of it."""


def module() -> ModuleType | None:
    """A package `tensorrt` over NVIDIA's Python files, or None where their wheel is not installed."""
    spec = importlib.util.find_spec("tensorrt_bindings")  # found, not imported: importing it loads the library
    if spec is None or spec.origin is None:
        return None
    made: Any = ModuleType("tensorrt")
    made.__path__ = [str(Path(spec.origin).parent)]
    own = {name: value for name, value in globals().items() if isinstance(value, type) and value.__module__ == __name__}
    made.__dict__.update(own)
    for name in ("IPluginV3", "IPluginV3QuickCore", "IPluginV3QuickBuild", "IPluginV3QuickAOTBuild", "IPluginV3QuickRuntime",
                 "IPluginCreatorV3Quick", "ISymExpr", "ITensor"):  # fmt: skip
        setattr(made, name, type(name, (_Native,), {}))
    made.float32, made.float16, made.int32 = DataType.FLOAT, DataType.HALF, DataType.INT32
    made.Logger = type("Logger", (), {"WARNING": 1, "log": lambda self, severity, text: None})
    made.PluginField = lambda name, data, type: SimpleNamespace(name=name, data=data, type=type)
    made.PluginFieldCollection = list
    registry = _Registry()
    made.get_plugin_registry = lambda: registry
    return made


def remove() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorrt"]:
        del sys.modules[name]
