"""Graphs for given shapes, and the folding of constants."""

from __future__ import annotations

import numpy as np
import pytest

from vnnigen.errors import ModelError
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.ir import Graph, Node, TensorType
from vnnigen.graph.passes.fold_constants import MAX_GROWTH, fold_constants
from vnnigen.graph.specialize import specialize

RNG = np.random.default_rng(0)


def head() -> Graph:
    """An upsampling to twice the size and a flattening, both computed from shapes as exporters write them."""
    nodes = [
        Node("s", "Shape", ("x",), ("shape",)),
        Node("sp", "Slice", ("shape", "two", "four"), ("hw",)),
        Node("cf", "Cast", ("hw",), ("hw_f",), {"to": 1}),
        Node("m", "Mul", ("hw_f", "factor"), ("hw_2",)),
        Node("fl", "Floor", ("hw_2",), ("hw_3",)),
        Node("ci", "Cast", ("hw_3",), ("hw_4",), {"to": 7}),
        Node("nc", "Slice", ("shape", "zero", "two"), ("nc",)),
        Node("c", "Concat", ("nc", "hw_4"), ("sizes",), {"axis": 0}),
        Node("r", "Resize", ("x", "", "", "sizes"), ("big",), {"mode": "nearest"}),
        Node("g", "Slice", ("shape", "zero", "one"), ("n",)),
        Node("t", "Concat", ("n", "minus"), ("target",), {"axis": 0}),
        Node("v", "Reshape", ("big", "target"), ("y",)),
    ]
    constants = {
        "zero": np.array([0]), "one": np.array([1]), "two": np.array([2]), "four": np.array([4]),
        "minus": np.array([-1]), "factor": np.array([2, 2], np.float32),
    }  # fmt: skip
    return Graph("g", {"x": TensorType("f32", ("N", 3, "H", "W"))}, ("y",), nodes, dict(constants))


def test_shape_arithmetic_is_folded() -> None:
    graph = head()
    made = specialize(graph, {"x": (2, 3, 4, 5)})
    assert [node.op for node in made.nodes] == ["Resize", "Reshape"]
    assert made.types["y"] == TensorType("f32", (2, 3 * 8 * 10))
    assert set(made.constants) == {"sizes", "target"}
    x = RNG.standard_normal((2, 3, 4, 5)).astype(np.float32)
    np.testing.assert_array_equal(run_reference(made, {"x": x})["y"], run_reference(graph, {"x": x})["y"])
    assert len(graph.nodes) == 12, "the graph itself is left as it is"
    assert graph.inputs["x"].shape == ("N", 3, "H", "W")


@pytest.mark.parametrize(
    ("shapes", "reason"),
    [
        ({"x": (2, 4, 4, 4)}, "3 is 3"),
        ({"x": (2, 3, 4)}, "dimensions"),
        ({"x": (2, 3, -4, 4)}, "cannot have"),
        ({"z": (2, 3, 4, 4)}, "no input 'z'"),
        ({}, "needs a shape"),
    ],
)
def test_shapes_that_do_not_fit(shapes: dict[str, tuple[int, ...]], reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        specialize(head(), shapes)


def two_inputs() -> Graph:
    types = {"a": TensorType("f32", ("N", 4)), "b": TensorType("f32", ("N", 4))}
    return Graph("g", types, ("y",), [Node("n", "Add", ("a", "b"), ("y",))], {})


def test_a_name_is_one_length() -> None:
    with pytest.raises(ModelError, match="N is 2"):
        specialize(two_inputs(), {"a": (2, 4), "b": (3, 4)})
    made = specialize(two_inputs(), {"a": (2, 4)})
    assert made.inputs["b"].shape == (2, 4), "the other input's length follows from the name"


def test_lengths_that_depend_on_values() -> None:
    nodes = [Node("nz", "NonZero", ("x",), ("found",)), Node("c", "Cast", ("found",), ("y",), {"to": 1})]
    graph = Graph("g", {"x": TensorType("f32", (4, 4))}, ("y",), nodes, {})
    with pytest.raises(ModelError, match=r"'found' stays unknown.*NonZero"):
        specialize(graph, {})
    assert specialize(graph, {}, dynamic=True).types["y"].shape == (2, "found.1")


def constant_graph(*nodes: Node, **constants: np.ndarray) -> Graph:
    add = Node("last", "Add", ("x", "k"), ("y",))
    return Graph("g", {"x": TensorType("f32", ("N", 4))}, ("y",), [*nodes, add], dict(constants))


def test_weights_are_folded() -> None:
    graph = constant_graph(
        Node("a", "Mul", ("w", "w"), ("v",)), Node("b", "Transpose", ("v",), ("k",)), w=np.full((4, 1), 3, np.float32)
    )
    assert fold_constants(graph) == 2
    np.testing.assert_array_equal(graph.array("k"), np.full((1, 4), 9, np.float32))
    assert set(graph.constants) == {"k"}, "what is dead is dropped"
    assert [node.name for node in graph.nodes] == ["last"]
    assert fold_constants(graph) == 0


def test_quantized_weights_are_not_folded() -> None:
    graph = constant_graph(
        Node("d", "DequantizeLinear", ("w", "s"), ("k",)), w=np.ones(4, np.int8), s=np.array(0.5, np.float32)
    )
    assert fold_constants(graph) == 0
    assert [node.name for node in graph.nodes] == ["d", "last"]


def test_large_results_are_not_folded() -> None:
    rows = MAX_GROWTH // 16 + 8
    target = np.array([rows, 4])
    graph = constant_graph(Node("e", "Expand", ("w", "t"), ("k",)), w=np.ones(4, np.float32), t=target)
    graph.inputs["x"] = TensorType("f32", (1, 4))
    assert fold_constants(graph) == 0


def test_an_output_may_become_a_constant() -> None:
    graph = Graph("g", {"x": TensorType("f32", (2, 3))}, ("s",), [Node("n", "Shape", ("x",), ("s",))], {})
    made = specialize(graph, {})
    made.check()
    assert made.nodes == []
    np.testing.assert_array_equal(run_reference(made, {"x": np.zeros((2, 3), np.float32)})["s"], [2, 3])
