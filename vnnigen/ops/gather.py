"""Rows of a tensor by their numbers (embeddings)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, ShapeError
from vnnigen.kernels.element.common import Run
from vnnigen.kernels.element.gather import ARG_INDICES, ARG_STATUS, GatherKey, gather_reference
from vnnigen.kernels.element.plan import code_tier
from vnnigen.kernels.layout import ARG_DST, ARG_SRC
from vnnigen.kernels.packing import aligned
from vnnigen.kernels.types import NUMPY, Array
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan
from vnnigen.ops.step import NativeStep, Operand, Temp

_SIZES = (1, 2, 4, 8)


class Gather(ElementOperator):
    """A prepared `gather`. Its kernels have a third source, `status`: words of 8 bytes that they write."""

    def __init__(self, axis: int = 0, *, isa: str | None = None) -> None:
        super().__init__(isa)
        self._axis = axis

    def _sizes(self, x: tuple[int, ...], dtype: np.dtype[Any], indices: tuple[int, ...]) -> tuple[int, int, int, int]:
        """(outer, rows, bytes of a row, number of indices), checked."""
        if not -len(x) <= self._axis < len(x):
            raise ShapeError(f"axis {self._axis} is not one of the {len(x)} axes of a tensor of shape {x}")
        if 0 in x or 0 in indices:
            raise ShapeError(f"gathering from shape {x} by {indices}: neither may be empty")
        if dtype.itemsize not in _SIZES:
            raise DTypeError(f"elements of x must have {_SIZES} bytes, not {dtype}")
        axis = self._axis % len(x)
        return math.prod(x[:axis]), x[axis], math.prod(x[axis + 1 :]) * dtype.itemsize, math.prod(indices)

    def status_words(self, shape: tuple[int, ...], dtype: np.dtype[Any], indices: tuple[int, ...]) -> int:
        """How many words of status the kernels write for these shapes."""
        return self._key(shape, dtype, indices, np.dtype(np.int64)).steps

    def _key(self, x: tuple[int, ...], dtype: np.dtype[Any], shape: tuple[int, ...], kind: np.dtype[Any]) -> GatherKey:
        sizes = self._sizes(x, dtype, shape)
        tier = self._tier or code_tier(256)
        assert tier is not None
        return GatherKey(tier, *sizes, "s32" if kind == np.int32 else "s64")

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        if dtypes[1] not in (np.dtype(np.int32), np.dtype(np.int64)):
            raise DTypeError(f"indices must be int32 or int64, not {dtypes[1]}")
        key = self._key(shapes[0], dtypes[0], shapes[1], dtypes[1])
        axis = self._axis % len(shapes[0])
        y_shape = (*shapes[0][:axis], *shapes[1], *shapes[0][axis + 1 :])

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            table = x[0].reshape(key.outer, key.rows, -1)
            return gather_reference(table, x[1].reshape(-1), key.split, x[2]).reshape(y_shape)

        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            calls = (Call.of([(key, Run(aligned(64)))], (0, 1, 2)),)
        return ElementPlan(y_shape, dtypes[0], calls, reference)

    def step(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[Any]) -> NativeStep:
        """The step for x and indices of these shapes and types (short names, or anything that `np.dtype` takes).

        Its only temp receives the status words, which the step's `check` looks at.
        """
        kinds = tuple(NUMPY.get(t) or np.dtype(t) for t in dtypes)
        words = self.status_words(shapes[0], kinds[0], shapes[1])
        plan = self._plan((*shapes, (words,)), (*kinds, np.dtype(np.int64)))

        def function(arrays: Sequence[Array]) -> Array:
            status = np.empty(words, np.int64)
            y = plan.reference((*arrays, status), ())
            check_status(status, arrays[1], shapes[0][self._axis])
            return y

        if self._tier is None:
            return NativeStep(None, (), plan.y_shape, plan.y_dtype, function)
        slots: tuple[tuple[int, Operand], ...] = (
            (ARG_SRC, ("in", 0)), (ARG_INDICES, ("in", 1)), (ARG_DST, ("out", 0)), (ARG_STATUS, ("temp", 0)),
        )  # fmt: skip
        temps = (Temp(8 * words, np.zeros(8 * words, np.uint8)),)

        def check(memory: Array) -> None:
            # Nearly always all bytes are 0, and counting them takes a tenth of NumPy's time.
            if memory.tobytes().count(0) < memory.nbytes:
                check_status(memory.view(np.int64), None, shapes[0][self._axis])

        bound = plan.calls[0].bound
        return NativeStep(bound, slots, plan.y_shape, plan.y_dtype, function, temps=temps, check=check)

    def __call__(self, x: Array, indices: Array, out: Array | None = None) -> Array:
        """Gather; `out` receives the result. ShapeError for an index that is out of range."""
        for name, value in (("x", x), ("indices", indices)):
            if not isinstance(value, np.ndarray):
                raise DTypeError(f"{name} must be a NumPy array, not {type(value).__name__}")
        status = np.empty(self.status_words(x.shape, x.dtype, indices.shape), np.int64)
        y = self._run((x, indices, status), out)
        check_status(status, indices, x.shape[self._axis])
        return y


def check_status(status: Array, indices: Array | None, rows: int) -> None:
    """Raise ShapeError where a step met an index that is out of range; `indices` for the message, where at hand."""
    if status.any():
        at = int(status[status != 0][0]) - 1
        index = "an index" if indices is None else f"index {indices.reshape(-1)[at]}"
        raise ShapeError(f"{index} (at position {at}) is out of range for an axis of {rows} rows")


def gather(x: Array, indices: Array, axis: int = 0, *, isa: str | None = None, out: Array | None = None) -> Array:
    """Take rows of x along `axis`: `y[..., i, ...] = x[..., indices[i], ...]`, as ONNX's Gather.

    Args:
        x: A tensor of 1, 2, 4 or 8 bytes an element.
        indices: int32 or int64 of any shape; those below zero count from the end.
        axis: Which axis of x the indices are of.
        isa: Force a tier.
        out: Receives the result.

    Returns:
        x's shape with `axis` replaced by the shape of `indices`.

    Raises:
        ShapeError: for an index out of range (`out` is written all the same), a wrong axis, or empty tensors.
        DTypeError: for other types.

    """
    return Gather(axis, isa=isa)(x, indices, out)


__all__ = ["Gather", "check_status", "gather"]
