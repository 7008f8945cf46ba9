"""fuse_patterns and fuse_layer_norm: what exporters write out."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from tests.graph.pass_helpers import Build, check
from vnnigen.graph.passes.fuse_layer_norm import fuse_layer_norm
from vnnigen.graph.passes.fuse_patterns import fuse_patterns

K = float(np.sqrt(2 / np.pi))


def gate(b: Build, x: str, *, divide: bool = True) -> str:
    scaled = b.op("Div", x, b.const(np.sqrt(2))) if divide else b.op("Mul", b.const(np.sqrt(0.5)), x)
    return b.op("Add", b.op("Erf", scaled), b.const(1))


def tanh_gate(b: Build, argument: str) -> str:
    return b.op("Add", b.const(1), b.op("Tanh", argument))


def relu6(b: Build, x: str) -> str:
    return b.op("Clip", b.op("Add", x, b.const(3)), b.const(0), b.const(6))


def cubic(b: Build, x: str) -> str:
    cube = b.op("Mul", b.op("Pow", x, b.const(3)), b.const(0.044715))
    return b.op("Mul", b.op("Add", x, cube), b.const(K))


def factored(b: Build, x: str) -> str:
    square = b.op("Mul", b.op("Mul", x, x), b.const(0.044715))
    return b.op("Mul", b.op("Mul", x, b.const(0.7978845)), b.op("Add", b.const(1), square))


Maker = Callable[[Build, str], str]
PATTERNS: dict[str, tuple[str, Maker]] = {
    "gelu of PyTorch": ("Gelu", lambda b, x: b.op("Mul", b.op("Mul", x, gate(b, x)), b.const(0.5))),
    "gelu, half first": ("Gelu", lambda b, x: b.op("Mul", b.op("Mul", b.const(0.5), x), gate(b, x, divide=False))),
    "gelu, half of the gate": ("Gelu", lambda b, x: b.op("Mul", b.op("Mul", gate(b, x), b.const(0.5)), x)),
    "gelu, divided by 2": ("Gelu", lambda b, x: b.op("Div", b.op("Mul", gate(b, x), x), b.const(2))),
    "gelu tanh": ("Gelu", lambda b, x: b.op("Mul", b.op("Mul", x, tanh_gate(b, cubic(b, x))), b.const(0.5))),
    "gelu tanh, factored": (
        "Gelu", lambda b, x: b.op("Mul", b.op("Mul", b.const(0.5), x), tanh_gate(b, factored(b, x))),
    ),
    "silu": ("Silu", lambda b, x: b.op("Mul", b.op("Sigmoid", x), x)),
    "hard swish": ("HardSwish", lambda b, x: b.op("Mul", x, b.op("HardSigmoid", x, alpha=1 / 6, beta=0.5))),
    "hard swish, divided last": ("HardSwish", lambda b, x: b.op("Div", b.op("Mul", x, relu6(b, x)), b.const(6))),
    "hard swish, divided first": ("HardSwish", lambda b, x: b.op("Mul", b.op("Div", relu6(b, x), b.const(6)), x)),
    "hard swish, times 1/6": ("HardSwish", lambda b, x: b.op("Mul", x, b.op("Mul", relu6(b, x), b.const(1 / 6)))),
    "hard sigmoid": ("HardSigmoid", lambda b, x: b.op("Div", relu6(b, x), b.const(6))),
}  # fmt: skip
OTHERS: dict[str, Maker] = {
    "another erf": lambda b, x: b.op("Mul", b.op("Mul", x, gate(b, b.op("Abs", x))), b.const(0.5)),
    "another factor": lambda b, x: b.op("Mul", b.op("Mul", x, gate(b, x)), b.const(0.6)),
    "a sigmoid of something else": lambda b, x: b.op("Mul", b.op("Sigmoid", b.op("Abs", x)), x),
    "another slope": lambda b, x: b.op("Mul", x, b.op("HardSigmoid", x, alpha=0.2, beta=0.5)),
    "a half that adds a dimension": lambda b, x: b.op("Mul", b.op("Mul", x, gate(b, x)), b.const([[[[0.5]]]])),
}


@pytest.mark.parametrize(("op", "make"), PATTERNS.values(), ids=PATTERNS)
@pytest.mark.parametrize("inside", [True, False])
def test_activations(op: str, make: Maker, inside: bool) -> None:
    b = Build()
    x = b.op("Abs", b.input(2, "length", 5)) if inside else b.input(2, "length", 5)
    y = make(b, x)
    graph = b.graph(b.op("Neg", y) if inside else y)
    assert check(graph, fuse_patterns) == (["Abs", op, "Neg"] if inside else [op])


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
def test_other_expressions_stay(make: Maker) -> None:
    b = Build()
    check(b.graph(make(b, b.input(2, 5, 4))), fuse_patterns, changes=0)


def test_values_between_that_are_needed() -> None:
    b = Build()
    x = b.input(2, 3)
    y = b.op("Sigmoid", x)
    check(b.graph(b.op("Mul", x, y), y), fuse_patterns, changes=0)


# Layer normalization.


def centred(b: Build, x: str, axes: tuple[int, ...], keepdims: int = 1) -> tuple[str, str, str]:
    mean = b.op("ReduceMean", x, b.ints(*axes), keepdims=keepdims)
    d = b.op("Sub", x, mean)
    variance = b.op("ReduceMean", b.op("Pow", d, b.const(2)), b.ints(*axes), keepdims=keepdims)
    return mean, d, b.op("Sqrt", b.op("Add", variance, b.const(1e-5)))


@pytest.mark.parametrize("axes", [(-1,), (2,), (1, 2), (-1, -2)])
@pytest.mark.parametrize("form", ["bare", "scale", "scale and bias", "bias"])
def test_layer_norm(axes: tuple[int, ...], form: str) -> None:
    b = Build()
    _, d, root = centred(b, b.input("batch", 3, 5), axes)
    y = b.op("Div", d, root)
    shape = (5,) if len(axes) == 1 else (3, 5)
    y = b.op("Mul", b.random(*shape), y) if "scale" in form else y
    y = b.op("Add", y, b.random(*shape)) if "bias" in form else y
    graph = b.graph(y)
    assert check(graph, fuse_layer_norm) == ["LayerNormalization"]
    assert graph.nodes[0].attrs["axis"] == -len(axes)


def test_layer_norm_of_tensorflow() -> None:
    b = Build()
    x = b.input("batch", 3, 5)
    mean, _, root = centred(b, x, (2,))
    factor = b.op("Mul", b.op("Reciprocal", root), b.random(5))
    y = b.op("Add", b.op("Mul", x, factor), b.op("Sub", b.random(5), b.op("Mul", mean, factor)))
    assert check(b.graph(y), fuse_layer_norm, changes=1) == ["LayerNormalization"]


def test_with_products_for_squares() -> None:
    b = Build()
    x = b.input(2, 5)
    d = b.op("Sub", x, b.op("ReduceMean", x, b.ints(1)))
    root = b.op("Sqrt", b.op("Add", b.op("ReduceMean", b.op("Mul", d, d), b.ints(-1)), b.const(1e-3)))
    y = b.op("Mul", d, b.op("Reciprocal", root))
    assert check(b.graph(y), fuse_layer_norm, changes=1) == ["LayerNormalization"]


@pytest.mark.parametrize("axes", [(1,), (0,), (0, 2)])
def test_other_axes_are_not_layer_norm(axes: tuple[int, ...]) -> None:
    b = Build()
    _, d, root = centred(b, b.input(2, 3, 5), axes)
    check(b.graph(b.op("Div", d, root)), fuse_layer_norm, changes=0)


def test_a_difference_that_is_needed() -> None:
    b = Build()
    _, d, root = centred(b, b.input(2, 5), (1,))
    check(b.graph(b.op("Div", d, root), d), fuse_layer_norm, changes=0)


def test_scale_that_is_not_of_the_normalized_dimensions() -> None:
    b = Build()
    _, d, root = centred(b, b.input(2, 3, 5), (2,))
    y = b.op("Mul", b.op("Div", d, root), b.random(3, 1))
    assert check(b.graph(y), fuse_layer_norm) == ["LayerNormalization", "Mul"]
