"""Models that come quantized: annotations that mean the same as the nodes did."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from tests.graph.pass_helpers import Build, feeds
from vnnigen.errors import QuantizationError
from vnnigen.graph.evaluate import run_reference
from vnnigen.graph.infer import infer
from vnnigen.graph.ir import Graph, QWeight, ValueQuant
from vnnigen.graph.passes import run_passes
from vnnigen.quant import absorb_activations, absorb_qdq, absorb_weights, simulate


class Quantized(Build):
    """Graphs with Q and DQ nodes."""

    def q(self, x: str, scale: float, zero_point: int = 0, dtype: Any = np.uint8) -> str:
        return self.op("QuantizeLinear", x, self.const(scale), self.const(zero_point, dtype))

    def dq(self, x: str, scale: float, zero_point: int = 0, dtype: Any = np.uint8) -> str:
        return self.op("DequantizeLinear", x, self.const(scale), self.const(zero_point, dtype))

    def qdq(self, x: str, scale: float, zero_point: int = 0, dtype: Any = np.uint8) -> str:
        return self.dq(self.q(x, scale, zero_point, dtype), scale, zero_point, dtype)

    def weight(self, *shape: int, axis: int | None = 0, dtype: Any = np.int8, zero_point: bool = False) -> str:
        low = 0 if dtype == np.uint8 else -128
        values = self.const(self.rng.integers(low, low + 256, shape), dtype)
        n = () if axis is None else (shape[axis],)
        middle = low + 128 + (self.rng.integers(-9, 9, n) if zero_point else np.zeros(n))
        scale = self.const(self.rng.uniform(0.5, 1.5, n) / 100)
        return self.op("DequantizeLinear", values, scale, self.const(middle, dtype), axis=axis or 0)

    def bias(self, n: int) -> str:
        return self.op(
            "DequantizeLinear", self.const(self.rng.integers(-99, 99, n), np.int32), self.const(np.full(n, 0.001)),
            axis=0,
        )  # fmt: skip


def absorbed(graph: Graph, passes: bool = True) -> Graph:
    made = graph.copy()
    assert absorb_weights(made)
    infer(made)
    if passes:
        run_passes(made)
    absorb_activations(made)
    infer(made)
    made.check()
    return made


def agrees(graph: Graph, made: Graph, tolerance: float) -> None:
    for seed in range(3):
        inputs = feeds(graph, seed)
        expected, found = run_reference(graph, inputs), simulate(made, inputs)
        for name in graph.outputs:
            assert expected[name].std() > 0
            np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=tolerance)


def ops(graph: Graph) -> list[str]:
    return [f"{node.op}:{node.precision}" for node in graph]


@pytest.mark.parametrize("dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("zero_point", [False, True])
def test_convolutions(dtype: Any, axis: int | None, zero_point: bool) -> None:
    b = Quantized()
    x = b.qdq(b.input(2, 3, 6, 6), 0.03, 128)
    w = b.weight(8, 3, 3, 3, axis=axis, dtype=dtype, zero_point=zero_point)
    y = b.op("Conv", x, w, b.bias(8), kernel_shape=(3, 3), pads=(1, 1, 1, 1))
    y = b.qdq(b.op("Relu", y), 0.02)
    y = b.op("Conv", y, b.weight(4, 8, 1, 1), kernel_shape=(1, 1))
    graph = b.graph(y)
    made = absorbed(graph)
    assert ops(made) == ["Conv:int8", "Conv:int8"]
    weights = made.constants[made.nodes[0].inputs[1]]
    assert isinstance(weights, QWeight)
    np.testing.assert_array_equal(weights.real, run_reference(graph, feeds(graph), [w])[w])
    assert made.quant["x"] == ValueQuant("u8", np.float32(0.03), 128)
    agrees(graph, made, tolerance=0.02 * 0.015 * 128 * 2)


def test_a_zero_point_that_does_a_relus_work() -> None:
    """The bytes of a value cut its negative part off; nothing may be fused over that."""
    b = Quantized()
    x = b.qdq(b.input(2, 3, 6, 6), 0.03, 128)
    y = b.qdq(b.op("Conv", x, b.weight(3, 3, 1, 1), kernel_shape=(1, 1)), 0.02)  # no Relu
    graph = b.graph(b.qdq(b.op("Add", y, x), 0.04, 100), b.op("Softplus", y))
    made = absorbed(graph)
    assert [o for o in ops(made) if "Linear" not in o] == ["Conv:int8", "Add:int8", "Softplus:f32"]
    agrees(graph, made, tolerance=0.041)


def test_a_value_that_only_an_f32_node_reads_is_still_cut_off() -> None:
    b = Quantized()
    x = b.qdq(b.input(2, 3, 6, 6), 0.03, 128)
    y = b.qdq(b.op("Conv", x, b.weight(3, 3, 1, 1), kernel_shape=(1, 1)), 0.02)
    graph = b.graph(b.op("Neg", y))
    made = absorbed(graph)
    agrees(graph, made, tolerance=0.021)
    assert simulate(made, feeds(made))[made.outputs[0]].max() <= 0


@pytest.mark.parametrize("form", ["MatMul", "Gemm", "transB", "scaled", "wrong axis"])
def test_products_with_a_matrix(form: str) -> None:
    b = Quantized()
    x = b.qdq(b.input(5, 12), 0.03, 120)
    match form:
        case "MatMul":
            y = b.op("Add", b.op("MatMul", x, b.weight(12, 7, axis=1)), b.random(7))
        case "Gemm":
            y = b.op("Gemm", x, b.weight(12, 7, axis=1), b.random(1, 7))
        case "transB":
            y = b.op("Gemm", x, b.weight(7, 12, axis=0), b.random(), transB=1)
        case "scaled":
            y = b.op("Gemm", x, b.weight(12, 7, axis=1), b.random(7), alpha=0.5)
        case _:
            y = b.op("Gemm", x, b.weight(12, 7, axis=0), b.random(7))
    graph = b.graph(b.qdq(y, 0.02, 128))
    made = absorbed(graph)
    int8 = form in ("MatMul", "Gemm", "transB")
    assert ("Linear:int8" in ops(made)) == int8
    agrees(graph, made, tolerance=0.0201)


def test_a_product_of_two_activations() -> None:
    b = Quantized()
    x = b.qdq(b.input(2, 4, 8, name="a"), 0.03, 128)
    y = b.qdq(b.input(2, 8, 4, name="b"), 0.04, 0, np.int8)
    graph = b.graph(b.qdq(b.op("MatMul", x, y), 0.2, 128))
    made = absorbed(graph)
    assert ops(made)[0] == "MatMul:int8"
    agrees(graph, made, tolerance=0.201)


def test_bytes_that_are_moved() -> None:
    """QOperator models move bytes themselves: between Q and DQ stand operators that do not compute."""
    b = Quantized()
    x = b.qdq(b.input(2, 3, 6, 6), 0.03, 128)
    y = b.op("Conv", x, b.weight(8, 3, 1, 1), kernel_shape=(1, 1))
    y = b.op("MaxPool", b.q(y, 0.02, 100), kernel_shape=(6, 6))
    y = b.dq(b.op("Reshape", y, b.ints(2, 8)), 0.02, 100)
    graph = b.graph(b.op("Gemm", y, b.weight(8, 3, axis=1)))
    made = absorbed(graph)
    assert ops(made) == ["Conv:int8", "MaxPool:int8", "Reshape:int8", "Linear:int8"]
    agrees(graph, made, tolerance=1e-4)


def test_what_moves_with_another_scale_behind_it_is_f32() -> None:
    b = Quantized()
    x = b.qdq(b.input(2, 3, 6, 6), 0.03, 128)
    y = b.qdq(b.op("MaxPool", x, kernel_shape=(2, 2)), 0.05, 100)
    graph = b.graph(b.op("Conv", y, b.weight(4, 3, 1, 1), kernel_shape=(1, 1)))
    made = absorbed(graph)
    assert "MaxPool:f32" in ops(made)
    assert "Conv:int8" in ops(made)
    agrees(graph, made, tolerance=0.05 * 0.015 * 128 * 3)


def test_weights_quantized_by_a_node_and_types_we_leave_alone() -> None:
    b = Quantized()
    w = b.const(np.linspace(-1, 1, 12).reshape(4, 3, 1, 1))
    w = b.qdq(w, 1 / 127, 0, np.int8)
    x = b.qdq(b.input(2, 3, 6, 6), 0.001, 30000, np.uint16)
    graph = b.graph(b.op("Conv", x, w, kernel_shape=(1, 1)))
    made = absorbed(graph)
    assert isinstance(made.constants[made.nodes[-1].inputs[1]], QWeight)
    assert ops(made) == ["QuantizeLinear:f32", "DequantizeLinear:f32", "Conv:f32"]
    agrees(graph, made, tolerance=1e-5)


def test_byte_inputs_and_outputs_keep_their_nodes() -> None:
    b = Quantized()
    x = b.dq(b.input(2, 3, 6, 6, dtype="u8"), 0.03, 2)
    graph = b.graph(b.q(b.op("Conv", x, b.weight(4, 3, 1, 1), kernel_shape=(1, 1)), 0.005, 100))
    made = absorbed(graph)
    assert ops(made) == ["DequantizeLinear:f32", "Conv:int8", "QuantizeLinear:f32"]
    inputs = {"x": np.random.default_rng(0).integers(0, 6, (2, 3, 6, 6)).astype(np.uint8)}
    expected, found = (f(g, inputs)[graph.outputs[0]] for f, g in ((run_reference, graph), (simulate, made)))
    assert found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= 1


def test_one_value_quantized_in_two_ways() -> None:
    b = Quantized()
    x = b.input(2, 3, 6, 6)
    parts = [b.op("Conv", b.qdq(x, s, 128), b.weight(4, 3, 1, 1), kernel_shape=(1, 1)) for s in (0.03, 0.3)]
    graph = b.graph(*parts)
    made = absorbed(graph)
    assert [n.precision for n in made if n.op == "Conv"] == ["int8", "int8"]
    agrees(graph, made, tolerance=1e-4)


def test_graphs_without_such_nodes_and_bad_scales() -> None:
    b = Quantized()
    graph = b.graph(b.op("Relu", b.input(2)))
    assert not absorb_weights(graph)
    b = Quantized()
    graph = b.graph(b.qdq(b.input(2), -1.0))
    with pytest.raises(QuantizationError, match=r"node 'n_.*scales must be finite and above zero"):
        absorb_qdq(graph)


@pytest.mark.parametrize("name", ["qdq_cnn", "qoperator_cnn"])
@pytest.mark.parametrize("passes", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_models(name: str, passes: bool, seed: int) -> None:
    models: Any = pytest.importorskip("tests.graph.models")
    from vnnigen.graph.importer import import_model

    model = models.BUILDERS[name](seed=seed)
    graph = import_model(model)
    infer(graph)
    made = absorbed(graph, passes)
    assert {n.precision for n in made if n.op in ("Conv", "Linear")} == {"int8"}
    if passes:
        left = {n.op for n in made if n.precision == "f32"}
        assert left <= {"QuantizeLinear", "DequantizeLinear"}
    inputs: dict[str, npt.NDArray[Any]] = models.feeds(model, seed=seed)
    expected, found = run_reference(graph, inputs), simulate(made, inputs)
    for output in graph.outputs:
        np.testing.assert_allclose(found[output], expected[output], atol=0.051)
        assert np.mean(np.abs(found[output] - expected[output]) > 0.02) < 0.1
