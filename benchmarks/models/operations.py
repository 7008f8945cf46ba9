"""How much arithmetic a model has: multiplications and additions of its convolutions and matrix products."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import onnx
from onnx import shape_inference

Shape = tuple[int, ...]


def operations(model: onnx.ModelProto) -> int:
    """Count the operations of a model with a fixed batch; taps on the padding count, as is usual."""
    shapes = _shapes(shape_inference.infer_shapes(model, strict_mode=True, data_prop=True).graph)
    return sum(_COUNTS[node.op_type](node, shapes) for node in model.graph.node if node.op_type in _COUNTS)


def _shapes(graph: onnx.GraphProto) -> dict[str, Shape]:
    known = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        known.setdefault(value.name, tuple(dim.dim_value for dim in value.type.tensor_type.shape.dim))
    return known


def _conv(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    return 2 * math.prod(shapes[node.output[0]]) * math.prod(shapes[node.input[1]][1:])


def _product(node: onnx.NodeProto, shapes: Mapping[str, Shape]) -> int:
    """[..., m, k] by [..., k, n]; only Gemm may transpose its first operand."""
    transposed = any(a.name == "transA" and a.i for a in node.attribute)
    return 2 * math.prod(shapes[node.output[0]]) * shapes[node.input[0]][-2 if transposed else -1]


_COUNTS: dict[str, Callable[[onnx.NodeProto, Mapping[str, Shape]], int]] = {
    "Conv": _conv, "Gemm": _product, "MatMul": _product,
}  # fmt: skip
