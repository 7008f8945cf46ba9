"""Functions that no instruction computes: exp, and sigmoid, tanh, SiLU and GELU from it, in exactly rounded f32.

Each function is written once, as a `Program`: a list of operations that IEEE 754 defines to the last bit (FMA,
division, comparison, shifts of the bits). `evaluate` runs it in NumPy, `emit_approx` turns the same list into code
for any tier; so all tiers and the reference agree bit for bit. There are no reciprocal estimates.

Everything rests on exp(-x) = 2**n * exp(-r) with n = round(-x / ln 2) and r = x + n ln 2, |r| <= ln(2)/2, where
exp(-r) = 1 + r*h(r), h a polynomial of degree 5 with a relative error of r*h below 2**-26. 2**n is made by shifting
n into the exponent: n = 128 gives infinity, n = -127 zero.

Errors, `ulp` being the distance of f32 numbers around the exact result (`tests/kernels/test_post_ops_nonlinear.py`
holds them against float64 over all of f32):

    hardswish  v min(max(v + 3, 0), 6) / 6                                3 ulp
    sigmoid    1 / (1 + exp(-v))                                          3 ulp
    tanh       (1 - e) / (1 + e), e = exp(-2|v|)                          3 ulp
    silu       v / (1 + exp(-a v))                                        3 ulp for a = 1, else 3 + |a v| ulp
    gelu       max(v, 0) - |v| exp(-v**2/2) P(|v|)/Q(|v|)                 8 ulp
    gelu_tanh  v / (1 + exp(-2u)), u = sqrt(2/pi) (v + 0.044715 v**3)     3 + 5|u| ulp, 2**-24 where v < 0
    exp        exp(v)                                                     2 ulp
    erf        v P(v**2)/Q(v**2), 1 from |v| = 3.93 on                    5 ulp
    softplus   max(v, 0) + log(1 + e), e = exp(-|v|)                      4 ulp
    mish       v n/(n + 2), n = e (e + 2), e = exp(v)                     7 ulp
    rsqrt      1 / sqrt(v)                                                1 ulp
    cube       v v v                                                      1 ulp

and 2**-120 where results underflow: 2**n ends at 2**-127.5. (The argument of exp is rounded, which multiplies the
result's relative error by it; gelu carries the rounding error along, so there it does not.) NaN gives NaN, infinities
give the limits; sigmoid and tanh never leave [0, 1] and [-1, 1] and reach the ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from vnnigen.kernels.fma import fma32
from vnnigen.kernels.types import F32


@dataclass(frozen=True)
class Var:
    """The result of operation `index - 1` of a program; 0 is the program's argument."""

    index: int


@dataclass(frozen=True)
class Bits:
    """A constant by its f32 bits."""

    bits: int

    @property
    def value(self) -> np.float32:
        """The same as a number."""
        number: np.float32 = np.uint32(self.bits).view(np.float32)
        return number


@dataclass(frozen=True)
class Scalar:
    """A constant given at run time: scalar `index` of the post-op's step."""

    index: int


@dataclass(frozen=True)
class Table:
    """Eight constants by their bits, for `pick`."""

    bits: tuple[int, ...]


Operand = Var | Bits | Scalar | Table


def const(value: float) -> Bits:
    """The constant `value`, rounded to f32."""
    return Bits(int(np.float32(value).view(np.uint32)))


@dataclass(frozen=True)
class Operation:
    """One rounding (or none): `name` is a key of MEANINGS."""

    name: str
    sources: tuple[Operand, ...]


def _bitwise(op: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *x: op(*(np.asarray(v).view(np.uint32) for v in x)).view(np.float32)


#: name -> what it computes. `max` and `min` give their second operand when either is NaN, as VMAXPS and VMINPS do.
#: `plus` adds the bits, `pick` takes the entry of a table that the three lowest bits name.
MEANINGS: dict[str, Callable[..., Any]] = {
    "fma": fma32,
    "fms": lambda a, b, c: fma32(a, b, -c),
    "fnma": lambda a, b, c: fma32(-a, b, c),
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "sqrt": np.sqrt,
    "max": lambda a, b: np.where(a > b, a, b),
    "min": lambda a, b: np.where(a < b, a, b),
    "and": _bitwise(np.bitwise_and),
    "or": _bitwise(np.bitwise_or),
    "exponent": _bitwise(lambda a: a << np.uint32(23)),
    "eighths": _bitwise(lambda a: a << np.uint32(20)),
    "plus": _bitwise(lambda a, b: a + b),
    "pick": _bitwise(lambda a, table: table[a & np.uint32(7)]),
}


@dataclass
class Program:
    """Operations in the order of their execution; the last one's result is the program's."""

    operations: list[Operation] = field(default_factory=list)

    def __getattr__(self, name: str) -> Callable[..., Var]:
        """Append an operation of MEANINGS (`and_` and `or_` where Python reserves the word); floats are constants."""
        if name.rstrip("_") not in MEANINGS:
            raise AttributeError(name)

        def append(*sources: Operand | float) -> Var:
            operands = tuple(const(s) if isinstance(s, (int, float)) else s for s in sources)
            self.operations.append(Operation(name.rstrip("_"), operands))
            return Var(len(self.operations))

        return append


def evaluate(program: Program, v: F32, scalars: F32) -> F32:
    """Run a program on an array: the reference."""
    values: list[F32] = [v]

    def value(operand: Operand) -> F32 | np.float32:
        if isinstance(operand, Var):
            return values[operand.index]
        if isinstance(operand, Table):
            return np.array(operand.bits, np.uint32).view(np.float32)
        return operand.value if isinstance(operand, Bits) else np.float32(scalars[operand.index])

    with np.errstate(all="ignore"):
        for op in program.operations:
            values.append(MEANINGS[op.name](*map(value, op.sources)))
    return values[-1]


# --- exp ---------------------------------------------------------------------------------------------------

_LOG2_E = 1 / math.log(2)
# ln 2 in two parts: n * _LN2_HIGH + x is exact, for it cancels to few bits.
_LN2_HIGH = float(np.float32(math.log(2)))
_LN2_LOW = math.log(2) - _LN2_HIGH
# Added to |n| < 2**22 it leaves n + 127 in the lowest bits of the sum, rounded to an integer.
_ROUND = 1.5 * 2.0**23 + 127
# (exp(-r) - 1) / r on |r| <= ln(2)/2, minimax in the relative error, from the constant term up.
_EXP = (
    -1.0, 0.49999997019767761, -0.16666543483734131, 0.041667200624942780, -0.0083665205165743828,
    0.0013882521307095885,
)  # fmt: skip
_LARGEST = float(np.finfo(np.float32).max)
# The same on |r| <= ln(2)/16: a relative error of 2**-25.2 with two degrees less.
_EXP_SHORT = (-1.0, 0.50006484445529424, -0.16664296139248003)
# Added to |n| < 2**22 it leaves n, rounded to an integer, in the lowest bits.
_ROUND_EIGHTHS = 1.5 * 2.0**23
# 2**(i/8) less i eighths of the exponent's unit: plus n << 20 it is 2**(n/8), i being n's lowest bits.
_ROOTS = tuple(int(np.float32(2 ** (i / 8)).view(np.uint32)) - (i << 20) for i in range(8))


def _horner(p: Program, x: Var, coefficients: tuple[float, ...]) -> Var:
    """A polynomial with its constant term first."""
    total: Var | float = coefficients[-1]
    for c in reversed(coefficients[:-1]):
        total = p.fma(total, x, c)
    assert isinstance(total, Var)
    return total


def _reduce(p: Program, x: Var, low: Var | None = None, less: int = 0) -> tuple[Var, Var, Var]:
    """For -89 <= x <= 88: (r, h, 2**(n - less)) with exp(-x - low/2) = 2**n * (1 + r*h)."""
    shifted = p.fma(x, -_LOG2_E, _ROUND - less)
    power = p.exponent(shifted)
    n = p.sub(shifted, _ROUND - less)
    r = p.fma(n, _LN2_HIGH, x)
    r = p.fma(n, _LN2_LOW, r)
    if low is not None:
        r = p.fma(low, 0.5, r)
    return r, _horner(p, r, _EXP), power


def _one_plus_exp(p: Program, x: Var) -> Var:
    """1 + exp(-x), infinite below x = -88.4; constants come first in comparisons to let NaN through."""
    x = p.max(-89.0, p.min(88.0, x))
    r, h, power = _reduce(p, x)
    return p.fma(p.fma(r, h, 1.0), power, 1.0)


# --- the functions -----------------------------------------------------------------------------------------

V = Var(0)
# P/Q = exp(z*z/2) * Phi(-z), the normal distribution's tail without its exponential, on 0 <= z <= 13.26;
# relative error 2**-27.6. All coefficients are positive, so nothing cancels.
_TAIL_P = (0.5, 0.43559204697, 0.18123727581, 0.039960837511, 0.0040167471031)
_TAIL_Q = (1.0, 1.66906901078, 1.19419483282, 0.46419695079, 0.100174381728, 0.0100683477394)
# exp(-z*z/2) is zero from here on.
_TAIL_END = 13.25


def _sigmoid(p: Program) -> None:
    p.div(1.0, _one_plus_exp(p, V))


def _tanh(p: Program) -> None:
    # From 1 - e, accurate relative to itself however small: 1 - e = (1 - 2**n) - 2**n * (r*h).
    x = p.min(40.0, p.mul(p.and_(V, Bits(0x7FFFFFFF)), 2.0))
    r, h, power = _reduce(p, x)
    less = p.fnma(p.mul(r, h), power, p.sub(1.0, power))
    p.or_(p.div(less, p.sub(2.0, less)), p.and_(V, Bits(0x80000000)))


def _weighted(p: Program, x: Var) -> None:
    """The argument over 1 + exp(-x); -inf / inf must not be NaN."""
    one_plus = _one_plus_exp(p, x)
    p.div(p.max(-_LARGEST, V), one_plus)


def _silu(p: Program) -> None:
    _weighted(p, p.mul(V, Scalar(0)))


def _gelu_tanh(p: Program) -> None:
    scale = 2 * math.sqrt(2 / math.pi)
    _weighted(p, p.mul(V, p.fma(p.mul(V, V), 0.044715 * scale, scale)))


def _gelu(p: Program) -> None:
    # v*Phi(v) = max(v, 0) - |v|*Phi(-|v|); the square's rounding error goes into the exponential too.
    z = p.min(_TAIL_END, p.and_(V, Bits(0x7FFFFFFF)))
    square = p.mul(z, z)
    r, h, power = _reduce(p, p.mul(square, 0.5), p.fms(z, z, square))
    e = p.mul(p.fma(r, h, 1.0), power)
    tail = p.div(p.mul(p.mul(e, z), _horner(p, z, _TAIL_P)), _horner(p, z, _TAIL_Q))
    p.sub(p.max(0.0, V), tail)


def _hardswish(p: Program) -> None:
    u = p.max(-3.0, V)
    p.mul(p.mul(p.min(6.0, p.add(u, 3.0)), 1 / 6), u)


# erf(v)/v over t = v**2 on |v| <= 3.93, relative error 2**-25.6.
_ERF_P = (1.12837914537, 0.190783163926, 0.0527901854396, 0.00377957746749, 0.000284807376644, 2.04196911284e-06)
_ERF_Q = (1.0, 0.502409896528, 0.114257235561, 0.0149973738661, 0.00116520407967, 3.80039936225e-05)
_ERF_END = 3.93
# log(1 + e)/e on 0 <= e <= 1, relative error 2**-29.9.
_LOG_P = (0.99999999906007, 1.06621870422, 0.238157663597, 0.00341728604534)
_LOG_Q = (1.0, 1.56621857369, 0.687936543756, 0.0752873378912)


def _exp(p: Program) -> None:
    # 2**n is made of halves, for n may be 128.
    x = p.mul(p.max(-87.6, p.min(89.0, V)), -1.0)
    r, h, half = _reduce(p, x, less=1)
    p.mul(p.mul(p.fma(r, h, 1.0), half), 2.0)


def _erf(p: Program) -> None:
    x = p.max(-_ERF_END, p.min(_ERF_END, V))
    square = p.mul(x, x)
    y = p.div(p.mul(x, _horner(p, square, _ERF_P)), _horner(p, square, _ERF_Q))
    p.max(-1.0, p.min(1.0, y))


def _softplus(p: Program) -> None:
    r, h, power = _reduce(p, p.min(88.0, p.and_(V, Bits(0x7FFFFFFF))))
    e = p.mul(p.fma(r, h, 1.0), power)
    log = p.div(p.mul(e, _horner(p, e, _LOG_P)), _horner(p, e, _LOG_Q))
    p.add(log, p.max(0.0, V))


def _mish(p: Program) -> None:
    r, h, power = _reduce(p, p.mul(p.max(-88.0, p.min(40.0, V)), -1.0))
    e = p.mul(p.fma(r, h, 1.0), power)
    n = p.mul(e, p.add(e, 2.0))
    p.mul(p.div(n, p.add(n, 2.0)), p.max(-_LARGEST, V))


@lru_cache
def exp_minus(less: int) -> Program:
    """2**-less * exp(-v), which softmax needs, for 0 <= v <= exp_end(less).

    A table of eight roots and a short polynomial take 6 multiplications, `_reduce` and `_EXP` 11. exp(-v) = s *
    exp(-r), s = 2**(n/8), n = round(-8 v / ln 2), r = v + n ln(2)/8. The relative error is below (3 + v/16) * 2**-24
    (the sixteenth: ln(2)/8 is rounded). There are no denormal numbers on the way, with which arithmetic is slow.
    """
    p = Program()
    shifted = p.fma(V, -8 * _LOG2_E, _ROUND_EIGHTHS)
    r = p.fma(p.sub(shifted, _ROUND_EIGHTHS), math.log(2) / 8, V)
    near_one = p.fma(r, _horner(p, r, _EXP_SHORT), 1.0)
    roots = Table(tuple((bits - (less << 23)) & 0xFFFFFFFF for bits in _ROOTS))
    p.mul(near_one, p.plus(p.pick(shifted, roots), p.eighths(shifted)))
    return p


def exp_end(less: int) -> np.float32:
    """How far `exp_minus` reaches: its result is near 2**-126 there."""
    end: np.float32 = np.float32((126 - less) * math.log(2) - 0.05)
    return end


def _traced(write: Callable[[Program], object]) -> Program:
    program = Program()
    write(program)
    return program


#: Step kind -> its program.
PROGRAMS: dict[str, Program] = {
    "sigmoid": _traced(_sigmoid),
    "tanh": _traced(_tanh),
    "silu": _traced(_silu),
    "gelu": _traced(_gelu),
    "gelu_tanh": _traced(_gelu_tanh),
    "hardswish": _traced(_hardswish),
    "exp": _traced(_exp),
    "erf": _traced(_erf),
    "softplus": _traced(_softplus),
    "mish": _traced(_mish),
    "sqrt": _traced(lambda p: p.sqrt(V)),
    "rsqrt": _traced(lambda p: p.div(1.0, p.sqrt(V))),
    "reciprocal": _traced(lambda p: p.div(1.0, V)),
    "abs": _traced(lambda p: p.and_(V, Bits(0x7FFFFFFF))),
    "square": _traced(lambda p: p.mul(V, V)),
    "cube": _traced(lambda p: p.mul(p.mul(V, V), V)),
}
