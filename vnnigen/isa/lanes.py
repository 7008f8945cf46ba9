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
_LIMITS = {"i1": (-128, 127), "u1": (0, 255), "i2": (-32768, 32767), "u2": (0, 65535), "i4": (-(2**31), 2**31 - 1)}


def saturate(a: Lanes, lane: str) -> Lanes:
    """Clamp integer lanes to the range of NumPy type `lane`; the lanes keep their own type."""
    low, high = _LIMITS[lane]
    if a.dtype.kind == "u":
        return np.minimum(a, a.dtype.type(high))
    return np.minimum(np.maximum(a, a.dtype.type(low)), a.dtype.type(high))


def nan_rule(r: Lanes, *sources: Lanes) -> Lanes:
    """Replace the NaNs of result `r` by what x86 gives: the first NaN among the sources, quiet, or the default."""
    nan = r != r  # noqa: PLR0124
    if not nan.any():
        return r
    bits = np.full(r.shape, DEFAULT_NAN)
    for s in reversed(sources):
        bits = np.where(np.isnan(s), s.view("u4") | QUIET, bits)
    return np.where(nan, bits.view("f4"), r)


def fma(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """a * b + c with one rounding.

    The product of two float32 is exact in float64. The sum is rounded to odd there (the error of the rounded
    sum comes from Knuth's two-sum), which makes the final rounding to float32 right: 53 >= 24 + 2 bits.
    """
    p = a.astype("f8") * b
    s = p + c
    t = s - p
    error = (p - (s - t)) + (c - t)
    if error.any():  # a NaN (from an infinity) counts, and fails the comparison below
        bits = s.view("i8")
        even = (np.abs(error) > 0) & ((bits & 1) == 0) & np.isfinite(s)
        bits += np.where(even, np.where((error > 0) == (s > 0), 1, -1), 0)
    return s.astype("f4")


def bf16_to_f32(x: Lanes) -> Lanes:
    """The float32 lanes of bfloat16 bits (u2 lanes)."""
    return (x.astype("u4") << 16).view("f4")


def flush(x: Lanes) -> Lanes:
    """Denormals to zeros of their sign."""
    tiny = np.float32(2.0**-126)
    return np.where(np.abs(x) < tiny, np.copysign(np.float32(0), x), x)


def f32_to_bf16(x: Lanes) -> Lanes:
    """bfloat16 bits (u2 lanes) as VCVTNEPS2BF16 gives them: nearest even, denormals to zero, NaNs made quiet."""
    bits = flush(x).view("u4")
    rounded = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype("u2")
