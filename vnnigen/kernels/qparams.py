"""Scales and zero points: their checks, their choice, and the conversions they define.

`real = (quantized - zero_point) * scale`, with `quantized` in u8 or s8 (or s32, for biases).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.types import F32, F64, INT_RANGE, NUMPY, S32, Array, DType, dtype_name


def check_scale(value: npt.ArrayLike, name: str, n: int | None = None) -> F64:
    """Return a scale as float64, of shape `()` or, where `n` is given, possibly `(n,)`.

    Raises QuantizationError, naming the argument, unless every value is finite and above zero and the
    shape is a scalar's or `(n,)`; DTypeError for what is not a real number.
    """
    given = np.asarray(value)
    if given.dtype.kind not in "iuf" and given.dtype != NUMPY["bf16"]:
        raise DTypeError(f"{name} must be a real number or an array of them, not {given.dtype}")
    scale = given.astype(np.float64)
    _check_shape(scale.shape, name, n)
    if not (np.isfinite(scale) & (scale > 0)).all():
        bad = scale[~(np.isfinite(scale) & (scale > 0))].flat[0]
        raise QuantizationError(f"{name} must be finite and above zero, but contains {bad}")
    return scale


def check_zero_point(value: npt.ArrayLike, dtype: DType, name: str, n: int | None = None) -> S32:
    """Return a zero point as int32, of shape `()` or, where `n` is given, possibly `(n,)`.

    Raises QuantizationError, naming the argument, for a value outside the range of `dtype` or a wrong
    shape; DTypeError for what is not an integer (booleans included).
    """
    given = np.asarray(value)
    if given.dtype.kind not in "iu":
        raise DTypeError(f"{name} must be an integer or an array of them, not {given.dtype}")
    _check_shape(given.shape, name, n)
    low, high = INT_RANGE[dtype]
    outside = (given < low) | (given > high)
    if outside.any():
        raise QuantizationError(
            f"{name} must be in [{low}, {high}], the range of {dtype}, but contains {given[outside].flat[0]}"
        )
    return given.astype(np.int32)


def _check_shape(shape: tuple[int, ...], name: str, n: int | None) -> None:
    if shape == () or (n is not None and shape == (n,)):
        return
    wanted = "a scalar" if n is None else f"a scalar or an array of shape ({n},), one value per channel"
    raise QuantizationError(f"{name} must be {wanted}, but has shape {shape}")


class QParams(NamedTuple):
    """A scale and a zero point: a float and an int, or one array each (per channel)."""

    scale: float | F32
    zero_point: int | S32


def choose_qparams(
    low: npt.ArrayLike,
    high: npt.ArrayLike | None = None,
    *,
    dtype: npt.DTypeLike = np.uint8,
    symmetric: bool = False,
    axis: int | None = None,
) -> QParams:
    """Choose the scale and zero point that cover a range with u8 or s8.

    The range is that of the data `low` (any shape; with `axis`, one range per index along that axis), or,
    where `high` is given, `[low, high]` itself (scalars or arrays of one shape). It is widened to contain
    zero, so that zero is represented exactly. `symmetric` asks for a fixed zero point: 0 for s8 (values in
    [-127, 127]); for u8 0 where the range has no negative part, else 128. A range of only zeros gets scale
    1. The scale is rounded to float32, and the zero point is chosen with the rounded scale.

    Raises QuantizationError for values not finite or `low > high`, ShapeError for empty data or a bad axis.
    """
    name = dtype_name(dtype, "dtype", ("u8", "s8"))
    lows, highs = _value_range(low, high, axis)
    if not (np.isfinite(lows).all() and np.isfinite(highs).all()):
        raise QuantizationError("choose_qparams needs finite values; remove NaN and infinity first")
    if (lows > highs).any():
        raise QuantizationError("choose_qparams: low must not be above high")
    lows, highs = np.minimum(lows, 0.0), np.maximum(highs, 0.0)
    qmin, qmax = INT_RANGE[name]
    if symmetric:
        signed = np.full(lows.shape, name == "s8") | (lows < 0)
        scale = np.where(signed, np.maximum(-lows, highs) / 127, highs / 255)
    else:
        scale = (highs - lows) / (qmax - qmin)
    scale32 = np.where(scale == 0, 1.0, np.maximum(scale, np.finfo(np.float32).tiny)).astype(np.float32)
    if symmetric:
        zero_point = np.where(signed & (name == "u8"), 128, 0).astype(np.int32)
    else:
        zero_point = np.clip(np.rint(qmin - lows / scale32), qmin, qmax).astype(np.int32)
    if scale32.shape == ():
        return QParams(float(scale32), int(zero_point))
    return QParams(scale32, zero_point)


def _value_range(low: npt.ArrayLike, high: npt.ArrayLike | None, axis: int | None) -> tuple[F64, F64]:
    """Return the float64 lower and upper ends that `choose_qparams` was asked to cover."""
    data = np.asarray(low, dtype=np.float64)
    if high is not None:
        if axis is not None:
            raise ShapeError("choose_qparams: axis is for data; with low and high, give arrays of ends")
        highs = np.asarray(high, dtype=np.float64)
        if data.shape != highs.shape:
            raise ShapeError(f"choose_qparams: low has shape {data.shape} but high has {highs.shape}")
        return data, highs
    if data.size == 0:
        raise ShapeError(f"choose_qparams: the data is empty, of shape {data.shape}")
    if axis is None:
        return np.asarray(data.min()), np.asarray(data.max())
    others = tuple(i for i in range(data.ndim) if i != _check_axis(axis, data.ndim))
    return data.min(axis=others), data.max(axis=others)


def quantize(
    x: npt.ArrayLike,
    scale: npt.ArrayLike,
    zero_point: npt.ArrayLike = 0,
    *,
    dtype: npt.DTypeLike = np.uint8,
    axis: int | None = None,
) -> Array:
    """Quantize real numbers: `saturate(round_half_even(x / scale) + zero_point)`.

    `x` is float32 of any shape; the quotient is rounded to float32, as in ONNX QuantizeLinear (for `dtype`
    s32, made for biases, all is float64). With `axis`, scale and zero point may have one value per index
    along that axis. Infinities saturate; NaN becomes the smallest value of `dtype`.

    Raises QuantizationError, DTypeError or ShapeError for scales and zero points that do not fit.
    """
    name = dtype_name(dtype, "dtype", ("u8", "s8", "s32"))
    values = np.asarray(x)
    if values.dtype.kind not in "iuf" and values.dtype != NUMPY["bf16"]:
        raise DTypeError(f"x must hold real numbers, not {values.dtype}")
    scales, zeros = _along_axis(scale, zero_point, name, values.shape, axis)
    work: type[np.float32] | type[np.float64] = np.float64 if name == "s32" else np.float32
    with np.errstate(all="ignore"):
        divisor: Array = scales.astype(work)
        if not (np.isfinite(divisor) & (divisor > 0)).all():
            raise QuantizationError("scale is not representable as a float32 above zero")
        v = np.rint(values.astype(work) / divisor)
    qmin, qmax = INT_RANGE[name]
    # Clamp before adding the zero point: the sum of two small integers is then exact.
    v = np.clip(np.where(np.isnan(v), -np.inf, v), (qmin - zeros).astype(work), (qmax - zeros).astype(work))
    return (v.astype(np.int64) + zeros).astype(NUMPY[name])


def dequantize(
    q: npt.ArrayLike, scale: npt.ArrayLike, zero_point: npt.ArrayLike = 0, *, axis: int | None = None
) -> F32:
    """Return `(q - zero_point) * scale` as float32, for `q` of u8, s8 or s32 (any shape).

    With `axis`, scale and zero point may have one value per index along that axis. The difference is exact
    and the product is rounded once.

    Raises QuantizationError, DTypeError or ShapeError for scales and zero points that do not fit.
    """
    values = np.asarray(q)
    name = dtype_name(values.dtype, "q", ("u8", "s8", "s32"))
    scales, zeros = _along_axis(scale, zero_point, name, values.shape, axis)
    with np.errstate(all="ignore"):
        return ((values.astype(np.int64) - zeros) * scales).astype(np.float32)


def _along_axis(
    scale: npt.ArrayLike, zero_point: npt.ArrayLike, dtype: DType, shape: tuple[int, ...], axis: int | None
) -> tuple[F64, npt.NDArray[np.int64]]:
    """Check a scale and a zero point and shape them to broadcast along `axis` of an array of `shape`."""
    n = None
    target: tuple[int, ...] = ()
    if axis is not None:
        axis = _check_axis(axis, len(shape))
        n = shape[axis]
        target = (n,) + (1,) * (len(shape) - axis - 1)
    scales = check_scale(scale, "scale", n)
    zeros = check_zero_point(zero_point, dtype, "zero_point", n).astype(np.int64)
    return (
        scales.reshape(target) if scales.ndim else scales,
        zeros.reshape(target) if zeros.ndim else zeros,
    )


def _check_axis(axis: int, ndim: int) -> int:
    if not -ndim <= axis < ndim:
        raise ShapeError(f"axis {axis} is out of range for an array of {ndim} dimensions")
    return axis % ndim
