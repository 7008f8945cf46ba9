"""Recognise LayerNormalization written out: mean, difference, mean square, root, quotient, scale and bias."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from vnnigen.graph.attributes import int_attr
from vnnigen.graph.ir import Graph, Node
from vnnigen.graph.passes.edit import F64, Edit, dims, f32_constant, is_f32, plain, scalar
from vnnigen.graph.passes.pattern import Match, match


def _patterns() -> Iterator[tuple[object, ...]]:
    """Yield (x - mean) / sqrt(mean of squares + epsilon)."""
    difference = ("Sub", "x", ("ReduceMean", "x", "axes"))
    for square in (("Pow", difference, 2.0), ("Mul", difference, difference)):
        root = ("Sqrt", ("Add", ("ReduceMean", square, "axes2"), "epsilon"))
        yield ("Div", difference, root)
        yield ("Mul", difference, ("Reciprocal", root))
        yield ("Mul", difference, ("Div", 1.0, root))


def _folded_patterns() -> Iterator[tuple[object, ...]]:
    """Yield x * s + (bias - mean * s), s = scale / sqrt(...), as TensorFlow writes it."""
    mean = ("ReduceMean", "x", "axes")
    for left, right in (("x", mean), (mean, "x")):
        difference = ("Sub", left, right)
        for square in (("Pow", difference, 2.0), ("Mul", difference, difference)):
            root = ("Sqrt", ("Add", ("ReduceMean", square, "axes2"), "epsilon"))
            factor = ("Mul", ("Reciprocal", root), "scale")
            yield ("Add", ("Mul", "x", factor), ("Sub", "bias", ("Mul", mean, factor)))


_PATTERNS = tuple(_patterns())
_FOLDED = tuple(_folded_patterns())


def fuse_layer_norm(graph: Graph) -> int:
    """Replace the expression by one node, then let it take scale and bias."""
    edit = Edit(graph)
    for node in edit:
        if not node.fused and not _recognise(edit, node) and node.op in ("Mul", "Add"):
            _take_constant(edit, node)
    return edit.finish()


def _recognise(edit: Edit, node: Node) -> bool:
    for pattern in (*_PATTERNS, *_FOLDED):
        if pattern[0] == node.op and (found := match(edit, node, pattern)) is not None:
            made = _layer_norm(edit, node, found)
            if made is not None:
                edit.put(node, made, without=found.nodes[1:])
                return True
    return False


def _layer_norm(edit: Edit, node: Node, found: Match) -> Node | None:
    """The node, or None if the means are not over the last dimensions or the constants do not fit."""
    graph, names = edit.graph, found.names
    shape = dims(graph, names["x"])
    epsilon = scalar(graph, names["epsilon"])
    axes = [plain(graph, names[key]) for key in ("axes", "axes2")]
    if shape is None or epsilon is None or epsilon < 0 or axes[0] is None or axes[1] is None:
        return None
    rank = len(shape)
    over = [sorted({int(axis) % rank for axis in array.reshape(-1)}) for array in axes if array is not None]
    first = over[0][0] if over[0] else rank
    normalized = tuple(d for d in shape[first:] if isinstance(d, int))
    keeps = all(int_attr(n, "keepdims", 1) == 1 for n in found.nodes if n.op == "ReduceMean")
    if over[0] != list(range(first, rank)) or over[1] != over[0] or not keeps or len(normalized) != rank - first:
        return None
    if not normalized or not is_f32(graph, node.output) or dims(graph, node.output) != shape:
        return None
    attrs = {"axis": first - rank, "epsilon": epsilon}
    inputs = [names["x"]]
    if "scale" in names:
        for key in ("scale", "bias"):
            values = _spread(graph, names[key], normalized)
            if values is None:
                return None
            inputs.append(edit.constant(f"{node.name}_{key}", values))
    else:
        inputs.append(edit.constant(f"{node.name}_ones", np.ones(normalized)))
    return Node(node.name, "LayerNormalization", tuple(inputs), node.outputs, attrs)


def _spread(graph: Graph, name: str, normalized: tuple[int, ...]) -> F64 | None:
    """A constant as an array of the normalized dimensions, None if it has others as well."""
    values = f32_constant(graph, name)
    if values is None:
        return None
    while values.ndim > len(normalized) and values.shape[0] == 1:
        values = values[0]
    if values.ndim > len(normalized):
        return None
    try:
        return np.broadcast_to(values, normalized)
    except ValueError:
        return None


def _take_constant(edit: Edit, node: Node) -> None:
    """Let a LayerNormalization that ends in a Mul or Add with a constant do that itself."""
    graph = edit.graph
    for value, constant in (node.inputs, node.inputs[::-1]):
        norm = edit.maker(value)
        if norm is None or norm.op != "LayerNormalization" or norm.fused:
            continue
        shape, out = dims(graph, value), dims(graph, node.output)
        old = f32_constant(graph, norm.inputs[1])
        values = None if old is None else _spread(graph, constant, old.shape)
        if old is None or values is None or shape is None or shape != out:
            continue
        bias = f32_constant(graph, norm.inputs[2]) if len(norm.inputs) > 2 and norm.inputs[2] else np.zeros(old.shape)
        if bias is None:
            continue
        old, bias = (old * values, bias * values) if node.op == "Mul" else (old, bias + values)
        scale_name = edit.constant(f"{norm.name}_scale", old) if node.op == "Mul" else norm.inputs[1]
        bias_name = edit.constant(f"{norm.name}_bias", bias) if node.op == "Add" or bias.any() else ""
        inputs = tuple(name for name in (norm.inputs[0], scale_name, bias_name) if name)
        edit.put(node, replace(norm, inputs=inputs, outputs=node.outputs), without=[norm])
        return
