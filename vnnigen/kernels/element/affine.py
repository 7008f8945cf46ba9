"""The numbers of a conversion: scales, zero points and post-ops as an epilogue, its constants, its reference.

A value is `(q - x_zero_point)`, exact in s32 for integer sources, then `v = f32(.) * m` with `m = x_scale / y_scale`
rounded to f32 once (or `x_scale`, where a post-op that is not piecewise linear keeps the output scale out), then the
epilogue of the other kernels (see `kernels.epilogue`): post-ops, round half to even, zero point, saturation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.kernels.epilogue import FLOATS, Epilogue, StepSpec, fold, reference_epilogue
from vnnigen.kernels.layout import ConstLayout
from vnnigen.kernels.packing import aligned, fill_constants
from vnnigen.kernels.post_ops import Binary, Linear, PostOp, Sum
from vnnigen.kernels.qparams import check_scale, check_zero_point
from vnnigen.kernels.steps import Step
from vnnigen.kernels.types import F64, INT_RANGE, NUMPY, Array, DType


@dataclass(frozen=True)
class _ToS32(PostOp):
    """The last step of a conversion to s32: round half to even, saturate, leave the integer's bits."""

    piecewise_linear: ClassVar[bool] = True

    def steps(self, s: float) -> tuple[Step, ...]:
        """Lower to one `to_s32` step."""
        return (Step("to_s32", ()),)


@dataclass(frozen=True, eq=False)
class Affine:
    """A conversion from `src` to `out`: `start` is added to integer sources (minus the zero point, per channel)."""

    src: DType
    out: DType
    epilogue: Epilogue
    start: npt.NDArray[np.int32]
    per_channel: bool

    @property
    def has_init(self) -> bool:
        """Whether there is a zero point to subtract."""
        return bool(self.start.any())

    @property
    def identity(self) -> bool:
        """Whether every element stays what it is."""
        e = self.epilogue
        steps = (StepSpec("to_s32"),) if self.out == "s32" else ()
        scaled = e.spec.post_scale or e.b is not None or (e.m is not None and bool((e.m != 1).any()))
        same = self.src == self.out and e.spec.steps == steps and not scaled
        return same and bool((self.start == -e.zero_point).all())

    @property
    def tabulated(self) -> bool:
        """Whether a table of 256 bytes says it all: bytes to bytes, one scale, no tensors."""
        bytes_only = {self.src, self.out} <= {"u8", "s8"}
        return bytes_only and not self.per_channel and all(s.tensor is None for s in self.epilogue.spec.steps)

    def table(self) -> npt.NDArray[np.uint8]:
        """The output byte of every source byte."""
        n = len(self.start)
        every = np.arange(256, dtype=np.uint8).view(NUMPY[self.src])
        result = self.reference(np.repeat(every[:, None], n, axis=1))[:, 0]
        out = aligned(256)
        out[:] = result.view(np.uint8)
        return out

    def spread(self, lanes: int) -> Affine:
        """The same with every channel's constants repeated for `lanes` neighbours."""
        e = self.epilogue
        m, b = (None if v is None else np.repeat(v, lanes) for v in (e.m, e.b))
        vectors = tuple(np.repeat(v, lanes) for v in e.vectors)
        return replace(self, epilogue=replace(e, m=m, b=b, vectors=vectors), start=np.repeat(self.start, lanes))

    def consts(self, columns: int) -> npt.NDArray[np.uint8]:
        """The constant block with the channels' values repeated over `columns`."""
        times = -(-columns // len(self.start))
        e = self.epilogue

        def spread(values: Any) -> Any:
            return None if values is None else np.tile(values, times)[:columns]

        lay = ConstLayout(columns)
        wide = replace(e, m=spread(e.m), b=spread(e.b), vectors=tuple(map(spread, e.vectors)))
        pad = np.zeros(1, np.uint8)
        block: npt.NDArray[np.uint8] = fill_constants(
            lay, groups=1, columns=slice(None), start=spread(self.start)[None], epilogue=wide, pad=pad, w_zp=None
        )
        return block

    def reference(self, x: Array, tensors: Sequence[Array | None] = ()) -> Array:
        """Convert x of shape [..., n] as every kernel must."""
        if self.src in FLOATS:
            acc: Array = x.astype(np.float32)
        else:
            acc = (x.astype(np.int64) + self.start).astype(np.int32)
        if self.identity:
            same: Array = x.copy()
            return same
        y: Array = reference_epilogue(acc, self.epilogue, tensors)
        if self.out == "s32":
            y = y.view(np.int32)
        return y


def make_affine(
    *,
    src: DType,
    out: DType,
    n: int = 1,
    x_scale: npt.ArrayLike = 1.0,
    x_zero_point: npt.ArrayLike = 0,
    y_scale: npt.ArrayLike | None = None,
    y_zero_point: npt.ArrayLike = 0,
    post_ops: Sequence[PostOp] = (),
) -> Affine:
    """Check scales and zero points (scalars or of shape (n,)) and fold them with the post-ops.

    Raises QuantizationError or DTypeError for what does not fit the types or each other.
    """
    xs, xz = check_scale(x_scale, "x_scale", n), _zero_point(x_zero_point, src, "x_zero_point", n)
    real = out in FLOATS
    if real and y_scale is not None:
        raise QuantizationError(f"y_scale is for integer outputs, not for {out}")
    ys = check_scale(1.0 if y_scale is None else y_scale, "y_scale", n)
    yz = _zero_point(y_zero_point, out, "y_zero_point", n)
    ops = tuple(_typed_sum(op, out) for op in post_ops)
    bias = None
    if ys.ndim or yz.ndim:
        if ops:
            raise QuantizationError("post_ops need one y_scale and y_zero_point for the whole tensor, not per channel")
        # v + zp is rounded once here, in the FMA; with one zero point it is added after rounding to an integer.
        bias = np.broadcast_to(yz, (n,)).astype(np.float32) if yz.ndim else None
        xs, ys, yz = np.asarray(xs / ys), np.ones(()), yz if yz.ndim == 0 else np.zeros((), np.int32)
    arguments: dict[str, Any] = {"out": "f32" if out == "s32" else out}
    if out in ("u8", "s8"):
        arguments |= {"y_scale": ys, "y_zero_point": yz}
    elif out == "s32":
        scale = (Linear(1 / float(ys), 0.0),) if ops and ys != 1 else ()
        xs = xs if ops else np.asarray(xs / ys)
        ops = (*ops, *scale, _ToS32())
    start = -np.broadcast_to(xz, (n,)).astype(np.int32)
    epilogue = fold(
        n=n, w_scale=xs if xs.ndim else float(xs), bias_f32=bias, post_ops=ops, acc_bound=_bound(src, start),
        acc="f32" if src in FLOATS else "s32", **arguments,
    )  # fmt: skip
    return Affine(src, out, epilogue, start, bool(xs.ndim or xz.ndim or bias is not None or epilogue.vectors))


def _zero_point(value: npt.ArrayLike, dtype: DType, name: str, n: int) -> npt.NDArray[np.int32]:
    if dtype in ("u8", "s8"):
        return check_zero_point(value, dtype, name, n)
    if np.any(np.asarray(value) != 0):
        raise QuantizationError(f"{name} must be 0 for {dtype}; only u8 and s8 have zero points")
    return np.zeros((), np.int32)


def _typed_sum(op: PostOp, out: DType) -> PostOp:
    """Give an operation on the output's old contents the output's type."""
    if isinstance(op, (Sum, Binary)) and op.tensor is None and op.dtype is None:
        return replace(op, dtype=NUMPY[out])
    return op


def _bound(src: DType, start: npt.NDArray[np.int32]) -> F64 | None:
    """The largest magnitude of a source minus its zero point; None where nothing is known."""
    if src not in ("u8", "s8"):
        return None
    low, high = INT_RANGE[src]
    bound: F64 = np.maximum(np.abs(low + start), np.abs(high + start)).astype(np.float64)
    return bound


def last_axis(shape: tuple[int, ...]) -> tuple[int, int]:
    """(rows, channels) of a tensor whose last axis is the channels. ShapeError for an empty or 0-d one."""
    if not shape or 0 in shape:
        raise ShapeError(f"the tensor must have at least one dimension and no empty one, not shape {shape}")
    return int(np.prod(shape[:-1], dtype=np.int64)), int(shape[-1])
