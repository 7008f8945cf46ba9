"""Single rules: each operator's lowering against the NumPy oracle, with and without kernels, in one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

import vnnigen as v
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Fused, Graph, Node, QWeight, TensorType, ValueQuant
from vnnigen.graph.lower import lower
from vnnigen.graph.network import Network
from vnnigen.graph.plan import lay_out, step_threads
from vnnigen.graph.specialize import specialize

RNG = np.random.default_rng(7)
HERE = v.tiers()[0] != "reference"


def f32(*shape: int) -> Any:
    return RNG.standard_normal(shape).astype(np.float32)


def node(op: str, inputs: str, outputs: str, fused: Sequence[Fused] = (), **attrs: Any) -> Node:
    return Node(
        f"n_{outputs.split(maxsplit=1)[0]}", op, tuple(inputs.split()), tuple(outputs.split()), attrs, tuple(fused)
    )


def graph_of(shapes: dict[str, tuple[int, ...]], nodes: list[Node], outputs: str, **constants: Any) -> Graph:
    inputs = {name: TensorType("f32", shape) for name, shape in shapes.items()}
    graph = Graph("g", inputs, tuple(outputs.split()), nodes, constants)
    infer(graph)
    return graph


def run(graph: Graph, isa: str | None = None) -> Network:
    """Compare with the oracle; the network, for questions."""
    feeds = {name: f32(*kind.static) for name, kind in graph.inputs.items() if kind.static is not None}
    net = Network(graph, isa=isa)
    results = net(feeds)
    want = run_reference(graph, feeds)
    for name, y in zip(graph.outputs, results if isinstance(results, tuple) else (results,), strict=True):
        assert y.shape == want[name].shape
        np.testing.assert_allclose(y, want[name], rtol=1e-4, atol=1e-4 * max(np.abs(want[name]).max(), 1e-3))
    return net


IMAGE = {"x": (2, 6, 9, 8)}
CONV = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}


def conv_case(attrs: dict[str, Any], w: Any, bias: bool = True, fused: Sequence[Fused] = ()) -> Graph:
    constants = {"w": w, "b": f32(len(w))}
    return graph_of(IMAGE, [node("Conv", "x w b" if bias else "x w", "y", fused, **attrs)], "y", **constants)


def simple(op: str, shapes: dict[str, tuple[int, ...]] | None = None, **attrs: Any) -> Graph:
    shapes = shapes or IMAGE
    return graph_of(shapes, [node(op, " ".join(shapes), "y", **attrs)], "y")


def after_conv(*nodes: Node, outputs: str = "y", **constants: Any) -> Graph:
    first = node("Conv", "x w", "c", kernel_shape=(1, 1))
    return graph_of(IMAGE, [first, *nodes], outputs, w=f32(10, 6, 1, 1), **constants)


def concat_graph(direct: bool) -> Graph:
    """A fire module; `direct` tells whether the branches have no other reader."""
    nodes = [
        node("Conv", "x wa", "s", [Fused("Relu")], kernel_shape=(1, 1)),
        node("Conv", "s wb", "e1", [Fused("Relu")], kernel_shape=(1, 1)),
        node("Conv", "s wc", "e3", [Fused("Relu")], **CONV),
        node("Concat", "e1 e3", "y", axis=1),
    ]
    nodes.append(node("Relu", "y", "z") if direct else node("Add", "e1 e3", "z"))
    weights = {"wa": f32(4, 6, 1, 1), "wb": f32(20, 4, 1, 1), "wc": f32(20, 4, 3, 3)}
    return graph_of(IMAGE, nodes, "z" if direct else "y z", **weights)


def attention() -> Graph:
    """Heads split and joined by Reshape and Transpose, from one product."""
    shapes = {"x": (2, 5, 12)}
    nodes = [node("Linear", "x w b", "qkv"), node("Split", "qkv", "q k v", axis=2, num_outputs=3)]
    for name, perm in (("q", (0, 2, 1, 3)), ("k", (0, 2, 3, 1)), ("v", (0, 2, 1, 3))):
        nodes += [node("Reshape", f"{name} heads", f"{name}r"), node("Transpose", f"{name}r", f"{name}t", perm=perm)]
    nodes += [
        node("MatMul", "qt kt", "s"),
        node("Softmax", "s", "p", axis=-1),
        node("MatMul", "p vt", "o"),
        node("Transpose", "o", "ot", perm=(0, 2, 1, 3)),
        node("Reshape", "ot joined", "y"),
    ]
    constants = {"w": f32(12, 36), "b": f32(36), "heads": np.array([0, 0, 3, 4]), "joined": np.array([0, 0, 12])}
    return graph_of(shapes, nodes, "y", **constants)


CASES: dict[str, Any] = {
    "conv": lambda: conv_case(CONV, f32(10, 6, 3, 3)),
    "conv stride dilation": lambda: conv_case({"strides": (2, 1), "dilations": (1, 2)}, f32(10, 6, 3, 3), bias=False),
    "conv groups": lambda: conv_case({"group": 3, "auto_pad": "SAME_UPPER", "strides": (2, 2)}, f32(9, 2, 3, 3)),
    "conv depthwise": lambda: conv_case(CONV | {"group": 6}, f32(6, 1, 3, 3)),
    "conv activations": lambda: conv_case(
        CONV, f32(10, 6, 3, 3),
        fused=[Fused("Clip", {"min": -1.0, "max": 2.0}), Fused("HardSwish"), Fused("LeakyRelu", {"alpha": 0.2})],
    ),
    "conv1d": lambda: graph_of({"x": (2, 6, 20)}, [node("Conv", "x w b", "y", strides=(2,), pads=(1, 2))], "y",
                               w=f32(8, 6, 3), b=f32(8)),
    "conv fused sum": lambda: after_conv(
        node("Conv", "c v c", "y", [Fused("Add", operand=2), Fused("Relu")], **CONV), v=f32(10, 10, 3, 3)),
    "conv fused vectors": lambda: after_conv(
        node("Conv", "c v p q", "y", [Fused("Mul", operand=2), Fused("Add", operand=3)], **CONV),
        v=f32(10, 10, 3, 3), p=f32(10), q=f32(10, 1, 1)),
    "conv fused constant": lambda: after_conv(
        node("Conv", "c v k", "y", [Fused("Add", operand=2)], **CONV), v=f32(10, 10, 3, 3), k=f32(2, 10, 9, 8)),
    "linear": lambda: graph_of({"x": (2, 5, 12)}, [node("Linear", "x w b", "y", [Fused("Gelu")])], "y",
                               w=f32(12, 7), b=f32(7)),
    "gemm": lambda: graph_of({"x": (4, 12)}, [node("Gemm", "x w b", "y", transB=1)], "y", w=f32(7, 12), b=f32(1, 7)),
    "matmul": lambda: graph_of({"x": (3, 1, 5, 8), "z": (2, 8, 6)}, [node("MatMul", "x z", "y")], "y"),
    "matmul constant": lambda: graph_of({"x": (3, 5, 8)}, [node("MatMul", "x w", "y")], "y", w=f32(8, 6)),
    "attention": attention,
    "maxpool": lambda: simple("MaxPool", kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 0, 0)),
    "maxpool ceil": lambda: simple("MaxPool", kernel_shape=(3, 2), strides=(2, 3), ceil_mode=1),
    "avgpool": lambda: simple("AveragePool", kernel_shape=(3, 3), strides=(2, 2), pads=(1, 1, 1, 1)),
    "avgpool include": lambda: simple("AveragePool", kernel_shape=(3, 3), pads=(1, 1, 1, 1), count_include_pad=1),
    "avgpool ceil": lambda: simple("AveragePool", kernel_shape=(2, 2), strides=(3, 3), ceil_mode=1),
    "global average": lambda: simple("GlobalAveragePool"),
    "add": lambda: simple("Add", {"x": (2, 3, 4), "z": (2, 3, 4)}),
    "sub": lambda: simple("Sub", {"x": (2, 3, 4), "z": (2, 3, 4)}),
    "max of three": lambda: simple("Max", {"x": (2, 4), "z": (2, 4), "u": (2, 4)}),
    "twice the same": lambda: graph_of(IMAGE, [node("Add", "x x", "y")], "y"),
    "mul scalar": lambda: graph_of(IMAGE, [node("Mul", "x k", "y")], "y", k=np.float32(3)),
    "add vector": lambda: after_conv(node("Add", "c k", "y"), k=f32(10, 1, 1)),
    "mul last": lambda: graph_of({"x": (2, 3, 8)}, [node("Mul", "x k", "y")], "y", k=f32(8)),
    "softmax channels": lambda: after_conv(node("Softmax", "c", "y", axis=1)),
    "reshape of an image": lambda: after_conv(node("Flatten", "c", "y", axis=1)),
    "transpose of an image": lambda: after_conv(node("Transpose", "c", "t", perm=(0, 2, 3, 1)),
                                                node("Reshape", "t s", "y"), s=np.array([0, -1, 5])),
    "slices": lambda: graph_of({"x": (4, 9, 7)}, [node("Slice", "x s e a t", "y")], "y", s=np.array([7, 1]),
                               e=np.array([-100, 100]), a=np.array([1, 2]), t=np.array([-3, 2])),
    "concat": lambda: concat_graph(direct=True),
    "concat with other readers": lambda: concat_graph(direct=False),
    "concat rows": lambda: after_conv(node("Relu", "c", "r"), node("Concat", "c r c", "y", axis=2)),
    "concat last": lambda: graph_of({"x": (2, 3), "z": (2, 5)}, [node("Relu", "x", "r"), node("Linear", "z w", "l"),
                                    node("Concat", "r l", "y", axis=1)], "y", w=f32(5, 4)),
    "concat of concats": lambda: after_conv(
        node("Relu", "c", "r"), node("Conv", "c v", "d", **CONV), node("Conv", "c u", "f", kernel_shape=(1, 1)),
        node("Concat", "d f", "i", axis=1), node("Concat", "i r", "y", axis=1), v=f32(3, 10, 3, 3), u=f32(5, 10, 1, 1)),
    "concat of pools": lambda: after_conv(
        node("MaxPool", "c", "m", kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
        node("AveragePool", "c", "a", kernel_shape=(3, 3), pads=(1, 1, 1, 1)),
        node("Conv", "c v", "d", **CONV), node("Concat", "m d a", "y", axis=1), node("Relu", "y", "z"), outputs="z",
        v=f32(3, 10, 3, 3)),
    "output twice": lambda: graph_of(IMAGE, [node("Relu", "x", "y")], "y y"),
    "input as output": lambda: graph_of(IMAGE, [node("Relu", "x", "y")], "y x"),
    "output read again": lambda: graph_of(IMAGE, [node("Relu", "x", "y"), node("Sigmoid", "y", "z")], "y z"),
}  # fmt: skip


@pytest.mark.parametrize("isa", [None, "reference"])
@pytest.mark.parametrize("name", CASES)
def test_rules(name: str, isa: str | None) -> None:
    net = run(CASES[name](), isa)
    if isa is None and HERE:
        explained = net.explain()
        assert not explained.numpy_steps
        assert explained.native_calls == 1


def test_a_concat_is_written_in_place() -> None:
    graph = concat_graph(direct=True)
    lowered = lower(specialize(graph, {}))
    assert [s.op for s in lowered.steps] == ["Convert", "Conv", "Conv", "Conv", "Relu", "Convert"]
    slices = [s.outputs[0] for s in lowered.steps[2:4]]
    assert slices[0].buffer == slices[1].buffer
    assert {p.offset for p in slices} == {0, 80}


def test_a_residual_sum_takes_the_place_of_its_operand() -> None:
    graph = CASES["conv fused sum"]()
    lowered = lower(specialize(graph, {}))
    assert lay_out(lowered).arena > 0
    nodes = [
        node("Conv", "x w", "c", kernel_shape=(1, 1)),
        node("Conv", "c v", "d", **CONV),
        node("Conv", "d v c", "y", [Fused("Add", operand=2)], **CONV),
        node("Relu", "y", "z"),
        node("MaxPool", "z", "m", kernel_shape=(2, 2)),
    ]
    graph = graph_of(IMAGE, nodes, "m", w=f32(10, 6, 1, 1), v=f32(10, 10, 3, 3))
    lowered = lower(specialize(graph, {}))
    homes = lay_out(lowered).homes
    at = {s.node: homes[s.outputs[0].buffer] for s in lowered.steps}
    assert at["n_c"] == at["n_y"] == at["n_z"] != at["n_d"]
    run(graph)


def quantized(names: str) -> dict[str, ValueQuant]:
    return {name: ValueQuant("u8", 0.05 * (i + 1), 100 + i) for i, name in enumerate(names.split())}


def s8(*shape: int) -> QWeight:
    values = RNG.integers(-127, 128, shape).astype(np.int8)
    scale = RNG.uniform(0.001, 0.004, shape[0]).astype(np.float32)
    return QWeight(values, scale, np.zeros(shape[0], np.int32), 0)


@pytest.mark.parametrize("isa", [None, "avx2", "reference"])
def test_an_int8_network_is_its_operators_one_by_one(isa: str | None) -> None:
    weights = {"w": s8(8, 6, 1, 1), "u": s8(8, 8, 3, 3), "t": s8(8, 8, 1, 1), "b": f32(8)}
    nodes = [
        node("Conv", "x w b", "a", [Fused("Relu")], kernel_shape=(1, 1)),
        node("MaxPool", "a", "m", kernel_shape=(3, 3), strides=(1, 1), pads=(1, 1, 1, 1)),
        node("Conv", "m u a", "c", [Fused("Add", operand=2), Fused("Relu")], **CONV),
        node("Conv", "c t", "d", kernel_shape=(1, 1)),
        node("Add", "c d", "s"),
        node("GlobalAveragePool", "s", "g"),
        node("Conv", "g t", "y", kernel_shape=(1, 1)),
    ]
    graph = graph_of(IMAGE, nodes, "y", **weights)
    graph.nodes = [Node(n.name, n.op, n.inputs, n.outputs, n.attrs, n.fused, "int8") for n in nodes]
    q = graph.quant = quantized("x a m c d s g")
    q["m"] = q["a"]
    x = f32(2, 6, 9, 8)
    y = Network(graph, isa=isa)(x)

    def layer(x: Any, name: str, src: str, dst: str | None, padding: int = 0, **more: Any) -> Any:
        w = weights[name]
        out = {} if dst is None else {"y_scale": q[dst].scale, "y_zero_point": q[dst].zero_point}
        return v.conv_int8(
            x, w.values, x_scale=q[src].scale, x_zero_point=q[src].zero_point, w_scale=w.scale, padding=padding,
            out_dtype=np.float32 if dst is None else np.uint8, **out, **more,
        )  # fmt: skip

    first = v.convert(x, np.uint8, y_scale=q["x"].scale, y_zero_point=q["x"].zero_point, layout=("NCHW", "NHWC"))
    a = layer(first, "w", "x", "a", bias=weights["b"], post_ops=(v.ReLU(),))
    m = v.max_pool2d(a, 3, stride=1, padding=1)
    residual = v.Sum(q["a"].scale, q["a"].zero_point, tensor=a)
    c = layer(m, "u", "a", "c", padding=1, post_ops=(residual, v.ReLU()))
    d = layer(c, "t", "c", "d")
    pair = {"scales": [q[n].scale for n in "cd"], "zero_points": [q[n].zero_point for n in "cd"]}
    s = v.sum_tensors((c, d), np.uint8, **pair, y_scale=q["s"].scale, y_zero_point=q["s"].zero_point)
    g = v.global_avg_pool2d(
        s, x_scale=q["s"].scale, x_zero_point=q["s"].zero_point, y_scale=q["g"].scale, y_zero_point=q["g"].zero_point,
    )  # fmt: skip
    np.testing.assert_array_equal(y, layer(g, "t", "g", None).transpose(0, 3, 1, 2))


@pytest.mark.parametrize("isa", [None, "avx512", "reference"])
def test_a_bf16_network_is_near(isa: str | None) -> None:
    if isa is not None and isa not in v.tiers():
        pytest.skip(f"no {isa} here")
    graph = concat_graph(direct=True)
    graph.nodes = [Node(n.name, n.op, n.inputs, n.outputs, n.attrs, n.fused, "bf16") for n in graph.nodes]
    x = f32(2, 6, 9, 8)
    net = Network(graph, isa=isa)
    want = run_reference(graph, {"x": x})["z"]
    y = net(x)
    assert y.dtype == np.float32
    np.testing.assert_allclose(y, want, rtol=0.05, atol=0.02 * np.abs(want).max())
    assert any("bf16" in s.output for s in net.explain().steps)


def test_numpy_steps_lie_between_native_segments() -> None:
    graph = after_conv(
        node("CumSum", "c k", "s"), node("Conv", "s v", "y", kernel_shape=(1, 1)), k=np.int64(2), v=f32(5, 10, 1, 1)
    )
    explained = run(graph).explain()
    numpy_steps = [s for s in explained.numpy_steps if s.op == "CumSum"]
    assert [s.reason for s in numpy_steps] == ["no kernel for CumSum"]
    if HERE:
        assert explained.native_calls == 2
        assert len(explained.numpy_steps) == 1
    assert "n_s (CumSum): no kernel" in str(explained)


def test_shapes_that_depend_on_values() -> None:
    graph = graph_of(
        {"x": (3, 7)}, [node("Relu", "x", "r"), node("NonZero", "r", "n"), node("Cast", "n", "f", to=1)], "f r"
    )
    net = Network(graph)
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((3, 7)).astype(np.float32)
        found, relu = net(x)
        np.testing.assert_array_equal(found, np.array(np.nonzero(x > 0), np.float32))
        np.testing.assert_array_equal(relu, np.maximum(x, 0))


@pytest.mark.parametrize("index", [0, 49, 50, -51])
def test_a_bad_index_is_an_error_and_no_harm(index: int) -> None:
    nodes = [node("Gather", "table x", "y", axis=0)]
    graph = Graph("g", {"x": TensorType("s64", (2,))}, ("y",), nodes, {"table": f32(50, 4)})
    infer(graph)
    net = Network(graph)
    good = np.array([1, 2])
    want = net(good)
    if -50 <= index < 50:
        net(np.array([3, index]))
    else:
        with pytest.raises(v.VnnigenError):
            net(np.array([3, index]))
    np.testing.assert_array_equal(net(good), want)


def test_weights_are_not_copied_twice() -> None:
    """A network's operators read the graph's own arrays."""
    graph = conv_case(CONV, f32(10, 6, 3, 3))
    net = run(graph)
    (op,) = net._operators.values()
    assert np.shares_memory(op._weights.values, graph.constants["w"])


@pytest.mark.skipif(not HERE, reason="no kernels here")
@pytest.mark.parametrize(("size", "split"), [(4, False), (64, True)])
def test_only_steps_of_some_size_are_split(size: int, split: bool) -> None:
    shape = {"x": (1, 6, size, size)}
    graph = graph_of(shape, [node("Conv", "x w", "y", **CONV)], "y", w=f32(32, 6, 3, 3))
    lowered = lower(specialize(graph, {}))
    assert (step_threads(lowered.steps[1]) > 1) == split
