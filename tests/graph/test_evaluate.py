"""What nodes compute: fused steps, accuracy, whole graphs. (The operators themselves: test_backend_nodes.)"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Mapping

import ml_dtypes
import numpy as np
import pytest

from vnnigen.errors import ModelError
from vnnigen.graph.evaluate import evaluate, run_reference
from vnnigen.graph.evaluate_math import erf
from vnnigen.graph.ir import Array, Fused, Graph, Node, QWeight, TensorType

RNG = np.random.default_rng(1)
F32 = np.float32


def floats(*shape: int) -> Array:
    return RNG.standard_normal(shape).astype(F32)


def test_erf_is_that_of_the_c_library() -> None:
    x = np.concatenate([np.linspace(-7, 7, 20001), [0.0, 1e-30, -1e-8, np.inf, -np.inf]])
    want = np.array([math.erf(v) for v in x])
    np.testing.assert_allclose(erf(x), want, rtol=1e-10, atol=0)
    assert np.isnan(erf(np.array(np.nan)))


STEPS: list[tuple[Fused, str, Mapping[str, float | str]]] = [
    (Fused(op, attrs), op, attrs)
    for op, attrs in [
        ("Relu", {}), ("LeakyRelu", {"alpha": 0.2}), ("HardSwish", {}), ("Sigmoid", {}), ("Tanh", {}), ("Gelu", {}),
        ("Gelu", {"approximate": "tanh"}), ("Silu", {}), ("HardSigmoid", {"alpha": 0.3, "beta": 0.4}),
    ]
]  # fmt: skip


@pytest.mark.parametrize(("step", "op", "attrs"), STEPS, ids=lambda v: v if isinstance(v, str) else None)
def test_fused_activations(step: Fused, op: str, attrs: Mapping[str, float | str]) -> None:
    """A fused step does what the node of its name does to the result."""
    x, w = floats(2, 3, 6, 6), floats(4, 3, 3, 3)
    plain = Node("c", "Conv", ("x", "w"), ("y",))
    (y,) = evaluate(plain, [x, w])
    (want,) = evaluate(Node("a", op, ("y",), ("z",), attrs), [y])
    (got,) = evaluate(Node("c", "Conv", ("x", "w"), ("y",), fused=(step,)), [x, w])
    np.testing.assert_array_equal(got, want)


def test_fused_steps_in_their_order() -> None:
    x, w, r, s = floats(2, 3, 6, 6), floats(4, 3, 3, 3), floats(2, 4, 4, 4), floats(4)
    steps = (
        Fused("Mul", {}, 3),
        Fused("Add", {}, 4),
        Fused("Clip", {"min": -1.0, "max": 0.5}),
        Fused("Clip", {"min": 0}),
    )
    node = Node("c", "Conv", ("x", "w", "", "s", "r"), ("y",), fused=steps)
    (y,) = evaluate(Node("c", "Conv", ("x", "w"), ("y",)), [x, w])
    (got,) = evaluate(node, [x, w, None, s, r])
    np.testing.assert_allclose(got, np.maximum(np.clip(y * s[:, None, None] + r, -1, 0.5), 0), rtol=1e-6)


def test_a_vector_lies_along_the_channels() -> None:
    """Of images dimension 1, of a Linear the last one, also where both would fit."""
    v, w4, w2 = floats(4), floats(4, 4, 1, 1), floats(4, 4)
    images, rows = floats(1, 4, 4, 4), floats(1, 4, 4)
    conv = Node("c", "Conv", ("x", "w", "", "v"), ("y",), fused=(Fused("Add", {}, 3),))
    bare = Node("c", "Conv", ("x", "w"), ("y",))
    np.testing.assert_array_equal(
        evaluate(conv, [images, w4, None, v])[0], evaluate(bare, [images, w4])[0] + v[:, None, None]
    )
    linear = Node("l", "Linear", ("x", "w", "", "v"), ("y",), fused=(Fused("Add", {}, 3),))
    np.testing.assert_array_equal(evaluate(linear, [rows, w2, None, v])[0], (rows @ w2 + v).astype(F32))


def test_fused_steps_keep_the_shape() -> None:
    node = Node("l", "Relu", ("x", "v"), ("y",), fused=(Fused("Add", {}, 1),))
    with pytest.raises(ModelError, match=r"'l'.*changes the shape"):
        evaluate(node, [floats(1, 4), floats(3, 4)])


@pytest.mark.parametrize(
    ("groups", "shape", "kernel"),
    [(1, (2, 4, 9, 8), (6, 4, 3, 3)), (2, (2, 4, 9, 8), (6, 2, 3, 2)), (4, (1, 4, 9), (4, 1, 3)),
     (1, (1, 2, 5, 6, 7), (3, 2, 2, 3, 2))],
)  # fmt: skip
def test_convolution_is_its_definition(groups: int, shape: tuple[int, ...], kernel: tuple[int, ...]) -> None:
    x, w = floats(*shape), floats(*kernel)
    rank = len(shape) - 2
    attrs = {"group": groups, "strides": (2,) * rank, "dilations": (2,) * rank, "pads": (1,) * rank + (2,) * rank}
    (y,) = evaluate(Node("c", "Conv", ("x", "w"), ("y",), attrs), [x, w])
    padded = np.pad(x.astype(np.float64), [(0, 0), (0, 0), *[(1, 2)] * rank])
    per = kernel[0] // groups
    for at in np.ndindex(*y.shape):
        n, o, *where = at
        group = slice(o // per * kernel[1], (o // per + 1) * kernel[1])
        window = tuple(slice(2 * i, 2 * i + 2 * k, 2) for i, k in zip(where, kernel[2:], strict=True))
        assert abs((padded[(n, group, *window)] * w[o]).sum() - y[at]) < 1e-4


def test_conv_integer_is_exact() -> None:
    x = RNG.integers(0, 256, (1, 512, 3, 3)).astype(np.uint8)
    w = RNG.integers(-128, 128, (2, 512, 3, 3)).astype(np.int8)
    (y,) = evaluate(Node("c", "ConvInteger", ("x", "w", "z"), ("y",)), [x, w, np.array(7, np.uint8)])
    want = ((x.astype(np.int64) - 7) * w).sum(axis=(1, 2, 3))
    assert y.dtype == np.int32
    np.testing.assert_array_equal(y.reshape(-1), want)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_is_computed_in_f32(dtype: type) -> None:
    x, w = floats(4, 512).astype(dtype), floats(512, 4).astype(dtype)
    (y,) = evaluate(Node("m", "MatMul", ("x", "w"), ("y",)), [x, w])
    assert y.dtype == dtype
    np.testing.assert_array_equal(y, (x.astype(F32) @ w.astype(F32)).astype(dtype))


def small_graph() -> Graph:
    nodes = [
        Node("a", "Linear", ("x", "w"), ("h",), fused=(Fused("Relu"),)),
        Node("b", "Split", ("h",), ("left", "right"), {"axis": 1, "num_outputs": 2}),
        Node("c", "Mul", ("left", "right"), ("y",)),
    ]
    return Graph("g", {"x": TensorType("f32", ("N", 3))}, ("y",), nodes, {"w": floats(3, 4)})


def test_whole_graph() -> None:
    graph, x = small_graph(), floats(5, 3)
    h = np.maximum(x @ np.asarray(graph.constants["w"]), 0)
    found = run_reference(graph, {"x": x}, ["right", "y", "w"])
    np.testing.assert_allclose(found["y"], h[:, :2] * h[:, 2:], rtol=1e-6)
    np.testing.assert_array_equal(found["right"], h[:, 2:])
    assert list(found) == ["right", "y", "w"]
    np.testing.assert_array_equal(run_reference(graph, {"h": h}, ["y"])["y"], h[:, :2] * h[:, 2:])


def test_quantized_weights_count_as_real_ones() -> None:
    graph = small_graph()
    q = RNG.integers(-128, 128, (3, 4)).astype(np.int8)
    weight = QWeight(q, np.array([0.1, 0.2, 0.3, 0.4], F32), np.array([0, 1, 2, 3], np.int32), axis=1)
    graph.constants["w"] = weight
    x = floats(2, 3)
    np.testing.assert_allclose(run_reference(graph, {"x": x}, ["h"])["h"], np.maximum(x @ weight.real, 0), rtol=1e-6)


@pytest.mark.parametrize(
    ("feeds", "wanted", "reason"),
    [({}, None, r"node 'a' \(Linear\).*'x'"), ({"x": np.zeros((5, 3), F32)}, ["z"], "'z'"),
     ({"x": np.zeros((5, 4), F32)}, None, "'a'.*cannot multiply")],
)  # fmt: skip
def test_what_cannot_be_computed(feeds: dict[str, Array], wanted: list[str] | None, reason: str) -> None:
    with pytest.raises(ModelError, match=reason):
        run_reference(small_graph(), feeds, wanted)


def test_no_onnx_package_for_common_operators() -> None:
    """The NumPy steps of a saved network run where the onnx package is not installed; rare ones say what they need."""
    code = """
import sys
sys.modules["onnx"] = None
import numpy as np
from vnnigen.errors import MissingExtraError
from vnnigen.graph.evaluate import evaluate
from vnnigen.graph.ir import Node
x = np.ones((1, 2, 4, 4), np.float32)
evaluate(Node("r", "Resize", ("x", "", "s"), ("y",), {"mode": "linear"}), [x, None, np.array([1, 1, 2, 2], np.float32)])
evaluate(Node("t", "TopK", ("x", "k"), ("v", "i")), [x, np.array([2])])
try:
    evaluate(Node("d", "Det", ("x",), ("y",)), [x])
except MissingExtraError as error:
    assert "vnnigen[onnx]" in str(error)
else:
    raise AssertionError("Det needs onnx")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
