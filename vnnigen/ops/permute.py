"""Copies that change places, not values: transpose, slice, concat, expand, pad, nearest upsampling, of any type.

All of them are moves between strides (see `kernels.element.permute`); elements have 1, 2, 4 or 8 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, ShapeError
from vnnigen.kernels.element.permute import Fill, Move, fill_launches, move_launches
from vnnigen.kernels.element.strided import broadcast_strides, dense
from vnnigen.kernels.types import Array
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan

Shape = tuple[int, ...]
_SIZES = (1, 2, 4, 8)


@dataclass(frozen=True)
class Layout:
    """What an operator does with sources of certain shapes: where everything goes, and what fills the rest."""

    y_shape: Shape
    moves: tuple[Move, ...]
    fills: tuple[Fill, ...] = ()


class MoveOperator(ElementOperator):
    """What operators that only copy share. `value` is what `Pad` fills with."""

    def __init__(self, isa: str | None = None, value: float = 0) -> None:
        super().__init__(isa)
        self._value = value

    def _layout(self, shapes: Sequence[Shape]) -> Layout:
        raise NotImplementedError

    def _plan(self, shapes: tuple[Shape, ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        dtype = dtypes[0]
        if len(set(dtypes)) != 1 or dtype.itemsize not in _SIZES:
            raise DTypeError(f"sources must be of one type of {_SIZES} bytes, not {', '.join(map(str, dtypes))}")
        if any(0 in shape for shape in shapes):
            raise ShapeError(f"sources must not be empty, not of shape {', '.join(map(str, shapes))}")
        layout = self._layout(shapes)
        if 0 in layout.y_shape:
            raise ShapeError(f"the result would be empty: shape {layout.y_shape}")
        if layout.fills and dtype.itemsize == 8:
            raise DTypeError(f"padding takes elements of 1, 2 or 4 bytes, not {dtype}")
        value = np.array([self._value], dtype)
        calls = []
        if self._tier is not None:
            for fill in layout.fills:
                calls.append(Call.of(fill_launches(fill, value, self._tier)))
            for move in layout.moves:
                calls.append(Call.of(move_launches(move, dtype.itemsize, self._tier, self._extras), (move.source,)))

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            y = np.full(layout.y_shape, value[0], dtype)
            for move in layout.moves:
                window = _view(y, move.shape, move.dst, move.dst_offset)
                window[...] = _view(x[move.source], move.shape, move.src, move.src_offset)
            return y

        return ElementPlan(layout.y_shape, dtype, tuple(calls), reference)

    def __call__(self, x: Array, out: Array | None = None) -> Array:
        """Copy x; `out` receives the result."""
        return self._run((x,), out)


def _view(x: Array, shape: Shape, strides: Shape, offset: int) -> Array:
    """Elements of x by strides."""
    flat = np.ascontiguousarray(x).reshape(-1)[offset:]
    view: Array = np.lib.stride_tricks.as_strided(flat, shape, [s * x.itemsize for s in strides])
    return view


class Transpose(MoveOperator):
    """A prepared transposition, as `numpy.transpose`."""

    def __init__(self, axes: Sequence[int], *, isa: str | None = None) -> None:
        super().__init__(isa)
        self._axes = tuple(axes)
        if sorted(self._axes) != list(range(len(self._axes))):
            raise ShapeError(f"axes must be a permutation of 0, 1, ..., not {self._axes}")

    def _layout(self, shapes: Sequence[Shape]) -> Layout:
        (shape,) = shapes
        if len(shape) != len(self._axes):
            raise ShapeError(f"{len(self._axes)} axes were given for a tensor of shape {shape}")
        y_shape = tuple(shape[a] for a in self._axes)
        src = dense(shape)
        return Layout(y_shape, (Move(0, y_shape, tuple(src[a] for a in self._axes), dense(y_shape)),))


class Slice(MoveOperator):
    """A prepared slice: `x[slices]`, one `slice` per axis; steps may be negative."""

    def __init__(self, slices: Sequence[slice], *, isa: str | None = None) -> None:
        super().__init__(isa)
        self._slices = tuple(slices)

    def _layout(self, shapes: Sequence[Shape]) -> Layout:
        (shape,) = shapes
        if len(self._slices) > len(shape):
            raise ShapeError(f"{len(self._slices)} slices were given for a tensor of shape {shape}")
        slices = (*self._slices, *[slice(None)] * (len(shape) - len(self._slices)))
        ranges = [range(*s.indices(n)) for s, n in zip(slices, shape, strict=True)]
        y_shape = tuple(map(len, ranges))
        own = dense(shape)
        offset = sum(r.start * s for r, s in zip(ranges, own, strict=True))
        src = tuple(r.step * s for r, s in zip(ranges, own, strict=True))
        return Layout(y_shape, (Move(0, y_shape, src, dense(y_shape), offset),))


class ConcatAxis(MoveOperator):
    """A prepared concatenation of any number of tensors along any axis, without conversion."""

    def __init__(self, axis: int, *, isa: str | None = None) -> None:
        super().__init__(isa)
        self._axis = axis

    def _layout(self, shapes: Sequence[Shape]) -> Layout:
        rank = len(shapes[0])
        if not -rank <= self._axis < rank:
            raise ShapeError(f"axis {self._axis} is not one of the {rank} axes of shape {shapes[0]}")
        axis = self._axis % rank
        if len({(len(s), s[:axis], s[axis + 1 :]) for s in shapes}) != 1:
            raise ShapeError(f"shapes must be equal but for axis {axis}, not {', '.join(map(str, shapes))}")
        y_shape = (*shapes[0][:axis], sum(s[axis] for s in shapes), *shapes[0][axis + 1 :])
        dst = dense(y_shape)
        moves, before = [], 0
        for i, shape in enumerate(shapes):
            moves.append(Move(i, shape, dense(shape), dst, 0, before * dst[axis]))
            before += shape[axis]
        return Layout(y_shape, tuple(moves))

    def __call__(self, sources: Sequence[Array], out: Array | None = None) -> Array:  # type: ignore[override]
        """Concatenate; `out` receives the result."""
        return self._run(tuple(sources), out)


class Expand(MoveOperator):
    """A prepared broadcast to a shape, as ONNX's Expand: both shapes broadcast to the result's."""

    def __init__(self, shape: Sequence[int], *, isa: str | None = None) -> None:
        super().__init__(isa)
        self._shape = tuple(shape)

    def _layout(self, shapes: Sequence[Shape]) -> Layout:
        try:
            y_shape = np.broadcast_shapes(shapes[0], self._shape)
        except ValueError:
            raise ShapeError(f"shape {shapes[0]} cannot be broadcast with {self._shape}") from None
        return Layout(y_shape, (Move(0, y_shape, broadcast_strides(shapes[0], y_shape), dense(y_shape)),))


class Pad(MoveOperator):
    """A prepared padding with a constant: `pads` is (before, after) per axis; negative ones crop."""

    def __init__(self, pads: Sequence[tuple[int, int]], value: float = 0, *, isa: str | None = None) -> None:
        super().__init__(isa, value)
        self._pads = tuple(pads)

    def _layout(self, shapes: Sequence[Shape]) -> Layout:
        (shape,) = shapes
        if len(self._pads) != len(shape):
            raise ShapeError(f"{len(self._pads)} pairs of pads were given for a tensor of shape {shape}")
        y_shape = tuple(max(0, n + lo + hi) for n, (lo, hi) in zip(shape, self._pads, strict=True))
        src, dst = dense(shape), dense(y_shape)
        first = [max(0, lo) for lo, _ in self._pads]
        inner = [min(n, y - max(0, lo) - max(0, hi) + max(0, -lo) + max(0, -hi)) - max(0, -lo) - max(0, -hi)
                 for n, y, (lo, hi) in zip(shape, y_shape, self._pads, strict=True)]  # fmt: skip
        if min(inner, default=1) < 1:
            raise ShapeError(f"pads {self._pads} leave nothing of a tensor of shape {shape}")
        fills = []
        for axis, (n, start) in enumerate(zip(inner, first, strict=True)):
            # What is outside on this axis, inside on those before it, anywhere on those behind it.
            corner = sum(f * d for f, d in zip(first[:axis], dst[:axis], strict=True))
            for at, length in ((0, start), (start + n, y_shape[axis] - start - n)):
                if length:
                    block = (*inner[:axis], length, *y_shape[axis + 1 :])
                    fills.append(Fill(block, dst, corner + at * dst[axis]))
        src_offset = sum(max(0, -lo) * s for (lo, _), s in zip(self._pads, src, strict=True))
        dst_offset = sum(f * d for f, d in zip(first, dst, strict=True))
        return Layout(y_shape, (Move(0, tuple(inner), src, dst, src_offset, dst_offset),), tuple(fills))


class Upsample(MoveOperator):
    """A prepared repetition of every element `factors[i]` times along axis i: nearest resizing by integers."""

    def __init__(self, factors: Sequence[int], *, isa: str | None = None) -> None:
        super().__init__(isa)
        self._factors = tuple(factors)
        if min(self._factors, default=1) < 1:
            raise ShapeError(f"factors must be 1 or more, not {self._factors}")

    def _layout(self, shapes: Sequence[Shape]) -> Layout:
        (shape,) = shapes
        if len(self._factors) != len(shape):
            raise ShapeError(f"{len(self._factors)} factors were given for a tensor of shape {shape}")
        y_shape = tuple(n * f for n, f in zip(shape, self._factors, strict=True))
        split = tuple(part for n, f in zip(shape, self._factors, strict=True) for part in (n, f))
        src = tuple(part for s in dense(shape) for part in (s, 0))
        return Layout(y_shape, (Move(0, split, src, dense(split)),))


__all__ = ["ConcatAxis", "Expand", "MoveOperator", "Pad", "Slice", "Transpose", "Upsample"]
