"""Rules of types: names of lengths, contradictions, bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vnnigen.errors import ModelError
from vnnigen.graph.evaluate import evaluate
from vnnigen.graph.evaluate_base import EVALUATORS
from vnnigen.graph.infer import infer, shape_rule
from vnnigen.graph.infer_base import RULES
from vnnigen.graph.ir import Array, Attr, Dim, ElemType, Fused, Graph, Node, TensorType

F32 = np.float32


def one(
    op: str, *inputs: tuple[Dim, ...] | Array | None, outputs: int = 1, dtype: ElemType = "f32",
    fused: tuple[Fused, ...] = (), **attrs: Attr,
) -> Graph:  # fmt: skip
    """A graph of one node named "n": shapes are inputs of the graph, arrays constants, None is left out."""
    names = ["" if x is None else f"x{i}" for i, x in enumerate(inputs)]
    shapes = {n: TensorType(dtype, x) for n, x in zip(names, inputs, strict=True) if isinstance(x, tuple)}
    constants = {n: x for n, x in zip(names, inputs, strict=True) if isinstance(x, np.ndarray)}
    made = tuple(f"y{i}" for i in range(outputs))
    return Graph("g", shapes, made, [Node("n", op, tuple(names), made, attrs, fused)], dict(constants))


def told(graph: Graph) -> list[tuple[Dim, ...] | None]:
    infer(graph)
    return [graph.types[name].shape for name in graph.outputs]


def weights(*shape: int) -> Array:
    return np.ones(shape, F32)


def ints(*values: int) -> Array:
    return np.array(values, np.int64)


NAMED: list[tuple[Graph, Sequence[Dim] | None]] = [
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), strides=(2, 2)), ("N", 4, 3, 3)),
    (one("Conv", ("N", 3, "H", "W"), weights(4, 3, 3, 3), pads=(1, 1, 1, 1)), ("N", 4, "H", "W")),
    (one("Conv", ("N", 3, "H", 8), weights(4, 3, 3, 3)), ("N", 4, "y0.2", 6)),
    (one("Conv", ("N", 3, 9), weights(4, 3, 3)), ("N", 4, 7)),
    (one("Conv", ("N", 3, 9, 9), weights(4, 3, 3, 3), auto_pad="SAME_UPPER", strides=(2, 2)), ("N", 4, 5, 5)),
    (one("MaxPool", ("N", 3, 9, 9), kernel_shape=(2, 2), strides=(2, 2), ceil_mode=1), ("N", 3, 5, 5)),
    (one("MaxPool", ("N", 3, 9, 9), kernel_shape=(2, 2), strides=(2, 2)), ("N", 3, 4, 4)),
    (one("ConvTranspose", ("N", 4, 5, 5), weights(4, 2, 2, 2), strides=(2, 2)), ("N", 2, 10, 10)),
    (one("Reshape", ("N", 3, 4), ints(0, -1)), ("N", 12)),
    (one("Reshape", ("N", 3, 4), ints(-1, 12)), ("N", 12)),
    (one("Reshape", ("N", 3, 4), ints(-1, 6)), ("y0.0", 6)),
    (one("Reshape", ("N", "T", 12), ints(0, 0, 3, 4)), ("N", "T", 3, 4)),
    (one("Flatten", ("N", 3, 4)), ("N", 12)),
    (one("Flatten", ("N", "H", 4)), ("N", "y0.1")),
    (one("Add", ("N", 1, 4), (3, 1)), ("N", 3, 4)),
    (one("Add", ("N", 4), ("M", 4)), ("y0.0", 4)),
    (one("Add", ("N", 4), (1, 4)), ("N", 4)),
    (one("MatMul", ("N", "T", 8), weights(8, 5)), ("N", "T", 5)),
    (one("MatMul", ("N", 2, "T", 8), ("N", 2, 8, "T")), ("N", 2, "T", "T")),
    (one("Linear", ("N", "T", 8), weights(8, 5), weights(5)), ("N", "T", 5)),
    (one("Gemm", ("N", 8), weights(5, 8), transB=1), ("N", 5)),
    (one("Slice", ("N", "T", 8), ints(0), ints(2**63 - 1), ints(1)), ("N", "T", 8)),
    (one("Slice", ("N", 8), ints(6), ints(-(2**63)), ints(1), ints(-2)), ("N", 4)),
    (one("Concat", ("N", 3, 4), ("N", 5, 4), axis=1), ("N", 8, 4)),
    (one("Concat", ("N", 3), ("M", 3), axis=0), ("y0.0", 3)),
    (one("Resize", ("N", 3, 4, 4), None, np.array([1, 1, 2, 2], F32)), ("N", 3, 8, 8)),
    (one("Resize", ("N", 3, "H", 4), None, np.array([1, 1, 2, 2], F32)), ("N", 3, "y0.2", 8)),
    (one("Squeeze", ("N", 1, 4), ints(1)), ("N", 4)),
    (one("Squeeze", ("N", 1, 4)), None),
    (one("Einsum", ("N", "T", 8), weights(8, 5), equation="btk,kn->btn"), ("N", "T", 5)),
    (one("ReduceMean", ("N", 3, 4, 4), ints(2, 3), keepdims=0), ("N", 3)),
    (one("LSTM", ("T", "N", 4), weights(1, 12, 4), weights(1, 12, 3), hidden_size=3), ("T", 1, "N", 3)),
    (one("Gather", weights(100, 16), ("N", "T")), ("N", "T", 16)),
    (one("NonMaxSuppression", ("N", 10, 4), ("N", 2, 10)), ("y0.0", 3)),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "shape"), NAMED, ids=lambda v: v.nodes[0].op if isinstance(v, Graph) else None)
def test_lengths_with_names(graph: Graph, shape: tuple[Dim, ...] | None) -> None:
    assert told(graph)[0] == shape


WRONG: list[tuple[Graph, str]] = [
    (one("Conv", ("N", 4, 8, 8), weights(4, 3, 3, 3)), "channels"),
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3)), "weights"),
    (one("Conv", ("N", 4, 8, 8), weights(3, 2, 3, 3), group=2), "groups"),
    (one("Conv", ("N", 3, 2, 2), weights(4, 3, 3, 3)), "does not fit"),
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), weights(5)), "bias"),
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), strides=(0, 1)), "strides"),
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), pads=(1, 1)), "pads"),
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), kernel_shape=(5, 5)), "kernel_shape"),
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), auto_pad="SOME"), "auto_pad"),
    (one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), group="two"), "integer"),
    (one("ConvTranspose", ("N", 3, 8, 8), weights(4, 3, 3, 3)), "channels"),
    (one("MaxPool", ("N", 3, 8, 8), kernel_shape=(2,)), "kernel_shape"),
    (one("Reshape", (2, 3, 4), ints(5, 5)), "24 elements are not 25"),
    (one("Reshape", (2, 3, 4), ints(5, -1)), "cannot become"),
    (one("Reshape", (2, 3, 4), ints(-1, -1)), "a shape of"),
    (one("Add", (2, 3), (2, 4)), "do not broadcast"),
    (one("Add", (2, 3), np.ones(3, np.int32)), "types"),
    (one("MatMul", (2, 3), (4, 5)), "cannot multiply"),
    (one("MatMul", (2, 3, 4), (5, 4, 3)), "do not broadcast"),
    (one("Linear", (2, 3), weights(3, 4), weights(5)), "do not broadcast"),
    (one("Gemm", (2, 3), weights(4, 3)), "cannot multiply"),
    (one("BatchNormalization", (2, 3, 4, 4), *[weights(4)] * 4), "per channel"),
    (one("Concat", (2, 3), (3, 4), axis=1), "dimension 0"),
    (one("Concat", (2, 3), (2, 3), axis=2), "axis 2"),
    (one("Split", (2, 6), ints(2, 3), outputs=2, axis=1), "split"),
    (one("Transpose", (2, 3), perm=(0, 0)), "perm"),
    (one("Squeeze", (2, 3), ints(0)), "not all 1"),
    (one("Gather", weights(10, 4), ints(10)), "indices"),
    (one("Slice", (2, 6), ints(0), ints(2), ints(0), ints(0)), "step"),
    (one("TopK", (2, 6), ints(7), outputs=2), "top 7"),
    (one("Pad", (2, 6), ints(0, -4, 0, -4)), "cuts"),
    (one("ConstantOfShape", ints(2**20, 2**20)), "bytes"),
    (one("Expand", (1, 1), ints(2**20, 2**20)), "bytes"),
    (one("Tile", (1024,), ints(2**30)), "bytes"),
    (one("Expand", (1, 1), ints(-3, 2)), "of shape"),
    (one("Resize", (1, 3, 4, 4), None, np.array([1, 1, np.nan, 1], F32)), "cannot be told"),
    (one("Resize", (1, 3, 4, 4), None, np.array([1, 1, np.inf, 1], F32)), "cannot be told"),
    (one("Range", np.array(0, F32), np.array(np.nan, F32), np.array(1, F32)), "cannot be told"),
    (one("Range", ints(0), ints(2**40), ints(1)), "bytes"),
    (one("Teleport", (2, 3)), "not known"),
    (one("Relu", (2, 3), outputs=2), "outputs"),
    (one("Relu"), "input 0 is missing"),
    (one("Einsum", (2, 3), (4, 5), equation="ij,jk->ik"), "index 'j'"),
]  # fmt: skip


@pytest.mark.parametrize(("graph", "reason"), WRONG, ids=[f"{g.nodes[0].op}-{why}" for g, why in WRONG])
def test_contradictions(graph: Graph, reason: str) -> None:
    with pytest.raises(ModelError, match=reason) as caught:
        infer(graph)
    assert "'n'" in str(caught.value), "the node is named"
    assert graph.nodes[0].op in str(caught.value)


def test_shape_arithmetic_with_names() -> None:
    """What exporters write for `x.view(x.size(0), -1)`: lengths are followed through it."""
    nodes = [
        Node("s", "Shape", ("x",), ("shape",)),
        Node("g", "Gather", ("shape", "zero"), ("batch",)),
        Node("u", "Unsqueeze", ("batch", "axes"), ("first",)),
        Node("c", "Concat", ("first", "rest"), ("target",), {"axis": 0}),
        Node("r", "Reshape", ("x", "target"), ("y",)),
        Node("s2", "Slice", ("shape", "one", "end"), ("tail",)),
        Node("c2", "ConstantOfShape", ("tail",), ("z",)),
    ]
    constants: dict[str, Array] = {
        "zero": np.array(0), "axes": ints(0), "rest": ints(-1), "one": ints(1), "end": ints(4),
    }  # fmt: skip
    graph = Graph("g", {"x": TensorType("f32", ("N", 3, 4, 4))}, ("y", "z"), nodes, dict(constants))
    assert told(graph) == [("N", 48), (3, 4, 4)]


def test_fused_operands_are_not_inputs() -> None:
    graph = one("Conv", ("N", 3, 8, 8), weights(4, 3, 3, 3), None, ("N", 4, 6, 6), fused=(Fused("Add", {}, 3),))
    assert told(graph) == [("N", 4, 6, 6)]


def test_every_rule_can_be_computed() -> None:
    """A rule without an evaluator is left to the onnx package: these, and no others."""
    left = {
        "Attention", "BitShift", "CenterCropPad", "Col2Im", "Compress", "DeformConv", "Det", "Einsum", "GRU",
        "GridSample", "MaxRoiPool", "MaxUnpool", "RNN", "RoiAlign", "RotaryEmbedding", "STFT", "SwiGLU",
        "TensorScatter", "Unique",
    }  # fmt: skip
    assert set(RULES) - set(EVALUATORS) == left
    assert set(EVALUATORS) <= set(RULES)
    assert shape_rule("Teleport") is None


SIZES = st.integers(1, 5)


@given(
    image=st.tuples(st.integers(5, 9), st.integers(5, 9)), kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3), dilation=st.integers(1, 2), pad=st.integers(0, 2), ceil=st.booleans(),
    channels=SIZES, op=st.sampled_from(["Conv", "MaxPool", "AveragePool", "ConvTranspose"]),
)  # fmt: skip
def test_shapes_are_those_computed(
    image: tuple[int, int], kernel: tuple[int, int], stride: int, dilation: int, pad: int, ceil: bool, channels: int,
    op: str,
) -> None:  # fmt: skip
    attrs: Mapping[str, Attr] = {"strides": (stride, stride), "dilations": (dilation,) * 2, "pads": (pad,) * 4}
    inputs: list[Array] = [np.ones((2, channels, *image), F32)]
    if op.startswith("Conv"):
        shape = (3, channels) if op == "Conv" else (channels, 3)
        inputs.append(weights(*shape, *kernel))
    else:
        attrs = {**attrs, "kernel_shape": kernel, "ceil_mode": int(ceil)}
    graph = one(op, (2, channels, *image), *inputs[1:], **attrs)
    try:
        shapes = told(graph)
    except ModelError:
        with pytest.raises(ModelError):
            evaluate(graph.nodes[0], inputs)
        return
    assert [y.shape for y in evaluate(graph.nodes[0], inputs)] == shapes
