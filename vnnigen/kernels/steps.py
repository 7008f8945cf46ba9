"""The primitive steps that post-ops lower to: their kinds, exact references and ranges of values.

Each kind has, side by side in this module, its reference (NumPy, exactly rounded as the machine does) and the range of
values it can yield; its emitter is in `STEP_EMIT` of `emit_epilogue`.

With `s` the output scale folded in (`1/y_scale`, or 1), `t` a tensor element, `v` the value, every
operation below rounding once to f32:

    sum     v = fma(f32(t) - zp, scale*s, v)     f32(t) - zp is exact for u8 and s8
    linear  v = fma(v, alpha, beta*s)
    max     v = v > lo*s ? v : lo*s              a NaN becomes the bound (VMAXPS v, v, lo)
    min     v = v < hi*s ? v : hi*s              likewise (VMINPS v, v, hi)
    leaky   v = sign bit of v set ? v*alpha : v

    tensor_mul, tensor_max, tensor_min: x = (f32(t) - zp) * scale, times s for the bounds; then
            v = v * x, v = v > x ? v : x (a NaN becomes x), v = v < x ? v : x
    channel_add, channel_mul, channel_max, channel_min: the same with x[c], one constant per output channel
            (x = t*scale, times s but for channel_mul, rounded to f32 once); channel_add is v = v + x

All of these commute with a positive factor on v: f(v*s) = s * f(v) but for rounding, once additive constants and
bounds carry s (a product's other factor does not: v*s * t = s * v*t). So the output scale may be folded in. The
functions of `approx` do not, they see v in real units.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from vnnigen.kernels.approx import PROGRAMS, evaluate
from vnnigen.kernels.fma import fma32
from vnnigen.kernels.types import F32, Array, DType


@dataclass(frozen=True, eq=False)
class Step:
    """One primitive operation with its constants still in float64.

    `tensor` is for kinds in TENSOR_KINDS: the array read, or None for the output's previous contents; for kinds in
    CHANNEL_KINDS it holds the constant of each output channel.
    """

    kind: str
    scalars: tuple[float, ...]
    zero_point: int = 0
    tensor: Array | None = None
    dtype: DType | None = None


# reference(v, c, t): the value, the step's f32 scalars, the tensor (reshaped like v), the channels' constants or None.
# value_range(lo, hi, c, t): bounds on v before and the tensor's bounds -> bounds on v after, in float64
# before rounding (NaN aside). Scalars are as in EpilogueSpec: a sum with a zero point has it second.

Range = tuple[float, float]
Reference = Callable[[F32, F32, "Array | None"], F32]
ValueRange = Callable[[float, float, F32, Range], Range]

# The number of scalars of each kind (a zero point, where present, adds one), and the kinds with a tensor.
STEP_SCALARS: dict[str, int] = {
    **dict.fromkeys(PROGRAMS, 0),
    "sum": 1, "linear": 2, "max": 1, "min": 1, "leaky": 1, "tensor_mul": 1, "tensor_max": 1, "tensor_min": 1,
    "channel_add": 0, "channel_mul": 0, "channel_max": 0, "channel_min": 0,
    "silu": 1, "to_s32": 0,
}  # fmt: skip
TENSOR_KINDS = frozenset({"sum", "tensor_mul", "tensor_max", "tensor_min"})
#: Kinds with a constant per output channel.
CHANNEL_KINDS = frozenset({"channel_add", "channel_mul", "channel_max", "channel_min"})


def _sum_reference(v: F32, c: F32, t: Array | None) -> F32:
    assert t is not None
    value = t.astype(np.float32)
    return fma32(value - c[1] if len(c) > 1 else value, c[0], v)


def _sum_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    zp = float(c[1]) if len(c) > 1 else 0.0
    ends = _scaled(t[0] - zp, t[1] - zp, float(c[0]))
    return lo + ends[0], hi + ends[1]


def _linear_reference(v: F32, c: F32, t: Array | None) -> F32:
    return fma32(v, c[0], c[1])


def _linear_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    ends = _scaled(lo, hi, float(c[0]))
    return ends[0] + float(c[1]), ends[1] + float(c[1])


def _max_reference(v: F32, c: F32, t: Array | None) -> F32:
    return np.where(v > c[0], v, c[0])


def _max_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    return max(lo, float(c[0])), max(hi, float(c[0]))


def _min_reference(v: F32, c: F32, t: Array | None) -> F32:
    return np.where(v < c[0], v, c[0])


def _min_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    return min(lo, float(c[0])), min(hi, float(c[0]))


def _leaky_reference(v: F32, c: F32, t: Array | None) -> F32:
    return np.where(np.signbit(v), v * c[0], v)


def _leaky_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    ends = [x for x in (lo, hi) if x >= 0]
    if lo < 0:
        ends += _scaled(lo, min(hi, 0.0), float(c[0]))
    return min(ends), max(ends)


def _operand(c: F32, t: Array | None) -> F32:
    """The second operand of a tensor or channel kind."""
    assert t is not None
    x = t.astype(np.float32)
    if len(c) > 1:
        x = x - c[1]
    return x * c[0] if len(c) else x


def _operand_range(c: F32, t: Range) -> Range:
    zp = float(c[1]) if len(c) > 1 else 0.0
    return _scaled(t[0] - zp, t[1] - zp, float(c[0])) if len(c) else t


def _add_reference(v: F32, c: F32, t: Array | None) -> F32:
    return v + _operand(c, t)


def _add_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    x = _operand_range(c, t)
    return lo + x[0], hi + x[1]


def _mul_reference(v: F32, c: F32, t: Array | None) -> F32:
    return v * _operand(c, t)


def _mul_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    products = [0.0 if 0 in (a, b) else a * b for a in (lo, hi) for b in _operand_range(c, t)]
    return min(products), max(products)


def _greater_reference(v: F32, c: F32, t: Array | None) -> F32:
    x = _operand(c, t)
    return np.where(v > x, v, x)


def _greater_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    x = _operand_range(c, t)
    return max(lo, x[0]), max(hi, x[1])


def _less_reference(v: F32, c: F32, t: Array | None) -> F32:
    x = _operand(c, t)
    return np.where(v < x, v, x)


def _less_range(lo: float, hi: float, c: F32, t: Range) -> Range:
    x = _operand_range(c, t)
    return min(lo, x[0]), min(hi, x[1])


#: The largest f32 below 2**31: what a conversion to s32 saturates to.
S32_TOP = np.float32(2147483520.0)


def _to_s32_reference(v: F32, _c: F32, _t: Array | None) -> F32:
    """Round half to even, saturate, and keep the integer's bits: the last step of a conversion to s32."""
    low = np.float32(-(2.0**31))
    bits: F32 = np.rint(np.minimum(np.where(v > low, v, low), S32_TOP)).astype(np.int32).view(np.float32)
    return bits


def _program_reference(kind: str) -> Reference:
    return lambda v, c, _t: evaluate(PROGRAMS[kind], v, c)


def _unit_range(low: float) -> ValueRange:
    return lambda _lo, _hi, _c, _t: (low, 1.0)


def _gate_range(lo: float, hi: float, _c: F32, _t: Range) -> Range:
    """Of v times something between 0 and 1."""
    return min(lo, 0.0), max(hi, 0.0)


def _scaled(lo: float, hi: float, factor: float) -> Range:
    """Return the ends of `[lo, hi] * factor`; an infinite end times zero is zero."""
    if factor == 0:
        return 0.0, 0.0
    return min(lo * factor, hi * factor), max(lo * factor, hi * factor)


STEP_REFERENCE: dict[str, Reference] = {
    "sum": _sum_reference,
    "linear": _linear_reference,
    "max": _max_reference,
    "min": _min_reference,
    "leaky": _leaky_reference,
    "tensor_mul": _mul_reference,
    "tensor_max": _greater_reference,
    "tensor_min": _less_reference,
    "channel_add": _add_reference,
    "channel_mul": _mul_reference,
    "channel_max": _greater_reference,
    "channel_min": _less_reference,
    "to_s32": _to_s32_reference,
    **{kind: _program_reference(kind) for kind in PROGRAMS},
}

# A kind without an entry can yield anything.
STEP_RANGE: dict[str, ValueRange] = {
    "sum": _sum_range,
    "linear": _linear_range,
    "max": _max_range,
    "min": _min_range,
    "leaky": _leaky_range,
    "tensor_mul": _mul_range,
    "tensor_max": _greater_range,
    "tensor_min": _less_range,
    "channel_add": _add_range,
    "channel_mul": _mul_range,
    "channel_max": _greater_range,
    "channel_min": _less_range,
    "sigmoid": _unit_range(0.0),
    "tanh": _unit_range(-1.0),
    "erf": _unit_range(-1.0),
    **dict.fromkeys(("hardswish", "silu", "gelu", "gelu_tanh", "mish"), _gate_range),
}
