"""Model-local functions: operators that no runtime has, each with a body of standard ones.

The body is the specification of the operator: any runtime runs it, and what a kernel of the same name computes is tested
against it. Numbers come in as inputs, so that one function serves all nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

from graphq import ir, ops
from graphq.editor import Editor
from graphq.errors import ModelError


def call(edit: Editor, body: str, anchor: ir.Node | None, values: Sequence[ir.Value | None], *, output: str, like: ir.Value,
         after: bool = True) -> ir.Value:  # fmt: skip
    """Insert a node that calls the function `body`, as `Editor.insert` does; the function is added to the model once.

    Args:
        body: ONNX text without a header: `Name (x, scale) => (y) { y = Mul(x, scale) }`. Its operators are of the model's opset.

    Raises:
        ModelError: the model has another function of that name.
    """
    function = ir.function_from_text(f'<domain: "{ir.DOMAIN}", opset_import: ["" : {ir.opset(edit.model)}]>\n{body}')
    known = edit.model.functions.get(function.identifier())
    if known is None:
        edit.add_function(function)
    elif not ir.is_same_function(known, function):
        raise ModelError(
            f"The model holds another function {ir.DOMAIN}.{function.name} than this version of graphq writes.",
            hint="compress the original model, not one that an older version of graphq wrote",
        )  # fmt: skip
    return edit.insert(anchor, function.name, values, domain=ir.DOMAIN, output=output, like=like, after=after)


def inline_quantizers(model: ir.Model) -> None:
    """Put the bodies that quantize or dequantize in the place of their calls, but those of operators that kernels compute.

    TensorRT's parser names a quantizer after its output, and refuses the second of one name: such a body can be called only once.
    """
    quantizers = {"QuantizeLinear", "DequantizeLinear"}
    own = {key: function for key, function in model.functions.items() if key[0] == ir.DOMAIN and key[1] not in ops.OPERATORS}
    chosen = {key for key, function in own.items() if any(node.op_type in quantizers for node in function)}
    ir.inline(model, lambda function: function.identifier() in chosen)
