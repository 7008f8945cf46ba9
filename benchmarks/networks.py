"""Whole networks against OpenVINO and ONNX Runtime, alternately in one run, each engine in a process of its own.

    python -m benchmarks.networks [--models resnet50,...|all] [--batch 1,throughput] [--threads 1,2] [--isa TIER]
        [--engines vnnigen,openvino,onnxruntime] [--parts speed,agreement,headline,start] [--clock cpu] [--quick]
        [--json benchmarks/results/networks.json]

`speed` times all engines and precisions on the same inputs; a ratio is the median over rounds of the other's time by
ours, above 1 where we are faster. `agreement` compares every engine's answers with ONNX Runtime's in f32. `headline`
sets our int8 over our f32 beside the ratios that Intel published for int8 with VNNI over f32, tier by tier. `start` is
the time from the model's file to the first result, without and with what is cached on disk, and the peak memory.

With --isa, this library and OpenVINO are kept to a tier; ONNX Runtime cannot be. On a busy machine `--clock cpu`
counts the processor's time of the whole process instead of the clock's, for one thread; processes are bound to the
same CPUs in any case. What the peers need is said in benchmarks/peers/networks.py.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from benchmarks import network_report as report
from benchmarks.common import Job, context, warn_if_busy, write_json
from benchmarks.kernel_report import Group
from benchmarks.kernels import Awake, too_busy
from benchmarks.models import MODELS
from benchmarks.models.net import Array
from benchmarks.network_report import PUBLISHED, Key
from benchmarks.peers.networks import OURS, PRECISIONS, NetworkProcess, Place, Store, run_worker
from benchmarks.peers.onednn import CAPS
from benchmarks.peers.process import PeerError, PeerJob
from vnnigen.bench.timing import Comparison, Samples
from vnnigen.isa import tiers
from vnnigen.runtime.peak import LOOPS, measure_peaks

SCHEMA = 1
PARTS = ("speed", "agreement", "headline", "start")
QUICK_MODELS = ("resnet50", "squeezenet", "mobilenet_v2")
#: The cap of each column of the headline table.
HEADLINE_TIERS = {"AVX512-VNNI": "avx512_vnni", "AMX": "amx_bf16"}
#: Multiply steps that a precision may run on.
_STEPS = {"int8": ("amx", "vnni", "fast"), "bf16": ("amx", "bf16"), "f32": ("fma",)}
_REFERENCE: Key = ("onnxruntime", "f32")


@dataclass(frozen=True)
class Effort:
    """How to measure: the most rounds, seconds of a sample and of a whole row, samples to compare, and the clock."""

    rounds: int = 21
    min_sample: float = 20e-3
    budget: float = 30.0
    compared: int = 64
    starts: int = 5
    clock: str = "wall"

    def by_cpu(self, threads: int) -> bool:
        """Threads that wait for others take processor time too, so it says nothing of several."""
        return self.clock == "cpu" and threads == 1


@dataclass
class Bench(ExitStack):
    """Everything that is running: the processes by engine and place, and why others are not."""

    store: Store
    engines: Sequence[str]
    processes: dict[tuple[str, Place], NetworkProcess] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def process(self, engine: str, place: Place) -> NetworkProcess:
        """Return a running process, started when first needed."""
        key = engine, place
        if key not in self.processes:
            self.processes[key] = self.enter_context(NetworkProcess(engine, place))
        return self.processes[key]

    def load(self, name: str, place: Place, batch: int, keys: Iterable[Key]) -> dict[Key, PeerJob]:
        """Load a network everywhere; who cannot is left out and remembered in `refused`."""
        jobs = {}
        for engine, precision in keys:
            try:
                process = self.process(engine, place)
                model = self.store.prepared(name, engine, precision, place, process.version)
                jobs[engine, precision] = process.load(model, precision, self.store.inputs(name, batch, 1))
            except PeerError as error:
                self.refused[f"{name} {engine} {precision} {place.tier or ''}".strip()] = str(error)
        return jobs


def interleave(jobs: Mapping[Key, PeerJob], effort: Effort, threads: int) -> dict[Key, Samples]:
    """Time all jobs alternately; seconds of a call, a sample for each round."""
    turns, calls = {}, {}
    for key, prepared in jobs.items():
        prepared.by_cpu = effort.by_cpu(threads)
        prepared.sample(1)
        one = min(prepared.sample(1) for _ in range(2))
        calls[key] = max(1, round(effort.min_sample * 1e9 / max(one, 1)))
        turns[key] = one * calls[key] * 1e-9
    rounds = max(3, min(effort.rounds, int(effort.budget / sum(turns.values())))) if jobs else 0
    seconds: dict[Key, list[float]] = {key: [] for key in jobs}
    order = list(jobs)
    for _ in range(rounds):
        for key in order:
            job: Job = Awake(jobs[key]) if threads > 1 else jobs[key]
            seconds[key].append(max(job.sample(calls[key]), 1) / calls[key] * 1e-9)
        order.reverse()
    return {key: Samples(tuple(seconds[key]), calls[key]) for key in jobs}


def keys_of(engines: Iterable[str], precisions: Iterable[str]) -> list[Key]:
    """Return every engine with every precision that it has."""
    return [(engine, p) for engine in engines for p in precisions if p in PRECISIONS[engine]]


def measure_row(
    bench: Bench, name: str, batch: int, place: Place, keys: Sequence[Key], effort: Effort
) -> dict[str, Any]:
    """Time a network on all engines that can run it."""
    jobs = bench.load(name, place, batch, keys)
    samples = interleave(jobs, effort, place.threads)
    for job in jobs.values():
        job.drop()
    ops = bench.store.operations(name) * batch
    tier = place.tier or tiers.tiers()[0]
    row: dict[str, Any] = {
        "model": name, "batch": batch, "threads": place.threads, "isa": place.tier, "ops": ops,
        "clock": "cpu" if effort.by_cpu(place.threads) else "wall", "load": os.getloadavg()[0], "figures": {},
    }  # fmt: skip
    times = Comparison({report.label(key): found for key, found in samples.items()})
    for key, found in samples.items():
        figures: dict[str, float | None] = {"ms_median": found.median * 1e3, "ms_min": found.best * 1e3}
        gops = figures["gops"] = ops / found.median * 1e-9
        peak = peak_of(key[1], tier, place.threads)
        figures["pct_peak"] = None if peak is None else 100 * gops / peak
        mine = OURS, key[1]
        figures["ratio"] = times.speedup(report.label(mine), report.label(key)) if mine in samples else None
        row["figures"][report.label(key)] = figures
    low, high = (report.label((OURS, p)) for p in ("int8", "f32"))
    row["int8_over_f32"] = times.speedup(low, high) if {low, high} <= set(row["figures"]) else None
    return row


def peak_of(precision: str, tier: str, threads: int) -> float | None:
    """Return the GOP/s of the fastest multiply step that a precision has under a cap; None if there is none."""
    features = {t.name: t.features for t in tiers.TIERS}
    peaks = measure_peaks(threads)
    fit = [x for x in LOOPS if x.step in _STEPS[precision] and features[x.tier] <= features[tier]]
    fit = [x for x in fit if ("bf16" in x.label) == (precision == "bf16")]
    return max((gops for x in fit if (gops := peaks[x.name].gops) is not None), default=None)


def measure_headline(bench: Bench, names: Sequence[str], place: Place, effort: Effort) -> list[dict[str, Any]]:
    """Our int8 over our f32 of the published networks, on each tier of the table that this machine has."""
    rows = []
    keys = keys_of([OURS], ["int8", "f32"])
    for name in track([name for name in PUBLISHED if name in names], "headline", transient=True):
        ratios: dict[str, float | None] = {}
        for title, tier in HEADLINE_TIERS.items():
            if tiers.why_not(tier) is not None:
                ratios[title] = None
                continue
            at = Place(place.threads, place.cpus, tier)
            row = measure_row(bench, name, MODELS[name].throughput_batch, at, keys, effort)
            ratios[title] = row["int8_over_f32"]
        rows.append({"model": name, "published": PUBLISHED[name], "ours": ratios})
    return rows


def measure_agreement(
    bench: Bench, name: str, place: Place, keys: Sequence[Key], effort: Effort
) -> list[dict[str, Any]]:
    """Compare the answers of all engines with the reference's."""
    inputs, to = bench.store.inputs(name, effort.compared, 1), bench.store.own / "answers.npz"
    answers = {}
    jobs = bench.load(name, place, 1, dict.fromkeys([_REFERENCE, *keys]))
    for key, job in jobs.items():
        try:
            answers[key] = bench.process(key[0], place).answers(job, inputs, to)
        except PeerError as error:
            bench.refused[f"{name} {report.label(key)} answers"] = str(error)
        job.drop()
    if _REFERENCE not in answers:
        return []
    want = answers[_REFERENCE]
    return [
        {"model": name, "engine": key[0], "precision": key[1]} | agreement(want, got)
        for key, got in answers.items()
        if key != _REFERENCE
    ]


def agreement(want: Mapping[str, Array], got: Mapping[str, Array]) -> dict[str, float | None]:
    """Cosine, SQNR, SQNR of what differs between inputs, and share of equal best classes; the worst output counts.

    The third matters for seeded networks, which say much the same to all inputs.
    """
    found = [_compare(want[name].astype(np.float64), got[name].astype(np.float64)) for name in want]
    worst: dict[str, float | None] = {k: min(f[k] for f in found) for k in ("cosine", "sqnr_db", "sqnr_between_db")}
    classes = [y for y in want.values() if y.ndim == 2 and y.shape[1] > 1]
    if not classes:
        return worst | {"top1": None}
    same = [np.mean(y.argmax(1) == got[name].argmax(1)) for name, y in want.items() if y.ndim == 2]
    return worst | {"top1": float(min(same))}


def _compare(want: Array, got: Array) -> dict[str, float]:
    noise = float(np.square(want - got).sum())
    norms = float(np.linalg.norm(want) * np.linalg.norm(got))
    between = float(np.square(want - want.mean(axis=0)).sum())

    def decibels(signal: float) -> float:
        return 10 * float(np.log10(max(signal, 1e-30) / max(noise, 1e-30)))

    return {
        "cosine": float((want * got).sum()) / max(norms, 1e-30),
        "sqnr_db": decibels(float(np.square(want).sum())),
        "sqnr_between_db": decibels(between),
    }


def measure_start(bench: Bench, name: str, place: Place, keys: Sequence[Key], effort: Effort) -> list[dict[str, Any]]:
    """Time from the file to the first result, in fresh processes, and their peak memory."""
    rows = []
    for engine, precision in track(keys, f"start of {name}", transient=True):
        try:
            version = bench.process(engine, place).version
            model = bench.store.prepared(name, engine, precision, place, version)
            words = ("first", str(model), precision, str(bench.store.inputs(name, 1, 1)))
            cold = [_first(engine, place, words, None) for _ in range(effort.starts)]
            warm = []
            if engine != "onnxruntime":  # it caches nothing
                with tempfile.TemporaryDirectory() as folder:
                    warm = [_first(engine, place, words, folder) for _ in range(effort.starts + 1)][1:]
        except PeerError as error:
            bench.refused[f"start {name} {engine} {precision}"] = str(error)
            continue
        rows.append(
            {
                "model": name,
                "engine": engine,
                "precision": precision,
                "import_s": statistics.median(run[0] for run in cold),
                "cold_s": statistics.median(run[1] for run in cold),
                "cached_s": statistics.median(run[1] for run in warm) if warm else None,
                "peak_bytes": max(run[2] for run in cold),
            }
        )
    return rows


def _first(engine: str, place: Place, words: Sequence[str], cache: str | None) -> tuple[float, float, int]:
    """One start: seconds to import, seconds to the first result, bytes. Without `cache`, ours is an empty one."""
    with tempfile.TemporaryDirectory() as empty:
        own = {"VNNIGEN_CACHE_DIR": cache or empty}
        out = run_worker(engine, place, *words, *([cache] if cache else []), environment=own)
    _, imported, seconds, size = out.splitlines()[-1].split()
    return float(imported), float(seconds), int(size)


def bound_to(threads: int) -> tuple[int, ...]:
    """Return the CPUs that processes of so many threads share: the last ones, since systems prefer the first."""
    return tuple(sorted(os.sched_getaffinity(0))[-threads:])


def measure_all(arguments: argparse.Namespace, effort: Effort, bench: Bench, console: Console) -> dict[str, Any]:
    """Run the parts asked for and print each when it is there; the JSON file is written after each, runs are long."""
    result: dict[str, Any] = (
        {"schema": SCHEMA} | context() | {"speed": [], "agreement": [], "headline": [], "start": []}
    )
    keys = keys_of(arguments.engines, arguments.precisions)

    def note() -> None:
        result["versions"] = sorted({process.version for process in bench.processes.values()})
        result["refused"] = bench.refused
        if arguments.json:
            write_json(arguments.json, result)

    if "speed" in arguments.parts:
        for threads in arguments.threads:
            place = Place(threads, bound_to(threads), arguments.isa)
            if (reason := too_busy(Group("int8", arguments.isa or "", "full", threads), arguments.wait)) is not None:
                bench.refused[f"{threads} threads"] = reason
                continue
            for kind in arguments.batch:
                rows = []
                for name in track(arguments.models, f"{threads} thread(s), batch {kind}", transient=True):
                    batch = MODELS[name].throughput_batch if kind == "throughput" else int(kind)
                    rows.append(measure_row(bench, name, batch, place, keys, effort))
                result["speed"] += rows
                note()
                console.print(report.speed_table(rows))
    place = Place(1, bound_to(1), arguments.isa)
    if "agreement" in arguments.parts:
        for name in track(arguments.models, "agreement", transient=True):
            result["agreement"] += measure_agreement(bench, name, place, keys, effort)
        note()
        console.print(report.agreement_table(result["agreement"]))
    if "headline" in arguments.parts:
        result["headline"] = measure_headline(bench, arguments.models, place, effort)
        note()
        console.print(report.headline_table(result["headline"], list(HEADLINE_TIERS)))
    if "start" in arguments.parts:
        for name in [name for name in ("resnet50",) if name in arguments.models]:
            result["start"] += measure_start(bench, name, place, keys, effort)
        note()
        console.print(report.start_table(result["start"]))
    console.print(report.targets_table(result))
    for what, why in bench.refused.items():
        console.print(f"[yellow]{what}[/yellow]: {why}", highlight=False)
    return result


def _numbers(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""

    def among(known: Iterable[str]) -> Any:
        names = list(known)

        def parse(text: str) -> list[str]:
            words = names if text == "all" else text.split(",")
            if wrong := [word for word in words if word not in names]:
                raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: not one of {', '.join(names)}, or all")
            return words

        return parse

    def batches(text: str) -> list[str]:
        words = text.split(",")
        if wrong := [word for word in words if word != "throughput" and not (word.isdigit() and int(word))]:
            raise argparse.ArgumentTypeError(f"{', '.join(wrong)}: neither a number nor `throughput`")
        return words

    p = argparse.ArgumentParser(prog="python -m benchmarks.networks", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--models", type=among(MODELS), help=f"of {', '.join(MODELS)}; default all")
    p.add_argument("--engines", type=among(PRECISIONS), default=list(PRECISIONS), help=f"of {', '.join(PRECISIONS)}")
    p.add_argument("--precisions", type=among(_STEPS), default=list(_STEPS), help=f"of {', '.join(_STEPS)}")
    p.add_argument("--parts", type=among(PARTS), default=list(PARTS), help=f"of {', '.join(PARTS)}")
    p.add_argument("--batch", type=batches, default=["1", "throughput"], help="numbers; throughput: 16, or the model's")
    p.add_argument("--threads", type=_numbers, default=[1, 2], help="comma-separated, default 1,2")
    p.add_argument("--isa", choices=list(CAPS), help="keep us and OpenVINO to a tier")
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: processor time, for one thread")
    p.add_argument("--rounds", type=int, default=Effort.rounds, help="the most samples of each candidate")
    p.add_argument("--budget", type=float, default=Effort.budget, help="seconds that a row may take, about")
    p.add_argument("--wait", type=float, default=60, help="seconds to wait for free CPUs before several threads")
    p.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    p.add_argument("--quick", action="store_true", help="three networks, batch 1, one thread, few rounds")
    return p


def main() -> None:
    arguments = parser().parse_args()
    effort = Effort(arguments.rounds, budget=arguments.budget, clock=arguments.clock)
    if arguments.quick:
        arguments.models = arguments.models or list(QUICK_MODELS)
        arguments.batch, arguments.threads = ["1"], [1]
        effort = Effort(min(arguments.rounds, 9), 5e-3, 5.0, 16, 1, arguments.clock)
    arguments.models = arguments.models or list(MODELS)
    console = Console(width=None if sys.stdout.isatty() else 160)
    warn_if_busy(console)
    with tempfile.TemporaryDirectory() as folder, Bench(Store(Path(folder)), arguments.engines) as bench:
        measure_all(arguments, effort, bench, console)


if __name__ == "__main__":
    main()
