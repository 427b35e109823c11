"""Which layer of the reference a layer of the model came from, and whether the two still stand for the same product.

A pass that changes what a value means gives it another name (`Editor.now_makes`, or a new value), so that names tell.
"""

from __future__ import annotations

from graphq import ir, linear, qdq


def makes_the_same(node: ir.Node, twin: ir.Node | None) -> bool:
    """Whether `node` stands for what `twin` makes in the reference, but for errors."""
    return twin is not None and _is_same(node.outputs[0], twin.outputs[0])


def computes_the_same(node: ir.Node, twin: ir.Node | None) -> bool:
    """The same, from the same data: `node` and `twin` of the reference have weights that can be compared."""
    if twin is None or twin.op_type != node.op_type or not makes_the_same(node, twin):
        return False
    data, wanted = (qdq.before_quantizer(linear.data_of(one)) for one in (node, twin))
    return data is not None and wanted is not None and _is_same(data, wanted)


def _is_same(value: ir.Value, other: ir.Value) -> bool:
    """By name; what another value took the place of as an output of the graph keeps its meaning (see `Editor.replace_output`)."""
    name, expected = str(value.name), str(other.name)
    rest = name.removeprefix(f"{expected}_inner")
    return name == expected or (rest != name and (not rest or (rest[0] == "_" and rest[1:].isdigit())))
