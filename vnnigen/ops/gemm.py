"""Matrix multiplication: `gemm_int8` and `gemm_f32`, and the handles that pack b once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, ShapeError
from vnnigen.kernels.geometry import Geometry, gemm_geometry
from vnnigen.kernels.packed import Weights
from vnnigen.kernels.post_ops import PostOp
from vnnigen.kernels.problem import GemmProblem
from vnnigen.kernels.reference import gemm_f32_reference, gemm_int8_reference
from vnnigen.kernels.types import Array, DType
from vnnigen.ops.conv import _check_output, float_quantization, own
from vnnigen.ops.operator import Operator, Plan, as_post_ops, make_quantization


class _Gemm(Operator):
    """What GEMM of all types shares. Weights are kept as [n, k, 1, 1]."""

    _op = "gemm"
    names = ("a", "b")

    def _problem(self, shape: tuple[int, ...], src: DType) -> GemmProblem:
        n, k = self._weights.values.shape[:2]
        return GemmProblem.from_arguments(
            shape,
            (int(k), int(n)),
            src=src,
            dst=self._q.out,
            w_zero_point=self._weights.zero_point is not None,
        )

    def _geometry(self, problem: GemmProblem) -> Geometry:
        return gemm_geometry(problem)

    def _y_shape(self, problem: GemmProblem) -> tuple[int, ...]:
        return problem.m, problem.n

    @property
    def _b(self) -> Array:
        b: Array = self._weights.values[:, :, 0, 0].T
        return b


def _matrix(b: Any, dtype: Any) -> Weights:
    if not isinstance(b, np.ndarray):
        raise DTypeError(f"b must be a NumPy array, not {type(b).__name__}")
    if b.dtype != dtype:
        raise DTypeError(f"b must be {np.dtype(dtype)}, not {b.dtype}")
    if b.ndim != 2 or b.size == 0:
        raise ShapeError(f"b must have shape (k, n) without empty dimensions, not {b.shape}")
    k, n = b.shape
    return Weights(own(b.T).reshape(n, k, 1, 1), 1, True, None, np.zeros(n, np.int64))


class GemmInt8(_Gemm):
    """An int8 matrix product: b, s8 [k, n], packed once; calls take a, u8 or s8 [m, k], and give [m, n].

    Arguments are those of `gemm_int8`. Raises ShapeError, DTypeError, QuantizationError or ISAError.
    """

    sources: tuple[DType, ...] = ("u8", "s8")

    def __init__(
        self, b: Array, bias: Array | None = None, *, a_scale: float = 1.0, a_zero_point: int = 0, b_scale: Any = 1.0,
        b_zero_point: Any = 0, y_scale: float | None = None, y_zero_point: int = 0,
        post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = np.uint8, isa: str | None = None,
    ) -> None:  # fmt: skip
        weights = _matrix(b, np.int8)
        q = make_quantization(
            int(b.shape[1]), x_scale=a_scale, x_zp=a_zero_point, w_scale=b_scale, w_zp=b_zero_point, y_scale=y_scale,
            y_zp=y_zero_point, bias=bias, post_ops=as_post_ops(post_ops), out_dtype=out_dtype, names=self.names,
        )  # fmt: skip
        _check_output(q)
        bias_s32 = weights.bias if q.bias_s32 is None else q.bias_s32
        super().__init__(replace(weights, zero_point=q.w_zp, bias=bias_s32), q, isa)

    def _reference(self, plan: Plan, x: Array, tensors: Sequence[Array]) -> Array:
        q = self._q
        assert isinstance(plan.problem, GemmProblem)
        return gemm_int8_reference(
            plan.problem, x, self._b, plan.prepared.epilogue, a_zero_point=q.x_zp,
            b_zero_point=0 if q.w_zp is None else q.w_zp, bias=q.bias_s32, tensors=tensors,
        )  # fmt: skip


class GemmF32(_Gemm):
    """An f32 matrix product, the baseline of the int8 ones: b f32 [k, n], calls take a f32 [m, k]."""

    sources: tuple[DType, ...] = ("f32",)

    def __init__(
        self,
        b: Array,
        bias: Array | None = None,
        *,
        post_ops: Sequence[PostOp] | PostOp = (),
        isa: str | None = None,
    ) -> None:
        super().__init__(_matrix(b, np.float32), float_quantization(int(b.shape[-1]), bias, post_ops), isa)

    def _reference(self, plan: Plan, x: Array, tensors: Sequence[Array]) -> Array:
        assert isinstance(plan.problem, GemmProblem)
        return gemm_f32_reference(plan.problem, x, self._b, plan.prepared.epilogue, tensors)


def gemm_int8(
    a: Array, b: Array, bias: Array | None = None, *, a_scale: float = 1.0, a_zero_point: int = 0, b_scale: Any = 1.0,
    b_zero_point: Any = 0, y_scale: float | None = None, y_zero_point: int = 0,
    post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = np.uint8, isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Multiply a, u8 or s8 [m, k], by b, s8 [k, n], in exact integer arithmetic, and requantize.

    Scales and zero points of b are scalars or [n]; `bias`, `post_ops`, outputs and errors are those of
    `conv_int8`. Returns [m, n].
    """
    layer = GemmInt8(
        b, bias, a_scale=a_scale, a_zero_point=a_zero_point, b_scale=b_scale, b_zero_point=b_zero_point,
        y_scale=y_scale, y_zero_point=y_zero_point, post_ops=post_ops, out_dtype=out_dtype, isa=isa,
    )  # fmt: skip
    return layer(a, out)


def gemm_f32(
    a: Array, b: Array, bias: Array | None = None, *, post_ops: Sequence[PostOp] | PostOp = (), isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Multiply a, f32 [m, k], by b, f32 [k, n]. Returns [m, n].

    Products are added with FMA in the order of k; with one to four columns, to 16 partial sums (docs/numerics.md).
    """
    return GemmF32(b, bias, post_ops=post_ops, isa=isa)(a, out)
