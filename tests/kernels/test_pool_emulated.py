"""Pools whose windows overlap, by columns or not, on the emulator: bit-identical to the reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.kernels.element_cases import TIERS, assert_same, emulate, random_array
from vnnigen.kernels.element.affine import make_affine
from vnnigen.kernels.element.pooling import Average, PoolProblem, WordAverage
from vnnigen.kernels.types import NUMPY
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


def word_average(p: PoolProblem, zero_point: int, y_scale: float, *, include: bool) -> WordAverage | None:
    f = make_affine(src=p.src, out=p.src, x_zero_point=zero_point, y_scale=y_scale, y_zero_point=zero_point)
    return WordAverage.of(p, Average.of(p, f, include), 128 if p.src == "s8" else 0)


@pytest.mark.parametrize("src", ["u8", "s8"])
def test_which_averages_fit_16_bits(src: Any) -> None:
    """Averages that keep scale and zero point do, of few taps; others may not, and must not be tried."""
    near = PoolProblem.from_arguments((1, 6, 6, 8), src, 3, 1, 1)
    for zero_point in (0, 5, 64):
        exclude = word_average(near, zero_point, 1.0, include=False)
        include = word_average(near, zero_point, 1.0, include=True)
        assert exclude is not None
        assert include is not None
        assert (exclude.mode, exclude.tie_counts) == ("odd" if zero_point % 2 else "even", (4, 6))
        assert include.tie_counts == ()
    assert word_average(near, 0, 0.9, include=False) is None
    assert word_average(PoolProblem.from_arguments((1, 20, 20, 8), src, 20), 0, 1.0, include=False) is None


@pytest.mark.parametrize("src", ["u8", "s8"])
@pytest.mark.parametrize("name", TIERS)
def test_averages_of_all_sums(name: str, src: Any) -> None:
    """Every sum of two and of four bytes, with ties to even and (an odd zero point) to odd, saturation near."""
    for width in (2, 4):
        sums = np.arange(255 * width + 1)
        taps = np.stack([np.clip(sums - 255 * k, 0, 255) for k in range(width)], axis=0)
        x = taps.reshape(1, 1, width, -1).astype(np.uint8)
        x = (x ^ 0x80).view(np.int8) if src == "s8" else x
        for zero_point in (0, 7):
            for out in (src, "f32"):
                q = {} if out == "f32" else {"y_zero_point": zero_point}
                mean = AvgPool2d(
                    (1, width),
                    out_dtype=NUMPY[out],
                    x_zero_point=zero_point,
                    isa="reference",
                    **q,  # type: ignore[arg-type]
                )
                assert_same(emulate(mean, name, (x,)), mean(x), (name, width, zero_point, out))


@pytest.mark.parametrize("src", ["u8", "f32"])
@pytest.mark.parametrize("name", TIERS)
@pytest.mark.parametrize("channels", [5, 40, 70])
@pytest.mark.parametrize(
    "window", [{"kernel": 3, "stride": 1, "padding": 1}, {"kernel": (2, 20), "stride": 1, "padding": (0, 9)}]
)
def test_gaps_between_pixels_are_not_touched(name: str, src: Any, channels: int, window: Any) -> None:
    x = random_array(np.random.default_rng(3), (2, 4, 7, channels), src)
    gap = 9
    for op in (MaxPool2d(isa="reference", **window), AvgPool2d(isa="reference", **window)):
        want = op(x)
        out = np.full((*want.shape[:-1], channels + gap), 0x5A, want.dtype)
        y = emulate(op, name, (x,), out, plan=lambda *types, op=op: op._pitched(*types, channels + gap))
        assert_same(y[..., :channels], want, (name, window))
        np.testing.assert_array_equal(y[..., channels:], out[..., channels:])
