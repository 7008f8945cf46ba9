"""Networks: a graph that can be called. Plans are made for the shapes that come, and kept."""

from __future__ import annotations

import os
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np

from vnnigen.errors import DTypeError, ModelError, ShapeError, VnnigenError
from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.format import save_graph
from vnnigen.graph.ir import Array, Graph, TensorType
from vnnigen.graph.lower import lower
from vnnigen.graph.plan import Plan
from vnnigen.graph.recent import RecentCache
from vnnigen.graph.report import Explanation, Profile
from vnnigen.graph.specialize import specialize
from vnnigen.graph.storage import Layout
from vnnigen.graph.tiers import Tiers
from vnnigen.runtime import native
from vnnigen.runtime.threads import num_threads

#: Plans that a network keeps, those of the shapes it saw last: each has memory for activations, for every call at once.
#: Kernels and packed weights are kept anyway, so that another plan of a shape takes milliseconds.
MAX_PLANS = 16
#: Shapes of all inputs, and in which order each lies.
Key = tuple[tuple[tuple[int, ...], Layout], ...]


class Network:
    """A compiled network.

    Call it with arrays in the order of `inputs`, or by name; results are f32 (or what the model says where it is not a
    real number), in ONNX's order of dimensions: one array, or a tuple for several outputs. Plans are compiled at the
    first call with each combination of input shapes; those of the last `MAX_PLANS` combinations are kept. Any number of
    threads may call it at once.
    """

    def __init__(
        self, graph: Graph, *, isa: str | None = None, threads: int | None = None, log: Sequence[str] = ()
    ) -> None:
        """Take over a graph whose types are inferred; `log` is what passes did, for `explain`.

        `isa` caps the tiers of all kernels, `threads` those of a call (default: as many as kernels may use). Raises
        ISAError for an unusable tier, VnnigenError for a number of threads that cannot be.
        """
        limit: int = native.lib.VG_MAX_THREADS
        if threads is not None and not 1 <= threads <= limit:
            raise VnnigenError(f"threads={threads}: give a number from 1 to {limit}, or None for the usual number")
        graph.check()
        self.graph = graph
        self.log = tuple(log)
        self._tiers = Tiers(isa)
        self._threads = threads
        self._operators: dict[Hashable, Any] = {}
        self._plans: RecentCache[Key, Plan] = RecentCache(MAX_PLANS)
        self._last: Plan | None = None
        #: The plan of the last inputs that needed no change, their names, and their shapes and types.
        self._seen: tuple[Plan, tuple[str, ...], tuple[tuple[tuple[int, ...], np.dtype[Any]], ...]] | None = None

    @property
    def isa(self) -> str | None:
        """The cap of tiers, None for the machine's best."""
        return self._tiers.isa

    @property
    def inputs(self) -> dict[str, TensorType]:
        """Names and types of the inputs; lengths that vary are names."""
        return dict(self.graph.inputs)

    @property
    def outputs(self) -> dict[str, TensorType | None]:
        """Names and types of the outputs, None where the type is not known."""
        return {name: self.graph.types.get(name) for name in self.graph.outputs}

    def __call__(self, *args: Any, **named: Array) -> Any:
        """Run the network on arrays in the order of `inputs`, one mapping of names to arrays, or keywords.

        Arrays have the model's types (f32 may also be f64 or f16) and any memory order. Raises ShapeError, DTypeError
        or ModelError saying which input is wrong.
        """
        plan, given = (None if named else self._as_before(args)) or self._prepare(args, named)
        results = plan.run(given, self._threads or num_threads())
        return results[0] if len(results) == 1 else tuple(results)

    # Inputs.

    def _as_before(self, args: Sequence[Any]) -> tuple[Plan, Sequence[Array]] | None:
        """The last call's plan and the inputs, if they are of the same shapes and types and need no change."""
        if self._seen is None:
            return None
        plan, names, kinds = self._seen
        given: Sequence[Any] = args
        if len(args) == 1 and type(args[0]) is dict:
            given = [args[0].get(name) for name in names]
            if len(args[0]) != len(names):
                return None
        if len(given) != len(kinds):
            return None
        for x, (shape, dtype) in zip(given, kinds, strict=True):
            if type(x) is not np.ndarray or x.shape != shape or x.dtype != dtype or not x.flags.c_contiguous:
                return None
        self._last = plan
        return plan, given

    def _prepare(self, args: Sequence[Any], named: Mapping[str, Any]) -> tuple[Plan, Sequence[Array]]:
        """The plan of these inputs, and the inputs as it takes them."""
        arrays = self._arrays(args, named)
        plan, given = self._plan_for(arrays)
        if all(type(x) is np.ndarray and x.flags.c_contiguous for x in arrays):
            self._seen = plan, tuple(self.graph.inputs), tuple((x.shape, x.dtype) for x in arrays)
        return plan, given

    def _arrays(self, args: Sequence[Any], named: Mapping[str, Any]) -> list[Array]:
        """The inputs in order, as arrays of the right types and ranks."""
        names = list(self.graph.inputs)
        if len(args) == 1 and isinstance(args[0], Mapping):
            named = {**args[0], **named}
            args = ()
        if len(args) > len(names):
            raise ShapeError(f"{len(args)} inputs were given, the network has {len(names)}: {', '.join(names)}")
        given = dict(zip(names, args, strict=False))
        if unknown := [n for n in named if n not in names]:
            raise ModelError(f"the network has no input {unknown[0]!r}; its inputs are {', '.join(names)}")
        if twice := [n for n in named if n in given]:
            raise ModelError(f"input {twice[0]!r} is given twice")
        given.update(named)
        if missing := [n for n in names if n not in given]:
            raise ModelError(f"input {missing[0]!r} is missing; the inputs are {', '.join(names)}")
        return [self._array(n, given[n]) for n in names]

    def _array(self, name: str, given: Any) -> Array:
        kind = self.graph.inputs[name]
        if not isinstance(given, np.ndarray):
            raise DTypeError(f"input {name!r} must be a NumPy array, not {type(given).__name__}")
        value: Array = given
        wanted = numpy_dtype(kind.dtype)
        if value.dtype != wanted:
            if kind.dtype != "f32" or value.dtype not in (np.float64, np.float16):
                raise DTypeError(f"input {name!r} must be {wanted}, not {value.dtype}")
            value = value.astype(np.float32)
        if kind.shape is not None:
            fits = len(kind.shape) == value.ndim and all(
                not isinstance(d, int) or d == n for d, n in zip(kind.shape, value.shape, strict=True)
            )
            if not fits:
                raise ShapeError(f"input {name!r} must have shape {_dims(kind)}, not {value.shape}")
        return value

    def _plan_for(self, arrays: Sequence[Array]) -> tuple[Plan, list[Array]]:
        """The plan of these inputs' shapes, and the inputs without gaps."""
        given, parts = [], []
        for x in arrays:
            layout: Layout = "plain"
            if not x.flags.c_contiguous:
                last = np.moveaxis(x, 1, -1) if x.ndim > 2 else x
                if last.flags.c_contiguous:
                    layout, x = "nhwc", last  # noqa: PLW2901
                else:
                    x = np.ascontiguousarray(x)  # noqa: PLW2901
            given.append(x)
            parts.append((x.shape if layout == "plain" else (x.shape[0], x.shape[-1], *x.shape[1:-1]), layout))
        return self.plan(tuple(parts)), given

    def plan(self, key: Key) -> Plan:
        """The plan of inputs of these shapes and orders, compiled if it is new."""
        self._last = plan = self._plans.get(key, lambda: self._compile(key))
        return plan

    def _compile(self, key: Key) -> Plan:
        shapes = dict(zip(self.graph.inputs, (shape for shape, _ in key), strict=True))
        layouts = dict(zip(self.graph.inputs, (layout for _, layout in key), strict=True))
        return Plan(lower(specialize(self.graph, shapes, dynamic=True), self._tiers, self._operators, layouts))

    # What is visible.

    def _current(self) -> Plan:
        """The plan of the last call, or that of the model's own shapes."""
        if self._last is not None:
            return self._last
        shapes = [kind.static for kind in self.graph.inputs.values()]
        if any(s is None for s in shapes):
            raise ShapeError("the network's input shapes vary: call it once, then ask again")
        return self.plan(tuple((s, "plain") for s in shapes if s is not None))

    @property
    def peak_memory(self) -> int:
        """Bytes of activations and temporary memory of the last call's plan (or of the model's own shapes)."""
        return self._current().peak_memory

    def explain(self) -> Explanation:
        """What the last call's plan (or that of the model's own shapes) does: `str()` prints it."""
        return Explanation.of(self.graph.name, self._current(), self.log)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the network to a file that `vnnigen.load` reads, on any machine and without the onnx package."""
        save_graph(self.graph, path, self.log)

    def profile(self, *args: Any, runs: int = 10, **named: Array) -> Profile:
        """Run several times and report the time of each layer (the least of all runs)."""
        plan, given = self._plan_for(self._arrays(args, named))
        threads = self._threads or num_threads()
        count = len(plan.lowered.steps)
        best = np.full(count, np.iinfo(np.int64).max)
        plan.run(given, threads)
        for _ in range(max(runs, 1)):
            times = native.ffi.new("uint64_t[]", max(count, 1))
            plan.run(given, threads, times)
            best = np.minimum(best, [times[i] for i in range(count)])
        return Profile.of(self.graph.name, plan, [int(b) for b in best], threads)


def _dims(kind: TensorType) -> str:
    return "(" + ", ".join(str(d) for d in kind.shape or ()) + ")"
