"""bf16 operators: bf16 operands, f32 accumulation, bf16 or f32 results.

Error bound, against exact arithmetic on the bf16 operands: |error| <= 2*K*2^-24 * sum |a*b| plus the rounding of the
output, plus, for each product, 2^-126 where VDPBF16PS or TDPBF16PS is used (they take denormals as zero), else 2^-150
(gradual underflow).  The factor 2 covers both ways of summing: one chain of FMAs, or one addition for each pair of
products (Higham, "Accuracy and Stability of Numerical Algorithms", 2nd ed., section 3.1: any order of K additions stays
below K*u/(1 - K*u)).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from vnnigen.kernels.bf16 import round_to_bf16
from vnnigen.kernels.post_ops import PostOp
from vnnigen.kernels.problem import ConvProblem, GemmProblem
from vnnigen.kernels.reference import conv_f32_reference, gemm_f32_reference
from vnnigen.kernels.types import Array, DType, dtype_name
from vnnigen.ops.conv import _Conv, _weights, float_quantization
from vnnigen.ops.gemm import _Gemm, _matrix
from vnnigen.ops.operator import Plan

bfloat16 = np.dtype(ml_dtypes.bfloat16)


def as_bf16(x: Any) -> Any:
    """An f32 array rounded to bf16 as VCVTNEPS2BF16 does; anything else as it is."""
    return round_to_bf16(x) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x


class Conv2dBf16(_Conv):
    """A bf16 convolution: w bf16 or f32 (rounded) [oc, ic/groups, kh, kw], x bf16 or f32 (rounded) [n, h, w, ic].

    `bias` is f32 [oc], `out_dtype` bf16 or f32; `strategy` pins how bf16 is multiplied: "tiles" (TDPBF16PS), "dot"
    (VDPBF16PS), "fma" (widened to f32 when copied; on some cores twice as fast as VDPBF16PS), or "auto", which measures
    the instructions once. Other arguments, and errors, as in `conv_int8`; error bound: see this module.
    """

    sources: tuple[DType, ...] = ("bf16",)

    def __init__(
        self, w: Array, bias: Array | None = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
        groups: int = 1, post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = bfloat16, layout: str = "NHWC",
        isa: str | None = None, strategy: str = "auto",
    ) -> None:  # fmt: skip
        weights = _weights(as_bf16(w), bfloat16, groups, stride, dilation)
        out = dtype_name(out_dtype, "out_dtype", ("bf16", "f32"))
        q = replace(float_quantization(int(w.shape[0]), bias, post_ops), out=out)
        super().__init__(weights, q, isa, padding, layout, strategy)

    def __call__(self, x: Array, out: Array | None = None, tensors: Sequence[Array] = ()) -> Array:
        """Convolve x (an f32 x is rounded to bf16 first)."""
        return super().__call__(as_bf16(x), out, tensors)

    def _reference(self, plan: Plan, x: Array, tensors: Sequence[Array]) -> Array:
        assert isinstance(plan.problem, ConvProblem)
        return conv_f32_reference(plan.problem, x, self._weights.values, plan.prepared.epilogue, tensors)


class GemmBf16(_Gemm):
    """A bf16 matrix product: b bf16 or f32 (rounded) [k, n]; calls take a, bf16 or f32 (rounded) [m, k].

    Arguments as in `Conv2dBf16`; error bound: see this module.
    """

    sources: tuple[DType, ...] = ("bf16",)

    def __init__(
        self, b: Array, bias: Array | None = None, *, post_ops: Sequence[PostOp] | PostOp = (),
        out_dtype: Any = bfloat16, isa: str | None = None, strategy: str = "auto",
    ) -> None:  # fmt: skip
        weights = _matrix(as_bf16(b), bfloat16)
        out = dtype_name(out_dtype, "out_dtype", ("bf16", "f32"))
        q = replace(float_quantization(int(b.shape[-1]), bias, post_ops), out=out)
        super().__init__(weights, q, isa, strategy)

    def __call__(self, x: Array, out: Array | None = None, tensors: Sequence[Array] = ()) -> Array:
        """Multiply x (an f32 x is rounded to bf16 first)."""
        return super().__call__(as_bf16(x), out, tensors)

    def _reference(self, plan: Plan, x: Array, tensors: Sequence[Array]) -> Array:
        assert isinstance(plan.problem, GemmProblem)
        return gemm_f32_reference(plan.problem, x, self._b, plan.prepared.epilogue, tensors)


def conv_bf16(
    x: Array, w: Array, bias: Array | None = None, *, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = bfloat16, layout: str = "NHWC",
    isa: str | None = None, strategy: str = "auto", out: Array | None = None,
) -> Array:  # fmt: skip
    """Convolve bf16 x with bf16 w, accumulating in f32; see `Conv2dBf16` for arguments and the error bound."""
    layer = Conv2dBf16(
        w, bias, stride=stride, padding=padding, dilation=dilation, groups=groups, post_ops=post_ops,
        out_dtype=out_dtype, layout=layout, isa=isa, strategy=strategy,
    )  # fmt: skip
    return layer(x, out)


def gemm_bf16(
    a: Array, b: Array, bias: Array | None = None, *, post_ops: Sequence[PostOp] | PostOp = (),
    out_dtype: Any = bfloat16, isa: str | None = None, strategy: str = "auto", out: Array | None = None,
) -> Array:  # fmt: skip
    """Multiply bf16 a [m, k] by bf16 b [k, n], accumulating in f32; see `GemmBf16`."""
    return GemmBf16(b, bias, post_ops=post_ops, out_dtype=out_dtype, isa=isa, strategy=strategy)(a, out)
