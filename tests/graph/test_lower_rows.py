"""Lowering of broadcasts, functions, normalization, gathering and copies: native steps that agree with NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from vnnigen.errors import ShapeError
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.ir import Graph, Node, TensorType, ValueQuant
from vnnigen.graph.network import Network

Array = np.ndarray[Any, Any]
RNG = np.random.default_rng(8)


def real(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(np.float32)


def whole(*values: int) -> Array:
    return np.array(values, np.int64)


def graph_of(
    op: str, feeds: dict[str, Array], constants: dict[str, Array], inputs: tuple[str, ...], attrs: Any, image: bool
) -> Graph:
    """One operator; with `image` between poolings, so that its first input and its result lie channels last."""
    kinds = {"float32": "f32", "int64": "s64", "int32": "s32"}
    types: Any = {name: TensorType(kinds[str(x.dtype)], x.shape) for name, x in feeds.items()}  # type: ignore[arg-type]
    nodes = []
    if image:
        pool = {"kernel_shape": (1, 1), "strides": (1, 1)}
        nodes.append(Node("before", "MaxPool", (inputs[0],), ("x_pooled",), pool))
        inputs = ("x_pooled", *inputs[1:])
    nodes.append(Node("node", op, inputs, ("y",), attrs))
    out = "y"
    if image:
        nodes.append(Node("after", "MaxPool", ("y",), ("z",), pool))
        out = "z"
    return Graph("test", types, (out,), nodes, dict(constants))


CASES: dict[str, tuple[str, dict[str, Array], dict[str, Array], tuple[str, ...], dict[str, Any]]] = {
    "squeeze-excite": ("Mul", {"x": real(2, 5, 4, 3), "s": real(2, 5, 1, 1)}, {}, ("x", "s"), {}),
    "mask": ("Add", {"x": real(2, 3, 4, 9), "s": real(2, 1, 1, 9)}, {}, ("x", "s"), {}),
    "constant minus": ("Sub", {"x": real(2, 3, 4, 9)}, {"c": real(1, 1, 4, 9)}, ("c", "x"), {}),
    "div": ("Div", {"x": real(2, 5, 4, 3)}, {"c": np.abs(real(5, 1, 1)) + 1}, ("x", "c"), {}),
    "div by a number": ("Div", {"x": real(2, 5, 4, 3)}, {"c": np.array(8, np.float32)}, ("x", "c"), {}),
    "prelu": ("PRelu", {"x": real(2, 5, 4, 3)}, {"c": real(5, 1, 1)}, ("x", "c"), {}),
    "max": ("Max", {"x": real(2, 5, 4, 3), "s": real(4, 1)}, {}, ("x", "s"), {}),
    "exp": ("Exp", {"x": real(2, 5, 4, 3)}, {}, ("x",), {}),
    "erf": ("Erf", {"x": real(2, 5, 4, 3)}, {}, ("x",), {}),
    "sqrt": ("Sqrt", {"x": np.abs(real(2, 5, 4, 3))}, {}, ("x",), {}),
    "pow": ("Pow", {"x": real(2, 5, 4, 3)}, {"c": np.array(2, np.float32)}, ("x", "c"), {}),
    "softplus": ("Softplus", {"x": real(2, 5, 4, 3)}, {}, ("x",), {}),
    "neg": ("Neg", {"x": real(2, 5, 4, 3)}, {}, ("x",), {}),
    "pad": ("Pad", {"x": real(2, 5, 4, 3)}, {"p": whole(0, 0, 1, 2, 0, 0, 0, 3)}, ("x", "p"), {}),
    "resize": (
        "Resize", {"x": real(2, 5, 4, 3)}, {"s": np.array([1, 1, 2, 3], np.float32)}, ("x", "", "s"),
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "mean of pixels": ("ReduceMean", {"x": real(2, 5, 4, 3)}, {"a": whole(-1, 2)}, ("x", "a"), {"keepdims": 1}),
    "largest of pixels": ("ReduceMax", {"x": real(2, 5, 4, 3)}, {"a": whole(2, 3)}, ("x", "a"), {"keepdims": 1}),
    "sum of channels": ("ReduceSum", {"x": real(2, 5, 4, 3)}, {"a": whole(1)}, ("x", "a"), {"keepdims": 1}),
}  # fmt: skip
PLAIN: dict[str, Any] = {
    "layer norm": (
        "LayerNormalization", {"x": real(2, 3, 40)}, {"g": real(40), "b": real(40)}, ("x", "g", "b"), {"axis": -1},
    ),
    "layer norm of two axes": (
        "LayerNormalization", {"x": real(2, 3, 4)}, {"g": real(3, 4)}, ("x", "g"), {"axis": 1, "epsilon": 0.1},
    ),
    "gather": ("Gather", {"i": np.array([[1, -1, 4]], np.int64)}, {"t": real(5, 7)}, ("t", "i"), {"axis": 0}),
    "gather s32": ("Gather", {"i": np.array([1, -2], np.int32)}, {"t": real(2, 5, 7)}, ("t", "i"), {"axis": 1}),
    "one row": ("Gather", {"x": real(2, 5, 7)}, {"i": np.array(-5, np.int64)}, ("x", "i"), {"axis": 1}),
    "mean": ("ReduceMean", {"x": real(2, 3, 70)}, {"a": whole(-1)}, ("x", "a"), {"keepdims": 0}),
    "mean of rows": ("ReduceMean", {"x": real(2, 9, 7)}, {"a": whole(1)}, ("x", "a"), {"keepdims": 0}),
    "sum of all": ("ReduceSum", {"x": real(2, 3, 70)}, {}, ("x",), {"keepdims": 0}),
    "pixels": ("ReduceMean", {"x": real(2, 5, 4, 3)}, {"a": whole(2, 3)}, ("x", "a"), {"keepdims": 0}),
    "cast": ("Cast", {"x": RNG.integers(-9, 1 << 40, (3, 20))}, {}, ("x",), {"to": 1}),
    "cast s32": ("Cast", {"x": np.arange(-9, 9, dtype=np.int32)}, {}, ("x",), {"to": 1}),
    "expand": ("Expand", {"x": real(2, 1, 7)}, {"s": whole(2, 3, 7)}, ("x", "s"), {}),
    "permuted": ("Transpose", {"x": real(2, 3, 4, 70)}, {}, ("x",), {"perm": (0, 2, 3, 1)}),
    "part": ("Slice", {"x": real(9, 7)}, {"s": whole(8, 1), "e": whole(-100, 7), "a": whole(0, 1), "d": whole(-2, 3)},
             ("x", "s", "e", "a", "d"), {}),
}  # fmt: skip


@pytest.mark.parametrize("isa", [None, "avx2", "reference"])
@pytest.mark.parametrize("image", [False, True])
@pytest.mark.parametrize("name", [*CASES, *PLAIN])
def test_operators(name: str, image: bool, isa: str | None) -> None:
    op, feeds, constants, inputs, attrs = {**CASES, **PLAIN}[name]
    if image and (name in PLAIN or inputs[0] != "x"):
        pytest.skip("no image")
    graph = graph_of(op, feeds, constants, inputs, attrs, image)
    net = Network(graph, isa=isa)
    got, want = net(feeds), run_reference(graph, feeds)[graph.outputs[0]]
    assert got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    if isa is None:
        steps = net._current().lowered.steps
        assert not [s for s in steps if s.native is None], [s.reason for s in steps]


@pytest.mark.parametrize("isa", [None, "reference"])
def test_an_index_out_of_range_is_an_error_not_a_crash(isa: str | None) -> None:
    feeds = {"i": np.array([[1, -1, 4]], np.int64)}
    graph = graph_of("Gather", feeds, {"t": real(5, 7)}, ("t", "i"), {"axis": 0}, image=False)
    net = Network(graph, isa=isa)
    want = net(feeds)
    for wrong in (5, -6, 1 << 40):
        with pytest.raises(ShapeError, match="out of range"):
            net({"i": np.array([[1, wrong, 4]], np.int64)})
    np.testing.assert_array_equal(net(feeds), want)


@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_upsampling_leaves_integers_as_they_are(mode: str) -> None:
    feeds, pool = {"x": real(2, 5, 4, 3).clip(-2.5, 2.5)}, {"kernel_shape": (1, 1), "strides": (1, 1)}
    q = ValueQuant("u8", 0.03, 100)
    attrs = {"mode": mode, "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    nodes = [
        Node("before", "AveragePool", ("x",), ("a",), pool, precision="int8"),
        Node("resize", "Resize", ("a", "", "s"), ("b",), attrs, precision="int8"),
        Node("after", "AveragePool", ("b",), ("c",), pool, precision="int8"),
    ]
    graph = Graph(
        "test", {"x": TensorType("f32", (2, 5, 4, 3))}, ("c",), nodes, {"s": np.array([1, 1, 2, 2], np.float32)}
    )
    graph.quant = {"x": q, "a": q, "b": q}
    net = Network(graph)
    np.testing.assert_allclose(net(feeds), run_reference(graph, feeds)["c"], atol=0.031)
    (step,) = [s for s in net._current().lowered.steps if s.op == "Resize"]
    assert (step.native is not None) == (mode == "nearest")
    if step.native is not None:
        assert step.outputs[0].dtype == "u8"
