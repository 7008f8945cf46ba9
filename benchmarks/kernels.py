"""Kernel for kernel against other libraries: shapes of real networks, every dtype and tier, on one and all threads.

    python -m benchmarks.kernels [--tiers avx512_vnni,...] [--dtypes int8,f32,bf16] [--shapes resnet50,...|all]
        [--batch 1,16] [--threads 1,all] [--peers onednn,fbgemm,openblas] [--json FILE] [--chart DIR] [--quick]

Every row times our kernel and its peers alternately, each peer in a process of its own: oneDNN capped to the row's
tier (and, for `--peers torch-onednn`, PyTorch's newer one), fbgemm on AVX512-VNNI, NumPy's BLAS for f32 products. A
ratio is the median over rounds of the peer's time by ours, above 1 where we are faster; `of best` compares the
shortest times. On a busy machine `--clock cpu` leaves out when others ran. Kernels are called as a compiled network
would, without Python's checks. GOP/s do not count taps on the padding, and nor does `% of peak`, the share of the
measured peak of the kernel's own multiply step; the JSON file has both with the padding too.

A row is memory bound where its arithmetic intensity is below the balance of measured peak and measured bandwidth of
reading as many bytes (see benchmarks/roofline.py); those rows show % of that bandwidth and have a mean of their own.
On tiers without VNNI, int8 weights are measured both chain-safe and full-range: with the latter we compute the exact
result, while oneDNN saturates and is wrong.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console

from benchmarks.common import Job, Stopwatch, context, warn_if_busy
from benchmarks.kernel_report import (
    SCHEMA,
    WITHOUT_VNNI,
    Group,
    charts,
    rows_table,
    summarize,
    summary_table,
    write_result,
)
from benchmarks.peers.blas import Blas
from benchmarks.peers.onednn import OneDNN
from benchmarks.peers.process import PeerError
from benchmarks.peers.pytorch import FBGEMM, TorchOneDNN
from benchmarks.roofline import LEVELS, bytes_touched, draw, is_memory_bound, read_bandwidth
from benchmarks.shapes import SUITES, Item, items_of, quick
from vnnigen.bench.problem_string import ConvShape
from vnnigen.bench.timing import Samples, compare
from vnnigen.bench.workload import Request, run_once
from vnnigen.errors import VnnigenError
from vnnigen.isa import tiers
from vnnigen.ops.explanation import Explanation, columns_by_chain
from vnnigen.runtime import native
from vnnigen.runtime.peak import measure_peaks, peak_for
from vnnigen.runtime.threads import default_num_threads

#: The dtypes on the command line, as requests and peers call them, and the tiers that each is measured on.
DTYPES = {"int8": "u8s8", "s8s8": "s8s8", "f32": "f32", "bf16": "bf16"}
_INT8 = ("avx2", "avx_vnni", "avx512", "avx512_vnni", "amx_int8")
TIERS_OF: dict[str, tuple[str, ...]] = {
    "int8": _INT8, "s8s8": _INT8, "f32": ("avx2", "avx512"), "bf16": ("avx512_bf16", "amx_bf16"),
}  # fmt: skip
_OUT = {"int8": "u8", "s8s8": "u8", "f32": "f32", "bf16": "bf16"}
#: CPUs that other processes may use while several threads are measured.
_FREE = 0.15
#: Seconds that one candidate of a row may take, three rounds excepted.
_BUDGET = 1.5


class TimedJob(Job, Protocol):
    """A peer's job that can count the processor's time of its thread instead of the clock's."""

    by_cpu: bool


class Startable(Protocol):
    """A peer's process: made for a tier and a number of threads, it prepares jobs."""

    version: str

    def prepare(self, shape: Any, dtype: str, out: str, post_ops: str = "") -> TimedJob:
        """Prepare a problem, or raise PeerError."""

    def close(self) -> None:
        """End it."""


PEERS: dict[str, Callable[[str, int], Startable]] = {
    "onednn": OneDNN, "fbgemm": FBGEMM, "openblas": Blas, "torch-onednn": TorchOneDNN,
}  # fmt: skip
USUAL_PEERS = ["onednn", "fbgemm", "openblas"]


def groups_of(dtypes: Iterable[str], wanted: Sequence[str] | None, threads: Iterable[int]) -> list[Group]:
    """Return every group that the command line asks for; `wanted` None means all that a dtype has."""
    found = []
    for count in threads:
        for dtype in dtypes:
            for tier in TIERS_OF[dtype]:
                if wanted is not None and tier not in wanted:
                    continue
                both = tier in WITHOUT_VNNI and dtype != "f32"
                found += [Group(dtype, tier, weights, count) for weights in (("safe", "full") if both else ("full",))]
    return found


@dataclass
class Peers(AbstractContextManager["Peers"]):
    """The processes of all peers, one for each tier and number of threads, started when first needed."""

    names: Sequence[str]
    running: dict[tuple[str, str, int], Startable] = field(default_factory=dict)
    refused: dict[tuple[str, str, int], str] = field(default_factory=dict)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all processes."""
        for process in self.running.values():
            process.close()
        self.running.clear()

    def prepare(self, name: str, group: Group, item: Item) -> TimedJob:
        """Prepare a row's problem; PeerError where the peer has nothing comparable or cannot be had."""
        key = name, group.tier, group.threads
        if key in self.refused:
            raise PeerError(self.refused[key])
        if key not in self.running:
            try:
                self.running[key] = PEERS[name](group.tier, group.threads)
            except PeerError as error:
                self.refused[key] = str(error)
                raise
        return self.running[key].prepare(item.shape, DTYPES[group.dtype], _OUT[group.dtype], item.post_ops)

    def versions(self) -> dict[str, str]:
        """Return the version of every peer that has run."""
        return {name: process.version for (name, _, _), process in self.running.items()}


@dataclass(frozen=True)
class Ours:
    """Our kernel of a row: `run()` calls it as a compiled network would, without the operator's checks."""

    run: Callable[[], object]
    explanation: Explanation

    @property
    def chains(self) -> dict[str, int]:
        """Multiply steps, with the output columns that each computes."""
        return columns_by_chain(self.explanation.kernels)


def our_kernel(item: Item, group: Group) -> Ours:
    """Build our kernel of a row, with random operands; raises what the public API does."""
    request = Request(
        item.shape, DTYPES[group.dtype], isa=group.tier, threads=group.threads, post_ops=item.post_ops,
        weights=group.weights,
    )  # fmt: skip
    operator, x, out = run_once(request)
    return Ours(_call(operator, x, out, group.threads), operator.explain())


def _call(operator: Any, x: Any, out: Any, threads: int) -> Callable[[], object]:
    """Return a call of the kernel that an operator ran last: peers are called from C++, without Python between."""
    plan = operator._last
    if plan.bound is None or plan.tensors:
        return lambda: operator(x, out)
    call, descriptor = native.lib.vg_call2, plan.bound.descriptor
    pointers = [native.ffi.cast("void *", array.ctypes.data) for array in (x, out)]
    keep = operator, x, out  # what the pointers point to

    def run() -> object:
        return keep and call(descriptor, *pointers, threads)

    return run


def describe(item: Item, group: Group) -> dict[str, Any]:
    """Return what is known of a row before anything runs."""
    shape = item.shape
    useful = shape.ops_without_padding if isinstance(shape, ConvShape) else shape.ops
    touched = bytes_touched(shape, DTYPES[group.dtype], _OUT[group.dtype])
    return {
        "suite": item.suite, "name": item.name, "problem": str(shape), "batch": item.batch, "post_ops": item.post_ops,
        "dtype": group.dtype, "tier": group.tier, "weights": group.weights, "threads": group.threads, "ops": useful,
        "ops_with_padding": shape.ops, "bytes": touched, "intensity": useful / touched,
    }  # fmt: skip


@dataclass(frozen=True)
class Effort:
    """How to measure: samples of each candidate, seconds that one should last, and the clock, `wall` or `cpu`."""

    rounds: int = 11
    min_sample: float = 2e-3
    clock: str = "wall"

    def clock_of(self, group: Group) -> str:
        """The processor's time of one thread says nothing of several."""
        return self.clock if group.threads == 1 else "wall"


def measure_row(item: Item, group: Group, peers: Peers, effort: Effort) -> dict[str, Any]:
    """Time one row: our kernel and its peers, alternately. A row that cannot run says `why_not`."""
    row = describe(item, group)
    try:
        work = our_kernel(item, group)
    except VnnigenError as error:
        return row | {"why_not": str(error)}
    by_cpu = effort.clock_of(group) == "cpu"
    clock = Stopwatch(time.thread_time_ns if by_cpu else time.perf_counter_ns)
    jobs, others = dict[str, tuple[Job, int]](), dict[str, dict[str, Any]]()
    for name in peers.names:
        try:
            job = peers.prepare(name, group, item)
            job.by_cpu = by_cpu
        except PeerError as error:
            others[name] = {"why_not": str(error)}
            continue
        jobs[name] = job, _calls(job, effort.min_sample)
    own_calls = 1
    candidates: dict[str, Callable[[], object]] = {"ours": work.run}
    if group.threads > 1:
        own = InProcess(work.run)
        own_calls = _calls(own, effort.min_sample)
        candidates["ours"] = _turn(clock, own, own_calls, True)
    for name, (job, calls) in jobs.items():
        candidates[name] = _turn(clock, job, calls, group.threads > 1)
    rounds = _affordable(work.run, effort.rounds)
    times = compare(candidates, rounds=rounds, min_sample=effort.min_sample, warm_up=2e-3, clock=clock)
    for name, (job, calls) in jobs.items():
        others[name] = speed(row, times[name], calls) | {"kernel": job.impl}
        others[name]["ratio"] = times.speedup("ours", name) / calls * own_calls
        others[name]["ratio_best"] = others[name]["ms_min"] / (times["ours"].best * 1e3) * own_calls
        job.drop()
    return row | our_figures(row, work, times["ours"], own_calls) | {"peers": others, "load": os.getloadavg()[0]}


@dataclass
class InProcess:
    """Our own kernel as a job, for turns that are taken as peers take them."""

    run: Callable[[], object]
    impl: str = "vnnigen"

    def sample(self, calls: int) -> int:
        """Run it `calls` times and return nanoseconds."""
        start = time.perf_counter_ns()
        for _ in range(calls):
            self.run()
        return time.perf_counter_ns() - start

    def drop(self) -> None:
        """Nothing is to be freed."""


@dataclass
class Awake:
    """A job of several threads, sampled as in a loop of inferences.

    That is, after the others' threads have stopped spinning and its own are awake and spread over the CPUs, which
    takes the system some milliseconds.
    """

    job: Job
    warm_up: float = 10e-3
    settle: float = 20e-3

    @property
    def impl(self) -> str:
        """What the peer calls its kernel."""
        return self.job.impl

    def sample(self, calls: int) -> int:
        """Run it `calls` times and return nanoseconds, not counting the preparation."""
        time.sleep(self.settle)
        end = time.perf_counter() + self.warm_up
        while time.perf_counter() < end:
            self.job.sample(calls)
        return self.job.sample(calls)

    def drop(self) -> None:
        """Free it."""
        self.job.drop()


def _turn(clock: Stopwatch, job: Job, calls: int, threaded: bool) -> Callable[[], None]:
    """Return a candidate that is one turn of a job, its time that which the job measured itself."""
    timed = Awake(job) if threaded else job
    return lambda: clock.elsewhere(timed, calls, settle=False)


def _calls(job: Job, min_sample: float) -> int:
    """Calls of a peer that make a sample."""
    first = job.sample(1)
    if first > 2e9 * min_sample:
        return 1
    return max(1, math.ceil(min_sample * 1e9 / max(job.sample(3) // 3, 1)))


def _affordable(run: Callable[[], object], rounds: int) -> int:
    """Rounds that fit the budget, by the time of one call."""
    start = time.perf_counter_ns()
    run()
    return max(3, min(rounds, int(_BUDGET * 1e9 / max(time.perf_counter_ns() - start, 1))))


def speed(row: Mapping[str, Any], samples: Samples, calls: int) -> dict[str, Any]:
    """Return times and speeds; a turn of a peer's candidate is `calls` calls."""
    median = samples.median / calls
    return {
        "ms_median": median * 1e3, "ms_min": samples.best / calls * 1e3, "gops": row["ops"] / median * 1e-9,
        "gops_with_padding": row["ops_with_padding"] / median * 1e-9,
    }  # fmt: skip


def our_figures(row: Mapping[str, Any], work: Ours, samples: Samples, calls: int) -> dict[str, Any]:
    """Return our kernel's figures, and which bound the row has."""
    figures, explanation = speed(row, samples, calls), work.explanation
    peak = peak_for(explanation.tier, work.chains, row["threads"])
    bandwidth = read_bandwidth(row["bytes"], row["threads"])
    memory = is_memory_bound(row["intensity"], peak, bandwidth)
    figures["pct_peak"] = None if peak is None else 100 * figures["gops"] / peak
    figures["pct_peak_with_padding"] = None if peak is None else 100 * figures["gops_with_padding"] / peak
    figures["pct_bandwidth"] = 100 * row["bytes"] / figures["ms_median"] * 1e-6 / bandwidth
    figures |= {"kernel": explanation.kernel, "chains": work.chains, "tuning": explanation.tuning}
    figures["blocking"] = [" ".join(f"{k}={v}" for k, v in b.items()) for b in explanation.blocking]
    return {"bound": "memory" if memory else "compute", "bandwidth_gbs": bandwidth, "ours": figures}


def ceilings(threads: int) -> dict[str, Any]:
    """Measure the peaks of all multiply steps and the bandwidth of each level of memory."""
    peaks = {p.name: p.gops for p in measure_peaks(threads).values() if p.gops is not None}
    return {"peaks_gops": peaks, "bandwidths_gbs": {n: read_bandwidth(s, threads) for n, s in LEVELS.items()}}


def measure_all(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything and print it; the JSON file, if any, is written after each group, since a run is long."""
    items = items_of(arguments.shapes, arguments.batch)
    effort = Effort(arguments.rounds, clock=arguments.clock)
    if arguments.quick:
        items, effort = quick(items), Effort(min(arguments.rounds, 5), 1e-3, arguments.clock)
    result = {"schema": SCHEMA} | context() | {"tune": os.environ.get("VNNIGEN_TUNE"), "clock": effort.clock}
    result |= {"ceilings": {str(n): ceilings(n) for n in arguments.threads}}
    result |= {"peers": {}, "skipped": {}, "summary": [], "rows": []}
    for group in groups_of(arguments.dtypes, arguments.tiers, arguments.threads):
        if (reason := tiers.why_not(group.tier) or too_busy(group, arguments.wait)) is not None:
            console.print(f"{group}: {reason}")
            result["skipped"][str(group)] = reason
            continue
        rows = []
        with Peers(arguments.peers) as peers:
            for item in items:
                rows.append(measure_row(item, group, peers, effort))
            result["peers"] |= peers.versions()
        result["rows"] += rows
        result["summary"] += filter(None, (summarize(rows, group, peer) for peer in arguments.peers))
        console.print(rows_table(group, rows, arguments.peers))
        if arguments.json:
            write_result(arguments.json, result)
    console.print(summary_table(result["summary"]))
    if arguments.json:
        write_result(arguments.json, result)
    return result


def others_cpus(seconds: float = 0.5) -> float:
    """Return how many CPUs are busy while this process sleeps; 0 where the system does not say."""
    before = _cpu_times()
    time.sleep(seconds)
    idle, everything = (b - a for a, b in zip(before, _cpu_times(), strict=True))
    return (1 - idle / everything) * (os.cpu_count() or 1) if everything else 0.0


def _cpu_times() -> tuple[int, int]:
    """Idle and all ticks of all CPUs (proc(5), /proc/stat: user nice system idle iowait irq softirq steal)."""
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return 0, 0
    ticks = [int(word) for word in first.split()[1:9]]
    return ticks[3] + ticks[4], sum(ticks)


def too_busy(group: Group, wait: float, others: Callable[[], float] = others_cpus) -> str | None:
    """Return why a group cannot be measured now; a wait of so many seconds is made for CPUs to become free.

    With fewer free CPUs than threads, what is measured is how libraries wait for a thread that does not run:
    ratios of a hundred and more, in either direction.
    """
    if group.threads == 1:
        return None
    end = time.monotonic() + wait
    while (used := others()) > _FREE:
        if time.monotonic() >= end:
            return f"other processes use {used:.1f} CPUs, so {group.threads} threads cannot be compared"
    return None


def _choice(names: Iterable[str], everything: Iterable[str] = ()) -> Callable[[str], list[str]]:
    """Return an argparse type: names, comma-separated, or `all`."""
    known, all_of_them = list(names), list(everything) or list(names)

    def parse(text: str) -> list[str]:
        words = text.split(",")
        if words == ["all"]:
            return all_of_them
        if wrong := [word for word in words if word not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {', '.join(known)}, or all")
        return words

    return parse


def _threads(text: str) -> list[int]:
    """Read numbers of threads; `all` is what kernels use by default. Each number once."""
    return list(dict.fromkeys(default_num_threads() if word == "all" else int(word) for word in text.split(",")))


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    p = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=(__doc__ or "").split("\n")[0])
    known = dict.fromkeys(itertools.chain.from_iterable(TIERS_OF.values()))
    usual = [dtype for dtype in DTYPES if dtype != "s8s8"]
    p.add_argument("--tiers", type=_choice(known), help="comma-separated; default: all that a dtype has")
    p.add_argument("--dtypes", type=_choice(DTYPES, usual), default=usual, help=f"of {', '.join(DTYPES)}; all: no s8s8")
    p.add_argument("--shapes", type=_choice(SUITES), default=list(SUITES), help=f"of {', '.join(SUITES)}")
    p.add_argument("--batch", type=_numbers, default=[1], help="images of a convolution, comma-separated")
    p.add_argument("--threads", type=_threads, default=[1], help="numbers or `all`, comma-separated")
    p.add_argument("--peers", type=_choice(PEERS, USUAL_PEERS), default=USUAL_PEERS, help=f"of {', '.join(PEERS)}")
    help_clock = "cpu: the processor's time instead of the clock's, for one thread on a busy machine"
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help=help_clock)
    p.add_argument("--rounds", type=int, default=11, help="samples of each candidate")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    p.add_argument("--chart", type=Path, metavar="DIR", help="draw rooflines into DIR (needs matplotlib)")
    help_wait = "seconds to wait for free CPUs before several threads are measured (default 60)"
    p.add_argument("--wait", type=float, default=60, help=help_wait)
    p.add_argument("--quick", action="store_true", help="a sample of the shapes, few and short rounds")
    return p


def main() -> None:
    arguments = parser().parse_args()
    console = Console(width=None if sys.stdout.isatty() else 140)
    warn_if_busy(console)
    result = measure_all(arguments, console)
    if arguments.chart:
        for name, chart in charts(result):
            console.print(*draw(chart, arguments.chart / name))


if __name__ == "__main__":
    main()
