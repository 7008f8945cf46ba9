"""Transposes of transposes become one, and those that move nothing vanish."""

from __future__ import annotations

from dataclasses import replace

from vnnigen.graph.attributes import ints_attr
from vnnigen.graph.ir import Graph, Node
from vnnigen.graph.passes.edit import Edit, rank


def merge_transposes(graph: Graph) -> int:
    """Merge adjacent transposes, and drop those that change nothing."""
    edit = Edit(graph)
    for node in edit:
        perm = _permutation(graph, node)
        if perm is None:
            continue
        before = edit.producer(node.inputs[0])
        inner = None if before is None or node.inputs[0] in graph.quant else _permutation(graph, before)
        if before is not None and inner is not None:
            perm = tuple(inner[p] for p in perm)
            node = replace(node, inputs=before.inputs, attrs={"perm": perm})  # noqa: PLW2901
            if perm != tuple(range(len(perm))) or not edit.bypass(node, before.inputs[0]):
                edit.put(node, node)
        elif perm == tuple(range(len(perm))):
            edit.bypass(node, node.inputs[0])
    return edit.finish()


def _permutation(graph: Graph, node: Node) -> tuple[int, ...] | None:
    """What a Transpose does; None for other nodes, or if its input's rank is not known."""
    if node.op != "Transpose" or node.fused:
        return None
    perm, dims = ints_attr(node, "perm"), rank(graph, node.inputs[0])
    return perm if perm is not None or dims is None else tuple(range(dims))[::-1]
