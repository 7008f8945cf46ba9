"""Execution plans: a lowered graph with its memory laid out, as the native runtime walks it.

Steps with kernels that follow each other are one segment, run by one native call; between segments NumPy steps run on
views of the same arena.  A plan is shared by all callers; what a call may write (the arena, the bases) is a
`Workspace`, of which each call at a time has its own.
"""

from __future__ import annotations

import mmap
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Any

import numpy as np

from vnnigen.graph.dtypes import numpy_dtype
from vnnigen.graph.ir import Array
from vnnigen.graph.lower import Lowered, Step
from vnnigen.graph.memory import Lifetime, merge, place
from vnnigen.graph.storage import Place
from vnnigen.ops.element_base import aligned_empty
from vnnigen.runtime import native
from vnnigen.runtime.compiled import Bound

#: Arenas from this size on ask for huge pages.
HUGE = 4 << 20
#: Bytes from which on aligning an output pays.
ALIGNED_FROM = 1 << 15
_run, _from_buffer, _NULL = native.lib.vg_plan_run, native.ffi.from_buffer, native.ffi.NULL
#: What a step costs, in f32 multiply-accumulates of one thread, from which on it is split: some microseconds, the time
#: to wake others. int8 and bf16 multiply-accumulates count less, a byte that is moved counts for several.
PARALLEL_WORK = 1 << 19
MAC_COST = {"u8": 0.25, "s8": 0.25, "bf16": 0.5}
BYTE_COST = 6
#: A step that may use all threads.
ALL_THREADS = 1 << 20


@dataclass(frozen=True)
class Memory:
    """Where each buffer is: index of its base and offset; the arena's bytes, and the bytes of activations in it."""

    homes: tuple[tuple[int, int], ...]
    arena: int
    kept: int


def operands(step: Step) -> list[int]:
    """Buffers that a step reads or writes."""
    return [p.buffer for p in (*step.inputs, *step.outputs) if p is not None] + list(step.temps)


def lay_out(lowered: Lowered) -> Memory:
    """Give every buffer a base and an offset: the arena is base 0, then inputs, outputs and constants in order."""
    buffers, steps = lowered.buffers, lowered.steps
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for i, step in enumerate(steps):
        for b in operands(step):
            first.setdefault(b, i)
            last[b] = i
    for p in lowered.outputs:
        last[p.buffer] = len(steps)
    lives = {}
    for b, start in first.items():
        if buffers[b].kind == "arena":
            kept = buffers[b].initial is not None
            lives[b] = Lifetime(max(buffers[b].nbytes, 1), 0 if kept else start, len(steps) if kept else last[b])
    stands = merge(lives, _wishes(lowered))
    for b, root in stands.items():
        lives[root] = Lifetime(lives[root].size, lives[root].first, max(lives[root].last, lives[b].last))
    roots = [b for b in lives if b not in stands]
    offsets, arena = place([lives[b] for b in roots])
    at = dict(zip(roots, offsets, strict=True))
    n_in, n_out = len(lowered.inputs), len(lowered.outputs)
    homes, constants = [], 0
    for b, buffer in enumerate(buffers):
        match buffer.kind:
            case "input":
                homes.append((1 + buffer.index, 0))
            case "output":
                homes.append((1 + n_in + buffer.index, 0))
            case "const":
                homes.append((1 + n_in + n_out + constants, 0))
                constants += 1
            case _:
                homes.append((0, at.get(stands.get(b, b), 0)))
    kept_bytes = sum(lives[b].size for b in roots if buffers[b].initial is not None)
    return Memory(tuple(homes), arena, kept_bytes)


def _wishes(lowered: Lowered) -> list[tuple[int, int, int]]:
    """(step, result, input) where a result may take its input's place."""
    found = []
    for i, step in enumerate(lowered.steps):
        if step.native is None:
            continue
        out = step.outputs[0]
        for j in step.native.in_place:
            source = step.inputs[j]
            others = [p for k, p in enumerate(step.inputs) if p is not None and k not in step.native.in_place]
            if source is None or any(p.buffer == source.buffer for p in others):
                continue
            whole = (lowered.buffers[p.buffer].nbytes == p.nbytes and p.offset == 0 for p in (out, source))
            if all(whole) and lowered.buffers[source.buffer].initial is None:
                found.append((i, out.buffer, source.buffer))
    return found


def step_threads(step: Step) -> int:
    """How many threads a step may use: one if it is too small to split."""
    assert step.native is not None
    moved = sum(p.nbytes for p in (*step.inputs, *step.outputs) if p is not None)
    cost = MAC_COST.get(step.inputs[0].dtype if step.inputs[0] is not None else "f32", 1.0)
    return ALL_THREADS if step.native.macs * cost + moved * BYTE_COST >= PARALLEL_WORK else 1


@dataclass(frozen=True)
class Segment:
    """Steps first..last-1: all native, or a single one in Python."""

    first: int
    last: int
    native: bool


class Workspace:
    """What one call at a time may write: an arena, the bases of the native call, views for Python steps."""

    def __init__(self, plan: Plan) -> None:
        lowered, homes = plan.lowered, plan.memory.homes
        self.arena = allocate(plan.memory.arena)
        constants = [b.initial for b in lowered.buffers if b.kind == "const"]
        self.bases = native.ffi.new("void *[]", 1 + plan.n_in + plan.n_out + len(constants))
        self.bases[0] = native.ffi.from_buffer(self.arena)
        for i, array in enumerate(constants):
            self.bases[1 + plan.n_in + plan.n_out + i] = native.ffi.from_buffer(array)
        for (_, offset), buffer in zip(homes, lowered.buffers, strict=True):
            if buffer.kind == "arena" and buffer.initial is not None:
                contents = buffer.initial.view(np.uint8).reshape(-1)
                self.arena[offset : offset + len(contents)] = contents
        self.views: dict[Place, Array] = {}

    def view(self, plan: Plan, p: Place, objects: dict[int, Array], given: Sequence[Array]) -> Any:
        """A place as an array."""
        buffer = plan.lowered.buffers[p.buffer]
        if buffer.kind == "object":
            return objects[p.buffer]
        if buffer.kind in ("input", "output"):
            outside = given[plan.memory.homes[p.buffer][0] - 1]
            return p.array(outside.reshape(-1).view(np.uint8)) if outside.size else outside.reshape(p.shape)
        if p not in self.views:
            memory = self.arena if buffer.kind == "arena" else buffer.initial
            base, offset = (memory, plan.memory.homes[p.buffer][1])
            assert base is not None
            self.views[p] = p.array(base[offset:])
        return self.views[p]


def _new_output(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array for a result; a large one at a multiple of 64 bytes."""
    result: Array = np.empty(shape, dtype)
    return result if result.nbytes < ALIGNED_FROM else aligned_empty(shape, dtype)


def allocate(nbytes: int) -> Array:
    """Memory at a multiple of 64 bytes; huge pages are asked for where it is large."""
    if nbytes >= HUGE:
        pages = mmap.mmap(-1, nbytes)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            pages.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(pages, np.uint8)
    raw = np.empty(nbytes + 64, np.uint8)
    start = -raw.ctypes.data % 64
    return raw[start : start + max(nbytes, 64)]


class Plan:
    """A graph of concrete shapes, ready to run; safe to run from any thread."""

    def __init__(self, lowered: Lowered) -> None:
        """Lay out memory and describe all steps to the native runtime."""
        self.lowered = lowered
        self.memory = lay_out(lowered)
        self.n_in, self.n_out = len(lowered.inputs), len(lowered.outputs)
        steps = lowered.steps
        kinds = [s.native is not None and s.native.launches is not None for s in steps]
        self.segments = []
        for is_native, group in groupby(range(len(steps)), lambda i: kinds[i]):
            members = list(group)
            if is_native:
                self.segments.append(Segment(members[0], members[-1] + 1, True))
            else:
                self.segments += [Segment(i, i + 1, False) for i in members]
        self._keep: list[Any] = []
        self._checks: list[tuple[int, int, Callable[[Array], None]]] = []
        self._describe()
        self._at_once = self._outputs_at_once()
        self._free: list[Workspace] = []
        self._lock = threading.Lock()

    def _describe(self) -> None:
        """Fill the native plan. Steps in Python are empty kernels there, which never run."""
        ffi, steps = native.ffi, self.lowered.steps
        self._steps = ffi.new("vg_step[]", max(len(steps), 1))
        empty = ffi.new("vg_kernel *")
        self._keep.append(empty)
        for i, step in enumerate(steps):
            if step.native is None or step.native.launches is None:
                self._steps[i] = (empty, ffi.NULL, 0, 1)
                continue
            places = [(slot, *self._home(step, kind, j)) for slot, (kind, j) in step.native.slots]
            table = ffi.new("vg_operand[]", places)
            self._keep.append(table)
            self._steps[i] = (step.native.launches.descriptor, table, len(places), step_threads(step))
            if step.native.check is not None:
                _, offset = self.memory.homes[step.temps[0]]
                self._checks.append((offset, step.native.temps[0].bytes, step.native.check))
        launches = [s.native.launches for s in steps if s.native is not None]
        weighted = [x for x in launches if isinstance(x, Bound) and x.fetches_ahead]
        for this, following in pairwise([*weighted, *weighted[:1]]):
            this.fetch_ahead(following)
        count = 1 + self.n_in + self.n_out + sum(b.kind == "const" for b in self.lowered.buffers)
        self._plan = ffi.new("vg_plan *", (self._steps, len(steps), count))
        native.check(native.lib.vg_plan_check(self._plan))

    def _home(self, step: Step, kind: str, j: int) -> tuple[int, int]:
        if kind == "temp":
            return self.memory.homes[step.temps[j]]
        p = step.inputs[j] if kind == "in" else step.outputs[j]
        assert p is not None
        base, offset = self.memory.homes[p.buffer]
        return base, offset + p.offset

    def _outputs_at_once(self) -> tuple[tuple[tuple[int, ...], np.dtype[Any]], ...] | None:
        """Shapes and types of the outputs, if one native call is all there is to do; else None."""
        places, buffers = self.lowered.outputs, self.lowered.buffers
        own = [p for p in places if buffers[p.buffer].kind == "output"]
        known = all(p.dtype != "bf16" for p in (*own, *self.lowered.inputs))  # to the buffer protocol
        native_alone = len(self.segments) == 1 and self.segments[0].native
        if not (native_alone and known and len(own) == len(places)):
            return None
        return tuple((p.shape, numpy_dtype(p.dtype)) for p in places)

    def _run_at_once(self, inputs: Sequence[Array], shapes: Sequence[Any], threads: int) -> list[Array]:
        """Run a plan of native steps alone.

        After a large network nothing of the interpreter is left in the caches: each Python function less saves
        microseconds (measured: 140 us of overhead become 60).
        """
        outputs = [_new_output(shape, dtype) for shape, dtype in shapes]
        try:
            space = self._free.pop()
        except IndexError:
            space = Workspace(self)
        bases, i = space.bases, 1
        for array in (*inputs, *outputs):
            bases[i] = _from_buffer(array)
            i += 1
        code = _run(self._plan, 0, self.segments[0].last, bases, threads, _NULL)
        try:
            native.check(code)
            for offset, nbytes, check in self._checks:
                check(space.arena[offset : offset + nbytes])
        finally:
            self._free.append(space)
        return outputs

    def run(self, inputs: Sequence[Array], threads: int, times: Any = None) -> list[Array]:
        """Run on contiguous inputs. `times`: None, or a uint64_t of cffi per step, to which nanoseconds are added."""
        if self._at_once is not None and times is None:
            return self._run_at_once(inputs, self._at_once, threads)
        buffers = self.lowered.buffers
        outputs = []
        for p in self.lowered.outputs:
            if buffers[p.buffer].kind == "output":
                outputs.append(aligned_empty(p.shape, numpy_dtype(p.dtype)))
            else:
                outputs.append(np.empty(0, np.uint8))
        with self._lock:
            space = self._free.pop() if self._free else None
        space = space or Workspace(self)
        given = [*inputs, *outputs]
        for i, array in enumerate(given):
            space.bases[1 + i] = native.ffi.cast("void *", array.ctypes.data)
        objects: dict[int, Array] = {}
        for segment in self.segments:
            if segment.native:
                ns = native.ffi.NULL if times is None else times
                code = native.lib.vg_plan_run(self._plan, segment.first, segment.last, space.bases, threads, ns)
                native.check(code)
            else:
                self._python(segment.first, space, objects, given, times)
        for i, p in enumerate(self.lowered.outputs):
            if buffers[p.buffer].kind != "output":
                outputs[i] = space.view(self, p, objects, given)
        try:
            for offset, nbytes, check in self._checks:
                check(space.arena[offset : offset + nbytes])
        finally:
            with self._lock:
                self._free.append(space)
        return outputs

    def _python(self, i: int, space: Workspace, objects: dict[int, Array], given: Sequence[Array], times: Any) -> None:
        """Run a step in Python."""
        step = self.lowered.steps[i]
        start = time.perf_counter_ns()
        arrays = [None if p is None else space.view(self, p, objects, given) for p in step.inputs]
        results = step.function(arrays)
        for p, result in zip(step.outputs, results, strict=True):
            if self.lowered.buffers[p.buffer].kind == "object":
                objects[p.buffer] = result
            else:
                space.view(self, p, objects, given)[...] = result
        if times is not None:
            times[i] += time.perf_counter_ns() - start

    @property
    def peak_memory(self) -> int:
        """Bytes of the arena: activations and kernels' temporary memory, without inputs, outputs and weights."""
        return self.memory.arena
