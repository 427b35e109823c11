"""Where a model falls into blocks that can be fitted one after the other: at its residual sums, elsewhere behind each layer.

A residual sum adds two values of the same origin, of which one has passed layers that the other has not: what a block of a ResNet,
of a transformer or of a U-Net ends with. A layer that lies in no such block is one of its own.
"""

from __future__ import annotations

from collections.abc import Collection

from graphq import ir


def ends(graph: ir.Graph, layers: Collection[ir.Node], sums: int = 1) -> list[ir.Value]:
    """The value that each block ends with, in topological order: every `sums`-th residual sum, and the layers outside of all.

    Args:
        graph: The main graph.
        layers: Nodes with weights, as they count here.
    """
    position = {node: index for index, node in enumerate(graph)}
    origins, passed = dict[ir.Value, int](), dict[ir.Value, int]()  # bits of the inputs and nodes that it depends on, and of the layers
    for index, value in enumerate(graph.inputs):
        origins[value] = 0 if value.is_initializer() else 1 << index
    inside, found, first = 0, list[ir.Value](), len(graph.inputs)
    for node, index in position.items():
        read = [value for value in ir.reads(node) if origins.get(value)]
        origin, own = _union(origins, read), _union(passed, read)
        if origin:
            origin = 0 if node.op_type in ("Shape", "Size") else origin | 1 << first + index
        own |= (node in layers) << index
        for out in node.outputs:
            origins[out], passed[out] = origin, own
        if not node.domain and node.op_type == "Add" and len(read) == 2:
            one, other = read
            differs = passed.get(one, 0) ^ passed.get(other, 0)
            if differs and origins[one] & origins[other]:
                inside |= differs
                found.append(node.outputs[0])
    found = [*found[sums - 1 :: sums], *found[len(found) - len(found) % sums :][-1:]]
    found += [_with_bias(node) for node in layers if not inside >> position[node] & 1]
    return sorted(dict.fromkeys(found), key=lambda value: position[value.producer()])  # type: ignore[index]


def _union(sets: dict[ir.Value, int], values: list[ir.Value]) -> int:
    whole = 0
    for value in values:
        whole |= sets.get(value, 0)
    return whole


def _with_bias(node: ir.Node) -> ir.Value:
    """What `node` makes, with the constant that an Add right behind it adds."""
    uses = ir.uses(node.outputs[0])
    if len(uses) == 1 and uses[0].node.op_type == "Add" and uses[0].node.graph is node.graph and not node.outputs[0].is_graph_output():
        if ir.is_constant(uses[0].node.inputs[1 - uses[0].idx]):
            return uses[0].node.outputs[0]  # type: ignore[no-any-return]
    return node.outputs[0]
