"""Layer normalization. Results are bit-identical on every tier."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from vnnigen.errors import QuantizationError, ShapeError
from vnnigen.kernels.element.affine import last_axis
from vnnigen.kernels.element.common import Run
from vnnigen.kernels.element.layernorm import NormKey, make_norm, norm_consts, norm_reference
from vnnigen.kernels.post_ops import Binary, PostOp, Sum
from vnnigen.kernels.types import NUMPY, Array, DType, dtype_name
from vnnigen.ops.element_base import Call, ElementOperator, ElementPlan, check_post_ops

_OUTPUTS: tuple[DType, ...] = ("f32", "bf16", "u8", "s8")


class LayerNorm(ElementOperator):
    """A prepared `layer_norm`; with `residual`, calls take a second tensor that is added to x first."""

    def __init__(
        self, scale: Array | None = None, bias: Array | None = None, *, epsilon: float = 1e-5, residual: bool = False,
        out_dtype: npt.DTypeLike = np.float32, y_scale: float | None = None, y_zero_point: int = 0,
        post_ops: Sequence[PostOp] | PostOp = (), isa: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(isa)
        self._rest = check_post_ops(post_ops)
        if any(isinstance(op, (Sum, Binary)) for op in self._rest):
            raise QuantizationError("post_ops of a normalization read no tensors; combine them in another call")
        if not (math.isfinite(epsilon) and epsilon >= 0):
            raise QuantizationError(f"epsilon must be finite and not below 0, not {epsilon}")
        self._vectors = (scale, bias)
        self._epsilon = float(epsilon)
        self._residual = bool(residual)
        self._out: DType = dtype_name(out_dtype, "out_dtype", _OUTPUTS)
        self._y: dict[str, Any] = {"y_scale": y_scale, "y_zero_point": y_zero_point, "post_ops": self._rest}

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        for i, dtype in enumerate(dtypes):
            dtype_name(dtype, "residual" if i else "x", ("f32",))
        if len(set(shapes)) != 1:
            raise ShapeError(f"the residual has shape {shapes[1]}, x {shapes[0]}")
        rows, n = last_axis(shapes[0])
        f = make_norm(n, self._out, *self._vectors, **self._y)
        calls: tuple[Call, ...] = ()
        if self._tier is not None:
            key = NormKey(self._tier, rows, n, f.epilogue.spec, self._residual)
            calls = (Call.of([(key, Run(norm_consts(f, self._epsilon)))], tuple(range(len(shapes)))),)

        def reference(x: Sequence[Array], _tensors: Sequence[Array]) -> Array:
            flat = [t.reshape(rows, n) for t in x]
            return norm_reference(flat[0], f, self._epsilon, *flat[1:]).reshape(shapes[0])

        return ElementPlan(shapes[0], NUMPY[self._out], calls, reference, in_place=True)

    def __call__(self, x: Array, residual: Array | None = None, out: Array | None = None) -> Array:
        """Normalize; `out` receives the result and may be one of the sources where it is f32."""
        if (residual is not None) != self._residual:
            raise ShapeError(f"this normalization takes {'a' if self._residual else 'no'} residual")
        return self._run((x,) if residual is None else (x, residual), out)


def layer_norm(
    x: Array, scale: Array | None = None, bias: Array | None = None, *, epsilon: float = 1e-5,
    residual: Array | None = None, out_dtype: npt.DTypeLike = np.float32, y_scale: float | None = None,
    y_zero_point: int = 0, post_ops: Sequence[PostOp] | PostOp = (), isa: str | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """Normalize f32 over the last axis: `(x - mean) / sqrt(var + epsilon) * scale + bias`.

    For the order of operations and the error's bound see `kernels.element.layernorm`.

    Args:
        x: f32, [..., n].
        scale: [n], or None for ones.
        bias: [n], or None for zeros.
        epsilon: Added to the variance.
        residual: f32 of x's shape, added to x first.
        out_dtype: f32, bf16, u8 or s8.
        y_scale: Of u8 and s8 outputs.
        y_zero_point: Likewise.
        post_ops: Without tensors.
        isa: Force a tier.
        out: Receives the result.

    Returns:
        x's shape, of `out_dtype`. Rows with NaN or infinities are NaN (the lowest value of u8 and s8).

    Raises:
        ShapeError, DTypeError, QuantizationError: for arguments that do not fit.

    """
    op = LayerNorm(
        scale, bias, epsilon=epsilon, residual=residual is not None, out_dtype=out_dtype, y_scale=y_scale,
        y_zero_point=y_zero_point, post_ops=post_ops, isa=isa,
    )  # fmt: skip
    return op(x, residual, out)


__all__ = ["LayerNorm", "layer_norm"]
