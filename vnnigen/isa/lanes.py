"""Arithmetic on NumPy lanes that NumPy itself does not define bit for bit: saturation, NaNs, FMA, bfloat16.

NaNs follow the Intel SDM (volume 1, section 4.8.3.5 and table 4-7): the first source that is a NaN wins and
is made quiet; an invalid operation on numbers gives the default NaN, whose sign is set. All functions take
float32 lanes, round to nearest even and keep denormals, as under MXCSR 0x1F80.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Lanes = npt.NDArray[Any]

QUIET = np.uint32(0x00400000)
DEFAULT_NAN = np.uint32(0xFFC00000)
_LIMITS = {
    "i1": (-128, 127), "u1": (0, 255), "i2": (-32768, 32767), "u2": (0, 65535), "i4": (-(2**31), 2**31 - 1),
}  # fmt: skip


def saturate(a: Lanes, lane: str) -> Lanes:
    """Clamp integer lanes to the range of NumPy type `lane`; the lanes keep their own type."""
    low, high = _LIMITS[lane]
    bounded: Lanes = np.minimum(a, a.dtype.type(high))
    return bounded if a.dtype.kind == "u" else np.maximum(bounded, a.dtype.type(low), out=bounded)


def any_true(bools: Lanes) -> bool:
    """Tell whether any is true; on a register's few lanes this takes a fifth of `bools.any()`."""
    return 1 in bools.tobytes()


def nan_rule(r: Lanes, *sources: Lanes) -> Lanes:
    """Replace the NaNs of result `r` as x86 does: by the first NaN among the sources, quiet, or the default."""
    nan: Lanes = r != r  # noqa: PLR0124
    if not any_true(nan):
        return r
    bits = np.full(r.shape, DEFAULT_NAN)
    for s in reversed(sources):
        bits = np.where(np.isnan(s), s.view("u4") | QUIET, bits)
    return np.where(nan, bits.view("f4"), r)


def fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Return a * b + c with one rounding (NaNs are left to `nan_rule`)."""
    return _fused(a, b, c).astype("f4")


def fma_flushed(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """The same, with tiny results turned into zeros of their sign.

    Tiny is what lies below the normal numbers after rounding to 24 bits with any exponent (SDM volume 1, section
    4.9.1.5): 2**-126 * (1 - 2**-24) is, though as a float32 it rounds to 2**-126.
    """
    s = _fused(a, b, c)
    small = np.abs(s) < _TINY
    return (np.where(small, np.copysign(0.0, s), s) if any_true(small) else s).astype("f4")


_TINY = 2.0**-126 * (1 - 2.0**-25)


def _fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Return a * b + c in float64, such that rounding it to float32 gives what one rounding would.

    The product of two float32 is exact in float64. Rounding the sum to float64 and then to float32 is wrong
    only where the first rounding lands on a tie of the second: halfway between normal float32 numbers, which
    the low 29 bits show, or, with ties elsewhere, among the denormals.
    """
    p = a.astype("f8")
    p *= b
    s: Lanes = p + c
    bits = s.view("u8")
    tie = bits & _BELOW_F32 == _HALF_F32
    tie |= (bits << 1) - 1 < _DENORMAL_F32  # zero wraps around
    if any_true(tie):
        s = _round_to_odd(p, c.astype("f8"), s)
    return s


_BELOW_F32, _HALF_F32 = np.uint64(2**29 - 1), np.uint64(2**28)
_DENORMAL_F32 = (np.array(2.0**-126).view("u8") << 1) - 1


def _round_to_odd(p: Lanes, c: Lanes, s: Lanes) -> Lanes:
    """From s = p + c, rounded to nearest, return the sum rounded to odd: no tie of a later rounding is false.

    The error of s comes from Knuth's two-sum. 53 >= 24 + 2 bits suffice for a right final rounding.
    """
    t = s - p
    error = (p - (s - t)) + (c - t)
    if not any_true(error != 0):
        return s
    bits = s.view("i8")
    inexact_even = (np.abs(error) > 0) & ((bits & 1) == 0) & np.isfinite(s)
    step = np.where((error > 0) == (s > 0), 1, -1)
    rounded: Lanes = (bits + np.where(inexact_even, step, 0)).view("f8")
    return rounded


def flush(x: Lanes) -> Lanes:
    """Turn denormals into zeros of their sign."""
    small: Lanes = np.abs(x) < _SMALLEST_NORMAL
    return np.where(small, np.copysign(_ZERO, x), x) if any_true(small) else x


_SMALLEST_NORMAL, _ZERO = np.float32(2.0**-126), np.float32(0)


def f32_to_bf16(x: Lanes) -> Lanes:
    """Return bfloat16 bits (u2 lanes) as VCVTNEPS2BF16: nearest even, denormals to zero, NaNs made quiet."""
    bits = flush(x).view("u4")
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype("u2")
