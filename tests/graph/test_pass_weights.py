"""matmul_to_linear, fold_batch_norm, fuse_binary: what ends up in weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from tests.graph.pass_helpers import Build, check, steps
from vnnigen.graph.ir import Fused, Graph, QWeight, ValueQuant
from vnnigen.graph.passes.fold_batch_norm import fold_batch_norm
from vnnigen.graph.passes.fuse_binary import fuse_binary
from vnnigen.graph.passes.matmul_to_linear import matmul_to_linear

Maker = Callable[[Build, str], str]


def quantized_weights(b: Build, *shape: int) -> str:
    name = b.const(0)
    values = b.rng.integers(-127, 128, shape).astype(np.int8)
    scale = b.rng.uniform(0.01, 0.02, shape[0]).astype(np.float32)
    b.made.constants[name] = QWeight(values, scale, np.zeros(shape[0], np.int32), 0)
    return name


# MatMul and Gemm.


@pytest.mark.parametrize("shape", [(2, 5), ("batch", "length", 5), (2, 3, 4, 5)])
@pytest.mark.parametrize("bias", [None, (7,), (1, 7), (1,)])
def test_matmul(shape: tuple[int | str, ...], bias: tuple[int, ...] | None) -> None:
    b = Build()
    y = b.op("MatMul", b.input(*shape), b.random(5, 7))
    y = b.op("Add", b.random(*bias), y) if bias else y
    graph = b.graph(y)
    assert check(graph, matmul_to_linear, changes=2 if bias else 1) == ["Linear"]
    assert bool(graph.nodes[0].inputs[2]) == (bias is not None)


@pytest.mark.parametrize("trans", [0, 1])
@pytest.mark.parametrize("alpha", [1.0, 0.5])
@pytest.mark.parametrize("bias", [None, (), (7,), (1, 7), (1, 1)])
def test_gemm(trans: int, alpha: float, bias: tuple[int, ...] | None) -> None:
    b = Build()
    inputs = [
        b.input("batch", 5),
        b.random(*((7, 5) if trans else (5, 7))),
        *([] if bias is None else [b.random(*bias)]),
    ]
    graph = b.graph(b.op("Gemm", *inputs, transB=trans, alpha=alpha, beta=3.0))
    assert check(graph, matmul_to_linear, changes=1) == ["Linear"]


def test_gemm_with_quantized_weights() -> None:
    """They are transposed, with the axis of their scales, but not scaled."""
    b = Build()
    x = b.input(3, 5)
    graph = b.graph(b.op("Gemm", x, quantized_weights(b, 7, 5), b.random(7), transB=1))
    assert check(graph, matmul_to_linear, changes=1) == ["Linear"]
    assert isinstance(graph.constants[graph.nodes[0].inputs[1]], QWeight)
    b = Build()
    x = b.input(3, 5)
    check(b.graph(b.op("Gemm", x, quantized_weights(b, 7, 5), transB=1, alpha=0.5)), matmul_to_linear, changes=0)


NOT_LINEAR: dict[str, Maker] = {
    "a stack of matrices": lambda b, x: b.op("MatMul", x, b.random(3, 5, 2)),
    "a constant on the left": lambda b, x: b.op("MatMul", b.random(2, 4), x),
    "two activations": lambda b, x: b.op("MatMul", x, b.op("Transpose", x, perm=(0, 2, 1))),
    "a vector": lambda b, x: b.op("MatMul", x, b.random(5)),
}


@pytest.mark.parametrize("make", NOT_LINEAR.values(), ids=NOT_LINEAR)
def test_matmul_that_is_not_linear(make: Maker) -> None:
    b = Build()
    check(b.graph(make(b, b.input(3, 4, 5))), matmul_to_linear, changes=0)


@pytest.mark.parametrize("bias", [(3, 7), (3, 1)])
def test_gemm_with_a_bias_per_row(bias: tuple[int, ...]) -> None:
    b = Build()
    check(b.graph(b.op("Gemm", b.input(3, 5), b.random(5, 7), b.random(*bias))), matmul_to_linear, changes=0)


def test_a_stack_of_one_matrix() -> None:
    b = Build()
    assert check(b.graph(b.op("MatMul", b.input(2, 3, 5), b.random(1, 5, 7))), matmul_to_linear) == ["Linear"]


@pytest.mark.parametrize("bias", [(3, 1), (2, 1, 7), (3, 7)])
def test_an_add_that_is_no_bias(bias: tuple[int, ...]) -> None:
    b = Build()
    y = b.op("Add", b.op("MatMul", b.input(1, 3, 5), b.random(5, 7)), b.random(*bias))
    assert check(b.graph(y), matmul_to_linear, changes=1) == ["Linear", "Add"]


# BatchNormalization.


BEFORE_NORM: dict[str, Maker] = {
    "conv": lambda b, x: b.conv(x, 4, 6, k=3, pad=1),
    "conv without bias": lambda b, x: b.conv(x, 4, 6, bias=False),
    "conv in groups": lambda b, x: b.conv(x, 4, 6, group=2),
    "transposed conv": lambda b, x: b.op("ConvTranspose", x, b.random(4, 6, 2, 2), b.random(6), strides=(2, 2)),
    "transposed conv in groups": lambda b, x: b.op("ConvTranspose", x, b.random(4, 3, 2, 2), group=2),
}


@pytest.mark.parametrize("make", BEFORE_NORM.values(), ids=BEFORE_NORM)
def test_norm_folds_into_what_is_before(make: Maker) -> None:
    b = Build()
    y = make(b, b.input("batch", 4, 5, 6))
    graph = b.graph(b.norm(y, 6))
    assert len(check(graph, fold_batch_norm, changes=1)) == 1
    assert graph.producers()[graph.outputs[0]].name == f"n_{y}"


def test_norm_of_a_1d_conv_and_of_a_linear() -> None:
    b = Build()
    y = b.op("Conv", b.input(2, 4, 9), b.random(6, 4, 3), pads=(1, 1))
    assert check(b.graph(b.norm(y, 6)), fold_batch_norm) == ["Conv"]
    b = Build()
    y = b.op("Linear", b.input(3, 5), b.random(5, 7), "")
    assert check(b.graph(b.norm(y, 7)), fold_batch_norm) == ["Linear"]


def test_norm_over_another_dimension_than_the_features() -> None:
    b = Build()
    y = b.op("Linear", b.input(2, 7, 5), b.random(5, 7), "")
    assert check(b.graph(b.norm(y, 7)), fold_batch_norm) == ["Linear", "Mul", "Add"]


AFTER_NORM: dict[str, tuple[Maker, bool]] = {
    "conv": (lambda b, x: b.conv(x, 4, 6, k=3), True),
    "conv in groups": (lambda b, x: b.conv(x, 4, 6, group=2), True),
    "depthwise conv": (lambda b, x: b.conv(x, 4, 4, k=3, group=4), True),
    "conv with padding": (lambda b, x: b.conv(x, 4, 6, k=3, pad=1), False),
    "conv with automatic padding": (lambda b, x: b.op("Conv", x, b.random(6, 4, 3, 3), auto_pad="SAME_UPPER"), False),
    "relu": (lambda b, x: b.op("Relu", x), False),
}


@pytest.mark.parametrize(("make", "folds"), AFTER_NORM.values(), ids=AFTER_NORM)
def test_norm_folds_into_what_is_behind(make: Maker, folds: bool) -> None:
    b = Build()
    graph = b.graph(make(b, b.norm(b.input(2, 4, 5, 6), 4)))
    ops = check(graph, fold_batch_norm, changes=1)
    assert (ops == ["Conv"]) if folds else (ops[:2] == ["Mul", "Add"])
    if not folds:
        assert graph.shape(graph.nodes[0].inputs[1]) == (4, 1, 1)


def test_padding_gets_no_offset_but_may_get_a_factor() -> None:
    b = Build()
    factor = [b.random(4), b.const(np.zeros(4)), b.const(np.zeros(4)), b.random(4, low=0.5)]
    y = b.op("BatchNormalization", b.input(2, 4, 5, 6), *factor)
    assert check(b.graph(b.conv(y, 4, 6, k=3, pad=1)), fold_batch_norm) == ["Conv"]


def test_norm_before_a_linear() -> None:
    b = Build()
    y = b.op("Linear", b.norm(b.input(3, 5), 5), b.random(5, 7), b.random(7))
    assert check(b.graph(y), fold_batch_norm) == ["Linear"]


def test_norm_of_a_value_that_is_needed() -> None:
    b = Build()
    y = b.conv(b.input(2, 4, 5, 6), 4, 6)
    assert check(b.graph(b.norm(y, 6), y), fold_batch_norm) == ["Conv", "Mul", "Add"]


def test_norm_with_two_readers() -> None:
    b = Build()
    y = b.norm(b.op("Abs", b.input(2, 4, 5, 6)), 4)
    graph = b.graph(b.conv(y, 4, 6), b.conv(y, 4, 6))
    assert check(graph, fold_batch_norm) == ["Abs", "Mul", "Add", "Conv", "Conv"]


def test_norm_with_computed_parameters() -> None:
    b = Build()
    y = b.conv(b.input(2, 4, 5, 6), 4, 3)
    scale = b.input(3, name="scale")
    out = b.op("BatchNormalization", y, scale, *(b.random(3, low=0.5) for _ in range(3)))
    check(b.graph(out), fold_batch_norm, changes=0)


def with_steps(graph: Graph, *fused: Fused) -> Graph:
    graph.nodes[0] = replace(graph.nodes[0], fused=fused)
    return graph


def test_norm_behind_an_activation() -> None:
    b = Build()
    graph = with_steps(b.graph(b.norm(b.conv(b.input(2, 4, 5, 6), 4, 6), 6)), Fused("Relu"))
    assert check(graph, fold_batch_norm) == ["Conv", "Mul", "Add"]
    assert check(graph, fuse_binary) == ["Conv"]
    assert steps(graph) == ["Relu", "Mul", "Add"]


def test_quantized_weights_are_left_alone() -> None:
    b = Build()
    x = b.input(2, 4, 5, 6)
    y = b.op("Conv", x, quantized_weights(b, 6, 4, 1, 1))
    assert check(b.graph(b.norm(y, 6)), fold_batch_norm) == ["Conv", "Mul", "Add"]


# Arithmetic with constants.


CHAINS: dict[str, Maker] = {
    "factors": lambda b, y: b.op("Div", b.op("Mul", y, b.random(6, 1, 1)), b.random(1, 6, 1, 1, low=0.5)),
    "offsets": lambda b, y: b.op("Sub", b.op("Add", b.random(6, 1, 1), y), b.random(6, 1, 1)),
    "one for all": lambda b, y: b.op("Add", b.op("Mul", y, b.const([[[3.0]]])), b.const(-2.0)),
    "subtracted from": lambda b, y: b.op("Sub", b.random(6, 1, 1), y),
    "norms": lambda b, y: b.op("Mul", b.norm(b.op("Mul", b.norm(y, 6), b.random(6, 1, 1)), 6), b.const(2)),
}


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
@pytest.mark.parametrize("transposed", [False, True])
def test_arithmetic_folds_into_weights(make: Maker, transposed: bool) -> None:
    b = Build()
    x = b.input("batch", 4, 5, 5)
    y = b.op("ConvTranspose", x, b.random(4, 6, 3, 3)) if transposed else b.conv(x, 4, 6, k=3, pad=1)
    graph = b.graph(make(b, y))
    assert len(check(graph, fold_batch_norm, fuse_binary)) == 1
    assert not steps(graph)


@pytest.mark.parametrize("make", CHAINS.values(), ids=CHAINS)
def test_arithmetic_behind_an_activation_becomes_steps(make: Maker) -> None:
    b = Build()
    graph = with_steps(b.graph(make(b, b.conv(b.input(2, 4, 5, 6), 4, 6))), Fused("Tanh"))
    assert check(graph, fold_batch_norm, fuse_binary) == ["Conv"]
    assert set(steps(graph)) <= {"Tanh", "Mul", "Add"}
    operands = [graph.shape(graph.nodes[0].inputs[s.operand]) for s in graph.nodes[0].fused if s.operand is not None]
    assert set(operands) == {(6,)}


def test_linear_takes_vectors() -> None:
    b = Build()
    y = b.op("Linear", b.input(2, "length", 5), b.random(5, 7), "")
    graph = b.graph(b.op("Mul", b.op("Add", y, b.random(7)), b.random(1, 1, 7)))
    assert check(graph, fuse_binary, changes=2) == ["Linear"]


def test_a_product_of_activations_takes_one_factor() -> None:
    b = Build()
    y = b.op("MatMul", b.input(2, 3, "length", 5), b.input(2, 3, 5, "length", name="k"))
    graph = b.graph(b.op("Div", y, b.const(np.sqrt(5))))
    assert check(graph, fuse_binary, changes=1) == ["MatMul"]
    b = Build()
    y = b.op("MatMul", b.input(2, 4, 5), b.input(2, 5, 3, name="k"))
    check(b.graph(b.op("Mul", y, b.random(3))), fuse_binary, changes=0)


def test_elementwise_takes_constants() -> None:
    """A normalization that nothing takes is a node and a step."""
    b = Build()
    graph = b.graph(b.norm(b.op("Concat", b.input(2, 4, 5, 6), "x", axis=1), 8))
    assert check(graph, fold_batch_norm, fuse_binary) == ["Concat", "Mul"]
    assert steps(graph) == ["Add"]


UNFIT: dict[str, Maker] = {
    "per pixel": lambda b, y: b.op("Mul", y, b.random(6)),
    "per row": lambda b, y: b.op("Add", y, b.random(5, 1)),
    "per image": lambda b, y: b.op("Add", y, b.random(2, 1, 1, 1)),
    "of all dimensions": lambda b, y: b.op("Add", y, b.random(6, 5, 6)),
    "more dimensions": lambda b, y: b.op("Mul", y, b.const([[[[[2.0]]]]])),
    "a divisor of zero": lambda b, y: b.op("Div", y, b.const([[[1]], [[0]], [[1]], [[1]], [[1]], [[1]]])),
    "divided by": lambda b, y: b.op("Div", b.const(1.0), y),
    "an overflow": lambda b, y: b.op("Mul", b.op("Mul", y, b.const(1e-30)), b.const(np.inf)),
}


@pytest.mark.parametrize("make", UNFIT.values(), ids=UNFIT)
@pytest.mark.parametrize("fused", [(), (Fused("Relu"),)], ids=["weights", "steps"])
def test_other_constants_stay(make: Maker, fused: tuple[Fused, ...]) -> None:
    b = Build()
    graph = with_steps(b.graph(make(b, b.conv(b.input(2, 4, 5, 6), 4, 6))), *fused)
    assert len(check(graph, fuse_binary)) == 2


def test_quantized_weights_take_an_offset_only() -> None:
    for op, count in (("Add", 1), ("Mul", 1)):
        b = Build()
        x = b.input(2, 4, 5, 6)
        y = b.op("Conv", x, quantized_weights(b, 6, 4, 1, 1))
        graph = b.graph(b.op(op, y, b.random(6, 1, 1)))
        check(graph, fuse_binary, changes=count)
        assert isinstance(graph.constants[graph.nodes[0].inputs[1]], QWeight)
        assert steps(graph) == ([] if op == "Add" else ["Mul"])


def test_a_value_that_is_quantized_stays() -> None:
    b = Build()
    y = b.conv(b.input(2, 4, 5, 6), 4, 6)
    graph = b.graph(b.op("Mul", y, b.const(2)))
    graph.quant = {y: ValueQuant("u8", 0.1, 0)}
    check(graph, fuse_binary, changes=0)


def test_shared_weights_stay_for_the_other_node() -> None:
    b = Build()
    x, w = b.input(2, 4, 5, 6), b.random(6, 4, 1, 1)
    y = b.op("Mul", b.op("Conv", x, w), b.random(6, 1, 1))
    graph = b.graph(y, b.op("Conv", b.op("Abs", x), w))
    assert check(graph, fuse_binary, changes=1) == ["Conv", "Abs", "Conv"]
    assert w in graph.constants
