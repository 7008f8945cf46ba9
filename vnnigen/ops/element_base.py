"""What the element operators share: the choice of a tier, plans per input shape, checks, the native call."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, ShapeError
from vnnigen.isa import tiers
from vnnigen.kernels.element.common import Run
from vnnigen.kernels.element.plan import code_tier
from vnnigen.kernels.element.transpose_tiles import BF16, VBMI
from vnnigen.kernels.layout import ARG_DST, ARG_SRC, ARG_TENSORS, MAX_TENSORS
from vnnigen.kernels.post_ops import Binary, PostOp, Sum
from vnnigen.kernels.types import NUMPY, Array, DType
from vnnigen.ops.step import NativeStep, Operand
from vnnigen.runtime import native
from vnnigen.runtime.compiled import Bound, KernelKey
from vnnigen.runtime.threads import num_threads

_call2 = native.lib.vg_call2
_from_buffer = native.ffi.from_buffer
#: Launches of a call: keys with their constants.
Launches = Sequence[tuple[Any, Run]]


@dataclass(frozen=True, eq=False)
class Call:
    """One native call: a bound kernel and which of the sources go into its slots (source, then tensors)."""

    bound: Bound
    sources: tuple[int, ...] = (0,)

    @classmethod
    def of(cls, launches: Launches, sources: tuple[int, ...] = (0,)) -> Call:
        """Compile and bind."""
        return cls(Bound([key for key, _ in launches], [run for _, run in launches]), sources)


@dataclass(frozen=True, eq=False)
class ElementPlan:
    """How inputs of certain shapes and types are computed; `reference` is there for the tier without kernels."""

    y_shape: tuple[int, ...]
    y_dtype: np.dtype[Any]
    calls: tuple[Call, ...]
    reference: Callable[[Sequence[Array], Sequence[Array]], Array]
    #: Types of the tensors that post-ops read.
    tensors: tuple[DType, ...] = ()
    #: Whether the output may be a source itself: each element depends on its own place alone.
    in_place: bool = False

    #: One source, one native call, and types that the buffer protocol knows (not bf16).
    simple: bool = False

    @property
    def keys(self) -> tuple[KernelKey, ...]:
        """The keys of all kernels."""
        return tuple(key for call in self.calls for key in call.bound.keys)


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An uninitialised array at a multiple of 64 bytes: stores that straddle cache lines cost a third more time."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.empty(nbytes + 64, np.uint8)
    start = -int(native.ffi.cast("intptr_t", _from_buffer(raw))) % 64
    result: Array = raw[start : start + nbytes].view(dtype).reshape(shape)
    return result


class ElementOperator:
    """A prepared element operator: kernels are generated for the shapes it meets. Safe to call from any thread."""

    def __init__(self, isa: str | None = None, post_ops: Sequence[PostOp] | PostOp = ()) -> None:
        """Choose the tier; ISAError where `isa` is unknown or cannot be used here."""
        name = tiers.resolve_tier(isa, [t.name for t in tiers.TIERS])
        self._tier = code_tier(tiers.tier(name).vector_bits)
        # The tiers' kernels do without VBMI and BF16: they are used where they are there and nobody asked for a tier.
        self._extras = frozenset({VBMI, BF16}) & tiers.allowed_features() if isa is None else frozenset()
        self._vbmi = VBMI in self._extras
        self._plans: dict[Any, ElementPlan] = {}
        self._post_ops = check_post_ops(post_ops)
        self._takers = tuple(op for op in self._post_ops if isinstance(op, (Sum, Binary)) and op.takes_tensor)

    @property
    def isa(self) -> str:
        """The tier whose kernels run: avx512, avx2 or reference."""
        return "reference" if self._tier is None else self._tier.name

    def kernels(self) -> tuple[str, ...]:
        """Names of the kernels that calls have used so far."""
        return tuple(key.name for plan in self._plans.values() for key in plan.keys)

    def _plan(self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...]) -> ElementPlan:
        raise NotImplementedError

    def _pitched(
        self, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[np.dtype[Any], ...], pitch: int
    ) -> ElementPlan:
        """As `_plan`, for an output whose rows lie `pitch` elements apart."""
        raise ShapeError(f"{type(self).__name__} writes rows without gaps between them")

    def native(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[DType]) -> tuple[NativeStep, ...]:
        """The steps that compute sources of these shapes and types; tensors of post-ops are inputs behind them.

        All steps write parts of the same output. Raises what a call would raise.
        """
        return self._steps(self._plan(tuple(shapes), tuple(NUMPY[t] for t in dtypes)), shapes, dtypes)

    def native_pitched(self, shape: tuple[int, ...], dtype: DType, pitch: int) -> tuple[NativeStep, ...]:
        """As `native`, for one source and an output whose rows (pixels) lie `pitch` elements apart.

        ShapeError where the operator's kernels cannot leave gaps.
        """
        if pitch == shape[-1]:
            return self.native([shape], [dtype])
        return self._steps(self._pitched((shape,), (NUMPY[dtype],), pitch), [shape], [dtype])

    def _steps(
        self, plan: ElementPlan, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[DType]
    ) -> tuple[NativeStep, ...]:
        count = len(shapes)
        tensors = range(count, count + len(plan.tensors))

        def function(arrays: Sequence[Array]) -> Array:
            return plan.reference(arrays[:count], arrays[count:])

        def step(bound: Bound | None, sources: tuple[int, ...]) -> NativeStep:
            places = [ARG_SRC, *range(ARG_TENSORS, ARG_TENSORS + MAX_TENSORS)]
            slots: list[tuple[int, Operand]] = [(ARG_DST, ("out", 0))]
            slots += [(place, ("in", i)) for place, i in zip(places, (*sources, *tensors), strict=False)]
            types = [*dtypes, *plan.tensors]
            alone = plan.in_place or (len(plan.tensors) > 0 and plan.y_shape == shapes[0])
            fits = [i for i, kind in enumerate(types) if alone and NUMPY[kind] == plan.y_dtype]
            return NativeStep(bound, tuple(slots), plan.y_shape, plan.y_dtype, function, in_place=tuple(fits))

        if self._tier is None:
            return (step(None, ()),)
        return tuple(step(call.bound, call.sources) for call in plan.calls)

    def _run(self, sources: Sequence[Any], out: Array | None, tensors: Sequence[Array] = ()) -> Array:
        try:
            plan = self._plans.get(tuple([(x.shape, x.dtype) for x in sources]))
        except AttributeError:
            plan = None
        if plan is None:
            plan = self._first(sources)
        arrays = [x if x.flags.c_contiguous else np.ascontiguousarray(x) for x in sources]
        if out is None:
            y = aligned_empty(plan.y_shape, plan.y_dtype)
        else:
            check_out(plan, arrays, out)
            y = out
        operands = self._operands(plan, out, tensors) if self._takers or len(tensors) else []
        if self._tier is None:
            y[...] = plan.reference(arrays, operands)
        elif plan.simple and not operands:
            code = _call2(plan.calls[0].bound.descriptor, _from_buffer(arrays[0]), _from_buffer(y), num_threads())
            native.check(code)
        else:
            self._call_all(plan, arrays, y, operands)
        return y

    def _first(self, sources: Sequence[Any]) -> ElementPlan:
        """Check and plan sources of new shapes or types."""
        for i, x in enumerate(sources):
            if not isinstance(x, np.ndarray):
                name = "x" if len(sources) == 1 else f"source {i}"
                raise DTypeError(f"{name} must be a NumPy array, not {type(x).__name__}")
        plan = self._plan(tuple(x.shape for x in sources), tuple(x.dtype for x in sources))
        simple = len(sources) == len(plan.calls) == 1 and NUMPY["bf16"] not in (plan.y_dtype, sources[0].dtype)
        plan = replace(plan, simple=simple)
        self._plans[tuple([(x.shape, x.dtype) for x in sources])] = plan
        return plan

    def _call_all(self, plan: ElementPlan, arrays: Sequence[Array], y: Array, operands: Sequence[Array]) -> None:
        for call in plan.calls:
            first, *others = (arrays[i].ctypes.data for i in call.sources)
            addresses = [first, y.ctypes.data, *others, *(t.ctypes.data for t in operands)]
            block = native.ffi.new("int64_t[]", addresses)
            native.check(native.lib.vg_call(call.bound.descriptor, len(addresses), block, num_threads()))

    def _operands(self, plan: ElementPlan, out: Array | None, tensors: Sequence[Array]) -> list[Array]:
        """The tensors of all post-ops, in order: their own, the call's, or `out`."""
        given = iter(tensors)
        free = sum(op.tensor is None for op in self._takers)
        if len(tensors) not in (0, free):
            raise ShapeError(f"{len(tensors)} tensors were given for {free} post-ops without one")
        result = []
        for op, dtype in zip(self._takers, plan.tensors, strict=True):
            tensor = op.tensor if op.tensor is not None else next(given, out)
            if tensor is None:
                raise ShapeError("a post-op without a tensor reads `out`: pass out= or tensors=")
            if not isinstance(tensor, np.ndarray) or tensor.dtype != NUMPY[dtype]:
                raise DTypeError(f"a post-op's tensor must be a {dtype} array")
            if tensor.shape != plan.y_shape:
                raise ShapeError(f"a post-op's tensor has shape {tensor.shape}, the output {plan.y_shape}")
            if out is not None and tensor is not out and np.may_share_memory(tensor, out):
                raise ShapeError("a post-op's tensor overlaps `out` without being the same array; pass a copy")
            result.append(np.ascontiguousarray(tensor))
        return result


def check_post_ops(post_ops: Any) -> tuple[PostOp, ...]:
    """A tuple of post-ops; DTypeError for anything else, ShapeError for too many tensors."""
    ops = (post_ops,) if isinstance(post_ops, PostOp) else post_ops
    if not isinstance(ops, (tuple, list)) or not all(isinstance(op, PostOp) for op in ops):
        raise DTypeError(f"post_ops must be a post-operation such as ReLU() or a sequence of them, not {post_ops!r}")
    if sum(isinstance(op, (Sum, Binary)) and op.takes_tensor for op in ops) > MAX_TENSORS:
        raise ShapeError(f"at most {MAX_TENSORS} post-ops may read a tensor")
    return tuple(ops)


def check_out(plan: ElementPlan, sources: Sequence[Array], out: Any) -> None:
    """Raise DTypeError or ShapeError for an `out` that cannot receive the result."""
    if not isinstance(out, np.ndarray):
        raise DTypeError(f"out must be a NumPy array, not {type(out).__name__}")
    if out.dtype != plan.y_dtype:
        raise DTypeError(f"out must be {plan.y_dtype}, not {out.dtype}")
    if out.shape != plan.y_shape:
        raise ShapeError(f"out must have shape {plan.y_shape}, not {out.shape}")
    if not out.flags.c_contiguous or not out.flags.writeable:
        raise ShapeError("out must be C-contiguous and writeable")
    for x in sources:
        same = plan.in_place and x.ctypes.data == out.ctypes.data and x.dtype == out.dtype
        if not same and np.may_share_memory(x, out):
            raise ShapeError("out overlaps a source; pass a separate array")
