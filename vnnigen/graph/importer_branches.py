"""`If` nodes whose condition is a constant: the branch that is taken becomes part of the graph around it.

Exporters write such nodes for what they did not decide themselves. All others are left, for the importer to refuse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from vnnigen.errors import ModelError
from vnnigen.graph.importer_builder import Names
from vnnigen.graph.importer_values import check_texts, graph_texts, read_tensor

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto


def inline_branches(model: ModelProto) -> ModelProto:
    """The model without `If` nodes whose condition is a constant: `model` itself if it has none, else a copy.

    Names are those of `check_texts`, and external data has been read. Raises ModelError, naming the node, for a branch
    that has inputs, or not as many outputs as the node.
    """
    if not any(_is_if(node) for node in model.graph.node):
        return model
    made = type(model)()
    made.CopyFrom(model)
    inlining = _Inlining(made.graph)
    for node in model.graph.node:
        inlining.add(node, {})
    return made


def _is_if(node: NodeProto) -> bool:
    return node.op_type == "If" and node.domain in ("", "ai.onnx")


class _Inlining:
    """The graph in the making. A scope says how values are named in it that a branch made under a name of its own."""

    def __init__(self, graph: GraphProto) -> None:
        self.graph = graph
        taken = {name for node in graph.node for name in (*node.input, *node.output)}
        taken.update(value.name for value in (*graph.input, *graph.initializer))
        self.names, self.labels = Names(taken), Names(set())
        self.truths: dict[str, bool] = {}
        for tensor in graph.initializer:
            self._note(tensor.name, tensor)
        del graph.node[:]

    def add(self, node: NodeProto, scope: Mapping[str, str], label: str = "") -> None:
        """Add a node of the branch `label` ("": of none), or what its own branch holds."""
        condition = scope.get(node.input[0], node.input[0]) if _is_if(node) and len(node.input) == 1 else ""
        if condition in self.truths:
            self._branch(node, scope, "then_branch" if self.truths[condition] else "else_branch")
            return
        made = self.graph.node.add()
        made.CopyFrom(node)
        made.name = f"{label}/{node.name}" if label and node.name else node.name
        made.input[:] = [scope.get(name, name) for name in node.input]
        made.output[:] = [scope.get(name, name) for name in node.output]
        if node.op_type == "Constant" and len(made.output) == 1 and len(node.attribute) == 1:
            self._note(made.output[0], node.attribute[0].t)

    def _branch(self, node: NodeProto, outer: Mapping[str, str], key: str) -> None:
        label = self.labels.new(node.name or "If")
        what = f"node {label!r} (If)"
        branch = next((a.g for a in node.attribute if a.name == key and a.HasField("g")), None)
        if branch is None:
            raise ModelError(f"{what}: has no {key}")
        check_texts(graph_texts(branch))
        if branch.input or len(branch.output) != len(node.output):
            raise ModelError(
                f"{what}: its {key} has {len(branch.input)} inputs and {len(branch.output)} outputs; "
                f"it must have none, and as many as the node, which has {len(node.output)}"
            )
        own = [*(t.name for t in branch.initializer), *(name for n in branch.node for name in n.output if name)]
        scope = {**outer, **{name: self.names.new(f"{label}/{name}") for name in dict.fromkeys(own)}}
        for tensor in branch.initializer:
            self.graph.initializer.add().CopyFrom(tensor)
            self.graph.initializer[-1].name = scope[tensor.name]
            self._note(scope[tensor.name], tensor)
        for inner in branch.node:
            self.add(inner, scope, label)
        for info, name in zip(branch.output, node.output, strict=True):
            made = self.graph.node.add(op_type="Identity", name=f"{label}/{info.name}")
            made.input.append(scope.get(info.name, info.name))
            made.output.append(outer.get(name, name))

    def _note(self, name: str, tensor: TensorProto) -> None:
        """Remember a constant that can be a condition."""
        if tensor.data_type == tensor.BOOL and len(tensor.dims) <= 1 and math.prod(tensor.dims) == 1:
            self.truths[name] = bool(read_tensor(tensor, f"constant {name!r}").all())
