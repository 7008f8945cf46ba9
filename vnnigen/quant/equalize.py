"""Cross-layer equalization: channels that enter a depthwise convolution get one range.

Bytes have one scale per tensor, and a channel that stays small wastes most of its steps.  Where a depthwise convolution
reads a convolution's result, each channel can be blown up to the largest one's range, and shrunk back in the depthwise
weights, whose scale is per channel anyway (Nagel et al. 2019, "Data-Free Quantization Through Weight Equalization and
Bias Correction", section 4.1; here all of the gain goes to the side that needs it).  Relu and LeakyRelu between commute
with that.  A Clip at 6 cuts each channel off at its own bound then, which is chosen beyond all that was observed.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np

from vnnigen.graph.ir import Array, Graph, Node, TensorType
from vnnigen.kernels.types import F64
from vnnigen.quant.calibrate import Calibration
from vnnigen.quant.observers import Range
from vnnigen.quant.policy import pairs_to_equalize

#: A channel of which little was seen stays small: on a trained MobileNetV2, calibrated on 16 photos, the logits' SQNR
#: is 21.1 dB with 4, 20.9 dB with 10, 19.4 dB with 30 and 17.1 dB without equalization.
MAX_GAIN = 4.0
#: How far beyond what was observed a channel may reach before it is cut off, where a Clip does that anyway.
MARGIN = 1.25


def equalize(graph: Graph, calibration: Calibration) -> tuple[Graph, Calibration]:
    """A copy of an f32 graph that computes the same with equalized channels, and the calibration of its values."""
    made = graph.copy()
    ranges, means = dict(calibration.ranges), dict(calibration.means)
    nodes = {node.name: node for node in made}
    for first, second in pairs_to_equalize(graph):
        value = second.inputs[0]
        if value not in calibration.channels:
            continue
        lows, highs = calibration.channels[value]
        reach = np.maximum(-lows, highs)
        ceiling = clip_bound(first)
        if ceiling < inf:
            reach = np.minimum(reach * MARGIN, ceiling)
        largest = ceiling if ceiling < inf else float(reach.max())
        if not largest > 0:
            continue
        gain = largest / np.clip(reach, largest / MAX_GAIN, largest)
        nodes[first.name] = _scaled(made, nodes[first.name], gain, bias=True)
        nodes[second.name] = _scaled(made, nodes[second.name], np.repeat(1 / gain, _multiplier(graph, second, gain)))
        ranges[value] = Range(float((lows * gain).min()), min(float((highs * gain).max()), ceiling))
        if value in means:
            means[value] = means[value] * gain
    made.nodes = [nodes[node.name] for node in graph]
    made.prune()
    return made, replace(calibration, ranges=ranges, means=means)


def clip_bound(node: Node) -> float:
    """The upper bound of a node's fused Clip, infinity if it has none."""
    bounds = [float(step.attrs.get("max", inf)) for step in node.fused if step.op == "Clip"]
    return min(bounds, default=inf)


def _multiplier(graph: Graph, node: Node, gain: F64) -> int:
    shape = graph.shape(node.inputs[1])
    assert shape is not None
    return shape[0] // len(gain)


def _scaled(graph: Graph, node: Node, gain: F64, bias: bool = False) -> Node:
    """A convolution with weights (and bias) times `gain`, one per output channel, as new constants."""
    inputs = list(node.inputs)
    for i in (1, 2)[: 1 + bias]:
        old = graph.array(inputs[i]) if i < len(inputs) and inputs[i] else None
        if old is not None:
            inputs[i] = _constant(graph, inputs[i], old.astype(np.float64) * gain.reshape(-1, *(1,) * (old.ndim - 1)))
    return replace(node, inputs=tuple(inputs))


def _constant(graph: Graph, wish: str, values: Array) -> str:
    name = graph.new_name(f"{wish}_equalized")
    graph.constants[name] = values.astype(np.float32)
    graph.types[name] = TensorType("f32", values.shape)
    return name
