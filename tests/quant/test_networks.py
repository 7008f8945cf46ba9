"""Native int8 networks against the simulation: the same integers, so the same results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.graph.pass_helpers import Build, feeds
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Graph
from vnnigen.graph.network import Network
from vnnigen.graph.passes import run_passes
from vnnigen.quant import QuantConfig, absorb_activations, absorb_weights, calibrate, quantize, simulate
from vnnigen.quant.calibrate import native_runner, reference_runner

models: Any = pytest.importorskip("tests.graph.models")


def compare(graph: Graph, inputs: dict[str, Any], isa: str | None) -> None:
    results = Network(graph, isa=isa)(inputs)
    expected = simulate(graph, inputs)
    for name, y in zip(graph.outputs, results if isinstance(results, tuple) else (results,), strict=True):
        np.testing.assert_allclose(y, expected[name], rtol=1e-5, atol=1e-6 * np.abs(expected[name]).max())


@pytest.mark.parametrize("isa", [None, "avx2"])
@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
@pytest.mark.parametrize("name", ["small_cnn", "mobile_block", "bert_layer", "detector_head"])
def test_quantized_models(name: str, activations: Any, isa: str | None) -> None:
    model = models.BUILDERS[name]()
    from vnnigen.graph.importer import import_model

    graph = import_model(model)
    infer(graph)
    run_passes(graph)
    config = QuantConfig(activations)
    made = quantize(graph, calibrate(graph, [models.feeds(model, seed) for seed in range(4)], config), config)
    compare(made, models.feeds(model, seed=10), isa)


@pytest.mark.parametrize("isa", [None, "avx2"])
@pytest.mark.parametrize("name", ["qdq_cnn", "qoperator_cnn"])
def test_models_that_come_quantized(name: str, isa: str | None) -> None:
    model = models.BUILDERS[name]()
    from vnnigen.graph.importer import import_model

    graph = import_model(model)
    infer(graph)
    absorb_weights(graph)
    run_passes(graph)
    absorb_activations(graph)
    infer(graph)
    compare(graph, models.feeds(model), isa)


def test_calibration_runs_natively_as_in_numpy() -> None:
    b = Build()
    x = b.conv(b.input("n", 3, 8, 8), 3, 8, k=3, pad=1)
    x = b.op("Concat", b.op("Relu", x), b.op("MaxPool", x, kernel_shape=(3, 3), pads=(1, 1, 1, 1)), axis=1)
    graph = b.graph(b.op("Softmax", b.conv(x, 16, 4), axis=1))
    run_passes(graph)
    samples, config = [feeds(graph, seed, length=1 + seed) for seed in range(3)], QuantConfig()
    native, numpy = (calibrate(graph, samples, config, runner=r) for r in (native_runner, reference_runner))
    assert native.ranges.keys() == numpy.ranges.keys()
    for name, found in native.ranges.items():
        np.testing.assert_allclose(found, numpy.ranges[name], rtol=1e-5, atol=1e-5)
