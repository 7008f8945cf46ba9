"""Exact rational arithmetic, to hold the numerics against: slow, obvious, and free of floating point."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

F32_MAX = Fraction(float(np.finfo(np.float32).max))


def round_to_f32(x: Fraction | float) -> float:
    """Round a rational to f32, half to even, with denormals and overflow, using integers only."""
    x = Fraction(x)
    if x == 0:
        return 0.0
    sign, x = (-1 if x < 0 else 1), abs(x)
    exponent = math.floor(math.log2(x.numerator) - math.log2(x.denominator))
    while Fraction(2) ** exponent > x:
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= x:
        exponent += 1
    ulp = Fraction(2) ** max(exponent - 23, -149)
    rounded = round(x / ulp) * ulp  # Fraction rounds half to even
    return sign * (math.inf if rounded > F32_MAX else float(rounded))


def exact_fma(a: float, b: float, c: float) -> float:
    """Return a * b + c, rounded once."""
    return round_to_f32(Fraction(a) * Fraction(b) + Fraction(c))
