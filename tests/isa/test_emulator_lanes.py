"""Lane arithmetic against exact rational arithmetic; needs no x86 processor."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vnnigen.isa.lanes import f32_to_bf16, flush, fma, nan_rule, saturate
from vnnigen.isa.registry import MNEMONICS

FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False)
# Sums near the smallest normal number and among the denormals, where the ties are at other places.
_TINY = st.builds(lambda m, e: float(np.float32(m * 2.0**e)), st.integers(-1023, 1023), st.integers(-149, -120))
_SMALL = st.builds(lambda m, e: m * 2.0**e, st.integers(-4095, 4095), st.integers(-85, -60))


def round_f32(x: Fraction) -> np.float32:
    """Round an exact value to float32: nearest, ties to even, denormals kept."""
    if x == 0:
        return np.float32(0)
    magnitude = abs(x)
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, -126) - 23)
    value = round(magnitude / unit) * unit  # Python rounds Fractions half to even
    if value >= Fraction(2) ** 128:
        return np.float32(np.inf if x > 0 else -np.inf)
    return np.float32(float(value)) * np.sign(np.float32(x))


def f32(x: float) -> np.ndarray:
    return np.array([x], np.float32)


@given(st.one_of(FINITE, _SMALL), st.one_of(FINITE, _SMALL), st.one_of(FINITE, _TINY))
@example(1 + 2.0**-12, 1 + 2.0**-12, 2.0**-80)  # just above a tie
@example(1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-80))  # just below
@example(1.5 * 2.0**-75, 2.0**-75, 2.0**-149)
def test_fma_rounds_once(a: float, b: float, c: float) -> None:
    with np.errstate(all="ignore"):
        got = fma(f32(a), f32(b), f32(c))[0]
    assert got == round_f32(Fraction(a) * Fraction(b) + Fraction(c))


@given(_SMALL, _SMALL, _TINY)
def test_fma_rounds_once_among_denormals(a: float, b: float, c: float) -> None:
    with np.errstate(all="ignore"):
        got = fma(f32(a), f32(b), f32(c))[0]
    assert got == round_f32(Fraction(a) * Fraction(b) + Fraction(c))


def test_fma_at_a_false_tie_among_denormals() -> None:
    # 2**46 + 1 = 8384513 * 8392705: the product is 2**-150 + 2**-196, whose second term float64 loses beside
    # 2**-127, leaving a tie of the denormals that would go down to even.
    a, b = f32(8384513 * 2.0**-75), f32(8392705 * 2.0**-121)
    assert fma(a, b, f32(2.0**-127))[0] == np.float32(2.0**-127 + 2.0**-149)
    assert fma(a, b, f32(2.0**-127 + 2.0**-149))[0] == np.float32(2.0**-127 + 2.0**-148)
    assert fma(-a, b, f32(2.0**-127 + 2.0**-149))[0] == np.float32(2.0**-127)


@pytest.mark.parametrize(
    ("sources", "bits"),
    [
        ((0x7F800001, 0xFFC00002), 0x7FC00001),  # the first NaN wins, and becomes quiet
        ((0x3F800000, 0xFF800002), 0xFFC00002),
        ((0x7F800000, 0xFF800000), 0xFFC00000),  # invalid: the default NaN
    ],
)
def test_nan_rule(sources: tuple[int, int], bits: int) -> None:
    a, b = (np.array([s], np.uint32).view(np.float32) for s in sources)
    with np.errstate(all="ignore"):
        assert nan_rule(a + b, a, b).view(np.uint32)[0] == bits


@given(st.floats(width=32, allow_nan=False))
def test_bf16_is_the_nearest(x: float) -> None:
    with np.errstate(all="ignore"):
        expected = flush(f32(x)).astype(ml_dtypes.bfloat16).view(np.uint16)
        assert f32_to_bf16(f32(x)) == expected


@pytest.mark.parametrize(
    ("acc", "a", "b", "expected"),
    [
        (1.0, (2.0, 3.0), (4.0, 5.0), 24.0),
        (2.0**24, (-(2.0**24), 1.0), (1.0, 1.0), 0.0),  # the odd element first: 2**24 + 1 is not a float32
        (2.0**24, (1.0, -(2.0**24)), (1.0, 1.0), 1.0),
        (2.0**-127, (0.0, 2.0**-63), (0.0, 2.0**-63), 2.0**-126),  # a denormal accumulator is zero
        (0.0, (0.0, 2.0**-64), (0.0, 2.0**-63), 0.0),  # a denormal sum is flushed
        (0.0, (2.0**-64, 2.0**-64), (2.0**-63, 2.0**-63), 0.0),  # after each element
        (0.0, (0.0, 2.0**-127), (0.0, 2.0**100), 0.0),  # a denormal element is zero
    ],
)
def test_vdpbf16ps(acc: float, a: tuple[float, float], b: tuple[float, float], expected: float) -> None:
    x, y = (np.array(v, np.float32).astype(ml_dtypes.bfloat16).view(np.uint32) for v in (a, b))
    assert MNEMONICS["vdpbf16ps"].meaning(f32(acc), x, y)[0] == np.float32(expected)


@given(st.integers(-(2**31), 2**31 - 1))
def test_saturation(x: int) -> None:
    for lane, low, high in (("i1", -128, 127), ("u1", 0, 255), ("i2", -32768, 32767), ("u2", 0, 65535)):
        assert saturate(np.array([x], np.int32), lane)[0] == min(max(x, low), high)
