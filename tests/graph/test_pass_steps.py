"""fuse_activation, fuse_sum, fuse_pad."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.graph.pass_helpers import Build, check, steps
from vnnigen.graph.ir import ValueQuant
from vnnigen.graph.passes import run_passes
from vnnigen.graph.passes.fuse_activation import fuse_activation
from vnnigen.graph.passes.fuse_pad import fuse_pad
from vnnigen.graph.passes.fuse_sum import fuse_sum

Maker = Callable[[Build, str], str]
LOWEST = float(np.finfo(np.float32).min)

ACTIVATIONS: dict[str, tuple[Maker, list[str]]] = {
    "relu": (lambda b, y: b.op("Relu", y), ["Relu"]),
    "relu6": (lambda b, y: b.op("Clip", y, b.const(0), b.const(6)), ["Clip"]),
    "clip below": (lambda b, y: b.op("Clip", y, b.const(-1)), ["Clip"]),
    "clip above": (lambda b, y: b.op("Clip", y, "", b.const(1)), ["Clip"]),
    "clip at 0": (lambda b, y: b.op("Clip", y, b.const(0)), ["Relu"]),
    "leaky relu": (lambda b, y: b.op("LeakyRelu", y, alpha=0.2), ["LeakyRelu"]),
    "prelu, one slope": (lambda b, y: b.op("PRelu", y, b.const([0.3])), ["LeakyRelu"]),
    "prelu, equal slopes": (lambda b, y: b.op("PRelu", y, b.const(np.full((6, 1, 1), 0.3))), ["LeakyRelu"]),
    "hard swish": (lambda b, y: b.op("HardSwish", y), ["HardSwish"]),
    "sigmoid": (lambda b, y: b.op("Sigmoid", y), ["Sigmoid"]),
    "tanh": (lambda b, y: b.op("Tanh", y), ["Tanh"]),
    "gelu": (lambda b, y: b.op("Gelu", y), ["Gelu"]),
    "gelu by tanh": (lambda b, y: b.op("Gelu", y, approximate="tanh"), ["Gelu"]),
    "silu": (lambda b, y: b.op("Silu", y), ["Silu"]),
    "hard sigmoid": (lambda b, y: b.op("HardSigmoid", y, alpha=0.3, beta=0.4), ["Mul", "Add", "Clip"]),
    "two": (lambda b, y: b.op("Tanh", b.op("Relu", y)), ["Relu", "Tanh"]),
}
OTHER: dict[str, Maker] = {
    "slopes": lambda b, y: b.op("PRelu", y, b.random(6, 1, 1)),
    "bounds that are computed": lambda b, y: b.op("Clip", y, b.input(name="low")),
    "bounds that cross": lambda b, y: b.op("Clip", y, b.const(1), b.const(-1)),
    "elu": lambda b, y: b.op("Elu", y),
    "softmax": lambda b, y: b.op("Softmax", y),
}
HOSTS: dict[str, Maker] = {
    "conv": lambda b, x: b.conv(x, 6, 6, k=3, pad=1),
    "conv without bias": lambda b, x: b.conv(x, 6, 6, bias=False),
    "linear": lambda b, x: b.op("Linear", x, b.random(5, 7), ""),
    "matmul": lambda b, x: b.op("MatMul", x, b.op("Transpose", x, perm=(0, 1, 3, 2))),
    "add": lambda b, x: b.op("Add", x, b.op("Abs", x)),
}


@pytest.mark.parametrize(("make", "expected"), ACTIVATIONS.values(), ids=ACTIVATIONS)
@pytest.mark.parametrize("host", HOSTS.values(), ids=HOSTS)
def test_activations(make: Maker, expected: list[str], host: Maker) -> None:
    b = Build()
    y = host(b, b.input("batch", 6, 5, 5))
    graph = b.graph(make(b, y))
    check(graph, fuse_activation)
    assert steps(graph) == expected
    assert graph.nodes[-1].name == f"n_{y}"


@pytest.mark.parametrize("make", OTHER.values(), ids=OTHER)
def test_what_kernels_do_not_have_stays(make: Maker) -> None:
    b = Build()
    check(b.graph(make(b, b.conv(b.input(2, 4, 5, 5), 4, 6))), fuse_activation, changes=0)


def test_a_result_that_is_needed_stays() -> None:
    b = Build()
    y = b.conv(b.input(2, 4, 5, 5), 4, 6)
    check(b.graph(b.op("Relu", y), y), fuse_activation, changes=0)
    b = Build()
    y = b.conv(b.input(2, 4, 5, 5), 4, 6)
    check(b.graph(b.op("Concat", b.op("Relu", y), b.op("Neg", y), axis=1)), fuse_activation, changes=0)


def test_a_result_that_is_quantized_stays() -> None:
    b = Build()
    y = b.conv(b.input(2, 4, 5, 5), 4, 6)
    graph = b.graph(b.op("Relu", y))
    graph.quant = {y: ValueQuant("s8", 0.1, 0)}
    check(graph, fuse_activation, changes=0)


def test_pooling_takes_no_activation() -> None:
    b = Build()
    y = b.op("MaxPool", b.input(2, 4, 5, 5), kernel_shape=(2, 2))
    check(b.graph(b.op("Relu", y)), fuse_activation, changes=0)


# Sums.


@pytest.mark.parametrize("op", ["Add", "Sum"])
@pytest.mark.parametrize("swap", [False, True])
def test_a_residual_sum(op: str, swap: bool) -> None:
    b = Build()
    x = b.op("Abs", b.input("batch", 6, 5, 5))
    y = b.conv(x, 6, 6, bias=False)
    graph = b.graph(b.op(op, *((x, y) if swap else (y, x))))
    assert check(graph, fuse_sum, changes=1) == ["Abs", "Conv"]
    conv = graph.nodes[1]
    assert conv.inputs[2:] == ("", x)
    assert [s.operand for s in conv.fused] == [3]


@pytest.mark.parametrize("shortcut_last", [False, True])
def test_the_longer_branch_takes_the_sum(shortcut_last: bool) -> None:
    b = Build()
    x = b.input(2, 4, 5, 5)
    short = "" if shortcut_last else b.conv(x, 4, 6)
    long = b.conv(b.op("Tanh", b.conv(x, 4, 6)), 6, 6)
    short = b.conv(x, 4, 6) if shortcut_last else short
    graph = b.graph(b.op("Add", short, long))
    check(graph, fuse_sum, changes=1)
    assert graph.nodes[-1].name == f"n_{long}"
    assert short in graph.nodes[-1].inputs


def test_steps_before_and_behind_the_sum() -> None:
    b = Build()
    x = b.input("batch", 6, 5, 5)
    y = b.op("Add", x, b.op("Tanh", b.conv(x, 6, 6)))
    graph = b.graph(b.op("HardSigmoid", y))
    check(graph, fuse_activation, fuse_sum)
    assert steps(graph) == ["Tanh", "Add", "Mul", "Add", "Clip"]
    assert len(graph.nodes) == 1


def test_blocks_in_a_row() -> None:
    """Every block ends in one convolution; nothing is left of sums and activations."""
    b = Build()
    x = b.op("Relu", b.conv(b.input("batch", 6, 5, 5), 6, 6))
    for _ in range(3):
        y = b.norm(b.conv(b.op("Relu", b.norm(b.conv(x, 6, 6, k=3, pad=1), 6)), 6, 6, bias=False), 6)
        x = b.op("Relu", b.op("Add", y, x))
    graph = b.graph(x)
    check(graph, run_all)
    assert [n.op for n in graph] == ["Conv"] * 7
    assert steps(graph) == ["Add", "Relu"]


def run_all(graph: object) -> int:
    return len(run_passes(graph))  # type: ignore[arg-type]


def test_sums_that_must_stay() -> None:
    def broadcast(b: Build, x: str) -> tuple[str, ...]:
        return (b.op("Add", b.conv(x, 6, 6), b.op("GlobalAveragePool", x)),)

    def broadcast_into(b: Build, x: str) -> tuple[str, ...]:
        return (b.op("Add", x, b.conv(b.op("GlobalAveragePool", x), 6, 6)),)

    def needed(b: Build, x: str) -> tuple[str, ...]:
        y = b.conv(x, 6, 6)
        return b.op("Add", x, y), y

    def twice(b: Build, x: str) -> tuple[str, ...]:
        y = b.conv(x, 6, 6)
        return (b.op("Add", y, y),)

    def through(b: Build, x: str) -> tuple[str, ...]:
        y = b.conv(x, 6, 6)
        return (b.op("Add", y, b.op("Abs", y)),)

    def constant(b: Build, x: str) -> tuple[str, ...]:
        return (b.op("Add", b.conv(x, 6, 6), b.random(2, 6, 5, 5)),)

    def three(b: Build, x: str) -> tuple[str, ...]:
        return (b.op("Sum", x, b.conv(x, 6, 6), b.op("Abs", x)),)

    def not_a_host(b: Build, x: str) -> tuple[str, ...]:
        return (b.op("Add", x, b.op("Abs", x)),)

    for make in (broadcast, broadcast_into, needed, twice, through, constant, three, not_a_host):
        b = Build()
        check(b.graph(*make(b, b.input(2, 6, 5, 5))), fuse_sum, changes=0)


def test_as_many_sums_as_a_kernel_takes() -> None:
    b = Build()
    x = b.input(2, 6, 5, 5)
    y = b.conv(x, 6, 6)
    for _ in range(6):
        y = b.op("Add", y, b.op("Abs", x))
    graph = b.graph(y)
    check(graph, fuse_sum, changes=4)


# Padding.


def pad(b: Build, x: str, *amounts: int, value: float | None = 0.0, axes: tuple[int, ...] = (), **attrs: str) -> str:
    extra = [] if value is None else [b.const(value)]
    if axes:
        extra = [*(extra or [""]), b.ints(*axes)]
    return b.op("Pad", x, b.ints(*amounts), *extra, **attrs)


FITTING: dict[str, Maker] = {
    "conv": lambda b, x: b.conv(pad(b, x, 0, 0, 1, 2, 0, 0, 2, 0), 6, 4, k=3),
    "conv, padded": lambda b, x: b.conv(pad(b, x, 0, 0, 1, 1, 0, 0, 1, 1, value=None), 6, 4, k=5, pad=1),
    "conv, axes": lambda b, x: b.conv(pad(b, x, 1, 2, 2, 1, axes=(-1, 2)), 6, 4, k=3),
    "conv, valid": lambda b, x: b.op(
        "Conv", pad(b, x, 0, 0, 1, 1, 0, 0, 0, 1), b.random(4, 6, 3, 3), auto_pad="VALID", strides=(2, 2)
    ),
    "average": lambda b, x: b.op("AveragePool", pad(b, x, 0, 0, 1, 1, 0, 0, 1, 1), kernel_shape=(3, 3)),
    "average, padded": lambda b, x: b.op(
        "AveragePool", pad(b, x, 0, 0, 1, 1, 0, 0, 0, 1), kernel_shape=(3, 3), pads=(0, 0, 1, 1), count_include_pad=1
    ),
    "maximum": lambda b, x: b.op(
        "MaxPool", pad(b, x, 0, 0, 1, 1, 0, 0, 0, 1, value=-np.inf), kernel_shape=(3, 3), strides=(2, 2)
    ),
    "maximum, lowest": lambda b, x: b.op(
        "MaxPool", pad(b, x, 0, 0, 0, 0, 0, 0, 1, 1, value=LOWEST), kernel_shape=(2, 2)
    ),
    "maximum of what is not negative": lambda b, x: b.op(
        "MaxPool", pad(b, b.op("Relu", x), 0, 0, 1, 1, 0, 0, 1, 1), kernel_shape=(3, 3)
    ),
}
UNFIT: dict[str, Maker] = {
    "another value": lambda b, x: b.conv(pad(b, x, 0, 0, 1, 1, 0, 0, 1, 1, value=1.0), 6, 4, k=3),
    "reflected": lambda b, x: b.conv(pad(b, x, 0, 0, 1, 1, 0, 0, 1, 1, mode="reflect"), 6, 4, k=3),
    "channels": lambda b, x: b.conv(pad(b, x, 0, 1, 0, 0, 0, 1, 0, 0), 8, 4, k=3),
    "cut": lambda b, x: b.conv(pad(b, x, 0, 0, -1, 1, 0, 0, 1, 1), 6, 4, k=3),
    "as wide as the kernel": lambda b, x: b.conv(pad(b, x, 0, 0, 3, 0, 0, 0, 0, 0), 6, 4, k=3),
    "automatic": lambda b, x: b.op(
        "Conv", pad(b, x, 0, 0, 1, 1, 0, 0, 1, 1), b.random(4, 6, 3, 3), auto_pad="SAME_UPPER"
    ),
    "zeros in a maximum": lambda b, x: b.op("MaxPool", pad(b, x, 0, 0, 1, 1, 0, 0, 1, 1), kernel_shape=(3, 3)),
    "an average that skips its own padding": lambda b, x: b.op(
        "AveragePool", pad(b, x, 0, 0, 1, 1, 0, 0, 0, 0), kernel_shape=(3, 3), pads=(0, 0, 1, 1)
    ),
    "partial windows": lambda b, x: b.op(
        "AveragePool", pad(b, x, 0, 0, 1, 1, 0, 0, 0, 0), kernel_shape=(3, 3), strides=(2, 2), ceil_mode=1
    ),
}


@pytest.mark.parametrize("make", FITTING.values(), ids=FITTING)
def test_padding_that_fits(make: Maker) -> None:
    b = Build()
    ops = check(b.graph(make(b, b.input("batch", 6, 7, 8))), fuse_pad, changes=1)
    assert "Pad" not in ops


@pytest.mark.parametrize("make", UNFIT.values(), ids=UNFIT)
def test_padding_that_does_not(make: Maker) -> None:
    b = Build()
    check(b.graph(make(b, b.input(2, 6, 7, 8))), fuse_pad, changes=0)


def test_padding_with_several_readers() -> None:
    b = Build()
    y = pad(b, b.input(2, 6, 7, 8), 0, 0, 1, 1, 0, 0, 1, 1)
    graph = b.graph(b.conv(y, 6, 4, k=3), b.conv(y, 6, 4, k=1))
    assert check(graph, fuse_pad, changes=1) == ["Pad", "Conv", "Conv"]


def test_steps_of_elementwise_nodes_move_on() -> None:
    """Arithmetic that fused before the convolution could take it is taken with all its steps."""
    b = Build()
    y = b.op("HardSwish", b.conv(b.input(2, 6, 5, 5), 6, 6))
    graph = b.graph(b.op("Relu", b.op("Add", b.op("Mul", y, b.const([1.5])), b.random(6, 1, 1))))
    check(graph, run_all)
    assert [n.op for n in graph] == ["Conv"]
    assert steps(graph) == ["HardSwish", "Mul", "Add", "Relu"]


def test_constants_of_elementwise_nodes_have_all_dimensions() -> None:
    """A vector alone would be taken for one along another dimension where images lie channels last."""
    b = Build()
    y = b.op("Mul", b.input(2, 5, 4, 5), b.random(5, 1, 1))
    graph = b.graph(b.op("Add", y, b.random(5)))
    check(graph, run_all)
    (mul,) = graph.nodes
    assert graph.shape(mul.inputs[2]) == (1, 1, 1, 5)
