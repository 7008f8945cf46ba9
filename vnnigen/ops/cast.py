"""Conversion of 64-bit integers, as attention masks have them, to f32."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, ShapeError
from vnnigen.kernels.element.cast import cast_launches, cast_reference
from vnnigen.kernels.layout import ARG_DST, ARG_SRC
from vnnigen.kernels.types import NUMPY, Array
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan
from vnnigen.ops.step import NativeStep, Operand


class CastWide(ElementOperator):
    """A prepared conversion of int64 to f32; for its rounding see `kernels.element.cast`."""

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        if dtypes[0] != np.int64:
            raise DTypeError(f"x must be int64, not {dtypes[0]}")
        if 0 in shapes[0]:
            raise ShapeError(f"x must not be empty, not of shape {shapes[0]}")
        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            calls = (Call.of(cast_launches(math.prod(shapes[0]), self._tier)),)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            return cast_reference(x[0])

        return ElementPlan(shapes[0], NUMPY["f32"], calls, reference)

    def step(self, shape: tuple[int, ...]) -> NativeStep:
        """The step for an x of this shape."""
        plan = self._plan((shape,), (np.dtype(np.int64),))
        step = NativeStep(None, (), plan.y_shape, plan.y_dtype, lambda arrays: plan.reference(arrays, ()))
        if not plan.calls:
            return step
        slots: tuple[tuple[int, Operand], ...] = ((ARG_SRC, ("in", 0)), (ARG_DST, ("out", 0)))
        return replace(step, launches=plan.calls[0].bound, slots=slots)

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Convert x; `out` receives the result."""
        return self._run((x,), out)


__all__ = ["CastWide"]
