"""int8 kernels on one problem each: GEMM on every tier, ResNet-50's convolutions, call overhead, generation time.

    python -m benchmarks.int8 [--json benchmarks/results/int8.json] [--onednn] [--threads 1] [--rounds 21]

Everything has ReLU and requantization to u8 fused. `GOP/s` counts taps on the padding; `% of peak` is of the
kernel's own multiply step, measured in the same process; ratios are medians over rounds in which the candidates
ran alternately. `--onednn` adds oneDNN, capped to the same tier (see benchmarks/peers/onednn.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

import vnnigen
from benchmarks.common import Case, Row, context, rows_table, run_case, warn_if_busy, write_json
from benchmarks.peers.onednn import OneDNNPeer
from vnnigen.bench.problem_string import GemmShape, parse_conv
from vnnigen.bench.timing import compare
from vnnigen.bench.workload import Request

GEMM = GemmShape(1024, 1024, 1024)
#: (name, weights, tier): safe weights take the fast chain on tiers without VNNI, full-range ones the exact chain.
GEMMS = (
    ("GEMM 1024^3", "full", "avx512_vnni"),
    ("GEMM 1024^3", "full", "avx_vnni"),
    ("GEMM 1024^3, safe weights", "safe", "avx512"),
    ("GEMM 1024^3, full-range weights", "full", "avx512"),
    ("GEMM 1024^3, safe weights", "safe", "avx2"),
    ("GEMM 1024^3, full-range weights", "full", "avx2"),
)
CONVS = {
    "3x3 64 56x56": "mb1ic64ih56oc64oh56kh3ph1",
    "3x3 128 28x28": "mb1ic128ih28oc128oh28kh3ph1",
    "3x3 256 14x14": "mb1ic256ih14oc256oh14kh3ph1",
    "3x3 512 7x7": "mb1ic512ih7oc512oh7kh3ph1",
    "1x1 64->256 56x56": "mb1ic64ih56oc256oh56kh1ph0",
    "7x7/2 3->64 224x224": "mb1ic3ih224oc64oh112kh7sh2ph3",
    "depthwise 3x3 128 56x56": "g128mb1ic128ih56oc128oh56kh3ph1",
}
CONV_TIERS = ("avx512_vnni",)
_COLD_RUNS = 5
_SATURATION = "Without VNNI it always takes the fast chain: full-range weights saturate there, and its sums are wrong."


def cases(threads: int) -> list[Case]:
    """List every problem on every tier that it is measured on."""
    found = [Case(name, Request(GEMM, "u8s8", isa=tier, threads=threads, post_ops="relu", weights=weights))
             for name, weights, tier in GEMMS]  # fmt: skip
    for tier in CONV_TIERS:
        for name, text in CONVS.items():
            request = Request(parse_conv(text), "u8s8", isa=tier, threads=threads, post_ops="relu")
            found.append(Case(f"conv {name}", request))
    return found


def f32_case(threads: int) -> Case:
    """Return the f32 GEMM as a case of its own, for its share of the FMA peak."""
    request = Request(GEMM, "f32", isa="avx512", threads=threads, post_ops="relu")
    return Case("GEMM 1024^3 f32", request, vs_f32=False)


def call_overhead(rounds: int) -> dict[str, float]:
    """Microseconds of one call of a handle that has next to nothing to compute."""
    vnnigen.set_num_threads(1)
    x, w = np.zeros((1, 1, 1, 16), np.uint8), np.ones((16, 16, 1, 1), np.int8)
    conv = vnnigen.Conv2dInt8(w, y_scale=1.0)
    out = conv(x)
    times = compare({"with out": lambda: conv(x, out), "without out": lambda: conv(x)}, rounds=rounds)
    return {name: samples.median * 1e6 for name, samples in times.samples.items()}


def generation_ms(channels: int) -> float:
    """Milliseconds that generating one 3x3 convolution kernel takes, as `explain` reports it."""
    w = np.ones((channels, channels, 3, 3), np.int8)
    conv = vnnigen.Conv2dInt8(w, y_scale=1.0, padding=1, post_ops=vnnigen.ReLU())
    return conv.explain((1, 56, 56, channels)).jit_ms


def generation_times() -> dict[str, float]:
    """Measure generation: the first kernel of a process, and kernels of shapes that are new to a warm one."""
    program = "from benchmarks.int8 import generation_ms; print(generation_ms(64))"
    cold = [
        float(subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True).stdout)
        for _ in range(_COLD_RUNS)
    ]
    generation_ms(64)
    warm = [generation_ms(channels) for channels in range(72, 136, 8)]
    return {"cold": statistics.median(cold), "warm": statistics.median(warm)}


def small_table(overhead: dict[str, float], generation: dict[str, float]) -> Table:
    """Lay out what is not a speed."""
    table = Table(title="Around a kernel", title_justify="left")
    table.add_column("what")
    table.add_column("time", justify="right")
    for name, value in overhead.items():
        table.add_row(f"call of a handle, 1x1 conv 16->16 on one pixel, {name}", f"{value:.2f} us")
    for name, value in generation.items():
        which = "first kernel of a process" if name == "cold" else "a further shape"
        table.add_row(f"generation of a 3x3 kernel, {which}", f"{value:.1f} ms")
    return table


def measure_all(arguments: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Run everything, print it, and return what the JSON file holds."""
    result = context()
    rows: list[Row] = []
    with OneDNNPeer() as onednn:
        peer = onednn if arguments.onednn else None
        for case in [*cases(arguments.threads), f32_case(arguments.threads)]:
            rows.append(run_case(case, arguments.rounds, peer))
    title = f"{result['machine']['name']}, {arguments.threads} thread(s), ReLU + requantization fused"
    name, caption = None, ""
    if arguments.onednn:
        name, caption = "oneDNN", f"oneDNN {onednn.version}, capped to the row's tier. {_SATURATION}"
        result["peer"] = {"name": name, "version": onednn.version}
    console.print(rows_table(title, rows, name, caption))
    overhead, generation = call_overhead(arguments.rounds), generation_times()
    console.print(small_table(overhead, generation))
    return result | {
        "rows": [row.to_dict() for row in rows], "call_overhead_us": overhead, "generation_ms": generation,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.int8", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    parser.add_argument("--onednn", action="store_true", help="time oneDNN alternately (downloads its wheel)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=21, help="samples of each candidate")
    arguments = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    warn_if_busy(console)
    result = measure_all(arguments, console)
    if arguments.json:
        write_json(arguments.json, result)


if __name__ == "__main__":
    main()
