"""Post-operations: what happens to the f32 value between the accumulator and the output.

A post-op is a small frozen object that a user lists, in order, in `post_ops=(...)`. It lowers itself to
steps, the few primitive kinds that kernels know. Each step kind has, side by side in this module, its
reference (NumPy, exactly rounded as the machine does) and the range of values it can yield; its emitter
belongs here too. Adding a post-op means adding one class, and, where no kind fits, one kind.

With `s` the output scale folded in (`1/y_scale`, or 1), `t` a tensor element, `v` the value, every
operation below rounding once to f32:

    sum     v = fma(f32(t) - zp, scale*s, v)     f32(t) - zp is exact for u8 and s8
    linear  v = fma(v, alpha, beta*s)
    max     v = v > lo*s ? v : lo*s              a NaN becomes the bound (VMAXPS v, v, lo)
    min     v = v < hi*s ? v : hi*s              likewise (VMINPS v, v, hi)
    leaky   v = sign bit of v set ? v*alpha : v
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from vnnigen.errors import DTypeError, QuantizationError
from vnnigen.kernels.fma import fma32
from vnnigen.kernels.types import F32, INT_RANGE, Array, DType, dtype_name

SUM_DTYPES: tuple[DType, ...] = ("u8", "s8", "s32", "f32", "bf16")


# --- what users write -----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Step:
    """One primitive operation with its constants still in float64.

    `tensor` is for kinds in TENSOR_KINDS: the array read, or None for the output's previous contents.
    """

    kind: str
    scalars: tuple[float, ...]
    zero_point: int = 0
    tensor: Array | None = None
    dtype: DType | None = None


class PostOp:
    """What all post-ops share. `piecewise_linear` ones let the output scale be folded through them."""

    piecewise_linear: ClassVar[bool]

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to steps, the value being in units of `1/s` (s > 0; 1 unless `piecewise_linear`)."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Sum(PostOp):
    """Add `scale * (t - zero_point)`; `t` is `tensor` or, where None, given at the call or the old `out`.

    `tensor` has the output's shape and type u8, s8, s32, f32 or bf16; the zero point must be 0 for all but u8, s8.
    `dtype` is the type of a tensor given at the call; None means the output's type.
    The scale is real units per step of `t`. Raises QuantizationError or DTypeError for a bad argument.
    """

    scale: float = 1.0
    zero_point: int = 0
    tensor: Array | None = None
    dtype: npt.DTypeLike | None = None
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields; the zero point's range too where the tensor's type is known already."""
        _finite(self.scale, "Sum scale")
        if isinstance(self.zero_point, bool) or not isinstance(self.zero_point, (int, np.integer)):
            raise DTypeError(f"Sum zero_point must be an integer, not {self.zero_point!r}")
        if self.tensor is not None:
            if not isinstance(self.tensor, np.ndarray):
                raise DTypeError(f"Sum tensor must be a NumPy array, not {type(self.tensor).__name__}")
            if self.dtype is not None:
                raise DTypeError("Sum dtype is for a tensor given at the call; this Sum has its own tensor")
            check_sum_zero_point(self.zero_point, dtype_name(self.tensor.dtype, "Sum tensor", SUM_DTYPES))
        elif self.dtype is not None:
            check_sum_zero_point(self.zero_point, dtype_name(self.dtype, "Sum dtype", SUM_DTYPES))

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `sum` step."""
        given = self.tensor.dtype if self.tensor is not None else self.dtype
        dtype = None if given is None else dtype_name(given, "Sum dtype", SUM_DTYPES)
        return (Step("sum", (float(self.scale) * s,), int(self.zero_point), self.tensor, dtype),)


@dataclass(frozen=True)
class Linear(PostOp):
    """`alpha * v + beta`, one rounding. Raises QuantizationError unless both are finite."""

    alpha: float
    beta: float
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        _finite(self.alpha, "Linear alpha")
        _finite(self.beta, "Linear beta")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `linear` step."""
        return (Step("linear", (float(self.alpha), float(self.beta) * s)),)


@dataclass(frozen=True)
class ReLU(PostOp):
    """`max(v, 0)`; NaN becomes 0."""

    piecewise_linear: ClassVar[bool] = True

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `max` step."""
        return (Step("max", (0.0,)),)


@dataclass(frozen=True)
class Clip(PostOp):
    """`min(max(v, lo), hi)`, as in ReLU6 = Clip(0, 6); NaN becomes `lo`. A bound may be infinite.

    Raises QuantizationError unless `lo <= hi`, `lo < inf` and `hi > -inf`.
    """

    lo: float
    hi: float
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        lo, hi = _number(self.lo, "Clip lo"), _number(self.hi, "Clip hi")
        if not lo <= hi or lo == math.inf or hi == -math.inf:
            raise QuantizationError(f"Clip needs lo <= hi, not lo={lo} and hi={hi}")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to `max` then `min`: the order keeps NaN away from `min`."""
        return Step("max", (float(self.lo) * s,)), Step("min", (float(self.hi) * s,))


@dataclass(frozen=True)
class LeakyReLU(PostOp):
    """`v` where v >= 0, else `alpha * v`. Raises QuantizationError unless alpha is finite."""

    alpha: float = 0.01
    piecewise_linear: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Check the fields."""
        _finite(self.alpha, "LeakyReLU alpha")

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `leaky` step."""
        return (Step("leaky", (float(self.alpha),)),)


def check_sum_zero_point(zero_point: int, dtype: DType) -> None:
    """Raise QuantizationError unless a Sum of a tensor of `dtype` may have this zero point."""
    low, high = INT_RANGE[dtype] if dtype in ("u8", "s8") else (0, 0)
    if not low <= zero_point <= high:
        raise QuantizationError(f"Sum zero_point {zero_point} is not in [{low}, {high}] for a {dtype} tensor")


def _number(value: object, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise DTypeError(f"{name} must be a number, not {value!r}")
    return float(value)


def _finite(value: object, name: str) -> None:
    if not math.isfinite(_number(value, name)):
        raise QuantizationError(f"{name} must be finite, not {value!r}")


# --- what kernels compute: one block per step kind --------------------------------------------------------
# reference(v, c, t): the value, the step's f32 scalars, the tensor (reshaped like v) or None.
# value_range(lo, hi, c, t): bounds on v before and the tensor's bounds -> bounds on v after, in float64
# before rounding (NaN aside). Scalars are as in EpilogueSpec: a sum with a zero point has it second.

Range = tuple[float, float]
Reference = Callable[[F32, F32, "Array | None"], F32]
ValueRange = Callable[[float, float, F32, Range], Range]

# The number of scalars of each kind (a zero point, where present, adds one), and the kinds with a tensor.
STEP_SCALARS: dict[str, int] = {"sum": 1, "linear": 2, "max": 1, "min": 1, "leaky": 1}
TENSOR_KINDS = frozenset({"sum"})


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
}

# A kind without an entry can yield anything.
STEP_RANGE: dict[str, ValueRange] = {
    "sum": _sum_range,
    "linear": _linear_range,
    "max": _max_range,
    "min": _min_range,
    "leaky": _leaky_range,
}
