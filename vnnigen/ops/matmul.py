"""Products of two activations, as in attention: `matmul_int8`, `matmul_bf16`, `matmul_f32` and their handles.

Both operands are given at the call, so b is packed at every call: by each thread for the products that it computes, or,
where these are few, by a kernel of its own into a buffer that the handle keeps.  Either way it is one native call.
Views are read where
they lie whenever their matrices have rows (for b: rows or columns) without gaps between elements.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.batched import ARG_TABLE
from vnnigen.kernels.epilogue import fold
from vnnigen.kernels.layout import ARG_CONSTS, ARG_DST, ARG_SRC, ARG_TENSORS, ARG_WEIGHTS
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.matmul import Integers, Lowered, a_in_place, b_in_place, look, lower
from vnnigen.kernels.pack_kernel import ARG_B, ARG_B_TABLE, ARG_PACK
from vnnigen.kernels.packed import Weights
from vnnigen.kernels.post_ops import PostOp
from vnnigen.kernels.problem import GemmProblem
from vnnigen.kernels.qparams import check_scale, check_zero_point
from vnnigen.kernels.reference import gemm_f32_reference, gemm_int8_reference
from vnnigen.kernels.types import NUMPY, Array, DType, dtype_name
from vnnigen.ops.bf16 import as_bf16, bfloat16
from vnnigen.ops.conv import _check_output, float_quantization
from vnnigen.ops.explanation import Explanation
from vnnigen.ops.operator import Operator, Plan, Prepared, Quantization, as_post_ops, make_quantization
from vnnigen.ops.step import NativeStep, Operand, Temp
from vnnigen.runtime import native
from vnnigen.runtime.compiled import Launches
from vnnigen.runtime.dispatch import choose
from vnnigen.runtime.threads import num_threads

_new, _cast, _from_buffer = native.ffi.new, native.ffi.cast, native.ffi.from_buffer
_call = native.lib.vg_call
#: Multiply-accumulates of a whole call below which waking other threads costs more than they give.
PARALLEL_MACS = 1 << 20
#: Argument slots that are given at each call.
_GIVEN = ARG_B + 1
Key = tuple[Any, ...]


class MatMulLaunches(Launches):
    """Both kernels in one native descriptor, and the buffers of concurrent calls."""

    def __init__(self, low: Lowered, tensors: Sequence[DType]) -> None:
        super().__init__(low.keys)
        self.lowered = low
        # What `explain` shows is the multiplication.
        self.keys, self.kernels = self.keys[-1:], self.kernels[-1:]
        self._tables: dict[int, Array] = {
            ARG_PACK: low.pack_consts, ARG_B_TABLE: low.views.b_at, ARG_TABLE: low.table(tensors),
        }  # fmt: skip
        for slot, array in self._tables.items():
            self.descriptor.args[slot] = array.ctypes.data
        v = low.views
        self._parallel = v.batches * v.m * v.n * v.k >= PARALLEL_MACS
        self._free: list[_Buffers] = []

    def __call__(self, a: Array, b: Array, y: Array, tensors: Sequence[Array]) -> None:
        """Pack b, multiply. Every concurrent call has buffers of its own."""
        try:
            buffers = self._free.pop()
        except IndexError:
            buffers = _Buffers(self.lowered)
        given = buffers.given
        given[ARG_SRC], given[ARG_DST], given[ARG_B] = _address(a), _address(y), _address(b)
        for i, t in enumerate(tensors):
            given[ARG_TENSORS + i] = _address(t)
        code = _call(self.descriptor, _GIVEN, given, num_threads() if self._parallel else 1)
        self._free.append(buffers)
        native.check(code)


class _Buffers:
    """What one call at a time may use: packed b, the constant blocks that packing writes, the arguments."""

    def __init__(self, low: Lowered) -> None:
        self.packed, self.consts = low.buffers()
        self.given = _new("int64_t[]", _GIVEN)
        self.given[ARG_WEIGHTS], self.given[ARG_CONSTS] = _address(self.packed), _address(self.consts)


def _address(x: Array) -> int:
    # NumPy's own way takes ten times as long, but cffi takes no arrays with gaps.
    return int(_cast("intptr_t", _from_buffer(x))) if x.flags.c_contiguous else int(x.ctypes.data)


# --- operators ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MatMulPlan(Plan):
    """A plan, and what the reference needs besides."""

    numbers: Integers = field(default_factory=lambda: Integers("f32", "f32"))
    launches: MatMulLaunches | None = None


class _MatMul(Operator):
    """What products of all types share. Plans depend on shapes, types and strides of both operands."""

    _op = "matmul"
    names = ("a", "b")
    sources_b: tuple[DType, ...] = ("f32",)

    def __init__(self, q: Quantization, transpose_b: Any, b_zp: int, isa: str | None, strategy: str = "auto") -> None:
        if not isinstance(transpose_b, (bool, np.bool_)):
            raise ShapeError(f"transpose_b must be True or False, not {transpose_b!r}")
        self._transpose_b = bool(transpose_b)
        self._b_zp = b_zp
        self._isa, self._strategy = isa, strategy
        self._both: dict[Key, MatMulPlan] = {}
        # A product of usual size says early whether the tier and the strategy can be had.
        super().__init__(self._weights_like(64, 64, 0), q, isa, strategy)

    def _weights_like(self, k: int, n: int, b_zp: int) -> Weights:
        """Weights of b's shape, for dispatch: their values are not known and take no memory."""
        dtype = {"f32": np.dtype(np.float32), "bf16": bfloat16}.get(self.sources[0], np.dtype(np.int8))
        values = np.broadcast_to(np.zeros((), dtype), (n, k, 1, 1))
        zero_point = np.full(n, b_zp, np.int64) if b_zp else None
        return Weights(values, 1, True, zero_point, np.broadcast_to(np.zeros((), np.int64), (n,)), known=False)

    def _plan_of(self, a: Array, b: Array) -> MatMulPlan:
        q, out = self._q, self._q.out
        src, b_type = dtype_name(a.dtype, "a", self.sources), dtype_name(b.dtype, "b", self.sources_b)
        v = look(a, b)
        problem = GemmProblem(v.m, v.n, v.k, src, out)
        numbers, bound, b_zp = Integers(src, b_type), None, 0
        if src in ("u8", "s8"):
            check_zero_point(q.x_zp, src, "a_zero_point")
            check_zero_point(self._b_zp, b_type, "b_zero_point")
            numbers = Integers(src, b_type, q.x_zp, self._b_zp)
            bound = np.full(v.n, numbers.bound(v.k), np.float64)
            b_zp = self._b_zp - 128 * (b_type == "u8")
        choice = choose(self._weights_like(v.k, v.n, b_zp), self._isa, self._strategy)
        epilogue = fold(
            n=v.n, x_scale=q.x_scale, w_scale=q.w_scale, post_ops=q.post_ops, out=out, y_scale=q.y_scale,
            y_zero_point=q.y_zp, acc_bound=bound, acc="f32" if bound is None else "s32",
        )  # fmt: skip
        tensors = [s.tensor for s in epilogue.spec.steps if s.tensor is not None]
        launches, packed = None, None
        if choice.family is not None:
            low = lower(v, TIER_CODE[choice.tier], choice.family.name, numbers, epilogue)
            launches, packed = MatMulLaunches(low, tensors), low.packed
        shape = (*v.batch, int(a.shape[-2]), v.n)
        return MatMulPlan(
            problem, Prepared(choice, epilogue, packed), launches,  # type: ignore[arg-type]  # explain's view of it
            shape, np.dtype(NUMPY[out]), len(tensors), numbers, launches,
        )  # fmt: skip

    def __call__(  # type: ignore[override]  # two sources
        self, a: Array, b: Array, out: Array | None = None, tensors: Sequence[Array] = ()
    ) -> Array:
        """Multiply. `out` receives the result, `tensors` fill post-ops that read one and have none."""
        a, b = self._operand(a, "a"), self._operand(b, "b")
        if self._transpose_b and b.ndim >= 2:
            b = b.swapaxes(-1, -2)
        if a.ndim >= 2 and not a_in_place(a):
            a = np.ascontiguousarray(a)
        if b.ndim >= 2 and not b_in_place(b):
            b = np.ascontiguousarray(b)
        key = (a.shape, a.strides, a.dtype, b.shape, b.strides, b.dtype)
        plan = self._both.get(key)
        if plan is None:
            plan = self._both[key] = self._plan_of(a, b)
        self._last = plan
        if out is None:
            y: Array = np.empty(plan.y_shape, plan.y_dtype)
        else:
            self._check_out(plan, a, out)
            if np.may_share_memory(b, out):
                raise ShapeError("out overlaps the source; pass a separate array")
            y = out
        operands: Sequence[Array] = ()
        if plan.tensors or tensors.__class__ is not tuple or tensors:
            operands = self._operands(plan, out, tensors)
        if plan.launches is not None:
            plan.launches(a, b, y, operands)
        else:
            self._multiply(plan, a, b, y, operands)
        return y

    def native_views(self, a: Array, b: Array) -> tuple[NativeStep, ...]:
        """The step that multiplies operands which lie as a and b do (their elements are not read).

        Both must be in place (`a_in_place`, `b_in_place`); b is [..., k, n]. Inputs are a, b and the tensors of
        post-ops. Raises what a call would raise.
        """
        plan = self._plan_of(a, b)

        def function(arrays: Sequence[Array]) -> Array:
            y = np.empty(plan.y_shape, plan.y_dtype)
            self._multiply(plan, arrays[0], arrays[1], y, arrays[2:])
            return y

        slots: list[tuple[int, Operand]] = [(ARG_SRC, ("in", 0)), (ARG_DST, ("out", 0)), (ARG_B, ("in", 1))]
        slots += [(ARG_TENSORS + i, ("in", 2 + i)) for i in range(plan.tensors)]
        temps: tuple[Temp, ...] = ()
        if plan.launches is not None:
            packed, consts = plan.launches.lowered.buffers()
            temps = Temp(packed.nbytes), Temp(consts.nbytes, consts)
            slots += [(ARG_WEIGHTS, ("temp", 0)), (ARG_CONSTS, ("temp", 1))]
        problem = plan.problem
        assert isinstance(problem, GemmProblem)
        macs = math.prod(plan.y_shape) * problem.k
        return (NativeStep(plan.launches, tuple(slots), plan.y_shape, plan.y_dtype, function, macs, temps),)

    def _operand(self, x: Any, name: str) -> Array:
        """An argument as an array of the type that is multiplied."""
        if not isinstance(x, np.ndarray):
            raise DTypeError(f"{name} must be a NumPy array, not {type(x).__name__}")
        return x

    def _multiply(self, plan: MatMulPlan, a: Array, b: Array, y: Array, tensors: Sequence[Array]) -> None:
        """The reference: one product after the other."""
        batch = plan.y_shape[:-2]
        a, b = (np.broadcast_to(x, (*batch, *x.shape[-2:])) for x in (a, b))
        for i in np.ndindex(batch):
            y[i] = self._one(plan, a[i], b[i], [t[i] for t in tensors])

    def _one(self, plan: MatMulPlan, a: Array, b: Array, tensors: Sequence[Array]) -> Array:
        assert isinstance(plan.problem, GemmProblem)
        return gemm_f32_reference(plan.problem, a, b, plan.prepared.epilogue, tensors)

    def explain(self, x_shape: tuple[int, ...] | None = None, x_dtype: Any = None) -> Explanation:
        """How the last call multiplied, after packing b. Raises ShapeError before the first, or for a shape."""
        if x_shape is not None:
            raise ShapeError("a product of two activations is explained for its last call: give no shape")
        return super().explain()


class MatMulInt8(_MatMul):
    """An int8 product of two activations; calls take a, b, `out` and `tensors`. Arguments as in `matmul_int8`."""

    sources: tuple[DType, ...] = ("u8", "s8")
    sources_b: tuple[DType, ...] = ("s8", "u8")

    def __init__(
        self, *, a_scale: float = 1.0, a_zero_point: int = 0, b_scale: float = 1.0, b_zero_point: int = 0,
        y_scale: float | None = None, y_zero_point: int = 0, transpose_b: bool = False,
        post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = np.uint8, isa: str | None = None,
    ) -> None:  # fmt: skip
        # The range of b's zero point depends on its type, which is known at the call, as a's.
        zp = np.asarray(b_zero_point)
        if zp.shape != () or zp.dtype.kind not in "iu" or not -128 <= int(zp) <= 255:
            raise QuantizationError(f"b_zero_point must be one integer in the range of b's type, not {b_zero_point!r}")
        q = make_quantization(
            1, x_scale=a_scale, x_zp=a_zero_point, w_scale=float(check_scale(b_scale, "b_scale")), w_zp=0,
            y_scale=y_scale, y_zp=y_zero_point, bias=None, post_ops=as_post_ops(post_ops), out_dtype=out_dtype,
            names=self.names,
        )  # fmt: skip
        _check_output(q)
        super().__init__(q, transpose_b, int(zp), isa)

    def _one(self, plan: MatMulPlan, a: Array, b: Array, tensors: Sequence[Array]) -> Array:
        assert isinstance(plan.problem, GemmProblem)
        n, shift = plan.numbers, 128 if plan.numbers.b == "u8" else 0
        return gemm_int8_reference(
            plan.problem, a, (b.astype(np.int16) - shift).astype(np.int8), plan.prepared.epilogue,
            a_zero_point=n.a_zp, b_zero_point=n.b_zp - shift, tensors=tensors,
        )  # fmt: skip


class MatMulF32(_MatMul):
    """An f32 product of two activations; calls take a, b, `out` and `tensors`. Arguments as in `matmul_f32`."""

    sources: tuple[DType, ...] = ("f32",)

    def __init__(
        self, *, transpose_b: bool = False, post_ops: Sequence[PostOp] | PostOp = (), isa: str | None = None
    ) -> None:
        super().__init__(float_quantization(1, None, post_ops), transpose_b, 0, isa)


class MatMulBf16(_MatMul):
    """A bf16 product of two activations; calls take a, b, `out` and `tensors`. Arguments as in `matmul_bf16`."""

    sources: tuple[DType, ...] = ("bf16",)
    sources_b: tuple[DType, ...] = ("bf16",)

    def __init__(
        self, *, transpose_b: bool = False, post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = bfloat16,
        isa: str | None = None, strategy: str = "auto",
    ) -> None:  # fmt: skip
        q = replace(float_quantization(1, None, post_ops), out=dtype_name(out_dtype, "out_dtype", ("bf16", "f32")))
        super().__init__(q, transpose_b, 0, isa, strategy)

    def _operand(self, x: Any, name: str) -> Array:
        return super()._operand(as_bf16(x), name)


def matmul_int8(
    a: Array, b: Array, *, a_scale: float = 1.0, a_zero_point: int = 0, b_scale: float = 1.0, b_zero_point: int = 0,
    y_scale: float | None = None, y_zero_point: int = 0, transpose_b: bool = False,
    post_ops: Sequence[PostOp] | PostOp = (), out_dtype: Any = np.uint8, isa: str | None = None,
    out: Array | None = None,
) -> Array:  # fmt: skip
    """Multiply a, u8 or s8 [..., m, k], by b, s8 or u8 [..., k, n], exactly, and requantize.

    Batch dimensions broadcast as in `numpy.matmul`. With `transpose_b`, b is [..., n, k]; a transposed view does as
    well. Scales and zero points are scalars; `post_ops`, outputs and errors are those of `conv_int8`, and results are
    bit-identical on every tier. QuantizationError where some a and b could make a sum of k products leave s32.
    Returns [..., m, n] of `out_dtype`; `out` if given. To multiply many times, keep a `MatMulInt8`.
    """
    op = MatMulInt8(
        a_scale=a_scale, a_zero_point=a_zero_point, b_scale=b_scale, b_zero_point=b_zero_point, y_scale=y_scale,
        y_zero_point=y_zero_point, transpose_b=transpose_b, post_ops=post_ops, out_dtype=out_dtype, isa=isa,
    )  # fmt: skip
    return op(a, b, out)


def matmul_bf16(
    a: Array, b: Array, *, transpose_b: bool = False, post_ops: Sequence[PostOp] | PostOp = (),
    out_dtype: Any = bfloat16, isa: str | None = None, strategy: str = "auto", out: Array | None = None,
) -> Array:  # fmt: skip
    """Multiply a [..., m, k] by b [..., k, n], both bf16 (or f32, rounded), adding in f32.

    Shapes as in `matmul_int8`; `strategy`, outputs and the error bound as in `gemm_bf16`.
    """
    op = MatMulBf16(transpose_b=transpose_b, post_ops=post_ops, out_dtype=out_dtype, isa=isa, strategy=strategy)
    return op(a, b, out)


def matmul_f32(
    a: Array, b: Array, *, transpose_b: bool = False, post_ops: Sequence[PostOp] | PostOp = (),
    isa: str | None = None, out: Array | None = None,
) -> Array:  # fmt: skip
    """Multiply a [..., m, k] by b [..., k, n], both f32, in the order of k. Shapes as in `matmul_int8`."""
    return MatMulF32(transpose_b=transpose_b, post_ops=post_ops, isa=isa)(a, b, out)


__all__ = ["MatMulBf16", "MatMulF32", "MatMulInt8", "matmul_bf16", "matmul_f32", "matmul_int8"]
