"""Steps of normalize that move and remove: names, constants, functions, identities. Each is linear in the graph."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphq import ir
from graphq.editor import Editor
from graphq.errors import ModelError
from graphq.pipeline import PassContext

_SCALARS = {"value_int": np.int64, "value_ints": np.int64, "value_float": np.float32, "value_floats": np.float32}


def graph_nodes(model: ir.Model) -> list[ir.Node]:
    """Nodes of the main graph and its subgraphs, producers first; functions are left out."""
    return list(model.graph.all_nodes())


def unique_names(edit: Editor) -> None:
    """Give every node and value a name of its own. The main graph's inputs and outputs have the first claim."""
    main, nodes = edit.model.graph, graph_nodes(edit.model)
    taken = {value.name for value in (*main.inputs, *main.outputs)}
    seen = {*main.inputs, *main.outputs}
    for value in _values(edit.model, nodes):
        absent = not value.name and not value.uses() and not value.is_graph_output()
        if value in seen or absent:
            continue
        seen.add(value)
        if not value.name or value.name in taken:
            value.name = edit.unique(value.name or "value")
            edit.edits["rename"] += 1
        taken.add(value.name)
    named: set[str] = set()
    for node in nodes:
        wish = node.name or next((out.name for out in node.outputs if out.name), node.op_type)
        if wish in named:
            wish = edit.unique(wish)
        if wish != node.name:
            node.name = wish
            edit.edits["rename"] += 1
        named.add(wish)


def _values(model: ir.Model, nodes: list[ir.Node]) -> Iterator[ir.Value]:
    """Every value of the main graph, then those of the subgraphs."""
    yield from (value for one in model.graphs() for value in (*one.inputs, *one.initializers.values()))
    for node in nodes:
        yield from node.outputs


def free_initializers(edit: Editor) -> None:
    """Take initializers out of the inputs: an override that a caller may give makes no constant, and is not compressed."""
    for one in edit.model.graphs():
        kept = [value for value in one.inputs if not value.is_initializer()]
        if len(kept) < len(one.inputs):
            edit.edits["input"] += len(one.inputs) - len(kept)
            one.inputs.clear()
            one.inputs.extend(kept)


def inline_functions(ctx: PassContext) -> None:
    """Put the bodies of model-local functions into the graph, so that their weights are seen.

    Functions of the domain `graphq` are the emitted form of a compressed operator and stay.

    Raises:
        ModelError: a function cannot be inlined.
    """
    if all(function.domain == ir.DOMAIN for function in ctx.model.functions.values()):
        return
    from onnxscript.optimizer import inline

    try:
        with ir.own_functions_aside(ctx.model):
            inline(ctx.model)
    except Exception as error:  # onnx_ir wraps several unrelated types
        raise ModelError(f"The model's local functions cannot be inlined: {error.__cause__ or error}",
                         hint="export the model without local functions") from error  # fmt: skip
    ctx.edit.edits["inline"] += 1
    unique_names(ctx.edit)


def lift_constants(edit: Editor) -> None:
    """Turn the outputs of `Constant` nodes into initializers of their graph; graph outputs, strings and sparse values stay."""
    for node in graph_nodes(edit.model):
        if node.op_type != "Constant" or node.domain or len(node.attributes) != 1 or node.outputs[0].is_graph_output():
            continue
        (key, entry), out = next(iter(node.attributes.items())), node.outputs[0]
        if key == "value":
            become_constant(edit, out, entry.as_tensor())
        elif key in _SCALARS:
            become_constant(edit, out, np.array(entry.value, _SCALARS[key]))


def become_constant(edit: Editor, out: ir.Value, data: object) -> None:
    """Replace the only output `out` of a node by an initializer of the same name, and remove the node.

    `data` is an array, or a tensor of the model, which then stays where it is (mapped from a file, for instance).
    """
    node = out.producer()
    assert node is not None and node.graph is not None and out.name
    tensor = edit.keep(ir.make_tensor(data, str(data.dtype), out.name)) if isinstance(data, np.ndarray) else data
    value = ir.make_value(out.name, tensor)  # type: ignore[arg-type]
    node.graph.register_initializer(value)  # type: ignore[union-attr]
    edit.replace(out, value)
    edit.remove(node)


def drop_identities(edit: Editor) -> None:
    """Remove `Identity` and inference-time `Dropout`.

    One stays if its output is returned and its input is an input, a constant, another output or lies in another graph: then
    it is the node that gives the output its name.
    """
    for node in graph_nodes(edit.model):
        if node.domain or not (node.op_type == "Identity" or _is_idle_dropout(node)):
            continue
        source, out = node.inputs[0], node.outputs[0]
        if source is None or (out.is_graph_output() and not _may_be_output(source, node)):
            continue
        if source.type is None:
            source.type = out.type
        if out.shape is not None and (source.shape is None or out.is_graph_output()):
            source.shape = out.shape
        edit.replace(out, source)
        edit.remove(node)


def _is_idle_dropout(node: ir.Node) -> bool:
    if node.op_type != "Dropout" or any(out.uses() or out.is_graph_output() for out in node.outputs[1:]):
        return False
    training = node.inputs[2] if len(node.inputs) > 2 else None
    if training is None:
        return True
    mode = ir.constant(training)
    return mode is not None and not mode.any()


def _may_be_output(value: ir.Value, node: ir.Node) -> bool:
    made_by = value.producer()
    return made_by is not None and made_by.graph is node.graph and not value.is_graph_output()
