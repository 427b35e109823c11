"""TensorRT plugins `graphq::SULQSoftmax`, `graphq::SULQSoftmaxCodes` and `graphq::SULQAttentionValue`."""

from typing import Any

from graphq.ops import check

from .._plugin import count, embed, operands
from .kernel import attention_launch, softmax_launch


def register(arch: int) -> None:
    """Register them in TensorRT, with kernels for compute capability `arch`."""
    _register_softmax(arch)
    _register_codes(arch)
    _register_attention_value(arch)


def _register_softmax(arch: int) -> None:
    import tensorrt.plugin as trtp

    @trtp.register("graphq::SULQSoftmax")
    def describe(x: trtp.TensorDesc, params: trtp.TensorDesc) -> trtp.TensorDesc:
        return x.like()

    @trtp.aot_impl("graphq::SULQSoftmax")
    def implement(
        x: trtp.TensorDesc, params: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        check("SULQSoftmax", operands(x=x, params=params))
        return _softmax(x, packed=False, arch=arch)


def _register_codes(arch: int) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    @trtp.register("graphq::SULQSoftmaxCodes")
    def describe(x: trtp.TensorDesc, params: trtp.TensorDesc) -> trtp.TensorDesc:
        *lead, columns = x.shape_expr
        return trtp.from_shape_expr((*lead, trtp.cdiv(columns, 2)), trt.DataType.INT8)

    @trtp.aot_impl("graphq::SULQSoftmaxCodes")
    def implement(
        x: trtp.TensorDesc, params: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        check("SULQSoftmaxCodes", operands(x=x, params=params))
        return _softmax(x, packed=True, arch=arch)


def _softmax(x: Any, packed: bool, arch: int) -> tuple[str, str, Any, Any]:
    import tensorrt.plugin as trtp

    largest = operands(x=x)["x"]
    launch = softmax_launch(1, largest.shape[-1], largest.dtype, packed)
    rows, columns = count(x, slice(-1)), x.shape_expr[-1]
    scalars = {"rows": rows, "columns": columns, "width": trtp.cdiv(columns, 2) if packed else columns}
    return embed(launch, arch, scalars, trtp.cdiv(rows, launch.constants.get("BLOCK_ROWS", 1)))


def _register_attention_value(arch: int) -> None:
    import tensorrt.plugin as trtp

    @trtp.register("graphq::SULQAttentionValue")
    def describe(packed: trtp.TensorDesc, levels: trtp.TensorDesc, v: trtp.TensorDesc) -> trtp.TensorDesc:
        *lead, _ = packed.shape_expr
        return trtp.from_shape_expr((*lead, v.shape_expr[-1]), v.dtype)

    @trtp.aot_impl("graphq::SULQAttentionValue")
    def implement(
        packed: trtp.TensorDesc, levels: trtp.TensorDesc, v: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        largest = operands(packed=packed, levels=levels, v=v)
        shape, dtype = check("SULQAttentionValue", largest)
        launch = attention_launch(1, shape[-2], largest["v"].shape[-2], shape[-1], dtype)
        axes = {"rows": (packed, -2), "columns": (v, -2), "width": (packed, -1), "depth": (v, -1)}
        scalars = {name: desc.shape_expr[axis] for name, (desc, axis) in axes.items()}
        blocks = trtp.cdiv(scalars["rows"], launch.constants["BLOCK_ROWS"])
        return embed(launch, arch, scalars, count(packed, slice(-2)) * blocks)
