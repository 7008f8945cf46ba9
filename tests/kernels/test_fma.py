"""fma32 against exact rational arithmetic and, where the machine has it, the C library's fmaf."""

from __future__ import annotations

import ctypes
import ctypes.util
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.exact import exact_fma, round_to_f32
from vnnigen.kernels.fma import fma32

floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def check(a: float, b: float, c: float) -> None:
    got = float(fma32(np.float32(a), np.float32(b), np.float32(c)))
    a, b, c = (float(np.float32(x)) for x in (a, b, c))
    assert got == exact_fma(a, b, c), (a.hex(), b.hex(), c.hex())


@given(floats, floats, floats)
@settings(max_examples=1500, deadline=None)
def test_any_finite_operands(a: float, b: float, c: float) -> None:
    check(a, b, c)


@given(
    st.integers(2**23, 2**24 - 1), st.integers(2**23, 2**24 - 1), st.integers(-(2**24), 2**24),
    st.integers(-40, 60), st.sampled_from([1, -1]),
)  # fmt: skip
@settings(max_examples=1500, deadline=None)
def test_addends_of_every_distance(a: int, b: int, c: int, shift: int, sign: int) -> None:
    check(sign * a, b, math.ldexp(c, shift))


@given(st.integers(2**11, 2**12 - 1), st.integers(2**11, 2**12 - 1), st.integers(-3, 3), st.integers(-80, -30))
@settings(max_examples=500, deadline=None)
def test_sums_a_hair_from_a_tie(a: int, b: int, tiny: int, shift: int) -> None:
    """A 24-bit product plus half a unit in the last place plus almost nothing."""
    product = a * b
    ulp = 2.0 ** (product.bit_length() - 24)
    check(2.0**30 * (1 + 2.0**-23), 1 + 2.0**-23, math.ldexp(tiny, shift))
    check(a + ulp / 2, b, math.ldexp(tiny, shift))


@pytest.mark.parametrize(
    ("a", "b", "c"),
    [
        # The exact value is a f32 tie plus or minus 2**-60: float64 rounds it to the tie.
        (1 + 2.0**-12, 1 + 2.0**-12, 2.0**-60),
        (1 + 2.0**-12, 1 + 2.0**-12, -(2.0**-60)),
        (1 + 2.0**-12, 1 + 2.0**-12, 0.0),
        (-(1 + 2.0**-12), 1 + 2.0**-12, 2.0**-60),
        (1 + 3 * 2.0**-12, 1 + 2.0**-12, 2.0**-70),
        (2.0**-75, 2.0**-75, 0.0),  # half the smallest denormal: to even, zero
        (2.0**-75, 2.0**-75, 2.0**-149),  # one and a half: to even, two
        (2.0**-75, 2.0**-76, 2.0**-149),
        (2.0**64, 2.0**64, 0.0),
        (2.0**64, 2.0**64, -(2.0**103)),
        (2.0**64, 2.0**64, -(2.0**104)),
        (3.0, 4.0, -12.0),
    ],
)
def test_chosen_triples(a: float, b: float, c: float) -> None:
    check(a, b, c)


def test_the_correction_is_needed() -> None:
    """float64 alone loses 2**-60 and rounds a tie down to even: the tests above can fail."""
    a, tiny = np.float32(1 + 2.0**-12), np.float32(2.0**-60)
    naive = np.float32(np.float64(a) * np.float64(a) + np.float64(tiny))
    assert naive == np.float32(1 + 2.0**-11)
    assert fma32(a, a, tiny) == np.float32(1 + 2.0**-11 + 2.0**-23)


def test_special_values() -> None:
    inf, nan = np.inf, np.nan
    a = np.array([inf, inf, -inf, 0.0, nan, 1.0, 1.0, 3e38, -3e38], np.float32)
    b = np.array([1.0, 1.0, 1.0, inf, 1.0, nan, 1.0, 3e38, 3e38], np.float32)
    c = np.array([1.0, -inf, -inf, 1.0, 1.0, 1.0, nan, 0.0, 1.0], np.float32)
    np.testing.assert_array_equal(fma32(a, b, c), np.array([inf, nan, -inf, nan, nan, nan, nan, inf, -inf]))


def test_signs_of_zero() -> None:
    z = np.float32(0)
    assert not np.signbit(fma32(np.float32(3), np.float32(2), np.float32(-6)))
    assert np.signbit(fma32(-z, np.float32(1), -z))
    assert not np.signbit(fma32(-z, np.float32(1), z))
    assert np.signbit(fma32(np.float32(-1e-30), np.float32(1e-30), z))


def test_broadcasts_and_keeps_its_operands() -> None:
    a = np.arange(12, dtype=np.float32).reshape(3, 4)
    b = np.full(4, 0.1, np.float32)
    before = a.copy(), b.copy()
    got = fma32(a, b, np.float32(0.3))
    assert got.shape == (3, 4)
    assert got.dtype == np.float32
    assert (a == before[0]).all()
    assert (b == before[1]).all()
    for index in np.ndindex(3, 4):
        expected = Fraction(float(a[index])) * Fraction(float(b[0])) + Fraction(float(np.float32(0.3)))
        assert float(got[index]) == round_to_f32(expected)


def test_against_the_c_library() -> None:
    name = ctypes.util.find_library("m")
    if name is None:
        pytest.skip("no C math library to compare with")
    fmaf = ctypes.CDLL(name).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    rng = np.random.default_rng(0)
    bits = rng.integers(0, 2**32, (3, 20000), dtype=np.uint64).astype(np.uint32)
    # Bring the addend near the product, or nearly every triple is one operand alone.
    a, b = (x.view(np.float32) for x in bits[:2])
    with np.errstate(all="ignore"):
        c = (a * b * rng.standard_normal(a.size).astype(np.float32) ** 9).astype(np.float32)
    got = fma32(a, b, c)
    want = np.array([fmaf(x, y, z) for x, y, z in zip(a.tolist(), b.tolist(), c.tolist(), strict=True)])
    np.testing.assert_array_equal(got, want.astype(np.float32))
