"""What all operators share: prepared weights, plans per input shape, the call itself.

An operator keeps its logical weights.  The first call with a source type packs them for the tier that dispatch
chooses; the first call with a shape picks the kernels and binds them into a native descriptor (a *plan*); every
other call is a look-up and one native call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vnnigen.errors import DTypeError, QuantizationError, ShapeError
from vnnigen.kernels.epilogue import Epilogue, fold
from vnnigen.kernels.geometry import Geometry
from vnnigen.kernels.layout import ARG_DST, ARG_SRC, ARG_TENSORS, MAX_TENSORS
from vnnigen.kernels.mac import TIER_CODE
from vnnigen.kernels.packed import Weights, suited
from vnnigen.kernels.post_ops import PostOp, TensorOp
from vnnigen.kernels.problem import ConvProblem, GemmProblem, acc_bound
from vnnigen.kernels.qparams import check_scale, check_zero_point
from vnnigen.kernels.types import NUMPY, Array, DType, dtype_name
from vnnigen.ops.explanation import Explanation
from vnnigen.ops.step import NativeStep, Operand
from vnnigen.runtime import native
from vnnigen.runtime.compiled import Bound
from vnnigen.runtime.dispatch import Choice, choose
from vnnigen.runtime.threads import num_threads
from vnnigen.runtime.tuner import Tuning, tuned_keys

Problem = ConvProblem | GemmProblem
_from_buffer = native.ffi.from_buffer
_new = native.ffi.new
_call2 = native.lib.vg_call2
_call = native.lib.vg_call


@dataclass(frozen=True, eq=False)
class Quantization:
    """Everything about an operator's numbers; scales in real units per step, zero points in steps."""

    x_scale: float
    x_zp: int
    w_scale: Any
    w_zp: NDArray[np.int64] | None
    y_scale: float | None
    y_zp: int
    bias_s32: NDArray[np.int32] | None
    bias_f32: NDArray[np.float32] | None
    post_ops: tuple[PostOp, ...]
    out: DType


@dataclass(frozen=True, eq=False)
class Prepared:
    """Weights packed for one source type on the chosen tier (`packed` is None for the reference)."""

    choice: Choice
    epilogue: Epilogue
    packed: Any


@dataclass(frozen=True, eq=False)
class Plan:
    """How one input shape is computed: a bound native descriptor, or the reference (`bound` is None)."""

    problem: Problem
    prepared: Prepared
    bound: Bound | None
    y_shape: tuple[int, ...]
    y_dtype: np.dtype[Any]
    tensors: int
    tunings: tuple[Tuning, ...] = field(default=(), kw_only=True)


def check_bias(bias: Any, n: int, f32: bool) -> tuple[NDArray[np.int32] | None, NDArray[np.float32] | None]:
    """Copy a bias into (s32, f32), exactly one of which may be set. ShapeError or DTypeError if it fits neither."""
    if bias is None:
        return None, None
    array = np.asarray(bias)
    if array.shape != (n,):
        raise ShapeError(f"bias must have shape ({n},), one value per output channel, not {array.shape}")
    if array.dtype == np.int32 and not f32:
        return array.copy(), None
    if array.dtype in (np.float32, np.float64):
        if not np.isfinite(array).all():
            raise QuantizationError("bias has values that are not finite")
        with np.errstate(over="ignore"):  # `fold` reports infinities
            return None, array.astype(np.float32)
    wanted = "float32" if f32 else "int32 (in units of x_scale*w_scale) or float32"
    raise DTypeError(f"bias must be {wanted}, not {array.dtype}")


def make_quantization(
    n: int, *, x_scale: Any, x_zp: Any, w_scale: Any, w_zp: Any, y_scale: Any, y_zp: Any, bias: Any,
    post_ops: Sequence[PostOp], out_dtype: Any, names: tuple[str, str] = ("x", "w"),
) -> Quantization:  # fmt: skip
    """Check and normalise the arguments of an int8 operator with `n` output channels; `names` as in `Operator`."""
    out = dtype_name(out_dtype, "out_dtype", ("u8", "s8", "s32", "f32", "bf16"))
    bias_s32, bias_f32 = check_bias(bias, n, f32=False)
    # The range of a source zero point depends on the source's type, which is known at the first call.
    zp = np.asarray(x_zp)
    if zp.shape != () or zp.dtype.kind not in "iu" or not -128 <= int(zp) <= 255:
        raise QuantizationError(
            f"{names[0]}_zero_point must be one integer in the range of the source's type, not {x_zp!r}"
        )
    scale = float(check_scale(x_scale, f"{names[0]}_scale"))
    w_scales = check_scale(w_scale, f"{names[1]}_scale", n)
    w_zp = check_zero_point(w_zp, "s8", f"{names[1]}_zero_point", n)
    w_zeros = np.broadcast_to(np.asarray(w_zp, dtype=np.int64), (n,))
    ops = as_post_ops(post_ops)
    return Quantization(
        scale, int(zp), w_scales, w_zeros if w_zeros.any() else None,
        None if y_scale is None else float(check_scale(y_scale, "y_scale")), y_zp, bias_s32, bias_f32, ops, out,
    )  # fmt: skip


def as_post_ops(post_ops: Any) -> tuple[PostOp, ...]:
    """A tuple of post-ops; DTypeError for anything else, ShapeError for too many tensors."""
    if not isinstance(post_ops, (PostOp, tuple, list)):
        raise DTypeError(f"post_ops must be a post-operation or a sequence of them, not {post_ops!r}")
    ops = (post_ops,) if isinstance(post_ops, PostOp) else tuple(post_ops)
    for op in ops:
        if not isinstance(op, PostOp):
            raise DTypeError(f"post_ops must hold post-operations such as ReLU(), not {op!r}")
    if len(_with_tensor(ops)) > MAX_TENSORS:
        raise ShapeError(f"at most {MAX_TENSORS} Sum and Binary post-ops with a tensor are supported")
    return ops


def _with_tensor(ops: Sequence[PostOp]) -> tuple[TensorOp, ...]:
    """The post-ops that read a tensor of the output's shape."""
    return tuple(op for op in ops if isinstance(op, TensorOp) and op.takes_tensor)


class Operator:
    """A prepared operator. Safe to call from any thread; `out=` and tensors must not be shared by callers."""

    #: Types a source may have.
    sources: tuple[DType, ...]
    #: What users call the source and the weights; messages speak of them.
    names = ("x", "w")

    def __init__(self, weights: Weights, q: Quantization, isa: str | None, strategy: str = "auto") -> None:
        """Keep the operator's parts and choose its tier; packing waits for the first source."""
        self._weights = weights
        self._q = q
        self._choice = choose(weights, isa, strategy)
        self._prepared: dict[DType, Prepared] = {}
        self._plans: dict[tuple[Any, Any], Plan] = {}
        self._tensor_ops = _with_tensor(q.post_ops)
        self._last: Plan | None = None

    # What a subclass says.

    def _problem(self, shape: tuple[int, ...], src: DType) -> Problem:
        raise NotImplementedError

    def _geometry(self, problem: Any) -> Geometry:
        raise NotImplementedError

    def _y_shape(self, problem: Any) -> tuple[int, ...]:
        raise NotImplementedError

    def _reference(self, plan: Plan, x: Array, tensors: Sequence[Array]) -> Array:
        raise NotImplementedError

    def _inner(self, tensor: Array) -> Array:
        """A tensor as the user gives it, in the layout that is computed."""
        return tensor

    # Preparation.

    def _prepare(self, src: DType) -> Prepared:
        found = self._prepared.get(src)
        if found is not None:
            return found
        q, w = self._q, self._weights
        n = int(w.values.shape[0])
        bound = None
        if w.kind == "int8":
            check_zero_point(q.x_zp, src, f"{self.names[0]}_zero_point")
            bound = acc_bound(w.values, src, q.x_zp, w_zero_point=0 if q.w_zp is None else q.w_zp, bias=q.bias_s32)
        epilogue = fold(
            n=n, x_scale=q.x_scale, w_scale=q.w_scale, bias_f32=q.bias_f32, post_ops=q.post_ops, out=q.out,
            y_scale=q.y_scale, y_zero_point=q.y_zp, acc_bound=bound, acc="s32" if w.kind == "int8" else "f32",
        )  # fmt: skip
        packed = None
        if self._choice.family is not None:
            tier = TIER_CODE[self._choice.tier]
            packed = self._choice.family.pack(self._op, w, tier, src, q.x_zp, epilogue)
        self._prepared[src] = Prepared(self._choice, epilogue, packed)
        return self._prepared[src]

    _op = "op"

    def _plan(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Plan:
        plan = self._plans[shape, dtype] = self._new_plan(shape, dtype_name(dtype, self.names[0], self.sources))
        return plan

    def _new_plan(self, shape: tuple[int, ...], src: DType, pitch: int = 0) -> Plan:
        """How sources of this shape and type are computed, into rows `pitch` elements apart (0: without gaps)."""
        problem = self._problem(shape, src)
        prepared = self._prepare(src)
        bound, tunings = None, tuple[Tuning, ...]()
        if prepared.packed is not None:
            geometry = replace(self._geometry(problem), pitch=pitch)
            packed = suited(prepared.packed, geometry)
            keys, tunings = tuned_keys(packed, geometry, num_threads())
            bound = Bound(keys, packed.runs)
        y_dtype = np.dtype(NUMPY[self._q.out])
        y_shape, tensors = self._y_shape(problem), len(self._tensor_ops)
        return Plan(problem, prepared, bound, y_shape, y_dtype, tensors, tunings=tunings)

    @property
    def takes_pitch(self) -> bool:
        """Whether the kernels can leave gaps between pixels of the output."""
        return self._choice.family is None or self._choice.family.name != "thin"

    def native(self, shape: tuple[int, ...], src: DType, *, pitch: int = 0) -> tuple[NativeStep, ...]:
        """The step that computes sources of this shape and type (NHWC for images).

        Inputs are x and the tensors of post-ops (which must lie as the output does). With `pitch`, pixels of the output
        lie so many elements apart. Raises what a call would raise.
        """
        pitch = 0 if pitch == self._weights.values.shape[0] else pitch
        if pitch and not self.takes_pitch:
            raise ShapeError("kernels for few columns write rows without gaps between them")
        plan = self._new_plan(shape, dtype_name(src, self.names[0], self.sources), pitch)
        inputs = range(1, 1 + plan.tensors)
        slots: list[tuple[int, Operand]] = [(ARG_SRC, ("in", 0)), (ARG_DST, ("out", 0))]
        slots += [(ARG_TENSORS + i - 1, ("in", i)) for i in inputs]
        y_dtype = plan.y_dtype
        same = [s.tensor == self._q.out for s in plan.prepared.epilogue.spec.steps if s.tensor is not None]

        def function(arrays: Sequence[Array]) -> Array:
            return self._reference(plan, arrays[0], arrays[1:])

        return (
            NativeStep(
                plan.bound, tuple(slots), plan.y_shape, y_dtype, function, plan.problem.macs,
                in_place=tuple(i for i, fits in zip(inputs, same, strict=True) if fits),
            ),
        )  # fmt: skip

    # The call.

    def __call__(self, x: Array, out: Array | None = None, tensors: Sequence[Array] = ()) -> Array:
        """Compute. See the class for shapes; `out` receives the result, `tensors` fill post-ops without one."""
        try:
            plan = self._plans.get((x.shape, x.dtype))
        except AttributeError:
            raise DTypeError(f"{self.names[0]} must be a NumPy array, not {type(x).__name__}") from None
        if plan is None:
            if not isinstance(x, np.ndarray):
                raise DTypeError(f"{self.names[0]} must be a NumPy array, not {type(x).__name__}")
            plan = self._plan(x.shape, x.dtype)
        self._last = plan
        if not x.flags.c_contiguous:
            x = np.ascontiguousarray(x)
        if out is None:
            y: Array = np.empty(plan.y_shape, plan.y_dtype)
        else:
            self._check_out(plan, x, out)
            y = out
        if plan.tensors or tensors.__class__ is not tuple or tensors:
            operands = self._operands(plan, out, tensors)
        if plan.bound is None:
            y[...] = self._reference(plan, x, operands if plan.tensors else ())
        elif plan.tensors:
            addresses = [x.ctypes.data, y.ctypes.data, *(t.ctypes.data for t in operands)]
            native.check(_call(plan.bound.descriptor, len(addresses), _new("int64_t[]", addresses), num_threads()))
        else:
            code = _call2(plan.bound.descriptor, _from_buffer(x), _from_buffer(y), num_threads())
            if code:
                native.check(code)
        return y

    def _operands(self, plan: Plan, out: Array | None, tensors: Sequence[Array]) -> list[Array]:
        """The tensors of all Sum and Binary post-ops, in order, checked: their own, the call's, or `out`."""
        if not isinstance(tensors, (tuple, list)):
            raise DTypeError(f"tensors must be a tuple or list of arrays, not {type(tensors).__name__}")
        given = iter(tensors)
        free = sum(op.tensor is None for op in self._tensor_ops)
        if len(tensors) not in (0, free):
            raise ShapeError(f"{len(tensors)} tensors were given for {free} Sum or Binary post-ops without one")
        result = []
        specs = [s for s in plan.prepared.epilogue.spec.steps if s.tensor is not None]
        for op, spec in zip(self._tensor_ops, specs, strict=True):
            name = type(op).__name__
            tensor = op.tensor if op.tensor is not None else next(given, None)
            tensor = out if tensor is None else self._inner(tensor)
            if tensor is None:
                raise ShapeError(f"a {name} post-op without a tensor reads `out`: pass out= or tensors=")
            if not isinstance(tensor, np.ndarray) or tensor.dtype != NUMPY[spec.tensor or "f32"]:
                raise DTypeError(f"a {name} tensor must be a {spec.tensor} array")
            if tensor.shape != plan.y_shape:
                raise ShapeError(f"a {name} tensor has shape {tensor.shape}, the output {plan.y_shape}")
            same = out is not None and tensor.ctypes.data == out.ctypes.data and tensor.dtype == out.dtype
            if out is not None and not same and np.may_share_memory(tensor, out):
                raise ShapeError(f"a {name} tensor overlaps `out` without being the same array; pass a copy")
            result.append(np.ascontiguousarray(tensor))
        return result

    def _check_out(self, plan: Plan, x: Array, out: Array) -> None:
        if not isinstance(out, np.ndarray):
            raise DTypeError(f"out must be a NumPy array, not {type(out).__name__}")
        if out.dtype != plan.y_dtype:
            raise DTypeError(f"out must be {plan.y_dtype}, not {out.dtype}")
        if out.shape != plan.y_shape:
            raise ShapeError(f"out must have shape {plan.y_shape}, not {out.shape}")
        if not out.flags.c_contiguous:
            raise ShapeError("out must be C-contiguous")
        if not out.flags.writeable:
            raise ShapeError("out is read-only")
        if np.may_share_memory(x, out):
            raise ShapeError("out overlaps the source; pass a separate array")

    # What is visible.

    @property
    def isa(self) -> str:
        """The tier this operator runs on."""
        return self._choice.tier

    def explain(self, x_shape: tuple[int, ...] | None = None, x_dtype: Any = None) -> Explanation:
        """How an input of this shape is computed (default: that of the last call).

        Raises ShapeError when there was no call and no shape is given.
        """
        plan = self._last
        if x_shape is not None:
            dtype = np.dtype(NUMPY[self.sources[0]] if x_dtype is None else x_dtype)
            plan = self._plans.get((tuple(x_shape), dtype)) or self._plan(tuple(x_shape), dtype)
        if plan is None:
            raise ShapeError("nothing was computed yet: give explain() the shape of an input")
        return Explanation.of(plan)
