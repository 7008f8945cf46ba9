"""Sums, means and largest elements along axes. Results are bit-identical on every tier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.kernels.element.common import Run
from vnnigen.kernels.element.reduce import FUNCTIONS, ReduceFn, ReduceKey, reduce_reference
from vnnigen.kernels.packing import aligned
from vnnigen.kernels.types import NUMPY, Array, dtype_name
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan
from vnnigen.ops.pool import AvgPool2d, MaxPool2d, _Pool


class Reduce(ElementOperator):
    """A prepared reduction of f32 along neighbouring axes, which must be given in order."""

    def __init__(self, fn: ReduceFn, axes: Sequence[int], *, keepdims: bool = True, isa: str | None = None) -> None:
        super().__init__(isa)
        if fn not in FUNCTIONS:
            raise QuantizationError(f"the function must be one of {', '.join(FUNCTIONS)}, not {fn!r}")
        self._fn, self._axes, self._keep, self._isa = fn, tuple(axes), bool(keepdims), isa

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        dtype_name(dtypes[0], "x", ("f32",))
        shape = shapes[0]
        inside = all(-len(shape) <= a < len(shape) for a in self._axes)
        axes = tuple(a % len(shape) for a in self._axes) if inside else ()
        if not axes or axes != tuple(range(axes[0], axes[0] + len(axes))) or 0 in shape:
            raise ShapeError(f"axes {self._axes} of shape {shape}: they must be neighbours, and nothing empty")
        first, last = axes[0], axes[-1] + 1
        outer, n, inner = (math.prod(part) for part in (shape[:first], shape[first:last], shape[last:]))
        y_shape = (*shape[:first], *(1,) * (last - first if self._keep else 0), *shape[last:])
        if inner > 1:
            return self._columns((outer, n, 1, inner), y_shape)
        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            calls = (Call.of([(ReduceKey(self._fn, self._tier, outer, n), Run(aligned(64)))]),)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            return reduce_reference(x[0].reshape(outer, n), self._fn).reshape(y_shape)

        return ElementPlan(y_shape, NUMPY["f32"], calls, reference)

    def _columns(self, image: tuple[int, int, int, int], y_shape: tuple[int, ...]) -> ElementPlan:
        """What is not last is pooled: elements are added in order."""
        _, n, _, _ = image
        pool: _Pool = MaxPool2d((n, 1), isa=self._isa)
        if self._fn != "max":
            pool = AvgPool2d(None, x_scale=float(n) if self._fn == "sum" else 1.0, isa=self._isa)
        pool._tier = self._tier
        plan = pool._plan((image,), (NUMPY["f32"],))

        def reference(x: Sequence[Array], tensors: Sequence[Array]) -> Array:
            return plan.reference([x[0].reshape(image)], tensors).reshape(y_shape)

        return ElementPlan(y_shape, plan.y_dtype, plan.calls, reference)

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Reduce; `out` receives the result."""
        return self._run((x,), out)


def reduce(
    x: Array, fn: ReduceFn, axes: Sequence[int], *, keepdims: bool = True, isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Sum, mean or max of f32 along neighbouring axes.

    Along the last axes sums have a fixed tree (see `kernels.element.reduce`), along others elements are added in order.
    NaNs do not take part in max. Raises ShapeError for axes that are no neighbours, DTypeError for other types.
    """
    return Reduce(fn, axes, keepdims=keepdims, isa=isa)(x, out)


__all__ = ["Reduce", "reduce"]
