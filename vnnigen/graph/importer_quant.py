"""QOperator forms as DequantizeLinear -> operator -> QuantizeLinear, so that one form of quantized model is left.

QLinearConv and QLinearMatMul are ONNX's; the rest is what ONNX Runtime's quantizer emits in com.microsoft
(its docs/ContribOperators.md defines them). A bias in s32 has the scale x_scale * w_scale and no zero point.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from vnnigen.graph.attributes import float_attr, int_attr, node_error
from vnnigen.graph.importer_builder import Builder, Normaliser, optional, required, without
from vnnigen.graph.ir import Attr, Node


def dequantized(b: Builder, node: Node, quantized: Sequence[str], axis: int | None = None) -> str:
    """The real numbers that (values, scale, zero point) stand for. One element of any rank scales the whole tensor."""
    x, scale, zero_point = quantized
    scale, zero_point = (_scalar(b, node, name) for name in (scale, zero_point))
    per_axis = scale not in b.constants or b.constants[scale].ndim
    return b.emit(node, "DequantizeLinear", [x, scale, zero_point], {"axis": axis if per_axis else None})


def quantize(b: Builder, node: Node, x: str, scale: str, zero_point: str) -> None:
    """The output of `node`, quantized."""
    scale, zero_point = (_scalar(b, node, name) for name in (scale, zero_point))
    b.emit(node, "QuantizeLinear", [x, scale, zero_point], output=node.output)


def _scalar(b: Builder, node: Node, name: str) -> str:
    array = b.constants.get(name)
    if array is None or array.size != 1 or array.ndim == 0:
        return name
    return b.constant(array.reshape(()), f"{name}_scalar")


def product(b: Builder, node: Node, first: str, second: str) -> str:
    """The product of two scales: a constant if both are."""
    a, c = b.constants.get(first), b.constants.get(second)
    if a is None or c is None:
        return b.emit(node, "Mul", [first, second])
    if a.dtype != np.float32 or c.dtype != np.float32 or (a.size != 1 and c.size != 1):
        raise node_error(node, "has scales that do not fit each other")
    return b.constant(np.multiply(a, c, dtype=np.float32).reshape(-1), f"{node.name}_bias_scale")


def qlinear_conv(b: Builder, node: Node) -> None:
    """x, x_scale, x_zp, w, w_scale, w_zp, y_scale, y_zp, [bias]."""
    required(node, 8, 9)
    if int_attr(node, "channels_last", 0):
        raise node_error(node, "channels_last is not supported")
    x, x_scale, x_zp, w, w_scale, w_zp, y_scale, y_zp = node.inputs[:8]
    inputs = [dequantized(b, node, (x, x_scale, x_zp)), dequantized(b, node, (w, w_scale, w_zp), axis=0)]
    if bias := optional(node, 8):
        inputs.append(dequantized(b, node, (bias, product(b, node, x_scale, w_scale), ""), axis=0))
    y = b.emit(node, "Conv", inputs, without(node, "channels_last"))
    quantize(b, node, y, y_scale, y_zp)


def qlinear_matmul(b: Builder, node: Node) -> None:
    """a, a_scale, a_zp, b, b_scale, b_zp, y_scale, y_zp; a per row, b per column or both per tensor."""
    required(node, 8, 8)
    left = dequantized(b, node, node.inputs[:3], axis=-2)
    right = dequantized(b, node, node.inputs[3:6], axis=-1)
    quantize(b, node, b.emit(node, "MatMul", [left, right]), *node.inputs[6:8])


def qgemm(b: Builder, node: Node) -> None:
    """a, a_scale, a_zp, b, b_scale, b_zp, [c in s32], [y_scale], [y_zp]; without y_scale the result is f32."""
    required(node, 6, 9)
    transposed, alpha = int_attr(node, "transB", 0), float_attr(node, "alpha", 1.0)
    inputs = [
        dequantized(b, node, node.inputs[:3]),
        dequantized(b, node, node.inputs[3:6], axis=0 if transposed else 1),
    ]
    if bias := optional(node, 6):  # its scale is alpha * a_scale * b_scale
        inputs.append(dequantized(b, node, (bias, product(b, node, node.inputs[1], node.inputs[4]), ""), axis=-1))
    attrs: dict[str, Attr | None] = {
        "alpha": alpha, "beta": alpha, "transA": int_attr(node, "transA", 0), "transB": transposed,
    }  # fmt: skip
    if optional(node, 7):
        quantize(b, node, b.emit(node, "Gemm", inputs, attrs), node.inputs[7], optional(node, 8))
    else:
        b.emit(node, "Gemm", inputs, attrs, output=node.output)


def qlinear_binary(op: str) -> Normaliser:
    """a, a_scale, a_zp, b, b_scale, b_zp, y_scale, [y_zp]."""

    def normalise(b: Builder, node: Node) -> None:
        required(node, 7, 8)
        both = [dequantized(b, node, node.inputs[i : i + 3]) for i in (0, 3)]
        quantize(b, node, b.emit(node, op, both), node.inputs[6], optional(node, 7))

    return normalise


def qlinear_unary(op: str) -> Normaliser:
    """x, x_scale, x_zp, y_scale, [y_zp]."""

    def normalise(b: Builder, node: Node) -> None:
        required(node, 4, 5)
        if int_attr(node, "channels_last", 0):
            raise node_error(node, "channels_last is not supported")
        if op == "Softmax" and int_attr(node, "opset", 13) < 13:
            raise node_error(node, "Softmax as before opset 13 is not supported")
        x = dequantized(b, node, node.inputs[:3])
        y = b.emit(node, op, [x], without(node, "channels_last", "opset"))
        quantize(b, node, y, node.inputs[3], optional(node, 4))

    return normalise


def qlinear_concat(b: Builder, node: Node) -> None:
    """y_scale, y_zp, then x, x_scale, x_zp of each input."""
    required(node, 5)
    if len(node.inputs) % 3 != 2:
        raise node_error(node, f"has {len(node.inputs)} inputs, needs 2 + 3 for each that is concatenated")
    parts = [dequantized(b, node, node.inputs[i : i + 3]) for i in range(2, len(node.inputs), 3)]
    joined = b.emit(node, "Concat", parts, {"axis": int_attr(node, "axis", 0)})
    quantize(b, node, joined, *node.inputs[:2])


def matmul_integer_to_float(b: Builder, node: Node) -> None:
    """a, b, a_scale, b_scale, [a_zp], [b_zp], [bias]; exact integers, scaled."""
    required(node, 4, 7)
    _scaled_matmul(b, node, node.inputs[0], node.inputs[1], optional(node, 4), optional(node, 5), node.inputs[2])


def dynamic_quantize_matmul(b: Builder, node: Node) -> None:
    """A in f32, b, b_scale, [b_zp], [bias]."""
    required(node, 3, 5)
    quantized = [b.value(f"{node.name}_{what}") for what in ("a", "a_scale", "a_zero_point")]
    b.add(Node(f"{node.name}_quantize", "DynamicQuantizeLinear", node.inputs[:1], tuple(quantized)))
    arranged = Node(
        node.name, node.op, (quantized[0], node.inputs[1], quantized[1], node.inputs[2], quantized[2],
        optional(node, 3), optional(node, 4)), node.outputs, {}, domain=node.domain,
    )  # fmt: skip
    matmul_integer_to_float(b, arranged)


def _scaled_matmul(b: Builder, node: Node, left: str, right: str, a_zp: str, b_zp: str, a_scale: str) -> None:
    summed = b.emit(node, "MatMulInteger", [left, right, a_zp, b_zp])
    real = b.emit(node, "Cast", [summed], {"to": 1})
    scale = b.emit(node, "Mul", [a_scale, node.inputs[3]])
    bias = optional(node, 6)
    y = b.emit(node, "Mul", [real, scale], output=None if bias else node.output)
    if bias:
        b.emit(node, "Add", [y, bias], output=node.output)


#: ONNX's own.
QUANTIZED_OPERATORS: Mapping[str, Normaliser] = {"QLinearConv": qlinear_conv, "QLinearMatMul": qlinear_matmul}
#: com.microsoft's. QLinearConv there has channels_last, too.
QUANTIZED_CONTRIB: Mapping[str, Normaliser] = {
    "QLinearConv": qlinear_conv,
    "QGemm": qgemm,
    "QLinearAdd": qlinear_binary("Add"),
    "QLinearMul": qlinear_binary("Mul"),
    "QLinearConcat": qlinear_concat,
    "QLinearGlobalAveragePool": qlinear_unary("GlobalAveragePool"),
    "QLinearAveragePool": qlinear_unary("AveragePool"),
    "QLinearLeakyRelu": qlinear_unary("LeakyRelu"),
    "QLinearSigmoid": qlinear_unary("Sigmoid"),
    "QLinearSoftmax": qlinear_unary("Softmax"),
    "MatMulIntegerToFloat": matmul_integer_to_float,
    "DynamicQuantizeMatMul": dynamic_quantize_matmul,
}
