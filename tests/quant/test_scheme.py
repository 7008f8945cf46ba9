"""Choices and what they mean for a value."""

from __future__ import annotations

from typing import Any

import pytest

from tests.graph.pass_helpers import Build
from vnnigen.errors import QuantizationError
from vnnigen.graph.ir import Node, ValueQuant
from vnnigen.quant.scheme import QuantConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("activations", "signed"), ("weights", "row"), ("weights", None), ("method", "mse"), ("first", "u4"),
        ("last", "u8"), ("percentile", 50), ("percentile", 100.5), ("percentile", True), ("percentile", float("nan")),
        ("bias_correction", 1), ("equalization", None),
        ("overrides", ["Conv"]), ("overrides", {"Conv": "u8"}), ("overrides", {"": "f32"}),
    ],
)  # fmt: skip
def test_bad_choices_are_named(field: str, value: Any) -> None:
    with pytest.raises(QuantizationError, match=field):
        QuantConfig(**{field: value})


def test_the_last_override_that_matches_counts() -> None:
    config = QuantConfig(overrides={"block1/*": "f32", "Conv": "bf16", "block1/conv2": "int8"})

    def override(name: str, op: str) -> str | None:
        found = config.override(Node(name, op, (), ()))
        return None if found is None else found[0]

    assert override("block1/conv1", "Conv") == "bf16"
    assert override("block1/conv2", "Conv") == "int8"
    assert override("block1/pool", "MaxPool") == "f32"
    assert override("block2/pool", "MaxPool") is None


def test_patterns_that_match_nothing_are_refused() -> None:
    b = Build()
    graph = b.graph(b.op("Relu", b.input(2)))
    QuantConfig(overrides={"Re*": "f32"}).check_patterns(graph)
    with pytest.raises(QuantizationError, match=r"matches 'block\*'"):
        QuantConfig(overrides={"Re*": "f32", "block*": "f32"}).check_patterns(graph)


@pytest.mark.parametrize(
    ("activations", "low", "high", "dtype", "expected"),
    [
        ("asymmetric", -1, 254, None, ValueQuant("u8", 1.0, 1)),
        ("asymmetric", 0, 255, None, ValueQuant("u8", 1.0, 0)),
        ("asymmetric", 100, 255, None, ValueQuant("u8", 1.0, 0)),
        ("asymmetric", -128, 127, "s8", ValueQuant("s8", 1.0, 0)),
        ("symmetric", 0, 255, None, ValueQuant("u8", 1.0, 0)),
        ("symmetric", -127, 3, None, ValueQuant("s8", 1.0, 0)),
        ("symmetric", -3, 127, "u8", ValueQuant("u8", 1.0, 128)),
        ("asymmetric", 0, 0, None, ValueQuant("u8", 1.0, 0)),
    ],
)
def test_value_quant(activations: Any, low: float, high: float, dtype: Any, expected: ValueQuant) -> None:
    assert QuantConfig(activations).value_quant(low, high, dtype) == expected
