"""What `benchmarks.kernels` makes of its rows: means and targets, tables, the JSON file, and charts to draw."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.roofline import Chart
from vnnigen.isa import tiers
from vnnigen.runtime.peak import LOOPS, peak_for

#: Version of the JSON file; raised when a reader of the old one would misunderstand the new one.
SCHEMA = "vnnigen-kernels/1"
#: Tiers whose int8 weights are measured both chain-safe and full-range.
WITHOUT_VNNI = ("avx2", "avx512")
#: Ratio to oneDNN that the geometric mean over compute-bound rows is meant to reach, by (dtype, tier, weights).
TARGETS = {
    ("int8", "amx_int8", "full"): 1.2,
    ("int8", "avx512_vnni", "full"): 1.1,
    ("int8", "avx_vnni", "full"): 1.1,
    ("int8", "avx512", "safe"): 1.0,
    ("int8", "avx512", "full"): 0.72,
    ("bf16", "amx_bf16", "full"): 1.2,
    ("bf16", "avx512_bf16", "full"): 1.6,
    ("f32", "avx512", "full"): 1.05,
    ("f32", "avx2", "full"): 1.05,
}
#: No compute-bound row is meant to fall below this; full-range chains are exempt, having a goal of their own.
FLOOR = 0.9


@dataclass(frozen=True)
class Group:
    """Rows that belong together, and share a mean: a dtype on a tier, kind of weights and number of threads."""

    dtype: str
    tier: str
    weights: str
    threads: int

    def __str__(self) -> str:
        kind = f", {self.weights} weights" if self.tier in WITHOUT_VNNI and self.dtype != "f32" else ""
        return f"{self.dtype} on {self.tier}{kind}, {self.threads} thread{'s' * (self.threads > 1)}"


def geometric_mean(values: Iterable[float]) -> float | None:
    """Return the geometric mean, None of nothing."""
    values = list(values)
    return math.exp(statistics.fmean(map(math.log, values))) if values else None


def ratios(rows: Iterable[Mapping[str, Any]], peer: str, bound: str, of: str = "ratio") -> list[float]:
    """Return the ratios to a peer of the rows with one bound; `of` "ratio_best" compares the shortest times."""
    return [r["peers"][peer][of] for r in rows if r.get("bound") == bound and of in r["peers"].get(peer, {})]


def target_of(group: Group) -> float | None:
    """Return the mean ratio to oneDNN that a group is meant to reach, if any.

    That of bf16 is for cores on which VDPBF16PS is slower than FMA, where oneDNN uses it all the same.
    """
    if (group.dtype, group.tier) == ("bf16", "avx512_bf16"):
        dot, fma = peak_for("avx512_bf16", {"bf16": 1.0}), peak_for("avx512", {"fma": 1.0})
        if dot is not None and fma is not None and dot > fma:
            return None
    return TARGETS.get((group.dtype, group.tier, group.weights))


def summarize(rows: Sequence[Mapping[str, Any]], group: Group, peer: str) -> dict[str, Any] | None:
    """Return the means of a group's ratios to a peer, None where there is no ratio."""
    compute, memory = ratios(rows, peer, "compute"), ratios(rows, peer, "memory")
    if not compute and not memory:
        return None
    mean, best = geometric_mean(compute), ratios(rows, peer, "compute", "ratio_best")
    target = target_of(group) if peer == "onednn" else None
    bandwidth = [r["ours"]["pct_bandwidth"] for r in rows if r.get("bound") == "memory"]
    return {
        "dtype": group.dtype, "tier": group.tier, "weights": group.weights, "threads": group.threads, "peer": peer,
        "compute_rows": len(compute), "geomean": mean, "geomean_best": geometric_mean(best),
        "least": min(compute, default=None),
        "below_floor": sum(r < FLOOR for r in compute), "target": target,
        "met": None if target is None or mean is None else mean >= target,
        "memory_rows": len(memory), "memory_geomean": geometric_mean(memory),
        "memory_least": min(memory, default=None), "pct_bandwidth_geomean": geometric_mean(bandwidth),
    }  # fmt: skip


def rows_table(group: Group, rows: Sequence[Mapping[str, Any]], peers: Sequence[str]) -> Table:
    """Lay a group's rows out for people."""
    table = Table(title=str(group), title_justify="left")
    table.add_column("shape", no_wrap=True)
    table.add_column("step")
    for name in ("ms", "GOP/s", "% peak", "% bandw.", *(f"{p}, ratio" for p in peers)):
        table.add_column(name, justify="right")
    for row in rows:
        if "why_not" in row:
            table.add_row(row["name"], row["why_not"])
            continue
        ours, memory = row["ours"], row["bound"] == "memory"
        cells = [f"{ours['ms_median']:.4f}", f"{ours['gops']:.0f}", _cell(None if memory else ours["pct_peak"], ".0f")]
        cells.append(_cell(ours["pct_bandwidth"] if memory else None, ".0f"))
        for peer in peers:
            found = row["peers"].get(peer, {})
            cells.append(f"{found['gops']:.0f}  {found['ratio']:.2f}" if "ratio" in found else "-")
        table.add_row(row["name"], "+".join(ours["chains"]), *cells)
    return table


def summary_table(summaries: Sequence[Mapping[str, Any]]) -> Table:
    """Lay the means out for people."""
    title = "Geometric means of the ratios: above 1 we are faster"
    table = Table(title=title, title_justify="left")
    for name in ("group", "peer"):
        table.add_column(name, no_wrap=True)
    numbers = ["rows", "mean", "of best", "target", "least", f"below {FLOOR}"]
    for name in [*numbers, "memory rows", "mean", "least", "% bandw."]:
        table.add_column(name, justify="right")
    for s in summaries:
        head = [str(Group(s["dtype"], s["tier"], s["weights"], s["threads"])), s["peer"]]
        cells = [str(s["compute_rows"]), *(_cell(s[k], ".2f") for k in ("geomean", "geomean_best", "target", "least"))]
        cells += [str(s["below_floor"]), str(s["memory_rows"])]
        cells += [_cell(s["memory_geomean"], ".2f"), _cell(s["memory_least"], ".2f")]
        table.add_row(*head, *cells, _cell(s["pct_bandwidth_geomean"], ".0f"))
    return table


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else format(value, form)


def charts(result: Mapping[str, Any]) -> Iterator[tuple[str, Chart]]:
    """Return a name and a chart for each dtype and number of threads in a result file."""
    kinds = dict.fromkeys((r["dtype"], r["threads"]) for r in result["rows"] if "ours" in r)
    for dtype, threads in kinds:
        rows = [r for r in result["rows"] if (r["dtype"], r["threads"]) == (dtype, threads) and "ours" in r]
        ceilings = result["ceilings"][str(threads)]
        steps = _steps(rows)
        peaks = {name: gops for name, gops in ceilings["peaks_gops"].items() if name in steps}
        title = f"{dtype} kernels on {result['machine']['name']}, {threads} thread{'s' * (threads > 1)}"
        yield f"roofline-{dtype}-{threads}", Chart(title, rows, peaks, ceilings["bandwidths_gbs"])


def _steps(rows: Iterable[Mapping[str, Any]]) -> set[str]:
    """Names of the peaks that the multiply steps of rows have."""
    wanted = {(chain, tiers.tier(r["tier"]).vector_bits) for r in rows for chain in r["ours"]["chains"]}
    return {loop.name for loop in LOOPS if (loop.step, loop.bits) in wanted}


def write_result(path: Path, result: Mapping[str, Any]) -> None:
    """Write a result file with one row a line, figures rounded to what is measured of them."""
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in result.items() if key != "rows"]
    rows = ",\n".join("  " + json.dumps(_rounded(row)) for row in result["rows"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join([*lines, f' "rows": [\n{rows}\n ]']) + "\n}\n")


def _rounded(value: Any) -> Any:
    """Return a value with all floats to five digits."""
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value
