"""The int8 policy on small graphs: precisions, which values share a scale, and the edges of a network."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.graph.pass_helpers import Build, feeds
from vnnigen.errors import QuantizationError
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.ir import Graph, Node, QWeight
from vnnigen.graph.network import Network
from vnnigen.graph.passes import run_passes
from vnnigen.quant import QuantConfig, calibrate, decide, quantize, quantize_with_report, simulate
from vnnigen.quant.quantize import quantize_weights


def annotated(graph: Graph, **choices: Any) -> Graph:
    run_passes(graph)
    config = QuantConfig(**choices)
    made = quantize(graph, calibrate(graph, [feeds(graph, seed) for seed in range(3)], config), config)
    made.check()
    return made


def precisions(graph: Graph) -> dict[str, str]:
    return {node.name: node.precision for node in graph}


def by_op(graph: Graph, op: str) -> Node:
    return next(node for node in graph if node.op == op)


def test_bytes_between_layers_and_f32_behind_the_last() -> None:
    b = Build()
    x = b.conv(b.input("n", 3, 8, 8), 3, 8, k=3, pad=1)
    x = b.op("MaxPool", b.op("Relu", x), kernel_shape=(2, 2), strides=(2, 2))
    x = b.conv(x, 8, 8)
    x = b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)
    x = b.op("MatMul", x, b.random(8, 5))
    graph = annotated(b.graph(b.op("Softmax", x, axis=-1)))
    assert {n.op: n.precision for n in graph} == {
        "Conv": "int8", "MaxPool": "int8", "GlobalAveragePool": "int8", "Flatten": "int8", "Linear": "int8",
        "Softmax": "f32",
    }  # fmt: skip
    pool, flatten, linear = (by_op(graph, op) for op in ("MaxPool", "Flatten", "Linear"))
    # What moves keeps its scale; averages have their own; the classifier writes f32.
    assert graph.quant[pool.output] == graph.quant[pool.inputs[0]]
    assert graph.quant[flatten.output] == graph.quant[flatten.inputs[0]] != graph.quant[pool.output]
    assert linear.output not in graph.quant
    assert "x" in graph.quant
    weights = [graph.constants[n.inputs[1]] for n in graph if n.op in ("Conv", "Linear")]
    assert all(isinstance(w, QWeight) and np.abs(w.values).max() == 127 for w in weights)
    assert [w.axis for w in weights if isinstance(w, QWeight)] == [0, 0, 1]


def test_concat_has_the_smallest_scale_that_covers_its_inputs() -> None:
    b = Build()
    x = b.op("Relu", b.conv(b.input(1, 3, 8, 8), 3, 4))
    wide, narrow = b.conv(x, 4, 4), b.op("Mul", b.conv(x, 4, 4), b.const(0.125))
    pooled = b.op("MaxPool", narrow, kernel_shape=(3, 3), pads=(1, 1, 1, 1))
    joined = b.op("Concat", wide, pooled, axis=1)
    real = b.graph(b.conv(joined, 8, 4))
    graph = annotated(real)
    concat, pool = by_op(graph, "Concat"), by_op(graph, "MaxPool")
    shared = {graph.quant[name] for name in (*concat.inputs, concat.output, *pool.inputs)}
    assert len(shared) == 1
    seen = [run_reference(real, feeds(real, seed), [*concat.inputs, *pool.inputs]) for seed in range(3)]
    low, high = (f([f(v) for values in seen for v in values.values()]) for f in (np.min, np.max))
    (quant,) = shared
    assert quant == QuantConfig().value_quant(low, high)


def test_a_residual_keeps_its_own_scale() -> None:
    b = Build()
    x = b.op("Relu", b.conv(b.input(1, 3, 8, 8), 3, 4))
    y = b.op("Relu", b.op("Add", b.conv(x, 4, 4), x))
    graph = annotated(b.graph(b.conv(y, 4, 4)))
    host = next(node for node in graph if node.fused and node.fused[0].op == "Add")
    (operand,) = [host.inputs[s.operand] for s in host.fused if s.operand is not None]
    assert graph.quant[operand] != graph.quant[host.output]
    assert set(precisions(graph).values()) == {"int8"}


def test_a_plain_sum_between_layers() -> None:
    b = Build()
    x = b.op("Relu", b.conv(b.input(1, 3, 8, 8), 3, 4))
    pooled = [b.op("MaxPool", x, kernel_shape=(k, k), pads=(k // 2,) * 4) for k in (3, 5)]
    graph = annotated(b.graph(b.conv(b.op("Add", *pooled), 4, 4)))
    assert by_op(graph, "Add").precision == "int8"
    assert graph.quant[by_op(graph, "Add").output].scale > graph.quant[pooled[0]].scale


def test_an_average_behind_the_last_layer_reads_bytes() -> None:
    b = Build()
    x = b.conv(b.input("n", 3, 8, 8), 3, 8)
    graph = annotated(b.graph(b.op("Flatten", b.op("GlobalAveragePool", x), axis=1)))
    pool = by_op(graph, "GlobalAveragePool")
    assert (pool.precision, by_op(graph, "Flatten").precision) == ("int8", "f32")
    assert set(graph.quant) == {"x", *pool.inputs}
    inputs = feeds(graph)
    np.testing.assert_array_equal(Network(graph)(inputs), simulate(graph, inputs)[graph.outputs[0]])


def test_islands_and_values_that_both_read() -> None:
    b = Build()
    x = b.op("Relu", b.conv(b.input(1, 3, 8, 8), 3, 4))
    island = b.op("Softplus", x)
    graph = annotated(b.graph(b.conv(b.op("Concat", x, island, axis=1), 8, 4)))
    assert by_op(graph, "Softplus").precision == "f32"
    # The island's result is made in f32 and read as bytes.
    assert graph.quant[island] == graph.quant[by_op(graph, "Softplus").inputs[0]]
    inputs = feeds(graph)
    np.testing.assert_allclose(
        simulate(graph, inputs)[graph.outputs[0]], run_reference(graph, inputs)[graph.outputs[0]], atol=0.15
    )


def test_products_of_two_activations() -> None:
    b = Build()
    x = b.input("n", 6, 8)
    q, k, v = (b.op("MatMul", x, b.random(8, 8)) for _ in range(3))
    weights = b.op("Softmax", b.op("MatMul", q, b.op("Transpose", k, perm=(0, 2, 1))), axis=-1)
    graph = annotated(b.graph(b.op("MatMul", b.op("MatMul", weights, v), b.random(8, 3))))
    assert [n.precision for n in graph if n.op in ("MatMul", "Linear")] == ["int8"] * 6
    assert by_op(graph, "Softmax").precision == "f32"
    assert weights in graph.quant
    inner = next(n for n in graph if n.op == "MatMul")
    assert inner.output not in graph.quant  # Softmax wants f32


@pytest.mark.parametrize(("length", "precision"), [(33025, "int8"), (33026, "f32")])
def test_sums_that_could_leave_s32_stay_f32(length: int, precision: str) -> None:
    b = Build()
    graph = b.graph(b.op("MatMul", b.input(2, length, name="a"), b.input(length, 2, name="b")))
    decision = next(iter(decide(graph, QuantConfig()).decisions.values()))
    assert decision.precision == precision
    assert precision == "int8" or "could leave s32" in decision.reason


def test_weights_whose_sums_could_leave_s32_stay_f32() -> None:
    b = Build()
    w = np.ones((140_000, 2), np.float32)
    x = b.op("MatMul", b.input(1, 140_000), b.const(w))
    graph = b.graph(b.op("MatMul", x, b.random(2, 2)))
    run_passes(graph)
    config = QuantConfig()
    made, report = quantize_with_report(graph, calibrate(graph, [feeds(graph)], config), config)
    assert [d.precision for d in report] == ["f32", "int8"]
    assert "K too large" in report[0].reason
    assert "x" not in made.quant


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"first": "f32"}, ["f32", "int8", "int8"]),
        ({"first": "bf16", "last": "f32"}, ["bf16", "int8", "f32"]),
        ({"overrides": {"n_conv1": "f32"}}, ["int8", "f32", "int8"]),
        ({"first": "f32", "overrides": {"Conv": "int8"}}, ["int8", "int8", "int8"]),
        ({"overrides": {"*": "bf16"}}, ["bf16", "bf16", "bf16"]),
    ],
)
def test_fallbacks(choices: dict[str, Any], expected: list[str]) -> None:
    b = Build()
    x = b.input(1, 3, 4, 4)
    for cin in (3, 4, 4):
        x = b.conv(x, cin, 4)
    graph = annotated(b.graph(x), **choices)
    assert list(precisions(graph).values()) == expected
    for node in graph:
        assert isinstance(graph.constants[node.inputs[1]], QWeight) == (node.precision == "int8")
        assert (node.inputs[0] in graph.quant) == (node.precision == "int8")


def test_int8_wished_for_where_it_cannot_be() -> None:
    b = Build()
    graph = b.graph(b.op("Softplus", b.conv(b.input(1, 3, 4, 4), 3, 4)))
    decisions = decide(graph, QuantConfig(overrides={"Softplus": "int8"})).decisions
    assert decisions["n_softplus1"].precision == "f32"
    assert "override 'Softplus', but Softplus has no int8 kernel" in decisions["n_softplus1"].reason


@pytest.mark.parametrize(
    ("activations", "first", "low", "expected"),
    [
        ("asymmetric", "auto", -1, "u8"), ("symmetric", "auto", -1, "s8"), ("symmetric", "auto", 0, "u8"),
        ("asymmetric", "s8", -1, "s8"), ("symmetric", "u8", -1, "u8"),
    ],
)  # fmt: skip
def test_the_type_of_the_input(activations: Any, first: Any, low: float, expected: str) -> None:
    b = Build()
    graph = b.graph(b.conv(b.op("Relu", b.conv(b.input(1, 3, 4, 4), 3, 4)), 4, 4))
    run_passes(graph)
    config = QuantConfig(activations, first=first)
    x = np.random.default_rng(0).uniform(low, 1, (1, 3, 4, 4)).astype(np.float32)
    made = quantize(graph, calibrate(graph, [x], config), config)
    assert made.quant["x"].dtype == expected
    assert made.quant[made.nodes[0].output].dtype == "u8"  # behind the Relu


def test_weights_that_an_f32_layer_reads_too_are_kept() -> None:
    b = Build()
    w = b.random(3, 3, 1, 1)
    x = b.op("Conv", b.input(1, 3, 4, 4), w, kernel_shape=(1, 1))
    graph = annotated(b.graph(b.op("Conv", x, w, kernel_shape=(1, 1))), overrides={"n_conv1": "f32"})
    first, second = graph.nodes
    assert isinstance(graph.constants[first.inputs[1]], QWeight)
    assert isinstance(graph.constants[second.inputs[1]], np.ndarray)


@pytest.mark.parametrize("axis", [0, 1, None])
def test_weights_are_within_half_a_step(axis: int | None) -> None:
    w = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32) * np.arange(1, 6, dtype=np.float32)
    q = quantize_weights(w, axis)
    step = q.scale if axis != 0 else q.scale[:, None]
    assert (np.abs(q.real - w) <= step * 0.5001).all()
    assert not q.zero_point.any()
    assert q.values.min() >= -127


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_bias_correction_takes_the_mean_error_out(groups: int) -> None:
    b = Build()
    graph = b.graph(b.conv(b.input("n", 4, 6, 6), 4, 8, k=3, group=groups))
    samples = [np.random.default_rng(s).uniform(0, 4, (2, 4, 6, 6)).astype(np.float32) for s in range(8)]

    def mean_error(correct: bool) -> float:
        config = QuantConfig(weights="tensor", bias_correction=correct)
        made = quantize(graph, calibrate(graph, samples, config), config)
        y = graph.outputs[0]
        errors = [run_reference(made, {"x": x})[y] - run_reference(graph, {"x": x})[y] for x in samples]
        return float(np.abs(np.mean(errors, axis=(0, 1, 3, 4))).max())

    assert mean_error(True) < mean_error(False) / 5


def test_values_that_were_not_calibrated_are_named() -> None:
    b = Build()
    graph = b.graph(b.conv(b.conv(b.input(1, 3, 4, 4), 3, 4), 4, 4))
    partial = calibrate(graph, [feeds(graph)], QuantConfig(first="f32"))
    with pytest.raises(QuantizationError, match="value 'x' was not calibrated"):
        quantize(graph, partial, QuantConfig())
