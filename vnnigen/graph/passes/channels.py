"""Constants per channel beside a node's result, and folding them into the node's weights (in f64, rounded once)."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from vnnigen.graph.attributes import int_attr
from vnnigen.graph.ir import Graph, Node
from vnnigen.graph.passes.edit import F64, WEIGHTED, Edit, f32_constant, rank


class Affine(NamedTuple):
    """`x * factor + offset`, arrays of one shape."""

    factor: F64
    offset: F64


def output_channels(graph: Graph, node: Node) -> int | None:
    """How many channels the result of a node with weights has; None if the weights are not constant."""
    shape = graph.shape(node.inputs[1]) if node.op in WEIGHTED and node.inputs[1] in graph.constants else None
    if shape is None:
        return None
    return {"Conv": shape[0], "Linear": shape[-1]}.get(node.op, shape[1] * int_attr(node, "group", 1))


def channel_values(graph: Graph, node: Node, name: str) -> F64 | None:
    """The f32 constant `name` as a vector, if beside a weighted node's result it holds one value per channel."""
    values, channels = f32_constant(graph, name), output_channels(graph, node)
    if values is None or channels is None:
        return None
    dims = rank(graph, node.inputs[1]) if node.op != "Linear" else rank(graph, node.output)
    if dims is None or values.ndim > dims:
        return None
    if values.size == 1:
        return np.full(channels, values.reshape(()))
    shape = [1] * dims
    shape[-1 if node.op == "Linear" else 1] = channels
    return values.reshape(-1) if (1,) * (dims - values.ndim) + values.shape == tuple(shape) else None


def affine_of(op: str, values: F64, *, first: bool) -> Affine | None:
    """What Add, Sub, Mul or Div with constants does; `first` says that they stand on the left. None for c / x."""
    one, zero = np.ones_like(values), np.zeros_like(values)
    if op in ("Add", "Sub"):
        sign = -1.0 if op == "Sub" else 1.0
        return Affine(sign * one, values) if first else Affine(one, sign * values)
    if op == "Mul":
        return Affine(values, zero)
    return Affine(1 / values, zero) if op == "Div" and not first and values.all() else None


def _finite(*arrays: F64) -> bool:
    with np.errstate(over="ignore"):
        return all(bool(np.isfinite(a.astype(np.float32)).all()) for a in arrays)


def _with_weights(edit: Edit, host: Node, weights: F64 | None, bias: F64) -> Node | None:
    """The node with other constants (`weights` None keeps those it has); None if they overflow f32."""
    if not _finite(bias) or (weights is not None and not _finite(weights)):
        return None
    w = host.inputs[1]
    if weights is not None:
        w = edit.constant(f"{w.removesuffix('_folded')}_folded", weights)
    old = host.inputs[2] if len(host.inputs) > 2 else ""
    b = edit.constant(f"{old.removesuffix('_folded')}_folded" if old else f"{host.name}_bias", bias)
    return replace(host, inputs=(host.inputs[0], w, b, *host.inputs[3:]))


def bias_of(graph: Graph, host: Node, channels: int) -> F64 | None:
    """The bias of a weighted node, zeros if it has none; None if it is not constant."""
    if len(host.inputs) < 3 or host.inputs[2] == "":
        return np.zeros(channels)
    return f32_constant(graph, host.inputs[2])


def fold_after(edit: Edit, host: Node, after: Affine) -> Node | None:
    """A weighted node that computes `host * factor + offset`, of vectors; None if its weights are not to be changed."""
    graph, channels = edit.graph, after.factor.size
    bias = bias_of(graph, host, channels)
    if bias is None or host.fused:
        return None
    if (after.factor == 1).all():  # also for quantized weights
        return _with_weights(edit, host, None, bias + after.offset)
    weights = f32_constant(graph, host.inputs[1])
    if weights is None:
        return None
    if host.op == "Linear":
        weights = weights * after.factor
    elif host.op == "Conv":
        weights = weights * after.factor.reshape(-1, *[1] * (weights.ndim - 1))
    else:  # ConvTranspose: [groups * inputs, outputs, ...] with the factors of each group's outputs
        groups = int_attr(host, "group", 1)
        split = weights.reshape(groups, -1, *weights.shape[1:])
        weights = (split * after.factor.reshape(groups, 1, -1, *[1] * (weights.ndim - 2))).reshape(weights.shape)
    return _with_weights(edit, host, weights, bias * after.factor + after.offset)


def fold_before(edit: Edit, host: Node, before: Affine) -> Node | None:
    """A Conv or Linear node that computes `host(x * factor + offset)`, vectors over its input's channels.

    None if its weights are not to be changed. The caller sees to it that no padding gets the offset.
    """
    graph, channels = edit.graph, output_channels(edit.graph, host)
    weights = f32_constant(graph, host.inputs[1])
    if weights is None or channels is None:
        return None
    bias = bias_of(graph, host, channels)
    if bias is None:
        return None
    if host.op == "Linear":
        new, extra = weights * before.factor[:, None], before.offset @ weights
    else:
        groups = int_attr(host, "group", 1)

        def per_input(values: F64) -> F64:
            """One value per input channel, for each of the outputs of its group."""
            spread: F64 = np.repeat(values.reshape(groups, -1), channels // groups, axis=0)
            return spread.reshape(*spread.shape, *[1] * (weights.ndim - 2))

        new = weights * per_input(before.factor)
        extra = (weights * per_input(before.offset)).reshape(channels, -1).sum(axis=1)
    return _with_weights(edit, host, new, bias + extra)
