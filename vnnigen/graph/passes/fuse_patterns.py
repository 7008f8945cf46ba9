"""Recognise activations that exporters write as several operators: Gelu, Silu, HardSigmoid, HardSwish."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from vnnigen.graph.attributes import float_attr
from vnnigen.graph.ir import Attr, Graph, Node
from vnnigen.graph.passes.edit import Edit, is_f32, plain, rank
from vnnigen.graph.passes.pattern import Match, match, operators, products


def _gelu() -> Iterator[tuple[object, ...]]:
    """Yield x / 2 * (1 + erf(x / sqrt(2)))."""
    for scaled in (("Div", "x", math.sqrt(2)), ("Mul", "x", math.sqrt(0.5))):
        yield from _halved(("Add", ("Erf", scaled), 1.0))


def _gelu_tanh() -> Iterator[tuple[object, ...]]:
    """Yield x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))."""
    k, c, square = math.sqrt(2 / math.pi), 0.044715, ("Mul", "x", "x")
    cubes = [("Mul", ("Pow", "x", 3.0), c), *products(c, "x", square), ("Mul", c, ("Mul", "x", square))]
    sums: list[object] = [("Mul", ("Add", "x", cube), k) for cube in cubes]
    for by_square in (("Mul", c, square), ("Mul", c, ("Pow", "x", 2.0)), ("Mul", "x", ("Mul", "x", c))):
        sums += products(k, "x", ("Add", by_square, 1.0))
    for argument in sums:
        yield from _halved(("Add", ("Tanh", argument), 1.0))


def _halved(gate: object) -> Iterator[tuple[object, ...]]:
    """Yield x * gate / 2 in all orders."""
    yield from products("x", 0.5, gate)
    half = 2.0
    yield ("Div", ("Mul", "x", gate), half)
    yield ("Mul", "x", ("Div", gate, half))
    yield ("Mul", ("Div", "x", half), gate)


def _hard_sigmoid() -> Iterator[tuple[object, ...]]:
    """Yield min(max(x + 3, 0), 6) / 6."""
    shifted = ("Clip", ("Add", "x", 3.0), 0.0, 6.0)
    yield from (("Div", shifted, 6.0), ("Mul", shifted, 1 / 6))
    yield ("Clip", ("Add", ("Mul", "x", 1 / 6), 0.5), 0.0, 1.0)
    yield ("Clip", ("Add", ("Div", "x", 6.0), 0.5), 0.0, 1.0)


def _hard_swish() -> Iterator[tuple[object, ...]]:
    """The same times x; what _hard_sigmoid covers is a HardSigmoid by then."""
    shifted = ("Clip", ("Add", "x", 3.0), 0.0, 6.0)
    yield ("Mul", "x", ("HardSigmoid", "x"))
    yield from (("Div", ("Mul", "x", shifted), 6.0), ("Mul", ("Mul", "x", shifted), 1 / 6))
    yield ("Mul", ("Mul", "x", 1 / 6), shifted)
    yield ("Mul", ("Div", "x", 6.0), shifted)


def _table() -> Mapping[str, list[tuple[object, str, Mapping[str, Attr]]]]:
    """By the last operator: pattern, the operator it is, and its attributes."""
    table: dict[str, list[tuple[object, str, Mapping[str, Attr]]]] = defaultdict(list)
    kinds: tuple[tuple[Iterable[tuple[object, ...]], str, Mapping[str, Attr]], ...] = (
        (_gelu(), "Gelu", {"approximate": "none"}),
        (_gelu_tanh(), "Gelu", {"approximate": "tanh"}),
        ([("Mul", "x", ("Sigmoid", "x"))], "Silu", {}),
        (_hard_sigmoid(), "HardSigmoid", {"alpha": 1 / 6, "beta": 0.5}),
        (_hard_swish(), "HardSwish", {}),
    )
    for patterns, op, attrs in kinds:
        for pattern in patterns:
            table[str(pattern[0])].append((pattern, op, attrs))
    return table


_PATTERNS = _table()


def _legal(graph: Graph, node: Node, found: Match) -> bool:
    """Whether the constants add no dimension, the numbers are floats, and a HardSigmoid has HardSwish's slope."""
    sources = found.names["x"]
    if (
        not is_f32(graph, node.output)
        or rank(graph, sources) is None
        or rank(graph, sources) != rank(graph, node.output)
    ):
        return False
    slopes = [n for n in found.nodes if n.op == "HardSigmoid"]
    return plain(graph, sources) is None and all(
        math.isclose(float_attr(n, "alpha", 0.2), 1 / 6, rel_tol=1e-4) and float_attr(n, "beta", 0.5) == 0.5
        for n in slopes
    )


def fuse_patterns(graph: Graph) -> int:
    """Replace expressions that are one activation by that."""
    edit = Edit(graph)
    present = {node.op for node in graph} | {"HardSigmoid"}  # which may be made here
    possible = {op: [p for p in table if operators(p[0]) <= present] for op, table in _PATTERNS.items()}
    for node in edit:
        for pattern, op, attrs in possible.get(node.op, ()):
            found = match(edit, node, pattern)
            if found is not None and _legal(graph, node, found):
                made = Node(node.name, op, (found.names["x"],), node.outputs, attrs)
                edit.put(node, made, without=found.nodes[1:])
                break
    return edit.finish()
