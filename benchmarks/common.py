"""What all benchmarks share: a case, its paired measurement, the table and the JSON file.

Timing is `vnnigen.bench.timing.compare`, for peers in other processes too: those time themselves, and the clock
given to `compare` leaves out what talking to them takes.
"""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table

from vnnigen.bench.machine import describe_machine
from vnnigen.bench.timing import Samples, compare
from vnnigen.bench.workload import Request, Workload, build_workload, f32_request
from vnnigen.isa.tiers import why_not
from vnnigen.runtime.peak import measure_peaks, peak_for

#: Nanoseconds that a sample of a peer should last; what `compare` uses.
_SAMPLE_NS = 2_000_000
#: Threads of a peer's pool spin for a while after their work; they must not do so on our time.
_SETTLE_SECONDS = 5e-3


@dataclass(frozen=True)
class Case:
    """One line of a benchmark: a kernel to time, alternately with the f32 kernel of the same problem."""

    name: str
    request: Request
    vs_f32: bool = True


class Job(Protocol):
    """A problem prepared by a peer in another process."""

    @property
    def impl(self) -> str:
        """What the peer calls the kernel that it chose."""

    def sample(self, calls: int) -> int:
        """Run it `calls` times and return the nanoseconds that the peer measured."""

    def drop(self) -> None:
        """Free it."""


#: Prepares the problem of a request on a tier; None where the peer has nothing comparable.
Peer = Callable[[Request, str], Job | None]


@dataclass
class Row:
    """A case's outcome: figures of our kernel, of f32 and of the peer, or why there are none."""

    case: Case
    tier: str
    why_not: str | None = None
    ours: dict[str, Any] = field(default_factory=dict)
    f32: dict[str, Any] | None = None
    peer: dict[str, Any] | None = None
    vs_f32: float | None = None
    vs_peer: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        r = self.case.request
        head = {"case": self.case.name, "problem": str(r.shape), "dtype": r.dtype, "tier": self.tier}
        if self.why_not is not None:
            return head | {"why_not": self.why_not}
        return head | {
            "weights": r.weights, "post_ops": r.post_ops, "threads": r.threads, "ours": self.ours, "f32": self.f32,
            "peer": self.peer, "vs_f32": self.vs_f32, "vs_peer": self.vs_peer,
        }  # fmt: skip


class Stopwatch:
    """A nanosecond clock that counts work done elsewhere by what it took there."""

    def __init__(self, clock: Callable[[], int] = time.perf_counter_ns) -> None:
        self._clock, self._hidden = clock, 0

    def __call__(self) -> int:
        """Return nanoseconds, as the clock does."""
        return self._clock() - self._hidden

    def elsewhere(self, job: Job, calls: int, settle: bool) -> None:
        """Run a sample of a peer's job; afterwards the clock has advanced by the peer's own figure."""
        start = self._clock()
        if settle:
            time.sleep(_SETTLE_SECONDS)
        took = job.sample(calls)
        if settle:
            time.sleep(_SETTLE_SECONDS)
        self._hidden += self._clock() - start - took


def run_case(case: Case, rounds: int, peer: Peer | None = None) -> Row:
    """Time one case on one tier: our kernel, the f32 kernel and the peer, alternately."""
    request = case.request
    tier = request.isa or "best"
    if request.isa is not None and (reason := why_not(request.isa)) is not None:
        return Row(case, tier, reason)
    main = build_workload(request)
    row = Row(case, main.explanation.tier)
    clock = Stopwatch()
    candidates: dict[str, Callable[[], object]] = {"ours": main.run}
    base = build_workload(f32_request(request, row.tier)) if case.vs_f32 else None
    if base is not None:
        candidates["f32"] = base.run
    job = peer(request, row.tier) if peer is not None else None
    calls = 1
    if job is not None:
        job.sample(1)
        calls = max(1, math.ceil(_SAMPLE_NS / max(job.sample(3) // 3, 1)))
        candidates["peer"] = lambda: clock.elsewhere(job, calls, settle=request.threads > 1)
    times = compare(candidates, rounds=rounds, clock=clock)
    row.ours = _figures(main, times["ours"])
    if base is not None:
        row.f32, row.vs_f32 = _figures(base, times["f32"]), times.speedup("ours", "f32")
    if job is not None:
        # One turn of the peer's candidate is `calls` calls.
        row.peer = _speed(request, times["peer"], calls) | {"kernel": job.impl}
        row.vs_peer = times.speedup("ours", "peer") / calls
        job.drop()
    return row


def _figures(workload: Workload, samples: Samples) -> dict[str, Any]:
    explanation, chains = workload.explanation, workload.chains
    figures = _speed(workload.request, samples, 1)
    peak = peak_for(explanation.tier, chains, workload.request.threads)
    figures["pct_peak"] = None if peak is None else 100 * figures["gops"] / peak
    return figures | {"kernel": explanation.kernel, "tier": explanation.tier, "chains": chains}


def _speed(request: Request, samples: Samples, calls: int) -> dict[str, Any]:
    median = samples.median / calls
    gops = request.shape.ops / median * 1e-9
    return {"ms_median": median * 1e3, "ms_min": samples.best / calls * 1e3, "gops": gops}


def rows_table(title: str, rows: Sequence[Row], peer: str | None = None, caption: str = "") -> Table:
    """Lay rows out for people; a row that could not run says why."""
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for name in ("case", "tier", "multiply step"):
        table.add_column(name)
    numbers = ["ms", "GOP/s", "% of peak", "f32 GOP/s", "vs f32"]
    for name in numbers + ([f"{peer} GOP/s", f"vs {peer}"] if peer else []):
        table.add_column(name, justify="right")
    for row in rows:
        if row.why_not is not None:
            table.add_row(row.case.name, row.tier, "not on this host")
            continue
        cells = [f"{row.ours['ms_median']:.4f}", f"{row.ours['gops']:.0f}", _cell(row.ours["pct_peak"], ".1f")]
        cells += [_cell(row.f32 and row.f32["gops"], ".0f"), _cell(row.vs_f32, ".2f")]
        if peer:
            cells += [_cell(row.peer and row.peer["gops"], ".0f"), _cell(row.vs_peer, ".2f")]
        table.add_row(row.case.name, row.tier, "+".join(row.ours["chains"]), *cells)
    return table


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def context() -> dict[str, Any]:
    """Describe what the figures depend on: the command, the machine, its load and its peaks."""
    # Peaks first: they are what everything else is a percentage of, so the load then is what matters.
    load = os.getloadavg()
    peaks = {p.name: p.gops for p in measure_peaks().values() if p.gops is not None}
    module = "python -m benchmarks." + Path(sys.argv[0]).stem
    return {
        "command": shlex.join([*module.split(), *sys.argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "load": load,
        "machine": describe_machine(),
        "peaks_gops": peaks,
    }


def warn_if_busy(console: Console) -> None:
    """Say so when other processes will disturb the figures."""
    if (load := os.getloadavg()[0]) > 0.5:
        console.print(f"[yellow]load average {load:.1f}: other processes are running, expect noise[/yellow]")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write a result file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1) + "\n")
