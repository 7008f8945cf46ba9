"""Small expressions to look for in a graph: `("Mul", "x", ("Sigmoid", "x"))`.

A pattern is a name, which stands for any value (the same one wherever it occurs); a number, for a constant of one
element of about that value; or a tuple of an operator and patterns of its inputs, those of Add and Mul in either order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from vnnigen.graph.ir import Node
from vnnigen.graph.passes.edit import Edit, scalar

_COMMUTATIVE = ("Add", "Mul")
#: Exporters write constants with few digits, sqrt(2) as 1.4142.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Match:
    """What a pattern's names stand for, and the nodes it covers, the last one first."""

    names: Mapping[str, str]
    nodes: tuple[Node, ...]

    def inner_values_vanish(self, edit: Edit) -> bool:
        """Whether nobody else needs the values between the nodes."""
        reads = [name for node in self.nodes for name in node.inputs]
        graph = edit.graph
        return all(
            edit.uses(name) == reads.count(name) and name not in graph.outputs and name not in graph.quant
            for node in self.nodes[1:]
            for name in node.outputs
        )


def match(edit: Edit, node: Node, pattern: object) -> Match | None:
    """Match the expression whose last operator is `node`; values inside must not be needed elsewhere."""
    found = (m for m in _node(edit, node, pattern, Match({}, ())) if m.inner_values_vanish(edit))
    return next(found, None)


def _node(edit: Edit, node: Node, pattern: object, so_far: Match) -> Iterator[Match]:
    assert isinstance(pattern, tuple)
    op, *parts = pattern
    if node.op != op or len(node.inputs) != len(parts) or len(node.outputs) != 1 or node.fused:
        return
    if any(node.name == n.name for n in so_far.nodes):  # a shared subexpression, met before
        covered = so_far
    else:
        covered = Match(so_far.names, (*so_far.nodes, node))
    yield from _inputs(edit, node.inputs, parts, covered)
    if op in _COMMUTATIVE:
        yield from _inputs(edit, node.inputs, parts[::-1], covered)


def _inputs(edit: Edit, names: tuple[str, ...], parts: list[object], so_far: Match) -> Iterator[Match]:
    if not names:
        yield so_far
        return
    for matched in _value(edit, names, parts[0], so_far):
        yield from _inputs(edit, names[1:], parts[1:], matched)


def _value(edit: Edit, names: tuple[str, ...], pattern: object, so_far: Match) -> Iterator[Match]:
    name = names[0]
    if isinstance(pattern, str):
        if so_far.names.get(pattern, name) == name:
            yield Match({**so_far.names, pattern: name}, so_far.nodes)
    elif isinstance(pattern, (int, float)):
        value = scalar(edit.graph, name)
        if value is not None and math.isclose(value, pattern, rel_tol=_TOLERANCE, abs_tol=1e-9):
            yield so_far
    else:
        maker = edit.producer(name)
        if maker is not None:
            yield from _node(edit, maker, pattern, so_far)


def operators(pattern: object) -> frozenset[str]:
    """The operators that occur in a pattern."""
    if not isinstance(pattern, tuple):
        return frozenset()
    return frozenset({str(pattern[0])}).union(*map(operators, pattern[1:]))


def products(*factors: object) -> Iterator[tuple[object, ...]]:
    """A product of two or three factors, in every way to set parentheses."""
    if len(factors) == 2:
        yield ("Mul", *factors)
    else:
        for i, alone in enumerate(factors):
            yield ("Mul", alone, ("Mul", *factors[:i], *factors[i + 1 :]))
