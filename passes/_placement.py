"""Which edges get a quantizer: read off the target's table, before any data is seen.

Anchors (operators with weights) are quantized for their own sake. Operators between them (Add, Concat, MaxPool, shape
changes) are quantized only where all they read and something that reads them is quantized anyway, so that integers flow
through; everything else, softmax, normalization, masks, index arithmetic, positional tables, stays float because no rule names it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from graphq import ir, linear, precision, stored
from graphq.exclude import is_excluded
from graphq.precision import Bits
from graphq.targets import Target

Reader = tuple[ir.Node, int]

WORTH_ROUNDING = 0.05
"""Share of all multiply-adds from which a layer is worth an extra rounding of its output."""

ACTIVATION_DEPTH = 4
"""Nodes that an activation is written in, at most, such as `x * sigmoid(x)`."""

_ACTIVATIONS = frozenset({
    "Add", "Clip", "Div", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Mish", "Mul", "PRelu", "Relu", "Selu", "Sigmoid", "Softplus",
    "Swish", "Tanh",
})  # fmt: skip

EIGHT = Bits(8, 8)


@dataclass
class Placement:
    """Where quantizers go.

    Attributes:
        anchors: Linear nodes to quantize, in topological order.
        readers: For each value to quantize, the (node, input index) pairs that shall read it quantized.
        whole: Those of them that all readers read quantized, because an integer kernel makes them.
        derived: Those whose integers come unchanged from others of their group, so that they need no range of their own.
        groups: Values that must share one scale, each list of length 2 or more.
        carriers: For some of them, the nodes that make them by moving elements only, and shall move integers instead.
        skipped: Nodes left float, with the reason.
        bits: What each anchor is quantized to.
        weights_only: Linear nodes for which a float activation was asked.
        products: MatMuls of two activations (attention), both of whose inputs are quantized.
    """

    anchors: list[ir.Node] = field(default_factory=list)
    readers: dict[ir.Value, list[Reader]] = field(default_factory=dict)
    whole: set[ir.Value] = field(default_factory=set)
    derived: set[ir.Value] = field(default_factory=set)
    groups: list[list[ir.Value]] = field(default_factory=list)
    carriers: dict[ir.Value, list[ir.Node]] = field(default_factory=dict)
    skipped: list[tuple[ir.Node, str]] = field(default_factory=list)
    bits: dict[ir.Node, Bits] = field(default_factory=dict)
    weights_only: list[ir.Node] = field(default_factory=list)
    products: list[ir.Node] = field(default_factory=list)

    def activation_bits(self, value: ir.Value) -> int:
        """The widest that an anchor which reads `value` asks for; 8 if only others read it."""
        asked = [self.bits[node].activation for node, _ in self.readers[value] if node in self.bits]
        return max((bits for bits in asked if bits is not None), default=8)


def place(model: ir.Model, target: Target, *, exclude: Sequence[str] = (), keep_float: Mapping[ir.Node, str] | None = None,
          default: Bits = EIGHT, attention: bool = False) -> Placement:  # fmt: skip
    """Decide for every node of the main graph.

    Args:
        exclude: Patterns (`*`, `?`) of node names or operator types that stay float.
        keep_float: Further nodes that stay float, with the reason.
        default: Bits of the layers for which nobody asked for others.
        attention: Whether MatMuls of two activations are quantized as well, at the default's bits.
    """
    plan = Placement()
    for node in model.graph:
        reason = _refusal(node, target, exclude, keep_float or {})
        if reason is None:
            plan.bits[node] = precision.asked(node, default)
            (plan.anchors if plan.bits[node].activation is not None else plan.weights_only).append(node)
        elif reason:
            plan.skipped.append((node, reason))
    for node in ir.all_nodes(model):
        if node.graph is not model.graph and not node.domain and node.op_type in linear.LINEAR_OPS:
            plan.skipped.append((node, "it lies in a subgraph"))
    flowing = _flow(model, target, plan.anchors, exclude)
    quantized = {*plan.anchors, *flowing}
    # What is kept float counts as well: nothing shall be quantized because something else is not.
    least = WORTH_ROUNDING * sum(map(linear.multiply_adds, [*plan.anchors, *(keep_float or {})]))
    for node in [node for node in plan.anchors if _rounds_for_nothing(node, target, quantized, least)]:
        plan.anchors.remove(node)
        plan.skipped.append((node, f"{target.name} would have to round its output, which only float nodes read, for little work saved"))
    flowing = _flow(model, target, plan.anchors, exclude)
    made = [fused_output(node, target) for node in [*plan.anchors, *flowing] if target.ops[node.op_type].quantized_output]
    plan.whole = set(made)
    plan.readers = {value: [(use.node, use.idx) for use in value.uses()] for value in made}
    edges = [(node, linear.data_index(node)) for node in plan.anchors]
    if attention:
        plan.products = [node for node in model.graph if _is_product(node, exclude)]
        plan.skipped = [(node, reason) for node, reason in plan.skipped if node not in plan.products]
        plan.bits |= {node: default for node in plan.products}
        edges += [(node, index) for node in plan.products for index in (0, 1) if not _is_coded(node.inputs[index])]
    for node, index in edges:
        value = node.inputs[index]
        if value is not None and value not in plan.whole:
            plan.readers.setdefault(value, []).append((node, index))
    plan.groups = _groups(flowing, target)
    plan.derived = {fused_output(node, target) for node in flowing if target.ops[node.op_type].shared_scale}
    for value, readers in plan.readers.items():
        chain = _carriers(value, len(readers), target) if value not in plan.whole else []
        if chain:
            plan.carriers[value] = chain
    return plan


def _is_product(node: ir.Node, exclude: Sequence[str]) -> bool:
    """Whether `node` multiplies two activations, as attention does; a weight that is stored as codes is none."""
    if node.domain or node.op_type != "MatMul" or is_excluded(node, exclude):
        return False
    return all(ir.is_float(value) and not stored.is_fixed(value) for value in node.inputs)


def _is_coded(value: ir.Value | None) -> bool:
    """Whether a quantizer of graphq's own, such as that of softmax or of tokens, made `value`."""
    maker = ir.producer(value)
    return maker is not None and maker.domain == ir.DOMAIN


def _carriers(value: ir.Value, readers: int, target: Target) -> list[ir.Node]:
    """The chain of nodes before `value` that only move elements, as long as nobody but its `readers` sees them."""
    chain: list[ir.Node] = []
    maker = ir.producer(value)
    while maker is not None and not maker.domain and maker.op_type in target.moves_codes and len(ir.uses(value)) == readers:
        if value.is_graph_output():
            break
        chain.append(maker)
        value, readers = maker.inputs[0], 1  # type: ignore[assignment]
        maker = ir.producer(value)
    return chain[::-1]


def _refusal(node: ir.Node, target: Target, exclude: Sequence[str], keep_float: Mapping[ir.Node, str]) -> str | None:
    """None to quantize `node`, a reason to report, or "" for nodes that nobody expects to be quantized."""
    rule = target.ops.get(node.op_type) if node.domain == "" else None
    if node.domain == "" and node.op_type in linear.NEVER_QUANTIZED:
        return f"{node.op_type} is not quantized by any pass"
    if node.domain != "" or node.op_type not in linear.LINEAR_OPS:
        return ""
    if is_excluded(node, exclude):
        return "excluded by the recipe"
    if rule is None or not rule.anchor:
        return f"{target.name} has no integer kernel for {node.op_type}"
    if node in keep_float:
        return keep_float[node]
    if precision.asked(node, EIGHT) == Bits(None, None):
        return "float was asked for it"
    data = linear.data_of(node)
    if data.is_initializer() or not ir.is_float(data):
        return "its data input is not a float32 activation"
    if _is_coded(data) or (ir.producer(data) is not None and ir.producer(data).op_type == "DequantizeLinear"):  # type: ignore[union-attr]
        return "it is quantized already"
    return linear.linear_refusal(node)


def fused_output(node: ir.Node, target: Target) -> ir.Value:
    """The value that leaves the integer kernel: past an activation that the runtime fuses, if nothing else reads before it."""
    value = node.outputs[0]
    uses = ir.uses(value)
    if len(uses) == 1 and not value.is_graph_output():
        reader = uses[0].node
        if reader.domain == "" and reader.op_type in target.fused_activations and reader.inputs[0] is value and reader.graph is node.graph:
            return reader.outputs[0]
    return value


def _rounds_for_nothing(node: ir.Node, target: Target, quantized: set[ir.Node], least: float) -> bool:
    """Whether the integer kernel's output would be rounded for float readers alone, by a layer of less work than `least`.

    The patch embedding of a ViT is the case: its output starts the residual stream, where an error stays to the end. A float
    activation before the next quantized layer is none.
    """
    value = fused_output(node, target)
    if not target.ops[node.op_type].quantized_output or _feeds(value, quantized) or _only_activates(value, quantized, ACTIVATION_DEPTH):
        return False
    return linear.multiply_adds(node) < least


def _only_activates(value: ir.Value, quantized: set[ir.Node], depth: int) -> bool:
    """Whether all that becomes of `value` are activations, of a few nodes each, that quantized nodes read."""

    def ends_well(node: ir.Node) -> bool:
        is_activation = not node.domain and node.op_type in _ACTIVATIONS
        return node in quantized or (depth > 0 and is_activation and _only_activates(node.outputs[0], quantized, depth - 1))

    uses = ir.uses(value)
    return bool(uses) and not value.is_graph_output() and all(ends_well(use.node) for use in uses)


def _flow(model: ir.Model, target: Target, anchor_nodes: Sequence[ir.Node], exclude: Sequence[str]) -> list[ir.Node]:
    """Nodes without weights that can stay integer, in topological order."""
    anchors = set(anchor_nodes)
    quantized, found = {fused_output(node, target) for node in anchor_nodes if target.ops[node.op_type].quantized_output}, list[ir.Node]()
    for node in model.graph:
        rule = target.ops.get(node.op_type) if node.domain == "" else None
        if rule is None or rule.anchor or is_excluded(node, exclude):
            continue
        if all(value in quantized for value in _operands(node)) and len(node.outputs) == 1 and _operands(node):
            found.append(node)
            quantized.add(fused_output(node, target))
    useful = set(found)
    while idle := [node for node in useful if not _feeds(fused_output(node, target), anchors | useful)]:
        useful.difference_update(idle)
    return [node for node in found if node in useful]


def _operands(node: ir.Node) -> list[ir.Value]:
    """The values that carry data: all inputs that are not integer constants (shapes, axes)."""
    return [value for value in node.inputs if value is not None and not (value.is_initializer() and value.dtype != ir.DataType.FLOAT)]


def _feeds(value: ir.Value, nodes: set[ir.Node]) -> bool:
    return any(use.node in nodes for use in value.uses())


def _groups(flowing: Sequence[ir.Node], target: Target) -> list[list[ir.Value]]:
    """Connected sets of values that shared-scale operators tie together."""
    parent: dict[ir.Value, ir.Value] = {}

    def root(value: ir.Value) -> ir.Value:
        while parent.setdefault(value, value) is not value:
            value = parent[value]
        return value

    for node in flowing:
        if target.ops[node.op_type].shared_scale:
            for value in _operands(node):
                parent[root(value)] = root(fused_output(node, target))
    members: dict[ir.Value, list[ir.Value]] = {}
    for value in parent:
        members.setdefault(root(value), []).append(value)
    return [group for group in members.values() if len(group) > 1]


def tied(plan: Placement) -> Iterator[tuple[ir.Value, list[ir.Value]]]:
    """Each value to quantize, with the values that share its scale (itself at least)."""
    group_of = {value: group for group in plan.groups for value in group}
    for value in plan.readers:
        yield value, group_of.get(value, [value])
