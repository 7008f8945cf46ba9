"""Compute equal things once: equal small constants become one, then equal nodes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping

import numpy as np

from vnnigen.graph.ir import Attr, Graph, Node
from vnnigen.graph.passes.edit import Edit

_RANDOM = frozenset({
    "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout",
})  # fmt: skip
#: Larger constants are not compared: equal weights are rare, and looking at all of them takes time.
_MAX_BYTES = 4096


def eliminate_common(graph: Graph) -> int:
    """Make readers of a second node that computes the same read the first one's results."""
    edit, alike = Edit(graph), _equal_constants(graph)
    first: dict[Hashable, Node] = {}
    for node in edit:
        if node.op in _RANDOM or any(name in graph.quant for name in node.outputs):
            continue
        made = tuple(bool(name) for name in node.outputs)
        steps = tuple((step.op, _attrs(step.attrs), step.operand) for step in node.fused)
        inputs = tuple(alike.get(name, name) for name in node.inputs)
        key = (node.op, inputs, made, _attrs(node.attrs), steps, node.precision)
        known = first.setdefault(key, node)
        if known is not node and not set(node.outputs).intersection(graph.outputs):
            edit.merge(node, known)
    return edit.finish()


def _equal_constants(graph: Graph) -> dict[str, str]:
    """For small constants that equal an earlier one, the earlier one's name."""
    first: dict[Hashable, str] = {}
    alike = {}
    for name, value in graph.constants.items():
        if isinstance(value, np.ndarray) and value.nbytes <= _MAX_BYTES:
            alike[name] = first.setdefault(_comparable(value), name)
    return alike


def _attrs(attrs: Mapping[str, Attr]) -> Hashable:
    return tuple(sorted((name, _comparable(value)) for name, value in attrs.items()))


def _comparable(value: Attr) -> Hashable:
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return type(value).__name__, value
