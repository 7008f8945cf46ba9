"""The epilogue: from the accumulator to the output element, as constants for kernels and as a reference.

`fold` is the one place where scales, bias, post-ops and output type become f32 constants; generators and
reference both take its result. What a kernel must compute, per element of output channel `c`:

    v = fma(f32(acc), m[c], b[c])     without `has_b` the product alone, without `has_m` the sum alone
    v = each step in turn             (kinds: see post_ops)
    v = v * (1/y_scale)               with `post_scale`
    f32 output: v
    bf16 output: v rounded a second time (see `bf16`)
    u8, s8 output: round_half_even(clamp(v, lo - zp, hi - zp)) + zp, NaN to the lower bound
    s32 output: the accumulator itself, to which preparation has added the s32 bias

How the clamp may be done. The lower one, by saturating narrowing after VCVTPS2DQ (Intel SDM vol. 2: what
does not fit, NaN included, becomes INT_MIN), adding the zero point with saturation to s16 between the two
packs: INT_MIN plus a negative zero point must not wrap. The upper one, where `clamp_hi`, by
`VMINPS v, bound, v`, in this order of operands so that NaN stays NaN; without `clamp_hi`, v is known to be
below 2**31 and the saturation does that end too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.bf16 import round_to_bf16
from vnnigen.kernels.fma import fma32
from vnnigen.kernels.post_ops import PostOp, check_sum_zero_point
from vnnigen.kernels.qparams import check_scale, check_zero_point
from vnnigen.kernels.steps import CHANNEL_KINDS, STEP_RANGE, STEP_REFERENCE, STEP_SCALARS, TENSOR_KINDS, Range, Step
from vnnigen.kernels.types import F32, F64, INT_RANGE, NUMPY, Array, DType

# Outputs that are real numbers, without scale and zero point.
FLOATS: tuple[DType, ...] = ("f32", "bf16")
# Relative widening of a range per step: two roundings to f32 (2**-24 each) with room to spare.
_SLACK = 2.0**-22
# VCVTPS2DQ is exact below 2**31; 256 leaves room for a zero point.
_CONVERTIBLE = 2.0**31 - 256


@dataclass(frozen=True)
class StepSpec:
    """The structure of one step: its kind and, for kinds with a tensor, the tensor's type."""

    kind: str
    tensor: DType | None = None
    has_zero_point: bool = False

    @property
    def n_scalars(self) -> int:
        """How many of the epilogue's scalars are this step's (a zero point comes last)."""
        return STEP_SCALARS[self.kind] + self.has_zero_point


@dataclass(frozen=True)
class EpilogueSpec:
    """The structure of an epilogue: what of it a kernel's code, and so its key, depends on."""

    acc: DType
    steps: tuple[StepSpec, ...]
    post_scale: bool
    out: DType
    clamp_hi: bool
    add_zp: bool
    has_m: bool
    has_b: bool

    def slots(self) -> Iterator[tuple[StepSpec, int]]:
        """Yield each step with the index of its first scalar."""
        first = 0
        for step in self.steps:
            yield step, first
            first += step.n_scalars

    @property
    def reads_tensors(self) -> bool:
        """Whether some step reads a tensor."""
        return any(step.tensor is not None for step in self.steps)

    @property
    def post_scale_slot(self) -> int:
        """The index of the scalar 1/y_scale, present with `post_scale`."""
        return sum(step.n_scalars for step in self.steps)

    @property
    def clamp_slot(self) -> int:
        """The index of the scalar `hi - zp`, present with `clamp_hi`."""
        return self.post_scale_slot + self.post_scale

    @property
    def n_scalars(self) -> int:
        """The number of scalars: the steps', then 1/y_scale, then the upper bound."""
        return self.clamp_slot + self.clamp_hi


@dataclass(frozen=True, eq=False)
class Epilogue:
    """A structure and its constants.

    `tensors` has one entry per step with a tensor, None meaning `out`; `vectors` one f32 array of shape (n,) per step
    with a constant per channel.
    """

    spec: EpilogueSpec
    m: F32 | None
    b: F32 | None
    scalars: F32
    zero_point: int
    tensors: tuple[Array | None, ...]
    vectors: tuple[F32, ...] = ()


def fold(
    *,
    n: int,
    x_scale: npt.ArrayLike = 1.0,
    w_scale: npt.ArrayLike = 1.0,
    bias_f32: Array | None = None,
    post_ops: Sequence[PostOp] = (),
    out: DType,
    y_scale: npt.ArrayLike | None = None,
    y_zero_point: npt.ArrayLike = 0,
    acc_bound: F64 | None = None,
    acc: DType = "s32",
) -> Epilogue:
    """Compute an epilogue's constants in float64, each rounded to f32 once.

    `n` is the number of output channels; `w_scale` is a scalar or of shape (n,); `bias_f32`, of shape (n,),
    is in real units (an s32 bias belongs to the accumulator); `acc_bound`, of shape (n,), bounds the
    accumulator's magnitude. The output scale is folded into the constants when every post-op is piecewise
    linear. Raises QuantizationError for scales, zero points or combinations that do not fit, DTypeError for
    arguments of the wrong type, ShapeError for a vector of another length than `n`.
    """
    _check_post_ops(post_ops)
    x_scales = check_scale(x_scale, "x_scale")
    scales = np.broadcast_to(x_scales * check_scale(w_scale, "w_scale", n), (n,))
    if out == "s32":
        _check_s32_output(bias_f32, post_ops, y_scale, y_zero_point)
        spec = EpilogueSpec(acc, (), False, out, False, False, False, False)
        return Epilogue(spec, None, None, np.empty(0, np.float32), 0, ())
    reciprocal, zero_point = _output_qparams(out, y_scale, y_zero_point)
    folded = all(op.piecewise_linear for op in post_ops)
    s = reciprocal if folded else 1.0
    steps = [step for op in post_ops for step in op.steps(s)]
    if out not in FLOATS and folded:
        steps = _drop_redundant(steps, INT_RANGE[out][0] - zero_point, INT_RANGE[out][1] - zero_point)
    with np.errstate(all="ignore"):
        m = _to_f32(scales * s, "x_scale * w_scale / y_scale", positive=True)
        b = None if bias_f32 is None else _to_f32(bias_f32.astype(np.float64) * s, "bias / y_scale")
    specs, scalars = _lower(steps, out)
    post_scale = out not in FLOATS and not folded
    if post_scale:
        scalars.append(float(_to_f32(reciprocal, "1 / y_scale", positive=True)))
    spec = EpilogueSpec(
        acc, specs, post_scale, out, False, zero_point != 0,
        has_m=acc == "s32" or bool((m != 1).any()), has_b=b is not None,
    )  # fmt: skip
    vectors = tuple(_vector(step.tensor, n) for step in steps if step.kind in CHANNEL_KINDS)
    upper = _upper_end(spec, m, b, np.array(scalars, np.float32), acc_bound, vectors)
    if out not in FLOATS and not upper < _CONVERTIBLE:
        spec = replace(spec, clamp_hi=True)
        scalars.append(INT_RANGE[out][1] - zero_point)
    tensors = tuple(step.tensor for step in steps if step.kind in TENSOR_KINDS)
    frozen = _frozen(np.array(scalars, np.float32))
    return Epilogue(spec, m if spec.has_m else None, b, frozen, zero_point, tensors, vectors)


def _vector(values: Array | None, n: int) -> F32:
    """The constants of a channel step, rounded."""
    if values is None or values.shape != (n,):
        shape = None if values is None else values.shape
        raise ShapeError(f"a Binary vector has shape {shape}; there are {n} output channels")
    return _to_f32(values, "a Binary vector's value")


def _check_post_ops(post_ops: Sequence[PostOp]) -> None:
    for op in post_ops:
        if not isinstance(op, PostOp):
            raise DTypeError(f"post_ops must hold post-operations such as ReLU(), not {op!r}")


def _check_s32_output(
    bias: Array | None, post_ops: Sequence[PostOp], y_scale: npt.ArrayLike | None, y_zp: npt.ArrayLike
) -> None:
    """Raise QuantizationError for what an s32 output, the accumulator itself, cannot have."""
    if post_ops:
        raise QuantizationError("an s32 output takes no post_ops; ask for f32, u8 or s8")
    if bias is not None:
        raise QuantizationError("an s32 output takes an s32 bias, in units of x_scale * w_scale")
    _check_no_output_qparams("s32", y_scale, y_zp)


def _check_no_output_qparams(out: DType, y_scale: npt.ArrayLike | None, y_zp: npt.ArrayLike) -> None:
    if y_scale is not None or np.any(np.asarray(y_zp) != 0):
        raise QuantizationError(f"y_scale and y_zero_point are for u8 and s8 outputs, not for {out}")


def _output_qparams(out: DType, y_scale: npt.ArrayLike | None, y_zp: npt.ArrayLike) -> tuple[float, int]:
    """Return 1/y_scale and the zero point: (1.0, 0) for an f32 or bf16 output."""
    if out in FLOATS:
        _check_no_output_qparams(out, y_scale, y_zp)
        return 1.0, 0
    if y_scale is None:
        raise QuantizationError(f"a {out} output needs y_scale")
    scale = float(check_scale(y_scale, "y_scale"))
    zero_point = int(check_zero_point(y_zp, out, "y_zero_point"))
    # The reciprocal of a denormal float64 is infinite; rounding m to f32 reports that.
    return (1.0 / scale if scale > 1e-300 else math.inf), zero_point


def _drop_redundant(steps: list[Step], lo: int, hi: int) -> list[Step]:
    """Drop trailing `max` and `min` steps that the output's own clamp to [lo, hi] makes redundant.

    Exact for NaN too: a dropped `max` would turn it into a value that clamps to lo, as NaN itself does,
    and no NaN reaches a `min` (see Clip).
    """
    end = len(steps)
    while end:
        step = steps[end - 1]
        if step.kind not in ("max", "min"):
            break
        bound = float(_to_f32(step.scalars[0], "a bound", finite=False))
        if not (bound <= lo if step.kind == "max" else bound >= hi):
            break
        end -= 1
    return steps[:end]


def _lower(steps: list[Step], out: DType) -> tuple[tuple[StepSpec, ...], list[float]]:
    """Split steps into their structure and their scalars, rounded to f32."""
    specs: list[StepSpec] = []
    scalars: list[float] = []
    for step in steps:
        # A clamp may well be at infinity; any other infinite constant would make NaNs.
        limit = step.kind in ("max", "min")
        scalars += [float(_to_f32(c, f"a constant of {step.kind}", finite=not limit)) for c in step.scalars]
        dtype: DType | None = None
        if step.kind in TENSOR_KINDS:
            dtype = out if step.dtype is None else step.dtype
            check_sum_zero_point(step.zero_point, dtype)
        if step.zero_point:
            scalars.append(step.zero_point)
        specs.append(StepSpec(step.kind, dtype, step.zero_point != 0))
    return tuple(specs), scalars


def _to_f32(value: npt.ArrayLike, name: str, *, finite: bool = True, positive: bool = False) -> F32:
    """Round float64 to f32; QuantizationError if that makes it infinite or, with `positive`, zero."""
    with np.errstate(all="ignore"):
        rounded: F32 = np.asarray(value, dtype=np.float64).astype(np.float32)
    if finite and not np.isfinite(rounded).all():
        raise QuantizationError(f"{name} is not finite in float32; check the scales")
    if positive and not (rounded > 0).all():
        raise QuantizationError(f"{name} underflows to zero in float32; check the scales")
    return _frozen(rounded)


def _frozen(a: F32) -> F32:
    a.setflags(write=False)
    return a


def _upper_end(
    spec: EpilogueSpec, m: F32, b: F32 | None, scalars: F32, acc_bound: F64 | None, vectors: Sequence[F32]
) -> float:
    """Return a number that v, before the clamp, is never above (infinity when nothing is known)."""
    if acc_bound is None:
        acc_bound = np.full(m.shape, 2.0**31 if spec.acc == "s32" else np.inf)
    reach = acc_bound * m.astype(np.float64)
    shift = np.zeros(()) if b is None else b.astype(np.float64)
    lo, hi = _widen(float((shift - reach).min()), float((shift + reach).max()))
    channels = iter(vectors)
    for step, first in spec.slots():
        if step.kind not in STEP_RANGE:
            lo, hi = -math.inf, math.inf
            continue
        tensor: Range = INT_RANGE.get(step.tensor, (-math.inf, math.inf)) if step.tensor else (0.0, 0.0)
        if step.kind in CHANNEL_KINDS:
            vector = next(channels)
            tensor = float(vector.min()), float(vector.max())
        lo, hi = _widen(*STEP_RANGE[step.kind](lo, hi, scalars[first : first + step.n_scalars], tensor))
    return hi * float(scalars[spec.post_scale_slot]) if spec.post_scale else hi


def _widen(lo: float, hi: float) -> Range:
    """Make room for the roundings of a step; what may overflow f32 is infinite."""
    lo, hi = lo - abs(lo) * _SLACK, hi + abs(hi) * _SLACK
    return (lo if lo > -3e38 else -math.inf), (hi if hi < 3e38 else math.inf)


def reference_epilogue(acc: Array, epilogue: Epilogue, tensors: Sequence[Array | None] = ()) -> Array:
    """Apply an epilogue to accumulators exactly as every kernel must.

    `acc` is int32 (or float32, after `acc="f32"`) of shape [..., n]; `tensors`, one per step with a tensor
    and each of acc's shape, replace the epilogue's own (those for `out` must be given). Returns a new array
    of acc's shape and the output's type.
    """
    spec = epilogue.spec
    if spec.out == "s32":
        return acc.astype(np.int32)
    operands, vectors = iter(tensors or epilogue.tensors), iter(epilogue.vectors)
    with np.errstate(all="ignore"):
        v = acc.astype(np.float32)
        if epilogue.m is not None and epilogue.b is not None:
            v = fma32(v, epilogue.m, epilogue.b)
        elif epilogue.m is not None:
            v = v * epilogue.m
        elif epilogue.b is not None:
            v = v + epilogue.b
        for step, first in spec.slots():
            tensor = next(operands) if step.kind in TENSOR_KINDS else None
            if step.kind in CHANNEL_KINDS:
                tensor = next(vectors)
            v = STEP_REFERENCE[step.kind](v, epilogue.scalars[first : first + step.n_scalars], tensor)
        if spec.post_scale:
            v = v * epilogue.scalars[spec.post_scale_slot]
    if spec.out in FLOATS:
        return v if spec.out == "f32" else round_to_bf16(v)
    return _narrow(v, spec.out, epilogue.zero_point)


def _narrow(v: F32, out: DType, zero_point: int) -> Array:
    """Clamp, round half to even and add the zero point."""
    lo, hi = (np.float32(end - zero_point) for end in INT_RANGE[out])
    v = np.where(v > lo, v, lo)
    v = np.where(v < hi, v, hi)
    result: Array = (np.rint(v).astype(np.int32) + np.int32(zero_point)).astype(NUMPY[out])
    return result
