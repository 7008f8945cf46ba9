"""The simulation: exact where integers decide, near the f32 network everywhere, and on models of every kind."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.graph.pass_helpers import Build, feeds
from vnnigen.errors import ModelError
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Graph, Node, QWeight
from vnnigen.graph.passes import run_passes
from vnnigen.quant import QuantConfig, calibrate, quantize, simulate

models = pytest.importorskip("tests.graph.models")


def sqnr(real: npt.NDArray[Any], other: npt.NDArray[Any]) -> float:
    error = (real.astype(np.float64) - other) ** 2
    return float(10 * np.log10((real.astype(np.float64) ** 2).sum() / max(error.sum(), 1e-30)))


def prepared(model: Any) -> Graph:
    from vnnigen.graph.importer import import_model

    graph = import_model(model)
    infer(graph)
    run_passes(graph)
    return graph


CONFIGS = [
    QuantConfig(), QuantConfig("symmetric"), QuantConfig(weights="tensor"), QuantConfig(method="percentile"),
    QuantConfig(method="kl"), QuantConfig(overrides={"[CL]*": "bf16"}),
]  # fmt: skip


@pytest.mark.parametrize("config", CONFIGS, ids=["asymmetric", "symmetric", "tensor", "percentile", "kl", "bf16"])
@pytest.mark.parametrize("name", ["small_cnn", "mobile_block", "bert_layer", "detector_head"])
def test_quantized_models_are_near_the_f32_ones(name: str, config: QuantConfig) -> None:
    model = models.BUILDERS[name]()
    graph = prepared(model)
    made = quantize(graph, calibrate(graph, [models.feeds(model, seed) for seed in range(6)], config), config)
    made.check()
    assert graph.quant == {}  # the graph given is left alone
    inputs = models.feeds(model, seed=10)
    real, simulated = run_reference(graph, inputs), simulate(made, inputs)
    for output in graph.outputs:
        assert sqnr(real[output], simulated[output]) > 20
        assert not np.array_equal(real[output], simulated[output])


def fake(graph: Graph, name: str, x: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    """Round to how a value is stored."""
    q = graph.quant[name]
    low, high = (0, 255) if q.dtype == "u8" else (-128, 127)
    steps = np.clip(np.rint(x.astype(np.float64) / q.scale) + q.zero_point, low, high)
    return ((steps - q.zero_point) * q.scale).astype(np.float32)


@pytest.mark.parametrize("activations", ["asymmetric", "symmetric"])
def test_a_chain_by_hand(activations: Any) -> None:
    """Rounding in f32 after each node gives the same, but for a step here and there."""
    b = Build()
    x = b.conv(b.input(2, 3, 9, 9), 3, 8, k=3, pad=1)
    y = b.op("Add", b.conv(b.op("LeakyRelu", x, alpha=0.1), 8, 8), x)
    y = b.op("AveragePool", b.op("Concat", y, x, axis=1), kernel_shape=(3, 3), strides=(2, 2))
    graph = b.graph(b.conv(y, 16, 4, group=2))
    run_passes(graph)
    config = QuantConfig(activations)
    made = quantize(graph, calibrate(graph, [feeds(graph, s) for s in range(3)], config), config)
    assert {n.precision for n in made} == {"int8"}
    inputs = feeds(made, seed=9)
    values = {name: fake(made, name, a) for name, a in inputs.items()}
    names = [o for n in made for o in n.outputs]
    simulated = simulate(made, inputs, names)
    for node in made:
        operands = [values.get(n, made.array(n)) if n else None for n in node.inputs]
        from vnnigen.graph.evaluate import evaluate

        (result,) = evaluate(node, operands)
        name = node.output
        if name in made.quant:
            result = fake(made, name, result)
            assert np.abs(result - simulated[name]).max() <= made.quant[name].scale * 1.001
            assert np.mean(result != simulated[name]) < 0.01
        else:
            np.testing.assert_allclose(simulated[name], result, rtol=1e-4, atol=1e-4)
        values[name] = simulated[name]


def test_one_dimensional_convolutions() -> None:
    b = Build()
    x = b.op("Conv", b.input(2, 3, 20), b.random(4, 3, 5), b.random(4), pads=(2, 2), strides=(2,), kernel_shape=(5,))
    graph = b.graph(b.op("Conv", b.op("Relu", x), b.random(4, 2, 3), group=2, kernel_shape=(3,)))
    run_passes(graph)
    config = QuantConfig()
    made = quantize(graph, calibrate(graph, [feeds(graph)], config), config)
    assert all(isinstance(made.constants[n.inputs[1]], QWeight) for n in made)
    inputs = feeds(made)
    assert sqnr(run_reference(graph, inputs)[graph.outputs[0]], simulate(made, inputs)[graph.outputs[0]]) > 30


def test_a_graph_without_annotations_is_f32() -> None:
    b = Build()
    graph = b.graph(b.op("Relu", b.conv(b.input("n", 3, 4, 4), 3, 4)))
    inputs = feeds(graph)
    y = graph.outputs[0]
    np.testing.assert_array_equal(simulate(graph, inputs)[y], run_reference(graph, inputs)[y])
    with pytest.raises(ModelError, match="input"):
        simulate(graph, {})


def test_unknown_fused_steps_are_named() -> None:
    from vnnigen.graph.ir import Fused
    from vnnigen.quant.simulate import post_ops

    node = Node("n", "Conv", ("x", "w"), ("y",), fused=(Fused("Cos"),))
    with pytest.raises(ModelError, match=r"node 'n'.*Cos"):
        post_ops(Graph("g", {}, (), [], {}), node, [], 4)
