"""Constant folding: nodes whose results do not depend on the network's inputs become constants."""

from __future__ import annotations

from math import prod

from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.evaluate import evaluate
from vnnigen.graph.infer import NOT_FOLDED, Inferred, propagate
from vnnigen.graph.ir import Graph, Node, TensorType

#: Folding may not grow a graph's constants by more bytes than this (a ConstantOfShape or Expand may be huge).
MAX_GROWTH = 64 * 2**20


def fold_constants(graph: Graph) -> int:
    """Replace nodes that compute constants, or follow from known shapes, by constants; say how many.

    QuantizeLinear and DequantizeLinear stay: what they say of weights is for quantization to read.  So do nodes whose
    results would be large; a fold that only replaces weights by others of their size is always made.
    """
    inferred = propagate(graph)
    graph.types = inferred.types
    count = fold(graph, inferred)
    if count:
        graph.prune()
    return count


def fold(graph: Graph, inferred: Inferred) -> int:
    """Fold with types and values that are known already. Dead constants are left to `Graph.prune`."""
    room, kept, folded = MAX_GROWTH, list[Node](), 0
    for node in graph.nodes:
        names = [name for name in node.outputs if name]
        values = {n: v for n in names if (v := inferred.values.get(n)) is not None and v.dtype.kind != "O"}
        if len(values) < len(names):
            growth = _growth(graph, node, inferred.types)
            if growth is None or growth > room:
                kept.append(node)
                continue
            room -= max(growth, 0)
            results = evaluate(node, [graph.array(name) if name else None for name in node.inputs])
            values = {n: y for n, y in zip(node.outputs, results, strict=False) if n}
        graph.constants.update(values)
        folded += 1
    graph.nodes = kept
    return folded


def _growth(graph: Graph, node: Node, types: dict[str, TensorType]) -> int | None:
    """By how many bytes folding a node grows the constants; None if it cannot be folded."""
    if node.op in NOT_FOLDED or any(name and name not in graph.constants for name in node.inputs):
        return None
    after = 0
    for name in node.outputs:
        if name:
            shape = types[name].static
            if shape is None:
                return None
            after += prod(shape) * numpy_dtype(types[name].dtype).itemsize
    before = sum(array.nbytes for name in node.inputs if name and (array := graph.array(name)) is not None)
    return after - before
