"""The commands `bench` and `explain` of single kernels."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vnnigen.bench.problem_string import ConvShape, GemmShape
from vnnigen.bench.report import measure
from vnnigen.bench.workload import Request, build_workload
from vnnigen.cli.app import bench, explain, print_json
from vnnigen.cli.options import ConvOptions, GemmOptions, Json, KernelOptions, grouped
from vnnigen.errors import VnnigenError

Vs = Annotated[str | None, typer.Option(help="f32: time our f32 kernel alternately in the same run.")]
Rounds = Annotated[int, typer.Option(min=1, help="Samples of each kernel; the median is quoted.")]
Listing = Annotated[bool, typer.Option("--listing", help="Add the annotated assembly.")]


@bench.command("gemm")
@grouped
def bench_gemm(
    gemm: GemmOptions, kernel: KernelOptions, vs: Vs = None, rounds: Rounds = 11, as_json: Json = False
) -> None:
    """Time a matrix multiplication of [m, k] by [k, n]."""
    _bench(kernel.request(gemm), vs, rounds, as_json)


@bench.command("conv")
@grouped
def bench_conv(
    conv: ConvOptions, kernel: KernelOptions, vs: Vs = None, rounds: Rounds = 11, as_json: Json = False
) -> None:
    """Time a convolution, given in benchdnn's notation (mb is 2 unless given)."""
    _bench(kernel.request(conv), vs, rounds, as_json)


@explain.command("gemm")
@grouped
def explain_gemm(gemm: GemmOptions, kernel: KernelOptions, listing: Listing = False, as_json: Json = False) -> None:
    """Show the kernel that a matrix multiplication gets."""
    _explain(kernel.request(gemm), listing, as_json)


@explain.command("conv")
@grouped
def explain_conv(conv: ConvOptions, kernel: KernelOptions, listing: Listing = False, as_json: Json = False) -> None:
    """Show the kernel that a convolution gets."""
    _explain(kernel.request(conv), listing, as_json)


def _bench(request: Request, vs: str | None, rounds: int, as_json: bool) -> None:
    if vs not in (None, "f32"):
        raise VnnigenError(f"--vs {vs}: only f32 is known")
    result = measure(request, vs=vs, rounds=rounds)
    if as_json:
        print_json(result)
    else:
        Console().print(_bench_table(request, result))


def _explain(request: Request, listing: bool, as_json: bool) -> None:
    explanation = build_workload(request).explanation
    if as_json:
        extra = {"listing": explanation.listing()} if listing else {}
        print_json(explanation.to_dict() | extra)
        return
    Console().print(str(explanation), markup=False, soft_wrap=True)
    if listing:
        # Not through Rich: it would take `[rdi+8]` for markup and wrap long lines.
        print(explanation.listing())


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
