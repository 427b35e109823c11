"""TensorRT plugin `graphq::W4A8Gemm`."""

from graphq import ops, ops_gemm

from .._plugin import as_packed, embed_product, operands
from .kernel import launch


def register(arch: int) -> None:
    """Register it in TensorRT, with kernels for compute capability `arch`."""
    import tensorrt.plugin as trtp

    @trtp.register("graphq::W4A8Gemm")
    def describe(
        x: trtp.TensorDesc, weight: trtp.TensorDesc, x_scale: trtp.TensorDesc, w_scale: trtp.TensorDesc, bias: trtp.TensorDesc
    ) -> trtp.TensorDesc:
        *rows, _ = x.shape_expr
        return trtp.from_shape_expr((*rows, weight.shape_expr[0]), bias.dtype)

    @trtp.aot_impl("graphq::W4A8Gemm")
    def implement(
        x: trtp.TensorDesc, weight: trtp.TensorDesc, x_scale: trtp.TensorDesc, w_scale: trtp.TensorDesc, bias: trtp.TensorDesc,
        outputs: tuple[trtp.TensorDesc], tactic: int,
    ) -> tuple[str, str, trtp.KernelLaunchParams, trtp.SymIntExprs]:  # fmt: skip
        found = as_packed(operands(x=x, weight=weight, x_scale=x_scale, w_scale=w_scale, bias=bias))
        _, dtype = ops.check("W4A8Gemm", found)
        made = launch(ops_gemm.sizes(found), dtype, arch, scale_per_row=x_scale.ndim > 0)
        return embed_product(made, arch, x, weight)
