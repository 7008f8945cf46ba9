"""Element operators: conversion and reordering, sums, concatenation, element-wise functions, softmax.

Each is a class, prepared once and called often, and a function that makes and calls it. `isa=` forces a tier; results
are bit-identical on every tier. A number means `(q - zero_point) * scale`; rounding is described with `convert`.
All raise subclasses of VnnigenError: ShapeError, DTypeError, QuantizationError, ISAError.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.kernels.element.affine import Affine, last_axis, make_affine
from vnnigen.kernels.element.common import Run
from vnnigen.kernels.element.plan import convert_rows, reorder_image
from vnnigen.kernels.element.softmax import SoftmaxKey, softmax_reference
from vnnigen.kernels.layout import MAX_LAUNCHES, MAX_TENSORS
from vnnigen.kernels.post_ops import Binary, PostOp, Sum
from vnnigen.kernels.qparams import check_scale
from vnnigen.kernels.types import NUMPY, Array, DType, dtype_name
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan, check_post_ops

PostOps = Sequence[PostOp] | PostOp
_TO_NHWC = ("NCHW", "NHWC")


def _channels(values: Sequence[Any], post_ops: Sequence[PostOp], channels: int) -> int:
    """Constants there must be: `channels` if anything is per channel, else 1."""
    vectors = any(isinstance(op, Binary) and not op.takes_tensor for op in post_ops)
    return channels if vectors or any(np.ndim(v) for v in values) else 1


class Convert(ElementOperator):
    """A prepared `convert`: calls take x (and `out`, and tensors of post-ops) and give the converted tensor."""

    def __init__(
        self, out_dtype: npt.DTypeLike, *, x_scale: Any = 1.0, x_zero_point: Any = 0, y_scale: Any = None,
        y_zero_point: Any = 0, acc: float = 0.0, post_ops: PostOps = (), layout: tuple[str, str] | None = None,
        isa: str | None = None,
    ) -> None:  # fmt: skip
        ops = check_post_ops(post_ops)
        self._out: DType = dtype_name(out_dtype, "out_dtype")
        if acc:
            if np.ndim(y_scale) or np.ndim(y_zero_point):
                raise QuantizationError("acc needs one y_scale and y_zero_point for the whole tensor")
            scale = 1.0 if y_scale is None else float(check_scale(y_scale, "y_scale"))
            ops = (Sum(acc * scale, y_zero_point, dtype=NUMPY[self._out]), *ops)
        super().__init__(isa, ops)
        self._q: dict[str, Any] = {
            "x_scale": x_scale, "x_zero_point": x_zero_point, "y_scale": y_scale, "y_zero_point": y_zero_point,
        }  # fmt: skip
        self._layout = _check_layout(layout)
        if self._layout is not None and ops:
            raise QuantizationError("a conversion that changes the layout takes no post_ops and no acc; convert twice")

    def _affine(self, src: DType, channels: int) -> Affine:
        n = _channels(list(self._q.values()), self._post_ops, channels)
        return make_affine(src=src, out=self._out, n=n, post_ops=self._post_ops, **self._q)

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        src = dtype_name(dtypes[0], "x")
        if self._layout is not None:
            return self._layout_plan(shapes[0], src)
        rows, channels = last_axis(shapes[0])
        f = self._affine(src, channels)

        def reference(x: Sequence[Array], tensors: Sequence[Array]) -> Array:
            per = channels if f.per_channel else 1
            y = f.reference(x[0].reshape(-1, per), [t.reshape(-1, per) for t in tensors])
            return y.reshape(shapes[0])

        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            calls = (Call.of(convert_rows(f, self._tier, rows, channels, op="convert", vbmi=self._vbmi)),)
        tensors = tuple(s.tensor for s in f.epilogue.spec.steps if s.tensor is not None)
        return ElementPlan(shapes[0], NUMPY[self._out], calls, reference, tensors, in_place=src == self._out)

    def _pitched(
        self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...], pitch: int
    ) -> ElementPlan:
        """Tensors of post-ops would have to lie as the output does."""
        plan = self._plan(shapes, dtypes)
        if self._tier is None:
            return plan
        if plan.tensors or self._layout is not None:
            raise ShapeError("a conversion that reads tensors or changes the layout writes rows without gaps")
        rows, channels = last_axis(shapes[0])
        f = self._affine(dtype_name(dtypes[0], "x"), channels)
        launches = convert_rows(f, self._tier, rows, channels, op="convert", vbmi=self._vbmi, dst_pitch=pitch)
        return replace(plan, calls=(Call.of(launches),), in_place=False)

    def _layout_plan(self, shape: tuple[int, ...], src: DType) -> ElementPlan:
        if len(shape) != 4 or 0 in shape:
            raise ShapeError(f"a change of layout needs 4 dimensions, none of them empty, not shape {shape}")
        to_nhwc = self._layout == _TO_NHWC
        n, c, h, w = shape if to_nhwc else (shape[0], shape[3], shape[1], shape[2])
        f = self._affine(src, c)
        y_shape = (n, h, w, c) if to_nhwc else (n, c, h, w)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            nhwc = x[0].transpose(0, 2, 3, 1) if to_nhwc else x[0]
            per = c if f.per_channel else 1
            y = f.reference(np.ascontiguousarray(nhwc).reshape(-1, per)).reshape(n, h, w, c)
            return y if to_nhwc else y.transpose(0, 3, 1, 2)

        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            if c == 1 or h * w == 1:
                launches: list[Any] = [*convert_rows(f, self._tier, n * h * w, c, op="reorder", vbmi=self._vbmi)]
            else:
                launches = [*reorder_image(f, self._tier, (n, c, h * w), to_nhwc=to_nhwc, extras=self._extras)]
            calls = (Call.of(launches),)
        return ElementPlan(y_shape, NUMPY[self._out], calls, reference)

    def __call__(self, x: Array, out: Array | None = None, tensors: Sequence[Array] = ()) -> Array:
        """Convert x; `out` receives the result (and is read by `acc`), `tensors` fill post-ops without one."""
        return self._run((x,), out, tensors)


def _check_layout(layout: Any) -> tuple[str, str] | None:
    """None for no change."""
    if layout is None:
        return None
    if not isinstance(layout, (tuple, list)) or len(layout) != 2 or not set(layout) <= set(_TO_NHWC):
        raise ShapeError(f"layout must be a pair of 'NHWC' and 'NCHW', (of x, of the result), not {layout!r}")
    return None if layout[0] == layout[1] else (layout[0], layout[1])


def convert(
    x: Array, out_dtype: npt.DTypeLike, *, x_scale: Any = 1.0, x_zero_point: Any = 0, y_scale: Any = None,
    y_zero_point: Any = 0, acc: float = 0.0, post_ops: PostOps = (), layout: tuple[str, str] | None = None,
    isa: str | None = None, out: Array | None = None, tensors: Sequence[Array] = (),
) -> Array:  # fmt: skip
    """Quantize, dequantize or requantize a tensor, add it to `out`, apply post-ops, change its layout.

    `v = f32(x - x_zero_point) * f32(x_scale / y_scale)`: the difference is exact in s32, then each operation rounds to
    f32 once; the quotient of the scales is a constant, computed in float64 (so quantizing multiplies by `1/y_scale`
    where `vnnigen.quantize` divides). Then come `acc` and the post-ops (see `conv_int8`), then for u8, s8 and s32
    rounding half to even, `+ y_zero_point` and saturation, NaN becoming the smallest value (s32 saturates at
    2147483520, the last f32 below 2**31); f32; or bf16, rounded to nearest even. With y zero points per channel, `v +
    zero_point` is one FMA before rounding to an integer.

    Args:
        x: u8, s8, s32, f32 or bf16, of any shape; channels are the last axis (the second for a source in "NCHW").
        out_dtype: Any of the same types.
        x_scale: Scalar or one value per channel, as are zero points and y_scale; zero points are for u8 and s8 only.
        x_zero_point: See above.
        y_scale: For integer outputs; default 1.
        y_zero_point: See above.
        acc: `out = convert(x) + acc * out` in real units, before the post-ops.
        post_ops: Applied in order, in real units; those that read tensors use the output's shape.
        layout: ("NCHW", "NHWC") or the reverse: x has 4 dimensions and is transposed on the way. Without post-ops.
        isa: Force a tier.
        out: Receives the result; may be x itself where the type stays and the layout too.
        tensors: For post-ops without a tensor.

    Returns:
        The converted tensor, `out` if given.

    """
    op = Convert(
        out_dtype, x_scale=x_scale, x_zero_point=x_zero_point, y_scale=y_scale, y_zero_point=y_zero_point, acc=acc,
        post_ops=post_ops, layout=layout, isa=isa,
    )  # fmt: skip
    return op(x, out, tensors)


def eltwise(
    x: Array, post_ops: PostOps, *, scale: float = 1.0, zero_point: int = 0, y_scale: float | None = None,
    y_zero_point: int | None = None, isa: str | None = None, out: Array | None = None, tensors: Sequence[Array] = (),
) -> Array:  # fmt: skip
    """Apply post-ops to a tensor, in real units, keeping its type.

    For u8, s8 and s32, `scale` and `zero_point` are x's; the output's are the same unless given. Bytes without tensors
    go through a table where the CPU has VPERMT2B, which is as fast as a copy. See `convert` for the rest.
    """
    name = dtype_name(x.dtype, "x") if isinstance(x, np.ndarray) else "f32"
    q: dict[str, Any] = {"x_scale": scale, "x_zero_point": zero_point}
    if name in ("u8", "s8", "s32"):
        q["y_scale"] = scale if y_scale is None else y_scale
        q["y_zero_point"] = zero_point if y_zero_point is None else y_zero_point
    elif y_scale is not None or y_zero_point:
        raise QuantizationError(f"y_scale and y_zero_point are for integers, not for {name}")
    return Convert(NUMPY[name], post_ops=post_ops, isa=isa, **q)(x, out, tensors)


@dataclass(frozen=True)
class QTensor:
    """What a source of `sum_tensors` and `concat` means: `(q - zero_point) * scale`."""

    scale: float = 1.0
    zero_point: int = 0


def _params(count: int, scales: Any, zero_points: Any) -> list[QTensor]:
    """One QTensor per source from scalars or sequences."""
    parts = []
    for name, value in (("scales", scales), ("zero_points", zero_points)):
        values = list(value) if isinstance(value, (tuple, list, np.ndarray)) else [value] * count
        if len(values) != count:
            raise ShapeError(f"{name} has {len(values)} values for {count} sources")
        parts.append(values)
    return [QTensor(s, z) for s, z in zip(*parts, strict=True)]


class SumTensors(ElementOperator):
    """A prepared `sum_tensors` of `count` sources."""

    def __init__(
        self, count: int, out_dtype: npt.DTypeLike, *, scales: Any = 1.0, zero_points: Any = 0,
        y_scale: float | None = None, y_zero_point: int = 0, post_ops: PostOps = (), isa: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(isa)
        self._rest = check_post_ops(post_ops)
        if any(isinstance(op, (Sum, Binary)) and op.takes_tensor for op in self._rest):
            raise QuantizationError("post_ops of a sum read no further tensors; make them sources")
        if not 1 <= count <= 1 + MAX_TENSORS:
            raise ShapeError(
                f"a sum takes 1 to {1 + MAX_TENSORS} tensors, not {count}; add the others in a second call"
            )
        self._sources = _params(count, scales, zero_points)
        self._out: DType = dtype_name(out_dtype, "out_dtype")
        self._y = (y_scale, y_zero_point)

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        if len(set(shapes)) != 1:
            raise ShapeError(f"the tensors of a sum must have one shape, not {', '.join(map(str, shapes))}")
        names = [dtype_name(d, f"source {i}") for i, d in enumerate(dtypes)]
        rows, channels = last_axis(shapes[0])
        first, *others = self._sources
        added = [Sum(q.scale, q.zero_point, dtype=NUMPY[t]) for q, t in zip(others, names[1:], strict=True)]
        ops = (*added, *self._rest)
        f = make_affine(
            src=names[0], out=self._out, n=_channels((), ops, channels), x_scale=first.scale,
            x_zero_point=first.zero_point, y_scale=self._y[0], y_zero_point=self._y[1], post_ops=ops,
        )  # fmt: skip

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            flat = [t.reshape(-1, channels if f.per_channel else 1) for t in x]
            return f.reference(flat[0], flat[1:]).reshape(shapes[0])

        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            launches = convert_rows(f, self._tier, rows, channels, op="sum", vbmi=self._vbmi)
            calls = (Call.of(launches, tuple(range(len(names)))),)
        return ElementPlan(shapes[0], NUMPY[self._out], calls, reference, in_place=True)

    def __call__(self, sources: Sequence[Array], out: Array | None = None) -> Array:
        """Add the sources; `out` receives the result and may be one of them, of its type."""
        if len(sources) != len(self._sources):
            raise ShapeError(f"{len(sources)} tensors were given to a sum of {len(self._sources)}")
        return self._run(sources, out)


def sum_tensors(
    sources: Sequence[Array], out_dtype: npt.DTypeLike, *, scales: Any = 1.0, zero_points: Any = 0,
    y_scale: float | None = None, y_zero_point: int = 0, post_ops: PostOps = (), isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Add up to five tensors of one shape: `y = post_ops(sum (x_i - zero_point_i) * scale_i)`, requantized.

    Types may differ, each u8, s8, s32, f32 or bf16; `scales` and `zero_points` are one per source, or one for all.
    `v = f32(x_0 - z_0) * s_0`, then for each further tensor in order `v = fma(f32(x_i) - z_i, s_i, v)`, with the output
    scale folded into the factors where the post-ops allow. Outputs as in `convert`.
    """
    op = SumTensors(
        len(sources), out_dtype, scales=scales, zero_points=zero_points, y_scale=y_scale, y_zero_point=y_zero_point,
        post_ops=post_ops, isa=isa,
    )  # fmt: skip
    return op(sources, out)


def add(a: Array, b: Array, out_dtype: npt.DTypeLike, **arguments: Any) -> Array:
    """Add two tensors; everything else as for `sum_tensors`."""
    return sum_tensors((a, b), out_dtype, **arguments)


class Concat(ElementOperator):
    """A prepared `concat` of `count` sources."""

    def __init__(
        self, count: int, out_dtype: npt.DTypeLike, *, scales: Any = 1.0, zero_points: Any = 0,
        y_scale: float | None = None, y_zero_point: int = 0, isa: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(isa)
        if count < 1:
            raise ShapeError("concat needs at least one tensor")
        self._sources = _params(count, scales, zero_points)
        self._out: DType = dtype_name(out_dtype, "out_dtype")
        self._y = (y_scale, y_zero_point)

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        if len({s[:-1] for s in shapes}) != 1 or len({len(s) for s in shapes}) != 1:
            raise ShapeError(f"concat needs equal shapes but for the last axis, not {', '.join(map(str, shapes))}")
        parts = []
        for i, (shape, dtype, q) in enumerate(zip(shapes, dtypes, self._sources, strict=True)):
            src = dtype_name(dtype, f"source {i}")
            f = make_affine(
                src=src, out=self._out, x_scale=q.scale, x_zero_point=q.zero_point, y_scale=self._y[0],
                y_zero_point=self._y[1],
            )  # fmt: skip
            parts.append((f, *last_axis(shape)))
        total = sum(channels for _, _, channels in parts)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            return np.concatenate(
                [f.reference(t[..., None])[..., 0] for (f, _, _), t in zip(parts, x, strict=True)], -1
            )

        calls = []
        if self._tier is not None:
            column = 0
            for start in range(0, len(parts), MAX_LAUNCHES):
                launches = []
                for k, (f, rows, channels) in enumerate(parts[start : start + MAX_LAUNCHES]):
                    # Slots of a call: the source, the destination, further sources.
                    launches += convert_rows(
                        f, self._tier, rows, channels, op="concat", vbmi=self._vbmi, dst_pitch=total, dst_offset=column,
                        slot=k + (k > 0), first=k,
                    )  # fmt: skip
                    column += channels
                calls.append(Call.of(launches, tuple(range(start, min(start + MAX_LAUNCHES, len(parts))))))
        return ElementPlan((*shapes[0][:-1], total), NUMPY[self._out], tuple(calls), reference)

    def __call__(self, sources: Sequence[Array], out: Array | None = None) -> Array:
        """Concatenate; `out` receives the result."""
        if len(sources) != len(self._sources):
            raise ShapeError(f"{len(sources)} tensors were given to a concatenation of {len(self._sources)}")
        return self._run(sources, out)


def concat(
    sources: Sequence[Array], out_dtype: npt.DTypeLike, *, scales: Any = 1.0, zero_points: Any = 0,
    y_scale: float | None = None, y_zero_point: int = 0, isa: str | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """Concatenate tensors along the last axis (the channels of NHWC), each converted to the output's scale.

    Types may differ; `scales` and `zero_points` are one per source, or one for all. Sources that need no conversion are
    copied. Conversion is that of `convert`.
    """
    op = Concat(
        len(sources), out_dtype, scales=scales, zero_points=zero_points, y_scale=y_scale, y_zero_point=y_zero_point,
        isa=isa,
    )  # fmt: skip
    return op(sources, out)


class Softmax(ElementOperator):
    """A prepared `softmax`."""

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        dtype_name(dtypes[0], "x", ("f32",))
        rows, n = last_axis(shapes[0])
        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            calls = (Call.of([(SoftmaxKey(self._tier, rows, n), Run(np.zeros(64, np.uint8)))]),)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            return softmax_reference(x[0].reshape(rows, n)).reshape(shapes[0])

        return ElementPlan(shapes[0], NUMPY["f32"], calls, reference, in_place=True)

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Compute; `out` receives the result and may be x."""
        return self._run((x,), out)


def softmax(x: Array, *, isa: str | None = None, out: Array | None = None) -> Array:
    """Softmax of f32 over the last axis: `exp(x - max) * (1 / sum)`.

    The relative error is below (8 + max - x) * 2**-24 (results below 2**-120 of the largest may be 0); the sum is made
    of 16 partial sums in a fixed order, so results are the same on every tier. Rows with NaN or +inf, or of -inf only,
    are NaN. `out` may be x.
    """
    return Softmax(isa)(x, out)


__all__ = [
    "Concat", "Convert", "Softmax", "SumTensors", "add", "concat", "convert", "eltwise", "softmax",
    "sum_tensors",
]  # fmt: skip
