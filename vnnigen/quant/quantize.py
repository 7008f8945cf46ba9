"""From an f32 graph and a calibration to the same graph with annotations: bytes per value, precisions, s8 weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from vnnigen.errors import QuantizationError
from vnnigen.graph.ir import Graph, Node, QWeight, TensorType, ValueQuant
from vnnigen.kernels import qparams
from vnnigen.kernels.problem import acc_bound
from vnnigen.kernels.types import F32
from vnnigen.quant.calibrate import Calibration
from vnnigen.quant.equalize import equalize
from vnnigen.quant.observers import Range
from vnnigen.quant.policy import WEIGHTED, Decision, Policy, decide
from vnnigen.quant.scheme import QuantConfig


def quantize(graph: Graph, calibration: Calibration, config: QuantConfig) -> Graph:
    """Annotate a copy of `graph` as `config` wants; see `quantize_with_report`."""
    return quantize_with_report(graph, calibration, config)[0]


def quantize_with_report(graph: Graph, calibration: Calibration, config: QuantConfig) -> tuple[Graph, list[Decision]]:
    """Annotate a copy of `graph`: the copy, and what was decided about each node and why.

    Graph.quant gets the values that are stored or read as bytes, Node.precision what each node computes in, and the
    weights of int8 layers become QWeight (s8, symmetric, [-127, 127]). No node is added or removed; with bias
    correction, layers without a bias get one. Layers whose sums could leave s32 stay f32.

    Raises QuantizationError for values that were not calibrated and for overrides that match nothing.
    """
    graph, calibration = equalize(graph, calibration)
    barred: dict[str, str] = {}
    while True:
        policy = decide(graph, config, barred)
        quants = value_quants(policy, calibration, config)
        weights = quantized_weights(graph, policy, config)
        overflowing = overflows(graph, quants, weights)
        if not overflowing:
            break
        barred.update(overflowing)
    made = graph.copy()
    made.quant.update(quants)
    made.nodes = [replace(node, precision=policy.precision(node)) for node in graph]
    if config.bias_correction:
        made.nodes = [_corrected(made, node, weights.get(node.name), calibration) for node in made.nodes]
    _set_weights(made, weights)
    return made, [policy.decisions[node.name] for node in graph]


def value_quants(policy: Policy, calibration: Calibration, config: QuantConfig) -> dict[str, ValueQuant]:
    """The bytes of each value: one scale per group, the smallest that covers the ranges of all its values."""
    found: dict[str, ValueQuant] = {}
    for group in policy.groups:
        ranges = [calibration[name] for name in group]
        covered = Range(min(r.low for r in ranges), max(r.high for r in ranges))
        forced = config.first if policy.first.intersection(group) else "auto"
        quant = config.value_quant(*covered, forced if forced in ("u8", "s8") else None)
        found.update(dict.fromkeys(group, quant))
    return found


def quantize_weights(weights: F32, axis: int | None) -> QWeight:
    """Weights as s8 in [-127, 127] without zero point, with one scale per index of `axis`, or one for all."""
    scale, zero_point = qparams.choose_qparams(weights, dtype=np.int8, symmetric=True, axis=axis)
    values = qparams.quantize(weights, scale, zero_point, dtype=np.int8, axis=axis)
    return QWeight(values, np.asarray(scale, np.float32), np.asarray(zero_point, np.int32), axis)


def channel_axis(node: Node) -> int:
    """Along which axis of a layer's weights its output channels lie."""
    return 0 if node.op == "Conv" else 1


def quantized_weights(graph: Graph, policy: Policy, config: QuantConfig) -> dict[str, QWeight]:
    """The weights of every int8 layer, by its name. Weights that are quantized already stay as they are."""
    found: dict[str, QWeight] = {}
    done: dict[tuple[str, int | None], QWeight] = {}
    for node in graph:
        if node.op not in WEIGHTED or policy.precision(node) != "int8":
            continue
        axis = channel_axis(node) if config.weights == "channel" else None
        key, weights = (node.inputs[1], axis), graph.constants[node.inputs[1]]
        if key not in done:
            done[key] = weights if isinstance(weights, QWeight) else quantize_weights(weights.astype(np.float32), axis)
        found[node.name] = done[key]
    return found


def overflows(graph: Graph, quants: Mapping[str, ValueQuant], weights: Mapping[str, QWeight]) -> dict[str, str]:
    """The int8 layers whose sums could leave s32 for some input, and how."""
    found: dict[str, str] = {}
    for node in graph:
        if node.name in weights:
            w, x = weights[node.name], quants[node.inputs[0]]
            try:
                acc_bound(w.values, x.dtype, x.zero_point, w_zero_point=w.zero_point, axis=channel_axis(node))
            except QuantizationError as error:
                found[node.name] = str(error)
    return found


def _corrected(graph: Graph, node: Node, quantized: QWeight | None, calibration: Calibration) -> Node:
    """The layer with the mean error of its rounded weights taken out of its bias (padding is not looked at)."""
    if quantized is None or node.inputs[0] not in calibration.means:
        return node
    weights = graph.array(node.inputs[1])
    assert weights is not None
    error = quantized.real.astype(np.float64) - weights.astype(np.float64)
    mean = calibration.means[node.inputs[0]]
    if node.op == "Linear":
        shift = mean @ error
    else:
        taps = error.reshape(*error.shape[:2], -1).sum(axis=2)  # [oc, ic / groups]
        groups = len(mean) // taps.shape[1]
        by_group = taps.reshape(groups, -1, taps.shape[1])
        shift = np.einsum("goi,gi->go", by_group, mean.reshape(groups, -1)).reshape(-1)
    if not shift.any():
        return node
    old = graph.array(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] else None
    bias = (-shift if old is None else old.reshape(-1).astype(np.float64) - shift).astype(np.float32)
    name = graph.new_name(f"{node.name}_bias_corrected")
    graph.constants[name] = bias
    graph.types[name] = TensorType("f32", bias.shape)
    return replace(node, inputs=(*node.inputs[:2], name, *node.inputs[3:]))


def _set_weights(graph: Graph, weights: Mapping[str, QWeight]) -> None:
    """Put quantized weights in place of the f32 ones, beside them where another node reads those."""
    readers = graph.consumers()
    made: dict[tuple[str, int], str] = {}
    nodes = []
    for node in graph:
        quantized = weights.get(node.name)
        if quantized is not None:
            old = node.inputs[1]
            key = (old, id(quantized))
            if key not in made:
                alone = all(weights.get(other.name) is quantized for other in readers[old])
                made[key] = old if alone else graph.new_name(f"{old}_s8")
                graph.constants[made[key]] = quantized
            node = replace(node, inputs=(node.inputs[0], made[key], *node.inputs[2:]))  # noqa: PLW2901
        nodes.append(node)
    graph.nodes = nodes
    graph.prune()
