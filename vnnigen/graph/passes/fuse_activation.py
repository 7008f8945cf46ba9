"""Activations become steps of the node whose result they are applied to."""

from __future__ import annotations

import math

import numpy as np

from vnnigen.graph.attributes import float_attr, str_attr
from vnnigen.graph.ir import Fused, Graph, Node
from vnnigen.graph.passes.channels import output_channels
from vnnigen.graph.passes.edit import HOSTS, WEIGHTED, Edit, is_f32, plain, scalar


def fuse_activation(graph: Graph) -> int:
    """Fuse activations into the node before them, if nobody else reads its result."""
    edit = Edit(graph)
    for node in edit:
        host = edit.maker(node.inputs[0]) if node.inputs and len(node.outputs) == 1 else None
        if host is None or host.op not in HOSTS or not is_f32(graph, node.output):
            continue
        if node.op == "HardSigmoid":
            _hard_sigmoid(edit, node, host)
        elif (step := activation_step(graph, node)) is not None:
            edit.absorb(node, host, [step])
    return edit.finish()


def activation_step(graph: Graph, node: Node) -> Fused | None:
    """The step that a node is, None if it is no activation that kernels have."""
    if node.op in ("Relu", "HardSwish", "Sigmoid", "Tanh", "Silu"):
        return Fused(node.op)
    if node.op == "LeakyRelu":
        return _leaky(float_attr(node, "alpha", 0.01))
    if node.op == "Gelu":
        return Fused("Gelu", {"approximate": str_attr(node, "approximate", "none")})
    if node.op == "Clip":
        return _clip(graph, node)
    slopes = plain(graph, node.inputs[1]) if node.op == "PRelu" else None
    if slopes is None or not slopes.size or (slopes != slopes.flat[0]).any():
        return None
    return _leaky(float(slopes.flat[0]))


def _leaky(alpha: float) -> Fused | None:
    return Fused("LeakyRelu", {"alpha": alpha}) if math.isfinite(alpha) else None


def _clip(graph: Graph, node: Node) -> Fused | None:
    bounds = [-math.inf, math.inf]
    for i, name in enumerate(node.inputs[1:3]):
        if name:
            value = scalar(graph, name)
            if value is None or math.isnan(value):
                return None
            bounds[i] = value
    low, high = bounds
    if low > high or low == math.inf or high == -math.inf:
        return None
    return Fused("Relu") if (low, high) == (0, math.inf) else Fused("Clip", {"min": low, "max": high})


def _hard_sigmoid(edit: Edit, node: Node, host: Node) -> None:
    """clip(alpha * x + beta, 0, 1), rounded as the node itself rounds it."""
    channels = output_channels(edit.graph, host) if host.op in WEIGHTED else 1
    if channels is None:
        return
    attrs = {"alpha": float_attr(node, "alpha", 0.2), "beta": float_attr(node, "beta", 0.5)}
    names = [edit.constant(f"{node.name}_{key}", np.full(channels, value)) for key, value in attrs.items()]
    steps = [Fused("Mul", operand=-1), Fused("Add", operand=-1), Fused("Clip", {"min": 0.0, "max": 1.0})]
    edit.absorb(node, host, steps, names)
