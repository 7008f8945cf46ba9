"""Equalization: the same function, with channels of one range."""

from __future__ import annotations

import numpy as np
import pytest

from tests.graph.pass_helpers import Build, feeds
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.ir import Graph
from vnnigen.graph.passes import run_passes
from vnnigen.quant import QuantConfig, calibrate, quantize, simulate
from vnnigen.quant.calibrate import reference_runner
from vnnigen.quant.equalize import equalize
from vnnigen.quant.policy import pairs_to_equalize


def block(activation: str, multiplier: int = 1) -> Graph:
    """A convolution whose channels differ a thousandfold, and a depthwise one that makes up for it."""
    b = Build(3)
    sizes = np.geomspace(0.01, 2, 8).astype(np.float32)
    w = b.const(b.rng.uniform(-1, 1, (8, 3, 1, 1)) * sizes[:, None, None, None])
    x = b.op("Conv", b.input("n", 3, 6, 6), w, b.const(b.rng.uniform(0, 1, 8) * sizes), kernel_shape=(1, 1))
    if activation == "Clip":
        x = b.op("Clip", x, b.const(0), b.const(6))
    elif activation:
        x = b.op(activation, x)
    n = 8 * multiplier
    taps = b.const(b.rng.uniform(0.2, 1, (n, 1, 3, 3)) / np.repeat(sizes, multiplier)[:, None, None, None])
    x = b.op("Conv", x, taps, b.random(n), pads=(1, 1, 1, 1), group=8, kernel_shape=(3, 3))
    graph = b.graph(b.conv(x, n, 4))
    run_passes(graph)
    return graph


@pytest.mark.parametrize("multiplier", [1, 2])
@pytest.mark.parametrize("activation", ["", "Relu", "LeakyRelu", "Clip"])
def test_the_function_stays_and_the_error_falls(activation: str, multiplier: int) -> None:
    graph = block(activation, multiplier)
    config = QuantConfig()
    samples = [feeds(graph, seed) for seed in range(4)]
    calibration = calibrate(graph, samples, config, runner=reference_runner)
    made, new = equalize(graph, calibration)
    y = graph.outputs[0]
    for inputs in samples:
        scale = np.abs(run_reference(graph, inputs)[y]).max()
        np.testing.assert_allclose(
            run_reference(made, inputs)[y], run_reference(graph, inputs)[y], rtol=1e-4, atol=1e-5 * scale
        )
    # What was foreseen of the equalized values is what they are.
    again = calibrate(made, samples, config, runner=reference_runner)
    for name, found in again.ranges.items():
        np.testing.assert_allclose(new.ranges[name], found, rtol=1e-4, atol=1e-5)
    for name, mean in again.means.items():
        np.testing.assert_allclose(new.means[name], mean, rtol=1e-3, atol=1e-5)
    without = QuantConfig(equalization=False)

    def error(choice: QuantConfig) -> float:
        quantized = quantize(graph, calibrate(graph, samples, choice, runner=reference_runner), choice)
        real, found = (f(g, samples[0])[y] for f, g in ((run_reference, graph), (simulate, quantized)))
        return float(np.sqrt(np.mean((real - found) ** 2)))

    assert error(config) < error(without) / 1.5


def test_what_cannot_be_equalized() -> None:
    b = Build()
    x = b.conv(b.input(1, 3, 9, 9), 3, 8)
    x = b.op("Sigmoid", x)
    x = b.conv(x, 8, 8, k=3, group=8)  # the activation does not commute
    y = b.conv(x, 8, 8, k=3, group=4)  # no depthwise one
    z = b.conv(y, 8, 8, k=3, group=8)
    graph = b.graph(z, y)
    run_passes(graph)
    assert pairs_to_equalize(graph) == []  # y is read outside, too
