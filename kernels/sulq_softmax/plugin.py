"""TensorRT plugins `graphq::SULQSoftmax`, `graphq::SULQSoftmaxCodes` and `graphq::SULQAttentionValue`."""

from graphq.errors import UsageError

from .._plugin import NAMESPACE, count, dtype, embed, largest
from .kernel import FLOATS, attention_launch, softmax_launch


def register(arch: int) -> None:
    """Register them in TensorRT, with kernels for compute capability `arch`."""
    _register_softmax(arch)
    _register_codes(arch)
    _register_attention_value(arch)


def _register_softmax(arch: int) -> None:
    import tensorrt.plugin as trtp

    @trtp.register(f"{NAMESPACE}::SULQSoftmax")
    def describe(x: trtp.TensorDesc, params: trtp.TensorDesc) -> trtp.TensorDesc:
        _require(dtype(x) in FLOATS and dtype(params) == "float32", "SULQSoftmax", "x of float16, bfloat16 or float32, params of float32")
        return x.like()

    @trtp.aot_impl(f"{NAMESPACE}::SULQSoftmax")
    def implement(
        x: trtp.TensorDesc, params: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return _softmax(x, arch, packed=False)


def _register_codes(arch: int) -> None:
    import tensorrt as trt
    import tensorrt.plugin as trtp

    @trtp.register(f"{NAMESPACE}::SULQSoftmaxCodes")
    def describe(x: trtp.TensorDesc, params: trtp.TensorDesc) -> trtp.TensorDesc:
        _require(dtype(x) in FLOATS and dtype(params) == "float32", "SULQSoftmaxCodes", "x of float16, bfloat16 or float32, params of float32")
        *lead, columns = x.shape_expr
        return trtp.from_shape_expr((*lead, trtp.cdiv(columns, 2)), trt.DataType.INT8)

    @trtp.aot_impl(f"{NAMESPACE}::SULQSoftmaxCodes")
    def implement(
        x: trtp.TensorDesc, params: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        return _softmax(x, arch, packed=True)


def _softmax(x, arch, packed):
    import tensorrt.plugin as trtp

    launch = softmax_launch(1, largest(x)[-1], dtype(x), packed)
    rows, columns = count(x, slice(-1)), count(x, slice(-1, None))
    scalars = {"rows": rows, "columns": columns, "width": trtp.cdiv(columns, 2) if packed else columns}
    return embed(launch, arch, scalars, trtp.cdiv(rows, launch.constants.get("BLOCK_ROWS", 1)))


def _register_attention_value(arch: int) -> None:
    import tensorrt.plugin as trtp

    @trtp.register(f"{NAMESPACE}::SULQAttentionValue")
    def describe(packed: trtp.TensorDesc, levels: trtp.TensorDesc, v: trtp.TensorDesc) -> trtp.TensorDesc:
        types = dtype(packed) == "int8" and dtype(levels) == "float32" and dtype(v) in FLOATS
        _require(types, "SULQAttentionValue", "packed of int8, levels of float32, v of float16, bfloat16 or float32")
        return trtp.from_shape_expr((*tuple(packed.shape_expr)[:-1], v.shape_expr[-1]), v.dtype)

    @trtp.aot_impl(f"{NAMESPACE}::SULQAttentionValue")
    def implement(
        packed: trtp.TensorDesc, levels: trtp.TensorDesc, v: trtp.TensorDesc, outputs: tuple[trtp.TensorDesc], tactic: int
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:
        launch = attention_launch(1, largest(packed)[-2], *largest(v)[-2:], dtype(v))
        names = {"rows": (packed, -2), "columns": (v, -2), "width": (packed, -1), "depth": (v, -1)}
        scalars = {name: desc.shape_expr[axis] for name, (desc, axis) in names.items()}
        blocks = trtp.cdiv(scalars["rows"], launch.constants["BLOCK_ROWS"])
        return embed(launch, arch, scalars, count(packed, slice(-2)) * blocks)


def _require(holds: bool, name: str, expected: str) -> None:
    if not holds:
        raise UsageError(f"{name} does not take tensors of these types.", expected=expected)
