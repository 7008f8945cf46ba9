"""A residual sum becomes a step of the convolution or product that ends its longer branch."""

from __future__ import annotations

from vnnigen.graph.ir import Fused, Graph, Node
from vnnigen.graph.passes.edit import MATRIX_HOSTS, Edit, is_f32, same_shape
from vnnigen.kernels.layout import MAX_TENSORS


def fuse_sum(graph: Graph) -> int:
    """Fuse an Add of two tensors of one shape into one of the nodes that make them.

    That is the one with the longer way from the inputs: the other one's result is ready by then in any sensible order.
    """
    depth = _depths(graph)
    edit = Edit(graph)
    for node in edit:
        if node.op not in ("Add", "Sum") or _own_inputs(node) != 2 or not is_f32(graph, node.output):
            continue
        hosts = [(depth.get(value, 0), -i, value) for i, value in enumerate(node.inputs[:2]) if _can(edit, node, value)]
        if hosts:
            value = max(hosts)[2]
            other = node.inputs[1 - node.inputs[:2].index(value)]
            host = edit.maker(value)
            assert host is not None
            edit.absorb(node, host, [Fused("Add", operand=-1)], [other])
    return edit.finish()


def _can(edit: Edit, node: Node, value: str) -> bool:
    host, graph = edit.maker(value), edit.graph
    if host is None or host.op not in MATRIX_HOSTS:
        return False
    shapes_agree = all(same_shape(graph, name, node.output) for name in node.inputs[:2])
    constant = any(name in graph.constants for name in node.inputs[:2])
    return shapes_agree and not constant and _tensors(graph, host) + _tensors(graph, node) < MAX_TENSORS


def _own_inputs(node: Node) -> int:
    """How many inputs are not operands of fused steps."""
    return len(node.inputs) - sum(step.operand is not None for step in node.fused)


def _tensors(graph: Graph, node: Node) -> int:
    """How many fused steps read a tensor that is not constant."""
    operands = [node.inputs[step.operand] for step in node.fused if step.operand is not None]
    return sum(name not in graph.constants for name in operands)


def _depths(graph: Graph) -> dict[str, int]:
    """How many nodes lie on the longest way to each value."""
    depth: dict[str, int] = {}
    for node in graph.nodes:
        here = 1 + max((depth.get(name, 0) for name in node.inputs), default=0)
        depth.update(dict.fromkeys(node.outputs, here))
    return depth
