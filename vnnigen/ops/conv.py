"""Convolution: `conv_int8` and `conv_f32` (bf16 is in `ops.bf16`), and the handles that pack weights once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.geometry import Geometry, conv_geometry
from vnnigen.kernels.packed import Weights
from vnnigen.kernels.post_ops import PostOp
from vnnigen.kernels.problem import ConvProblem, as_int, as_padding, as_pair
from vnnigen.kernels.reference import conv_f32_reference, conv_int8_reference
from vnnigen.kernels.types import Array, DType
from vnnigen.ops.operator import Operator, Plan, Quantization, as_post_ops, check_bias, make_quantization


class _Conv(Operator):
    """What convolutions of all types share."""

    _op = "conv"

    def __init__(
        self, weights: Weights, q: Quantization, isa: str | None, padding: Any, layout: str, strategy: str = "auto"
    ) -> None:
        if layout not in ("NHWC", "NCHW"):
            raise ShapeError(f"layout must be 'NHWC' or 'NCHW', not {layout!r}")
        self._pad = as_padding(padding)
        self._nchw = layout == "NCHW"
        super().__init__(weights, q, isa, strategy)

    def _problem(self, shape: tuple[int, ...], src: DType) -> ConvProblem:
        w = self._weights
        _, _, sh, sw, dh, dw = w.window or (1, 1, 1, 1, 1, 1)
        return ConvProblem.from_arguments(
            shape, w.values.shape, stride=(sh, sw), padding=self._pad, dilation=(dh, dw), groups=w.groups, src=src,
            dst=self._q.out, w_zero_point=w.zero_point is not None,
        )  # fmt: skip

    def _geometry(self, problem: ConvProblem) -> Geometry:
        return conv_geometry(problem)

    def _y_shape(self, problem: ConvProblem) -> tuple[int, ...]:
        return problem.y_shape

    def __call__(self, x: Array, out: Array | None = None, tensors: Sequence[Array] = ()) -> Array:
        """Convolve x; see the class for shapes and `Operator` for `out` and `tensors`."""
        if not self._nchw:
            return super().__call__(x, out, tensors)
        if getattr(x, "ndim", 0) != 4:
            raise ShapeError(f"x must have 4 dimensions (batch, channels, height, width), not {np.shape(x)}")
        if out is not None:
            raise ShapeError("out= needs layout='NHWC': an NCHW result is a reordered copy")
        y = super().__call__(np.ascontiguousarray(x.transpose(0, 2, 3, 1)), None, tensors)
        return np.ascontiguousarray(y.transpose(0, 3, 1, 2))

    def _inner(self, tensor: Array) -> Array:
        """A tensor of a Sum, in NHWC."""
        nchw = self._nchw and isinstance(tensor, np.ndarray) and tensor.ndim == 4
        return tensor.transpose(0, 2, 3, 1) if nchw else tensor


def _weights(w: Any, dtype: Any, groups: Any, stride: Any, dilation: Any) -> Weights:
    """Check weights [oc, ic/groups, kh, kw] and describe them, without zero points and bias."""
    if not isinstance(w, np.ndarray):
        raise DTypeError(f"w must be a NumPy array, not {type(w).__name__}")
    if w.dtype != dtype:
        raise DTypeError(f"w must be {np.dtype(dtype)}, not {w.dtype}")
    if w.ndim != 4 or w.size == 0:
        raise ShapeError(f"w must have shape (oc, ic/groups, kh, kw) without empty dimensions, not {w.shape}")
    count = as_int(groups, "groups", 1)
    if w.shape[0] % count:
        raise ShapeError(f"groups={count} must divide the {w.shape[0]} output channels")
    window = (int(w.shape[2]), int(w.shape[3]), *as_pair(stride, "stride"), *as_pair(dilation, "dilation"))
    merged = count == 1 and (window[5] == 1 or window[1] == 1)
    return Weights(own(w), count, merged, None, np.zeros(w.shape[0], np.int64), window)


def own(w: Array) -> Array:
    """`w` in C order, copied unless it is read-only: the caller may change its array, the operator must not."""
    return w if w.flags.c_contiguous and not w.flags.writeable else np.array(w, order="C")


class Conv2dInt8(_Conv):
    """An int8 convolution: weights packed once, called many times.

    w: s8 [oc, ic/groups, kh, kw]. Calls take x: u8 or s8 [n, h, w, ic] (NCHW with `layout`) and give
    [n, oh, ow, oc]. Arguments are those of `conv_int8`. Non-contiguous x is copied; `out` must be contiguous.
    The tier is chosen here, once. Results are bit-identical on every tier.

    Raises:
        ShapeError, DTypeError, QuantizationError, ISAError: for arguments that do not fit, here or at the call.

    """

    sources: tuple[DType, ...] = ("u8", "s8")

    def __init__(
        self, w: Array, bias: Array | None = None, *, x_scale: float = 1.0, x_zero_point: int = 0,
        w_scale: Any = 1.0, w_zero_point: Any = 0, y_scale: float | None = None, y_zero_point: int = 0,
        stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
        post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = np.uint8, layout: str = "NHWC",
        isa: str | None = None,
    ) -> None:  # fmt: skip
        weights = _weights(w, np.int8, groups, stride, dilation)
        q = make_quantization(
            int(w.shape[0]), x_scale=x_scale, x_zp=x_zero_point, w_scale=w_scale, w_zp=w_zero_point, y_scale=y_scale,
            y_zp=y_zero_point, bias=bias, post_ops=as_post_ops(post_ops), out_dtype=out_dtype,
        )  # fmt: skip
        _check_output(q)
        bias_s32 = weights.bias if q.bias_s32 is None else q.bias_s32
        super().__init__(replace(weights, zero_point=q.w_zp, bias=bias_s32), q, isa, padding, layout)

    def _reference(self, plan: Plan, x: Array, tensors: Sequence[Array]) -> Array:
        q = self._q
        assert isinstance(plan.problem, ConvProblem)
        return conv_int8_reference(
            plan.problem, x, self._weights.values, plan.prepared.epilogue, x_zero_point=q.x_zp,
            w_zero_point=0 if q.w_zp is None else q.w_zp, bias=q.bias_s32, tensors=tensors,
        )  # fmt: skip


def _check_output(q: Quantization) -> None:
    """Say early what `fold` would say at the first call."""
    if q.out in ("u8", "s8") and q.y_scale is None:
        raise QuantizationError(f"a {q.out} output needs y_scale")
    if q.out == "s32" and q.post_ops:
        raise QuantizationError("an s32 output takes no post_ops; ask for f32, u8 or s8")


class Conv2dF32(_Conv):
    """An f32 convolution, the baseline of the int8 ones: w f32 [oc, ic/groups, kh, kw], x f32 [n, h, w, ic]."""

    sources: tuple[DType, ...] = ("f32",)

    def __init__(
        self, w: Array, bias: Array | None = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, post_ops: Sequence[PostOp] | PostOp = (), layout: str = "NHWC", isa: str | None = None,
    ) -> None:  # fmt: skip
        weights = _weights(w, np.float32, groups, stride, dilation)
        super().__init__(weights, float_quantization(int(w.shape[0]), bias, post_ops), isa, padding, layout)

    def _reference(self, plan: Plan, x: Array, tensors: Sequence[Array]) -> Array:
        assert isinstance(plan.problem, ConvProblem)
        return conv_f32_reference(plan.problem, x, self._weights.values, plan.prepared.epilogue, tensors)


def float_quantization(n: int, bias: Any, post_ops: Any) -> Quantization:
    """The numbers of a floating-point operator: a bias and post-ops."""
    _, bias_f32 = check_bias(bias, n, f32=True)
    return Quantization(1.0, 0, 1.0, None, None, 0, None, bias_f32, as_post_ops(post_ops), "f32")


def conv_int8(
    x: Array, w: Array, bias: Array | None = None, *, x_scale: float = 1.0, x_zero_point: int = 0,
    w_scale: Any = 1.0, w_zero_point: Any = 0, y_scale: float | None = None, y_zero_point: int = 0,
    stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1,
    post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = np.uint8, layout: str = "NHWC", isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Convolve quantized x with quantized w, in exact integer arithmetic, and requantize.

    Real values are `(q - zero_point) * scale`. The result is
    `post_ops(sum (x - x_zp)*(w - w_zp) * x_scale*w_scale + bias)`, divided by y_scale, rounded half to even, plus
    y_zero_point, saturated (arithmetic: TensorFlow Lite quantization specification; oneDNN "int8 inference").

    Args:
        x: u8 or s8, [n, h, w, ic], or [n, ic, h, w] with `layout="NCHW"`.
        w: s8, [oc, ic/groups, kh, kw].
        bias: s32 [oc] in units of x_scale*w_scale, added exactly; or f32 [oc] in real units; or None.
        x_scale: Real units per step of x.
        x_zero_point: The step of x that means 0; spatial padding feeds it.
        w_scale: Scalar or [oc].
        w_zero_point: Scalar or [oc], in s8 range. (ONNX's u8 weights: subtract 128 from both.)
        y_scale: Real units per step of the output; required for u8 and s8 outputs.
        y_zero_point: In the range of the output's type.
        stride: An int or (height, width); likewise `dilation`, 1 meaning dense.
        padding: An int, (ph, pw), or ((top, bottom), (left, right)).
        dilation: Distance of taps.
        groups: Groups of channels; `groups == ic == oc` is depthwise and has kernels of its own.
        post_ops: Applied in order to the f32 value before requantization (`vnnigen.kernels.post_ops`).
        out_dtype: u8, s8, s32 (the accumulator plus an s32 bias, no post-ops) or f32 or bf16 (dequantized).
        layout: Of x and the result.
        isa: Force a tier (see `tiers()`); default is the best.
        out: Receives the result (NHWC only); contiguous, and not overlapping x.

    Returns:
        [n, oh, ow, oc] of `out_dtype` (NCHW with `layout`); `out` if given.

    Raises:
        ShapeError, DTypeError, QuantizationError, ISAError: saying which argument is wrong.

    """
    layer = Conv2dInt8(
        w, bias, x_scale=x_scale, x_zero_point=x_zero_point, w_scale=w_scale, w_zero_point=w_zero_point,
        y_scale=y_scale, y_zero_point=y_zero_point, stride=stride, padding=padding, dilation=dilation, groups=groups,
        post_ops=post_ops, out_dtype=out_dtype, layout=layout, isa=isa,
    )  # fmt: skip
    return layer(x, out)


def conv_f32(
    x: Array, w: Array, bias: Array | None = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, post_ops: Sequence[PostOp] | PostOp = (), layout: str = "NHWC", isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Convolve f32 x [n, h, w, ic] with f32 w [oc, ic/groups, kh, kw]; arguments as in `conv_int8`.

    Products are added with FMA in the order of (kh, kw, ic), the same on every generated tier; the reference tier
    sums in float64. Raises ShapeError, DTypeError, QuantizationError or ISAError.
    """
    layer = Conv2dF32(
        w, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, post_ops=post_ops, layout=layout,
        isa=isa,
    )  # fmt: skip
    return layer(x, out)
