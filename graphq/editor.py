"""The only way to change a model: every change goes through `Editor`, which counts it, so that "changed" is never declared.

A *value* is named; edits keep the names of the values that nodes already produce, which is how the reference model and the
current model are lined up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from graphq import ir
from graphq.errors import ModelError
from graphq.ir import Function, Graph, Keep, Model, Node, Value, all_nodes, make_node, make_tensor, opset, values_by_name

_AUTHOR = "graphq.pass"


def made_by(node: Node) -> str:
    """The pass that inserted `node`; empty if it was there before."""
    return str(node.meta.get(_AUTHOR, ""))


class Editor:
    """Changes one model and counts the changes, by kind, in `edits`.

    Names asked for are made unique. A node that other nodes still read cannot be removed. Nodes remember the pass that inserted them
    (see `made_by`) until the model is written. Constants go through `keep`, which may move them to disk (see `ir.spilling`).
    """

    def __init__(self, model: Model, keep: Keep = lambda tensor: tensor) -> None:
        self.model, self.keep = model, keep
        self.author = ""
        self.edits: Counter[str] = Counter()
        self._shared: dict[Hashable, Value] = {}
        graphs = list(model.graphs())
        self._names = {value.name for graph in graphs for value in values_by_name(graph).values()}
        self._names |= {node.name for node in all_nodes(model)}

    @property
    def version(self) -> int:
        """Grows with every edit of what is computed: statistics of the current model are valid for one version."""
        return self.edits.total() - self.edits["annotate"]

    def unique(self, name: str) -> str:
        """`name`, or `name_1`, `name_2`... if it is taken; reserved from now on."""
        fresh, count = name, 0
        while fresh in self._names:
            count += 1
            fresh = f"{name}_{count}"
        self._names.add(fresh)
        return fresh

    def initializer(self, name: str, array: np.ndarray, storage: str | None = None, graph: Graph | None = None) -> Value:
        """A new constant. `storage` names its ONNX type when the array's own differs (int4 codes held as int8)."""
        name = self.unique(name)
        tensor = self.keep(make_tensor(np.asarray(array), storage or str(np.asarray(array).dtype), name))
        value = ir.make_value(name, tensor)
        (graph or self.model.graph).register_initializer(value)
        self.edits["initializer"] += 1
        return value

    def shared(self, key: Hashable, name: str, make: Callable[[], np.ndarray], storage: str) -> Value:
        """The constant made for `key` before, or a new one: what several nodes read is stored once.

        A value in `key` stands for the array that it holds: given another by `set_weight`, it is made anew.
        """
        found = self._shared.get(key)
        if found is None or not found.is_initializer():
            found = self._shared[key] = self.initializer(name, make(), storage)
        return found

    def set_weight(self, node: Node, index: int, array: np.ndarray) -> Value:
        """Give `node` a new constant as input `index`; a constant that others read too stays as it is for them."""
        old = node.inputs[index]
        assert old is not None and old.const_value is not None, "set_weight needs an initializer"
        if len(old.uses()) == 1 and not old.is_graph_output():
            self.set_constant(old, array)
            return old
        new = self.initializer(old.name or "weight", array, str(old.const_value.dtype.numpy()), node.graph)  # type: ignore[arg-type]
        self.rewire(node, index, new)
        return new

    def set_constant(self, value: Value, array: np.ndarray, storage: str | None = None) -> None:
        """Let the initializer `value` hold `array`, for all that read it; of the element type that it has, if `storage` names no other."""
        assert value.const_value is not None, "set_constant needs an initializer"
        tensor = make_tensor(array, storage or str(value.const_value.dtype.numpy()), value.name or "")
        value.const_value, value.shape = self.keep(tensor), ir.Shape(array.shape)
        value.type = value.type if storage is None else ir.tensor_type(storage)
        self._shared = {key: made for key, made in self._shared.items() if not _mentions(key, value)}
        self.edits["weight"] += 1

    def insert(self, anchor: Node | None, op_type: str, values: Sequence[Value | None], *, output: str, domain: str = "",
               attributes: Mapping[str, Any] | None = None, like: Value | None = None, after: bool = False) -> Value:  # fmt: skip
        """Put a one-output node before (or after) `anchor`, or first in the main graph if None; returns its output.

        `like` gives the output its shape and element type.
        """
        node = make_node(op_type, values, [self.unique(output)], domain=domain, attributes=attributes)
        node.meta[_AUTHOR] = self.author
        if like is not None:
            node.outputs[0].shape, node.outputs[0].type = like.shape, like.type
        if anchor is None:
            graph = self.model.graph
            first = next(iter(graph), None)
            graph.append(node) if first is None else graph.insert_before(first, node)
        else:
            graph = anchor.graph  # type: ignore[assignment]
            graph.insert_after(anchor, node) if after else graph.insert_before(anchor, node)
        self.edits["insert"] += 1
        return node.outputs[0]

    def add_function(self, function: Function) -> None:
        """Put a model-local function into the model; `graphq.functions` calls it."""
        self.model.functions[function.identifier()] = function
        self.model.opset_imports.setdefault(function.domain, 1)
        self.edits["function"] += 1

    def remove_functions(self, domain: str, names: Collection[str]) -> None:
        """Take model-local functions out of the model; calls of them are nodes of unknown operators from then on."""
        for key in [key for key, function in self.model.functions.items() if function.domain == domain and function.name in names]:
            del self.model.functions[key]
            self.edits["function"] += 1

    def rewire(self, node: Node, index: int, value: Value | None) -> None:
        """Let `node` read `value` as input `index`."""
        if index >= len(node.inputs):
            node.resize_inputs(index + 1)
        node.replace_input_with(index, value)
        self.edits["rewire"] += 1

    def now_makes(self, value: Value, what: str) -> None:
        """Name `value` after what it has become, so that nobody takes it for the value of that name in the original model."""
        assert not value.is_graph_output(), "what the model returns keeps its name"
        value.name = self.unique(f"{value.name}_{what}")
        self.edits["rename"] += 1

    def swap_names(self, one: Value, other: Value) -> None:
        """Let each have the other's name: who asks for a value by name gets the other one from then on."""
        one.name, other.name = other.name, one.name
        self.edits["rename"] += 1

    def replace(self, old: Value, new: Value) -> None:
        """Let every reader of `old` read `new`, and the graph return it; what the model returns keeps its name."""
        if old.is_graph_output() and old.graph is self.model.graph:
            self.replace_output(old, new)
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        self.edits["replace"] += 1

    def replace_output(self, old: Value, new: Value) -> None:
        """Let the graph of `old`, which returns it, return `new` instead, under the same name; readers inside it are left alone."""
        outputs = old.graph.outputs if old.graph is not None else []
        places = [index for index, output in enumerate(outputs) if output is old]
        if not places:
            raise ValueError(f"{old.name!r} is not an output of its graph")
        name, old.name = old.name, self.unique(f"{old.name}_inner")
        new.name = name
        for index in places:
            outputs[index] = new
        self.edits["replace"] += 1

    def set_attribute(self, node: Node, name: str, value: Any) -> None:
        node.attributes[name] = ir.make_attribute(name, value)
        self.edits["attribute"] += 1

    def change_operator(self, node: Node, op_type: str) -> None:
        """Let `node` be another operator of the default domain that takes the same inputs and attributes."""
        node.op_type = op_type
        self.edits["operator"] += 1

    def annotate(self, node: Node, key: str, text: str) -> None:
        """Write an entry into the metadata of `node`, which changes nothing that it computes."""
        node.metadata_props[key] = text
        self.edits["annotate"] += 1

    def remove(self, nodes: Node | Iterable[Node]) -> None:
        nodes = [nodes] if isinstance(nodes, Node) else list(nodes)
        for node in nodes:
            node.graph.remove(node, safe=True)  # type: ignore[union-attr]
        self.edits["remove"] += len(nodes)

    def prune(self) -> None:
        """Remove the nodes that nothing reads, in one walk from the outputs, and then the initializers that nothing reads."""
        for node in reversed(list(self.model.graph.all_nodes())):
            if node.graph is None or any(out.uses() or out.is_graph_output() for out in node.outputs):
                continue
            for inner in ir.nodes_inside(node):  # they go with the node, and must not keep alive what they read
                for index in range(len(inner.inputs)):
                    inner.replace_input_with(index, None)
            self.remove(node)
        self.prune_constants()

    def prune_constants(self) -> None:
        """Remove the initializers that nothing reads."""
        for graph in self.model.graphs():
            for name, value in list(graph.initializers.items()):
                if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                    del graph.initializers[name]
                    self.edits["prune"] += 1

    def raise_opset(self, version: int) -> None:
        """Raise the default opset to at least `version`, converting operators whose definition changed."""
        if opset(self.model) < version:
            from onnxscript import version_converter

            known = {node.name: dict(node.meta) for node in all_nodes(self.model)}
            tensors = {name: value.const_value for name, value in self.model.graph.initializers.items()}
            with ir.own_functions_aside(self.model):  # they would be inlined
                version_converter.convert_version(self.model, version, fallback=True)
            for name, value in self.model.graph.initializers.items():  # a conversion by onnx itself forgets where external data lies
                value.const_value = tensors.get(name, value.const_value)
            for node in all_nodes(self.model):  # nor what passes know of nodes
                node.meta.update(known.get(node.name, {}))
            if opset(self.model) < version:
                raise ModelError(
                    f"The model could not be raised from opset {opset(self.model)} to {version}.",
                    expected=f"opset {version}, which the asked formats need", hint="export the model again with a higher opset_version",
                )  # fmt: skip
            self.edits["opset"] += 1


def _mentions(key: Hashable, value: Value) -> bool:
    return key is value or isinstance(key, tuple) and any(_mentions(part, value) for part in key)
