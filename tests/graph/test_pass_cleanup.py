"""drop_identity, eliminate_common, merge_transposes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from tests.graph.pass_helpers import Build, check
from vnnigen.graph.ir import ValueQuant
from vnnigen.graph.passes.drop_identity import drop_identity
from vnnigen.graph.passes.eliminate_common import eliminate_common
from vnnigen.graph.passes.merge_transposes import merge_transposes

NOTHING: dict[str, Callable[[Build, str], str]] = {
    "identity": lambda b, x: b.op("Identity", x),
    "dropout": lambda b, x: b.op("Dropout", x),
    "dropout with mask": lambda b, x: b.op("Dropout", x, outputs=("kept", "mask")),
    "reshape": lambda b, x: b.op("Reshape", x, b.ints(2, 3, 4)),
    "reshape with holes": lambda b, x: b.op("Reshape", x, b.ints(0, -1, 4)),
    "cast": lambda b, x: b.op("Cast", x, to=1),
    "clip": lambda b, x: b.op("Clip", x),
    "pad": lambda b, x: b.op("Pad", x, b.ints(0, 0, 0, 0, 0, 0)),
    "slice": lambda b, x: b.op("Slice", x, b.ints(0), b.ints(99), b.ints(1), b.ints(1)),
    "resize": lambda b, x: b.op("Resize", x, "", b.const([1, 1, 1]), mode="nearest"),
    "split": lambda b, x: b.op("Split", x, axis=1, num_outputs=1),
    "concat": lambda b, x: b.op("Concat", x, axis=1),
    "sum": lambda b, x: b.op("Sum", x),
    "expand": lambda b, x: b.op("Expand", x, b.ints(3, 1)),
    "plus 0": lambda b, x: b.op("Add", x, b.const(0)),
    "0 plus": lambda b, x: b.op("Add", b.const([[0]]), x),
    "minus 0": lambda b, x: b.op("Sub", x, b.const(0)),
    "times 1": lambda b, x: b.op("Mul", b.const([1]), x),
    "over 1": lambda b, x: b.op("Div", x, b.const(1)),
    "power 1": lambda b, x: b.op("Pow", x, b.const(1)),
}
SOMETHING: dict[str, Callable[[Build, str], str]] = {
    "reshape": lambda b, x: b.op("Reshape", x, b.ints(2, 4, 3)),
    "cast": lambda b, x: b.op("Cast", x, to=6),
    "clip": lambda b, x: b.op("Clip", x, b.const(0)),
    "pad that moves": lambda b, x: b.op("Pad", x, b.ints(0, 0, 1, 0, 0, -1)),
    "slice backwards": lambda b, x: b.op("Slice", x, b.ints(-1), b.ints(-99), b.ints(1), b.ints(-1)),
    "0 minus": lambda b, x: b.op("Sub", b.const(0), x),
    "1 over": lambda b, x: b.op("Div", b.const(1), x),
    "1 to the power": lambda b, x: b.op("Pow", b.const(1), x),
    "a 1 that adds a dimension": lambda b, x: b.op("Mul", x, b.const([[[[1]]]])),
    "expand": lambda b, x: b.op("Expand", x, b.ints(2, 1, 1, 1)),
    "two of them": lambda b, x: b.op("Concat", x, x, axis=0),
}


@pytest.mark.parametrize("make", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("place", ["inside", "output", "input"])
def test_drop_identity(make: Callable[[Build, str], str], place: str) -> None:
    b = Build()
    x = b.input(2, 3, 4)
    if place != "input":
        x = b.op("Abs", x)
    y = make(b, x)
    ops = check(b.graph(y if place == "output" else b.op("Neg", y)), drop_identity, changes=1)
    assert ops == {"inside": ["Abs", "Neg"], "output": ["Abs"], "input": ["Neg"]}[place]


@pytest.mark.parametrize("make", SOMETHING.values(), ids=SOMETHING)
def test_what_changes_something_stays(make: Callable[[Build, str], str]) -> None:
    b = Build()
    check(b.graph(make(b, b.input(2, 3, 4))), drop_identity, changes=0)


def test_names_of_outputs_stay() -> None:
    """An Identity between the graph's input and output, or between two outputs, is needed for the names."""
    b = Build()
    x = b.input(2)
    check(b.graph(b.op("Identity", x)), drop_identity, changes=0)
    b = Build()
    y = b.op("Abs", b.input(2))
    check(b.graph(y, b.op("Identity", y)), drop_identity, changes=0)


def test_a_mask_that_is_read() -> None:
    b = Build()
    b.op("Dropout", b.input(2), outputs=("kept", "mask"))
    check(b.graph("kept", "mask"), drop_identity, changes=0)


def test_a_chain_that_is_the_output() -> None:
    """The source takes the output's name; its other readers follow."""
    b = Build()
    y = b.op("Abs", b.input(2))
    z = b.op("Identity", b.op("Identity", y))
    w = b.op("Neg", y)
    graph = b.graph(z, w)
    assert check(graph, drop_identity, changes=2) == ["Abs", "Neg"]
    assert graph.nodes[1].inputs == (z,)


def test_a_change_of_quantization_is_not_nothing() -> None:
    b = Build()
    y = b.op("Abs", b.input(2))
    z = b.op("Identity", y)
    graph = b.graph(b.op("Neg", z))
    graph.quant = {y: ValueQuant("u8", 0.1, 0), z: ValueQuant("u8", 0.2, 0)}
    check(graph, drop_identity, changes=0)


# Common subexpressions.


def test_equal_nodes_are_one() -> None:
    """Constants are equal by value; what becomes equal by a first merge is merged too."""
    b = Build()
    x = b.input(2, 3)
    y = [b.op("Softmax", b.op("Mul", x, b.const(2.0)), axis=1) for _ in range(3)]
    graph = b.graph(b.op("Sum", *y))
    assert check(graph, eliminate_common, changes=4) == ["Mul", "Softmax", "Sum"]


@pytest.mark.parametrize("attrs", [({"axis": 0}, {"axis": 1}), ({"axis": 1}, {})])
def test_other_attributes_are_other_nodes(attrs: tuple[dict[str, Any], dict[str, Any]]) -> None:
    b = Build()
    x = b.input(2, 3, 4)
    check(b.graph(*(b.op("Softmax", x, **a) for a in attrs)), eliminate_common, changes=0)


def test_other_constants_are_other_nodes() -> None:
    b = Build()
    x = b.input(2, 3)
    y = [b.op("Mul", x, c) for c in (b.const(2.0), b.const([2.0]), b.const(3.0))]
    check(b.graph(b.op("Sum", *y)), eliminate_common, changes=0)


def test_outputs_are_kept_apart() -> None:
    b = Build()
    x = b.input(2, 3)
    check(b.graph(b.op("Abs", x), b.op("Abs", x)), eliminate_common, changes=0)
    b = Build()
    x = b.input(2, 3)
    y, z = b.op("Abs", x), b.op("Abs", x)
    assert check(b.graph(y, b.op("Neg", z)), eliminate_common, changes=1) == ["Abs", "Neg"]


def test_several_results() -> None:
    b = Build()
    x = b.input(4, 3)
    first, second = (("a", "b"), ("c", "d"))
    for names in (first, second):
        b.op("Split", x, outputs=names, axis=0, num_outputs=2)
    graph = b.graph(b.op("Concat", "a", "d", "c", "b", axis=0))
    assert check(graph, eliminate_common, changes=1) == ["Split", "Concat"]


# Transposes.


def test_transposes_merge() -> None:
    b = Build()
    y = b.op("Transpose", b.op("Transpose", b.input(2, 3, 4), perm=(1, 2, 0)), perm=(0, 2, 1))
    graph = b.graph(b.op("Abs", y))
    assert check(graph, merge_transposes, changes=1) == ["Transpose", "Abs"]
    assert graph.nodes[0].attrs["perm"] == (1, 0, 2)


def test_there_and_back_is_nothing() -> None:
    b = Build()
    x = b.op("Abs", b.input(2, 3, 4))
    y = b.op("Transpose", b.op("Transpose", x), perm=(2, 1, 0))
    assert check(b.graph(b.op("Neg", y)), merge_transposes) == ["Abs", "Neg"]
    b = Build()
    y = b.op("Transpose", b.op("Transpose", b.op("Abs", b.input(2, 3, 4))), perm=(2, 1, 0))
    assert check(b.graph(y), merge_transposes) == ["Abs"]


def test_there_and_back_between_names_that_stay() -> None:
    """From the graph's input to its output one Transpose, of nothing, is left."""
    b = Build()
    y = b.op("Transpose", b.op("Transpose", b.input(2, 3, 4)))
    graph = b.graph(y)
    assert check(graph, merge_transposes) == ["Transpose"]


def test_a_transpose_with_other_readers_stays() -> None:
    b = Build()
    y = b.op("Transpose", b.input(2, 3, 4), perm=(1, 2, 0))
    graph = b.graph(y, b.op("Transpose", y, perm=(1, 2, 0)))
    check(graph, merge_transposes, changes=1)
    assert [n.attrs["perm"] for n in graph] == [(1, 2, 0), (2, 0, 1)]
    assert np.array_equal([n.inputs for n in graph], [("x",), ("x",)])
