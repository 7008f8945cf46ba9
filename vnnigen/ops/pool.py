"""Pooling of NHWC images: prepared operators and functions. Results are bit-identical on every tier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.kernels.element.affine import make_affine
from vnnigen.kernels.element.common import Run
from vnnigen.kernels.element.pool import PoolKey
from vnnigen.kernels.element.pooling import Average, PoolProblem, WordAverage, max_reference, plain_spec, pool_consts
from vnnigen.kernels.types import NUMPY, Array, DType, dtype_name
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan

_SOURCES: tuple[DType, ...] = ("u8", "s8", "f32", "bf16")


class _Pool(ElementOperator):
    """What both kinds share; `kernel` None means the whole image."""

    def __init__(self, kernel: Any, stride: Any, padding: Any, dilation: Any, isa: str | None) -> None:
        super().__init__(isa)
        self._window = (kernel, stride, padding, dilation)

    def _problem(self, shape: tuple[int, ...], src: DType) -> PoolProblem:
        kernel, stride, padding, dilation = self._window
        if kernel is None:
            kernel = shape[1:3] if len(shape) == 4 and 0 not in shape else 1
        return PoolProblem.from_arguments(shape, src, kernel, stride, padding, dilation)

    def _pitched(
        self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...], pitch: int
    ) -> ElementPlan:
        plan = self._plan(shapes, dtypes)
        keys = ((call.bound.keys[0], call.bound.runs[0]) for call in plan.calls)
        calls = tuple(
            Call.of([(replace(key, pitch=pitch), Run(run.consts))]) for key, run in keys if isinstance(key, PoolKey)
        )
        return replace(plan, calls=calls)

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Pool x [n, h, w, c]; `out` [n, oh, ow, c] receives the result."""
        return self._run((x,), out)


class MaxPool2d(_Pool):
    """A prepared `max_pool2d`."""

    def __init__(
        self, kernel: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1, isa: str | None = None
    ) -> None:
        super().__init__(kernel, stride, padding, dilation, isa)

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        src = dtype_name(dtypes[0], "x", _SOURCES)
        p = self._problem(shapes[0], src)
        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            calls = (Call.of([(PoolKey("maxpool", self._tier, p, plain_spec(src)), Run(pool_consts(p, 0, None)))]),)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            return max_reference(p, x[0])

        return ElementPlan(p.y_shape, NUMPY[src], calls, reference)


class AvgPool2d(_Pool):
    """A prepared `avg_pool2d`; `kernel` None averages whole images."""

    def __init__(
        self, kernel: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1, include_padding: bool = False,
        out_dtype: npt.DTypeLike | None = None, x_scale: float = 1.0, x_zero_point: int = 0,
        y_scale: float | None = None, y_zero_point: int | None = None, isa: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(kernel, stride, padding, dilation, isa)
        self._include = bool(include_padding)
        self._out = None if out_dtype is None else dtype_name(out_dtype, "out_dtype", _SOURCES)
        if any(np.ndim(np.asarray(v)) for v in (x_scale, x_zero_point, y_scale, y_zero_point)):
            raise QuantizationError("average pooling takes one scale and zero point per tensor")
        self._q = (x_scale, x_zero_point, y_scale, y_zero_point)

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        src = dtype_name(dtypes[0], "x", _SOURCES)
        out = src if self._out is None else self._out
        p = self._problem(shapes[0], src)
        if p.taps * 255 > 2**31 - 1:
            raise ShapeError(f"a window of {p.taps} elements is too large for exact sums in s32")
        scale, zero_point, y_scale, y_zero_point = self._q
        q: dict[str, Any] = {"x_scale": scale, "x_zero_point": zero_point}
        if out in ("u8", "s8"):
            q["y_scale"] = scale if y_scale is None else y_scale
            q["y_zero_point"] = (zero_point if out == src else 0) if y_zero_point is None else y_zero_point
        elif y_scale is not None or y_zero_point:
            raise QuantizationError(f"y_scale and y_zero_point are for u8 and s8, not for {out}")
        average = Average.of(p, make_affine(src=src, out=out, **q), self._include)
        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            shift = 128 if src == "s8" else 0
            has_start = bool(shift or average.starts.any())
            words = WordAverage.of(p, average, shift)
            spec = average.epilogue.spec
            key = PoolKey("avgpool", self._tier, p, spec, has_start)
            if words is not None:
                key = PoolKey("avgpool", self._tier, p, spec, False, words.mode, words.tie_counts)
            calls = (Call.of([(key, Run(pool_consts(p, shift, average, words)))]),)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            return average.reference(p, x[0])

        return ElementPlan(p.y_shape, NUMPY[out], calls, reference)


def max_pool2d(
    x: Array, kernel: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1, isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Take the largest element of each window; scale and zero point stay as they are.

    Padding never wins; a window of nothing but padding gives the type's lowest value. NaNs are ignored (a window of
    nothing else gives -inf), and of equal zeros the first is taken.

    Args:
        x: u8, s8, f32 or bf16, [n, h, w, c].
        kernel: An int or (height, width), as are stride and dilation; stride defaults to kernel.
        stride: See above.
        padding: An int, (ph, pw), or ((top, bottom), (left, right)).
        dilation: Distance of taps.
        isa: Force a tier.
        out: Receives the result.

    Returns:
        [n, oh, ow, c] of x's type.

    """
    return MaxPool2d(kernel, stride=stride, padding=padding, dilation=dilation, isa=isa)(x, out)


def avg_pool2d(
    x: Array, kernel: Any, *, stride: Any = None, padding: Any = 0, dilation: Any = 1, include_padding: bool = False,
    out_dtype: npt.DTypeLike | None = None, x_scale: float = 1.0, x_zero_point: int = 0, y_scale: float | None = None,
    y_zero_point: int | None = None, isa: str | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """Average each window, and requantize.

    The sum of `q - x_zero_point` is exact; `v = f32(sum) * f32(m / count)` with m = f32(x_scale / y_scale), then
    rounding half to even, zero point and saturation. Sums of f32 and bf16 are f32, taps added in order (rows first).
    `count` is the number of taps inside the image, or with `include_padding` all of the window's; padding counts as 0.

    Args:
        x: u8, s8, f32 or bf16, [n, h, w, c].
        kernel: As for `max_pool2d`, like stride, padding and dilation; None takes the whole image.
        stride: See above.
        padding: See above.
        dilation: See above.
        include_padding: Whether padding counts.
        out_dtype: u8, s8, f32 or bf16; default x's type.
        x_scale: Real units per step of x.
        x_zero_point: The step of x that means 0.
        y_scale: Of u8 and s8 outputs; default x_scale.
        y_zero_point: Default x_zero_point where the type stays, else 0.
        isa: Force a tier.
        out: Receives the result.

    Returns:
        [n, oh, ow, c] of `out_dtype`.

    """
    op = AvgPool2d(
        kernel, stride=stride, padding=padding, dilation=dilation, include_padding=include_padding,
        out_dtype=out_dtype, x_scale=x_scale, x_zero_point=x_zero_point, y_scale=y_scale, y_zero_point=y_zero_point,
        isa=isa,
    )  # fmt: skip
    return op(x, out)


def global_avg_pool2d(x: Array, **arguments: Any) -> Array:
    """Average whole images: [n, h, w, c] to [n, 1, 1, c]; arguments as for `avg_pool2d`."""
    return avg_pool2d(x, None, **arguments)
