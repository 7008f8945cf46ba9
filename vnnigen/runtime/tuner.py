"""The autotuner: times the best candidates of the blocking model on this machine and remembers the winner.

`VNNIGEN_TUNE=load` (the default) uses results that are stored and measures nothing; `on` also measures what is not
stored yet, once for each machine and problem; `off` takes the analytic choice.  Which blocking is used never changes
a result: K is summed in the same order in all of them.

Candidates run on the caller's packed weights, with a source and a destination of the tuner's own.  They take turns, so
that drift and neighbours hit all alike, and the least time of each counts; those far behind drop out early.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Protocol

import numpy as np

from vnnigen.errors import ShapeError, VnnigenError
from vnnigen.kernels.blocking import Blocking
from vnnigen.kernels.emit_epilogue import OUT_BYTES
from vnnigen.kernels.geometry import SRC_BYTES, Geometry
from vnnigen.kernels.layout import MAX_TENSORS
from vnnigen.kernels.nest import NestKey
from vnnigen.kernels.packed import PackedRun, Pick
from vnnigen.kernels.packing import aligned
from vnnigen.kernels.types import Array
from vnnigen.runtime import native, tune_store
from vnnigen.runtime.cache import KernelCache
from vnnigen.runtime.compiled import Bound, compile_new

MODES = ("off", "load", "on")
ANALYTIC, STORED, MEASURED = "analytic", "tuned (stored)", "tuned (measured now)"

_SAMPLE_SECONDS = 1e-3
_ROUNDS = 7
#: A candidate this much slower than the best after a few rounds is out.
_BEHIND = 1.2
#: Seconds after which no further round begins, once every candidate had three.
_BUDGET = 0.5
#: What a candidate must gain over the analytic choice: less is noise.
_GAIN = 0.02
#: One measurement at a time: two at once would measure each other.
_measuring = threading.Lock()


@dataclass(frozen=True)
class Tuning:
    """How a kernel's blocking was chosen, and the candidates' seconds where they are known, best first."""

    source: str = ANALYTIC
    measured: tuple[tuple[Blocking, float], ...] = ()


class Packed(Protocol):
    """Packed weights that can name the kernels of a geometry."""

    def keys_for(self, g: Geometry, pick: Pick | None = None, threads: int = ...) -> tuple[NestKey, ...]:
        """The kernels of `g` for so many threads; `pick` chooses each one's from its candidates."""


def mode() -> str:
    """What `VNNIGEN_TUNE` says: "off", "load" or "on". VnnigenError for anything else."""
    value = os.environ.get("VNNIGEN_TUNE", "").strip().lower() or "load"
    if value not in MODES:
        raise VnnigenError(f"VNNIGEN_TUNE={value!r} is not one of {', '.join(MODES)}")
    return value


def tuned_keys(packed: Packed, g: Geometry, threads: int) -> tuple[tuple[NestKey, ...], tuple[Tuning, ...]]:
    """The kernels that compute `g`, and how each one's blocking was chosen for `threads` threads.

    Raises VnnigenError for a bad VNNIGEN_TUNE, and what generating a kernel raises.
    """
    how = mode()
    root = tune_store.folder()
    if how == "off" or (how == "load" and (root is None or not root.is_dir())):
        keys = packed.keys_for(g, None, threads)
        return keys, (Tuning(),) * len(keys)
    machine = tune_store.machine(threads)
    tunings: list[Tuning] = []

    def pick(candidates: Sequence[NestKey], run: PackedRun) -> int:
        chosen, tuning = _choose(candidates, run, threads, machine, measure_missing=how == "on")
        tunings.append(tuning)
        return [key.blocking for key in candidates].index(chosen)

    return packed.keys_for(g, pick, threads), tuple(tunings)


def _choose(
    candidates: Sequence[NestKey], run: PackedRun, threads: int, machine: str, *, measure_missing: bool
) -> tuple[Blocking, Tuning]:
    """The blocking to use, stored or measured now or the analytic one, and which of these it is."""
    blockings = [key.blocking for key in candidates]
    problem = problem_of(candidates[0])
    path = tune_store.path_of(machine, problem)
    entry = None if path is None else tune_store.load(path, problem, blockings)
    source = STORED
    if entry is None and measure_missing and len(candidates) > 1:
        source = MEASURED
        # Also kept in this process, for callers that come at the same time and for a cache that cannot be written.
        entry = _MEASURED_HERE.get((machine, problem), lambda: _measured(candidates, run, threads))
        if path is not None:
            tune_store.save(path, problem, entry)
    if entry is None:
        return blockings[0], Tuning()
    return entry.blocking, Tuning(source, tuple(sorted(entry.measured, key=lambda row: row[1])))


_MEASURED_HERE: KernelCache[tuple[str, str], tune_store.Entry] = KernelCache()


def problem_of(key: NestKey) -> str:
    """Everything about a kernel that its speed depends on, but its blocking; where its columns begin is no matter."""
    parts: dict[str, Any] = {f.name: getattr(key, f.name) for f in fields(key)}
    for name in ("blocking", "column0", "launch"):
        del parts[name]
    parts |= {"kernel": type(key).__name__, "g": asdict(key.g), "tier": key.tier.name, "mac": key.mac.name}
    return json.dumps(parts, sort_keys=True, default=repr)


def _measured(candidates: Sequence[NestKey], run: PackedRun, threads: int) -> tune_store.Entry:
    """Time the candidates; the analytic one stays unless another is clearly faster."""
    with _measuring:
        operands = _Operands(candidates[0])
        calls: dict[Blocking, Callable[[], None]] = {}
        for key in candidates:
            try:
                calls[key.blocking] = operands.call(key, run, threads)
            except ShapeError:  # such as a tile whose offsets are too long for this image
                continue
        seconds = time_alternately(calls)
    best = min(seconds, key=lambda b: seconds[b])
    analytic = candidates[0].blocking
    if analytic in seconds and seconds[best] > (1 - _GAIN) * seconds[analytic]:
        best = analytic
    return tune_store.Entry(best, tuple(seconds.items()))


class _Operands:
    """A source, a destination and tensors of the tuner's own, for one problem."""

    def __init__(self, key: NestKey) -> None:
        g, spec = key.g, key.spec
        outputs = g.images * g.oh * g.ow * key.ldo
        # Where networks keep activations: lines that straddle two of the cache cost tiles twice the loads.
        self.source = _aligned(_source(g))
        self.destination = _aligned(np.zeros(outputs * OUT_BYTES[spec.out], np.uint8))
        # One buffer serves as every tensor: what it holds does not matter. It is written, so that it has pages.
        self.tensor = _aligned(np.zeros(outputs * 4 if spec.reads_tensors else 0, np.uint8))
        addresses = [a.ctypes.data for a in (self.source, self.destination, *(self.tensor,) * MAX_TENSORS)]
        self.arguments = native.ffi.new("int64_t[]", addresses)

    def call(self, key: NestKey, run: PackedRun, threads: int) -> Callable[[], None]:
        """Generate a candidate and make it callable; its code goes when the callable does."""
        bound = Bound([replace(key, launch=0)], [run], compile_new)

        def call() -> None:
            native.check(native.lib.vg_call(bound.descriptor, len(self.arguments), self.arguments, threads))

        return call


def _aligned(values: Array) -> Array:
    """A copy at a multiple of 64 bytes, all of its pages written."""
    copy = aligned(values.nbytes)
    copy[:] = values.view(np.uint8)
    return copy


def _source(g: Geometry) -> Array:
    """Ordinary numbers: denormal floats would take their own time."""
    rng = np.random.default_rng(0)
    count = g.images * g.h * g.w * g.ic
    if g.src in ("u8", "s8"):
        return rng.integers(0, 256, count, dtype=np.uint8)
    floats: Array = rng.standard_normal(count, dtype=np.float32)
    if SRC_BYTES[g.src] == 4:
        return floats
    upper: Array = floats.view(np.uint16)[1::2].copy()  # bf16
    return upper


def time_alternately(
    calls: dict[Blocking, Callable[[], None]], clock: Callable[[], float] = time.perf_counter
) -> dict[Blocking, float]:
    """Least seconds per call of each candidate, measured by turns. `calls` must not be empty.

    The first, with which the others are compared, stays to the end.
    """
    best = {name: _time(call, 1, clock) for name, call in calls.items()}  # code and operands into the caches
    repeats = {}
    for name, call in calls.items():
        best[name] = _time(call, 1, clock)
        repeats[name] = max(1, int(_SAMPLE_SECONDS / best[name]))
    live = list(calls)
    first = live[0]
    end = clock() + _BUDGET
    for turn in range(_ROUNDS):
        for name in live:
            best[name] = min(best[name], _time(calls[name], repeats[name], clock))
        if turn >= 2:
            if clock() > end:
                break
            least = min(best.values())
            live = [name for name in live if name == first or best[name] < _BEHIND * least]
        live.reverse()
    return best


def _time(call: Callable[[], None], repeat: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeat):
        call()
    return max(clock() - start, 1e-9) / repeat
