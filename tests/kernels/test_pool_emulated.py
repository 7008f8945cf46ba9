"""Pools whose windows overlap, by columns or not, on the emulator: bit-identical to the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from vnnigen.kernels.element.pooling import PoolProblem
from vnnigen.ops.pool import AvgPool2d, MaxPool2d

#: Windows, and whether columns of taps are taken together.
WINDOWS: list[tuple[tuple[int, ...], dict[str, Any], bool]] = [
    ((1, 6, 21, 64), {"kernel": 3, "stride": 1, "padding": 1}, True),
    ((1, 5, 9, 130), {"kernel": 3, "stride": 1}, True),
    ((2, 5, 30, 7), {"kernel": (5, 3), "stride": (2, 1), "padding": (2, 1)}, True),
    ((1, 4, 11, 20), {"kernel": (2, 3), "stride": 1, "padding": ((3, 3), (0, 2))}, True),  # rows without any tap
    ((1, 3, 40, 33), {"kernel": (3, 18), "stride": (1, 2), "padding": (1, 9)}, True),  # too wide to be written out
    ((1, 9, 13, 40), {"kernel": 3, "stride": 1, "padding": 2, "dilation": 2}, True),
    ((1, 9, 18, 70), {"kernel": 3, "stride": 2, "padding": 1}, False),
    ((1, 6, 18, 70), {"kernel": 2, "stride": 2}, False),
    ((1, 3, 12, 16), {"kernel": (1, 3), "stride": 1, "padding": (0, 1)}, False),
    ((1, 7, 7, 300), {"kernel": 7}, False),
]


@pytest.mark.parametrize("src", ["u8", "s8", "f32", "bf16"])
@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize(("shape", "window", "by_columns"), WINDOWS, ids=str)
def test_overlapping_windows(name: str, src: Any, shape: tuple[int, ...], window: Any, by_columns: bool) -> None:
    assert PoolProblem.from_arguments(shape, src, **window).by_columns == by_columns
    rng = np.random.default_rng(31)
    x = random_array(rng, shape, src)
    largest = MaxPool2d(isa="reference", **window)
    assert_same(emulate(largest, name, (x,), skew=1), largest(x), (name, "max"))
    for include in (False, True):
        mean = AvgPool2d(include_padding=include, isa="reference", **window)
        assert_same(emulate(mean, name, (x,), skew=1), mean(x), (name, include))


def test_a_zero_of_floats_is_positive() -> None:
    x = np.full((1, 4, 5, 3), -0.0, np.float32)
    for stride in (1, 3):
        y = AvgPool2d(3, stride=stride, padding=1, isa="reference")(x)
        assert not np.signbit(y).any()
