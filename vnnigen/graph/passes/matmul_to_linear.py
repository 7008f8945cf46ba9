"""MatMul and Gemm with constant weights become Linear: x[..., k] times w[k, n] plus bias[n]."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from vnnigen.graph.attributes import float_attr, int_attr
from vnnigen.graph.ir import Constant, Graph, Node, QWeight, TensorType
from vnnigen.graph.passes.channels import Affine, channel_values, fold_after
from vnnigen.graph.passes.edit import F64, Edit, f32_constant, rank


def matmul_to_linear(graph: Graph) -> int:
    """Turn MatMul and Gemm with constant weights into Linear; an Add of a constant vector after one is its bias."""
    edit = Edit(graph)
    transposed: dict[tuple[str, float], str] = {}
    for node in edit:
        made = _matmul(edit, node) if node.op == "MatMul" else None
        made = _gemm(edit, node, transposed) if node.op == "Gemm" else made
        if made is not None:
            edit.put(node, made)
        elif node.op == "Add":
            _take_bias(edit, node)
    return edit.finish()


def _matmul(edit: Edit, node: Node) -> Node | None:
    graph, (x, w) = edit.graph, node.inputs[:2]
    weights, x_rank = graph.constants.get(w), rank(graph, x)
    if node.fused or x in graph.constants or x_rank is None or x_rank < 2:
        return None
    if isinstance(weights, QWeight):
        return _linear(node, w) if weights.values.ndim == 2 else None
    if weights is None or weights.dtype != np.float32 or not 2 <= weights.ndim <= x_rank:
        return None
    if weights.size != weights.shape[-2] * weights.shape[-1]:
        return None  # a stack of matrices
    return _linear(node, w if weights.ndim == 2 else edit.constant(w, weights.reshape(weights.shape[-2:])))


def _linear(node: Node, weights: str, bias: str = "") -> Node:
    return Node(node.name, "Linear", (node.inputs[0], weights, bias), node.outputs, {}, node.fused, node.precision)


def _gemm(edit: Edit, node: Node, transposed: dict[tuple[str, float], str]) -> Node | None:
    graph, (x, w) = edit.graph, node.inputs[:2]
    weights = graph.constants.get(w)
    alpha, beta = float_attr(node, "alpha", 1.0), float_attr(node, "beta", 1.0)
    if weights is None or x in graph.constants or int_attr(node, "transA", 0) or node.fused:
        return None
    turn = int_attr(node, "transB", 0) == 1
    shape = graph.shape(w)
    if shape is None or len(shape) != 2 or (isinstance(weights, QWeight) and alpha != 1):
        return None
    if not isinstance(weights, QWeight) and weights.dtype != np.float32:
        return None
    c = node.inputs[2] if len(node.inputs) > 2 else ""
    bias = _gemm_bias(graph, c, shape[0] if turn else shape[1], beta)
    if c and bias is None:
        return None
    if turn or alpha != 1:
        key = (f"{w}.T" if turn else w, alpha)
        if key not in transposed:
            transposed[key] = _store(edit, f"{w}_t" if turn else w, _scaled(weights, alpha, turn=turn))
        w = transposed[key]
    if bias is not None:
        original = f32_constant(graph, c)
        same = original is not None and original.shape == bias.shape and (original == bias).all()
        c = c if same else edit.constant(c, bias)
    return _linear(node, w, c)


def _scaled(weights: Constant, alpha: float, *, turn: bool) -> Constant:
    """The matrix, transposed if `turn`, times alpha (1 for quantized ones)."""
    if isinstance(weights, QWeight):
        axis = weights.axis if weights.axis is None else 1 - weights.axis % 2
        return replace(weights, values=np.ascontiguousarray(weights.values.T), axis=axis)
    scaled = (weights.astype(np.float64) * alpha).astype(np.float32)
    return np.ascontiguousarray(scaled.T if turn else scaled)


def _store(edit: Edit, wish: str, value: Constant) -> str:
    if not isinstance(value, QWeight):
        return edit.constant(wish, value)
    name = edit.new_name(wish)
    edit.graph.constants[name] = value
    edit.graph.types[name] = TensorType("f32", value.values.shape)
    return name


def _gemm_bias(graph: Graph, name: str, n: int, beta: float) -> F64 | None:
    """Give beta * C as a vector; None if there is none, or it is not constant or differs between rows."""
    values = f32_constant(graph, name)
    if values is None or values.size not in (1, n) or (values.ndim and values.shape[-1] != values.size):
        return None
    return np.broadcast_to(values.reshape(-1) * beta, (n,))


def _take_bias(edit: Edit, node: Node) -> None:
    for value, constant in (node.inputs[:2], node.inputs[1::-1]):
        host = edit.maker(value)
        if host is not None and host.op == "Linear":
            offset = channel_values(edit.graph, host, constant)
            new = None if offset is None else fold_after(edit, host, Affine(np.ones_like(offset), offset))
            if new is not None:
                edit.absorb(node, new)
                return
