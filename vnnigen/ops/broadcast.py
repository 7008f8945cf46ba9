"""Element-wise functions of two tensors with broadcasting. Results are bit-identical on every tier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.kernels.element.binary import FUNCTIONS, BinaryFn, binary_launches, make_binary
from vnnigen.kernels.post_ops import Binary, PostOp, Sum
from vnnigen.kernels.types import NUMPY, Array, DType, dtype_name
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan, check_post_ops

_TYPES: tuple[DType, ...] = ("u8", "s8", "f32", "bf16")


class BinaryOp(ElementOperator):
    """A prepared `binary`."""

    def __init__(
        self, fn: BinaryFn, out_dtype: npt.DTypeLike, *, a_scale: float = 1.0, a_zero_point: int = 0,
        b_scale: float = 1.0, b_zero_point: int = 0, y_scale: float | None = None, y_zero_point: int = 0,
        post_ops: Sequence[PostOp] | PostOp = (), isa: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(isa)
        self._rest = check_post_ops(post_ops)
        if any(isinstance(op, (Sum, Binary)) for op in self._rest):
            raise QuantizationError("post_ops of a binary function read no tensors; combine them in another call")
        if fn not in FUNCTIONS:
            raise QuantizationError(f"the function must be one of {', '.join(FUNCTIONS)}, not {fn!r}")
        self._fn = fn
        self._out: DType = dtype_name(out_dtype, "out_dtype", _TYPES)
        self._q: dict[str, Any] = {
            "scales": (a_scale, b_scale), "zero_points": (a_zero_point, b_zero_point), "y_scale": y_scale,
            "y_zero_point": y_zero_point, "post_ops": self._rest,
        }  # fmt: skip

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        kinds = dtype_name(dtypes[0], "a", _TYPES), dtype_name(dtypes[1], "b", _TYPES)
        try:
            y_shape = np.broadcast_shapes(*shapes)
        except ValueError:
            raise ShapeError(f"shapes {shapes[0]} and {shapes[1]} cannot be broadcast together") from None
        if 0 in y_shape:
            raise ShapeError(f"the result of shapes {shapes[0]} and {shapes[1]} would be empty")
        f = make_binary(self._fn, kinds, self._out, **self._q)
        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            calls = (Call.of(binary_launches(f, self._tier, (shapes[0], shapes[1]), y_shape), (0, 1)),)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            return f.reference(*np.broadcast_arrays(*x))

        return ElementPlan(y_shape, NUMPY[self._out], calls, reference, in_place=shapes[0] == shapes[1])

    def __call__(self, a: Array, b: Array, out: Array | None = None) -> Array:
        """Combine a and b; `out` receives the result, and may be one of them where their shapes are equal."""
        return self._run((a, b), out)


def binary(fn: BinaryFn, a: Array, b: Array, out_dtype: npt.DTypeLike, **arguments: Any) -> Array:
    """Combine two tensors that broadcast as NumPy's do: `y = post_ops(fn(a, b))`, requantized.

    Args:
        fn: add, sub, mul, div, min, max, or prelu (a where a >= 0, else a * b).
        a: u8, s8, f32 or bf16; its numbers are `(q - a_zero_point) * a_scale`.
        b: Likewise.
        out_dtype: u8, s8, f32 or bf16.
        arguments: a_scale, a_zero_point, b_scale, b_zero_point (integers only), y_scale and y_zero_point of u8 and s8
            outputs, post_ops without tensors, isa to force a tier, out for the result.

    Returns:
        A tensor of the broadcast shape. What is rounded where: see `kernels.element.binary`; in min and max a NaN of
        either source gives b.

    Raises:
        ShapeError: for shapes that do not go together, or are empty.
        DTypeError: for other types.
        QuantizationError: for scales or zero points that do not fit.

    """
    out = arguments.pop("out", None)
    return BinaryOp(fn, out_dtype, **arguments)(a, b, out)


__all__ = ["BinaryOp", "binary"]
