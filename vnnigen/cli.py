"""The `vnnigen` command: `probe`, `bench`, `explain`, `demo`.

With `--json`, standard output holds JSON and nothing else. What vnnigen refuses (any VnnigenError) is one
line on standard error and exit status 2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vnnigen.bench.machine import describe_machine
from vnnigen.bench.problem_string import ConvShape, GemmShape, parse_conv, parse_gemm
from vnnigen.bench.report import measure
from vnnigen.bench.workload import Request, build_workload
from vnnigen.errors import VnnigenError
from vnnigen.runtime.peak import Peak, measure_peaks

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Low-precision kernels for x86 CPUs: what this machine can do, how fast, and why.",
)
bench_app = typer.Typer(
    no_args_is_help=True, help="Time a kernel against the measured peak, and against f32."
)
explain_app = typer.Typer(no_args_is_help=True, help="Show which kernel a problem gets, and why.")
app.add_typer(bench_app, name="bench")
app.add_typer(explain_app, name="explain")

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Dtype = Annotated[str, typer.Option(help="Source and weights: u8s8, s8s8, bf16 or f32.")]
OutDtype = Annotated[
    str | None, typer.Option(help="Output: u8, s8, s32, bf16 or f32.", show_default="u8; bf16 for bf16, f32 for f32")
]
Isa = Annotated[
    str | None, typer.Option(help="Tier, as `vnnigen probe` names them.", show_default="the best")
]
Threads = Annotated[int, typer.Option(min=1, help="Threads to run on.")]
PostOps = Annotated[
    str, typer.Option(help="Such as relu,clip:0:6,leaky:0.1,sum:0.5,linear:2:1 in any order.")
]
Weights = Annotated[
    str, typer.Option(help="Random weights: full range, or safe for the fast chain without VNNI.")
]
Vs = Annotated[str | None, typer.Option(help="f32: time our f32 kernel alternately in the same run.")]
Rounds = Annotated[int, typer.Option(min=1, help="Samples of each kernel; the median is quoted.")]
Listing = Annotated[bool, typer.Option("--listing", help="Add the annotated assembly.")]
M = Annotated[int | None, typer.Option("-m", min=1, help="Rows of the source.")]
N = Annotated[int | None, typer.Option("-n", min=1, help="Columns of the weights.")]
K = Annotated[int | None, typer.Option("-k", min=1, help="Columns of the source, rows of the weights.")]
GemmString = Annotated[
    str | None, typer.Option("--shape", help="Instead of -m -n -k: MxK:KxN, as in benchdnn.")
]
ConvString = Annotated[
    str, typer.Option("--shape", help="benchdnn problem, such as mb1ic64ih56oc64oh56kh3ph1.")
]


@app.command()
def probe(
    as_json: Json = False,
    peak: Annotated[
        bool, typer.Option("--peak", help="Measure the multiply instructions (about a second).")
    ] = False,
    threads: Threads = 1,
) -> None:
    """Show the processor, its features, the usable tiers, caches, and measured peaks."""
    machine = describe_machine()
    peaks = measure_peaks(threads) if peak else None
    if as_json:
        if peaks is not None:
            machine["peak_threads"] = threads
            machine["peaks"] = {p.name: {"gops": p.gops, "why_not": p.why_not} for p in peaks.values()}
        _print_json(machine)
        return
    console = Console()
    console.print(_machine_table(machine))
    console.print(_tier_table(machine["tiers"]))
    if peaks is not None:
        console.print(_peak_table(list(peaks.values()), threads))


@bench_app.command("gemm")
def bench_gemm(
    m: M = None,
    n: N = None,
    k: K = None,
    shape: GemmString = None,
    dtype: Dtype = "u8s8",
    out_dtype: OutDtype = None,
    isa: Isa = None,
    threads: Threads = 1,
    vs: Vs = None,
    post_ops: PostOps = "",
    weights: Weights = "full",
    rounds: Rounds = 11,
    as_json: Json = False,
) -> None:
    """Time a matrix multiplication of [m, k] by [k, n]."""
    request = Request(_gemm_shape(m, n, k, shape), dtype, out_dtype, isa, threads, post_ops, weights)
    _bench(request, vs, rounds, as_json)


@bench_app.command("conv")
def bench_conv(
    shape: ConvString,
    dtype: Dtype = "u8s8",
    out_dtype: OutDtype = None,
    isa: Isa = None,
    threads: Threads = 1,
    vs: Vs = None,
    post_ops: PostOps = "",
    weights: Weights = "full",
    rounds: Rounds = 11,
    as_json: Json = False,
) -> None:
    """Time a convolution, given in benchdnn's notation (mb is 2 unless given)."""
    request = Request(parse_conv(shape), dtype, out_dtype, isa, threads, post_ops, weights)
    _bench(request, vs, rounds, as_json)


@explain_app.command("gemm")
def explain_gemm(
    m: M = None,
    n: N = None,
    k: K = None,
    shape: GemmString = None,
    dtype: Dtype = "u8s8",
    out_dtype: OutDtype = None,
    isa: Isa = None,
    threads: Threads = 1,
    post_ops: PostOps = "",
    weights: Weights = "full",
    listing: Listing = False,
    as_json: Json = False,
) -> None:
    """Show the kernel that a matrix multiplication gets."""
    request = Request(_gemm_shape(m, n, k, shape), dtype, out_dtype, isa, threads, post_ops, weights)
    _explain(request, listing, as_json)


@explain_app.command("conv")
def explain_conv(
    shape: ConvString,
    dtype: Dtype = "u8s8",
    out_dtype: OutDtype = None,
    isa: Isa = None,
    threads: Threads = 1,
    post_ops: PostOps = "",
    weights: Weights = "full",
    listing: Listing = False,
    as_json: Json = False,
) -> None:
    """Show the kernel that a convolution gets."""
    request = Request(parse_conv(shape), dtype, out_dtype, isa, threads, post_ops, weights)
    _explain(request, listing, as_json)


@app.command()
def demo(
    threads: Threads = 1,
    as_json: Json = False,
) -> None:
    """Run a trained MobileNetV2 on photos, float against int8 (needs the extra `demo`)."""
    from vnnigen.demo.report import run_demo

    run_demo(threads=threads, as_json=as_json)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exits with 2 and one line on standard error for what vnnigen refuses."""
    try:
        app(args=args, prog_name="vnnigen")
    except VnnigenError as error:
        print(f"vnnigen: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


def _gemm_shape(m: int | None, n: int | None, k: int | None, shape: str | None) -> GemmShape:
    if shape is not None:
        if (m, n, k) != (None, None, None):
            raise VnnigenError("give either --shape or -m, -n and -k, not both")
        return parse_gemm(shape)
    if m is None or n is None or k is None:
        raise VnnigenError("a matrix multiplication needs -m, -n and -k, or --shape MxK:KxN")
    return GemmShape(m, n, k)


def _bench(request: Request, vs: str | None, rounds: int, as_json: bool) -> None:
    if vs not in (None, "f32"):
        raise VnnigenError(f"--vs {vs}: only f32 is known")
    result = measure(request, vs=vs, rounds=rounds)
    if as_json:
        _print_json(result)
    else:
        Console().print(_bench_table(request, result))


def _explain(request: Request, listing: bool, as_json: bool) -> None:
    explanation = build_workload(request).explanation
    if as_json:
        extra = {"listing": explanation.listing()} if listing else {}
        _print_json(explanation.to_dict() | extra)
        return
    Console().print(str(explanation), markup=False, soft_wrap=True)
    if listing:
        # Not through Rich: it would take `[rdi+8]` for markup and wrap long lines.
        print(explanation.listing())


def _print_json(value: dict[str, Any]) -> None:
    print(json.dumps(value, indent=2))


def _bench_table(request: Request, result: dict[str, Any]) -> Table:
    # Names of kernels are long: below the table, they leave a terminal of 80 columns to the figures.
    names = dict.fromkeys(r["kernel"] for r in (result, result.get("f32", result)))
    table = Table(title=_title(request.shape), title_justify="left", caption="\n".join(names), caption_justify="left")
    table.add_column("dtype", no_wrap=True)
    table.add_column("tier", no_wrap=True)
    for name in ("threads", "ms median", "ms min", "GOP/s", "% of peak", "vs f32"):
        table.add_column(name, justify="right")
    rows = [(result, result.get("vs_f32"))]
    if "f32" in result:
        rows.append((result["f32"], 1.0))
    for row, ratio in rows:
        table.add_row(
            row["dtype"],
            row["isa"],
            str(row["threads"]),
            f"{row['ms_median']:.4f}",
            f"{row['ms_min']:.4f}",
            f"{row['gops']:.1f}",
            "-" if row["pct_peak"] is None else f"{row['pct_peak']:.1f}",
            "-" if ratio is None else f"{ratio:.2f}",
        )
    return table


def _title(shape: ConvShape | GemmShape) -> str:
    return f"{'conv' if isinstance(shape, ConvShape) else 'gemm'} {shape}"


def _machine_table(machine: dict[str, Any]) -> Table:
    table = Table(title=machine["name"], title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    table.add_row("features", " ".join(machine["features"]))
    caches = (
        f"L{c['level']} {c['kind']} {c['size'] >> 10} KiB, shared by {c['shared_by']}"
        for c in machine["caches"]
    )
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
