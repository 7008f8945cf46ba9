"""The command `probe`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vnnigen.bench.machine import describe_machine
from vnnigen.cli.app import print_json
from vnnigen.cli.options import Json, Threads
from vnnigen.runtime.peak import Peak, measure_peaks


def probe(
    as_json: Json = False,
    peak: Annotated[bool, typer.Option("--peak", help="Measure the multiply instructions (about a second).")] = False,
    threads: Threads = 1,
) -> None:
    """Show the processor, its features, the usable tiers, caches, and measured peaks."""
    machine = describe_machine()
    peaks = measure_peaks(threads) if peak else None
    if as_json:
        if peaks is not None:
            machine["peak_threads"] = threads
            machine["peaks"] = {p.name: {"gops": p.gops, "why_not": p.why_not} for p in peaks.values()}
        print_json(machine)
        return
    console = Console()
    console.print(_machine_table(machine))
    console.print(_tier_table(machine["tiers"]))
    if peaks is not None:
        console.print(_peak_table(list(peaks.values()), threads))


def _machine_table(machine: dict[str, Any]) -> Table:
    table = Table(title=machine["name"], title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("features", " ".join(machine["features"]))
    caches = (f"L{c['level']} {c['kind']} {c['size'] >> 10} KiB, shared by {c['shared_by']}" for c in machine["caches"])
    table.add_row("caches", "\n".join(caches) or "unknown")
    table.add_row("CPUs", f"{machine['cpus']}, kernels use {machine['threads']} by default")
    if machine["max_isa"]:
        table.add_row("capped to", machine["max_isa"])
    return table


def _tier_table(tiers: list[dict[str, Any]]) -> Table:
    table = Table(title="Tiers, best first", title_justify="left")
    table.add_column("tier")
    table.add_column("usable")
    for tier in tiers:
        table.add_row(tier["name"], "yes" if tier["usable"] else f"no: {tier['why_not']}")
    return table


def _peak_table(peaks: Sequence[Peak], threads: int) -> Table:
    table = Table(title=f"Measured peak, {threads} thread(s)", title_justify="left")
    table.add_column("instructions")
    table.add_column("GOP/s", justify="right")
    table.add_column("vs f32 FMA", justify="right")
    base = max((p.gops for p in peaks if p.gops and p.name.startswith("vfmadd231ps")), default=None)
    for p in peaks:
        if p.gops is None:
            table.add_row(p.name, f"[dim]{p.why_not}[/dim]", "")
        else:
            table.add_row(p.name, f"{p.gops:.0f}", f"{p.gops / base:.2f}" if base else "")
    return table
