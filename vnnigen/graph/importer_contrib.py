"""com.microsoft's fused operators, which ONNX Runtime's optimizer writes into models, as ONNX's own.

Their definitions are in ONNX Runtime's docs/ContribOperators.md. They are written out rather than kept, since our own
passes fuse what our kernels can fuse.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vnnigen.graph.attributes import float_attr, int_attr, node_error, str_attr
from vnnigen.graph.importer_builder import Builder, Normaliser, optional, required, without
from vnnigen.graph.importer_quant import QUANTIZED_CONTRIB
from vnnigen.graph.ir import Attr, Node


def as_onnx(least: int, most: int) -> Normaliser:
    """An operator that ONNX has under the same name, with the same meaning."""

    def normalise(b: Builder, node: Node) -> None:
        required(node, least, most)
        b.add(replace(node, domain=""))

    return normalise


# The parameters of activations in FusedConv and FusedGemm.
_ACTIVATIONS: Mapping[str, tuple[str, ...]] = {
    "Relu": (), "Sigmoid": (), "Tanh": (), "LeakyRelu": ("alpha",), "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}  # fmt: skip


def activated(b: Builder, node: Node, x: str, params: tuple[float, ...]) -> None:
    """The output of `node`: its attribute `activation` applied to `x`."""
    op = str_attr(node, "activation", "")
    if op not in _ACTIVATIONS or (params and len(params) != len(_ACTIVATIONS[op])):
        raise node_error(node, f"its activation {op!r} with parameters {params} is not supported")
    if op == "Clip":
        bounds = [b.constant(np.float32(p), f"{node.name}_bound") for p in params]
        b.emit(node, op, [x, *bounds], output=node.output)
    else:
        b.emit(node, op, [x], dict(zip(_ACTIVATIONS[op], params, strict=False)), output=node.output)


def floats(node: Node, key: str) -> tuple[float, ...]:
    """An attribute that is a list of numbers."""
    value = node.attrs.get(key, ())
    if not isinstance(value, tuple):
        raise node_error(node, f"attribute {key!r} is no list of numbers")
    numbers = tuple(v for v in value if isinstance(v, float))
    if len(numbers) != len(value):
        raise node_error(node, f"attribute {key!r} is no list of numbers")
    return numbers


def fused_conv(b: Builder, node: Node) -> None:
    """X, W, [B], [Z that is added]; then an activation."""
    required(node, 2, 4)
    y = b.emit(node, "Conv", node.inputs[:3], without(node, "activation", "activation_params"))
    if added := optional(node, 3):
        y = b.emit(node, "Add", [y, added])
    activated(b, node, y, floats(node, "activation_params"))


def fused_gemm(b: Builder, node: Node) -> None:
    """A, B, C; then an activation."""
    required(node, 2, 3)
    keys = ("activation", "activation_alpha", "activation_beta", "activation_gamma")
    y = b.emit(node, "Gemm", node.inputs, without(node, *keys))
    given = tuple(float_attr(node, key, 0.0) for key in keys[1:] if key in node.attrs)
    activated(b, node, y, given[: len(_ACTIVATIONS.get(str_attr(node, "activation", ""), ()))])


def fused_matmul(b: Builder, node: Node) -> None:
    """A, B, either with its last two dimensions exchanged, times alpha."""
    required(node, 2, 2)
    if int_attr(node, "transBatchA", 0) or int_attr(node, "transBatchB", 0):
        raise node_error(node, "transBatchA and transBatchB are not supported")
    flips, alpha = (int_attr(node, "transA", 0), int_attr(node, "transB", 0)), float_attr(node, "alpha", 1.0)
    # The rank is not known here, so Einsum says it; constants are transposed at once.
    left, right = node.inputs
    if flips[1] and right in b.constants and b.constants[right].ndim >= 2:
        right, flips = b.constant(np.swapaxes(b.constants[right], -1, -2), f"{right}_transposed"), (flips[0], 0)
    last = None if alpha != 1.0 else node.output
    if any(flips):
        equation = f"...{'ki' if flips[0] else 'ik'},...{'jk' if flips[1] else 'kj'}->...ij"
        y = b.emit(node, "Einsum", [left, right], {"equation": equation}, output=last)
    else:
        y = b.emit(node, "MatMul", [left, right], output=last)
    if alpha != 1.0:
        b.emit(node, "Mul", [y, b.constant(np.float32(alpha), f"{node.name}_alpha")], output=node.output)


def gelu(approximate: str) -> Normaliser:
    """x, [bias that is added before]."""

    def normalise(b: Builder, node: Node) -> None:
        required(node, 1, 2)
        x = b.emit(node, "Add", node.inputs) if optional(node, 1) else node.inputs[0]
        b.emit(node, "Gelu", [x], {"approximate": approximate}, output=node.output)

    return normalise


def quick_gelu(b: Builder, node: Node) -> None:
    """Gate by a sigmoid: x * sigmoid(alpha * x)."""
    required(node, 1, 1)
    alpha = b.constant(np.float32(float_attr(node, "alpha", 1.702)), f"{node.name}_alpha")
    gate = b.emit(node, "Sigmoid", [b.emit(node, "Mul", [node.inputs[0], alpha])])
    b.emit(node, "Mul", [node.inputs[0], gate], output=node.output)


def skip_layer_normalization(b: Builder, node: Node) -> None:
    """input, skip, gamma, [beta], [bias]: LayerNormalization(input + skip + bias); output 3 is that sum."""
    required(node, 3, 5)
    if any(name in b.read for name in node.outputs[1:3] if name):
        raise node_error(node, "its mean and deviation are read, which is not supported")
    wanted = node.outputs[3] if len(node.outputs) > 3 and node.outputs[3] else None
    bias = optional(node, 4)
    total = b.emit(node, "Add", node.inputs[:2], output=None if bias else wanted)
    if bias:
        total = b.emit(node, "Add", [total, bias], output=wanted)
    attrs: dict[str, Attr | None] = {"axis": -1, "epsilon": float_attr(node, "epsilon", 1e-12)}
    b.emit(node, "LayerNormalization", [total, node.inputs[2], optional(node, 3)], attrs, output=node.outputs[0])


#: Operators of com.microsoft.
CONTRIB_OPERATORS: Mapping[str, Normaliser] = {
    **QUANTIZED_CONTRIB,
    "QuantizeLinear": as_onnx(2, 3),
    "DequantizeLinear": as_onnx(2, 3),
    "FusedConv": fused_conv,
    "FusedGemm": fused_gemm,
    "FusedMatMul": fused_matmul,
    "TransposeMatMul": fused_matmul,
    "Gelu": gelu("none"),
    "BiasGelu": gelu("none"),
    "FastGelu": gelu("tanh"),
    "QuickGelu": quick_gelu,
    "SkipLayerNormalization": skip_layer_normalization,
}
