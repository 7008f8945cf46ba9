"""NumPy references: what every kernel must compute, and the tier that runs anywhere.

The integer products go through floating-point BLAS, which is exact here: when `acc_bound` passes, the
magnitudes of all products of one sum add up to at most 2**32 (255 times the magnitudes of the weights, which
is the distance between the largest and the smallest sum that a source can give), so every partial sum is an
integer that float64 holds, in any order; where the magnitudes add up to less than 2**24, float32 does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.kernels.epilogue import Epilogue, reference_epilogue
from vnnigen.kernels.problem import ConvProblem, GemmProblem, acc_bound, centered_weights
from vnnigen.kernels.types import S32, Array

_PATCH_BYTES = 2**25  # how much of the input is gathered into patches at once


def conv_int8_reference(
    p: ConvProblem,
    x: Array,
    w: Array,
    epilogue: Epilogue,
    *,
    x_zero_point: int = 0,
    w_zero_point: npt.ArrayLike = 0,
    bias: S32 | None = None,
    tensors: Sequence[Array | None] = (),
) -> Array:
    """Convolve x (u8 or s8, NHWC) with w (s8, OIHW) and apply the epilogue; returns y, NHWC.

    `bias` is int32 of shape (oc,); `w_zero_point` a scalar or (oc,); `tensors` as in reference_epilogue.
    Padding feeds the source's zero point. Raises QuantizationError where an accumulator could leave s32.
    """
    acc_bound(w, p.src, x_zero_point, w_zero_point=w_zero_point, bias=bias)
    centered = centered_weights(w, w_zero_point)
    work = _exact_type(centered, (1, 2, 3))
    acc = _convolve(p, x.astype(work) - work(x_zero_point), centered.astype(work))
    return reference_epilogue(_add_bias(acc, bias), epilogue, tensors)


def gemm_int8_reference(
    p: GemmProblem,
    a: Array,
    b: Array,
    epilogue: Epilogue,
    *,
    a_zero_point: int = 0,
    b_zero_point: npt.ArrayLike = 0,
    bias: S32 | None = None,
    tensors: Sequence[Array | None] = (),
) -> Array:
    """Multiply a[m, k] (u8 or s8) by b[k, n] (s8) and apply the epilogue; returns c[m, n].

    `bias` is int32 of shape (n,); `b_zero_point` a scalar or (n,); `tensors` as in reference_epilogue.
    Raises QuantizationError where an accumulator could leave s32.
    """
    acc_bound(b, p.src, a_zero_point, w_zero_point=b_zero_point, bias=bias, axis=1)
    centered = centered_weights(b, b_zero_point, axis=1)
    work = _exact_type(centered, 0)
    acc = (a.astype(work) - work(a_zero_point)) @ centered.astype(work)
    return reference_epilogue(_add_bias(acc, bias), epilogue, tensors)


def conv_f32_reference(
    p: ConvProblem, x: Array, w: Array, epilogue: Epilogue, tensors: Sequence[Array | None] = ()
) -> Array:
    """Convolve x (f32, NHWC) with w (f32, OIHW), summing in float64; returns y (f32, NHWC)."""
    acc = _convolve(p, x.astype(np.float64), w.astype(np.float64))
    return reference_epilogue(_to_f32(acc), epilogue, tensors)


def gemm_f32_reference(
    p: GemmProblem, a: Array, b: Array, epilogue: Epilogue, tensors: Sequence[Array | None] = ()
) -> Array:
    """Multiply a[m, k] by b[k, n], both f32, summing in float64; returns c[m, n] (f32)."""
    with np.errstate(all="ignore"):
        acc = a.astype(np.float64) @ b.astype(np.float64)
    return reference_epilogue(_to_f32(acc), epilogue, tensors)


def _exact_type(centered: npt.NDArray[np.int16], axes: int | tuple[int, ...]) -> type[Any]:
    """Return the narrowest type whose sums of products with a centered u8 or s8 source are exact."""
    magnitudes = np.abs(centered.astype(np.int32)).sum(axis=axes, dtype=np.int64)
    return np.float32 if int(magnitudes.max()) * 255 < 2**24 else np.float64


def _add_bias(acc: Array, bias: S32 | None) -> S32:
    """Return the exact s32 sum (which `acc_bound` has shown to fit)."""
    total: S32 = acc.astype(np.int32)
    return total if bias is None else total + bias


def _to_f32(acc: Array) -> Array:
    with np.errstate(over="ignore"):
        return acc.astype(np.float32)


def _convolve(p: ConvProblem, x: Array, w: Array) -> Array:
    """Convolve zero-padded floating-point x, NHWC, with w, OIHW."""
    (top, bottom), (left, right) = p.pad
    padded = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    with np.errstate(all="ignore"):
        return _by_taps(p, padded, w) if p.icg == 1 else _by_patches(p, padded, w)


def _by_taps(p: ConvProblem, x: Array, w: Array) -> Array:
    """Convolve with one input channel per group: one multiply-add of whole images per kernel tap."""
    (sh, sw), (dh, dw) = p.stride, p.dilation
    taps = w.reshape(p.groups, p.ocg, p.kh, p.kw)
    y = np.zeros((p.n, p.oh, p.ow, p.groups, p.ocg), x.dtype)
    for i in range(p.kh):
        rows = slice(i * dh, i * dh + (p.oh - 1) * sh + 1, sh)
        for j in range(p.kw):
            columns = slice(j * dw, j * dw + (p.ow - 1) * sw + 1, sw)
            y += x[:, rows, columns, :, None] * taps[:, :, i, j]
    return y.reshape(p.y_shape)


def _by_patches(p: ConvProblem, x: Array, w: Array) -> Array:
    """Convolve by gathering patches (a few output rows at a time) and multiplying matrices."""
    (sh, sw), (dh, dw) = p.stride, p.dilation
    extent = ((p.kh - 1) * dh + 1, (p.kw - 1) * dw + 1)
    windows = np.lib.stride_tricks.sliding_window_view(x, extent, axis=(1, 2))
    # [n, oh, ow, ic, kh, kw] -> [n, oh, ow, kh, kw, ic]: whole runs of channels to copy
    windows = windows[:, ::sh, ::sw, :, ::dh, ::dw].transpose(0, 1, 2, 4, 5, 3)
    depth = p.kh * p.kw * p.icg
    matrices = w.transpose(0, 2, 3, 1).reshape(p.groups, p.ocg, depth).transpose(0, 2, 1)
    y = np.empty(p.y_shape, x.dtype)
    rows = max(1, _PATCH_BYTES // (p.ow * depth * x.itemsize))
    for image in range(p.n):
        for first in range(0, p.oh, rows):
            block = windows[image, first : first + rows]
            for group in range(p.groups):
                patches = block[..., group * p.icg : (group + 1) * p.icg].reshape(-1, depth)
                out = y[image, first : first + rows, :, group * p.ocg : (group + 1) * p.ocg]
                out[...] = (patches @ matrices[group]).reshape(out.shape)
    return y
